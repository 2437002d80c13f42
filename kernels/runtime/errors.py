"""The error of the kernels.

BirkhoffError
└── KernelError                 tensors that do not fit together: shape, dtype or device
"""

from birkhoff.codec.errors import BirkhoffError


class KernelError(BirkhoffError):
    """Tensors handed to a kernel do not fit together."""
