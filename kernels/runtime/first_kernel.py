"""Import what Triton imports for a process's first kernel: 0.13 s in which no other thread runs.

Who decodes a model beside other work imports this module, so that it is done before.
"""

from birkhoff.kernels.runtime.device import HAS_TRITON, gpu_in_sight

if HAS_TRITON and gpu_in_sight():
    import triton.experimental.gluon  # noqa: F401
