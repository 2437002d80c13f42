"""The codec's inner loops in C, built if there is a compiler. References in Python run without it.

Imports nothing of the project.
"""
