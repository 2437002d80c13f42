"""Columns of a matrix rounded one after the other, on a GPU."""
