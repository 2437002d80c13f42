"""The run of a manifest: the driver, its queue, workers on Ray or inline, progress, metrics."""
