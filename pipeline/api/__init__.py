"""The Python API for programs and notebooks: compress a model in memory; pull, push and list versions."""
