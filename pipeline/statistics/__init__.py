"""What a model's outputs feel of its weights: taken once, kept in the store, and what allocation by output goes by."""
