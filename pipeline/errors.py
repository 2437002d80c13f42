"""Errors of the pipeline and the exit code of every kind.

BirkhoffError                   (birkhoff.codec.errors)
├── ManifestError               a manifest that does not say what it should
├── SourceError                 a checkpoint that is missing, truncated, corrupt or of an unknown kind
│   └── UnsafeSourceError       a pickle that would run code
├── StoreError                  the object store did not do what was asked
│   ├── StoreUnreachableError   no answer, or not the answer of an object store
│   ├── StoreDeniedError        wrong key, missing permission, read-only
│   ├── ObjectNotFoundError     no such object
│   └── PreconditionError       a conditional write lost: the object exists already, or has changed
├── ArtifactNotFoundError       no such model, version, alias or digest
├── AliasError                  an alias that cannot be called so, cannot go back, or is protected
├── IntegrityError              stored bytes that do not match their digest, or fail their validation
├── ModelMismatchError          an artifact whose tensors are not those of the model to load into
├── BuilderError                a model whose code is not here, or that `segment` cannot drive
├── PictureError                a picture, prompt or annotation that cannot be used
├── TrustError                  a signature missing or wrong, or an alias that went back
├── OutputError                 a file or folder that cannot be written
├── BudgetError                 a budget that no quality fits into
├── ValidationError             an encoded tensor that does not meet its target
├── BusyError                   an earlier tick of the same schedule is still at work
├── WorkerError                 a worker died or could not be had
└── PartialError                some models of the manifest were not published
"""

from collections.abc import Iterable, Sequence

from birkhoff.codec.errors import BirkhoffError, CodecError, FormatError


class ManifestError(BirkhoffError):
    """A manifest that does not say what it should."""


class SourceError(BirkhoffError):
    """A checkpoint that is missing, truncated, corrupt or of an unknown kind."""


class UnsafeSourceError(SourceError):
    """A pickle that would run code when loaded."""


class StoreError(BirkhoffError):
    """The object store did not do what was asked."""


class StoreUnreachableError(StoreError):
    """No answer from the store, or not the answer of an object store."""


class StoreDeniedError(StoreError):
    """Wrong key, missing permission or a read-only store."""


class ObjectNotFoundError(StoreError):
    """No object under that key."""


class PreconditionError(StoreError):
    """A conditional write lost: the object exists already, or has changed since it was read."""


class ArtifactNotFoundError(BirkhoffError):
    """No such model, version, alias or digest."""


class AliasError(BirkhoffError):
    """An alias that cannot be called so, cannot go back, or is protected."""


class IntegrityError(BirkhoffError):
    """Stored bytes that do not match their digest."""


class ModelMismatchError(BirkhoffError):
    """An artifact whose tensors are not those of the model to load into."""


class BuilderError(BirkhoffError):
    """A model that cannot be built here: its code or its configuration is missing, or nothing drives it."""


class PictureError(BirkhoffError):
    """A picture, a prompt or an annotation that cannot be used."""


class TrustError(BirkhoffError):
    """A signature that is missing or does not hold, a key file that is none, or an alias that went back unnoticed."""


class OutputError(BirkhoffError):
    """A file or folder that cannot be written."""


class BudgetError(BirkhoffError):
    """A budget that no quality fits into."""


class ValidationError(BirkhoffError):
    """An encoded tensor that does not meet its target, or a probe that does not agree."""


class WorkerError(BirkhoffError):
    """A worker died, or the cluster cannot give what the plan needs."""


class BusyError(BirkhoffError):
    """An earlier tick of the same schedule is still at work."""


class PartialError(BirkhoffError):
    """Some models of the manifest were not published."""


EXIT_CODES: dict[type[BirkhoffError], int] = {
    BirkhoffError: 1,
    # 2 is the command line's own: wrong usage
    ManifestError: 3,
    SourceError: 4,
    UnsafeSourceError: 5,
    CodecError: 6,
    StoreError: 7,
    StoreUnreachableError: 8,
    StoreDeniedError: 9,
    ArtifactNotFoundError: 10,
    IntegrityError: 11,
    FormatError: 11,
    ValidationError: 12,
    WorkerError: 13,
    PartialError: 14,
    ModelMismatchError: 15,
    OutputError: 16,
    AliasError: 17,
    BuilderError: 18,
    PictureError: 19,
    TrustError: 20,
    BudgetError: 21,
    BusyError: 22,
}


def printable(text: str) -> str:
    """Text that may quote a stranger's, for people: one line, and nothing in it that a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What was probably meant by a name that is not known."""
    import difflib  # on the way to an error only

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggestion(name: str, known: Iterable[str]) -> str:
    """` 'nmae', did you mean 'name'?`, or the name alone where nothing known is near."""
    close = nearest(name, known)
    return f" {name!r}" if close is None else f" {name!r}, did you mean {close!r}?"


def some(names: Sequence[str], most: int = 10) -> str:
    """`a, b, c and 4 more`; `none` for no names."""
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def exit_code(error: BirkhoffError) -> int:
    """Exit code of the nearest listed ancestor of `error`'s class."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)
