"""Augmented Hessians: what layers cost together, from products of the Hessian with their errors.

With Δ_i the error of unit i under an option, M_ij = Δ_iᵀ H_ij Δ_j, and the loss of quantizing all is ½ Σ_ij M_ij.
`rowsum`: score ½ Σ_j M_ij, one product for an option: a unit's own cost and half of all that it shares with others.
`hvp`: score ½ M_ii and pairs M_ij, one product for a unit and option. `measured`: divergences of single units and of
every pair, D(i, j) - D(i) - D(j), without derivatives; as many passes as there are pairs.

Source: Schaefer et al., Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
Quantization, arXiv 2306.04879. Its formula was not at hand: the terms are those of the exact second order.
Departs from it: unknown beyond that. Couplings keep their sign; a score of a unit by itself that is not positive counts
as a hundredth of the option's median.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dither.allocation.table import Option
from dither.folding import replaced_weight
from dither.models.curvature import hessian_product
from dither.sensitivities.base import Measured, Probe, stored_weight
from dither.sensitivities.blocks import Damage
from dither.sensitivities.swap import replaced
from dither.statistics.hutchinson import positive

Pairs = Literal["rowsum", "hvp", "measured"]


@dataclass(frozen=True)
class Augmented:
    """`pairs` says how couplings are found; options of inputs are not looked at."""

    name: ClassVar[str] = "augmented"
    about: ClassVar[str] = "second-order loss with couplings between layers (augmented Hessians); float32"

    pairs: Pairs = "rowsum"

    def measure(self, probe: Probe) -> Measured:
        """One option after the other."""
        find = {"rowsum": self._rowsum, "hvp": self._products, "measured": self._measured}[self.pairs]
        count = len(probe.units)
        scores, pairs = np.zeros((count, len(probe.options))), dict[int, Float[np.ndarray, "u u"]]()
        for place, option in enumerate(probe.options):
            if option.weights is None:
                continue
            able = [u for u in range(count) if place in probe.can(u)]
            matrix = np.array(probe.kept(f"option {place}", partial(find, probe, option, able)))
            own = matrix.diagonal() if self.pairs != "rowsum" else matrix[:, 0]
            scores[able, place] = positive(own.tolist())
            if self.pairs != "rowsum":
                pairs[place] = np.zeros((count, count))
                pairs[place][np.ix_(able, able)] = matrix - np.diag(matrix.diagonal())
            probe.say("augmented", place + 1, len(probe.options))
        table = probe.table({unit.name: scores[u].tolist() for u, unit in enumerate(probe.units)})
        return Measured(table, pairs=pairs, facts={"negative_couplings": _negative(pairs)})

    def _rowsum(self, probe: Probe, option: Option, able: list[int]) -> list[list[float]]:
        moved = _errors(probe, option, able)
        products = hessian_product(probe.gradients(), moved)
        return [[_dot(probe, unit, moved, products) / 2] for unit in able]

    def _products(self, probe: Probe, option: Option, able: list[int]) -> list[list[float]]:
        """Symmetric, its diagonal halved."""
        moved, rows = _errors(probe, option, able), []
        for unit in able:
            inside = set(probe.units[unit].layers)
            alone = {n: d if n in inside else torch.zeros_like(d) for n, d in moved.items()}
            products = hessian_product(probe.gradients(), alone)
            rows.append([_dot(probe, other, moved, products) for other in able])
        matrix = np.array(rows)
        matrix = (matrix + matrix.T) / 2
        np.fill_diagonal(matrix, matrix.diagonal() / 2)
        return [[float(x) for x in row] for row in matrix]

    @torch.no_grad()
    def _measured(self, probe: Probe, option: Option, able: list[int]) -> list[list[float]]:
        damage = Damage(probe, self.name)
        weights = {u: {n: stored_weight(probe.weight(n), option) for n in probe.units[u].layers} for u in able}
        matrix = np.zeros((len(able), len(able)))
        for row, unit in enumerate(able):
            with replaced(probe, weights[unit], {}):
                matrix[row, row] = damage()[0]
        for row, unit in enumerate(able):
            for column in range(row + 1, len(able)):
                with replaced(probe, weights[unit] | weights[able[column]], {}):
                    both = damage()[0]
                matrix[row, column] = matrix[column, row] = both - matrix[row, row] - matrix[column, column]
        return [[float(x) for x in row] for row in matrix]


@torch.no_grad()
def _errors(probe: Probe, option: Option, able: list[int]) -> dict[str, Tensor]:
    """Q(W) - W of each layer, in the shape of its weight."""
    found = {}
    for name in (name for unit in able for name in probe.units[unit].layers):
        layer, before = probe.layer(name), probe.layer(name).weight.detach().clone()
        with replaced_weight(layer, stored_weight(probe.weight(name), option)):
            found[name] = layer.weight.detach() - before
    return found


def _dot(probe: Probe, unit: int, moved: Mapping[str, Tensor], products: Mapping[str, Tensor]) -> float:
    return sum(float((moved[name] * products[name]).double().sum()) for name in probe.units[unit].layers)


def _negative(pairs: Mapping[int, Float[np.ndarray, "u u"]]) -> int:
    return int(sum((np.triu(matrix, 1) < 0).sum() for matrix in pairs.values()))
