"""Entropy coding of bytes: code tables and interleaved rANS. Knows nothing of weights."""
