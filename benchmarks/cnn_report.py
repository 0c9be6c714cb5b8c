"""The tables of cnn_methods.py."""

import statistics
from typing import Any


def table(known: dict[str, Any]) -> str:
    """Markdown: for each model what each part found."""
    lines = ["# Methods on ConvNets", "", *_describe(known)]
    for model in dict.fromkeys(run["model"] for run in known["runs"]):
        mine = [run for run in known["runs"] if run["model"] == model]
        lines += ["", f"## {model}: up to {len({run['seed'] for run in mine})} draws, full precision {_fp(mine)}"]
        lines += _grid("Top-1 in percent", [run for run in mine if run["part"] in ("methods", "folding")])
        lines += _front_table([run for run in mine if run["part"] == "front"])
        lines += _grid(
            "Pruned and rounded to 6 bits, no data: top-1 in percent by share of channels removed",
            [run for run in mine if run["part"] == "pruning"],
        )
        lines += _pruned([run for run in mine if run["part"] == "pruning"])
    return "\n".join(lines) + "\n"


def _fp(runs: list[dict[str, Any]]) -> str:
    return f"{100 * runs[0]['fp_top1']:.2f} % of {runs[0]['count']} pictures"


def _grid(title: str, runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    settings, devices = (list(dict.fromkeys(run[key] for run in runs)) for key in ("setting", "device"))
    head = ["method", *map(_short, settings), *(f"seconds, {device}" for device in devices)]
    lines = ["", f"### {title}", "", *_head(head)]
    for method in dict.fromkeys(run["method"] for run in runs):
        rows = [run for run in runs if run["method"] == method]
        cells = [_spread([100 * run["top1"] for run in rows if run["setting"] == setting]) for setting in settings]
        seconds = [_mean([run for run in rows if run["device"] == device], "time_s") for device in devices]
        lines.append("| " + " | ".join([method, *cells, *seconds]) + " |")
    return lines


def _head(titles: list[str]) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def _front_table(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = ["", "### ZeroQ's front against the same bits everywhere, activations in 8 bits, no data", ""]
    devices = list(dict.fromkeys(run["device"] for run in runs))
    head = ["uniform bits", "size, MB", "uniform", "ZeroQ at this size", "its size, MB"]
    lines += _head([*head, *(f"{what}, {device}" for device in devices for what in ("seconds", "of these distilling"))])
    for setting in dict.fromkeys(run["setting"] for run in runs):
        rows = [run for run in runs if run["setting"] == setting]
        same = [run for run in rows if run["method"] != "zeroq"]
        own = [run for run in rows if run["method"] == "zeroq"]
        if not same or not own:
            continue
        top1 = [_spread([100 * run["top1"] for run in part]) for part in (same, own)]
        sizes = [f"{statistics.fmean(run['size_bytes'] for run in part) / 1e6:.3f}" for part in (same, own)]
        seconds = [
            _mean([run for run in own if run["device"] == device], key)
            for device in devices
            for key in ("time_s", "distillation_s")
        ]
        bits = setting.split("/")[0].removeprefix("int")
        lines.append("| " + " | ".join([bits, sizes[0], *top1, sizes[1], *seconds]) + " |")
    return lines


def _pruned(runs: list[dict[str, Any]]) -> list[str]:
    rows = [run for run in runs if run["method"] == "udfc-corrected"]
    if not rows:
        return []
    lines = ["", "| channels removed | size, MB | seconds to evaluate |", "|---|---|---|"]
    return lines + [f"| {r['setting']} | {r['size_bytes'] / 1e6:.3f} | {r['forward_s']:.2f} |" for r in rows]


def _mean(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs if run[key] is not None]
    return f"{statistics.fmean(values):.1f}" if values else "–"


def _short(setting: str) -> str:
    weights, slash, activations = setting.partition("/")
    return f"W{weights.removeprefix('int')}A{activations.removeprefix('int')}" if slash else setting


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def _describe(known: dict[str, Any]) -> list[str]:
    runs = known["runs"]
    return [
        f"Mean ± standard deviation over draws of {_of(runs, 'samples')} pictures: from data for rtn, gptq and erq; "
        f"distilled in {_of(runs, 'steps')} steps from the model alone for zeroq and where the row says so. Batch "
        "normalizations are folded unless the row says otherwise; the input of the first layer stays in full "
        f"precision. Written by `benchmarks/cnn_methods.py` on {_of(runs, 'device')}, "
        f"torch {known['facts'].get('torch')}; seconds are of the whole quantization, beside other runs on the "
        "same machine."
    ]


def _of(runs: list[dict[str, Any]], key: str) -> str:
    return " or ".join(str(value) for value in dict.fromkeys(run[key] for run in runs))
