"""Put the summaries of docs/results/vit_methods.json and llm_methods.json between their markers in README.md.

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
    for marker, table in (("<!-- vit_methods", summary()), ("<!-- llm_methods", language())):
        begin = text.index("-->\n", text.index(marker)) + 4
        end = text.index("<!-- end -->", begin)
        text = text[:begin] + "\n" + table + "\n\n" + text[end:]
    readme.write_text(text)


if __name__ == "__main__":
    main()
