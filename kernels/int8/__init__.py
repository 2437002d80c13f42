"""HyperLinear on int8 tensor cores: tokens quantised one by one, coordinates as they are."""
