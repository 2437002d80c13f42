"""Entropy coding of bytes: code tables and interleaved rANS. It knows nothing about weights."""
