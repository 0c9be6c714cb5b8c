"""Random numbers that belong to a name: the same for a layer in every run, whatever was drawn before."""

from hashlib import sha256

import torch


def generator_of(name: str) -> torch.Generator:
    """A generator on the CPU, seeded by the name."""
    return torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:4]))
