"""What becomes of each tensor, and one shard in one process: encode, validate, upload, record."""
