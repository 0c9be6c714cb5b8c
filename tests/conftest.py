"""Fixtures for all rooms: the demo's own model and pictures, so that no test needs anything outside the project."""

from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "src" / "dither" / "demo_data"


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """A tiny trained ViT with its image processor."""
    return DEMO / "vit_tiny"


@pytest.fixture(scope="session")
def demo_calibration_folder() -> Path:
    """32 pictures in folders named by class."""
    return DEMO / "cifar10" / "calibration"


@pytest.fixture(scope="session")
def demo_test_folder() -> Path:
    """1,000 pictures in folders named by class."""
    return DEMO / "cifar10" / "test"
