"""How a model's outputs depend on its weights: taken once, kept in the store, and used by allocation by output."""
