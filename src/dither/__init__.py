"""dither: store a trained network in few bits with the least loss.

    import dither

    result = dither.quantize("path/to/model", dither.ERQ(weights="int4", activations="int4"), "pictures/")
    result.save("out/")
    model = dither.load("out/")

Names are loaded when first used, so that `import dither` is quick; it also lets transformers' `from_pretrained` open
what dither wrote.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dither.export.registration import register_when_imported

if TYPE_CHECKING:
    from pathlib import Path

    from dither.allocating import allocate
    from dither.allocation.allocation import Allocation
    from dither.allocation.table import ScoreTable
    from dither.comparison import compare
    from dither.data import ImageSet, open_images
    from dither.errors import DitherError
    from dither.evaluation.evaluate import evaluate
    from dither.formats.spec import QuantSpec
    from dither.inspection import inspect
    from dither.methods import ERQ, GPTQ, METHODS, RTN, Method, RepQ
    from dither.pipeline import load, plan, quantize, save
    from dither.quantune.run import tune
    from dither.result import Report, Result
    from dither.sensitivity import measure

__version__ = version("dither")
_HOME = {
    "Allocation": "dither.allocation.allocation",
    "ScoreTable": "dither.allocation.table",
    "allocate": "dither.allocating",
    "measure": "dither.sensitivity",
    "compare": "dither.comparison",
    "ImageSet": "dither.data",
    "open_images": "dither.data",
    "DitherError": "dither.errors",
    "evaluate": "dither.evaluation.evaluate",
    "requantize": "dither.export.requantize",
    "QuantSpec": "dither.formats.spec",
    "ERQ": "dither.methods",
    "GPTQ": "dither.methods",
    "METHODS": "dither.methods",
    "Method": "dither.methods",
    "RTN": "dither.methods",
    "RepQ": "dither.methods",
    "Report": "dither.result",
    "Result": "dither.result",
    "inspect": "dither.inspection",
    "load": "dither.pipeline",
    "plan": "dither.pipeline",
    "quantize": "dither.pipeline",
    "save": "dither.pipeline",
    "tune": "dither.quantune.run",
}
__all__ = [
    "ERQ",
    "GPTQ",
    "METHODS",
    "RTN",
    "Allocation",
    "DitherError",
    "ImageSet",
    "Method",
    "QuantSpec",
    "RepQ",
    "Report",
    "Result",
    "ScoreTable",
    "allocate",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "load",
    "measure",
    "open_images",
    "plan",
    "quantize",
    "requantize",
    "save",
    "tune",
]


def export(result: "Result | str | Path", to: str, output: "str | Path", **options: Any) -> dict[str, Any]:
    """Write a result, or the folder that one was saved in, for another runtime: `dither.export.export.export`.

    Named like the package that it comes from, so it cannot be loaded when first used as the other names are.
    """
    from dither.export.export import export as write

    return write(result, to, output, **options)


def __getattr__(name: str) -> Any:
    """A public name, loaded from where it lives."""
    if name not in _HOME:
        raise AttributeError(f"module 'dither' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


register_when_imported()
