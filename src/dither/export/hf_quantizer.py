"""The quantizer that lets transformers' `from_pretrained` open a folder written by dither, after `import dither`."""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dither.models.structure import rebuild

METHOD = "dither"


@register_quantization_config(METHOD)
class DitherConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the structure of `dither.models.structure`."""

    def __init__(self, **structure: Any) -> None:
        structure.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.structure = structure

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file."""
        return {"quant_method": METHOD, **self.structure}


@register_quantizer(METHOD)
class DitherQuantizer(HfQuantizer):
    """Replaces layers by empty packed ones before transformers loads the tensors."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        rebuild(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Results are written by dither, which also verifies them."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes are integers."""
        return False
