"""Errors of the pipeline and the exit code of every kind.

BirkhoffError                   (birkhoff.codec.errors)
├── ManifestError               a manifest that is not valid
├── SourceError                 a checkpoint that is missing, truncated, corrupt or of an unknown kind
│   ├── SourceGoneError         no such file at its address
│   └── UnsafeSourceError       a pickle that would run code
├── StoreError                  the object store failed
│   ├── StoreUnreachableError   no answer, or not the answer of an object store
│   ├── StoreDeniedError        wrong key, missing permission, read-only
│   ├── ObjectNotFoundError     no such object
│   ├── PermitEndedError        a deletion came after its permit had ended; nothing was deleted
│   ├── StoreConflictError      another writer changed the same object at the same time
│   ├── ConditionsError         the store has no conditional writes
│   └── PreconditionError       a conditional write lost: the object exists already, or has changed
├── ArtifactNotFoundError       no such model, version, alias or digest
├── AliasError                  an alias with a bad name, without a way back, or protected
├── LabelError                  a label that is not valid, or one too many
├── IntegrityError              stored bytes that do not match their digest, or fail their validation
├── ModelMismatchError          an artifact that does not fit the model to load into
├── BuilderError                a model whose code is missing, or that no adapter runs
├── PictureError                a picture, prompt or annotation that cannot be used
├── TrustError                  a missing or wrong signature, or an alias in an older state than seen before
├── OutputError                 a file or folder that cannot be written
├── BudgetError                 a budget that no quality fits
├── ValidationError             an encoded tensor that does not meet its target
│   └── ProofError              a model whose outputs do not agree with the original's, or cannot be proven to
├── BusyError                   an earlier run of the same models is still active
├── WorkerError                 a worker died or could not be started
│   └── ClusterError            no Ray cluster could be started or reached
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
    """The store did not answer, or not as an object store does. Worth retrying.

    `retry_after` is the wait that the store requests, in seconds, or None.
    """

    def __init__(self, *arguments: object, retry_after: float | None = None) -> None:
        super().__init__(*arguments)
        self.retry_after = retry_after


class StoreDeniedError(StoreError):
    """Wrong key, missing permission or a read-only store."""


class ObjectNotFoundError(StoreError):
    """No object under that key."""


class StoreConflictError(StoreError):
    """Another writer changed an object at the same time, and the store accepted neither change."""


class ConditionsError(StoreError):
    """The store refuses conditional writes, or its tags never match a condition.

    `finding` is a phrase that follows the store's name: "answers If-Match with 501 NotImplemented".
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
    """A missing or wrong signature, a file that is not a key, or an alias in an older state than seen before."""


class OutputError(BirkhoffError):
    """A file or folder that cannot be written."""


class BudgetError(BirkhoffError):
    """A budget that no quality fits."""


class ValidationError(BirkhoffError):
    """An encoded tensor that misses its target, or a probe whose result is wrong."""


class ProofError(ValidationError):
    """A compressed model's outputs are too far from the original's, or its proof is not valid."""


class WorkerError(BirkhoffError):
    """A worker died, or the cluster lacks the resources that the plan needs."""


class ClusterError(WorkerError):
    """No Ray cluster could be started on this machine or reached elsewhere. `reason` excludes the remedy."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"cannot reach {where}: {reason}; try --executor inline")
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return WorkerError, (str(self),)


class BusyError(BirkhoffError):
    """An earlier run of the same models is still active. `holder` describes it; `host` and `pid` are set if known."""

    def __init__(self, message: str, *, holder: str = "", host: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.holder: str = holder
        self.host: str | None = host
        self.pid: int | None = pid


class PartialError(BirkhoffError):
    """Some models of several failed, or they failed for different reasons."""


EXIT_CODES: dict[type[BirkhoffError], int] = {
    BirkhoffError: 1,
    # the command line uses 2 for wrong usage
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
    """Return the exit code of the nearest listed ancestor of the error's class."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def failure_facts(kind: str, code: int, message: str) -> dict[str, object]:
    """Return an error for machines: its class, exit code, message, and the advice in that message.

    A message says what failed, where, and in its last clause what to do next.
    """
    line = printable(message)
    clauses = re.split("; (?!nor )", line)
    return {"kind": kind, "code": code, "message": line, "remedy": clauses[-1] if len(clauses) > 1 else None}


def failure_of(error: BirkhoffError) -> dict[str, object]:
    """Return `failure_facts` for a BirkhoffError."""
    return failure_facts(type(error).__name__, exit_code(error), str(error))


def failure(errors: Sequence[BirkhoffError | None]) -> BirkhoffError | None:
    """Return the error that a command ends with, given one entry per model: their common kind, or PartialError."""
    failed = [error for error in errors if error is not None]
    if not failed:
        return None
    if len(failed) == len(errors) and len({type(error) for error in failed}) == 1:
        return failed[0]
    return PartialError(f"{len(failed)} of {len(errors)} models failed")
