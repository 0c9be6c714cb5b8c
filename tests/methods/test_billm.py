"""BiLLM: what it stores, what it says of its bits, and what its fields change."""

import pytest
import torch

from dither.calibrate import LayerTask
from dither.errors import InputError
from dither.methods import BiLLM
from dither.statistics.gram import Gram


def layer(columns: int = 32, seed: int = 0) -> LayerTask:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) + torch.eye(columns)
    return LayerTask("fc", weight, torch.randn(24, generator=generator), Gram.of(weight @ mix, ones=True))


def cost(task: LayerTask, method: BiLLM) -> float:
    assert task.gram is not None
    change = method.solve(task).weight.dequantize(torch.float64) - task.weight
    k = task.columns
    return float(((change @ task.gram.quantized[:k, :k]) * change).sum())


def test_the_defaults_are_the_released_codes() -> None:
    method = BiLLM()
    assert str(method.weights) == "nuq2:g128:dual"
    assert (method.damping, method.act_order, method.search, method.feedback) == (0.01, False, "metric", "diagonal")


def test_the_notes_give_the_papers_bits_beside_those_that_are_stored() -> None:
    solution = BiLLM(weights="nuq2:g16:dual").solve(layer())  # type: ignore[arg-type]
    assert solution.notes["paper_bits"] == 1 + solution.notes["salient"]
    assert 1 < solution.notes["paper_bits"] < 2
    assert solution.weight.bits_per_weight == pytest.approx(2 + 2 * 4 * 16 / 16 + 1 / 24)
    assert solution.bias is not None


@pytest.mark.parametrize(("columns", "block"), [(32, None), (36, 18), (37, 37), (576, 18)])
def test_a_block_that_does_not_divide_gives_way_to_the_nearest_divisor(columns: int, block: int | None) -> None:
    solution = BiLLM(weights="nuq2:g16:dual").solve(layer(columns))  # type: ignore[arg-type]
    if columns % 16 == 0:
        block = None
    assert solution.weight.spec.group_size == (block or 16)
    assert ("block" in solution.notes) == (block is not None)


def test_ours_beats_the_released_choices() -> None:
    tasks = [layer(64, seed) for seed in range(4)]
    released = BiLLM(weights="nuq2:g16:dual")  # type: ignore[arg-type]
    ours = released.model_copy(update={"feedback": "columns", "search": "weight"})
    assert sum(cost(task, ours) for task in tasks) < 0.9 * sum(cost(task, released) for task in tasks)


def test_a_layer_of_another_format_is_swept_and_one_without_gram_cannot_be_binary() -> None:
    task = layer()
    method = BiLLM(weights="nuq2:g16:dual", overrides={"other": "int4:g8"})  # type: ignore[dict-item, arg-type]
    found = method.solve(LayerTask("other", task.weight, task.bias, task.gram))
    assert str(found.weight.spec).startswith("int4:g8")
    bare = method.solve(LayerTask("other", task.weight, None, None))
    assert bare.notes == {"rounding": "nearest: grouped convolution"}
    with pytest.raises(InputError, match="fc: outputs of a grouped convolution"):
        method.solve(LayerTask("fc", task.weight, None, None))
