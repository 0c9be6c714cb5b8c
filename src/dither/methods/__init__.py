"""One file for each published system, and the dictionary that names them."""

from dither.errors import InputError, nearest
from dither.methods.base import Method
from dither.methods.erq import ERQ
from dither.methods.gptq import GPTQ
from dither.methods.repq import RepQ
from dither.methods.rtn import RTN

METHODS: dict[str, type[Method]] = {"rtn": RTN, "gptq": GPTQ, "repq": RepQ, "erq": ERQ}


def method_class(name: str) -> type[Method]:
    """The class of a method's name.

    Raises:
        InputError: there is no such method; the message names the nearest.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"unknown method {name!r}{nearest(name, METHODS)} (known: {known})")
    return METHODS[name]
