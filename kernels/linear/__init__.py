"""y = x W^T + b on compressed weights: the op, its kernels by shape, and the plans that choose among them."""
