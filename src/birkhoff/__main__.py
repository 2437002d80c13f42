"""`python -m birkhoff` and the console command; imports what it needs only once Ctrl-C is looked after."""

import sys


def main() -> None:
    """Run the command line; never shows a traceback for Ctrl-C, also while torch is still being imported."""
    try:
        from birkhoff.pipeline.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted before anything was done\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
