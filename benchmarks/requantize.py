"""MRQ: models that ONNX Runtime's own quantizer made, in other schemes, without data.

    python benchmarks/requantize.py --models MODEL_FOLDER... --calibration train.npz --data test.npz [--quick]

Each model is quantized by ONNX Runtime (asymmetric uint8, one scale a tensor, ranges by min and max on calibration
pictures), then re-quantized into each scheme with neither, either and both of MRQ's parts. Accuracy is that of ONNX
Runtime on the test pictures; the drop is against the source quantized model. Writes docs/results/requantize.json, .md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from dither.data import open_images
from dither.export.requantize import requantize
from dither.export.sessions import open_session
from dither.export.tracing import FILE, trace
from dither.models.network import open_network

TARGETS = ("int8:tensor", "int8:channel", "int8:tensor:pow2", "int8:channel:pow2")
PARTS = {"neither": (False, False), "correction": (True, False), "folding": (False, True), "both": (True, True)}


class Pictures(CalibrationDataReader):
    """Batches of calibration pictures, as ONNX Runtime asks for them."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches = iter([{"pixel_values": batch} for batch in batches])

    def get_next(self) -> Any:
        return next(self.batches, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--per-channel", action="store_true", help="sources with one weight scale a channel")
    parser.add_argument("--quick", action="store_true", help="500 pictures, one target")
    parser.add_argument("--merge", action="store_true", help="keep the rows of other models that are there")
    parser.add_argument("--out", type=Path, default=Path("docs/results/requantize"))
    given = parser.parse_args()
    if given.quick:
        given.count, given.targets = 500, TARGETS[2:3]
    path = given.out.with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if given.merge and path.is_file() else []
    for folder in given.models:
        kind = "channel" if given.per_channel else "tensor"
        rows = [row for row in rows if (row["model"], row["source"]) != (folder.name, kind)]
        rows += measure(folder, kind, given)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"onnxruntime": onnxruntime.__version__, "rows": rows}, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(rows))


def measure(folder: Path, kind: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    network = open_network(folder)
    images = open_images(given.calibration).sample(given.samples, seed=0)
    calibration = [batch.numpy() for batch in images.pixel_batches(network.processor, 32)]
    test = open_images(given.data)
    test = test.first(min(given.count, len(test)))
    pixels = np.concatenate([batch.numpy() for batch in test.pixel_batches(network.processor, 250)])
    labels = np.array(test.labels)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        trace(network.model.float().eval(), {"pixel_values": torch.from_numpy(calibration[0][:2])}, place)
        quant_pre_process(str(place / FILE), str(place / "folded.onnx"), skip_symbolic_shape=True)
        quantize_static(
            str(place / "folded.onnx"), str(place / "source.onnx"), Pictures(calibration),
            per_channel=kind == "channel",
            quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8 if kind == "channel" else QuantType.QUInt8,
        )  # fmt: skip
        full, source = (top1(place / name, pixels, labels) for name in (FILE, "source.onnx"))
        rows = []
        for target in given.targets:
            for part, (correct, fold) in PARTS.items():
                out, start = place / f"{len(rows)}.onnx", time.perf_counter()
                report = requantize(place / "source.onnx", target, out, correct_weights=correct, fold_errors=fold)
                seconds = time.perf_counter() - start
                found = top1(out, pixels, labels)
                rows.append({
                    "model": folder.name, "source": kind, "count": len(labels), "fp_top1": full, "source_top1": source,
                    "target": target, "parts": part, "top1": found, "drop": source - found, "time_s": seconds,
                    "difference_drawn": report["difference"], "notes": report["notes"],
                })  # fmt: skip
                print(
                    folder.name,
                    kind,
                    target,
                    part,
                    f"{found:.4f} of {source:.4f} ({full:.4f}), {seconds:.1f} s",
                    flush=True,
                )
        return rows


def top1(path: Path, pixels: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy in ONNX Runtime."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    answers = [session.run(None, {name: pixels[k : k + 100]})[0].argmax(1) for k in range(0, len(pixels), 100)]
    return float((np.concatenate(answers) == labels).mean())


def table(rows: list[dict[str, Any]]) -> str:
    counts = sorted({row["count"] for row in rows})
    lines = [
        "# Re-quantization (MRQ)",
        "",
        "Written by `benchmarks/requantize.py`: models in asymmetric uint8 by ONNX Runtime's quantizer, with a scale a",
        f"tensor or a channel of weights, re-quantized without data. Top-1 on {', '.join(map(str, counts))} pictures.",
        "The drop is in points against the source quantized model, for neither, either and both of MRQ's parts.",
        "",
        "| model | source scale a | full precision | source | target | " + " | ".join(PARTS) + " |",
        "|---|---|---|---|---|" + "---|" * len(PARTS),
    ]
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["source"], row["target"]), {})[row["parts"]] = row
    for (model, kind, target), parts in groups.items():
        one = next(iter(parts.values()))
        drops = " | ".join(f"{100 * parts[part]['drop']:+.2f}" if part in parts else "–" for part in PARTS)
        full, source = (f"{100 * one[key]:.2f}" for key in ("fp_top1", "source_top1"))
        lines.append(f"| {model} | {kind} | {full} | {source} | {target} | {drops} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
