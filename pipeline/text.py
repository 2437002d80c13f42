"""Text for people: sizes, digests, names and untrusted text, each on one line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def size(count: int) -> str:
    """Format bytes: `5.7 MiB`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def short(digest: str) -> str:
    """Return the first 12 digits of a digest, enough to tell versions apart."""
    return digest[:12]


def fixed(digits: int) -> Callable[[float], str]:
    """Return a formatter for numbers with so many decimals."""
    return lambda value: f"{value:.{digits}f}"


def significant(digits: int) -> Callable[[float], str]:
    """Return a formatter for numbers with so many significant digits."""
    return lambda value: f"{value:.{digits}g}"


def shape(dims: Sequence[int]) -> str:
    """Format a shape as `768x768`, or `scalar` without dimensions."""
    return "x".join(map(str, dims)) or "scalar"


def pairs(table: Mapping[str, str]) -> str:
    """Format labels as `licence=MIT, team=maps`."""
    return ", ".join(f"{key}={value}" for key, value in table.items())


def span(form: Callable[[Any], str]) -> Callable[[Sequence[Any]], str]:
    """Return a formatter for two values: `5.7 to 6.4`, or one if both are formatted alike."""
    return lambda ends: " to ".join(dict.fromkeys(map(form, ends)))


def sparkline(values: Sequence[float]) -> str:
    """Return block characters, from lowest to highest; middle blocks if all values are equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return "▄" * len(values)
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / (high - low) * 7)] for value in values)


def shown(value: object, limit: int = 80) -> str:
    """Return a short `repr`, on one line, of a value from an untrusted file."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the type and the first informative line of a library's error."""
    # torch begins with a page of advice on trusting the file, before the cause.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def printable(text: str) -> str:
    """Return untrusted text for people: on one line, without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def all_printable(value: Any) -> Any:
    """Return a value of a table or list with every nested text made `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {all_printable(key): all_printable(item) for key, item in value.items()}
    return type(value)(map(all_printable, value)) if type(value) in (list, tuple) else value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to an unknown one; None if none is."""
    import difflib  # on the way to an error only

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `'nmae', did you mean 'name'?`, or the quoted name alone if no known name is similar."""
    close = nearest(name, known)
    return f" {name!r}" if close is None else f" {name!r}, did you mean {close!r}?"


def some(names: Sequence[str], most: int = 10) -> str:
    """Join names as `a, b, c and 4 more`; `none` without names."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
