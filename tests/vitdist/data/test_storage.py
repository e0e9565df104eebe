"""Bytes of shards from everywhere, right or refused. python -m pytest tests/vitdist/data/test_storage.py

The server below has knobs for what real ones do: drop, refuse, ignore ranges, send less than they promise.
"""

import contextlib
import errno
import fcntl
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitdist.data import storage
from vitdist.data.storage import Cache, Place, Storage, download, fetch, is_remote, size

ROOT = Path(__file__).parents[3]
PAGE = 64 << 10
BLOCK = 2 * PAGE
SHARD = os.urandom(9 * PAGE + 1234)  # four blocks and a half, the last one ending inside a page


class Server(ThreadingHTTPServer):
    """Serves `files`. Each answer is spoilt by the next of `faults`, while there are any."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/a.tar": SHARD, "/b.tar": SHARD[::-1], "/empty": b"", "/index.json": b'{"version": 1}'}
        self.faults: list[str] = []
        self.asked: list[str | None] = []
        self.logins: list[str | None] = []
        self.encodings: set[str | None] = set()
        self.connections: set[int] = set()
        self.ranges = True
        self.sent = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients hang up here on purpose."""

    def url(self, path: str = "/a.tar", login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.server_port}{path}"

    def place(self, path: str = "/a.tar") -> Place:
        return Place(self.url(path), len(self.files[path]), "00")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        server.logins.append(self.headers.get("Authorization"))
        server.encodings.add(self.headers.get("Accept-Encoding"))
        server.connections.add(self.client_address[1])
        fault = server.faults.pop(0) if server.faults else ""
        content = server.files.get(self.path.partition("?")[0])
        if fault == "drop":
            self.close_connection = True
        elif fault.isdecimal():
            self.answer(int(fault), b"", {"Retry-After": "7"} if fault == "429" else {})
        elif content is None:
            self.answer(404, b"gone", {})
        elif not (server.ranges and wanted):
            self.answer(200, content, {}, fault)
        else:
            first, last = map(int, re.findall(r"\d+", wanted))
            if first >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            last = min(last, len(content) - 1)
            shift = 1 if fault == "shift" else 0
            span = {"Content-Range": f"bytes {first + shift}-{last + shift}/{len(content)}"}
            self.answer(206, content[first : last + 1], span, fault)

    def answer(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        promised = len(body) // 2 if fault == "less" else len(body)
        for name, value in (headers | {"Content-Length": str(promised)}).items():
            self.send_header(name, value)
        self.end_headers()
        sent = body[: len(body) // 2] if fault in ("half", "less") else body
        for at in range(0, len(sent), 1 << 16):
            try:
                self.wfile.write(sent[at : at + (1 << 16)])
            except OSError:
                break
            self.server.sent += len(sent[at : at + (1 << 16)])
        self.close_connection = fault == "half"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between tries, told instead of slept. What was said once is said again in the next test."""
    asked: list[float] = []
    monkeypatch.setattr(storage, "_sleep", asked.append)
    storage._told.clear()
    return asked


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 64 * BLOCK, BLOCK)


def blocks(cache: Cache) -> list[Path]:
    return sorted(p for p in cache.folder.glob("[0-9a-f][0-9a-f]/*") if not p.name.startswith("."))


def used(cache: Cache) -> int:
    total = 0
    for path in cache.folder.glob("[0-9a-f][0-9a-f]/*"):
        with contextlib.suppress(FileNotFoundError):  # evicted by another process meanwhile
            total += path.stat().st_size
    return total


def in_children(work: Callable[[int], None], count: int = 4) -> None:
    """`work(i)` in forked processes; all must end well."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(i,)) for i in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * count


# ---- places ----------------------------------------------------------------------------------------


def test_a_place_is_remote_by_its_scheme() -> None:
    for url in ("http://h/a", "HTTPS://h/a", "s3://b/k", "gs://b/k", "file:///a", "memory://a", "zip://a::http://h/b"):
        assert is_remote(url), url
    for path in ("/data/a.tar", "a.tar", "./a:b/c.tar", "C:/a", "a//b", "pipes:x", ""):
        assert not is_remote(path), path


def test_D8_X1_pipes_are_refused_without_their_command() -> None:
    command = "pipe:curl -H 'Authorization: SECRET' http://h/a.tar"
    assert is_remote(command)
    for call in (lambda: Storage([Place(command, 1, "")]), lambda: fetch(command), lambda: size(command)):
        with pytest.raises(ValueError, match="not ranges") as refused:
            call()
        assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:SECRET@host:80/a.tar", "https://host:80/a.tar"),
        ("https://user:SE/CRET@host/a.tar", "https://host/a.tar"),
        ("https://user:SE?CR#ET@host/a.tar", "https://host/a.tar"),
        ("https://SECRET@host/a.tar", "https://host/a.tar"),
        ("https://h/a.tar?X-Amz-Signature=SECRET&b=(SECRET)'SECRET", "https://h/a.tar?..."),
        ("s3://bucket/a@b/c.tar", "s3://bucket/a@b/c.tar"),
        ("http://host:8080/a@b.tar", "http://host:8080/a@b.tar"),
        ("no route to http://u:SECRET@h/a?token=SECRET or b", "no route to http://h/a?... or b"),
    ],
)
def test_X1_secrets_are_not_shown(url: str, shown: str) -> None:
    assert storage.shown(url) == shown


