"""What runtimes ask of a quantized network, as rules over a plan: found before hours are spent, not after.

A runtime opens one export: vLLM, SGLang and transformers compressed-tensors, llama.cpp GGUF, ONNX Runtime MatMulNBits.
transformers also opens everything else after `import dither`, so that nothing keeps it from running there.

Source: the loaders of these programs, read in 2026: vLLM's fused layers and compressed-tensors schemes, SGLang's, the
block formats of ggml, the MatMulNBits operator.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dither.errors import InputError, nearest
from dither.export.gguf_settings import ARCHITECTURES
from dither.formats.spec import QuantSpec

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))  # one matrix each in servers
ROUTERS = ("gate", "router", "shared_expert_gate", "mlp_gate")
RECURRENT = ("conv1d", "x_proj", "dt_proj", "A_log", "dt_bias")
MARLIN = 64  # inputs and outputs that the fast kernels need a multiple of
OWN = "open it with from_pretrained after `import dither`"


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that is to be quantized."""

    name: str
    shape: tuple[int, int]
    weights: QuantSpec
    activations: QuantSpec | None = None
    linear: bool = True

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Planned:
    """A network as it is planned: what is quantized how, what is kept, and what is stored beside codes."""

    layers: tuple[PlannedLayer, ...]
    kept: tuple[str, ...] = ()
    model_type: str = ""
    tied: bool = False
    adds: tuple[str, ...] = ()
    operands: bool = False  # of attention are quantized


