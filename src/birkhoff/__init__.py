"""Birkhoff: compress fleets of vision models, prove every layer, publish, pull and run them."""

__version__ = "0.1.0"
