"""Round the columns of a matrix one after another on a GPU."""
