"""Picture sets: a folder, a packed `.npz` or a `.csv` list, opened at once and decoded one batch at a time.

A folder    holds pictures (no labels), or one subfolder per class (labels are the subfolders' names).
An `.npz`   holds `jpeg` (all files joined, uint8), `offsets` (file i is `jpeg[offsets[i]:offsets[i+1]]`) and,
            if known, `labels` (class ids).
A `.csv`    has the columns `path` (relative to the csv's folder) and, if known, `label` (class ids or names).
"""

import csv
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dither.data.processing import ImageProcessor, pixel_values
from dither.errors import InputError, PathError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
NAMED = 3  # how many examples an error message lists
WIDE_MODES = ("I", "F")  # Pillow clips these to white when it converts them to RGB

Labels = tuple[int | str, ...]


@dataclass(frozen=True)
class FilePicture:
    """A picture that lies in a file of its own; `name` is its path below the set's folder."""

    path: Path
    name: str

    def read(self) -> bytes:
        """The file's bytes, not decoded."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise PathError(f"expected a readable picture at {self.name!r}, got: {error.strerror or error}") from error


@dataclass(frozen=True, eq=False)
class PackedPicture:
    """A picture that is a span of a longer array of bytes, which all pictures of its set share."""

    packed: NDArray[np.uint8]
    start: int
    stop: int
    name: str

    def read(self) -> bytes:
        """The picture's own bytes, not decoded."""
        return self.packed[self.start : self.stop].tobytes()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Pictures in a fixed order with their labels, if any; nothing is decoded before it is asked for.

    `source` is the last part of the path that was opened, so that a report tells no one's folders.
    """

    pictures: tuple[FilePicture | PackedPicture, ...]
    labels: Labels | None
    source: str

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> Image.Image:
        """Picture `index` as RGB, turned upright as its EXIF entry says."""
        picture = self.pictures[index]
        try:
            with Image.open(io.BytesIO(picture.read())) as opened:
                if opened.mode.startswith(WIDE_MODES):
                    raise InputError(
                        f"expected 8 bits per channel, got mode {opened.mode} in picture {index} ({picture.name!r}) "
                        f"of {self.source!r}; convert it to 8 bits"
                    )
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (PathError, InputError):
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
            raise InputError(
                f"expected a readable picture, got damaged data in picture {index} ({picture.name!r}) "
                f"of {self.source!r}; replace or remove it"
            ) from error

    def sample(self, count: int, seed: int) -> "ImageSet":
        """`count` pictures drawn without replacement, in drawn order: a larger draw begins with the smaller one."""
        self._check_count(count)
        generator = torch.Generator().manual_seed(seed)
        return self._pick(torch.randperm(len(self), generator=generator)[:count].tolist())

    def first(self, count: int) -> "ImageSet":
        """The first `count` pictures; of a folder sorted by class these are of few classes, then prefer `sample`."""
        self._check_count(count)
        return self._pick(range(count))

    def sha256(self) -> str:
        """The digest of all files' bytes in order, read one at a time."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(picture.read())
        return digest.hexdigest()

    def digests(self) -> frozenset[str]:
        """The digest of each file's bytes, to find pictures that two sets share."""
        return frozenset(hashlib.sha256(picture.read()).hexdigest() for picture in self.pictures)

    def pixel_batches(
        self, processor: ImageProcessor, batch_size: int, *, expect_channels: int = 3
    ) -> Iterator[Float[Tensor, "_ c h w"]]:
        """What the model takes, `batch_size` pictures at a time; the last batch may be smaller."""
        if batch_size < 1:
            raise InputError(f"expected batch_size of at least 1, got {batch_size}")
        return self._pixel_batches(processor, batch_size, expect_channels)

    def _pixel_batches(
        self, processor: ImageProcessor, batch_size: int, channels: int
    ) -> Iterator[Float[Tensor, "_ c h w"]]:
        for start in range(0, len(self), batch_size):
            images = [self.image(index) for index in range(start, min(start + batch_size, len(self)))]
            yield pixel_values(processor, images, channels)

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= len(self):
            raise InputError(f"expected a count between 1 and the {len(self)} pictures of {self.source!r}, got {count}")

    def _pick(self, indices: Sequence[int]) -> "ImageSet":
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        return replace(self, pictures=tuple(self.pictures[i] for i in indices), labels=labels)


def open_images(path: str | Path) -> ImageSet:
    """Open the picture set at `path`: a folder, an `.npz` or a `.csv` (see this module's first lines)."""
    path = Path(path)
    if not path.exists():
        raise PathError(f"expected a folder of pictures, an .npz or a .csv, got {str(path)!r}, which does not exist")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".npz":
        return _open_npz(path)
    if path.suffix.lower() == ".csv":
        return _open_csv(path)
    raise InputError(f"expected a folder of pictures, an .npz or a .csv, got the file {path.name!r}")


