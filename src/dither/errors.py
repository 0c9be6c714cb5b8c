"""Every error a user can meet; each is a DitherError and the built-in error it refines.

DitherError
├── InputError (ValueError)            a value the user gave is wrong
│   ├── SpecError                      … a format text such as `int4:g128`
│   └── ShapeError                     … a tensor's shape or a size that does not divide
├── PathError (FileNotFoundError)      a path is missing or is not what was asked for
├── StorageError (OSError)             disk full, read-only, damaged or altered file
├── ResumeError (RuntimeError)         unfinished work belongs to another model, data or recipe
├── NonFiniteError (ArithmeticError)   NaN or Inf in weights or activations
├── NumericalError (ArithmeticError)   a solve failed
├── WorkerError (RuntimeError)         processes of an engine were lost too often
└── DependencyError (ImportError)      an optional package is not installed
"""

import difflib
from collections.abc import Iterable


class DitherError(Exception):
    """Base of all errors that dither raises on purpose; one line that says what, where and what to do."""


class InputError(DitherError, ValueError):
    """A value that the user gave is wrong."""


class SpecError(InputError):
    """A format text does not follow the grammar of `dither.formats.spec`."""


class ShapeError(InputError):
    """A shape does not fit, or a size does not divide."""


class PathError(DitherError, FileNotFoundError):
    """A path is missing, unreadable or not what was asked for."""


class StorageError(DitherError, OSError):
    """Writing or reading back failed, or what was read back differs from what was written."""


class ResumeError(DitherError, RuntimeError):
    """The unfinished work found in the output folder belongs to another run."""


class NonFiniteError(DitherError, ArithmeticError):
    """NaN or Inf in weights or activations; the message names the module."""


class NumericalError(DitherError, ArithmeticError):
    """A factorization failed at every step of its recorded ladder."""


class WorkerError(DitherError, RuntimeError):
    """A task was lost with its worker more often than it is repeated."""


class DependencyError(DitherError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message that suggests the nearest choice, or an empty text when none is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
