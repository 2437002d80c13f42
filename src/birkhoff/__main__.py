"""`python -m birkhoff` and the console command. The handler of Ctrl-C is installed before slow imports."""

import gc
import sys

_START_OBJECTS = 200_000
"""More than a command makes while it starts, most of them by imports. They stay, so a search for garbage finds none."""


def main() -> None:
    """Run the command line. Ctrl-C never shows a traceback, not even while torch is imported."""
    gc.disable()  # imports create no garbage, but many collections
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # see HIDDEN_MODULE in pipeline/run/cluster.py
    try:
        from birkhoff.pipeline import streams

        streams.guard()
        from birkhoff.pipeline.cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted before anything was done\n")
        sys.exit(130)
    gc.freeze()
    gc.set_threshold(_START_OBJECTS)
    gc.callbacks.append(_started)
    gc.enable()
    try:
        command()
    finally:
        gc.freeze()  # saves the collections at exit, 0.1 s


def _started(phase: str, _: object) -> None:
    """Collect more often after the first collection."""
    if phase == "stop":
        gc.callbacks.remove(_started)
        gc.set_threshold(10_000)


if __name__ == "__main__":
    main()
