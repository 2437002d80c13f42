"""Tensors coded as differences to another version, the base."""
