"""onnx-qdq: a vision model as a graph of QuantizeLinear and DequantizeLinear that ONNX Runtime runs with integers.

Weights of 4 to 8 bits and uniform activations become integer codes (int4 for 4-bit weights, which are widened once when
a session starts; int8 and uint8 otherwise); operands of attention are quantized as dither did. log2, log-sqrt2 and twin
formats become explicit maths in floats. Ranges that are measured at each call are refused. Layers whose output nobody
quantizes stay in floats behind the product: dither quantizes inputs only. Residual sums of convolutions become integers
too where pictures are given for their ranges (`qdq_sums.py`).

Source: ONNX opset 21; the patterns of ONNX Runtime's QDQ transformers.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dither.errors import InputError, StorageError
from dither.export.answers import open_pictures
from dither.export.folder import copy_companions, write_config
from dither.export.integers import IntegerWeight, integer_weight, refused
from dither.export.qdq_lowering import Lowered, lower
from dither.export.qdq_modules import as_qdq
from dither.export.qdq_reader import read_kept, read_weight
from dither.export.qdq_sums import quantize_sums
from dither.export.qdq_widths import narrow
from dither.export.sessions import EXACT, open_session, own_weights
from dither.export.source import Source, skeleton
from dither.export.tracing import FILE, ONE_FILE, example, run_graph, trace
from dither.export.written import Logits, Written
from dither.formats.spec import QuantSpec
from dither.models.structure import rebuild
from dither.storage import writing

TARGET = "onnx-qdq"
BITS = (4, 5, 6, 7, 8)
PICTURES = 8  # random ones to compare on
CALIBRATION = 64  # pictures that give sums their ranges
NO_SUMS = "no residual sum of convolutions was found, so the calibration pictures change nothing"
KERNELS = ("QLinearConv", "ConvInteger", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul")
# values at the border of two steps fall to the other side, and quantized networks answer to that as they do to noise:
# what ONNX Runtime may differ by is measured with noise on the pictures; a wrong graph differs by the spread of logits
_NOISE, _NEAR, _TIMES = 1e-4, 0.02, 5
_FOLDED = 2.0**-20  # of a weight: scales that were multiplied by those of batch normalization, in float32


def write(source: Source, folder: Path, dtype: str, calibration: str | Path | None = None) -> Written:
    """Write the graph and the files beside it.

    `calibration` are pictures that give residual sums of convolutions their ranges; without it they stay in floats.

    Raises:
        SpecError, InputError: integers of ONNX cannot hold a layer or a range; nothing is written then.
        StorageError: ONNX Runtime computes something else than dither's network.
    """
    if dtype not in ("auto", "float32"):
        raise InputError(f"{TARGET}: expected float32 for scales and what is kept, got {dtype}")
    _check(source)
    weights = {name: _integers(source, name) for name in source.layers}
    model = simulated(source)
    (name, pixels), *_ = example(source, model, torch.float32, PICTURES).items()
    inputs = {name: pixels}
    explicit = as_qdq(model, weights)
    files = trace(model, inputs, folder)
    traced = onnx.load(str(folder / FILE))
    own_weights(traced)
    lowered = _as_integers(copy.deepcopy(traced), weights, folder)
    files += copy_companions(source, folder)
    files.append(write_config(source, folder, torch.float32, None))

    def logits(pixels: Tensor) -> tuple[Logits, Logits]:
        """What ONNX Runtime and what dither's network say."""
        named = dict.fromkeys(inputs, pixels)
        with torch.no_grad():
            true = model(**named).logits.float().numpy()
        return run_graph(session, named), true

    session = open_session(folder / FILE)
    (found, true), shaken = logits(pixels), logits(_noisy(pixels))[1]
    difference, own = relative_difference(found, true), relative_difference(shaken, true)
    if not difference <= _NEAR + _TIMES * own:
        raise StorageError(f"{FILE}: ONNX Runtime's logits are off by {difference:.2g} of their spread, not {own:.2g}")
    notes = [f"ONNX Runtime's logits of random pictures are off by {difference:.1e} of their spread; noise of {_NOISE} "
             f"on the pictures moves dither's own by {own:.1e}"]  # fmt: skip
    if calibration is not None:
        known = torch.cat(list(open_pictures(source, calibration, CALIBRATION)[1]))
        before, sums = logits(known)[0], quantize_sums(traced, [known])
        lowered, session = _as_integers(traced, weights, folder), open_session(folder / FILE)
        moved = relative_difference(logits(known)[0], before)
        notes.append(f"{sums} residual sums of convolutions have ranges of {len(known)} pictures, which moves their "
                     f"logits by {moved:.1e} of the spread" if sums else NO_SUMS)  # fmt: skip
    stored = onnx.load(str(folder / FILE))
    factors = {_layer(name): factor for name, factor in lowered.factors.items()}

    def bound(name: str) -> Float[np.ndarray, "o i"]:
        true: Float[np.ndarray, "o i"] = np.abs(np.asarray(source.weight(name).dequantize(torch.float64)))
        return true * (_FOLDED if _is_conv(model, name) else 0.0)

    return Written(
        files, torch.float32, lambda name: read_weight(stored, name, factors.get(name)),
        lambda name: read_kept(stored, name), bound, "ONNX Runtime",
        [*notes, *_notes(source, weights, explicit, lowered, folder / FILE)], logits,
    )  # fmt: skip


