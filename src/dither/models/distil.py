"""Pictures made from nothing but a network: their channels have the statistics that its batch normalizations stored.

Source: ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281), section 3.1; constants of the released code.
Departs from the released code: statistics are read at the inputs of the normalizations as they run, instead of pairing
convolutions and normalizations by the order of modules; a start of unit deviation divides by the deviation, where the
code divides by the variance (`start="paper"` keeps that).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dither.errors import InputError, NumericalError
from dither.models.batchnorm import channel_norm, is_batch_norm
from dither.models.layers import given_input
from dither.statistics.batchnorm import Over, channel_moments, moments_loss

_SMALLEST_RATE, _PATIENCE = 1e-4, 100  # released code
_LEVELS, _MIDDLE, _VARIANCE = 255, 127.5, 5418.75  # released code: of integers drawn from 0 to 254


class Distillation(BaseModel):
    """How pictures are made. `steps=0` leaves the noise that they start from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: Annotated[int, Field(ge=1)] = 32  # released code; its example script: 64
    steps: Annotated[int, Field(ge=0)] = 500  # released code
    rate: Annotated[float, Field(gt=0)] = 0.5  # released code
    statistics: Over = Field(default="sample", description="whose moments are fitted; sample is the released code's")
    start: Literal["paper", "unit"] = Field(default="paper", description="deviation of the noise: 1/74 or 1")


@dataclass
class Distilled:
    """Pictures [n, c, h, w] as the network takes them, the loss at every step, and what is left of it by norm."""

    pictures: Float[Tensor, "n c h w"]
    losses: list[float] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    time_s: float = 0.0


def distil(
    model: nn.Module,
    run: Callable[[Tensor], Any],
    size: Sequence[int],
    settings: Distillation,
    seed: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Distilled:
    """Fit `settings.count` pictures of `size` (channels, height, width) to the network; its weights stay as they are.

    Raises:
        InputError: the network has no batch normalization that it runs.
        NumericalError: the loss is not finite.
    """
    started = perf_counter()
    found = Distilled(_noise(settings, size, seed).to(device))
    norms = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    if not settings.steps:
        return found
    if not norms:
        raise InputError(
            f"{type(model).__name__} has no batch normalization, so no pictures can be made from it; give --calibration"
        )
    x = found.pictures.requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=settings.rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=_SMALLEST_RATE, patience=_PATIENCE)
    with torch.enable_grad(), _fixed(model), _watched(norms, settings.statistics) as watch:
        for step in range(settings.steps):
            optimizer.zero_grad()
            watch.parts = [_of_input(x, settings.statistics)]
            run(x)
            loss = torch.stack(watch.parts).sum()
            if not bool(loss.isfinite()):
                raise NumericalError(f"distillation: the loss is not finite at step {step}; use a lower rate")
            loss.backward()
            optimizer.step()
            value = float(loss.detach())
            schedule.step(value)
            found.losses.append(value)
            if progress is not None:
                progress(step + 1)
    found.pictures = x.detach()
    found.gaps = _gaps(norms, run, found.pictures, settings.statistics)
    found.time_s = perf_counter() - started
    return found


def _noise(settings: Distillation, size: Sequence[int], seed: int) -> Float[Tensor, "n c h w"]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, _LEVELS, (settings.count, *size), generator=generator).float() - _MIDDLE
    return drawn / (_VARIANCE if settings.start == "paper" else _VARIANCE**0.5)


def _of_input(x: Float[Tensor, "n c h w"], over: Over) -> Float[Tensor, ""]:
    """Pictures are normalized: mean 0 and deviation 1."""
    return moments_loss(x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), over)


class _Watch:
    """The parts of the loss in one forward pass."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []


@contextmanager
def _watched(norms: dict[str, nn.Module], over: Over) -> Iterator[_Watch]:
    watch = _Watch()

    def keep(norm: nn.Module) -> Callable[..., None]:
        affine = channel_norm(norm)
        mean, variance = affine.mean.float(), affine.variance.float()

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            watch.parts.append(moments_loss(given_input(args, kwargs), mean, variance, over))

        return hook

    handles = [norm.register_forward_pre_hook(keep(norm), with_kwargs=True) for norm in norms.values()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """While open, no parameter takes a gradient."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


def _gaps(
    norms: dict[str, nn.Module], run: Callable[[Tensor], Any], x: Float[Tensor, "n c h w"], over: Over
) -> list[dict[str, Any]]:
    """How far each norm's input is from what it stored: root mean squares over channels, in stored deviations."""
    rows: list[dict[str, Any]] = []

    def keep(name: str, norm: nn.Module) -> Callable[..., None]:
        affine = channel_norm(norm)
        unit = affine.variance.clamp_min(1e-12).sqrt()

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            mean, variance = (part.double() for part in channel_moments(given_input(args, kwargs), over))
            shift, spread = (mean - affine.mean) / unit, variance.sqrt() / unit - 1
            rows.append(
                {"norm": name, "mean": float(shift.square().mean().sqrt()), "std": float(spread.square().mean().sqrt())}
            )

        return hook

    handles = [norm.register_forward_pre_hook(keep(name, norm), with_kwargs=True) for name, norm in norms.items()]
    try:
        with torch.no_grad():
            run(x)
    finally:
        for handle in handles:
            handle.remove()
    return rows
