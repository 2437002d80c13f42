"""Round weights by their effect on a model's outputs: statistics, allocation, error feedback."""
