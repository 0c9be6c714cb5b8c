"""Picture sets: every form opens lazily in a fixed order, and every mistake is named."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dither.data import ImageSet, class_ids, default_processor, open_images
from dither.errors import InputError, PathError


def encoded(color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def picture(path: Path, color: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(color, kind={".jpg": "JPEG"}.get(path.suffix, "PNG")))


def packed(path: Path, **changes: object) -> Path:
    files = [encoded((i, 0, 0)) for i in range(3)]
    arrays: dict[str, object] = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array([2, 0, 1], np.uint8),
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for name in ("dog/b.png", "dog/a.png", "cat/deep/c.jpg", "cat/.hidden.png", ".cache/d.png", "dog/notes.txt"):
        picture(tmp_path / "set" / name)
    return tmp_path / "set"


def test_a_folder_of_class_folders_is_sorted_by_path_and_labelled_by_folder(classes: Path) -> None:
    images = open_images(classes)
    assert [item.name for item in images.pictures] == ["cat/deep/c.jpg", "dog/a.png", "dog/b.png"]
    assert images.labels == ("cat", "dog", "dog")
    assert images.source == "set"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for suffix in (".png", ".PNG", ".jpg", ".jpeg", ".bmp", ".webp"):
        picture(tmp_path / f"x{suffix[1:]}{suffix}")
    (tmp_path / "empty").mkdir()
    images = open_images(str(tmp_path))
    assert len(images) == 6
    assert images.labels is None


def test_pictures_beside_class_folders_are_refused_because_their_class_is_unknown(classes: Path) -> None:
    picture(classes / "stray.png")
    with pytest.raises(InputError, match=r"got both \('stray.png', 'cat/deep/c.jpg'\)"):
        open_images(classes)


def test_an_npz_gives_each_span_as_a_picture(tmp_path: Path) -> None:
    images = open_images(packed(tmp_path / "set.npz"))
    assert images.labels == (2, 0, 1)
    assert [images.image(i).getpixel((0, 0)) for i in range(3)] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert images.source == "set.npz"


def test_an_npz_without_labels_has_none(tmp_path: Path) -> None:
    assert open_images(packed(tmp_path / "set.npz", labels=None)).labels is None


def test_a_csv_names_files_beside_it_with_class_ids_or_names(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "ids.csv").write_text("path,label,note\nin/a.png,3,x\nb.png,1,y\n", encoding="utf-8-sig")
    (tmp_path / "names.csv").write_text("label,path\ncat,in/a.png\n7,b.png\n")
    (tmp_path / "bare.csv").write_text("path\nb.png\n")
    assert open_images(tmp_path / "ids.csv").labels == (3, 1)
    assert open_images(tmp_path / "names.csv").labels == ("cat", "7")
    assert open_images(tmp_path / "bare.csv").labels is None
    assert open_images(tmp_path / "ids.csv").image(0).size == (6, 4)


def test_every_mode_is_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGBA"):
        Image.new(mode, (3, 2)).save(tmp_path / f"{mode}.png")
    images = open_images(tmp_path)
    assert {images.image(i).mode for i in range(len(images))} == {"RGB"}


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the EXIF orientation "rotate by 90 degrees"
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert open_images(tmp_path).image(0).size == (4, 6)


def test_a_picture_of_16_bits_is_refused_instead_of_clipped_to_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"expected 8 bits per channel.*'a.png'"):
        open_images(tmp_path).image(0)


def test_a_sample_is_the_same_for_a_seed_differs_between_seeds_and_never_repeats(tmp_path: Path) -> None:
    many = packed(
        tmp_path / "many.npz",
        jpeg=np.zeros(50, np.uint8),
        offsets=np.arange(51),
        labels=np.arange(50),
    )
    images = open_images(many)
    assert images.sample(50, seed=1).labels == images.sample(50, seed=1).labels
    assert images.sample(50, seed=1).labels != images.sample(50, seed=2).labels
    assert sorted(map(int, images.sample(50, seed=3).labels or ())) == list(range(50))
    assert (images.sample(20, seed=3).labels or ())[:5] == images.sample(5, seed=3).labels


def test_a_sample_leaves_the_global_generator_alone(classes: Path) -> None:
    before = torch.get_rng_state()
    open_images(classes).sample(2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_keeps_order_and_labels(tmp_path: Path) -> None:
    assert open_images(packed(tmp_path / "set.npz")).first(2).labels == (2, 0)


@pytest.mark.parametrize("take", [lambda images: images.sample(4, seed=0), lambda images: images.first(4)])
def test_more_pictures_than_there_are_is_an_error_with_both_numbers(
    tmp_path: Path, take: Callable[[ImageSet], ImageSet]
) -> None:
    images = open_images(packed(tmp_path / "set.npz"))
    with pytest.raises(InputError, match=r"between 1 and the 3 pictures of 'set.npz', got 4"):
        take(images)
    with pytest.raises(InputError, match="got 0"):
        images.first(0)


def test_the_digest_is_over_the_raw_bytes_in_order_whatever_holds_them(tmp_path: Path) -> None:
    images = open_images(packed(tmp_path / "set.npz"))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded((i, 0, 0)))
    wanted = hashlib.sha256(b"".join(encoded((i, 0, 0)) for i in range(3))).hexdigest()
    assert images.sha256() == wanted
    assert open_images(tmp_path).sha256() == wanted
    assert images.first(2).sha256() != wanted


def test_batches_cover_all_pictures_in_order_and_the_last_is_smaller(tmp_path: Path) -> None:
    images = open_images(packed(tmp_path / "set.npz"))
    batches = list(images.pixel_batches(default_processor(4, (0.0,) * 3, (1 / 255,) * 3), 2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 4, 4), (1, 3, 4, 4)]
    torch.testing.assert_close(torch.cat(batches)[:, 0, 0, 0], torch.arange(3.0), rtol=0, atol=1e-5)


def test_a_batch_size_below_one_is_refused_before_the_first_batch(classes: Path) -> None:
    with pytest.raises(InputError, match="batch_size of at least 1, got 0"):
        open_images(classes).pixel_batches(default_processor(4, (0.5,), (0.5,)), 0)


def test_a_model_of_other_channels_is_an_error(classes: Path) -> None:
    rgb = default_processor(4, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(InputError, match="with 1 channels, which the model takes, got 3"):
        next(open_images(classes).pixel_batches(rgb, 2, expect_channels=1))
    gray = default_processor(4, (0.5,), (0.5,))
    assert next(open_images(classes).pixel_batches(gray, 2, expect_channels=1)).shape == (2, 1, 4, 4)


def test_a_missing_path_is_a_path_error(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="which does not exist"):
        open_images(tmp_path / "nowhere")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.zip").touch()
    with pytest.raises(InputError, match=r"got the file 'set.zip'"):
        open_images(tmp_path / "set.zip")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"expected pictures .* got none"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", encoded()[:45], encoded(kind="JPEG")[:200]], ids=["empty", "text", "png", "jpeg"]
)
def test_a_damaged_picture_is_named_with_its_index(classes: Path, content: bytes) -> None:
    (classes / "dog" / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged data in picture 1 \('dog/a.png'\)"):
        open_images(classes).image(1)


def test_a_picture_that_vanished_after_opening_is_a_path_error(classes: Path) -> None:
    images = open_images(classes)
    (classes / "dog" / "a.png").unlink()
    with pytest.raises(PathError, match=r"dog/a.png"):
        images.image(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpeg": None}, "got no jpeg"),
        ({"jpeg": None, "offsets": None}, "got no jpeg and no offsets"),
        ({"jpeg": np.zeros((2, 2), np.uint8)}, "one axis of uint8"),
        ({"offsets": np.array([0.0, 1.0])}, "at least two integers"),
        ({"offsets": np.array([0])}, "at least two integers"),
        ({"offsets": np.array([0, 5, 5, 9])}, "that increase"),
        ({"offsets": np.array([-1, 5, 7, 9])}, "that increase"),
        ({"offsets": np.array([0, 5, 7, 10**9])}, "that increase"),
        ({"labels": np.array([0, 1])}, r"as 3 integers, got int64 \(2,\)"),
        ({"labels": np.array([0.5, 1, 2])}, "as 3 integers, got float64"),
        ({"labels": np.array([{}, {}, {}])}, "plain arrays"),  # an object array would need pickle
    ],
)
def test_an_npz_that_is_not_a_picture_set_says_why(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_images(packed(tmp_path / "set.npz", **changes))


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"PK\x03\x04 cut short", one_array()], ids=["empty", "junk", "cut", "npy"]
)
def test_a_damaged_npz_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        open_images(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", InputError, "got none"),
        ("file,label\na.png,1\n", InputError, "got file, label"),
        ("path,label\n", InputError, "only the header"),
        ("path,label\na.png,\n", InputError, "got none in row 1"),
        ("path,label\na.png\n", InputError, "got none in row 1"),
        ("path,label\na.png,1\nb.png,2\n", PathError, r"'b.png' beside 'set.csv' \(row 2\)"),
        ("path,label\n,1\n", PathError, "row 1"),
    ],
)
def test_a_csv_that_is_not_a_picture_set_says_why(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(error, match=message):
        open_images(tmp_path / "set.csv")


def test_a_csv_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_bytes("path,label\nä.png,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"expected a \.csv in UTF-8"):
        open_images(tmp_path / "set.csv")


def test_class_names_match_whatever_their_case_and_integers_pass() -> None:
    label2id = {"tabby cat": 4, "Dog": 2}
    assert class_ids(("dog", "Tabby_Cat", "DOG"), label2id) == (2, 4, 2)
    assert class_ids((7, 0), label2id) == (7, 0)


def test_unmatched_class_names_are_counted_and_a_few_are_named() -> None:
    with pytest.raises(InputError, match=r"got 5 that do not: 'n00', 'n01', 'n02'; the model's classes are 'dog', …"):
        class_ids(tuple(f"n0{i}" for i in range(5)), {"dog": 0})


def test_a_name_that_fits_two_classes_is_refused() -> None:
    with pytest.raises(InputError, match="got 1 that do not: 'crane'"):
        class_ids(("crane",), {"Crane": 0, "crane": 1})


def test_the_demo_pictures_open_and_fit_the_demo_model(
    demo_model_folder: Path, demo_calibration_folder: Path, demo_test_folder: Path
) -> None:
    label2id = json.loads((demo_model_folder / "config.json").read_text())["label2id"]
    calibration, test = open_images(demo_calibration_folder), open_images(demo_test_folder)
    assert (len(calibration), len(test)) == (32, 1000)
    assert set(class_ids(test.labels or (), label2id)) == set(range(10))
    assert test.sample(3, seed=0).image(2).size == (32, 32)
