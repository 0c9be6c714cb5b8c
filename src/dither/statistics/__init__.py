"""What calibration measures: accumulators with `update`, `merge`, `result`; merging two halves equals one pass."""
