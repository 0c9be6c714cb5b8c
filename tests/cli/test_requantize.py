"""`dither requantize` and what it says."""

from pathlib import Path

import onnx
from tests.cli.conftest import Run, error_line
from tests.export.test_requantize import Noise, network


def test_a_scheme_is_changed_and_compared_with_its_source(run: Run, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_static

    onnx.save(network(), "float.onnx")
    quantize_static("float.onnx", "uint8.onnx", Noise(), quant_format=QuantFormat.QDQ)
    done = run("requantize", "uint8.onnx", "--to", "int8:tensor:pow2", "-o", "pow2.onnx", "--quiet")
    assert done.code == 0, done.err
    assert "4 layers and" in done.out
    assert "of the answers are the source's" in done.out
    assert "saved in pow2.onnx" in done.out
    data = run(
        "requantize", "uint8.onnx", "--to", "int8:channel", "-o", "c.onnx", "--no-fold", "--signed", "--json"
    ).data
    assert data["kind"] == "requantization" and data["difference"] < 0.1
    assert "float.onnx is not quantized" in error_line(run("requantize", "float.onnx", "--to", "int8", "-o", "x.onnx"))
    assert "missing.onnx" in error_line(run("requantize", "missing.onnx", "--to", "int8", "-o", "x.onnx"))
    assert "expected a target such as" in error_line(run("requantize", "uint8.onnx", "--to", "nf4", "-o", "x.onnx"))