def simulated(source: Source) -> nn.Module:
    """dither's own network in float32: quantized weights and activations, computed in floats."""
    model = skeleton(source)
    rebuild(model, source.structure)
    state = {name: source.read(name) for name in source.names}
    model.load_state_dict({n: x.float() if x.is_floating_point() and ".packed." not in n else x
                           for n, x in state.items()}, strict=False, assign=True)  # fmt: skip
    model.tie_weights()  # type: ignore[operator]
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise StorageError(f"{source.name} does not hold {left[0]}")
    return model.eval()


def _integers(source: Source, name: str) -> IntegerWeight:
    weight = integer_weight(name, source.weight(name), TARGET, BITS)
    if weight.group_size is not None:
        raise refused(name, TARGET, f"groups of {weight.group_size} columns: integer products have one scale a row")
    return weight


def _check(source: Source) -> None:
    if source.structure.get("experts"):
        raise InputError(f"{source.structure['experts'][0]}: experts taken apart cannot be exported yet")
    entries = {f"{name}, its input": entry["activations"] for name, entry in source.layers.items()}
    for owner, operands in source.structure["attention"].items():
        entries |= {f"{owner}, its {operand}": entry for operand, entry in operands.items()}
    for what, entry in entries.items():
        spec = None if entry is None else QuantSpec(**entry["spec"])
        if spec is not None and spec.dynamic:
            head = f"int{spec.bits}:tensor"
            raise InputError(
                f"{what}: {TARGET} has no range that is measured at each call ({spec}); quantize to {head}"
            )


def _as_integers(graph: onnx.ModelProto, weights: Mapping[str, IntegerWeight], folder: Path) -> Lowered:
    """Bring a traced graph into the shape of integer kernels and save it in place of what is there."""
    lowered = lower(graph)
    narrow(graph, {name for name, weight in weights.items() if weight.bits <= 4})
    _save(graph, folder)
    return lowered


def _save(graph: onnx.ModelProto, folder: Path) -> None:
    with writing(folder / FILE):
        (folder / FILE).unlink()
        for path in folder.glob(f"{FILE}.*"):
            path.unlink()
        onnx.checker.check_model(graph)
        onnx.save(graph, str(folder / FILE), save_as_external_data=graph.ByteSize() > ONE_FILE)


def _noisy(pixels: Tensor) -> Tensor:
    return pixels + _NOISE * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))


def relative_difference(found: Logits, true: Logits) -> float:
    """Root mean square of the difference over that of the logits around their mean."""
    difference = found.astype(np.float64) - true
    return float(np.sqrt(np.square(difference).mean() / max(np.var(true.astype(np.float64)), 1e-30)))


def _layer(codes: str) -> str:
    return codes.removeprefix("model.").removesuffix(".codes")


def _is_conv(model: nn.Module, name: str) -> bool:
    return hasattr(model.get_submodule(name), "geometry")


def _notes(
    source: Source,
    weights: Mapping[str, IntegerWeight],
    explicit: Mapping[str, nn.Module],
    lowered: Lowered,
    path: Path,
) -> list[str]:
    kernels = integer_kernels(path)
    listed = ", ".join(f"{count} {name}" for name, count in kernels.items()) or "none"
    notes = [f"integer kernels of ONNX Runtime on this machine: {listed}",
             f"x86 processors without VNNI need ONNX Runtime's session option {'='.join(EXACT)}, or products of uint8 "
             "and int8 saturate"]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for codes, reason in lowered.in_floats.items():
        reasons.setdefault(reason, []).append(_layer(codes))
    plain = [name for name, entry in source.layers.items() if entry["activations"] is None]
    plain = [name for name in plain if f"model.{name}.codes" not in lowered.in_floats]
    if plain:
        reasons["its input is not quantized"] = plain
    notes += [f"computed in floats: {_names(names)}: {reason}" for reason, names in reasons.items()]
    if explicit:
        kinds = sorted({str(getattr(quantizer, "spec", "")) for quantizer in explicit.values()})
        notes.append(f"explicit maths in floats: {len(explicit)} quantizers of {', '.join(kinds)}")
    wide = sorted({weight.bits for weight in weights.values() if weight.bits not in (4, 8)})
    if wide:
        notes.append(f"weights of {', '.join(map(str, wide))} bits take 8 bits each in ONNX")
    return notes


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def integer_kernels(path: Path) -> dict[str, int]:
    """How many integer kernels ONNX Runtime makes of a graph, by operator."""
    with tempfile.TemporaryDirectory() as folder:
        open_session(path, optimized=Path(folder) / FILE)
        nodes = onnx.load(str(Path(folder) / FILE)).graph.node
    counts = Counter(node.op_type for node in nodes)
    return {name: counts[name] for name in KERNELS if counts[name]}
