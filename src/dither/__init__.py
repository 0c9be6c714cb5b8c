"""dither: store a trained network in few bits with the least loss."""

from importlib.metadata import version

__version__ = version("dither")
