"""ZeroQ: no data, sensitivities by divergence, the whole Pareto front."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dither
from dither import pipeline
from dither.engine.team import Alone
from dither.errors import InputError
from dither.formats.spec import QuantSpec
from dither.methods import RTN
from dither.methods.zeroq import ZeroQ, kl_scores
from dither.models.anatomy import read_anatomy
from dither.models.distil import Distillation, distil
from dither.models.preparing import Subject
from dither.recipe import build_method

FEW = Distillation(count=3, steps=4)


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A tiny ResNet with a processor that says how large its pictures are."""
    network = tiny("ResNetForImageClassification")
    network.model.save_pretrained(tmp_path / "model")
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "model"


def subject(network: Any, batch: Tensor) -> Subject:
    return Subject(
        network.model, read_anatomy(network.model, lambda: network.model(batch)), network.model, batch.split(2)
    )


def test_scores_are_the_divergence_of_one_layer_alone_and_weights_come_back(tiny: Callable[..., Any]) -> None:
    network = tiny("ResNetForImageClassification")
    batch = network.batch(4)
    state = {key: x.clone() for key, x in network.model.state_dict().items()}
    layer = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    specs = [QuantSpec.parse(f"int{bits}:channel:asym:minmax") for bits in (2, 4, 8)]
    with torch.no_grad():
        found = kl_scores(subject(network, batch), [layer], specs)
    assert all(torch.equal(x, state[key]) for key, x in network.model.state_dict().items())
    assert found[0, 0] > found[0, 1] > found[0, 2] >= 0
    others = tuple(name for name in subject(network, batch).anatomy.layers if name != layer)
    result = dither.quantize(network.model, RTN(weights=specs[0], skip=others, fold_norms=False), batch)
    p, q = (network.logits(batch, model).double().log_softmax(dim=1) for model in (network.model, result.model))
    assert found[0, 0] == pytest.approx(float((p.exp() * (p - q)).sum(dim=1).mean()), rel=1e-3)


def test_a_size_is_met_by_the_best_choice_and_nothing_but_the_model_is_read(folder: Path, tmp_path: Path) -> None:
    method = ZeroQ(weights="int8:minmax", size="7.1kB", distillation=FEW)  # type: ignore[arg-type]
    result = dither.quantize(folder, method, output=tmp_path / "out", seed=1)
    data = result.report.data
    pareto, bits = data["pareto"], {row["name"]: row["weights"] for row in data["layers"]}
    assert data["totals"]["size_bytes"] == pareto["chosen"]["size_bytes"] <= 7100
    assert {name: QuantSpec.parse(text).bits for name, text in bits.items()} == {
        row["name"]: row["bits"] for row in pareto["layers"]
    }
    assert data["provenance"]["calibration"]["source"] == "distilled from batch normalizations"
    assert data["distilled"]["loss"][-1]["loss"] < data["distilled"]["loss"][0]["loss"]
    sizes, scores = ([point[key] for point in pareto["points"]] for key in ("size_bytes", "kl"))
    assert sizes == sorted(sizes)
    assert scores == sorted(scores, reverse=True)
    assert (data["recipe"]["size"], data["recipe"]["overrides"]) == (7100, {})
    text = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in text
    assert "Pareto front" in text
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(dither.load(tmp_path / "out")(pixels).logits, result.model(pixels).logits)


def test_the_front_is_that_of_brute_force(folder: Path) -> None:
    kept = ("resnet.embedder*", "*stages.1*", "classifier*")
    method = ZeroQ(weights="int8:minmax", size="1MB", skip=kept, distillation=FEW)  # type: ignore[arg-type]
    pareto = dither.quantize(folder, method).report.data["pareto"]
    rows = [list(row["kl"].values()) for row in pareto["layers"]]
    uniform = {row["bits"]: row["size_bytes"] for row in pareto["uniform"]}
    assert 2 <= len(rows) <= 8
    assert uniform[2] < uniform[4] < uniform[8]
    best = min(sum(choice) for choice in itertools.product(*rows))
    assert pareto["points"][-1]["kl"] == pytest.approx(best)
    assert pareto["points"][0]["kl"] == pytest.approx(np.array(rows)[:, 0].sum())


def test_a_plan_measures_nothing_and_fits_the_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.methods.zeroq.kl_scores", None)
    steps: list[int] = []

    def seen(model: Any, run: Any, size: Any, settings: Distillation, *rest: Any) -> Any:
        steps.append(settings.steps)
        return distil(model, run, size, settings, *rest)

    monkeypatch.setattr("dither.distilled.distil", seen)
    for size in ("7.1kB", "1MB"):
        method = ZeroQ(weights="int8:minmax", size=size, distillation=FEW)  # type: ignore[arg-type]
        plan = pipeline.plan(folder, method)
        assert plan["size_bytes"] <= int(method.size or 0)
    with pytest.raises(InputError, match="cannot be met"):
        pipeline.plan(folder, ZeroQ(size="1kB", distillation=FEW))  # type: ignore[arg-type]
    pipeline.plan(folder, RTN(), "distilled")
    assert steps == [0, 0, 0, 0]


def test_a_size_that_cannot_be_met_is_refused_with_what_can(folder: Path) -> None:
    with pytest.raises(InputError, match=r"size 1,000 bytes cannot be met: .* takes [\d,]+ to [\d,]+, of which"):
        dither.quantize(folder, ZeroQ(size="1kB", distillation=FEW))  # type: ignore[arg-type]


def test_without_size_it_is_rounding_to_nearest_and_distilled_pictures_serve_every_method(folder: Path) -> None:
    own = ZeroQ(distillation=FEW)
    other = RTN(weights=own.weights, activations=own.activations, inputs="quantized")
    one = dither.quantize(folder, own, seed=3)
    batch = dither.quantize(folder, other, "distilled", count=3, seed=3)
    assert one.report.data["provenance"]["calibration"]["count"] == 3
    assert batch.report.data["distilled"]["settings"]["steps"] == 500
    assert "pareto" not in one.report.data


def test_a_method_that_needs_data_says_so(folder: Path) -> None:
    with pytest.raises(InputError, match="gptq needs calibration data"):
        dither.quantize(folder, "gptq")


def test_sizes_are_read_as_people_write_them() -> None:
    assert build_method("zeroq", {"size": "2.5MB"}).size == 2_500_000  # type: ignore[attr-defined]
    assert build_method("zeroq", {"size": "none"}).size is None  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="method 'zeroq', size"):
        build_method("zeroq", {"size": "small"})


def test_ranks_share_the_pictures_of_rank_0(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deciding: list[bool] = []

    class Watching(Alone):
        def agree(self, decide: Callable[[], Any]) -> Any:
            deciding.append(True)
            try:
                return decide()
            finally:
                deciding.pop()

    make, alone = pipeline.calibration_without_data, []

    def watched(*arguments: Any) -> Any:
        alone.append(not deciding)
        return make(*arguments)

    monkeypatch.setattr(pipeline, "calibration_without_data", watched)
    method = ZeroQ(distillation=FEW)
    pipeline.begin(folder, method, None, None, 0, 32, "cpu", None, False, None, Watching())
    assert alone == [False]
