"""Decode stored streams to coordinates on a GPU, and encode coordinates to streams."""
