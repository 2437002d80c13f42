"""The decision for each tensor, and the work on one shard: encode, validate, upload, record."""
