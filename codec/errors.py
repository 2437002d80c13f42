"""The errors of the project as a tree. Catching the root catches all.

BirkhoffError
├── CodecError              a request that the codec cannot fulfil
│   ├── TensorError         a weight tensor that cannot be coded: NaN, Inf
│   └── TargetError         a fidelity target that the codec cannot reach
├── FormatError             bytes that do not follow the format page: truncated, mutated, forged
│   ├── VersionError        a format version that this code does not read
│   └── BaseError           a difference whose base is missing
└── (birkhoff.pipeline.errors adds manifests, sources, stores and artifacts)
"""


class BirkhoffError(Exception):
    """Root of all errors raised on purpose. The text is one line: what failed, where, and what to do next."""


class BirkhoffWarning(UserWarning):
    """The result may differ from what the caller expects: a fallback, a slower path."""


class CodecError(BirkhoffError):
    """A request that the codec cannot fulfil."""


class TensorError(CodecError):
    """A weight tensor that cannot be coded, for instance because it holds NaN or Inf."""


class TargetError(CodecError):
    """A fidelity target that the codec cannot reach."""


class FormatError(BirkhoffError):
    """Bytes that do not follow the format page: truncated, mutated or forged."""


class VersionError(FormatError):
    """A format version that this code does not read."""


class BaseError(FormatError):
    """A tensor stored as a difference whose base is missing."""
