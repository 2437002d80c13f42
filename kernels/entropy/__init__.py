"""Stored streams to coordinates on a GPU, and back."""
