"""What a search is calibrated on, judged by and, at the end, tested with: three sets without anything in common."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dither.data import DataSet, ImageSet, TextSet, open_data
from dither.data.calibration import LENGTH
from dither.data.split import split_pictures, split_text
from dither.errors import InputError
from dither.evaluation.exam import need_tokenizer, refuse_overlap
from dither.models.network import Network
from dither.quantune.choices import PICTURES, SEQUENCES
from dither.storage import write_text, writing
from dither.tuning.space import Value

TEXT = "calibration.txt"


@dataclass
class TuningData:
    """The sets. `place` is where the calibration set can be opened from, if that is known."""

    calibration: DataSet
    data: DataSet
    test: DataSet | None
    place: str | None
    notes: list[str] = field(default_factory=list)
    most: int | None = None  # pictures that a draw may hold, where calibration and data are parts of one set
    part: str | None = None  # of a text that was split, what calibrates

    def check_count(self, count: int | None) -> None:
        """Refuse to judge by more pictures than there are.

        Raises:
            InputError: there are fewer; the message says where they come from.
        """
        there = len(self.data) if isinstance(self.data, ImageSet) else None
        if count is None or there is None or 1 <= count <= there:
            return
        split = f", as the {self.most} others calibrate; give --data to judge by" if self.most else ""
        raise InputError(f"--count {count}: trials are judged by {there} pictures of {self.data.source!r}{split}")

    def keep(self, folder: Path) -> None:
        """Write the part of a split text that calibrates, which `place` names."""
        if self.part is None:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self.part, folder / TEXT)

    def samples(self, wanted: Sequence[Value] | None, network: Network, length: int | None) -> list[int]:
        """How many pictures or sequences trials may calibrate on: as `wanted`, or the usual numbers that there are.

        Raises:
            InputError: a number that there are not.
        """
        if isinstance(self.calibration, TextSet):
            tokens = len(self.calibration.tokens(need_tokenizer(network)))
            there = tokens // (min(LENGTH, network.context) if length is None else length)
            usual: tuple[int, ...] = SEQUENCES
        else:
            there, usual = self.most or len(self.calibration), PICTURES
        if wanted is None:
            return [number for number in usual if number <= there] or [there]
        numbers = [number for number in wanted if isinstance(number, int)]
        if len(numbers) < len(wanted) or min(numbers, default=0) < 1 or max(numbers) > there:
            raise InputError(
                f"samples: expected whole numbers from 1 to {there}, which {self.calibration.source!r} holds; "
                f"got {', '.join(map(str, wanted))}"
            )
        return numbers

    def digests(self) -> dict[str, str]:
        """What tells these sets from others."""
        return {"calibration data": self.calibration.sha256(), "data to judge by": self.data.sha256()}


def open_tuning_data(
    calibration: str | Path | DataSet, data: str | Path | DataSet | None, test: str | Path | DataSet | None,
    samples: Sequence[Value] | None, seed: int, folder: Path, count: int | None = None,
) -> TuningData:  # fmt: skip
    """Open the sets. One set for calibration and data is split, which the notes say; `keep` writes a text's part.

    Raises:
        PathError, InputError: a set cannot be read, holds no `count` to judge by, or has something in another.
    """
    source = _open(calibration)
    exam = None if test is None else _open(test)
    place = str(calibration) if isinstance(calibration, str | Path) else None
    if data is None or _same(calibration, data):
        sets = _split(source, samples, seed, place, folder)
    else:
        sets = TuningData(source, _open(data), None, place)
        refuse_overlap(source, sets.data)
    sets.check_count(count)
    if exam is not None:
        refuse_overlap(source, exam)
        if sets.data.digests() & exam.digests():
            raise InputError(
                f"{sets.data.source!r}, which trials are judged by, and test {exam.source!r} overlap; "
                "a test counts only on data that chose nothing"
            )
    sets.test = exam
    if exam is None:
        sets.notes.append(
            "the best was chosen by the figures that are shown of it, which flatters it; test it on other data"
        )
    return sets


def _split(source: DataSet, samples: Sequence[Value] | None, seed: int, place: str | None, folder: Path) -> TuningData:
    if isinstance(source, TextSet):
        first, last = split_text(source)
        note = f"{source.source!r} was split: its last fifth judges trials, the rest calibrates ({TEXT})"
        return TuningData(first, last, None, str(folder / TEXT), [note], part=first.documents[0])
    known = [number for number in samples or PICTURES if isinstance(number, int)]
    half = max(1, len(source) // 2)
    most = max((n for n in known if samples is not None or n <= half), default=half)
    rest = split_pictures(source, most, seed)
    note = f"{source.source!r} was split: {most} pictures to calibrate on, {len(rest)} others that judge trials"
    return TuningData(source, rest, None, place, [note], most)


def _open(data: str | Path | DataSet) -> DataSet:
    return open_data(data) if isinstance(data, str | Path) else data


def _same(one: str | Path | DataSet, other: str | Path | DataSet) -> bool:
    if isinstance(one, str | Path) and isinstance(other, str | Path):
        return Path(one).resolve() == Path(other).resolve()
    return one is other
