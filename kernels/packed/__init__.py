"""The packed form of 10 or 12 bits a pair: decode and linear."""
