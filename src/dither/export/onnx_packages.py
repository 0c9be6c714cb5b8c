"""Whether what reading and running ONNX models needs is installed."""

from importlib.util import find_spec

from dither.errors import DependencyError


def check_packages() -> None:
    """Find onnx and onnxruntime.

    Raises:
        DependencyError: one is missing.
    """
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise DependencyError(f"requantizing needs {' and '.join(missing)}; install dither[export]")
