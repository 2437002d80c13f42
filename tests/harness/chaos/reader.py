"""An independent reader: what the store's layout promises, checked with boto3 and hashlib and nothing of ours.

It knows the keys and fields that the README and `codec/FORMAT.md` name, and imports no code of the project.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

POLL_SECONDS = 0.2


class BrokenError(Exception):
    """The store shows something that it must never show."""


def connect(environment: Mapping[str, str]) -> Any:
    """A client for the server that `environment` leads to; gives up soon, as the server may be dead."""
    return boto3.session.Session(
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    ).client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=20, proxies={}),
    )


@dataclass(slots=True)
class Reader:
    """Reads one prefix of a bucket. Objects are read and hashed again whenever their ETag or time has changed."""

    client: Any
    bucket: str
    prefix: str
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Key -> ETag and time of what was hashed, and found right, the last time."""
    bodies: dict[str, tuple[tuple[str, str], bytes]] = field(default_factory=dict)
    polls: int = 0
    differences: int = 0
    """Shards, of the versions seen by the last walk, that are differences to shards of another version."""

    def objects(self, below: str = "") -> dict[str, dict[str, Any]]:
        """Key without the prefix -> entry of the listing."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + below)
        return {entry["Key"][len(self.prefix) :]: entry for page in pages for entry in page.get("Contents", ())}

    def get(self, key: str) -> bytes:
        """Body of an object; BrokenError if it is not there."""
        try:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            raise BrokenError(f"{key}: referred to, and not there") from None
        return body

    def check(self) -> int:
        """Walk names and aliases down to every blob; returns how many versions there are. Raises BrokenError.

        What refers is read before what it refers to: nothing that is referred to may come later.
        """
        found = self.objects("models/")
        pointers = [key for key in found if key.split("/")[2] in ("names", "aliases")]
        versions = {(key.split("/")[1], json.loads(self._body(key, found))["digest"]) for key in pointers}
        manifests = self.objects("models/")
        self.differences = 0
        shards = [shard for model, digest in versions for shard in self._shards(model, digest, manifests)]
        blobs = self.objects("blobs/")
        for digest, size in dict(shards).items():
            self._check_blob(digest, size, blobs)
        self._check_numbers(pointers)
        self.polls += 1
        return len(versions)

    def _body(self, key: str, listed: dict[str, dict[str, Any]]) -> bytes:
        """Body of an object, kept while the listing shows the same ETag and time. Raises BrokenError."""
        if key not in listed:
            raise BrokenError(f"{key}: referred to, and not there")
        state = listed[key]["ETag"], str(listed[key]["LastModified"])
        if self.bodies.get(key, (None, b""))[0] != state:
            self.bodies[key] = state, self.get(key)
        return self.bodies[key][1]

    def _shards(self, model: str, digest: str, listed: dict[str, dict[str, Any]]) -> list[tuple[str, int]]:
        """Digest and size of every blob of a version, and of those that its shards are differences to."""
        key = f"models/{model}/versions/{digest}/manifest.json"
        body = self._body(key, listed)
        if hashlib.sha256(body).hexdigest() != digest:
            raise BrokenError(f"{key}: its bytes have another digest")
        manifest = json.loads(body)
        if manifest["model"] != model or not manifest["shards"]:
            raise BrokenError(f"{key}: is of model {manifest['model']} with {len(manifest['shards'])} shards")
        bases = [base for shard in manifest["shards"] for base in shard.get("bases", ())]
        self.differences += sum(bool(shard.get("bases")) for shard in manifest["shards"])
        return [(record["blob"], record["bytes"]) for record in (*manifest["shards"], *bases)]

    def _check_blob(self, digest: str, size: int, listed: dict[str, dict[str, Any]]) -> None:
        key = f"blobs/sha256/{digest[:2]}/{digest}"
        if key not in listed:
            raise BrokenError(f"{key}: a visible version needs it, and it is not there")
        state = listed[key]["ETag"], str(listed[key]["LastModified"])
        if self.seen.get(key) == state:
            return
        body = self.get(key)
        if len(body) != size or hashlib.sha256(body).hexdigest() != digest:
            raise BrokenError(f"{key}: {len(body)} bytes that do not match the version's {size} and its digest")
        self.seen[key] = state

    def _check_numbers(self, pointers: list[str]) -> None:
        """Names are v1, v2, ... without gaps."""
        for model in {key.split("/")[1] for key in pointers}:
            names = [key.split("/")[3] for key in pointers if key.startswith(f"models/{model}/names/")]
            numbers = sorted(int(name.removeprefix("v").removesuffix(".json")) for name in names)
            if numbers != list(range(1, len(numbers) + 1)):
                raise BrokenError(f"model {model}: its names are {sorted(names)}")

    def shards(self) -> dict[str, tuple[str, str]]:
        """Shard records and blobs there are -> ETag and time."""
        found = {**self.objects("shards/"), **self.objects("blobs/")}
        return {key: (entry["ETag"], str(entry["LastModified"])) for key, entry in found.items()}

    def uploads(self) -> int:
        """Multipart uploads that were begun and not ended."""
        return len(self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()))


class Watch(threading.Thread):
    """Reads all the time until it is stopped; keeps the first thing that was broken. A dead store is no finding."""

    def __init__(self, reader: Callable[[], Reader]) -> None:
        super().__init__(daemon=True)
        self._open = reader
        self._ended = threading.Event()
        self.broken: str | None = None
        self.polls = 0

    def run(self) -> None:
        reader = self._open()
        while not self._ended.wait(POLL_SECONDS) and self.broken is None:
            try:
                reader.check()
                self.polls += 1
            except BrokenError as error:
                self.broken = str(error)
            except (BotoCoreError, ClientError):
                continue

    def stop(self) -> None:
        """End it; returns when it has ended."""
        self._ended.set()
        self.join()