# ---- local -----------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Place:
    (tmp_path / "a.tar").write_bytes(SHARD)
    return Place(str(tmp_path / "a.tar"), len(SHARD), "00")


def test_local_ranges(local: Place) -> None:
    opened = Storage([local])
    opened.expect(0, 5, 100)
    assert opened.read(0, 0, len(SHARD)) == SHARD
    assert opened.read(0, 5, 100) == SHARD[5:105]
    assert opened.read(0, len(SHARD), 0) == b""
    opened.forget(0, 0, 100)
    for offset, count in ((len(SHARD) - 1, 2), (-1, 1)):
        with pytest.raises(OSError, match="index the shards again"):
            opened.read(0, offset, count)


def test_partial_reads_are_continued(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, count, offset: whole(handle, min(count, 1000), offset))
    assert Storage([local]).read(0, 7, 12_345) == SHARD[7 : 7 + 12_345]


@pytest.mark.parametrize("cached", [False, True])
def test_D1_D4_a_cut_or_missing_file_is_named(local: Place, cache: Cache, cached: bool) -> None:
    os.truncate(local.url, 1000)
    opened = Storage([local, Place("/no/b.tar", 10, "")], cache if cached else None)
    with pytest.raises(OSError, match=r"a\.tar: cut off at byte 1,000 of 591,058: copy the shard again"):
        opened.read(0, 900, 200)
    with pytest.raises(FileNotFoundError, match=r"^/no/b\.tar: No such file.*: is its disk mounted"):
        opened.read(1, 0, 1)
    opened.expect(1, 0, 1)
    assert not blocks(cache)


def test_open_files_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_OPEN_SHARDS", 3)
    for i in range(9):
        (tmp_path / f"{i}").write_bytes(bytes([i]))
    before = len(os.listdir("/proc/self/fd"))
    opened = Storage([Place(str(tmp_path / f"{i}"), 1, "") for i in range(9)])
    assert [opened.read(i, 0, 1) for i in range(9)] == [bytes([i]) for i in range(9)]
    assert len(os.listdir("/proc/self/fd")) == before + 3


# ---- http ------------------------------------------------------------------------------------------


def test_http_asks_for_the_range_alone_and_keeps_its_connection(server: Server) -> None:
    opened = Storage([server.place()])
    opened.expect(0, 5, 10)
    assert [opened.read(0, at, 100) for at in (5, 70_000, len(SHARD) - 100)] == [
        SHARD[5:105],
        SHARD[70_000:70_100],
        SHARD[-100:],
    ]
    assert server.asked == ["bytes=5-104", "bytes=70000-70099", f"bytes={len(SHARD) - 100}-{len(SHARD) - 1}"]
    assert len(server.connections) == 1
    assert server.encodings == {"identity"}  # a range of a compressed body would be other bytes


