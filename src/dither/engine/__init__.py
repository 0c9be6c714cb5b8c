"""Where work runs. Nothing else in dither knows."""
