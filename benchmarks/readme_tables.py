"""Put the summaries of vit_methods.json, cnn_methods.json and llm_methods.json between their markers in README.md.

python benchmarks/readme_tables.py
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHOWN = ("rtn", "repq", "gptq", "repq + gptq", "erq v1", "erq v2", "erq")
LANGUAGE = ("rtn", "gptq", "awq", "adadim", "squeezellm", "lorc", "signround", "gptq-fitted", "gptq-learned")
TOOLS = {"hqq": "HQQ (the tool)", "llmcompressor": "GPTQ in llm-compressor", "autoround": "AutoRound"}
BITS = (4, 3, 2)
CONVNETS = {  # method in the table: name in README.md
    "rtn": "rtn", "gptq": "gptq", "erq": "erq", "rtn, distilled": "rtn, no data", "gptq, distilled": "gptq, no data",
    "erq, distilled": "erq, no data",
}  # fmt: skip
CONVNET, FRONT = "efficientnet_lite0", ("int4/int8", "int5/int8")
DATA = ("samples", "length", "windows", "window_length")


def summary() -> str:
    data = json.loads((ROOT / "docs/results/vit_methods.json").read_text())
    runs, facts = data["runs"], data["facts"]
    lines = []
    for model in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == model]
        settings = [
            one for one in dict.fromkeys(run["setting"] for run in mine)
            if all(sum(run["method"] == m and run["setting"] == one for run in mine) > 1 for m in SHOWN)
        ]  # fmt: skip
        titles = [re.sub(r"int(\d)/int(\d)", r"W\1A\2", setting) for setting in settings]
        draws = len({run["seed"] for run in mine})
        title = f"`{model}`, top-1 % ({100 * mine[0]['fp_top1']:.2f} in full precision), {draws} draws"
        lines += [f"| {title} | " + " | ".join(titles) + " |"]
        lines += ["|---" * (len(settings) + 1) + "|"]
        for method in SHOWN:
            cells = [_cell([r["top1"] for r in mine if r["method"] == method and r["setting"] == s]) for s in settings]
            name = f"**{method}**" if method == "erq" else method
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append(
        f"{facts['count']} CIFAR-10 test pictures, {facts['samples']} calibration pictures, mean ± standard deviation "
        "over the draws; inputs of layers and attention operands quantized, weights per row. ViTs trained on CIFAR-10."
    )
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "–"


def convnets() -> str:
    """An ImageNet network by several methods, with data and without, and ZeroQ's bits at the size of uniform ones."""
    runs = json.loads((ROOT / "docs/results/cnn_methods.json").read_text())["runs"]
    mine = [run for run in runs if run["model"] == CONVNET]
    methods = [run for run in mine if run["part"] == "methods"]
    settings = list(dict.fromkeys(run["setting"] for run in methods))
    titles = [re.sub(r"int(\d)/int(\d)", r"W\1A\2", setting) for setting in settings]
    full = f"{100 * mine[0]['fp_top1']:.1f} in full precision"
    lines = [f"| `{CONVNET}`, top-1 % ({full}) | " + " | ".join(titles) + " |", "|---" * (len(settings) + 1) + "|"]
    for method, name in CONVNETS.items():
        cells = [_cell([r["top1"] for r in methods if (r["method"], r["setting"]) == (method, s)]) for s in settings]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    sizes = []
    for setting in FRONT:
        front = [run for run in mine if run["part"] == "front" and run["setting"] == setting]
        same, own = ([r for r in front if (r["method"] == "zeroq") == chosen] for chosen in (False, True))
        sizes.append(
            f"{_cell([r['top1'] for r in own])} % instead of {_cell([r['top1'] for r in same])} % at the "
            f"{statistics.fmean(r['size_bytes'] for r in same) / 1e6:.1f} MB of {setting[3]} bits everywhere"
        )
    lines.append(
        f"\n{mine[0]['count']} ImageNet pictures, most likely training ones: read what is lost. No data: on pictures "
        f"distilled from the model. ZeroQ's bits for each layer, without data and with 8-bit activations: "
        f"{', '.join(sizes)}."
    )
    return "\n".join(lines)


def language() -> str:
    """Perplexity and honest bits of dither's methods and of other tools, measured on equal data."""
    made = json.loads((ROOT / "docs/results/llm_methods.json").read_text())
    facts, peers = made["facts"], json.loads((ROOT / "docs/results/llm_peers.json").read_text())["runs"]
    same = [one for one in peers if all(one[key] == facts[key] for key in DATA)]
    lines = [
        f"| `{facts['model']}`, perplexity ({facts['fp_perplexity']:.2f} in full precision) at bits per weight | "
        + " | ".join(f"{bits} bits" for bits in BITS) + " |",
        "|---" * (len(BITS) + 1) + "|",
    ]  # fmt: skip
    for tool, name in TOOLS.items():
        cells = [_perplexity([one for one in same if one["peer"] == tool and one["bits"] == bits]) for bits in BITS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for label in LANGUAGE:
        found = [one for one in made["runs"] if one["label"] == label]
        cells = [
            _perplexity([one for one in found if one["weights"].startswith((f"int{bits}:", f"nuq{bits}:"))])
            for bits in BITS
        ]
        name = f"**{label}**" if label == LANGUAGE[-1] else label
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(
        f"\nAll {facts['window_length']}-token windows of `{facts['evaluation']}`; calibration: {facts['samples']} × "
        f"{facts['length']} tokens, one draw where no ± stands; in brackets bits per weight, everything "
        "counted. Weights of the blocks alone are quantized."
    )
    return "\n".join(lines)


def _perplexity(runs: list[dict[str, Any]]) -> str:
    known = [run["perplexity"] for run in runs if run["perplexity"] is not None]
    if not known:
        return "–"
    mean, bits = statistics.fmean(known), statistics.fmean(run["bits_per_weight"] for run in runs)
    shown = f"{mean:.2f}" if mean < 1000 else f"{mean:.0e}".replace("e+0", " · 10^")
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 and mean < 1000 else ""
    return f"{shown}{spread} ({bits:.2f})"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    tables = {"vit_methods": summary(), "cnn_methods": convnets(), "llm_methods": language()}
    for name, table in tables.items():
        marker = f"<!-- {name}"
        begin = text.index("-->\n", text.index(marker)) + 4
        end = text.index("<!-- end -->", begin)
        text = text[:begin] + "\n" + table + "\n\n" + text[end:]
    readme.write_text(text)


if __name__ == "__main__":
    main()
