"""Provenance and bill of materials of a version, in formats that other tools read.

`provenance` is an in-toto statement with SLSA's predicate (https://slsa.dev/spec/v1.0/provenance), `bill_of_materials`
a CycloneDX 1.6 ML-BOM (https://cyclonedx.org/docs/1.6/json). Both state only what the version's manifest states, so
they are as trustworthy as its digest, and the same version gives the same bytes everywhere.
"""

import uuid
from typing import Any

from birkhoff.pipeline.registry.documents import VersionManifest

_BUILDER = "pkg:pypi/birkhoff-compression@{code}"
_SPACE = uuid.UUID("5f6c1f0e-3a1d-5d2f-9a53-0c9f2b6b8c11")
"""Namespace for the serial numbers of bills of materials, one per version digest (UUID version 5)."""


def provenance(manifest: VersionManifest) -> dict[str, Any]:
    """Return an in-toto statement. Subjects are the manifest and its own blobs; dependencies are the source and,
    with a base, its manifest and the containers that tensors are differences to. All by SHA-256."""
    source = manifest.source
    dependency = {"name": source.file, "digest": {"sha256": source.sha256}}
    origins = [{"uri": url, "digest": {"gitCommit": _commit(url)}} for url in source.origin or ()]
    blobs = {record.blob: record for record in manifest.own}
    bases = [] if manifest.base is None else [(f"{manifest.base.model}/manifest.json", manifest.base.digest)]
    bases += [(f"blobs/sha256/{base.blob[:2]}/{base.blob}", base.blob) for base in manifest.bases]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": f"{manifest.model}/manifest.json", "digest": {"sha256": manifest.digest}},
            *({"name": f"blobs/sha256/{blob[:2]}/{blob}", "digest": {"sha256": blob}} for blob in blobs),
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://pypi.org/project/birkhoff-compression/#compress-v1",
                "externalParameters": {
                    "model": manifest.model,
                    "profile": manifest.profile,
                    "recipe": manifest.recipe,
                    **({} if manifest.budget is None else {"budget": manifest.budget.model_dump(exclude_none=True)}),
                    **({} if manifest.overrides is None else {"overrides": manifest.overrides}),
                },
                "resolvedDependencies": [
                    dependency,
                    *origins,
                    *({"name": name, "digest": {"sha256": digest}} for name, digest in bases),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": _BUILDER.format(code=manifest.code),
                    "version": {"birkhoff-compression": manifest.code},
                }
            },
        },
    }


def bill_of_materials(manifest: VersionManifest) -> dict[str, Any]:
    """Return a CycloneDX document: the model, the model it was made from, and the program that made it."""
    source, figures = manifest.source, manifest.figures()
    made, base, tool = (
        f"{manifest.model}@{manifest.digest}",
        f"source@{source.sha256}",
        _BUILDER.format(code=manifest.code),
    )
    metrics = [
        {"type": key, "value": f"{figures[key]:g}"}
        for key in ("ratio", "sqnr_db_min", "sqnr_db_median", "agreement_mean", "agreement_p5", "output_db")
        if figures[key] is not None
    ]
    references = [{"type": "distribution", "url": url} for url in source.origin or ()]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, manifest.digest)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [{"type": "application", "name": "birkhoff-compression", "version": manifest.code}]
            },
            "component": {
                "type": "machine-learning-model",
                "bom-ref": made,
                "name": manifest.model,
                "version": manifest.digest,
                "hashes": [{"alg": "SHA-256", "content": manifest.digest}],
                "modelCard": {"quantitativeAnalysis": {"performanceMetrics": metrics}},
                "pedigree": {
                    "ancestors": [
                        {"type": "machine-learning-model", "bom-ref": f"{base}#ancestor", "name": source.file}
                    ],
                    "notes": f"compressed by {tool} with profile {manifest.profile}",
                },
                "properties": [
                    {"name": "birkhoff:profile", "value": manifest.profile},
                    {"name": "birkhoff:stored_bytes", "value": str(manifest.stored_bytes)},
                    *_base_property(manifest),
                    *(
                        {"name": f"birkhoff:recipe:{key}", "value": str(value)}
                        for key, value in manifest.recipe.items()
                    ),
                ],
            },
        },
        "components": [
            {
                "type": "machine-learning-model",
                "bom-ref": base,
                "name": source.file,
                "version": source.sha256,
                "hashes": [{"alg": "SHA-256", "content": source.sha256}],
                **({"externalReferences": references} if references else {}),
            }
        ],
        "dependencies": [{"ref": made, "dependsOn": [base]}, {"ref": base, "dependsOn": []}],
    }


def _base_property(manifest: VersionManifest) -> list[dict[str, str]]:
    base = manifest.base
    return [] if base is None else [{"name": "birkhoff:base", "value": f"{base.model}@{base.digest}"}]


def _commit(url: str) -> str:
    return url.partition("@")[2].partition("/")[0]
