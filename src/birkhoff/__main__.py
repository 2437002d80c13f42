"""`python -m birkhoff` and the console command; imports what it needs only once Ctrl-C is looked after."""

import gc
import sys


def main() -> None:
    """Run the command line; never shows a traceback for Ctrl-C, also while torch is still being imported."""
    gc.disable()  # importing makes no garbage, yet the collector would look through all of it again and again
    try:
        from birkhoff.pipeline import streams

        streams.guard()
        from birkhoff.pipeline.cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted before anything was done\n")
        sys.exit(130)
    gc.freeze()
    gc.set_threshold(10_000)  # objects; what commands import later is most of what they make
    gc.enable()
    try:
        command()
    finally:
        gc.freeze()  # the interpreter's end collects twice: 0.1 s for memory that goes with the process anyway


if __name__ == "__main__":
    main()
