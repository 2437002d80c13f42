"""Archives of one version: the same bytes every time, whole or refused, whatever a stranger wrote."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, OutputError
from birkhoff.pipeline.registry import archive as module
from birkhoff.pipeline.registry.aliases import promote
from birkhoff.pipeline.registry.archive import Archive, load, save
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.registry.labels import change_labels, read_labels
from birkhoff.pipeline.registry.shipping import MAX_BESIDE, Delivery, Installed, pack
from birkhoff.pipeline.registry.signing import audience_of, load_public, load_signer, new_key
from birkhoff.pipeline.registry.trust import Trust, check_version
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.publishing import publish_contents

BLOCK = tarfile.BLOCKSIZE
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Store]:
    """A store with a signed and labelled `net@v1` of three blobs, one of them larger than a buffer."""
    new_key(tmp_path / "key")
    with open_store((tmp_path / "source").as_uri()) as opened:
        version = publish_contents(opened, "net", "a", "b" * 700, "c" * 3000, signer=load_signer(tmp_path / "key"))
        change_labels(opened, "net", version.digest, {"licence": "MIT"})
        promote(opened, "net", "v1", "stable")
        yield opened


@pytest.fixture
def file(source: Store, tmp_path: Path) -> Path:
    path = tmp_path / "net.tar"
    save(source, pack(source, resolve(source, "net@stable")), path)
    return path


def install(path: Path, store: Store, **delivery: object) -> Installed:
    return load(path, store, Delivery(**delivery), report=lambda _label, _total: lambda _bytes: None)  # type: ignore[arg-type]


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info, file.read() if (file := tar.extractfile(info)) else b"") for info in tar]


def sealed(parts: Members) -> Members:
    """The members, with a checksum that holds for them."""
    sha = hashlib.sha256()
    for info, body in parts[:-1]:
        sha.update(info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK))
    return [*parts[:-1], (parts[-1][0], f"{sha.hexdigest()}\n".encode())]


def forge(path: Path, parts: Members, form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for info, body in parts:
            tar.addfile(info, io.BytesIO(body))
    # tarfile pads to 20 blocks; an archive of ours ends with two.
    body = path.read_bytes().rstrip(b"\0")
    path.write_bytes(body + bytes(-len(body) % BLOCK) + bytes(2 * BLOCK))


class TestRoundTrip:
    def test_everything_arrives(self, file: Path, source: Store, store: Store, tmp_path: Path) -> None:
        done = install(file, store)
        assert (done.version.name, done.copied, done.aliases) == ("v1", 3, ("stable",))
        digest = done.version.digest
        assert read_labels(store, "net", digest) == {"licence": "MIT"}
        assert done.signed_for == (audience_of(source),)
        trust = Trust(keys=(load_public(tmp_path / "key.pub"),), audience=audience_of(source))
        check_version(store, resolve(store, "net@v1"), trust)
        for record in done.version.manifest.stored:
            assert store.get(blob_key(record.blob)) == source.get(blob_key(record.blob))
        again = install(file, store)
        assert (again.copied, again.version.name) == (0, "v1")

    def test_the_same_bytes_from_every_store(self, file: Path, store: Store, tmp_path: Path) -> None:
        install(file, store)
        save(store, pack(store, resolve(store, "net@stable")), tmp_path / "again.tar")
        assert (tmp_path / "again.tar").read_bytes() == file.read_bytes()

    def test_the_stated_layout_is_what_other_programs_see(self, file: Path, source: Store) -> None:
        manifest = resolve(source, "net").manifest
        found = members(file)
        key = next(info.name for info, _ in found if info.name.startswith("beside/signatures/"))
        assert [info.name for info, _ in found] == [
            "version.json",
            "manifest.json",
            "beside/labels.json",
            key,
            *(blob_key(record.blob) for record in manifest.stored),
            "sha256.txt",
        ]
        for info, _ in found:
            facts = (info.type, info.mode, info.uid, info.gid, info.uname, info.gname, info.mtime, info.linkname)
            assert facts == (tarfile.REGTYPE, 0o644, 0, 0, "", "", 0, "")
        assert found[1][1] == manifest.to_bytes()

    def test_it_can_be_read_from_a_pipe(self, file: Path, store: Store, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()))
        writer.start()
        assert install(pipe, store).copied == 3
        writer.join()

    def test_blobs_pass_through_a_buffer(self, source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_BUFFER_BYTES", 100)
        save(source, pack(source, resolve(source, "net")), tmp_path / "net.tar")
        assert len(members(tmp_path / "net.tar")) == 8


class TestSaving:
    def test_a_damaged_blob_leaves_no_file(self, source: Store, tmp_path: Path) -> None:
        parcel = pack(source, resolve(source, "net"))
        for body, what in ((b"x", "is damaged in"), (b"x" * 700, "is damaged in"), (None, "is missing from")):
            key = blob_key(parcel.blobs[1].blob)
            source.delete(key) if body is None else source.put(key, body)
            with pytest.raises(IntegrityError, match=f"net@v1: blob {parcel.blobs[1].blob} {what} file://"):
                save(source, parcel, tmp_path / "net.tar")
        assert [path.name for path in tmp_path.iterdir() if "tar" in path.name or ".part" in path.name] == []

    def test_a_folder_that_is_not_there(self, source: Store, tmp_path: Path) -> None:
        parcel = pack(source, resolve(source, "net"))
        assert save(source, parcel, tmp_path / "new" / "net.tar") == (tmp_path / "new" / "net.tar").stat().st_size
        (tmp_path / "no").write_bytes(b"")
        with pytest.raises(OutputError, match="File exists; name a place that can be written"):
            save(source, parcel, tmp_path / "no" / "net.tar")


def _renamed(index: int, name: str) -> Callable[[Members], Members]:
    def change(parts: Members) -> Members:
        parts[index][0].name = name
        return parts

    return change


def _typed(index: int, kind: bytes, link: str = "") -> Callable[[Members], Members]:
    def change(parts: Members) -> Members:
        info, _ = parts[index]
        info.type, info.linkname, info.size = kind, link, 0
        parts[index] = (info, b"")
        return parts

    return change


def _moded(parts: Members) -> Members:
    parts[0][0].mode = 0o4755
    return parts


def _owned(parts: Members) -> Members:
    parts[0][0].uname = "root"
    return parts


def _swapped(parts: Members) -> Members:
    parts[-2], parts[-3] = parts[-3], parts[-2]
    return parts


def _twice(parts: Members) -> Members:
    return [*parts[:-1], *parts[-2:]]


def _without(index: int) -> Callable[[Members], Members]:
    return lambda parts: [part for place, part in enumerate(parts) if place != index % len(parts)]


def _with_body(index: int, body: bytes) -> Callable[[Members], Members]:
    def change(parts: Members) -> Members:
        info, _ = parts[index]
        info.size = len(body)
        parts[index] = (info, body)
        return parts

    return change


def _many(parts: Members) -> Members:
    def extra(number: int) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(f"beside/x{number:04}.json")
        info.size = 2
        return info, b"{}"

    return [*parts[:2], *(extra(number) for number in range(MAX_BESIDE + 1)), *parts[4:]]


HEADER = "a header is none of those that `birkhoff save` writes"
HOSTILE: dict[str, tuple[Callable[[Members], Members], str]] = {
    "a link": (_typed(-2, tarfile.SYMTYPE, "/etc/passwd"), HEADER),
    "a hard link": (_typed(-2, tarfile.LNKTYPE, "manifest.json"), HEADER),
    "a device": (_typed(-2, tarfile.CHRTYPE), HEADER),
    "a folder": (_typed(-2, tarfile.DIRTYPE), HEADER),
    "a path that climbs": (_renamed(-2, "../../etc/passwd"), "'../../etc/passwd' of 3000 bytes stands where blob"),
    "an absolute path": (_renamed(-2, "/etc/passwd"), "'/etc/passwd' of 3000 bytes stands where blob"),
    "a path that climbs beside": (_renamed(2, "beside/../../x.json"), "'beside/../../x.json' has no place there"),
    "another mode": (_moded, HEADER),
    "another owner": (_owned, HEADER),
    "blobs in another order": (_swapped, "stands where blob"),
    "a blob twice": (_twice, "expected sha256.txt of at most 65"),
    "no last blob": (_without(-2), "member 'sha256.txt' of 65 bytes stands where blob"),
    "no checksum": (_without(-1), "member '' of 0 bytes, expected sha256.txt"),
    "another checksum": (_with_body(-1, b"0" * 64 + b"\n"), "are not those that sha256.txt was made of"),
    "something after the checksum": (lambda parts: [*parts, parts[0]], "'version.json' comes after the last"),
    "no head": (_without(0), "member 'manifest.json' of"),
    "no manifest": (_without(1), "member 'beside/labels.json' of"),
    "beside out of order": (lambda parts: [*parts[:2], parts[3], parts[2], *parts[4:]], "has no place there"),
    "beside twice": (lambda parts: [*parts[:3], *parts[2:]], "'beside/labels.json' has no place there"),
    "too many beside": (_many, "has no place there"),
    "another manifest": (_with_body(1, b"{}\n"), "manifest.json has digest"),
    "a large head": (_with_body(0, b" " * 5000), "expected version.json of at most 4096"),
    "another blob": (_with_body(-2, b"d" * 3000), "has digest"),
    "a longer blob": (_with_body(-2, b"c" * 3001), "of 3001 bytes stands where blob"),
    "a head that is none": (_with_body(0, b"[]"), "not a ArchiveHead"),
    "a head of another form": (_with_body(0, b'{"form": 2}'), "not a ArchiveHead"),
    "labels that are none": (_with_body(2, b'{"labels": {"A B": "x"}}'), "not a LabelRecord"),
    "signatures that are none": (_with_body(3, b"{}"), "not a VersionSignatures"),
}


class TestHostile:
    @pytest.mark.parametrize("what", HOSTILE)
    def test_it_is_refused_and_nothing_named(self, what: str, file: Path, directory_store: Store) -> None:
        change, said = HOSTILE[what]
        parts = change(members(file))
        forge(file, parts if "checksum" in what else sealed(parts))
        with pytest.raises(IntegrityError) as error:
            install(file, directory_store)
        assert said in str(error.value)
        assert str(file) in str(error.value)
        assert [info.key for info in directory_store.list("models/")] == []

    def test_forging_alone_is_not_refused(self, file: Path, directory_store: Store) -> None:
        before = file.read_bytes()
        forge(file, members(file))
        assert file.read_bytes() == before
        assert install(file, directory_store).copied == 3

    @pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_extended_headers(self, file: Path, directory_store: Store, form: int) -> None:
        parts = members(file)
        parts[-2][0].name = "x" * 300
        forge(file, parts, form)
        with pytest.raises(IntegrityError, match=HEADER):
            install(file, directory_store)

    def test_every_cut_is_found(self, file: Path, directory_store: Store) -> None:
        whole = file.read_bytes()
        for length in [*range(0, len(whole), 211), len(whole) - 1]:
            file.write_bytes(whole[:length])
            with pytest.raises(IntegrityError, match="no archive of `birkhoff save`, or damaged"):
                install(file, directory_store)
        assert [info.key for info in directory_store.list("models/")] == []

    def test_every_flipped_byte_is_found(self, file: Path, directory_store: Store) -> None:
        whole = file.read_bytes()
        for place in range(0, len(whole), 97):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 32]) + whole[place + 1 :])
            with pytest.raises(IntegrityError):
                install(file, directory_store)
        assert [info.key for info in directory_store.list("models/")] == []

    def test_what_follows_the_end(self, file: Path, directory_store: Store) -> None:
        file.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(IntegrityError, match="something follows the end"):
            install(file, directory_store)

    def test_an_announced_size_takes_no_memory(self, file: Path) -> None:
        """A header may say 8 GiB in a file of a few hundred bytes."""
        info = tarfile.TarInfo("version.json")
        info.size = 4096
        file.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + b"x" * 100)
        with pytest.raises(IntegrityError, match="ends too early"):
            install(file, None)  # type: ignore[arg-type]
        manifest = resolve_manifest_with_a_huge_blob()
        file.write_bytes(manifest)
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from birkhoff.pipeline.errors import IntegrityError\n"
            "from birkhoff.pipeline.registry.archive import Archive\n"
            "with Path(sys.argv[1]).open('rb') as file:\n"
            "    archive = Archive(file, 'x')\n"
            "    try:\n"
            "        list(archive.blobs())\n"
            "    except IntegrityError as error:\n"
            "        print(error)\n"
            "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        )
        ran = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
        said, peak = ran.stdout.splitlines()
        assert "it ends too early" in said
        assert int(peak) < 200 << 10

    def test_a_file_that_is_not_there(self, directory_store: Store, tmp_path: Path) -> None:
        for path in (tmp_path / "no.tar", tmp_path):
            with pytest.raises(ArtifactNotFoundError, match="name a file that `birkhoff save` wrote"):
                install(path, directory_store)

    def test_other_files(self, directory_store: Store, tmp_path: Path) -> None:
        for number, body in enumerate((b"", b"x", b"\0" * 1024, b"\x1f\x8b" + b"x" * 2000)):
            path = tmp_path / f"{number}.tar"
            path.write_bytes(body)
            with pytest.raises(IntegrityError, match="no archive of `birkhoff save`, or damaged"):
                install(path, directory_store)


def resolve_manifest_with_a_huge_blob() -> bytes:
    """The start of an archive whose one blob is said to have 8 GiB less one byte."""
    from birkhoff.pipeline.registry.archive import ArchiveHead, _header, _padding
    from birkhoff.pipeline.registry.documents import SourceRecord, VersionManifest
    from tests.pipeline.publishing import record_of

    record = record_of("x").model_copy(update={"bytes": module.MAX_MEMBER_BYTES})
    source = SourceRecord(file="f", sha256="0" * 64, bytes=9, format="test")
    manifest = VersionManifest(model="net", source=source, profile="p", recipe={}, code="0", shards=(record,))
    head = ArchiveHead(model="net", name="v1", digest=manifest.digest).to_bytes()
    body = manifest.to_bytes()
    documents = ((module.HEAD, head), (module.MANIFEST, body))
    start = b"".join(_header(name, len(part)) + part + _padding(len(part)) for name, part in documents)
    return start + _header(blob_key(record.blob), record.bytes) + b"x" * 1000


def test_reading_stops_before_the_blobs(file: Path) -> None:
    with file.open("rb") as opened:
        archive = Archive(opened, "x")
        assert archive.parcel.label == "net@v1"
        assert opened.tell() < file.stat().st_size - 4000
