"""Exam: the full-precision network's answers, kept while the network itself becomes a quantized one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from dither.data import DataSet, ImageProcessor, ImageSet, TextSet, class_ids, open_data
from dither.errors import InputError
from dither.evaluation.classification import Evaluation, evaluate_classifier, predict
from dither.evaluation.fidelity import top1
from dither.evaluation.language import Answers, answer, evaluate_language
from dither.models.network import Network
from dither.nn.linear import cache_weights

Progress = Callable[[int], None]  # pictures or windows done
BATCH = 64  # pictures at a time
LENGTH = 1024  # tokens of a window


@runtime_checkable
class Exam(Protocol):
    """Questions, and what a reference network answered to them."""

    @property
    def count(self) -> int:
        """Pictures or windows of text."""
        ...

    @property
    def source(self) -> str:
        """Where they are from."""
        ...

    def facts(self) -> dict[str, float | None]:
        """The reference's own quality, under the names of an `Evaluation`."""
        ...

    def mark(self, network: Network, progress: Progress | None = None) -> Evaluation:
        """How a network answers, compared with the reference if there is one."""
        ...


@dataclass(frozen=True)
class PictureExam:
    """Pictures for a classifier."""

    pictures: ImageSet
    class_ids: tuple[int, ...] | None
    reference: Float[Tensor, "n classes"] | None = None
    batch_size: int = BATCH

    @property
    def count(self) -> int:
        """Pictures."""
        return len(self.pictures)

    @property
    def source(self) -> str:
        """Where they are from."""
        return self.pictures.source

    def facts(self) -> dict[str, float | None]:
        """Top-1 of the reference."""
        known = self.reference is not None and self.class_ids is not None
        return {"top1": top1(self.reference, self.class_ids) if known else None}  # type: ignore[arg-type]

    def mark(self, network: Network, progress: Progress | None = None) -> Evaluation:
        """Top-1 and fidelity."""
        with _dense(network):
            return evaluate_classifier(
                network.model,
                self._batches(network),
                reference=self.reference,
                class_ids=self.class_ids,
                device=network.device,
                source=self.source,
                progress=progress,
            )

    def answered_by(self, network: Network, progress: Progress | None = None) -> "PictureExam":
        """The same pictures with a network's logits as the reference."""
        logits = predict(network.model, self._batches(network), network.device, progress)
        return PictureExam(self.pictures, self.class_ids, logits, self.batch_size)

    def _batches(self, network: Network) -> Iterator[Float[Tensor, "_ c h w"]]:
        processor = need_processor(network)
        return self.pictures.pixel_batches(processor, self.batch_size, expect_channels=network.channels)


@dataclass(frozen=True)
class TextExam:
    """Windows of text for a causal language model."""

    windows: Int[Tensor, "n t"]
    text: str
    reference: Answers | None = None

    @property
    def count(self) -> int:
        """Windows."""
        return len(self.windows)

    @property
    def source(self) -> str:
        """Where they are from."""
        return self.text

    def facts(self) -> dict[str, float | None]:
        """Perplexity of the reference."""
        return {"perplexity": None if self.reference is None else self.reference.perplexity}

    def mark(self, network: Network, progress: Progress | None = None) -> Evaluation:
        """Perplexity and fidelity."""
        at = None if self.reference is None else self.reference.tokens
        with _dense(network):
            answers = answer(network.model, self.windows, at, progress)
        return evaluate_language(answers, self.reference, self.count, self.text)

    def answered_by(self, network: Network, progress: Progress | None = None) -> "TextExam":
        """The same windows with a network's answers as the reference."""
        return TextExam(self.windows, self.text, answer(network.model, self.windows, None, progress))


@contextmanager
def _dense(network: Network) -> Iterator[None]:
    """Packed weights keep their dequantized copies while an exam lasts."""
    cache_weights(network.model)
    try:
        yield
    finally:
        cache_weights(network.model, cached=False)


def open_exam(
    network: Network,
    data: str | Path | DataSet,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    length: int | None = None,
) -> PictureExam | TextExam:
    """The questions for a network: `count` pictures drawn by `seed`, or the first `count` windows of `length` tokens.

    Raises:
        PathError, InputError: the data cannot be read, or do not fit the network.
    """
    data = data if isinstance(data, ImageSet | TextSet) else open_data(data)
    if isinstance(data, TextSet):
        wanted = min(LENGTH, network.context) if length is None else length
        if wanted > network.context:
            raise InputError(f"windows of {wanted} tokens: {network.name} reads at most {network.context}")
        return TextExam(data.windows(need_tokenizer(network), wanted, count), data.source)
    pictures = data if count is None else data.sample(count, seed)
    need_processor(network)
    return PictureExam(pictures, ids(network, pictures), None, batch_size)


def refuse_overlap(calibration: DataSet, data: DataSet) -> None:
    """Evaluating on what a method was calibrated on flatters it.

    Raises:
        InputError: a picture, or a long line of text, is in both sets.
    """
    shared = calibration.digests() & data.digests()
    if shared:
        what = "pictures" if isinstance(data, ImageSet) else "lines of text"
        raise InputError(
            f"{len(shared)} {what} are in both calibration {calibration.source!r} and evaluation "
            f"{data.source!r}; give two sets that do not overlap"
        )


def ids(network: Network, pictures: ImageSet) -> tuple[int, ...] | None:
    """The model's class number of each picture, or None where the pictures have no labels."""
    return None if pictures.labels is None else tuple(class_ids(pictures.labels, network.label2id))


def need_processor(network: Network) -> ImageProcessor:
    """The network's image processor.

    Raises:
        InputError: it has none.
    """
    if network.processor is None:
        raise InputError(f"{network.name} has no image processor (preprocessor_config.json); add one to its folder")
    return network.processor


def need_tokenizer(network: Network) -> Any:
    """The network's tokenizer.

    Raises:
        InputError: it has none.
    """
    if network.tokenizer is None:
        raise InputError(f"{network.name} has no tokenizer (tokenizer.json); text needs one in the model's folder")
    return network.tokenizer
