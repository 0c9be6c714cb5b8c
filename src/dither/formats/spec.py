"""QuantSpec: what a tensor is stored as, with the short text form used by the command line, recipes and reports.

Grammar: KIND[:TOKEN]…, for example `int4`, `int3:g128`, `int4:g128:asym`, `int8:token`, `log2-4`, `twin4`, `nf4:g64`

    KIND      int1 … int8 | log2-B | logsqrt2-B | twinB             B bits a code
              nf4 | fp4                                             16 fixed levels times an absolute maximum (QLoRA)
              nuq1 … nuq8                                           levels of their own for each cell (SqueezeLLM)
              mxint2 … mxint8                                       integers that share an 8-bit exponent
              mix1 … mix8                                           columns of different widths, so many bits on average
    TOKEN     tensor | channel | token | gN                         one scale for what
              oc | ic                                               groups run along the inputs (oc) or the outputs (ic)
              sym | asym | unsigned                                 where the range lies
              zeroin | tight                                        range forced through 0, or the true extremes
              intzero | clampzero | realzero                        zero-point: integer, integer within the codes, real
              minmax | percentile | mse                             how the range is searched
              full | narrow                                         symmetric codes use all levels, or not the lowest
              single | dual                                         one grid a cell, or two (columns of two classes)
              sB.G | exactscale                                     scales and real zero-points in B bits themselves, by
                                                                    G consecutive rows of a column group (SpQR), or not
              anyscale | pow2                                       scales are free, or powers of two
              static | dynamic                                      activation ranges are calibrated, or of each call

Tokens that a text leaves out come from `base`, a method's own choice; `str(spec)` names whatever differs from the plain
default, except `percentiles` and `scale_dtype`, which have no token. The published min/max conventions are values of
these fields: GPTQ `zeroin:intzero`, AWQ `tight:clampzero`, SpQR and HQQ `tight:realzero`.
"""

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from dither.errors import SpecError, nearest

_KIND = re.compile(r"(int|log2-|logsqrt2-|twin|nf|fp|nuq|mxint|mix)(\d+)")
_GROUP = re.compile(r"g(\d+)")
_SECOND = re.compile(r"s(\d+)\.(\d+)")
_WORDS: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "tensor", "group_size": None},
    "channel": {"granularity": "channel", "group_size": None},
    "token": {"granularity": "token", "group_size": None, "dynamic": True},
    "oc": {"group_along": "inputs"},
    "ic": {"group_along": "outputs"},
    "sym": {"symmetry": "sym"},
    "asym": {"symmetry": "asym"},
    "unsigned": {"symmetry": "unsigned"},
    "zeroin": {"include_zero": True},
    "tight": {"include_zero": False},
    "intzero": {"zero_point": "integer"},
    "clampzero": {"zero_point": "clamped"},
    "realzero": {"zero_point": "real"},
    "minmax": {"search": "minmax"},
    "percentile": {"search": "percentile"},
    "mse": {"search": "mse"},
    "full": {"narrow": False},
    "narrow": {"narrow": True},
    "single": {"dual": False},
    "dual": {"dual": True},
    "anyscale": {"power_of_two": False},
    "pow2": {"power_of_two": True},
    "exactscale": {"scale_bits": None, "scale_group": None},
    "static": {"dynamic": False},
    "dynamic": {"dynamic": True},
}
Kind = Literal["int", "log2", "logsqrt2", "twin", "nf", "fp", "nuq", "mxint", "mix"]
CODEBOOKS = ("nf", "fp", "nuq")  # kinds whose codes choose from a table of levels
_OWN = (*CODEBOOKS, "mxint", "mix")  # kinds that take nothing from a base of another kind
# what only uniform grids with a free scale have; a kind of another sort takes none of it from a base
_UNIFORM = ("symmetry", "include_zero", "zero_point", "narrow", "dual", "power_of_two", "scale_bits", "scale_group")
ACTIVATION_PERCENTILES = (0.999, 0.9999, 0.99999)  # RepQ-ViT released code
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)  # ERQ released code


