"""What a stored number is: specs, grids, packing. Pure functions on tensors."""
