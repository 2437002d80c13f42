"""The models of a manifest that a command is for. Imports no torch, so that commands can begin with it."""

from collections.abc import Iterable

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.plan.quality import BUDGETS
from birkhoff.pipeline.text import suggestion


def select(manifest: Manifest, only: Iterable[str], profile: str | None) -> Manifest:
    """Return the manifest with the models of `--only`; `--profile` replaces all profiles and budgets.

    Raises:
        ManifestError: A name is not in the manifest, or the profile is unknown.
    """
    wanted = list(only)
    known = {model.name for model in manifest.models}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ManifestError(
            f"--only: the manifest has no model{suggestion(missing[0], known)}; it has {', '.join(sorted(known))}"
        )
    if profile is not None and profile not in PROFILES:
        raise ManifestError(f"--profile: unknown profile{suggestion(profile, PROFILES)}; known: {', '.join(PROFILES)}")
    over = {"profile": profile, **dict.fromkeys((*BUDGETS, "allocation", "floor_db"))} if profile else {}
    return manifest.cut(
        model.model_copy(update=over) for model in manifest.models if not wanted or model.name in wanted
    )
