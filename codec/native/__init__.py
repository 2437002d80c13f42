"""The codec's inner loops in C, built where there is a compiler; for all of them references in Python run without.

Imports nothing of ours.
"""
