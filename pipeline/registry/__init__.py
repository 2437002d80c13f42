"""Versions in a store: their documents, names, aliases, signatures, leases, retention and garbage collection."""
