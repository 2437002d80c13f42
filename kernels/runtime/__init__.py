"""What every family of kernels shares: devices, prepared launches, device functions, timing, the error."""
