"""Loops that are worth a kernel of their own, each with the same loop in plain torch beside it."""
