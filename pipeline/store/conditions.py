"""A wrapper for stores without conditional writes: it reads before it writes, which is enough for one publisher.

Another publisher may write between the read and the write, so such a store is not safe for two at once, and this is
always said. `compress` probes first and reports what it found. A command that does not probe meets the refusal
(ConditionsError) at its first conditional write, has the probe confirm it, and reports it then.
"""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from birkhoff.pipeline.errors import (
    ConditionsError,
    ObjectNotFoundError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
)
from birkhoff.pipeline.store.base import Store, StoreAddress
from birkhoff.pipeline.store.probe import FOLDER, StoreCapabilities, check_store
from birkhoff.pipeline.store.wrapper import StoreWrapper

log: logging.Logger = logging.getLogger("birkhoff.store")


class ConditionalStore(StoreWrapper):
    """Sends conditions to `inner` if the settings of its address say that they are honoured.

    Writes of the probe are passed on unchanged.
    """

    address: StoreAddress

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        if self.address.settings.conditional_create or key.startswith(FOLDER):
            try:
                return self.inner.create(key, body)
            except ConditionsError as refusal:
                self._ask(refusal, key, "create")
        return self._look_and_create(key, body)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        if self.address.settings.conditional_replace or key.startswith(FOLDER):
            try:
                return self.inner.replace(key, body, tag=tag)
            except ConditionsError as refusal:
                self._ask(refusal, key, "replace")
        return self._look_and_replace(key, body, tag)

    def adapt(self, found: StoreCapabilities) -> None:
        """Use the probe's findings from now on, here and in every worker that opens this store's address."""
        settings = dataclasses.replace(
            self.address.settings, conditional_create=found.create, conditional_replace=found.replace
        )
        self.address = dataclasses.replace(self.address, settings=settings)

    def _ask(self, refusal: ConditionsError, key: str, operation: Literal["create", "replace"]) -> None:
        """Have the probe confirm a refusal, because one gateway of many may be older. Raises StoreError if it does
        not."""
        if key.startswith(FOLDER):
            raise refusal
        try:
            found = check_store(self.inner)
        except StoreDeniedError:  # a role without permission to probe
            raise refusal from None
        if found.create if operation == "create" else found.replace:
            raise StoreError(
                f"{operation} {self.url}/{key}: the store {refusal.finding}, though it honours conditions otherwise; "
                "run the same command again"
            ) from refusal
        log.warning("%s %s: make sure that nobody else publishes to it now", self.url, found.problem)
        self.adapt(found)

    def _look_and_create(self, key: str, body: bytes) -> str:
        with suppress(ObjectNotFoundError):
            found, tag = self.inner.read(key)
            if found == body:
                return tag
            raise PreconditionError(f"create {self.url}/{key}: another body is there; read it and decide again")
        return self.inner.put(key, body)

    def _look_and_replace(self, key: str, body: bytes, tag: str) -> str:
        try:
            found, now = self.inner.read(key)
        except ObjectNotFoundError as error:
            raise PreconditionError(f"replace {self.url}/{key}: the object is gone; read it again") from error
        if found == body:
            return now
        if _plain(now) != _plain(tag):
            raise PreconditionError(f"replace {self.url}/{key}: another body is there; read it and decide again")
        return self.inner.put(key, body)


def probed(store: Store, tell: Callable[[str], object]) -> bool:
    """Probe a store before work begins and adapt to it. Return whether it is safe for one publisher only, which is
    reported.

    Raises as `check_store`.
    """
    found = check_store(store)
    if found.conditional_writes:
        return False
    tell(f"{store.url} {found.problem}: make sure that nobody else publishes to it now")
    if isinstance(store, ConditionalStore):
        store.adapt(found)
    return True


def _plain(tag: str) -> str:
    """Return a tag without the mark of a weak one, which a store may add to some answers only."""
    return tag.removeprefix("W/").strip('"')
