"""Rows of text for the terminal and the HTML report, and the one place where numbers become words."""

import math
from collections.abc import Mapping
from typing import Any

from dither.report.data import MethodSummary, Spread, items, method_summaries, number, section

DASH = "–"
MEANING = {
    "Top-1": "share of test inputs whose first choice is the right class",
    "Perplexity": "of text that the model predicts token by token; lower is better",
    "Agreement": "share of test inputs where the quantized and the full-precision model choose the same class",
    "KL": "mean divergence of the two models' output distributions in nats; 0 is identical",
    "SQNR": "power of the full-precision outputs over the power of the error, in dB; higher is better",
    "Bits per weight": "stored bits per quantized weight; scales, zero points and codebooks are counted",
    "Size": "bytes of all stored parameters, those kept in full precision included",
    "Quantized": "share of the model's parameters that are stored in few bits",
    "Time": "wall time of the quantization",
    "Methods": "methods with at least one finished run",
    "Output error": "squared error of a layer's output over its squared norm, on calibration inputs",
}


def percent(value: object, digits: int = 1) -> str:
    """A share such as 0.861 as `86.1%`."""
    known = number(value)
    return DASH if known is None else f"{100 * known:.{digits}f}%"


def size(value: object) -> str:
    """Bytes in decimal units, three significant digits."""
    known = number(value)
    if known is None:
        return DASH
    for unit in ("B", "kB", "MB", "GB"):
        if abs(known) < 999.5:
            return f"{known:.0f} B" if unit == "B" else f"{significant(known)} {unit}"
        known /= 1000
    return f"{significant(known)} TB"


def seconds(value: object) -> str:
    """A duration in the units a person would say it in."""
    known = number(value)
    if known is None:
        return DASH
    if known < 0.1:
        return f"{1000 * known:.0f} ms"
    if known < 60:
        return f"{known:.2f} s" if known < 1 else f"{known:.1f} s"
    minutes, rest = divmod(round(known), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: object) -> str:
    """A whole number with thousands separated."""
    known = number(value)
    return DASH if known is None else f"{known:,.0f}"


def fixed(value: object, digits: int = 2) -> str:
    """A number with so many decimals."""
    known = number(value)
    return DASH if known is None else f"{known:.{digits}f}"


def significant(value: object, digits: int = 3) -> str:
    """A number with so many significant digits, in powers of ten only where zeros would fill the cell."""
    known = number(value)
    if known is None:
        return DASH
    if known == 0 or 1e-4 <= abs(known) < 1e6:
        text = f"{known:#.{digits}g}" if abs(known) < 10 ** (digits - 1) else f"{known:.0f}"
        return text.rstrip(".") if known else "0"
    return f"{known:.{digits - 1}e}"


