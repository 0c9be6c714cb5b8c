"""The rules of runtimes, each met and each broken."""

import pytest

from dither.errors import InputError
from dither.export.runtimes import RULES, Finding, Planned, PlannedLayer, check
from dither.formats.spec import QuantSpec

BLOCK = "model.layers.0"


def layer(
    name: str, weights: str = "int4:g64:sym", shape: tuple[int, int] = (128, 128), **other: object
) -> PlannedLayer:
    """A planned layer below the first block."""
    return PlannedLayer(f"{BLOCK}.{name}", shape, QuantSpec.parse(weights), **other)  # type: ignore[arg-type]


def network(*layers: PlannedLayer, **other: object) -> Planned:
    """A planned llama."""
    return Planned(layers, **{"model_type": "llama", **other})  # type: ignore[arg-type]


def problems(planned: Planned, runtime: str, fatal: bool = True) -> list[str]:
    """What a runtime has against a plan."""
    return [str(one) for one in check(planned, runtime) if one.fatal is fatal]


GOOD = network(
    *(layer(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(layer(f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")),
    kept=("lm_head",),
)


@pytest.mark.parametrize("runtime", RULES)
def test_symmetric_groups_of_four_bits_run_everywhere(runtime: str) -> None:
    assert check(GOOD, runtime) == []


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_layers_that_servers_fuse_share_their_settings(runtime: str) -> None:
    parts = [layer("self_attn.q_proj"), layer("self_attn.k_proj", "int8:sym"), layer("self_attn.v_proj")]
    found = problems(network(*parts), runtime)
    assert len(found) == 1
    assert found[0].startswith(f"{BLOCK}.self_attn.k_proj: int8:channel differs from int4:g64 of q_proj")
    kept = problems(network(*parts[:1], parts[2], kept=(f"{BLOCK}.self_attn.k_proj",)), runtime)
    assert kept == [f"{BLOCK}.self_attn.k_proj: it is kept, but fused with q_proj; quantize all of them or none"]
    assert problems(network(layer("mlp.up_proj"), layer("mlp.gate_proj", "int4:g64:asym")), runtime)
    assert not problems(network(*parts), "llama.cpp")


def test_experts_of_a_block_share_settings_and_have_no_zero_points() -> None:
    experts = [layer(f"mlp.experts.{k}.down_proj", f"int4:g{32 * (k + 1)}:sym") for k in range(2)]
    assert "differs" in problems(network(*experts), "vllm")[0]
    asymmetric = [layer(f"mlp.experts.{k}.down_proj", "int4:g64:asym") for k in range(2)]
    assert problems(network(*asymmetric), "vllm") == [
        f"{BLOCK}.mlp.experts.0.down_proj (and 1 more layers): experts with zero-points have no kernel; use sym"
    ]


@pytest.mark.parametrize(
    ("weights", "refusing", "warning"),
    [
        ("int3:g64:sym", {"sglang", "llama.cpp", "onnx"}, {"vllm"}),
        ("int2:g64:sym", {"sglang", "llama.cpp"}, {"vllm"}),
        ("int3:g64:asym", {"vllm", "sglang", "llama.cpp", "onnx"}, {"vllm", "transformers"}),
        ("int8:g64:asym", {"llama.cpp"}, {"transformers"}),
        ("int4:g64:asym", set(), {"transformers"}),
        ("int4:g24:sym", {"llama.cpp", "onnx"}, set()),
        ("int4:g16:sym", {"llama.cpp"}, set()),
        ("nf4:g64", {"vllm", "sglang", "llama.cpp", "onnx"}, {"transformers"}),
        ("int4:g64:ic", {"vllm", "sglang", "llama.cpp", "onnx"}, {"transformers"}),
        ("int4:asym:realzero", {"vllm", "sglang", "llama.cpp", "onnx"}, {"transformers"}),
        ("int4:dual:sym", {"vllm", "sglang", "llama.cpp", "onnx"}, {"transformers"}),
        ("int1:sym", {"vllm", "sglang", "llama.cpp", "onnx"}, set()),
    ],
)
def test_formats_that_a_runtime_does_not_read(weights: str, refusing: set[str], warning: set[str]) -> None:
    planned = network(layer("mlp.down_proj", weights, (192, 192)))
    assert {runtime for runtime in RULES if problems(planned, runtime)} == refusing
    assert {runtime for runtime in RULES if problems(planned, runtime, fatal=False)} == warning


def test_what_is_stored_beside_codes_opens_with_dither_only() -> None:
    planned = network(layer("mlp.down_proj"), adds=("a low-rank term",))
    assert problems(planned, "vllm") == [
        "the method stores a low-rank term beside the codes; open it with from_pretrained after `import dither`"
    ]
    assert problems(planned, "transformers") == []
    assert "low-rank" in problems(planned, "transformers", fatal=False)[0]


def test_routers_recurrences_heads_and_convolutions_are_kept() -> None:
    planned = network(
        layer("mlp.gate"), layer("mixer.x_proj"), PlannedLayer("lm_head", (64, 64), QuantSpec.parse("int4:sym"))
    )
    assert [text.partition(";")[0] for text in problems(planned, "vllm")] == [
        f"{BLOCK}.mlp.gate: a router cannot be quantized",
        f"{BLOCK}.mixer.x_proj: a part of a recurrence cannot be quantized",
    ]
    tied = network(PlannedLayer("lm_head", (64, 64), QuantSpec.parse("int4:sym")), tied=True)
    assert problems(tied, "sglang") == ["lm_head: the head is tied to the embeddings; keep it"]
    assert problems(network(layer("conv", linear=False)), "onnx") == [
        f"{BLOCK}.conv: only linear layers can be quantized; skip it"
    ]


def test_activations_are_int8_in_servers_and_kept_elsewhere() -> None:
    eight = network(layer("mlp.down_proj", "int8:sym", activations=QuantSpec.parse("int8:token")))
    four = network(layer("mlp.down_proj", "int4:sym", activations=QuantSpec.parse("int4:token")))
    assert problems(eight, "vllm") == []
    assert problems(four, "vllm") == [f"{BLOCK}.mlp.down_proj: activations in int4:token; use int8:token, or keep them"]
    assert all("keep them" in problems(eight, runtime)[0] for runtime in ("llama.cpp", "onnx"))


def test_sizes_that_fast_kernels_do_not_take_are_a_warning() -> None:
    planned = network(layer("mlp.down_proj", shape=(128, 96)))
    assert problems(planned, "vllm") == []
    assert "64 does not divide its 128×96 weights" in problems(planned, "vllm", fatal=False)[0]


def test_other_architectures_have_no_gguf() -> None:
    found = problems(network(layer("mlp.down_proj"), model_type="vit"), "llama.cpp")
    assert found == ["the model type vit is not exported to GGUF; it knows llama, mistral, qwen2, qwen3"]


def test_layers_with_the_same_problem_are_one_finding_and_the_fatal_come_first() -> None:
    planned = network(*(layer(f"mlp.layer{k}", "int3:g64:asym", (128, 96)) for k in range(5)))
    found = check(planned, "vllm")
    assert [one.fatal for one in found] == sorted((one.fatal for one in found), reverse=True)
    assert found[0] == Finding(
        f"{BLOCK}.mlp.layer0", "zero-points with 3-bit codes have no kernel", "use sym, or int4 or int8"
    )
    assert found[0].more == 4
    assert found[0].to_json()["more"] == 4


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'vllm'"):
        check(GOOD, "vlm")
