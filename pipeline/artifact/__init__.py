"""Read versions, stored or pulled: references, the cache of blobs, pull, verify, export, diff."""
