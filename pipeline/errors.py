"""Errors of the pipeline and the exit code of every kind.

BirkhoffError                   (birkhoff.codec.errors)
├── ManifestError               a manifest that is not valid
├── SourceError                 a checkpoint that is missing, truncated, corrupt or of an unknown kind
│   ├── SourceGoneError         its address has no such file
│   └── UnsafeSourceError       a pickle that would run code
├── StoreError                  the object store failed
│   ├── StoreUnreachableError   no answer, or not the answer of an object store
│   ├── StoreDeniedError        wrong key, missing permission, read-only
│   ├── ObjectNotFoundError     no such object
│   ├── PermitEndedError        a deletion came after its permit had ended; nothing was deleted
│   ├── StoreConflictError      another writer was at the same object in the same moment
│   ├── ConditionsError         the store has no conditional writes
│   └── PreconditionError       a conditional write lost: the object exists already, or has changed
├── ArtifactNotFoundError       no such model, version, alias or digest
├── AliasError                  an alias with a bad name, without a way back, or protected
├── LabelError                  a label that is not valid, or one too many
├── IntegrityError              stored bytes that do not match their digest, or fail their validation
├── ModelMismatchError          an artifact that does not fit the model to load into
├── BuilderError                a model whose code is not here, or that `segment` cannot drive
├── PictureError                a picture, prompt or annotation that cannot be used
├── TrustError                  a signature missing or wrong, or an alias that went back
├── OutputError                 a file or folder that cannot be written
├── BudgetError                 a budget that no quality fits
├── ValidationError             an encoded tensor that does not meet its target
│   └── ProofError              a model whose outputs do not agree with the original's, or cannot be proven to
├── BusyError                   an earlier tick of the same schedule is still at work
├── WorkerError                 a worker died or could not be had
│   └── ClusterError            no Ray cluster could be started, or reached
└── PartialError                some models of several failed
"""

import re
from collections.abc import Sequence

from birkhoff.codec.errors import BirkhoffError, CodecError, FormatError
from birkhoff.pipeline.text import printable


class ManifestError(BirkhoffError):
    """A manifest that is not valid."""


class SourceError(BirkhoffError):
    """A checkpoint that is missing, truncated, corrupt or of an unknown kind."""


class SourceGoneError(SourceError):
    """The address has no such file; a retry will not help."""


class UnsafeSourceError(SourceError):
    """A pickle that would run code when loaded."""


class StoreError(BirkhoffError):
    """The object store failed."""


class StoreUnreachableError(StoreError):
    """No answer from the store, or not that of an object store: a failure worth retrying.

    `retry_after` is the wait that the store asks for, in seconds; None if it does not say.
    """

    def __init__(self, *arguments: object, retry_after: float | None = None) -> None:
        super().__init__(*arguments)
        self.retry_after = retry_after


class StoreDeniedError(StoreError):
    """Wrong key, missing permission or a read-only store."""


class ObjectNotFoundError(StoreError):
    """No object under that key."""


class StoreConflictError(StoreError):
    """Two writers met at one object, and the store obeyed neither."""


class ConditionsError(StoreError):
    """The store refuses conditional writes, or its tags never match a condition.

    `finding` says which, as a phrase that follows the store's name: "answers If-Match with 501 NotImplemented".
    """

    def __init__(self, message: str, finding: str) -> None:
        super().__init__(message, finding)
        self.finding = finding

    def __str__(self) -> str:
        return str(self.args[0])


class PermitEndedError(StoreError):
    """The store refused a deletion because its permit had ended."""


class PreconditionError(StoreError):
    """A conditional write lost: the object exists already, or has changed since it was read."""


class ArtifactNotFoundError(BirkhoffError):
    """No such model, version, alias or digest."""


class AliasError(BirkhoffError):
    """An alias with a bad name, without a way back, or protected."""


class LabelError(BirkhoffError):
    """A label that is not valid, or one too many."""


class IntegrityError(BirkhoffError):
    """Stored bytes that do not match their digest."""


class ModelMismatchError(BirkhoffError):
    """An artifact that does not fit the model to load into."""


class BuilderError(BirkhoffError):
    """A model that cannot be built here: its code or configuration is missing, or no adapter runs it."""


class PictureError(BirkhoffError):
    """A picture, a prompt or an annotation that cannot be used."""


class TrustError(BirkhoffError):
    """A signature that is missing or wrong, a file that is not a key, or an alias that went back."""


class OutputError(BirkhoffError):
    """A file or folder that cannot be written."""


class BudgetError(BirkhoffError):
    """A budget that no quality fits."""


class ValidationError(BirkhoffError):
    """An encoded tensor that does not meet its target, or a probe that does not agree."""


class ProofError(ValidationError):
    """A compressed model's outputs are too far from the original's, or its proof is not valid."""


class WorkerError(BirkhoffError):
    """A worker died, or the cluster cannot give what the plan needs."""


class ClusterError(WorkerError):
    """No Ray cluster could be started on this machine, or reached elsewhere. `reason` says why, without a remedy."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"cannot reach {where}: {reason}; try --executor inline")
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return WorkerError, (str(self),)


class BusyError(BirkhoffError):
    """An earlier run of the same models is still at work: `holder` for people, its `host` and `pid` if it said them."""

    def __init__(self, message: str, *, holder: str = "", host: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.holder: str = holder
        self.host: str | None = host
        self.pid: int | None = pid


class PartialError(BirkhoffError):
    """Some models of several failed, or they failed for different reasons."""


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
    LabelError: 23,
}


def exit_code(error: BirkhoffError) -> int:
    """Exit code of the nearest listed ancestor of `error`'s class."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def failure_facts(kind: str, code: int, message: str) -> dict[str, object]:
    """Return an error for machines: its class, its exit code, its line, and what that line advises.

    Error lines say what, where and, as their last clause, what to do next.
    """
    line = printable(message)
    clauses = re.split("; (?!nor )", line)
    return {"kind": kind, "code": code, "message": line, "remedy": clauses[-1] if len(clauses) > 1 else None}


def failure_of(error: BirkhoffError) -> dict[str, object]:
    """Return the same for a BirkhoffError."""
    return failure_facts(type(error).__name__, exit_code(error), str(error))


def failure(errors: Sequence[BirkhoffError | None]) -> BirkhoffError | None:
    """Return what models, one entry for each, make a command end with: their one kind of error, or PartialError."""
    failed = [error for error in errors if error is not None]
    if not failed:
        return None
    if len(failed) == len(errors) and len({type(error) for error in failed}) == 1:
        return failed[0]
    return PartialError(f"{len(failed)} of {len(errors)} models failed")
