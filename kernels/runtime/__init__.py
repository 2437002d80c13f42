"""Code that all families of kernels share: devices, prepared launches, device functions, timing, the error."""
