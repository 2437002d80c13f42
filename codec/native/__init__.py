"""The codec's inner loops in C, built if there is a C compiler. Without it, references in Python run.

This package imports nothing else of the project.
"""
