"""What Python programs and notebooks call: one model compressed in memory, versions pulled, pushed and listed."""
