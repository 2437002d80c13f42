"""Proof of a version before it is published: its outputs beside the original's."""
