"""For type checkers alone: an `__init__.py` would let `import kernels` find this folder."""