@pytest.mark.parametrize("fault", ["503", "500", "408", "drop", "half"])
def test_D10_what_passes_is_tried_again(server: Server, fault: str, pauses: list[float]) -> None:
    server.faults = [fault, fault]
    assert Storage([server.place()]).read(0, 100, 5000) == SHARD[100:5100]
    assert len(server.asked) == 3
    assert len(pauses) == 2
    assert 0 < pauses[0] <= 0.25 < pauses[1] * 2 <= 1
    server.faults = [fault]
    assert fetch(server.url()) == SHARD
    server.faults = [fault]
    assert size(server.url()) == len(SHARD)


def test_a_body_that_is_honestly_short_is_tried_again(server: Server) -> None:
    server.faults = ["less"]
    assert Storage([server.place()]).read(0, 100, 5000) == SHARD[100:5100]
    assert len(server.asked) == 2


def test_the_server_names_the_pause(server: Server, pauses: list[float]) -> None:
    server.faults = ["429"]
    assert Storage([server.place()]).read(0, 0, 10) == SHARD[:10]
    assert pauses == [7]


def test_D10_tries_end(server: Server, pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = ["503"] * 100
    opened = Storage([server.place()._replace(url=server.url("/a.tar?token=SECRET", "me:SECRET@"))])
    for _ in range(2):
        with pytest.raises(OSError, match=r"127\.0\.0\.1:\d+/a\.tar\?\.\.\.: HTTP 503 Service Unavailable, 9 times"):
            opened.read(0, 0, 10)
    assert 30 < sum(pauses[:8]) <= 61
    told = capsys.readouterr().err
    assert told.count("trying on") == 1
    assert "SECRET" not in told


def test_no_server_is_told_without_secrets(
    server: Server, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url("/a.tar?X-Amz-Signature=SECRET", "me:SECRET@")
    server.server_close()
    server.socket.close()
    with pytest.raises(OSError, match="refused") as error:
        Storage([Place(url, 10, "")]).read(0, 0, 10)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert "SECRET" not in str(error.value) + capsys.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("401", PermissionError, "check user and password"),
        ("403", PermissionError, "signed URL"),
        ("404", FileNotFoundError, "check the name"),
        ("418", OSError, "curl"),
        ("shift", OSError, r"asked for bytes 0-9/\d+, the server has bytes 1-10/"),
    ],
)
def test_what_does_not_pass_is_told_at_once(
    server: Server, fault: str, kind: type[OSError], words: str, pauses: list[float]
) -> None:
    server.faults = [fault]
    url = server.url("/a.tar?token=SECRET", "me:SECRET@")
    with pytest.raises(kind, match=words) as error:
        Storage([Place(url, len(SHARD), "")]).read(0, 0, 10)
    assert "SECRET" not in str(error.value)
    assert len(server.asked) == 1
    assert not pauses


def test_a_server_without_ranges_is_refused_before_its_body_comes(server: Server) -> None:
    server.ranges = False
    server.files["/a.tar"] = bytes(64 << 20)
    with pytest.raises(OSError, match=r"ignores ranges: copy the shards to a disk") as error:
        Storage([server.place()]).read(0, 0, 10)
    assert server.url() in str(error.value)
    assert len(server.asked) == 1
    assert server.sent < 32 << 20


def test_D9_a_shard_of_another_size_is_refused(server: Server) -> None:
    for total in (len(SHARD) - 1, len(SHARD) + 1, len(SHARD) + 100):
        with pytest.raises(OSError, match="the shard was changed or cut"):
            Storage([Place(server.url(), total, "")]).read(0, total - 10, 10)


