"""Services that speak S3 their own way: what each odd answer comes to, by a proxy in front of a real server.

An odd answer either does no harm or is named in one line with what to do next. None is a crash, none a wrong result.
"""

import gzip
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError
from safetensors.torch import save_file

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.errors import (
    IntegrityError,
    PreconditionError,
    StoreConflictError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.store.base import Store, StoreSettings
from birkhoff.pipeline.store.open import open_address, open_store
from birkhoff.pipeline.store.probe import check_store
from birkhoff.pipeline.store.s3_errors import answered
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer
from tests.harness.faults.catalogue import After, Answer, Before, Fault, Request, refusal
from tests.harness.faults.proxy import Proxy, Rule
from tests.pipeline.command import captured

ALL = ("GET", "HEAD", "PUT", "DELETE", "LIST")
CONDITIONS = ("if-match", "if-none-match")
BODY = b"0123456789"


@dataclass
class Place:
    """The server by way of the proxy, which answers as it is told to."""

    proxy: Proxy
    url: str

    def speaks(
        self,
        before: Before | None = None,
        after: Callable[[Answer], None] | None = None,
        methods: tuple[str, ...] = ALL,
        times: int = 10**6,
    ) -> None:
        """Answer these methods so from now on."""
        late: After | None = None if after is None else lambda answer, _: after(answer)
        self.proxy.arm(Rule(fault=Fault(name="odd", before=before, after=late), methods=methods, key="", times=times))

    def open(self, **settings: object) -> Store:
        """A new store."""
        chosen = {"endpoint": self.proxy.endpoint, "attempts": 3, "page_size": 3, **settings}
        return open_store(self.url, StoreSettings(**chosen))  # type: ignore[arg-type]


@pytest.fixture
def place(embedded_server: EmbeddedServer, s3_environment: str) -> Iterator[Place]:
    proxy = Proxy(target=int(embedded_server.endpoint.rsplit(":", 1)[1]))
    yield Place(proxy, s3_environment)
    proxy.close()


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open() as opened:
        opened.put("there", BODY)
        yield opened


def refuses(status: int, code: str, message: str = "", *, having: tuple[str, ...] = (), **elements: str) -> Before:
    """Refuse requests with one of these headers, or all of them."""

    def answer(request: Request, _: object) -> Answer | None:
        if having and not any(name.startswith(having) for name in request.headers):
            return None
        return refusal(request, status, code, message, **elements)

    return answer


def etag(change: Callable[[str], str | None]) -> Callable[[Answer], None]:
    """Change the ETag of answers, or leave it out."""

    def after(answer: Answer) -> None:
        changed = [(name, change(text) if name.lower() == "etag" else text) for name, text in answer.headers]
        answer.headers = [(name, text) for name, text in changed if text is not None]

    return after


def without(*names: str) -> Callable[[Answer], None]:
    """Leave headers out of answers."""

    def after(answer: Answer) -> None:
        answer.headers = [(name, text) for name, text in answer.headers if not name.lower().startswith(names)]

    return after


def sums(*headers: tuple[str, str]) -> Callable[[Answer], None]:
    """Other checksums than were sent."""

    def after(answer: Answer) -> None:
        without("x-amz-checksum")(answer)
        answer.headers += headers

    return after


def weak(text: str) -> str:
    return text if text.startswith("W/") else f"W/{text}"


def strict(request: Request, _: object) -> Answer | None:
    """If-Match compares strongly (RFC 9110, 13.1.1): a weak ETag never matches."""
    if request.headers.get("if-match", "").startswith("W/"):
        return refusal(request, 412, "PreconditionFailed")
    return None


NOT_IMPLEMENTED = "A header you provided implies functionality that is not implemented"


class TestConditions:
    """Stores without conditional writes are found out, named, and still serve a single publisher."""

    @pytest.mark.parametrize(
        ("before", "after", "create", "replace", "problem"),
        [
            (
                refuses(501, "NotImplemented", NOT_IMPLEMENTED, having=CONDITIONS, Header="If-None-Match"),
                None,
                False,
                False,
                "answers If-None-Match with 501 NotImplemented and answers If-Match with 501 NotImplemented",
            ),
            (
                refuses(501, "NotImplemented", NOT_IMPLEMENTED, having=("if-match",), Header="If-Match"),
                None,
                True,
                False,
                "answers If-Match with 501 NotImplemented",
            ),
            (
                refuses(400, "InvalidArgument", "conditional headers are not supported on PUT", having=CONDITIONS),
                None,
                False,
                False,
                "answers If-None-Match with 400 InvalidArgument and answers If-Match with 400 InvalidArgument",
            ),
            (strict, etag(weak), True, False, r'gives weak ETags (W/"X"), which If-Match never matches'),
            (
                refuses(412, "PreconditionFailed", having=("if-match",)),
                None,
                True,
                False,
                'refuses If-Match with the very ETag it gave, "X"',
            ),
            (
                refuses(412, "PreconditionFailed", having=("if-none-match",)),
                None,
                False,
                True,
                "refuses If-None-Match where no object is",
            ),
        ],
        ids=["501", "501 to If-Match", "400", "weak ETags", "If-Match never matches", "If-None-Match never passes"],
    )
    def test_are_found_out_and_done_without(
        self,
        place: Place,
        store: Store,
        caplog: pytest.LogCaptureFixture,
        before: Before,
        after: Callable[[Answer], None] | None,
        create: bool,
        replace: bool,
        problem: str,
    ) -> None:
        place.speaks(before, after)
        found = check_store(store)
        assert (found.create, found.replace, found.conditional_writes) == (create, replace, False)
        assert re.sub("[0-9a-f]{32}", "X", found.problem or "") == problem
        assert [info.key for info in store.list()] == ["there"]
        store.adapt(found)  # type: ignore[attr-defined]
        with open_address(store.address) as worker:
            for user in (store, worker):
                used(user)
        assert caplog.records == []

    def test_weak_etags_of_reads_alone(self, place: Place, store: Store) -> None:
        """A proxy that compresses marks what it has read, not what it has written."""
        here = threading.local()  # a request is answered by the thread that took it

        def before(request: Request, _: threading.Event) -> Answer | None:
            here.method = request.method
            return strict(request, _)

        def after(answer: Answer) -> None:
            if here.method != "PUT":
                etag(weak)(answer)

        place.speaks(before, after)
        found = check_store(store)
        assert (found.create, found.replace) == (True, False)
        assert "weak ETags" in str(found.problem)
        store.adapt(found)  # type: ignore[attr-defined]
        used(store)

    @pytest.mark.parametrize("having", [CONDITIONS, ("if-match",)])
    def test_a_command_that_does_not_probe_says_so_once(
        self, place: Place, store: Store, caplog: pytest.LogCaptureFixture, having: tuple[str, ...]
    ) -> None:
        place.speaks(refuses(501, "NotImplemented", NOT_IMPLEMENTED, having=having))
        used(store)
        used(store)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "answers If-" in record.getMessage()
        assert "make sure that nobody else publishes to it now" in record.getMessage()

    def test_one_refusal_among_honoured_conditions_is_no_reason_to_do_without(self, place: Place, store: Store) -> None:
        """As from a gateway of an older release: writing without the condition could lose another's update."""
        refuse = refuses(501, "NotImplemented", NOT_IMPLEMENTED, having=("if-match",))
        tag = store.read("there")[1]
        place.speaks(refuse, methods=("PUT",), times=1)
        with pytest.raises(StoreError, match=r"answers If-Match with 501 .*honours conditions otherwise") as caught:
            store.replace("there", b"mine", tag=tag)
        assert type(caught.value) is StoreError
        assert store.get("there") == BODY
        assert store.address.settings.conditional_replace
        store.replace("there", b"mine", tag=tag)

    def test_what_is_missing_is_done_without_and_no_more(self, place: Place, store: Store) -> None:
        """A create that is refused once, where only If-Match is never taken."""
        once = [refuses(501, "NotImplemented", NOT_IMPLEMENTED, having=("if-none-match",))]
        always = refuses(501, "NotImplemented", NOT_IMPLEMENTED, having=("if-match",))

        def before(request: Request, ended: threading.Event) -> Answer | None:
            if once and "if-none-match" in request.headers:
                return once.pop()(request, ended)
            return always(request, ended)

        place.speaks(before)
        with pytest.raises(StoreError, match=r"create .*honours conditions otherwise"):
            store.create("new", BODY)
        assert [info.key for info in store.list()] == ["there"]
        used(store)

    def test_google_is_named(self, store: Store) -> None:
        from birkhoff.pipeline.store.probe import _named

        for endpoint, google in (("https://storage.googleapis.com", True), ("https://s3.example.com", False)):
            with open_store("s3://bucket", StoreSettings(endpoint=endpoint)) as opened:
                text = _named(opened, "ignores conditional writes")
            assert text is not None
            assert ("Google Cloud Storage" in text) == ("generations where S3 has ETags" in text) == google
        assert _named(store, None) is None

    @pytest.mark.parametrize("status", [304, 409])
    def test_a_lost_create_by_another_status(self, place: Place, store: Store, status: int) -> None:
        def after(answer: Answer) -> None:
            if answer.status == 412:
                answer.status = status
                answer.body = b"<Error><Code>EntityAlreadyExists</Code></Error>" if status == 409 else b""

        place.speaks(after=after)
        with pytest.raises(PreconditionError, match="another body is there"):
            store.create("there", b"other")
        store.create("there", BODY)
        assert check_store(store).conditional_writes


def used(store: Store) -> None:
    """What a publisher does with conditions; the stale lose."""
    first = store.create("k", b"1")
    assert store.create("k", b"1")
    with pytest.raises(PreconditionError, match="another body"):
        store.create("k", b"2")
    store.replace("k", b"2", tag=store.read("k")[1])
    with pytest.raises(PreconditionError, match="another body"):
        store.replace("k", b"3", tag=first)
    store.replace("k", b"3", tag=store.head("k").tag)
    assert store.get("k") == b"3"
    tag = store.read("k")[1]
    store.delete("k")
    with pytest.raises(PreconditionError, match="gone"):
        store.replace("k", b"4", tag=tag)


class TestRefusals:
    """The remedy goes by what the answer says, not by its status."""

    @pytest.mark.parametrize(
        ("before", "kind", "words"),
        [
            (
                refuses(400, "InvalidRequest", "Unsupported header 'x-amz-sdk-checksum-algorithm' received"),
                StoreError,
                ("AWS_REQUEST_CHECKSUM_CALCULATION=when_required",),
            ),
            (
                refuses(501, "NotImplemented", "STREAMING-UNSIGNED-PAYLOAD-TRAILER not implemented"),
                StoreError,
                ("AWS_REQUEST_CHECKSUM_CALCULATION=when_required",),
            ),
            (refuses(400, "InvalidArgument", "no"), StoreError, ("manual for InvalidArgument",)),
            (refuses(501, "NotImplemented", "no"), StoreError, ("lacks this call",)),
            (
                refuses(301, "PermanentRedirect", "elsewhere", Endpoint="plain.eu.example", Region="eu-west-1"),
                StoreError,
                ("AWS_REGION=eu-west-1", "AWS_ENDPOINT_URL_S3 at plain.eu.example"),
            ),
            (refuses(301, "PermanentRedirect", "elsewhere"), StoreError, ("correct AWS_REGION or AWS_ENDPOINT",)),
            (
                refuses(400, "AuthorizationHeaderMalformed", "the region is wrong", Region="eu-west-1"),
                StoreError,
                ("AWS_REGION=eu-west-1",),
            ),
            (refuses(403, "RequestTimeTooSkewed"), StoreDeniedError, ("clock",)),
            (refuses(403, "ExpiredToken"), StoreDeniedError, ("new credentials",)),
            (refuses(403, "AccessDenied"), StoreDeniedError, ("permissions",)),
            (refuses(403, "QuotaExceeded", "exceeded"), StoreError, ("quota", "birkhoff gc")),
            (refuses(507, "InsufficientStorage"), StoreError, ("disks are full",)),
            (refuses(507, "XMinioStorageFull"), StoreError, ("disks are full",)),
            (refuses(411, "MissingContentLength"), StoreError, ("drops lengths",)),
            (refuses(500, "InternalError"), StoreUnreachableError, ("try again later", "(3 attempts)")),
            (refuses(503, "SlowDown"), StoreUnreachableError, ("too many requests", "(3 attempts)")),
            (refuses(429, "SlowDown"), StoreUnreachableError, ("too many requests", "(3 attempts)")),
            (refuses(429, "TooManyRequests"), StoreUnreachableError, ("too many requests", "(3 attempts)")),
            (refuses(400, "RequestTimeout"), StoreUnreachableError, ("check the network", "(3 attempts)")),
            (refuses(409, "OperationAborted"), StoreConflictError, ("try again", "(3 attempts)")),
        ],
    )
    def test_of_a_write(
        self, place: Place, store: Store, before: Before, kind: type[StoreError], words: tuple[str, ...]
    ) -> None:
        place.speaks(before)
        with pytest.raises(kind) as caught:
            store.put("new", BODY)
        text = str(caught.value)
        assert type(caught.value) is kind
        assert [word for word in words if word not in text] == []
        assert ("when_required" in text) == ("when_required" in words[0])
        assert place.proxy.endpoint in text
        assert "\n" not in text
        lasting = kind in (StoreUnreachableError, StoreConflictError)
        place.speaks(before, times=2)  # what passes within the attempts is not noticed, what does not is not repeated
        if lasting:
            store.put("new", BODY)
            assert store.get("new") == BODY

    def test_a_store_that_rejects_checksums_works_with_the_remedy(
        self, place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.speaks(refuses(400, "InvalidRequest", "checksum", having=("x-amz-checksum-", "x-amz-sdk-checksum")))
        with pytest.raises(StoreError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
            check_store(store)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        with place.open() as opened:
            assert check_store(opened).conditional_writes
            address = opened.address
        monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")
        with open_address(address) as worker:  # on a machine that has another environment
            worker.put("a", BODY)

    def test_retry_after_is_honoured(self, place: Place, store: Store, waits: list[float]) -> None:
        asks = ("Retry-After", "7")
        place.speaks(lambda request, _: refusal(request, 503, "SlowDown", "slow", asks), times=2)
        store.put("a", BODY)
        assert waits == [7.0, 7.0]

    def test_an_answer_to_head_has_no_code(self) -> None:
        answer = {
            "Error": {"Code": "400", "Message": "Bad Request"},
            "ResponseMetadata": {"HTTPStatusCode": 400, "HTTPHeaders": {"x-amz-bucket-region": "eu-west-1"}},
        }
        error = answered("head s3://b/k at https://h", ClientError(answer, "HeadObject"), {})
        assert "set AWS_REGION=eu-west-1" in str(error)


class TestListings:
    """A listing that may not be whole is none: by it live objects would be garbage."""

    @pytest.fixture
    def many(self, store: Store) -> Store:
        for number in range(5):
            store.put(f"many/{number}", BODY)
        return store

    def test_without_version_2(self, place: Place, many: Store) -> None:
        place.speaks(refuses(501, "NotImplemented", "list-type 2 is not implemented"), methods=("LIST",))
        with pytest.raises(StoreError, match="lacks this call: use a newer release"):
            list(many.list())

    def test_version_1_in_silence(self, place: Place, many: Store) -> None:
        def after(answer: Answer) -> None:
            answer.body = re.sub(rb"<(NextContinuationToken|KeyCount)>.*?</\1>", b"", answer.body)

        place.speaks(after=after, methods=("LIST",))
        with pytest.raises(StoreError, match=r"cut the listing short.*without ListObjectsV2"):
            list(many.list())
        assert [info.key for info in many.list("there")] == ["there"]  # that is all of it

    def test_the_same_page_for_ever(self, place: Place, many: Store) -> None:
        def after(answer: Answer) -> None:
            token = b"<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
            answer.body = re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", answer.body)
            answer.body = re.sub(rb"<IsTruncated>.*?</IsTruncated>", token, answer.body)

        place.speaks(after=after, methods=("LIST",))
        with pytest.raises(StoreError, match="cut the listing short"):
            list(many.list())

    def test_that_does_not_say_whether_it_is_whole(self, place: Place, many: Store) -> None:
        def after(answer: Answer) -> None:
            answer.body = re.sub(rb"<IsTruncated>.*?</IsTruncated>", b"", answer.body)

        place.speaks(after=after, methods=("LIST",))
        with pytest.raises(StoreUnreachableError, match="is not a listing"):
            many.list()

    def test_a_page_that_fails_is_asked_for_alone(self, place: Place, many: Store) -> None:
        place.proxy.seen.clear()
        rule = Rule(fault=Fault(name="500", before=refuses(500, "InternalError")), methods=("LIST",), key="", skip=1)
        place.proxy.arm(rule)
        assert len(list(many.list("many/"))) == 5
        assert sum(count for (method, _), count in place.proxy.seen.items() if method == "LIST") == 3

    @pytest.mark.parametrize("part", ["ETag", "LastModified", "Size"])
    def test_entries_that_lack_something(self, place: Place, many: Store, part: str) -> None:
        def after(answer: Answer) -> None:
            answer.body = re.sub(f"<{part}>.*?</{part}>".encode(), b"", answer.body)

        place.speaks(after=after, methods=("LIST",))
        with pytest.raises(StoreError, match=f"list .*has no {part}"):
            list(many.list())


class TestHeaders:
    """Answers that lack a header, or have it in another form."""

    def test_no_last_modified(self, place: Place, store: Store) -> None:
        place.speaks(after=without("last-modified"))
        for call in (lambda: store.head("there"), lambda: check_store(store)):
            with pytest.raises(StoreError, match=r"head .*has no LastModified, which") as caught:
                call()
            assert type(caught.value) is StoreError
        assert store.get("there") == BODY

    def test_no_etag_of_writes(self, place: Place, store: Store) -> None:
        place.speaks(after=etag(lambda _: None), methods=("PUT",))
        with pytest.raises(StoreUnreachableError, match="has no ETag, so it is not an object store's"):
            check_store(store)

    def test_etags_without_quotes(self, place: Place, store: Store) -> None:
        place.speaks(after=etag(lambda text: text.strip('"')))
        store.adapt(check_store(store))  # type: ignore[attr-defined]
        used(store)

    @pytest.mark.parametrize(
        "after",
        [
            without("x-amz-checksum"),
            sums(("x-amz-checksum-crc32", "AAAAAA==-2"), ("x-amz-checksum-type", "COMPOSITE")),
        ],
        ids=["none", "of parts"],
    )
    def test_checksums_that_are_not_of_the_whole(
        self, place: Place, store: Store, after: Callable[[Answer], None]
    ) -> None:
        place.speaks(after=after)
        assert store.get("there") == BODY
        assert store.get("there", start=2, length=3) == b"234"
        assert check_store(store).conditional_writes

    def test_a_wrong_checksum_of_a_kind_that_not_every_client_knows(self, place: Place, store: Store) -> None:
        place.speaks(after=sums(("x-amz-checksum-crc64nvme", "AAAAAAAAAAA="), ("x-amz-checksum-type", "FULL_OBJECT")))
        try:
            found = store.get("there")
        except IntegrityError:  # with awscrt botocore knows it
            return
        assert found == BODY

    def test_bodies_that_were_compressed_on_their_way(self, place: Place, store: Store) -> None:
        def after(answer: Answer) -> None:
            if answer.body and answer.status == 200:
                answer.body = gzip.compress(answer.body)
                without("x-amz-checksum")(answer)
                answer.headers.append(("Content-Encoding", "gzip"))

        place.speaks(after=after, methods=("GET",))
        with pytest.raises(StoreError, match=r"read back as .* not at a cache or a proxy in front of it"):
            check_store(store)


def test_a_run_and_a_promotion_without_conditional_writes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line before any work, and then every version: no death at the first conditional write, no hundred tries."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", place.proxy.endpoint)
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    (tmp_path / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    at = ("--store", place.url)
    for number, (before, after, words) in enumerate(
        (
            (refuses(501, "NotImplemented", having=CONDITIONS), None, "answers If-None-Match with 501 NotImplemented"),
            (strict, etag(weak), "gives weak ETags"),
        )
    ):
        place.speaks(before, after)
        save_file({"w": torch.full((64, 64), float(number)).normal_()}, tmp_path / "net.safetensors")
        code, _, err = captured(capsys, "compress", str(tmp_path / "m.yaml"), "--executor", "inline", *at)
        assert code == 0, err
        assert [line for line in err.splitlines() if line.startswith("warning: s3://") and words in line] != []
        code, out, err = captured(capsys, "promote", f"net@v{number + 1}", *at)
        assert code == 0, err
        assert f"version v{number + 1}" in out
    place.proxy.arm(None)
    with place.open() as opened:
        assert b'"single_publisher":true' in opened.get("models/net/names/v2.json").replace(b" ", b"")
    code, out, err = captured(capsys, "verify", "net@stable", *at)
    assert code == 0, err


def test_every_error_is_one_of_ours() -> None:
    """Whatever status and code: a kind, a line, a remedy."""
    for status in (300, 301, 304, 307, 400, 401, 403, 404, 405, 409, 411, 412, 416, 429, 500, 501, 503, 505, 507):
        for code in ("", "NotImplemented", "QuotaExceeded", "Strange", "AccessDenied", str(status)):
            for sent in ({}, {"IfMatch": '"x"'}):
                answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
                error = answered("put s3://b/k at https://h", ClientError(answer, "PutObject"), sent)
                assert isinstance(error, BirkhoffError)
                assert str(error).startswith("put s3://b/k at https://h")
