"""BAQ across matrices: what the closed form promises that a layer loses at each mean width, over its output's energy.

Columns j of a layer lose c_j 4^-R_j with bits R_j that lose the same everywhere (`methods/baq.py`), so an option of b
bits costs Σ_j c_j 4^-R_j(b), relative to the energy of the layer's output. The integer program over these scores is the
closed form of the pooled columns, for layers that have one of the options.

Source: BAQ, arXiv 2506.05664; the released code meets its average in every matrix, sharing between them is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dither.allocation.columns import equal_loss_bits
from dither.allocation.table import Option
from dither.calibrate import LayerTask
from dither.methods.base import Method
from dither.sensitivities.error import OutputError
from dither.solvers.columns import Ordered
from dither.solvers.mixed_columns import column_losses


@dataclass(frozen=True)
class EqualLoss(OutputError):  # noqa: N818  # no exception
    """Losses of the formula; a grouped convolution has that of its nearest codes."""

    name: ClassVar[str] = "baq"
    about: ClassVar[str] = "loss that BAQ's closed form promises at each mean width; no gradients, streamed models too"

    damping: float = 0.01

    def _error(self, method: Method | None, task: LayerTask, option: Option) -> float:
        if task.gram is None or option.weights is None:
            return super()._error(method, task, option)
        gram = task.gram.quantized[: task.columns, : task.columns]
        weight = task.weight.to(gram)
        ordered = Ordered.of(weight, gram, task.columns, self.damping, act_order=True)
        diagonal = ordered.upper.diagonal()[torch.argsort(ordered.order)]
        loss = column_losses(task.weight, diagonal, option.weights) * (gram.diagonal() > 0)
        bits = equal_loss_bits(loss, float(option.weights.bits))
        energy = float(((weight @ gram) * weight).sum().clamp_min(1e-30))
        return float((loss * 4.0**-bits).sum()) / energy
