"""List the versions of a store: `birkhoff.list`."""

from birkhoff.pipeline.notebook import rows_html
from birkhoff.pipeline.registry.listing import ListedVersion, current_versions, versions_of
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.default import borrowed_store


class Versions(list[ListedVersion]):
    """A list of versions that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        facts = [{"version": version.reference, **version.facts()} for version in self]
        columns = [key for key in dict.fromkeys(key for row in facts for key in row) if any(r.get(key) for r in facts)]
        return rows_html(columns, [[row.get(column, "") for column in columns] for row in facts])


def list_versions(model: str | None = None, *, store: str | Store | None = None) -> Versions:
    """Return the versions that aliases point at, of every model in a store; or all versions of one, oldest first.

    A model without an alias `latest` is represented by its newest version.

    Args:
        model: List every named version of this model.
        store: The store or its URL. Default: `BIRKHOFF_STORE`, then `embedded`.

    Raises:
        ArtifactNotFoundError: There is no such model.
        StoreError: The store cannot be reached or read.
    """
    with borrowed_store(store) as opened:
        return Versions(current_versions(opened) if model is None else versions_of(opened, model))
