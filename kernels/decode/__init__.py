"""Decode step numbers and coordinate planes to dense weights, and decide by a trial whether Triton supports a
device."""
