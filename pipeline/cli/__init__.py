"""The `birkhoff` command: a module for each group of commands, registered on `app`, started by `main`."""
