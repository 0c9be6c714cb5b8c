"""`dither inspect` and `dither methods`: what a folder holds, and what there is to choose from."""

from pathlib import Path

from tests.cli.conftest import Run, error_line


def test_a_quantized_model_shows_layers_errors_and_reasons(run: Run, quantized: Path) -> None:
    done = run("inspect", quantized)
    assert done.code == 0, done.err
    for text in ("quantized by rtn", "vit.layers.1.mlp.fc2", "Output error", "normalization stays in full precision"):
        assert text in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_layers_and_coverage_can_be_asked_for_alone(run: Run, quantized: Path) -> None:
    layers, coverage = run("inspect", quantized, "--layers").out, run("inspect", quantized, "--coverage").out
    assert "Output error" in layers
    assert "Coverage" not in layers
    assert "vit.layers.0.layernorm_before" in coverage
    assert "Output error" not in coverage


def test_json_of_a_quantized_model_is_its_report(run: Run, quantized: Path) -> None:
    done = run("inspect", quantized, "--json")
    assert done.err == ""
    assert done.data["kind"] == "quantize"
    assert len(done.data["layers"]) == 14  # patches, 2 blocks of 6, classifier


def test_another_model_shows_its_units_layers_and_links(run: Run, tiny_model: Path) -> None:
    done = run("inspect", tiny_model)
    assert done.code == 0, done.err
    for text in ("not quantized", "2 of them blocks", "layernorm_before", "can be quantized"):
        assert text in done.out
    data = run("inspect", tiny_model, "--json").data
    assert [unit["name"] for unit in data["units"]][1:3] == ["vit.layers.0", "vit.layers.1"]
    assert {link["norm"] for link in data["links"]} >= {"vit.layers.0.layernorm_before", "vit.layers.1.layernorm_after"}
    assert len(data["layers"]) == 14


def test_methods_are_listed_with_their_source(run: Run) -> None:
    done = run("methods")
    assert done.code == 0
    assert "2210.17323" in done.out
    listed = run("methods", "--json").data["methods"]
    assert {row["name"] for row in listed} >= {"rtn", "gptq", "repq", "erq"}
    assert all(row["summary"] and row["source"] for row in listed)


def test_a_method_shows_its_fields_types_and_defaults(run: Run) -> None:
    done = run("methods", "gptq")
    for text in ("Source: Frantar", "act_order", "true | false", "number > 0 and ≤ 1", "Fields of every method"):
        assert text in done.out
    fields = {field["name"]: field for field in run("methods", "gptq", "--json").data["fields"]}
    assert fields["damping"]["default"] == 0.01
    assert fields["activations"]["type"] == "format or none"
    assert fields["overrides"]["type"] == "pattern: format, …"
    assert not fields["weights"]["own"]


def test_an_unknown_method_is_refused_with_the_nearest(run: Run) -> None:
    assert "did you mean 'repq'" in error_line(run("methods", "repg"))
