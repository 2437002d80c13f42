"""The invariants, judged after every change of the store by a reader that shares no code with what it judges.

* What was live is whole: the manifest and every blob of each version that a name refers to, those of its base too, from
  the moment that the name is live until it is buried, is there with the bytes that its digest says.
* An alias points at a name that is there and means the same version, and that version is whole.
* A name stands for one version in its life. It goes only after it was given up, and its number does not come back.
* An alias moves one generation at a time, keeps its history, and is never deleted.
"""

import hashlib
import json
from collections import defaultdict
from typing import Any

from tests.harness.simulator.engine import Simulation, Violation

NOTHING = "0" * 64


class Reader:
    """Follows one store from where it is now."""

    def __init__(self, simulation: Simulation) -> None:
        self._objects = simulation.shelf.objects
        self._holders: dict[str, set[str]] = defaultdict(set)
        """Who needs a key: keys of names and aliases."""
        self._needs: dict[str, tuple[str, ...]] = {}
        """What a name or an alias needs."""
        self._names: dict[str, dict[str, Any]] = {}
        """The last record of each name there was."""
        self._was_live: set[str] = set()
        self._gone: set[str] = set()
        self._aliases: dict[str, dict[str, Any]] = {}
        self._pointing: dict[str, set[str]] = defaultdict(set)
        """Aliases that point at a name, by its key."""
        for kind in ("/names/", "/aliases/"):
            for key in sorted(key for key in self._objects if kind in key):
                if kind == "/names/":  # a history was made without disturbance: each of its names was live
                    self._was_live.add(key)
                self.look(key)
        simulation.effect = self.look

    def look(self, key: str) -> None:
        """Judge a change of this key. Raises Violation."""
        kind = key.partition("/")[0]
        if kind == "models":
            part = key.split("/")[2]
            if part == "names":
                self._name(key)
            elif part == "aliases":
                self._alias(key)
        if key not in self._objects:
            if holders := self._holders.get(key):
                raise Violation(f"{key} was deleted, which {', '.join(sorted(holders))} needs")
        elif kind == "blobs" and hashlib.sha256(self._objects[key].body).hexdigest() != key.rpartition("/")[2]:
            raise Violation(f"{key} does not hold what its digest says")

    @property
    def needed(self) -> set[str]:
        """Everything that some name or alias needs."""
        return {key for keys in self._needs.values() for key in keys}

    def live(self) -> dict[str, str]:
        """Digests of live names, by key."""
        return {key: record["digest"] for key, record in self._names.items() if "retired" not in record}

    def _name(self, key: str) -> None:
        before = self._names.get(key)
        if key not in self._objects:
            if key in self._was_live and before is not None and "retired" not in before:
                raise Violation(f"{key} was deleted, though nobody gave it up")
            if aliases := self._pointing.get(key):
                raise Violation(f"{key} was deleted, at which {', '.join(sorted(aliases))} points")
            self._release(key)
            self._names.pop(key, None)
            if key in self._was_live:  # the name of a claim that came to nothing may be claimed again, and resolve then
                self._gone.add(key)
            return
        record = json.loads(self._objects[key].body)
        if key in self._was_live and key in self._gone:
            if "retired" not in record:
                raise Violation(f"{key} came back")
            self._names[key] = (
                record  # a claim, which its copier gives up as soon as it reads that the number was given
            )
            return
        meant = None if before is None else before["digest"]
        if meant == NOTHING and key not in self._was_live:
            meant = None  # a claim that came to nothing has meant nothing
        if meant is not None and record["digest"] not in (meant, NOTHING):
            raise Violation(f"{key} stands for another version than before")
        if "retired" not in record:
            self._was_live.add(key)
        if record["digest"] == NOTHING:
            if "retired" not in record:
                raise Violation(f"{key} is live and stands for nothing")
            if before is not None and key in self._was_live and "retired" not in before:
                raise Violation(f"{key} was buried, though nobody gave it up")
            if aliases := self._pointing.get(key):
                raise Violation(f"{key} was buried, at which {', '.join(sorted(aliases))} points")
            self._release(key)
        elif key in self._was_live:
            self._hold(key, key.split("/")[1], record["digest"])
        self._names[key] = record

    def _alias(self, key: str) -> None:
        if key not in self._objects:
            raise Violation(f"{key} was deleted")
        record, before = json.loads(self._objects[key].body), self._aliases.get(key)
        if record["digest"] == NOTHING:
            if before is not None:
                raise Violation(f"{key} points at nothing again")
            return
        state = {name: record.get(name) for name in ("version", "digest", "gen", "moved", "back", "protected")}
        if before is not None:
            old = {name: before.get(name) for name in state}
            if record["gen"] == before["gen"]:
                if state != old or record.get("previous") != before.get("previous"):
                    raise Violation(f"{key} changed and kept its generation")
            else:
                kept = [{name: entry.get(name) for name in state} for entry in record.get("previous", [])]
                if record["gen"] != before["gen"] + 1 or not kept or kept[-1] != old:
                    raise Violation(f"{key} went from generation {before['gen']} to {record['gen']}, or lost its past")
            self._pointing[self._target(key, before)].discard(key)
        model = key.split("/")[1]
        target = self._target(key, record)
        name = self._names.get(target)
        if name is None or name["digest"] != record["digest"]:
            raise Violation(f"{key} points at {record['version']}, which is not the version it says")
        self._pointing[target].add(key)
        self._aliases[key] = record
        self._release(key)
        self._hold(key, model, record["digest"])

    def _target(self, key: str, record: dict[str, Any]) -> str:
        return f"models/{key.split('/')[1]}/names/{record['version']}.json"

    def _hold(self, holder: str, model: str, digest: str) -> None:
        if holder in self._needs:
            return
        manifest = f"models/{model}/versions/{digest}/manifest.json"
        found = self._objects.get(manifest)
        if found is None or hashlib.sha256(found.body).hexdigest() != digest:
            raise Violation(f"{holder} refers to {digest[:8]}, whose manifest is not there")
        document = json.loads(found.body)
        bases = [base for shard in document["shards"] for base in shard.get("bases", ())]
        blobs = [entry["blob"] for entry in (*document["shards"], *bases, *document.get("files", ()))]
        keys = (manifest, *(f"blobs/sha256/{blob[:2]}/{blob}" for blob in blobs))
        for key in keys[1:]:
            if key not in self._objects:
                raise Violation(f"{holder} refers to {digest[:8]}, whose {key} is not there")
        self._needs[holder] = keys
        for key in keys:
            self._holders[key].add(holder)

    def _release(self, holder: str) -> None:
        for key in self._needs.pop(holder, ()):
            self._holders[key].discard(holder)
