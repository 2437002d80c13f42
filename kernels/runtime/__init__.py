"""Shared by all families of kernels: devices, prepared launches, device functions, timing, the error."""
