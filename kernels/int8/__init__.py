"""HyperLinear on int8 tensor cores: each token is quantised with its own scale, coordinates stay as they are."""
