"""Weights given a grid and statistics. Pure functions on tensors: no model, no files, nothing random."""
