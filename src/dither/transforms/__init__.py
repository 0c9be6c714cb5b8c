"""Rewrites that keep a network's function and make it easier to quantize. Pure functions on tensors."""
