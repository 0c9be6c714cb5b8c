"""The text form of formats: what is written reads back, what is left out comes from the base, errors help."""

from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dither.errors import SpecError
from dither.formats.spec import WEIGHT_PERCENTILES, QuantSpec, read_spec, spec_field


@st.composite
def weight_specs(draw: st.DrawFn, kind: Any) -> QuantSpec:
    """Every consistent spec of a format that only weights have."""
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    along = draw(st.sampled_from(["inputs", "outputs"]))
    second = kind in ("nf", "fp") and draw(st.booleans())
    return QuantSpec(
        kind=kind,
        bits=4 if kind in ("nf", "fp") else draw(st.integers(2, 8)),
        granularity=granularity,
        group_size=draw(st.integers(1, 4096)) if granularity == "group" else None,
        group_along=along,
        dual=kind == "nuq" and granularity != "tensor" and along == "inputs" and draw(st.booleans()),
        scale_bits=draw(st.integers(1, 8)) if second else None,
        scale_group=draw(st.integers(1, 512)) if second else None,
    )


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Every consistent spec whose fields have tokens."""
    kind = draw(st.sampled_from(["int", "log2", "logsqrt2", "twin", "nf", "fp", "nuq", "mxint"]))
    if kind in ("nf", "fp", "nuq", "mxint"):
        return draw(weight_specs(kind))
    bits = draw(st.integers(2 if kind == "twin" else 1, 8))
    granularity = draw(st.sampled_from(["tensor", "channel", "token", "group"]))
    symmetry = draw(st.sampled_from(["sym", "asym", "unsigned"]))
    power_of_two, dynamic = draw(st.booleans()), granularity == "token" or draw(st.booleans())
    second = kind == "int" and not power_of_two and not dynamic and draw(st.booleans())
    return QuantSpec(
        kind=kind,
        bits=bits,
        granularity=granularity,
        group_size=draw(st.integers(1, 4096)) if granularity == "group" else None,
        group_along=draw(st.sampled_from(["inputs", "outputs"])),
        symmetry=symmetry,
        include_zero=draw(st.booleans()),
        zero_point=draw(st.sampled_from(["integer", "clamped", "real"])),
        search=draw(st.sampled_from(["minmax", "percentile", "mse"])),
        narrow=symmetry == "sym" and bits > 1 and draw(st.booleans()),
        dual=granularity == "channel" and kind == "int" and draw(st.booleans()),
        power_of_two=power_of_two,
        dynamic=dynamic,
        scale_bits=draw(st.integers(1, 8)) if second else None,
        scale_group=draw(st.integers(1, 512)) if second else None,
    )


@settings(deadline=None)
@given(specs())
def test_a_spec_reads_back_from_its_own_text(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec
    assert str(QuantSpec.parse(str(spec))) == str(spec)


@settings(deadline=None)
@given(specs(), st.sampled_from(["float16", "bfloat16", "float32"]), st.sampled_from([(0.9,), WEIGHT_PERCENTILES]))
def test_a_spec_reads_back_from_its_plain_data(spec: QuantSpec, dtype: str, percentiles: tuple[float, ...]) -> None:
    spec = spec.model_copy(update={"scale_dtype": dtype, "percentiles": percentiles})
    assert QuantSpec(**spec.model_dump()) == spec
    assert QuantSpec(**spec.model_dump(mode="json")) == spec
    assert QuantSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("int4", {"kind": "int", "bits": 4, "granularity": "channel", "symmetry": "sym"}),
        (" INT3:G128 ", {"bits": 3, "granularity": "group", "group_size": 128, "group_along": "inputs"}),
        ("int4:g64:ic:asym", {"group_size": 64, "group_along": "outputs", "symmetry": "asym"}),
        ("int8:token", {"granularity": "token", "dynamic": True}),
        ("int8:tensor:dynamic", {"granularity": "tensor", "dynamic": True}),
        ("log2-4", {"kind": "log2", "bits": 4}),
        ("logsqrt2-3:tensor", {"kind": "logsqrt2", "bits": 3, "granularity": "tensor"}),
        ("twin6:tensor", {"kind": "twin", "bits": 6}),
        ("int4:asym:tight:clampzero", {"include_zero": False, "zero_point": "clamped"}),
        ("int4:asym:tight:realzero", {"include_zero": False, "zero_point": "real"}),
        ("int4:narrow:pow2:mse", {"narrow": True, "power_of_two": True, "search": "mse"}),
        ("int4:dual:percentile", {"dual": True, "search": "percentile"}),
        ("int4:asym:sym", {"symmetry": "sym"}),
        ("nf4:g64:s8.256", {"kind": "nf", "bits": 4, "group_size": 64, "scale_bits": 8, "scale_group": 256}),
        ("fp4", {"kind": "fp", "bits": 4, "granularity": "channel"}),
        ("nuq3:g128:dual", {"kind": "nuq", "bits": 3, "group_size": 128, "dual": True}),
        ("mxint4:g32", {"kind": "mxint", "bits": 4, "group_size": 32}),
        ("int3:g16:asym:tight:realzero:s3.16", {"scale_bits": 3, "scale_group": 16, "zero_point": "real"}),
    ],
)
def test_each_token_sets_its_field(text: str, fields: dict[str, Any]) -> None:
    spec = QuantSpec.parse(text)
    assert {name: getattr(spec, name) for name in fields} == fields


def test_what_a_text_leaves_out_comes_from_the_base() -> None:
    base = QuantSpec.parse("int4:g128:asym:mse:tight").model_copy(update={"scale_dtype": "float32"})
    spec = QuantSpec.parse("int3", base=base)
    assert spec == base.model_copy(update={"bits": 3})
    opposite = "int3:channel:oc:sym:zeroin:intzero:minmax:full:single:anyscale:static"
    assert QuantSpec.parse(opposite, base=base) == QuantSpec(bits=3, scale_dtype="float32")
    assert QuantSpec.parse("log2-2:tensor", base=base).kind == "log2"


@pytest.mark.parametrize("text", ["nf4", "fp4", "nuq3", "mxint4"])
def test_formats_that_are_not_uniform_take_only_the_granularity_of_a_base(text: str) -> None:
    base = QuantSpec.parse("int4:g128:asym:mse:tight:realzero:s3.16")
    assert QuantSpec.parse(text, base=base) == QuantSpec.parse(f"{text}:g128")
    assert QuantSpec.parse(text, base=QuantSpec.parse("int4:narrow:percentile")) == QuantSpec.parse(text)


def test_every_token_has_an_opposite_that_undoes_it() -> None:
    pairs = ["asym:sym", "unsigned:sym", "tight:zeroin", "clampzero:intzero", "realzero:intzero", "mse:minmax"]
    pairs += [
        "percentile:minmax",
        "narrow:full",
        "dual:single",
        "pow2:anyscale",
        "dynamic:static",
        "ic:oc",
        "g8:channel",
        "s3.16:exactscale",
    ]
    for pair in pairs:
        assert QuantSpec.parse(f"int4:{pair}") == QuantSpec.parse("int4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4:chanel", "unknown token 'chanel'; did you mean 'channel'"),
        ("int4:gl28", "unknown token 'gl28'; did you mean 'g128'"),
        ("int4:persentile", "did you mean 'percentile'"),
        ("int4:assym", "did you mean 'asym'"),
        ("it4", "got 'it4'; did you mean 'int4'"),
        ("log2", "did you mean 'log2-4'"),
        ("", "expected intB, log2-B, logsqrt2-B, twinB, nf4, fp4, nuqB, mxintB or mixB, got ''"),
        ("int4:", "unknown token ''"),
        ("int9", "bits must be 1 to 8, got 9; try int4"),
        ("log2-0", "bits must be 1 to 8, got 0; try log2-4"),
        ("int4:g0", "group_size"),
        ("twin1", "twin"),
        ("int4:token:static", "measured per call"),
        ("int4:g64:dual", "intB:channel:dual"),
        ("log2-4:dual", "intB:channel:dual"),
        ("int4:asym:narrow", "narrow leaves out the lowest code of a symmetric grid"),
        ("int1:narrow", "2 bits or more"),
        ("nf3", "only nf4 and fp4 are defined"),
        ("mxint1", "2 bits or more"),
        ("nf4:asym", "symmetry has no meaning for nf4"),
        ("mxint4:s3.16", "scale_bits has no meaning for mxint4"),
        ("nuq4:pow2", "power_of_two has no meaning for nuq4"),
        ("nf4:token", "a format of weights"),
        ("nuq2:tensor:dual", "two classes of columns"),
        ("nf4:mse", "nf4 takes the largest magnitude"),
        ("int4:pow2:s3.16", "only free scales"),
        ("log2-4:s3.16", "only free scales"),
        ("int4:s3", "unknown token 's3'; did you mean 's3.16'"),
        ("nf5:g64", "only nf4"),
        ("nuk4", "did you mean 'nuq4'"),
    ],
)
def test_a_text_outside_the_grammar_is_refused_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        QuantSpec.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"bits": 0}, {"bits": 9}, {"granularity": "group"}, {"group_size": 8}, {"width": 4}, {"percentiles": (0.2,)}],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantSpec(**fields)


def test_a_spec_cannot_be_changed_and_equal_specs_are_one_key() -> None:
    spec = QuantSpec.parse("int4:g64")
    with pytest.raises(ValidationError):
        spec.bits = 3
    assert len({spec, QuantSpec.parse("int4:g64")}) == 1


class Config(BaseModel):
    weights: Annotated[QuantSpec | None, spec_field("int4:asym:percentile")] = None


def test_a_methods_field_reads_texts_data_and_none() -> None:
    assert Config(weights="int3").weights == QuantSpec.parse("int3:asym:percentile")  # type: ignore[arg-type]
    assert Config(weights={"bits": 3}).weights == QuantSpec(bits=3)  # type: ignore[arg-type]
    assert Config(weights="none").weights is None  # type: ignore[arg-type]
    assert Config(weights="fp").weights is None  # type: ignore[arg-type]
    spec = QuantSpec.parse("int2")
    assert read_spec(spec, "int4") is spec
    assert Config(weights=Config(weights=spec).model_dump()["weights"]).weights == spec
    with pytest.raises(ValidationError, match="did you mean 'asym'"):
        Config(weights="int4:asm")  # type: ignore[arg-type]


def test_only_asymmetric_integers_store_zero_points() -> None:
    stores = {
        text: QuantSpec.parse(text).stores_zero_point for text in ("int4", "int4:asym", "int4:unsigned", "log2-4:asym")
    }
    assert stores == {"int4": False, "int4:asym": True, "int4:unsigned": False, "log2-4:asym": False}
    assert [QuantSpec(bits=bits).levels for bits in (1, 3, 8)] == [2, 8, 256]


def test_a_text_that_replaces_token_granularity_is_static_unless_it_says_dynamic() -> None:
    token = QuantSpec.parse("int8:token")
    assert not QuantSpec.parse("int8:tensor", token).dynamic
    assert QuantSpec.parse("int8:tensor:dynamic", token).dynamic
