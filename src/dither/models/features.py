"""What a network is made of as a few numbers, so that what was learned on one network can be used for another.

Source: the architecture features of Quantune (Lee et al., 2022, arXiv 2202.05048): how many operations of each kind.
"""

import math
from statistics import median

from torch import nn

from dither.models.anatomy import Anatomy
from dither.models.layers import is_layer, matrix_shape


def model_features(model: nn.Module, anatomy: Anatomy) -> dict[str, float]:
    """Counts of layers by kind, depth in units, and logarithms of parameters and of the layers' median input width."""
    modules = list(model.modules())
    layers = {name: model.get_submodule(name) for name in anatomy.layers}
    widths = [matrix_shape(layer)[1] for layer in layers.values() if is_layer(layer)]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    return {
        "log10 parameters": math.log10(max(1, sum(p.numel() for p in model.parameters()))),
        "units": float(len(anatomy.units)),
        "layers": float(len(layers)),
        "convolutions": float(sum(one.groups == 1 for one in convolutions)),
        "grouped convolutions": float(sum(one.groups > 1 for one in convolutions)),
        "norms": float(sum("Norm" in type(module).__name__ for module in modules)),
        "pools": float(sum("Pool" in type(module).__name__ for module in modules)),
        "attentions": float(sum(len(unit.attention) for unit in anatomy.units)),
        "log2 width": math.log2(median(widths)) if widths else 0.0,
    }
