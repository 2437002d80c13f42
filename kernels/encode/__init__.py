"""Weights to step numbers on a GPU, with the error measured in passing."""
