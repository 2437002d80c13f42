"""Load artifacts into models: names, layers, builders, transformers' classes."""
