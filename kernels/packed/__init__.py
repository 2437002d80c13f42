"""The packed form of 10 or 12 bits per pair: decode and linear."""
