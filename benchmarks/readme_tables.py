"""Put the summary of docs/results/vit_methods.json between its markers in README.md.

python benchmarks/readme_tables.py
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ("rtn", "repq", "gptq", "repq + gptq", "erq v1", "erq v2", "erq")


def summary() -> str:
    data = json.loads((ROOT / "docs/results/vit_methods.json").read_text())
    runs, facts = data["runs"], data["facts"]
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    lines = []
    for model in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == model]
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


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    begin, end = text.index("-->\n", text.index("<!-- vit_methods")) + 4, text.index("<!-- end -->")
    readme.write_text(text[:begin] + "\n" + summary() + "\n\n" + text[end:])


if __name__ == "__main__":
    main()
