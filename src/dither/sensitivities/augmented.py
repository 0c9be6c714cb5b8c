"""Augmented Hessians: what layers cost together, from products of the Hessian with their errors.

With Δ_i the error of unit i under an option, M_ij = Δ_iᵀ H_ij Δ_j, and the loss of quantizing all is ½ Σ_ij M_ij.
`hvp`: score ½ M_ii and pairs M_ij; a product, two backward passes over the data, for each unit and option.
`rowsum`: score ½ Σ_j M_ij, a unit's own cost and half of all that it shares with others, as if all units had the
option; a product for each option, as many times less as there are units, but a budget's solver sees no couplings.
`measured`: divergences of single units and of every pair, D(i, j) - D(i) - D(j), without derivatives; as many passes as
there are pairs. An order of units, as a search for an accuracy needs, is that of ½ Σ_j M_ij in every case.

Source: Schaefer et al., Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
Quantization, arXiv 2306.04879. Its formula was not at hand: the terms are those of the exact second order.
Departs from it: unknown beyond that. Couplings keep their sign; a score of a unit by itself that is not positive counts
as a hundredth of the option's median.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dither.folding import replaced_weight
from dither.models.curvature import hessian_product
from dither.sensitivities.base import Measured, Probe
from dither.sensitivities.blocks import Damage
from dither.sensitivities.swap import replaced
from dither.statistics.hutchinson import positive

Pairs = Literal["rowsum", "hvp", "measured"]


@dataclass(frozen=True)
class Augmented:
    """`pairs` says how couplings are found; options of inputs are not looked at."""

    name: ClassVar[str] = "augmented"
    about: ClassVar[str] = "second-order loss with couplings between layers (augmented Hessians); float32"

    pairs: Pairs = "hvp"

    def measure(self, probe: Probe) -> Measured:
        """One option after the other."""
        probe.solve()
        count = len(probe.units)
        scores, pairs = np.zeros((count, len(probe.options))), dict[int, Float[np.ndarray, "u u"]]()
        find = {"rowsum": self._rowsum, "hvp": self._products, "measured": self._measured}[self.pairs]
        able = {p: [u for u in range(count) if p in probe.can(u)] for p in range(len(probe.options))}
        places = [p for p, option in enumerate(probe.options) if option.weights is not None and able[p]]
        for place, matrix in find(probe, {place: able[place] for place in places}):
            coupled = self.pairs != "rowsum"
            scores[able[place], place] = positive((matrix.diagonal() if coupled else matrix[:, 0]).tolist())
            if coupled:
                pairs[place] = np.zeros((count, count))
                pairs[place][np.ix_(able[place], able[place])] = matrix - np.diag(matrix.diagonal())
        table = probe.table({unit.name: scores[u].tolist() for u, unit in enumerate(probe.units)})
        return Measured(table, pairs=pairs, facts={"negative_couplings": _negative(pairs)})

    def _rowsum(self, probe: Probe, able: Mapping[int, list[int]]) -> Iterator[tuple[int, Float[np.ndarray, "u 1"]]]:
        tasks = {f"option {place}": (place, units) for place, units in able.items()}
        for place, sums in zip(able, probe.each("augmented", partial(_sums, _Moved(probe)), tasks), strict=True):
            yield place, np.array(sums)[:, None]

    def _products(self, probe: Probe, able: Mapping[int, list[int]]) -> Iterator[tuple[int, Float[np.ndarray, "u u"]]]:
        """Symmetric, its diagonal halved."""
        tasks = {f"option {p} unit {u}": (p, u, units) for p, units in able.items() for u in units}
        rows = probe.each("augmented", partial(_row, _Moved(probe)), tasks)
        for place, units in able.items():
            matrix = np.array(list(islice(rows, len(units))))
            matrix = (matrix + matrix.T) / 2
            np.fill_diagonal(matrix, matrix.diagonal() / 2)
            yield place, matrix

    def _measured(self, probe: Probe, able: Mapping[int, list[int]]) -> Iterator[tuple[int, Float[np.ndarray, "u u"]]]:
        """Divergences of each unit, and of each with those behind it, less those of both."""
        tasks = {f"option {p} from {u}": (p, units[row:]) for p, units in able.items() for row, u in enumerate(units)}
        rows = probe.each("augmented", partial(_together, probe, Damage(probe, self.name)), tasks)
        for place, units in able.items():
            matrix = np.zeros((len(units), len(units)))
            for row, found in enumerate(islice(rows, len(units))):
                matrix[row, row:] = found
            both = np.triu(matrix, 1) - np.triu(np.add.outer(matrix.diagonal(), matrix.diagonal()), 1)
            yield place, both + both.T + np.diag(matrix.diagonal())


@dataclass
class _Moved:
    """Q(W) - W of each layer in the shape of its weight, of the option that was asked for last."""

    probe: Probe
    place: int = -1
    errors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, place: int, able: Sequence[int]) -> dict[str, Tensor]:
        if place != self.place:
            self.place, self.errors = place, _errors(self.probe, place, able)
        return self.errors


def _sums(moved: _Moved, task: tuple[int, list[int]]) -> list[float]:
    """½ Δ_iᵀ (H Δ)_i of each unit i."""
    place, able = task
    errors, probe = moved(place, able), moved.probe
    products = hessian_product(probe.gradients(), errors)
    return [_dot(probe, unit, errors, products) / 2 for unit in able]


def _row(moved: _Moved, task: tuple[int, int, list[int]]) -> list[float]:
    """Δ_iᵀ H_ij Δ_j of one unit j with every unit i."""
    place, unit, able = task
    errors, probe, inside = moved(place, able), moved.probe, set(moved.probe.units[unit].layers)
    alone = {name: error if name in inside else torch.zeros_like(error) for name, error in errors.items()}
    products = hessian_product(probe.gradients(), alone)
    return [_dot(probe, other, errors, products) for other in able]


@torch.no_grad()
def _together(probe: Probe, damage: Damage, task: tuple[int, list[int]]) -> list[float]:
    """Divergence with the first of these units as an option, and with each other beside it."""
    place, units = task
    found = []
    for other in units:
        names = dict.fromkeys([*probe.units[units[0]].layers, *probe.units[other].layers])
        weights = {name: probe.stored(name, place) for name in names}
        with replaced(probe, weights, {}):
            found.append(damage()[0])
    return found


@torch.no_grad()
def _errors(probe: Probe, place: int, able: Sequence[int]) -> dict[str, Tensor]:
    """Q(W) - W of each layer, in the shape of its weight."""
    found = {}
    for name in (name for unit in able for name in probe.units[unit].layers):
        layer, before = probe.layer(name), probe.layer(name).weight.detach().clone()
        with replaced_weight(layer, probe.stored(name, place)):
            found[name] = layer.weight.detach() - before
    return found


def _dot(probe: Probe, unit: int, moved: Mapping[str, Tensor], products: Mapping[str, Tensor]) -> float:
    return sum(float((moved[name] * products[name]).double().sum()) for name in probe.units[unit].layers)


def _negative(pairs: Mapping[int, Float[np.ndarray, "u u"]]) -> int:
    return int(sum((np.triu(matrix, 1) < 0).sum() for matrix in pairs.values()))
