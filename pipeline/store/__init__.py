"""Object stores: the contract, its backends, wrappers, and the functions that open and probe them."""
