"""Artifacts into models: names, layers, builders, transformers' classes."""
