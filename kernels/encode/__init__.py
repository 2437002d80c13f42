"""Encode weights to step numbers on a GPU, and measure the error in the same pass."""
