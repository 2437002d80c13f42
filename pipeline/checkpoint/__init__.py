"""Checkpoints on this machine, described by their headers: formats, vetting of pickles, digests."""
