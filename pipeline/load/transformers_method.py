"""The quantization method in a `config.json`."""

METHOD = "birkhoff"
"""`quant_method` of the folders' `quantization_config`."""

FORM = 2
"""`form` there: how files hold the layers. 1, or none: `theta` as uint16, `step` and `escape_value` as float32.
2: the buffers of HyperLinear, `theta_bytes`, `step_bits` and `escape_bits`."""
