"""What is left of a batch normalization that has been folded into the layer before it.

The class is not named after batch normalization: transformers initializes whatever is, and expects its parameters.
"""

from torch import Tensor, nn


class FoldedNorm(nn.Module):
    """Passes its input on; where the normalization's class held modules of its own (timm's: an activation), these run.

    `layer` names the layer that scale and shift went into. `mean` and `deviation` are those of each channel of the
    output over the training data, as the normalization knew them, `scale` what it multiplied by; they are not stored.
    """

    mean: Tensor | None
    deviation: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        layer: str,
        mean: Tensor | None = None,
        deviation: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.mean, self.deviation, self.scale = mean, deviation, scale
        for name, child in norm.named_children():
            self.add_module(name, child)

    def forward(self, input: Tensor) -> Tensor:  # models may call it by this name
        """The input, as the children in their order leave it."""
        for child in self.children():
            input = child(input)
        return input

    def extra_repr(self) -> str:
        return f"into {self.layer}"
