"""What a model's output feels of its weights, and weights rounded by it: statistics, allocation, error feedback."""
