"""Fake quantization of activations: which parameters a format needs, how they are fitted, how they are applied.

Activations are [..., d]; a format is per tensor, per channel (the last axis) or per token (one scale a row, measured
per call). `Scales` are the fitted parameters: scale and zero-point (uniform), scale (logarithmic), or the three numbers
of a twin.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dither.errors import SpecError
from dither.formats.grid import decode, encode, highest_code, lowest_code
from dither.formats.logarithmic import decode_log, encode_log
from dither.formats.ranges import affine, quantiles, search_range
from dither.formats.spec import QuantSpec
from dither.formats.twin import decode_twin, encode_twin

Scales = tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
_SPLITS = tuple(2.0**-i for i in range(1, 20))  # PTQ4ViT released code; 0 (GELU) is used when negative values occur


def fit_activation(sample: Float[Tensor, "n d"], spec: QuantSpec) -> Scales:
    """Scale and zero-point ([] per tensor, [d] per channel) of least squared error on the sample.

    Twin formats put (low step, high step, split) into scale and leave the zero-point at 0.

    Raises:
        SpecError: the format is dynamic, grouped, or logarithmic over negative values.
    """
    if spec.dynamic or spec.granularity == "group":
        raise SpecError(f"activation format {spec} has no calibrated range; use tensor or channel granularity")
    if not spec.for_activations:
        raise SpecError(f"{spec} is a format of weights; write int{spec.bits}:tensor for activations")
    if spec.kind == "twin":
        return _fit_twin(sample, spec), torch.zeros((), device=sample.device)
    if spec.kind != "int":
        return _fit_log(sample, spec), torch.zeros((), device=sample.device)
    cells = sample.T if spec.granularity == "channel" else sample.reshape(1, -1)
    scale, zero_point = _fit_cells(cells.contiguous(), spec)
    if spec.granularity == "tensor":
        return scale[0], zero_point[0]
    dead = (sample == 0).all(dim=0)
    if bool(dead.any()) and not bool(dead.all()):  # a channel without values must not weigh in a mean of scales
        scale = torch.where(dead, scale[~dead].mean(), scale)
    return scale, zero_point


def _fit_cells(cells: Float[Tensor, "n m"], spec: QuantSpec) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    return affine(*search_range(cells, spec, stored=False), spec, stored=False)


def fake_quantize(
    x: Float[Tensor, "*b d"], scales: Scales, spec: QuantSpec, offset: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "*b d"]:
    """x on the grid, or x + offset; computed in float32 and returned in x's dtype."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    moved = wide if offset is None else wide + offset.to(wide.dtype)
    return _fake_quantize(moved, scales, spec).to(x.dtype)


def _fake_quantize(x: Float[Tensor, "*b d"], scales: Scales, spec: QuantSpec) -> Float[Tensor, "*b d"]:
    if spec.dynamic:
        scales = measure(x, spec)
    scale, zero_point = scales[0].to(x.dtype), scales[1].to(x.dtype)
    if spec.kind == "twin":
        return decode_twin(encode_twin(x, scale, spec), scale, spec)
    if spec.kind != "int":
        return decode_log(encode_log(x, scale, spec), scale, spec)
    return decode(encode(x, scale, zero_point, spec), scale, zero_point)


def measure(x: Float[Tensor, "*b d"], spec: QuantSpec) -> Scales:
    """Dynamic scales of one call: per token [*b, 1], per tensor []."""
    if spec.kind != "int" or spec.granularity not in ("token", "tensor"):
        raise SpecError(f"dynamic activation format {spec}: use intB:token or intB:tensor:dynamic")
    cells = x.reshape(-1, x.shape[-1]) if spec.granularity == "token" else x.reshape(1, -1)
    scale, zero_point = _fit_cells(cells, spec)
    shape = (*x.shape[:-1], 1) if spec.granularity == "token" else ()
    return scale.reshape(shape), zero_point.reshape(shape)


def covered_range(scales: Scales, spec: QuantSpec) -> tuple[float, float] | None:
    """Lowest and highest value that the format represents, for reports; None where it is measured per call."""
    if spec.dynamic:
        return None
    scale, zero_point = scales
    if spec.kind == "twin":
        half, (low, high, split) = spec.levels // 2 - 1, scale.tolist()
        return (0.0 if split > 0 else -low * half), high * half
    if spec.kind != "int":
        return 0.0, float(scale)
    ends = [scale * (code - zero_point) for code in (lowest_code(spec), highest_code(spec))]
    return float(ends[0].min()), float(ends[1].max())


def _fit_log(sample: Float[Tensor, "n d"], spec: QuantSpec) -> Float[Tensor, ""]:
    """The top of the range: the percentile of least squared error (RepQ-ViT), or the maximum for `minmax`."""
    if spec.granularity != "tensor":
        raise SpecError(f"logarithmic format {spec} has one scale a tensor; write {spec.kind}-{spec.bits}:tensor")
    if float(sample.min()) < 0:
        raise SpecError(f"logarithmic format {spec} holds values from 0 up, got a minimum of {float(sample.min()):.4g}")
    shares = (1.0,) if spec.search == "minmax" else spec.percentiles
    tops = [top[0].clamp_min(1e-12) for top in quantiles(sample.reshape(1, -1), shares)]
    errors = [decode_log(encode_log(sample, top, spec), top, spec).sub_(sample).square_().mean() for top in tops]
    return tops[int(torch.stack(errors).argmin())]


def _fit_twin(sample: Float[Tensor, "n d"], spec: QuantSpec) -> Float[Tensor, " 3"]:
    low, high, steps = float(sample.min()), max(float(sample.max()), 1e-12), spec.levels // 2 - 1
    if low < 0:
        return torch.tensor([-low / steps, high / steps, 0.0], device=sample.device)
    twins = [torch.tensor([high * s / steps, high / steps, high * s], device=sample.device) for s in _SPLITS]
    errors = [decode_twin(encode_twin(sample, twin, spec), twin, spec).sub_(sample).square_().mean() for twin in twins]
    return twins[int(torch.stack(errors).argmin())]
