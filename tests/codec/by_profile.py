"""Tensors coded by a profile, decided of one by one as a plan decides."""

from collections.abc import Mapping

from torch import Tensor

from birkhoff.codec import tensor as codec
from birkhoff.codec.dtypes import dtype_name
from birkhoff.codec.profiles import Decision, Override, Profile


def decision(tensor: Tensor, profile: Profile, override: Override | None = None, name: str = "") -> Decision:
    """What becomes of a tensor."""
    return profile.decide(tuple(tensor.shape), dtype_name(tensor.dtype), override, name)


def decisions(
    tensors: Mapping[str, Tensor], profile: Profile, overrides: Mapping[str, Override] | None = None
) -> dict[str, Decision]:
    """What becomes of tensors, by name."""
    return {name: decision(tensor, profile, (overrides or {}).get(name), name) for name, tensor in tensors.items()}


def encode_tensor(name: str, tensor: Tensor, profile: Profile, override: Override | None = None) -> codec.Encoded:
    """Code a tensor as a profile says."""
    return codec.encode_tensor(name, tensor, decision(tensor, profile, override, name))
