"""Tensors coded as differences to those of another version, the base."""