@dataclass(frozen=True)
class Finding:
    """A rule that a plan breaks; one that is not fatal costs speed or needs a newer release."""

    layer: str
    problem: str
    remedy: str
    fatal: bool = True
    more: int = field(default=0, compare=False)  # other layers with the same problem

    def __str__(self) -> str:
        others = f" (and {self.more} more layers)" if self.more else ""
        return (
            f"{self.layer}{others}: {self.problem}; {self.remedy}" if self.layer else f"{self.problem}; {self.remedy}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


Rule = Callable[[Planned], Iterator[Finding]]


def check(planned: Planned, runtime: str) -> list[Finding]:
    """What keeps a plan from running in a runtime, the fatal first; layers with the same problem are one finding.

    Raises:
        InputError: an unknown runtime.
    """
    if runtime not in RULES:
        raise InputError(f"expected a runtime among {', '.join(RULES)}, got {runtime!r}{nearest(runtime, RULES)}")
    found: dict[tuple[str, str, bool], Finding] = {}
    for finding in (finding for rule in RULES[runtime] for finding in rule(planned)):
        key = (finding.problem, finding.remedy, finding.fatal)
        first = found.setdefault(key, finding)
        found[key] = first if first is finding else replace(first, more=first.more + 1)
    return sorted(found.values(), key=lambda one: not one.fatal)


def plain_integers(planned: Planned) -> Iterator[Finding]:
    """Codes on a uniform grid, groups along the inputs, integer zero-points, and nothing beside."""
    for addition in planned.adds:
        yield Finding("", f"the method stores {addition} beside the codes", OWN)
    if planned.operands:
        yield Finding("", "operands of attention are quantized", f"leave attention alone, or {OWN}")
    for layer in planned.layers:
        spec = layer.weights
        if not layer.linear:
            yield Finding(layer.name, "only linear layers can be quantized", "skip it")
        elif spec.kind not in ("int", "mxint"):
            yield Finding(layer.name, f"{spec} is no uniform grid", f"use int{spec.bits}, or {OWN}")
        elif spec.dual:
            yield Finding(layer.name, f"{spec} has two grids a row", f"use single, or {OWN}")
        elif spec.group_along == "outputs" and spec.granularity == "group":
            yield Finding(layer.name, f"the groups of {spec} run along the outputs", f"use oc, or {OWN}")
        elif spec.symmetry == "asym" and spec.zero_point == "real":
            yield Finding(layer.name, f"{spec} has zero-points that are no integers", f"use clampzero, or {OWN}")


def widths(bits: tuple[int, ...], fatal: bool, why: str) -> Rule:
    """A rule: codes have one of these widths."""

    def rule(planned: Planned) -> Iterator[Finding]:
        for layer in planned.layers:
            if layer.weights.bits not in bits:
                yield Finding(layer.name, f"codes of {layer.weights.bits} bits: {why}", f"use {_listed(bits)}", fatal)

    return rule


def zero_points(bits: tuple[int, ...]) -> Rule:
    """A rule: zero-points go with these widths only."""

    def rule(planned: Planned) -> Iterator[Finding]:
        for layer in planned.layers:
            if layer.weights.symmetry != "sym" and layer.weights.bits not in bits:
                problem = f"zero-points with {layer.weights.bits}-bit codes have no kernel"
                yield Finding(layer.name, problem, f"use sym, or {_listed(bits)}")

    return rule


def zero_points_dequantize(planned: Planned) -> Iterator[Finding]:
    """transformers' loader of compressed-tensors forgets that zero-points are packed."""
    for layer in planned.layers:
        if layer.weights.symmetry != "sym":
            remedy = "pass CompressedTensorsConfig(dequantize=True), use sym, or " + OWN
            yield Finding(layer.name, "an export with zero-points opens only dequantized", remedy, False)


def experts_symmetric(planned: Planned) -> Iterator[Finding]:
    """No kernel for mixtures of experts takes zero-points."""
    for layer in planned.layers:
        if ".experts." in layer.name and layer.weights.symmetry != "sym":
            yield Finding(layer.name, "experts with zero-points have no kernel", "use sym")


def fused_alike(planned: Planned) -> Iterator[Finding]:
    """Layers that a server multiplies as one matrix share bits, group size, symmetry and activations."""
    layers = {layer.name: layer for layer in planned.layers}
    for group in _fused(planned):
        first = next((layers[name] for name in group if name in layers), None)
        if first is None:
            continue
        for name in group:
            if name not in layers:
                yield Finding(name, f"it is kept, but fused with {first.leaf}", "quantize all of them or none")
            elif _setting(layers[name]) != _setting(first):
                remedy = "give both the same format"
                yield Finding(name, f"{layers[name].weights} differs from {first.weights} of {first.leaf}", remedy)


def _fused(planned: Planned) -> list[list[str]]:
    """Names of layers that are one matrix in servers: parts of attention and MLP, and all experts of a block."""
    names = [*(layer.name for layer in planned.layers), *planned.kept]
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if ".experts." in name:
            groups.setdefault((name.partition(".experts.")[0], "experts"), []).append(name)
            continue
        part = next((part for part in FUSED if leaf in part), None)
        if part is not None:
            groups.setdefault((owner, part), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _setting(layer: PlannedLayer) -> tuple[Any, ...]:
    spec = layer.weights
    return spec.bits, spec.granularity, spec.group_size, spec.symmetry, layer.activations


def kept_parts(planned: Planned) -> Iterator[Finding]:
    """Routers and the parts of recurrences stay in full precision."""
    for layer in planned.layers:
        if layer.leaf in ROUTERS:
            yield Finding(layer.name, "a router cannot be quantized", "skip it")
        elif layer.leaf in RECURRENT:
            yield Finding(layer.name, "a part of a recurrence cannot be quantized", "skip it")


def head(planned: Planned) -> Iterator[Finding]:
    """A head that shares its weight with the embeddings cannot have codes of its own."""
    for layer in planned.layers:
        if layer.leaf in ("lm_head", "embed_out"):
            problem = (
                "the head is tied to the embeddings" if planned.tied else "a quantized head is not read everywhere"
            )
            yield Finding(layer.name, problem, "keep it", planned.tied)


def marlin(planned: Planned) -> Iterator[Finding]:
    """The fast kernels take whole tiles, after a split over several GPUs too."""
    for layer in planned.layers:
        if any(size % MARLIN for size in layer.shape):
            problem = f"{MARLIN} does not divide its {'×'.join(map(str, layer.shape))} weights: no fast kernel"
            yield Finding(layer.name, problem, "expect less speed, or skip it", False)


def eight_bit_activations(planned: Planned) -> Iterator[Finding]:
    """Activations are int8, one range a tensor or a token."""
    for layer in planned.layers:
        spec = layer.activations
        if spec is not None and (spec.kind != "int" or spec.bits != 8 or spec.granularity not in ("tensor", "token")):
            yield Finding(layer.name, f"activations in {spec}", "use int8:token, or keep them")


def no_activations(planned: Planned) -> Iterator[Finding]:
    """Weights alone are quantized."""
    for layer in planned.layers:
        if layer.activations is not None:
            yield Finding(layer.name, f"activations in {layer.activations}", "keep them: --activations none")


def ggml_blocks(planned: Planned) -> Iterator[Finding]:
    """Blocks of 32 columns; symmetric 4 and 8 bits, zero-points with 4 only."""
    if planned.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        yield Finding(
            "", f"the model type {planned.model_type or 'unknown'} is not exported to GGUF", f"it knows {known}"
        )
    for layer in planned.layers:
        size = layer.weights.group_size if layer.weights.granularity == "group" else layer.shape[1]
        if (size or layer.shape[1]) % 32:
            yield Finding(layer.name, f"groups of {size} columns: blocks have 32", "use g32, g64 or g128")


def onnx_blocks(planned: Planned) -> Iterator[Finding]:
    """Blocks are powers of two from 16 columns on."""
    for layer in planned.layers:
        if layer.weights.granularity == "group" and (layer.weights.group_size or 16) % 16:
            size = layer.weights.group_size
            yield Finding(layer.name, f"groups of {size} columns: blocks are powers of two from 16", "use g32 or g64")


def opens_with_dither(planned: Planned) -> Iterator[Finding]:
    """What only dither's own quantizer in transformers opens."""
    for finding in plain_integers(planned):
        yield Finding(finding.layer, finding.problem, OWN, False)


def _listed(bits: tuple[int, ...]) -> str:
    texts = [f"int{one}" for one in bits]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


_SERVED = (plain_integers, fused_alike, kept_parts, head, eight_bit_activations, experts_symmetric)
_PACKED = tuple(range(2, 9))
RULES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        *_SERVED,
        widths(_PACKED, True, "compressed-tensors packs 2 to 8"),
        widths((1, 4, 8), False, "a recent vLLM only"),
        zero_points((4, 8)),
        marlin,
    ),
    "sglang": (*_SERVED, widths((4, 8), True, "it reads 4 and 8 only"), zero_points((4, 8)), marlin),
    "transformers": (opens_with_dither, zero_points_dequantize),
    "llama.cpp": (
        plain_integers,
        no_activations,
        widths((4, 8), True, "GGUF's simple blocks have 4 or 8"),
        zero_points((4,)),
        ggml_blocks,
    ),
    "onnx": (plain_integers, no_activations, widths((2, 4, 8), True, "MatMulNBits has 2, 4 or 8"), onnx_blocks),
}