class QuantSpec(BaseModel):
    """How a tensor is stored; frozen, compared by value, written and read as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = "int"
    bits: int = Field(default=8, ge=1, le=8)
    granularity: Literal["tensor", "channel", "token", "group"] = "channel"
    group_size: int | None = Field(default=None, ge=1)
    group_along: Literal["inputs", "outputs"] = "inputs"
    symmetry: Literal["sym", "asym", "unsigned"] = "sym"
    include_zero: bool = True
    zero_point: Literal["integer", "clamped", "real"] = "integer"
    search: Literal["minmax", "percentile", "mse"] = "minmax"
    percentiles: tuple[Annotated[float, Field(gt=0.5, le=1)], ...] = Field(default=ACTIVATION_PERCENTILES, min_length=1)
    narrow: bool = False
    dual: bool = False
    power_of_two: bool = False
    dynamic: bool = False
    scale_bits: int | None = Field(default=None, ge=1, le=8)
    scale_group: int | None = Field(default=None, ge=1)
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @model_validator(mode="after")
    def _consistent(self) -> "QuantSpec":
        if (self.granularity == "group") != (self.group_size is not None):
            raise SpecError(f"{self}: a group size goes with group granularity, as in int4:g128")
        if self.granularity == "token" and not self.dynamic:
            raise SpecError(f"{self}: one scale a token is measured per call; write token or dynamic")
        if self.dual and self.kind != "nuq" and (self.granularity != "channel" or self.kind != "int"):
            raise SpecError(f"{self}: dual grids are two grids a row; write intB:channel:dual")
        if self.narrow and (self.bits == 1 or self.symmetry != "sym"):
            raise SpecError(f"{self}: narrow leaves out the lowest code of a symmetric grid of 2 bits or more")
        if self.kind == "twin" and self.bits == 1:
            raise SpecError("twin1: twin grids spend one bit on the region and need 2 bits or more")
        if self.kind in _OWN:
            self._check_kind()
        self._check_second_level()
        return self

    def _check_kind(self) -> None:
        plain = QuantSpec.model_construct()
        if self.kind in ("nf", "fp") and self.bits != 4:
            raise SpecError(f"{self}: only nf4 and fp4 are defined, with 4 bits")
        if self.kind == "mxint" and self.bits == 1:
            raise SpecError("mxint1: a sign and a magnitude need 2 bits or more")
        second = ("scale_bits", "scale_group")
        free = {"nuq": ("dual",), "mxint": (), "mix": ("symmetry", "include_zero", "zero_point", *second)}
        allowed = free.get(self.kind, second)
        for name in _UNIFORM:
            if name not in allowed and getattr(self, name) != getattr(plain, name):
                raise SpecError(f"{self}: {name} has no meaning for {self._head()}")
        if self.kind in ("nf", "fp", "mxint") and self.search != "minmax":
            raise SpecError(f"{self}: {self._head()} takes the largest magnitude of a cell; write minmax")
        if self.kind == "mix" and self._unfit_for_columns():
            raise SpecError(f"{self}: columns of different widths are sym, or asym:realzero, and minmax or mse, not ic")
        if self.granularity == "token" or self.dynamic:
            raise SpecError(f"{self}: {self._head()} is a format of weights, with one scale a tensor, channel or group")
        if self.dual and (self.granularity == "tensor" or self.group_along == "outputs"):
            raise SpecError(f"{self}: two classes of columns go with a row or a group of inputs, as in nuq2:g128:dual")

    def _unfit_for_columns(self) -> bool:
        """A whole zero-point of one width is none of another; a percentile's errors are of one width."""
        shift = self.symmetry == "unsigned" or (self.symmetry == "asym") != (self.zero_point == "real")
        return shift or self.search == "percentile" or self.group_along == "outputs"

    def _check_second_level(self) -> None:
        if (self.scale_bits is None) != (self.scale_group is None):
            raise SpecError(f"{self}: scales of scales have bits and a group, as in s3.16")
        if self.scale_bits is None:
            return
        if self.kind not in ("int", "nf", "fp", "mix") or self.power_of_two or self.dynamic:
            raise SpecError(
                f"{self}: only free scales of stored weights can themselves be quantized (intB, mixB, nf4, fp4)"
            )

    @classmethod
    def parse(cls, text: str, base: "QuantSpec | None" = None) -> "QuantSpec":
        """Read a text; what it leaves out comes from `base` (else from the plain defaults).

        Raises:
            SpecError: the text does not follow the grammar; the message names the nearest token.
        """
        head, *tokens = text.strip().lower().split(":")
        matched = _KIND.fullmatch(head)
        if matched is None:
            kinds = [f"int{bits}" for bits in range(1, 9)] + ["log2-4", "logsqrt2-4", "twin4"]
            near = nearest(head, [*kinds, "nf4", "fp4", "nuq3", "nuq4", "mxint3", "mxint4", "mix3"])
            expected = "intB, log2-B, logsqrt2-B, twinB, nf4, fp4, nuqB, mxintB or mixB"
            raise SpecError(f"format {text!r}: expected {expected}, got {head!r}{near}")
        if not 1 <= int(matched[2]) <= 8:
            raise SpecError(f"format {text!r}: bits must be 1 to 8, got {matched[2]}; try {matched[1]}4")
        fields: dict[str, Any] = base.fields() if base is not None else {}
        fields |= {"kind": matched[1].rstrip("-"), "bits": int(matched[2])}
        if fields["kind"] in _OWN and (base is None or base.kind != "mix" or fields["kind"] != "mix"):
            fields = {name: value for name, value in fields.items() if name not in (*_UNIFORM, "search", "percentiles")}
        for token in tokens:
            fields |= _token(token, text)
        if base is not None and base.granularity == "token" and fields["granularity"] != "token":
            fields["dynamic"] = "dynamic" in tokens  # it came with the token granularity that the text replaces
        try:
            return cls(**fields)
        except ValidationError as error:
            raise SpecError(f"format {text!r}: {_first(error)}") from None

    def fields(self) -> dict[str, Any]:
        """All fields as plain data."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def __str__(self) -> str:
        plain, words = QuantSpec.model_construct(), [self._head(), self._granularity()]
        for name, word in (("group_along", "ic"), ("symmetry", self.symmetry), ("include_zero", "tight")):
            words += [word] if getattr(self, name) != getattr(plain, name) else []
        words += {"integer": [], "clamped": ["clampzero"], "real": ["realzero"]}[self.zero_point]
        words += [self.search] if self.search != "minmax" else []
        flags = {"narrow": self.narrow, "dual": self.dual, "pow2": self.power_of_two}
        words += [word for word, on in flags.items() if on]
        words += ["dynamic"] if self.dynamic and self.granularity != "token" else []
        words += [f"s{self.scale_bits}.{self.scale_group}"] if self.scale_bits is not None else []
        return ":".join(words)

    def _head(self) -> str:
        return f"{self.kind}-{self.bits}" if self.kind in ("log2", "logsqrt2") else f"{self.kind}{self.bits}"

    def _granularity(self) -> str:
        return f"g{self.group_size}" if self.granularity == "group" else self.granularity

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        """Every field that is not plain: unlike a text it means the same under any method's base."""
        plain, always = QuantSpec.model_construct(), ("kind", "bits", "granularity")
        kept = {k: v for k, v in self.fields().items() if k in always or v != getattr(plain, k)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def stores_zero_point(self) -> bool:
        """Whether zero-points take space; symmetric and unsigned grids imply theirs."""
        return self.kind in ("int", "mix") and self.symmetry == "asym"

    @property
    def for_activations(self) -> bool:
        """Whether numbers of each call can be held, not only stored weights."""
        return self.kind in ("int", "log2", "logsqrt2", "twin") and self.scale_bits is None

    @property
    def second_level(self) -> tuple[int, int] | None:
        """Bits and rows of a group of the scales' own grid; None where they are stored as numbers."""
        return None if self.scale_bits is None or self.scale_group is None else (self.scale_bits, self.scale_group)

    @property
    def is_codebook(self) -> bool:
        """Whether codes choose from a table of levels, instead of counting steps."""
        return self.kind in CODEBOOKS


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where} {detail['msg']}".strip().removeprefix("Value error, ")


def _token(token: str, text: str) -> dict[str, Any]:
    group = _GROUP.fullmatch(token)
    if group is not None:
        return {"granularity": "group", "group_size": int(group[1])}
    second = _SECOND.fullmatch(token)
    if second is not None:
        return {"scale_bits": int(second[1]), "scale_group": int(second[2])}
    if token not in _WORDS:
        near = nearest(token, [*_WORDS, "g64", "g128", "s3.16", "s8.256"])
        raise SpecError(f"format {text!r}: unknown token {token!r}{near}")
    return _WORDS[token]


def read_spec(value: Any, base: "str | QuantSpec") -> Any:
    """A text completed from `base`, or plain fields, as a QuantSpec; `none` and `fp` as None; others as they are."""
    if value in ("none", "fp"):
        return None
    if isinstance(value, str):
        return QuantSpec.parse(value, base=QuantSpec.parse(base) if isinstance(base, str) else base)
    return QuantSpec(**value) if isinstance(value, dict) else value


def spec_field(base: "str | QuantSpec") -> BeforeValidator:
    """Annotation of a method's field that is read by `read_spec`."""
    return BeforeValidator(partial(read_spec, base=base))
