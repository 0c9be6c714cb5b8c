"""The names of the engines, apart from the engines, which need torch."""

from typing import Literal

EngineName = Literal["auto", "local", "torchrun", "ray"]
