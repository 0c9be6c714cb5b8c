"""Make `src/dither/demo_data`: a tiny trained ViT and a small sample of CIFAR-10, always the same files.

usage: python scripts/make_demo_data.py FOLDER

FOLDER holds `vit_tiny/` (config.json, model.safetensors, preprocessor_config.json), `cifar10_train.npz` and
`cifar10_test.npz` (arrays `jpeg`, `offsets`, `labels`). The pictures' JPEG bytes are copied unchanged.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

DEMO = Path(__file__).parents[1] / "src" / "dither" / "demo_data"
MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
CALIBRATION_COUNT = 32
CALIBRATION_SEED = 0
TEST_COUNT = 1000

ATTRIBUTION = f"""# Where these pictures come from

They are from CIFAR-10, which was collected by Alex Krizhevsky, Vinod Nair and Geoffrey Hinton:

> Alex Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, technical report,
> University of Toronto, 2009.

- `calibration/`: {CALIBRATION_COUNT} training pictures, drawn without replacement with seed {CALIBRATION_SEED}.
- `test/`: {TEST_COUNT} test pictures, the first ones of the packed copy that this sample was made from.

A file's name is the picture's number in that copy, its folder the class. The pictures are stored as JPEG.
The model in `vit_tiny/` beside this folder was trained for this project on CIFAR-10.

CIFAR-10 comes without an open licence. This small sample is here for demonstration alone and is **not** covered by
the licence of this project; for anything else take the data set from its authors and cite the report.
"""


def copy_model(source: Path, target: Path) -> list[str]:
    """Copy the model's folder; returns its class names in the order of their ids."""
    target.mkdir(parents=True)
    for name in MODEL_FILES:
        shutil.copyfile(source / name, target / name)
    names: dict[str, str] = json.loads((source / "config.json").read_text())["id2label"]
    return [names[str(number)] for number in range(len(names))]


def write_pictures(archive: Path, indices: Iterable[int], class_names: list[str], target: Path) -> None:
    """Write each picture to `target/<class>/<index>.jpg`, its bytes unchanged."""
    with np.load(archive, allow_pickle=False) as arrays:
        jpeg, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"]
    for index in indices:
        folder = target / class_names[labels[index]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05d}.jpg").write_bytes(jpeg[offsets[index] : offsets[index + 1]].tobytes())


def calibration_indices(archive: Path) -> list[int]:
    """A draw without replacement that is the same everywhere."""
    with np.load(archive, allow_pickle=False) as arrays:
        count = len(arrays["labels"])
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    drawn: list[int] = torch.randperm(count, generator=generator)[:CALIBRATION_COUNT].tolist()
    return drawn


def main(source: Path) -> None:
    """Replace the demo's model and pictures by fresh ones made from `source`."""
    pictures = DEMO / "cifar10"
    for folder in (DEMO / "vit_tiny", pictures):
        shutil.rmtree(folder, ignore_errors=True)
    class_names = copy_model(source / "vit_tiny", DEMO / "vit_tiny")
    train, test = source / "cifar10_train.npz", source / "cifar10_test.npz"
    write_pictures(train, calibration_indices(train), class_names, pictures / "calibration")
    write_pictures(test, range(TEST_COUNT), class_names, pictures / "test")
    (pictures / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {DEMO}")


if __name__ == "__main__":
    if len(sys.argv) != 2:  # the script's name and FOLDER
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
