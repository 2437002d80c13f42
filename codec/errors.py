"""The errors of the project, drawn as a tree; catching the root catches everything.

BirkhoffError
├── CodecError              the codec was asked for something it cannot do
│   ├── TensorError         a weight tensor that must not be coded: NaN, Inf
│   └── TargetError         a fidelity target outside what the codec can reach
├── FormatError             bytes that are not what the format page says: truncated, mutated, forged
│   ├── VersionError        a format version this code does not read
│   └── BaseError           a difference without the tensor that it is to
└── (birkhoff.pipeline.errors adds manifests, sources, stores and artifacts)
"""


class BirkhoffError(Exception):
    """Root of every error raised on purpose. Its text is one line: what, where, and what to do next."""


class BirkhoffWarning(UserWarning):
    """Something works, but not the way the caller may think: a fallback, a slower path."""


class CodecError(BirkhoffError):
    """The codec was asked for something it cannot do."""


class TensorError(CodecError):
    """A weight tensor that must not be coded, such as one that holds NaN or Inf."""


class TargetError(CodecError):
    """A fidelity target outside what the codec can reach."""


class FormatError(BirkhoffError):
    """Bytes that are not what the format page says: truncated, mutated or forged."""


class VersionError(FormatError):
    """A format version that this code does not read."""


class BaseError(FormatError):
    """A tensor that is a difference to another one, which is not at hand."""
