"""One file for each published system, and the dictionary that names them."""

from typing import Any

from dither.errors import InputError, nearest
from dither.methods.adadim import AdaDim
from dither.methods.awq import AWQ
from dither.methods.baq import BAQ
from dither.methods.base import Method
from dither.methods.billm import BiLLM
from dither.methods.erq import ERQ
from dither.methods.gptq import GPTQ
from dither.methods.gwq import GWQ
from dither.methods.hqq import HQQ
from dither.methods.lorc import LoRC
from dither.methods.noisyquant import NoisyQuant
from dither.methods.oac import OAC
from dither.methods.ptq4vit import PTQ4ViT
from dither.methods.qera import QERA
from dither.methods.repq import RepQ
from dither.methods.repquant import RepQuant
from dither.methods.rtn import RTN
from dither.methods.signround import SignRound
from dither.methods.smoothquant import SmoothQuant
from dither.methods.spqr import SpQR
from dither.methods.squeezellm import SqueezeLLM
from dither.methods.udfc import UDFC
from dither.methods.zeroq import ZeroQ

__all__ = [
    "AWQ",
    "BAQ",
    "ERQ",
    "GPTQ",
    "GWQ",
    "HQQ",
    "METHODS",
    "OAC",
    "PRESETS",
    "QERA",
    "RTN",
    "UDFC",
    "AdaDim",
    "BiLLM",
    "LoRC",
    "Method",
    "NoisyQuant",
    "PTQ4ViT",
    "RepQ",
    "RepQuant",
    "SignRound",
    "SmoothQuant",
    "SpQR",
    "SqueezeLLM",
    "ZeroQ",
    "method_class",
    "preset",
]

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "baq": BAQ,
    "repq": RepQ,
    "erq": ERQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "hqq": HQQ,
    "qera": QERA,
    "lorc": LoRC,
    "spqr": SpQR,
    "billm": BiLLM,
    "adadim": AdaDim,
    "squeezellm": SqueezeLLM,
    "gwq": GWQ,
    "oac": OAC,
    "signround": SignRound,
    "zeroq": ZeroQ,
    "udfc": UDFC,
    "ptq4vit": PTQ4ViT,
    "noisyquant": NoisyQuant,
    "repquant": RepQuant,
}


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "repq-gptq": ("gptq", {"reparameterize": True}),
    "gptq-fitted": (
        "gptq",
        {"static_groups": False, "range_by": "output", "weights": "int3:g32:asym:tight:realzero:s4.64"},
    ),
    "baq-levels": (
        "baq",
        {"steps": "levels", "losses": "law", "act_order": False, "weights": "mix4:channel:asym:realzero"},
    ),
    "gptq-learned": (
        "signround",
        {
            "start": "groups",
            "range_by": "output",
            "rule": "adam",
            "range_gradient": "codes",
            "widest": 1.2,
            "weights": "int3:g32:asym:tight:realzero:s4.64",
        },
    ),
    "erq-v1": ("erq", {"dual": False, "rounding": "halves", "inputs": "fp", "range_by": "weight"}),
    "erq-v2": ("erq", {"dual": True, "rounding": "halves", "inputs": "fp", "range_by": "weight"}),
    "qera-approx": ("qera", {"scale": "approx"}),
    "lqer": ("qera", {"scale": "lqer"}),
    "oac-billm": ("oac", {"solver": "billm", "weights": "nuq2:g128:dual", "damping": 0.01, "act_order": False}),
    "spqr-3bit": ("spqr", {"weights": "int3:g8:asym:tight:realzero:s3.64", "threshold": 0.4}),
    "udfc-corrected": (
        "udfc",
        {"bias_correct": True, "prior": "identity", "relative": True, "ridge": 0.1},
    ),
    "base-ptq": (
        "ptq4vit",
        {"metric": "cosine", "twin": False, "rounds": 1, "lowest": 0.5},
    ),
    "noisyquant-linear": ("noisyquant", {"base": "linear"}),
    "noisyquant-ptq4vit": ("noisyquant", {"base": "ptq4vit"}),
    "billm-columns": ("billm", {"search": "weight", "feedback": "columns", "act_order": True}),
}


def method_class(name: str) -> type[Method]:
    """The class of a method's or preset's name.

    Raises:
        InputError: there is no such method; the message names the nearest.
    """
    kind, _ = preset(name)
    if kind not in METHODS:
        known = [*METHODS, *PRESETS]
        raise InputError(f"unknown method {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return METHODS[kind]


def preset(name: str) -> tuple[str, dict[str, Any]]:
    """The method that a preset configures and the fields it sets; a method's own name sets none."""
    return PRESETS.get(name, (name, {}))
