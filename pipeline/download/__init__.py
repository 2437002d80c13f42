"""Sources from elsewhere, brought to this machine once: addresses, transports, the cache of downloads."""
