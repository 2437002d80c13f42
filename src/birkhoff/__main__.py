"""`python -m birkhoff` and the console command. The handler of Ctrl-C is installed before slow imports."""

import gc
import sys


def main() -> None:
    """Run the command line. Ctrl-C never shows a traceback, not even while torch is imported."""
    gc.disable()  # imports create no garbage, but many collections
    try:
        from birkhoff.pipeline import streams

        streams.guard()
        from birkhoff.pipeline.cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted before anything was done\n")
        sys.exit(130)
    gc.freeze()
    gc.set_threshold(10_000)  # later imports create most of a command's objects
    gc.enable()
    try:
        command()
    finally:
        gc.freeze()  # saves the collections at exit, 0.1 s


if __name__ == "__main__":
    main()
