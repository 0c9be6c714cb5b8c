"""Quantune on a real model: what it may choose, how a trial is run, and what becomes of the best."""
