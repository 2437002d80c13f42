"""For type checkers alone: an `__init__.py` would let `import codec` find this folder."""
