"""Prove a version before it is published: compare its outputs with the original's."""
