"""Read stored or pulled versions: references, the cache of blobs, pull, verify, export, diff."""
