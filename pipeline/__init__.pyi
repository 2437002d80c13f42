"""For type checkers alone: an `__init__.py` would let `import pipeline` find this folder."""