def spread_text(value: Spread | None, digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
    """`84.6 ± 0.4%`: mean and standard deviation; the mean alone when there is one value."""
    if value is None:
        return DASH
    spread = "" if value.std is None else f" ± {factor * value.std:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{spread}{unit}"


def plain(value: object) -> str:
    """A recipe or provenance value as text."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return DASH if number(value) is None else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value) or DASH
    return str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and texts, in the order given."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += (
            flat(value, f"{name}.")
            if isinstance(value, Mapping) and value
            else [(name, plain(value if value != {} else None))]
        )
    return pairs


def notes(values: object) -> str:
    """What a solver had to say about a layer, as `damping 0.01, tries 2`."""
    if isinstance(values, Mapping):
        return ", ".join(f"{name} {text}" for name, text in flat(values)) or DASH
    return plain(values)


def ratio(before: object, after: object) -> str:
    """How many times smaller, or a dash."""
    old, new = number(before), number(after)
    return f"{old / new:.1f}× smaller" if old and new else DASH


def summary_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline figures: `figure`, `value`, `note` (context, may be empty), `meaning`; unknown ones are left out."""
    rows = _compare_summary(data) if data.get("kind") == "compare" else _quantize_summary(data)
    return [
        {"figure": name, "value": value, "note": note, "meaning": MEANING[name]}
        for name, value, note in rows
        if DASH not in value
    ]


def _quantize_summary(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    totals, evaluation = section(data, "totals"), section(data, "evaluation")
    before, after = number(evaluation.get("fp_top1")), number(evaluation.get("top1"))
    inputs = f"on {count(evaluation['count'])} inputs" if number(evaluation.get("count")) is not None else ""
    change = "" if before is None or after is None else f"{signed(100 * (after - before))} points "
    old, new = totals.get("original_bytes"), totals.get("size_bytes")
    smaller = ratio(old, new).replace(DASH, "")
    quantized, parameters = number(totals.get("quantized_parameters")), number(totals.get("parameters"))
    memory, planned = size(totals.get("peak_rss_bytes")), size(totals.get("expected_memory_bytes"))
    memory += f", {planned} planned beside Python's own" if planned != DASH else ""
    share = quantized / parameters if quantized is not None and parameters else None
    return [
        (
            "Top-1",
            f"{percent(before)} → {percent(after)}" if before is not None else percent(after),
            (change + inputs).strip(),
        ),
        ("Perplexity", _change(evaluation.get("fp_perplexity"), evaluation.get("perplexity")), inputs),
        ("Agreement", percent(evaluation.get("agreement")), inputs),
        ("KL", significant(evaluation.get("kl")) + " nats", inputs),
        ("SQNR", fixed(evaluation.get("sqnr_db"), 1) + " dB", inputs),
        ("Bits per weight", fixed(totals.get("bits_per_weight")), ""),
        ("Size", f"{size(old)} → {size(new)}" if number(old) is not None else size(new), smaller),
        ("Quantized", percent(share), f"of {count(parameters)} parameters"),
        ("Time", seconds(totals.get("time_s")), f"peak memory {memory}" if not memory.startswith(DASH) else ""),
    ]


def _change(before: object, after: object) -> str:
    return fixed(after) if number(before) is None else f"{fixed(before)} → {fixed(after)}"


def _compare_summary(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    reference, runs, failures = section(data, "reference"), items(data, "runs"), items(data, "failures")
    rows = method_summaries(data)
    failed = f", {len(failures)} failed" if failures else ""
    inputs = number(section(data, "evaluation").get("count"))
    labels = len({row.label for row in rows})
    times = [known for run in runs if (known := number(run.get("time_s"))) is not None]
    return [
        ("Methods", str(labels), f"{len(runs)} runs{failed}"),
        (
            "Top-1",
            percent(reference.get("top1")),
            "full precision" + (f", {count(inputs)} inputs" if inputs is not None else ""),
        ),
        ("Perplexity", fixed(reference.get("perplexity")), "full precision"),
        ("Size", size(reference.get("size_bytes")), "full precision"),
        ("Time", seconds(math.fsum(times) if times else None), "all runs together"),
    ]


def signed(value: float, digits: int = 1) -> str:
    """A change with its sign; a true minus, never a hyphen."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def compare_cells(row: MethodSummary) -> dict[str, tuple[str, str]]:
    """A comparison's cells in column order: column title → (metric it shows or empty, text)."""
    m = row.metrics
    return {
        "Method": ("", row.label or DASH),
        "Weights": ("", row.weights or DASH),
        "Activations": ("", row.activations or DASH),
        "Bits": ("bits_per_weight", fixed(cell.mean if (cell := m["bits_per_weight"]) else None)),
        "Size": ("size_bytes", size(cell.mean if (cell := m["size_bytes"]) else None)),
        "Top-1": ("top1", spread_text(m["top1"], 1, 100.0, "%")),
        "Perplexity": ("perplexity", spread_text(m["perplexity"], 2)),
        "Agreement": ("agreement", spread_text(m["agreement"], 1, 100.0, "%")),
        "KL": ("kl", spread_text(m["kl"], 3)),
        "SQNR dB": ("sqnr_db", spread_text(m["sqnr_db"], 1)),
        "Time": ("time_s", spread_text(m["time_s"], 1, 1.0, " s")),
        "Seeds": ("seeds", str(row.runs)),
    }


def compare_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per method and setting, mean ± standard deviation over seeds; columns without any data are left out."""
    rows = [{title: text for title, (_, text) in compare_cells(row).items()} for row in method_summaries(data)]
    return _without_empty(rows)


def layer_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per quantized layer in execution order; columns without any data are left out."""
    rows = [
        {
            "Layer": plain(layer.get("name")),
            "Shape": "×".join(map(plain, layer.get("shape") or ())) or DASH,
            "Weights": plain(layer.get("weights")),
            "Activations": plain(layer.get("activations")),
            "Bits": fixed(layer.get("bits_per_weight")),
            "Output error": significant(layer.get("output_error")),
            "Notes": notes(layer.get("notes")),
        }
        for layer in items(data, "layers")
    ]
    return _without_empty(rows)


def coverage_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per module of the model: quantized or kept, and why."""
    return [
        {
            "Module": plain(module.get("name")),
            "Class": plain(module.get("class")),
            "Parameters": count(module.get("parameters")),
            "Status": plain(module.get("status")),
            "Reason": plain(module.get("reason")),
        }
        for module in items(data, "coverage")
    ]


def coverage_reasons(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The coverage in a few lines: modules and parameters per status and reason, quantized first, then the largest."""
    groups: dict[tuple[str, str], tuple[int, float]] = {}
    for module in items(data, "coverage"):
        status = plain(module.get("status"))  # which layer a norm is folded into, its own row says
        key = (status, "folded into the layer before" if status == "folded" else plain(module.get("reason")))
        modules, parameters = groups.get(key, (0, 0.0))
        groups[key] = (modules + 1, parameters + (number(module.get("parameters")) or 0.0))
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != "quantized", -item[1][1], item[0]))
    return [
        {"Status": status, "Reason": reason, "Modules": count(modules), "Parameters": count(parameters)}
        for (status, reason), (modules, parameters) in ordered
    ]


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    known = {title for row in rows for title, text in row.items() if text != DASH}
    return [{title: text for title, text in row.items() if title in known} for row in rows]
