"""Ways to measure what a format costs each unit of a network: one file each, and the dictionary that names them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from dither.errors import InputError, nearest
from dither.recipe import read_setting
from dither.sensitivities.augmented import Augmented
from dither.sensitivities.baq import EqualLoss
from dither.sensitivities.base import Sensitivity
from dither.sensitivities.cmpq import CMPQ
from dither.sensitivities.error import OutputError
from dither.sensitivities.fisher import Fisher
from dither.sensitivities.hawq import HawqV2
from dither.sensitivities.kl import KL
from dither.sensitivities.pmpq import PMPQ
from dither.sensitivities.quadratic import Quadratic
from dither.sensitivities.tdmpq import TDMPQ

SENSITIVITIES: dict[str, Callable[..., Sensitivity]] = {
    "hawq-v2": HawqV2,
    "kl": KL,
    "fisher": Fisher,
    "quadratic": Quadratic,
    "error": OutputError,
    "baq": EqualLoss,
    "cmpq": CMPQ,
    "pmpq": PMPQ,
    "tdmpq": TDMPQ,
    "augmented": Augmented,
}


def parse_sensitivity(text: str) -> Sensitivity:
    """A sensitivity from a text such as `kl` or `hawq-v2+probes=20`.

    Raises:
        InputError: there is none of this name, or it has no such setting; the message names the nearest.
    """
    name, *settings = text.strip().split("+")
    if name not in SENSITIVITIES:
        known = ", ".join(SENSITIVITIES)
        raise InputError(f"unknown sensitivity {name!r}{nearest(name, SENSITIVITIES)} (known: {known})")
    kind: Any = SENSITIVITIES[name]
    given = dict(read_setting(setting) for setting in settings)
    known_settings = [one.name for one in fields(kind)]
    for key in given:
        if key not in known_settings:
            raise InputError(
                f"sensitivity {name!r} has no setting {key!r}{nearest(key, known_settings)} "
                f"(settings: {', '.join(known_settings) or 'none'})"
            )
    made: Sensitivity = kind(**given)
    return made
