"""Integer execution that is real: onnx-qdq in ONNX Runtime against dither's simulation and against float32 ONNX.

    python benchmarks/onnx_int8.py --models MODEL_FOLDER... --calibration train.npz --data test_pictures/ [--threads 1]

Each model is quantized (weights and activations in --formats), exported with `dither export --to onnx-qdq`, and answers
the pictures beside the simulated network. Its speed is measured against the same network in float32 ONNX, the two in
turns within one process, so that the ratio is that of one machine at one time. Writes docs/results/onnx_int8.json, .md.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import dither
from dither.export.qdq import integer_kernels
from dither.export.sessions import open_session
from dither.export.tracing import FILE, trace
from dither.models.network import open_network

METHODS = {
    "int8/int8": dither.RTN(weights="int8:channel:sym", activations="int8:tensor"),
    "int4/int8": dither.ERQ(weights="int4:channel:sym", activations="int8:tensor", dual=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--formats", nargs="+", default=["int8/int8"], choices=METHODS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--merge", action="store_true", help="keep the rows of other models that are there")
    parser.add_argument("--out", type=Path, default=Path("docs/results/onnx_int8"))
    given = parser.parse_args()
    path = given.out.with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if given.merge and path.is_file() else []
    for folder in given.models:
        for name, sums in product(given.formats, (False, True) if has_convolutions(folder) else (False,)):
            key = folder.name, name, "integers" if sums else "floats"
            rows = [row for row in rows if (row["model"], row["format"], row.get("sums", "floats")) != key]
            rows.append(measure(folder, name, sums, given))
            given.out.parent.mkdir(parents=True, exist_ok=True)
            machine = {"processor": platform.processor() or platform.machine(), "threads": given.threads}
            versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
            path.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(table(rows, given.threads))


def measure(folder: Path, name: str, sums: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Quantize, export (with residual sums in integers or in floats), compare answers, measure speed."""
    with tempfile.TemporaryDirectory() as scratch:
        network = open_network(folder)
        result = dither.quantize(folder, METHODS[name], given.calibration, count=given.samples)
        calibration = given.calibration if sums else None
        report = dither.export(result, "onnx-qdq", Path(scratch) / "int8", data=given.data, calibration=calibration)
        shape = shape_of(Path(scratch) / "int8" / FILE)
        trace(network.model.float().eval(), {"pixel_values": torch.zeros(2, *shape)}, Path(scratch) / "float")
        paths = [Path(scratch) / kind / FILE for kind in ("float", "int8")]
        return {
            "model": folder.name,
            "format": name,
            "sums": "integers" if sums else "floats",
            "pictures": report["pictures"],
            "kernels": integer_kernels(paths[1]),
            "size_bytes": [path.stat().st_size for path in paths],
            "speed": {str(batch): ratio(paths, (batch, *shape), given) for batch in given.batches},
            "notes": report["notes"],
        }


def has_convolutions(folder: Path) -> bool:
    """Whether a network has more of them than one that cuts a picture into patches."""
    return sum(isinstance(module, torch.nn.Conv2d) for module in open_network(folder).model.modules()) > 1


def shape_of(path: Path) -> tuple[int, ...]:
    session = open_session(path)
    return tuple(session.get_inputs()[0].shape[1:])


def ratio(paths: list[Path], shape: tuple[int, ...], given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of both networks in turns: the least, which other work disturbs least, and all, to see how much."""
    sessions = [open_session(path, threads=given.threads) for path in paths]
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    times: list[list[float]] = [[], []]
    for turn in range(given.rounds + 3):
        for kind, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, pixels)
            if turn >= 3:  # the first runs fill caches
                times[kind].append(1e3 * (time.perf_counter() - start))
    slow, fast = (min(one) for one in times)
    medians = [statistics.median(one) for one in times]
    return {"float_ms": slow, "int8_ms": fast, "faster": slow / fast, "medians_ms": medians}


def table(rows: list[dict[str, Any]], threads: int) -> str:
    lines = [
        "# Integer execution in ONNX Runtime",
        "",
        f"Written by `benchmarks/onnx_int8.py`. Speed on {threads} thread(s) of a machine that does other work too,",
        "the two networks in turns; the factor is that of their least times, which are in brackets.",
        "",
        "| model | format | residual sums in | top-1 in ONNX Runtime | simulated | same answers | of "
        "| file, float32 / integers | "
        + " | ".join(f"batch {batch}: times as fast" for batch in rows[0]["speed"])
        + " | integer kernels |",
        "|---|---|---|---|---|---|---|---|" + "---|" * (len(rows[0]["speed"]) + 1),
    ]
    for row in rows:
        seen = row["pictures"]
        speeds = [
            f"{one['faster']:.2f} ({one['float_ms']:.1f} / {one['int8_ms']:.1f} ms)" for one in row["speed"].values()
        ]
        sizes = " / ".join(f"{size / 1e6:.2f} MB" for size in row["size_bytes"])
        kernels = ", ".join(f"{count} {kind}" for kind, count in row["kernels"].items())
        lines.append(
            f"| {row['model']} | {row['format']} | {row.get('sums', 'floats')} | {100 * seen['top1']:.2f} "
            f"| {100 * seen['simulated_top1']:.2f} | "
            f"{100 * seen['agreement']:.2f} % | {seen['count']} | {sizes} | {' | '.join(speeds)} | {kernels} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