def _open_folder(folder: Path) -> ImageSet:
    source = folder.resolve().name
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    of_class = {entry.name: _pictures_below(folder, entry, deep=True) for entry in classes}
    flat = _pictures_below(folder, folder, deep=False)
    labelled = [(picture, name) for name, pictures in of_class.items() for picture in pictures]
    if flat and labelled:
        raise InputError(
            f"expected pictures in {source!r} or in its subfolders, got both "
            f"({flat[0].name!r}, {labelled[0][0].name!r}); move one kind away"
        )
    if not flat and not labelled:
        raise InputError(f"expected pictures ({', '.join(SUFFIXES)}) in {source!r} or its subfolders, got none")
    if flat:
        return ImageSet(tuple(flat), None, source)
    return ImageSet(tuple(picture for picture, _ in labelled), tuple(name for _, name in labelled), source)


def _pictures_below(root: Path, folder: Path, *, deep: bool) -> list[FilePicture]:
    """Pictures of `folder` (and of all folders below it if `deep`), hidden files left out, sorted by path."""
    paths = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".") and _is_picture(name)]
    return [FilePicture(path, path.relative_to(root).as_posix()) for path in sorted(paths)]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _open_npz(path: Path) -> ImageSet:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("jpeg", "offsets", "labels") if key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # all that numpy raises
        raise InputError(f"expected an .npz of plain arrays, got {path.name!r}, which cannot be read") from error
    missing = [key for key in ("jpeg", "offsets") if key not in arrays]
    if missing:
        raise InputError(f"expected the arrays jpeg and offsets in {path.name!r}, got no {' and no '.join(missing)}")
    jpeg, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays.get("labels")
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
        raise InputError(f"expected jpeg in {path.name!r} as one axis of uint8, got {jpeg.dtype} {jpeg.shape}")
    if not np.issubdtype(offsets.dtype, np.integer) or offsets.ndim != 1 or len(offsets) < 2:
        raise InputError(
            f"expected offsets in {path.name!r} as at least two integers, got {offsets.dtype} {offsets.shape}"
        )
    bounds: list[int] = offsets.tolist()
    if bounds[0] < 0 or bounds[-1] > len(jpeg) or any(a >= b for a, b in pairwise(bounds)):
        raise InputError(f"expected offsets in {path.name!r} that increase within 0..{len(jpeg)} (the length of jpeg)")
    pictures = tuple(PackedPicture(jpeg, bounds[i], bounds[i + 1], f"{path.name}[{i}]") for i in range(len(bounds) - 1))
    if labels is None:
        return ImageSet(pictures, None, path.name)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(pictures),):
        raise InputError(
            f"expected labels in {path.name!r} as {len(pictures)} integers, got {labels.dtype} {labels.shape}"
        )
    return ImageSet(pictures, tuple(labels.tolist()), path.name)


def _open_csv(path: Path) -> ImageSet:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except OSError as error:
        raise PathError(f"expected a readable .csv, got {path.name!r}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"expected a .csv in UTF-8, got {path.name!r}, which cannot be read: {error}") from error
    if "path" not in columns:
        raise InputError(f"expected the columns path and label in {path.name!r}, got {', '.join(columns) or 'none'}")
    if not rows:
        raise InputError(f"expected at least one picture in {path.name!r}, got only the header")
    pictures = []
    for number, row in enumerate(rows, start=1):
        picture = FilePicture(path.parent / (row["path"] or ""), row["path"] or "")
        if not picture.path.is_file():
            raise PathError(
                f"expected a picture at {picture.name!r} beside {path.name!r} (row {number}), got no such file"
            )
        pictures.append(picture)
    return ImageSet(tuple(pictures), _csv_labels(path, rows) if "label" in columns else None, path.name)


def _csv_labels(path: Path, rows: Sequence[Mapping[str, str | None]]) -> Labels:
    texts = []
    for number, row in enumerate(rows, start=1):
        text = (row["label"] or "").strip()
        if not text:
            raise InputError(f"expected a label in every row of {path.name!r}, got none in row {number}")
        texts.append(text)
    if all(text.isascii() and text.isdigit() for text in texts):
        return tuple(int(text) for text in texts)
    return tuple(texts)


def class_ids(labels: Labels, label2id: Mapping[str, int]) -> tuple[int, ...]:
    """A model's class ids: integers as they are, names by `label2id`, whatever their case, `_` as a blank."""
    known: dict[str, set[int]] = {}
    for name, number in label2id.items():
        known.setdefault(_folded(name), set()).add(number)
    names = sorted({label for label in labels if isinstance(label, str)})
    unmatched = [name for name in names if len(known.get(_folded(name), ())) != 1]
    if unmatched:
        shown = ", ".join(repr(name) for name in unmatched[:NAMED])
        raise InputError(
            f"expected labels that name one class of the model each, got {len(unmatched)} that do not: {shown}; "
            f"the model's classes are {', '.join(repr(name) for name in list(label2id)[:NAMED])}, …; "
            "rename the folders, or give a .csv with class ids"
        )
    return tuple(min(known[_folded(label)]) if isinstance(label, str) else label for label in labels)


def _folded(name: str) -> str:
    return name.casefold().replace("_", " ").strip()
