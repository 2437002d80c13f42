"""Sources on other machines, downloaded once: addresses, transports, the cache of downloads."""