def test_login_and_query_reach_the_server(server: Server) -> None:
    assert fetch(server.url("/index.json?token=1", "me:p%40ss@")) == b'{"version": 1}'
    assert server.logins == ["Basic bWU6cEBzcw=="]  # me:p@ss


def test_no_valid_url_is_told_at_once(pauses: list[float]) -> None:
    with pytest.raises(OSError, match="no valid URL"):
        fetch("http://[::1/a")
    assert not pauses


def test_small_files_and_sizes(server: Server) -> None:
    assert fetch(server.url("/index.json")) == b'{"version": 1}'
    assert fetch(server.url("/empty")) == b""
    assert size(server.url()) == len(SHARD)
    assert size(server.url("/empty")) == 0
    with pytest.raises(FileNotFoundError):
        fetch(server.url("/none"))
    with pytest.raises(FileNotFoundError):
        size(server.url("/none"))
    server.ranges = False
    assert size(server.url()) == len(SHARD)


@pytest.mark.parametrize("ranges", [True, False])
def test_downloads_go_on_and_appear_whole(
    server: Server, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_DOWNLOAD_PIECE", 200_000)
    server.ranges = ranges
    server.faults = ["", "", "half", "503", "drop"] if ranges else ["", "half", "drop"]
    download(server.url(), tmp_path / "new" / "a.tar")
    assert (tmp_path / "new" / "a.tar").read_bytes() == SHARD
    assert len(server.asked) == (1 + 3 + 3 if ranges else 1 + 3)
    assert server.asked.count("bytes=0-199999") == ranges  # nothing is fetched twice that was whole
    download(server.url("/empty"), tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_failed_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"before")
    server.faults = ["", "404"]
    with pytest.raises(FileNotFoundError):
        download(server.url(), tmp_path / "a.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"before"


def test_connections_are_not_shared_with_children(server: Server) -> None:
    opened = Storage([server.place()])
    assert opened.read(0, 0, 10) == SHARD[:10]

    def work(child: int) -> None:
        for i in range(50):
            at = (child * 50 + i) * 1000
            assert opened.read(0, at, 900) == SHARD[at : at + 900]

    in_children(work)
    assert opened.read(0, 20, 10) == SHARD[20:30]
    assert len(server.connections) == 5


# ---- fsspec ----------------------------------------------------------------------------------------


class Flaky(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """memory:// that raises `faults` first, or gives one byte less for 'short'."""

    protocol = "flaky"
    faults: list[Exception | str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        fault = self.faults.pop(0) if self.faults else ""
        if isinstance(fault, Exception):
            raise fault
        data: bytes = super().cat_file(path, start, end)
        return data[:-1] if fault == "short" else data


@pytest.fixture
def bucket() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.tar", SHARD)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.faults.clear()
    yield "memory://bucket/a.tar"
    memory.store.clear()


def test_fsspec_ranges_sizes_and_downloads(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DOWNLOAD_PIECE", 200_000)
    opened = Storage([Place(bucket, len(SHARD), "")])
    opened.expect(0, 0, 10)
    assert opened.read(0, 70_000, 12_345) == SHARD[70_000 : 70_000 + 12_345]
    assert opened.read(0, len(SHARD) - 9, 9) == SHARD[-9:]
    assert size(bucket) == len(SHARD)
    assert fetch(bucket) == SHARD
    download(bucket, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == SHARD
    assert fetch(f"file://{tmp_path}/a.tar") == SHARD
    for call in (fetch, size):
        with pytest.raises(FileNotFoundError, match="memory://bucket/b: not there"):
            call("memory://bucket/b")


def test_fsspec_faults_that_pass(bucket: str, pauses: list[float]) -> None:
    Flaky.faults += [RuntimeError("slow down"), "short", TimeoutError()]
    assert Storage([Place("flaky://bucket/a.tar", len(SHARD), "")]).read(0, 5, 100) == SHARD[5:105]
    assert len(pauses) == 3


class NoCredentialsError(Exception):
    """botocore's name, and a text that shows a secret."""


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (PermissionError("http://h/a?sig=SECRET"), PermissionError, r"http://h/a\?\.\.\.: check the URL"),
        (ValueError("bad bucket"), OSError, "bad bucket"),
        (NoCredentialsError("for http://u:SECRET@h/"), PermissionError, "for http://h/: set the credentials"),
    ],
)
def test_fsspec_faults_that_do_not_pass(
    bucket: str, fault: Exception, kind: type[OSError], words: str, pauses: list[float]
) -> None:
    Flaky.faults += [fault]
    with pytest.raises(kind, match=words) as error:
        fetch("flaky://bucket/a.tar")
    assert "SECRET" not in str(error.value)
    assert not pauses


def test_fsspec_tries_end(bucket: str) -> None:
    Flaky.faults += [RuntimeError("slow down http://h/a?sig=SECRET")] * 9
    with pytest.raises(OSError, match=r"flaky://bucket/a\.tar: RuntimeError: slow down http://h/a\?\.\.\., 9 times"):
        fetch("flaky://bucket/a.tar")


def test_a_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(OSError, match=r"s3://bucket/a\.tar: pip install s3fs"):
        Storage([Place("s3://bucket/a.tar", 10, "")]).read(0, 0, 10)
    with pytest.raises(OSError, match="pip install gcsfs"):
        fetch("gs://bucket/a.tar")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(OSError, match=r"s4://b/a: Protocol not known: s4"):
        fetch("s4://b/a")


# ---- cache -----------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    border=st.sampled_from(range(10)),
    delta=st.integers(-3, 3) | st.integers(-PAGE, PAGE),
    count=st.integers(1, 9) | st.integers(1, 3 * BLOCK),
)
def test_any_range_is_right_with_and_without_a_cache(
    server: Server, cache: Cache, border: int, delta: int, count: int
) -> None:
    at = min(max(border * PAGE + delta, 0), len(SHARD) - 1)
    count = min(count, len(SHARD) - at)
    places = [server.place("/b.tar"), server.place()]
    assert Storage(places).read(1, at, count) == SHARD[at : at + count]
    assert Storage(places, cache).read(1, at, count) == SHARD[at : at + count]
    assert Storage(places, cache).read(0, at, count) == SHARD[::-1][at : at + count]


def test_a_block_is_fetched_once(server: Server, cache: Cache) -> None:
    opened = Storage([server.place("/b.tar"), server.place()], cache)
    opened.read(0, 0, 1)
    server.asked.clear()
    before = len(os.listdir("/proc/self/fd"))
    assert opened.read(1, BLOCK + 5, 100) == SHARD[BLOCK + 5 : BLOCK + 105]
    assert server.asked == [f"bytes={BLOCK}-{2 * BLOCK - 1}"]
    opened.expect(1, 0, len(SHARD))
    again = Storage([server.place()], Cache(cache.folder, cache.limit, BLOCK))
    assert again.read(0, BLOCK, BLOCK) == SHARD[BLOCK : 2 * BLOCK]
    assert len(server.asked) == 1
    assert again.read(0, 0, len(SHARD)) == SHARD
    assert len(server.asked) == len(blocks(cache)) - 1 == 5
    assert server.asked[-1] == f"bytes={4 * BLOCK}-{len(SHARD) - 1}"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_new_signature_finds_the_old_blocks_and_another_shard_does_not(server: Server, cache: Cache) -> None:
    for query, sha256, requests in (("?sig=1", "00", 1), ("?sig=2", "00", 1), ("?sig=2", "01", 2)):
        Storage([Place(server.url("/a.tar" + query), len(SHARD), sha256)], cache).read(0, 0, 10)
        assert len(server.asked) == requests
    Storage([Place(server.url("/a.tar?sig=3"), len(SHARD), "01")], Cache(cache.folder, cache.limit, PAGE)).read(
        0, 0, 10
    )
    Storage([Place(server.url("/a.tar?sig=3"), len(SHARD), "01")], cache).read(0, 0, 10)
    assert len(server.asked) == 3  # blocks of another size lie beside them


def test_local_places_are_cached_too(local: Place, cache: Cache) -> None:
    assert Storage([local], cache).read(0, 5, BLOCK) == SHARD[5 : 5 + BLOCK]
    os.remove(local.url)
    assert Storage([local], cache).read(0, 5, BLOCK) == SHARD[5 : 5 + BLOCK]


def spoil_page(content: bytes) -> bytes:
    return content[:70_000] + bytes([content[70_000] ^ 1]) + content[70_001:]


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_page,
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:50_000],
        lambda content: b"",
        lambda content: bytes(len(content)),
    ],
    ids=["page", "trailer", "short", "long", "half", "empty", "zeros"],
)
def test_a_damaged_block_is_fetched_anew(server: Server, cache: Cache, spoil: Callable[[bytes], bytes]) -> None:
    opened = Storage([server.place()], cache)
    opened.read(0, 0, 10)
    (block,) = blocks(cache)
    whole = block.read_bytes()
    block.write_bytes(spoil(whole))
    assert opened.read(0, 69_000, 2000) == SHARD[69_000:71_000]
    assert len(server.asked) == 2
    assert block.read_bytes() == whole
    assert opened.read(0, 69_000, 2000) == SHARD[69_000:71_000]
    assert len(server.asked) == 2


