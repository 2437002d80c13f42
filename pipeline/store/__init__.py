"""Objects under keys: the contract, a backend for each kind of store, wrappers, what opens and probes them."""
