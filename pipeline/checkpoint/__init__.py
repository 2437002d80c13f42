"""Local checkpoints, described by their headers: formats, vetting of pickles, digests."""