def test_only_the_pages_of_a_range_are_verified(server: Server, cache: Cache) -> None:
    """What makes a hit of 32 KB cheap in a block of 8 MiB."""
    opened = Storage([server.place()], cache)
    opened.read(0, 0, 10)
    (block,) = blocks(cache)
    block.write_bytes(spoil_page(block.read_bytes()))
    assert opened.read(0, 0, PAGE) == SHARD[:PAGE]
    assert len(server.asked) == 1


def test_forgotten_blocks_are_fetched_anew(server: Server, cache: Cache) -> None:
    opened = Storage([server.place()], cache)
    server.files["/a.tar"] = bytes(len(SHARD))
    assert opened.read(0, 0, len(SHARD)) == bytes(len(SHARD))
    server.files["/a.tar"] = SHARD
    opened.forget(0, BLOCK - 1, 2)
    assert opened.read(0, 0, 3 * BLOCK) == SHARD[: 2 * BLOCK] + bytes(BLOCK)
    assert len(server.asked) == 5 + 2
    opened.forget(0, 0, len(SHARD))
    opened.forget(0, 0, len(SHARD))
    assert opened.read(0, 0, len(SHARD)) == SHARD


def test_processes_share_what_one_fetches(server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # they wait for each other
    opened = Storage([server.place("/b.tar"), server.place()], cache)
    start = multiprocessing.get_context("fork").Barrier(6)

    def work(child: int) -> None:
        start.wait(30)
        for i in range(10):
            at = (i + child // 3) % 10 * 59_000
            assert opened.read(1, at, 59_000) == SHARD[at : at + 59_000]

    in_children(work, 6)
    assert sorted(Counter(server.asked).values()) == [1] * 5
    assert len(blocks(cache)) == 5


def test_a_process_killed_in_its_fetch_blocks_nobody(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Storage([server.place()], cache)

    def end(*args: object) -> bytes:
        os.kill(os.getpid(), 9)
        raise AssertionError

    child = multiprocessing.get_context("fork").Process(target=lambda: cache.read(opened.places[0], 0, 10, end))
    child.start()
    child.join(30)
    assert child.exitcode == -9
    monkeypatch.setattr(storage, "_sleep", lambda pause: pytest.fail("waited for a lock that nobody holds"))
    assert opened.read(0, 0, 10) == SHARD[:10]


def test_a_lock_does_not_stay_with_a_child_forked_under_it(cache: Cache) -> None:
    context = multiprocessing.get_context("fork")
    done = context.Event()
    path = cache.folder / ".locks" / "000"
    with storage._locked(path):
        child = context.Process(target=done.wait, args=(30,))
        child.start()
    with storage._locked(path):
        done.set()
    child.join(30)
    assert child.exitcode == 0


def test_a_holder_that_hangs_is_waited_for_but_not_for_ever(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setattr(storage, "_LOCKS", 1)
    monkeypatch.setattr(storage, "_now", lambda: sum(pauses))
    with storage._locked(cache.folder / ".locks" / "000"):
        assert Storage([server.place()], cache).read(0, 0, 10) == SHARD[:10]
    assert sum(pauses) == pytest.approx(storage._LONGEST_WAIT, abs=1)


def test_without_locks_blocks_are_cached_and_evicted_all_the_same(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    cache.limit = 3 * BLOCK
    opened = Storage([server.place()], cache)
    assert opened.read(0, 0, len(SHARD)) == SHARD
    assert opened.read(0, len(SHARD) - 1, 1) == SHARD[-1:]
    assert len(server.asked) == 5
    assert 0 < used(cache) <= cache.limit


def test_a_torn_write_is_no_block_and_is_swept_away(server: Server, cache: Cache) -> None:
    opened = Storage([server.place()], cache)
    opened.read(0, 0, 10)
    (block,) = blocks(cache)
    old, young = block.with_name(".tmpkilled"), block.with_name(".tmpwriting")
    for torn in (old, young):
        block.replace(torn)
        torn.write_bytes(torn.read_bytes()[:70_000])
        assert opened.read(0, 0, 10) == SHARD[:10]
    os.utime(old, (1, 1))
    assert len(server.asked) == 3
    cache._evict(0)
    assert not old.exists()
    assert young.exists()
    assert blocks(cache) == [block]


def test_the_limit_is_kept_and_the_newest_stay(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "small", 8 * BLOCK, BLOCK)
    content = os.urandom(40 * BLOCK)
    server.files["/big.tar"] = content
    opened = Storage([server.place("/big.tar")], cache)
    most = 0
    for number in [*range(40), *range(40)]:
        assert opened.read(0, number * BLOCK + 3, 50) == content[number * BLOCK + 3 : number * BLOCK + 53]
        for age, path in enumerate(sorted(blocks(cache), key=lambda p: p.stat().st_mtime_ns)):
            os.utime(path, ns=(0, 10**9 * (age + 1)))  # the clock of a file system may be coarse
        most = max(most, used(cache))
    assert 6 * BLOCK < most <= 8 * BLOCK
    requests = len(server.asked)
    for number in (39, 38, 37):
        opened.read(0, number * BLOCK, 50)
    assert len(server.asked) == requests


def test_a_block_in_use_is_the_last_to_go(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "small", 8 * BLOCK, BLOCK)
    server.files["/big.tar"] = os.urandom(40 * BLOCK)
    opened = Storage([server.place("/big.tar")], cache)
    for number in range(40):
        opened.read(0, number * BLOCK, 50)
        for path in blocks(cache):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 90 * 10**9))  # a minute and a half passes
        opened.read(0, 0, 50)
    assert server.asked.count(f"bytes=0-{BLOCK - 1}") == 1


def test_a_hit_is_noted_once_a_minute(server: Server, cache: Cache) -> None:
    opened = Storage([server.place()], cache)
    opened.read(0, 0, 50)
    (block,) = blocks(cache)
    written = block.stat().st_mtime
    for ago, noted in ((30, False), (90, True)):
        os.utime(block, (written - ago, written - ago))
        opened.read(0, 0, 50)
        assert (block.stat().st_mtime >= written) == noted


def test_old_blocks_without_a_count_are_counted(server: Server, tmp_path: Path) -> None:
    wide = Cache(tmp_path / "cache", 64 * BLOCK, BLOCK)
    server.files["/big.tar"] = os.urandom(20 * BLOCK)
    Storage([server.place("/big.tar")], wide).read(0, 0, 20 * BLOCK)
    (wide.folder / ".usage").unlink()
    narrow = Cache(tmp_path / "cache", 8 * BLOCK, BLOCK)
    Storage([server.place()], narrow).read(0, 0, 10)
    assert used(narrow) <= 8 * BLOCK


def test_processes_keep_the_limit_together(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # they wait for each other
    cache = Cache(tmp_path / "small", 8 * BLOCK, BLOCK)
    content = os.urandom(40 * BLOCK)
    server.files["/big.tar"] = content
    opened = Storage([server.place("/big.tar")], cache)

    def work(child: int) -> None:
        for i in range(60):
            at = (i * 7 + child * 11) % 39 * BLOCK + 100
            assert opened.read(0, at, BLOCK) == content[at : at + BLOCK]
            # A block of each beyond the limit; and what others evict and write while this one counts is counted twice.
            assert used(cache) <= (8 + 2 * 4) * BLOCK + PAGE

    in_children(work)
    assert used(cache) > 4 * BLOCK


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_disk_fails_no_read(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    opened = Storage([server.place()], cache)
    opened.read(0, 0, 10)
    write, written = os.write, 0

    def full(handle: int, data: bytes) -> int:
        nonlocal written
        if len(data) < 1000:  # the count still fits
            return write(handle, data)
        if written:
            raise OSError(code, os.strerror(code))
        written = write(handle, data[:50_000])
        return written

    monkeypatch.setattr(os, "write", full)
    for at in (BLOCK, 2 * BLOCK, 0):
        assert opened.read(0, at, 100) == SHARD[at : at + 100]
    assert written == 50_000
    assert server.asked[1:] == [f"bytes={BLOCK}-{2 * BLOCK - 1}", f"bytes={2 * BLOCK}-{2 * BLOCK + 99}"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"cache {cache.folder}: {os.strerror(code)}" in told
    assert len(list(cache.folder.glob("[0-9a-f][0-9a-f]/*"))) == 1
    monkeypatch.undo()
    cache._full_until = 0
    opened.read(0, BLOCK, 100)
    assert len(blocks(cache)) == 2


def test_a_folder_deleted_under_a_run_fails_no_read(server: Server, cache: Cache) -> None:
    opened = Storage([server.place()], cache)
    opened.read(0, 0, 10)
    shutil.rmtree(cache.folder)
    assert opened.read(0, 0, 10) == SHARD[:10]


def test_a_cache_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give it 67,108,864 or more"):
        Cache(tmp_path / "c", 60 << 20)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/c: Not a directory: give a folder on a disk of the node"):
        Cache(tmp_path / "file" / "c", 1 << 30)
    with pytest.raises(ValueError, match="give a folder on a disk of the node"):
        Cache("/proc/cache", 1 << 30)


def test_the_folder_is_private_unless_it_was_there(tmp_path: Path) -> None:
    Cache(tmp_path / "a" / "b", 1 << 30)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "c").mkdir(mode=0o750)
    Cache(tmp_path / "c", 1 << 30)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o750


def test_local_reads_load_neither_urllib3_nor_fsspec(local: Place, cache: Cache) -> None:
    code = (
        "import sys; from vitdist.data.storage import *; "
        f"Storage([Place({local.url!r}, {local.bytes}, '')], Cache({str(cache.folder)!r}, 1 << 30)).read(0, 0, 9); "
        "print({'urllib3', 'fsspec', 'torch', 'webdataset'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_all_of_a_range_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that Linux follows whole, next to each other."""
    (tmp_path / "s.tar").write_bytes(bytes(1_000_000))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, start, size, advice: asked.append((start, size)))
    Storage([Place(str(tmp_path / "s.tar"), 1_000_000, "")]).expect(0, 1000, 500_000)
    assert max(size for _, size in asked) <= 128 << 10
    assert asked[0][0] == 1000
    assert all(start + size == following for (start, size), (following, _) in itertools.pairwise(asked))
    assert sum(asked[-1]) == 501_000
