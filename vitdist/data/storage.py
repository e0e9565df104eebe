"""Bytes of shards, wherever they lie: on a disk, behind http(s)://, in s3:// gs:// or another fsspec place.

    storage = Storage([Place("/data/a.tar", 1_000_000, sha256), Place("https://host/b.tar", 2_000_000, sha256)],
                      Cache("/nvme/vitdist", limit_bytes=500 << 30))
    storage.expect(1, 4096, 100_000)       # read soon
    storage.read(1, 4096, 100_000)         # exactly these bytes, or an OSError in one line

A cache is a folder on a disk of the node that all its ranks and loader processes share:

    FOLDER/ab/abcd...-17    block 17 of a shard, then the CRC-32 of each page of it, then that of these CRCs
    FOLDER/.usage           as long as the cache holds units of 64 KiB: whoever writes a block appends first
    FOLDER/.evict .locks/   locks of the kernel, which go with the process that holds them

Made before a fork, all of it works after it, in many children at once. Imports no torch; urllib3 and fsspec only
for a URL that needs them. Secrets in URLs (user:password@, ?signature) are never shown.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from isal.isal_zlib import crc32  # 10 GB/s on one core, zlib 2.7

from vitdist import rundir

if TYPE_CHECKING:
    import urllib3

T = TypeVar("T")

# Open shards of one Storage; a window of the order has up to 64, and 1024 is a common limit for all files.
_OPEN_SHARDS = 512
# Seconds between two tries, in sum a minute: a restart of a storage server or a throttled bucket passes in it.
_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_CONNECT_SECONDS, _SILENT_SECONDS, _LONGEST_RETRY_AFTER = 10, 60, 120
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}
_DOWNLOAD_PIECE = 32 << 20
# A sample of 32 KB is verified by reading two pages of its block, not all 8 MiB.
_PAGE = 64 << 10
# A process that waits longer for another one's fetch (which tries for a minute) fetches by itself.
_LONGEST_WAIT = 120.0
_LOCKS = 1024
# Of the count in .usage, which for a cache of 1 TB is 16 MB long then.
_UNIT = 64 << 10
_TOUCH_SECONDS, _LEFTOVER_SECONDS, _FULL_SECONDS = 60, 600, 60
_FEWEST_BLOCKS = 8

_SCHEME = re.compile(r"(\w[\w+.-]*)(?:::\w[\w+.-]*)*://|(pipe):")
# What stands before the @ of a host, also a password with an unquoted slash in it (but not host:8080/a@b).
_LOGIN = re.compile(r"(?<=://)(?:[^/?#\s]*|[^/?#@\s]*:(?!\d+/)[^@\s]*)@")
_QUERY = re.compile(r"[?]\S+")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
# Not random's shared generator: the seed of augmentations is nothing to draw pauses from.
_jitter = random.SystemRandom()
_told: set[str] = set()
_now, _sleep = time.monotonic, time.sleep


class Place(NamedTuple):
    """Where one shard lies: a local path or a URL."""

    url: str
    bytes: int
    sha256: str


class _Fleeting(Exception):
    """May pass if tried again, after `pause` seconds if the server names them."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def is_remote(place: str) -> bool:
    """Whether `place` has a scheme (http:// s3:// file:// memory://, and pipe:, which is refused later)."""
    return _SCHEME.match(place) is not None


def fetch(url: str) -> bytes:
    """A small file whole. Raises FileNotFoundError if it is not there, another OSError if it cannot be had."""
    if _is_http(url):
        body = io.BytesIO()
        _http_whole(url, body)
        return body.getvalue()
    return _through_fsspec(url, lambda system, path: system.cat_file(path))


def size(url: str) -> int:
    """Bytes of a remote file. Raises OSError as `fetch` does."""
    return _http_size(url)[0] if _is_http(url) else _fsspec_size(url)


def download(url: str, path: Path) -> None:
    """A large file to `path`, which appears whole. After a dropped connection it goes on where it was.

    Raises OSError as `fetch` does. From a server without ranges it starts again from the beginning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    total, ranges = _http_size(url) if _is_http(url) else (_fsspec_size(url), True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if ranges:
                for at in range(0, total, _DOWNLOAD_PIECE):
                    file.write(_remote(url, at, min(_DOWNLOAD_PIECE, total - at), total))
            else:
                _http_whole(url, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    rundir.sync_folder(path.parent)


# Linux cuts one call to what the device takes at once (of 6 MB, 4 were read where read-ahead was 128 KiB); smaller
# calls are followed whole.
_ADVICE = 128 << 10


class Storage:
    def __init__(self, places: Sequence[Place], cache: "Cache | None" = None) -> None:
        """Raises ValueError for a place that cannot be read in ranges (pipe:)."""
        for place in places:
            _refuse_pipe(place.url)
        self.places, self.cache = places, cache
        self._on_disk = [cache is None and not is_remote(place.url) for place in places]
        # Opened on first use. A forked process may inherit open shards: pread has no position to share.
        self._open = functools.lru_cache(_OPEN_SHARDS)(_open_file)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises OSError that names the shard and the way out."""
        place = self.places[shard]
        if offset < 0 or size < 0 or offset + size > place.bytes:
            raise OSError(
                f"{shown(place.url)}: bytes {offset:,} to {offset + size:,} asked for, it has {place.bytes:,}: "
                "index the shards again"
            )
        if not size:
            return b""
        if self.cache is not None:
            return self.cache.read(place, offset, size, functools.partial(self._fetch, place))
        return self._fetch(place, offset, size)

    def read_into(self, shard: int, offset: int, view: memoryview) -> None:
        """`read` into memory of the caller's: a local file saves a copy and the memory for it."""
        done = 0
        if self._on_disk[shard] and offset >= 0:
            try:
                handle = self._open(self.places[shard].url).fileno()
                while done < len(view) and (more := os.preadv(handle, [view[done:] if done else view], offset + done)):
                    done += more
            except OSError:
                done = 0
        if done < len(view):  # from elsewhere, or not whole: `read` gets it, or says why not
            view[:] = self.read(shard, offset, len(view))

    def expect(self, shard: int, offset: int, size: int) -> None:
        """Have the kernel read this range ahead, if it lies on a disk. Never raises."""
        place = self.places[shard]
        with contextlib.suppress(OSError):
            if self.cache is not None:
                self.cache.expect(place, offset, size)
            elif not is_remote(place.url):
                handle = self._open(place.url).fileno()
                for start in range(offset, offset + size, _ADVICE):
                    os.posix_fadvise(handle, start, min(_ADVICE, offset + size - start), os.POSIX_FADV_WILLNEED)

    def forget(self, shard: int, offset: int, size: int) -> None:
        """Drop the cached blocks of a range that turned out wrong: the next read fetches them anew."""
        if self.cache is not None:
            self.cache.forget(self.places[shard], offset, size)

    def _fetch(self, place: Place, offset: int, size: int) -> bytes:
        """Past the cache."""
        if is_remote(place.url):
            return _remote(place.url, offset, size, place.bytes)
        try:
            data = _pread(self._open(place.url).fileno(), offset, size)
        except OSError as error:
            reason = f"{place.url}: {error.strerror}: is its disk mounted on this node, and may you read it?"
            raise type(error)(reason) from None
        if len(data) < size:
            raise OSError(
                f"{place.url}: cut off at byte {offset + len(data):,} of {place.bytes:,}: copy the shard again"
            )
        return data


def _open_file(path: str) -> io.FileIO:
    return open(path, "rb", buffering=0)


def _pread(handle: int, offset: int, size: int) -> bytes:
    """Up to the end of the file: one pread gives 2 GiB at most, and less if a signal comes in between."""
    data = os.pread(handle, size, offset)
    while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
        data += more
    return data


def shown(text: str) -> str:
    """A URL, or the text of an error with URLs in it, without passwords and signatures."""
    return _QUERY.sub("?...", _LOGIN.sub("", text))


def _tell_once(what: str, message: str) -> None:
    if what not in _told:
        _told.add(what)
        print(message, file=sys.stderr, flush=True)


# ---- cache ----------------------------------------------------------------------------------------


class Cache:
    """A folder of blocks. Over its limit by no more than what is being written at the moment."""

    def __init__(self, folder: str | Path, limit_bytes: int, block_bytes: int = 8 << 20) -> None:
        """Raises ValueError for a folder that cannot be made or written to, or a limit of less than 8 blocks."""
        self.folder, self.limit, self.block = Path(folder), limit_bytes, block_bytes
        if limit_bytes < _FEWEST_BLOCKS * block_bytes:
            raise ValueError(
                f"cache {folder}: a limit of {limit_bytes:,} bytes is too small: "
                f"give it {_FEWEST_BLOCKS * block_bytes:,} or more, or use no cache"
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / ".locks").mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                self._full_until = 0.0
        except OSError as error:
            raise ValueError(
                f"cache {folder}: {error.strerror}: give a folder on a disk of the node that you can write to"
            ) from None

    def read(self, place: Place, offset: int, size: int, source: Callable[[int, int], bytes]) -> bytes:
        """The range, from blocks that are here or that `source(offset, size)` fetches."""
        parts = []
        for number in self._numbers(offset, size):
            at = number * self.block
            start, end = max(offset - at, 0), min(offset + size - at, self.block)
            path, length = self._path(place, number), min(self.block, place.bytes - at)
            part = _verified(path, length, start, end)
            parts.append(self._miss(path, at, length, start, end, source) if part is None else part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def expect(self, place: Place, offset: int, size: int) -> None:
        """Have the kernel read ahead what is here of the range. Raises OSError at the first block that is not."""
        for number in self._numbers(offset, size):
            handle = os.open(self._path(place, number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                start = max(offset - number * self.block, 0)
                end = min(offset + size - number * self.block, self.block)
                os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def forget(self, place: Place, offset: int, size: int) -> None:
        for number in self._numbers(offset, size):
            self._path(place, number).unlink(missing_ok=True)

    def _numbers(self, offset: int, size: int) -> range:
        return range(offset // self.block, -(-(offset + size) // self.block))

    def _path(self, place: Place, number: int) -> Path:
        digest = _digest(place, self.block)
        return self.folder / digest[:2] / f"{digest}-{number}"

    def _miss(
        self, path: Path, at: int, length: int, start: int, end: int, source: Callable[[int, int], bytes]
    ) -> bytes:
        if _now() < self._full_until:
            return source(at + start, end - start)
        with self._only_fetcher(path):
            # Another process may have fetched it meanwhile.
            if (part := _verified(path, length, start, end)) is not None:
                return part
            block = source(at, length)
            self._store(path, block)
        return block[start:end]

    @contextlib.contextmanager
    def _only_fetcher(self, path: Path) -> Iterator[None]:
        """Hold this block against others who would fetch it; some share a lock, since locks are kept for ever.

        Without it (a file system that has no locks, a holder that was stopped) a block is only fetched twice.
        """
        lock = int(hashlib.blake2b(path.name.encode(), digest_size=4).hexdigest(), 16) % _LOCKS
        with contextlib.ExitStack() as stack:
            deadline, pause = _now() + _LONGEST_WAIT, 0.001
            while _now() < deadline:
                try:
                    stack.enter_context(_locked(self.folder / ".locks" / f"{lock:03x}"))
                    break
                except BlockingIOError:
                    _sleep(pause)
                    pause = min(2 * pause, 0.03)
                except OSError:
                    break
            yield

    def _store(self, path: Path, block: bytes) -> None:
        """Let the block appear, without an fsync: what a power cut tears is found by its CRCs."""
        view = memoryview(block)
        table = struct.pack(
            f"<{_pages(len(block))}I", *(crc32(view[i : i + _PAGE]) for i in range(0, len(block), _PAGE))
        )
        trailer = table + struct.pack("<I", crc32(table))
        temporary = None
        try:
            self._claim(len(block) + len(trailer))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
            try:
                for part in (view, memoryview(trailer)):
                    while part:
                        part = part[os.write(handle, part) :]
            finally:
                os.close(handle)
            os.rename(temporary, path)
        except OSError as error:
            # Then, for a while, what is read comes from the source without its block around it.
            self._full_until = _now() + _FULL_SECONDS
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
            _tell_once(
                f"store {self.folder}",
                f"cache {self.folder}: {error.strerror}, {free:,} bytes free: reads go on without it; "
                "make room there or lower the cache's limit",
            )

    def _claim(self, size: int) -> None:
        """Count `size` bytes as used, for all processes at once, and make room if that is over the limit."""
        units = _units(size)
        handle = os.open(self.folder / ".usage", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, bytes(units))
            used = os.fstat(handle).st_size
        finally:
            os.close(handle)
        # Nothing but our own: the count is new, the blocks may be older.
        if used == units or used > self.limit // _UNIT:
            self._evict(size)

    def _evict(self, coming: int) -> None:
        """Delete the blocks not used for longest down to 90 % of the limit, unless another process is at it."""
        usage = self.folder / ".usage"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(self.folder / ".evict"))
            except BlockingIOError:
                return
            except OSError:
                _tell_once("locks", f"cache {self.folder}: no file locks here, so some blocks are fetched twice")
            before, now, files = usage.stat().st_size, time.time(), []
            for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        status, unfinished = entry.stat(), entry.name[0] == "."
                        # Of a process that was killed while it wrote.
                        leftover = unfinished and now - status.st_mtime > _LEFTOVER_SECONDS
                        files.append((not leftover, status.st_mtime, status.st_size, unfinished, entry.path))
            used = coming + sum(size for _, _, size, _, _ in files)
            goal = 0.9 * self.limit if used > self.limit else used
            for alive, _, size, unfinished, path in sorted(files):
                if not alive or (used > goal and not unfinished):
                    Path(path).unlink(missing_ok=True)
                    used -= size
            # What others claimed during the count stays claimed.
            os.truncate(usage, _units(used) + max(usage.stat().st_size - before, 0))


@functools.lru_cache(4096)
def _digest(place: Place, block: int) -> str:
    """Name of a shard's blocks; with the URL as shown, since a signature is renewed every few hours."""
    identity = f"1 {shown(place.url)} {place.sha256} {place.bytes} {block}"
    return hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=20).hexdigest()


def _units(size: int) -> int:
    return -(-max(size, 0) // _UNIT)


def _pages(length: int) -> int:
    return -(-length // _PAGE)


def _verified(path: Path, length: int, start: int, end: int) -> bytes | None:
    """Bytes start to end of a block file, or None if it is not there, of another length, or fails a CRC."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status, tables = os.fstat(handle), 4 * _pages(length)
        first, last = start // _PAGE, _pages(end)
        begin = first * _PAGE
        data = _pread(handle, begin, min(last * _PAGE, length) - begin)
        trailer = _pread(handle, length, tables + 4)
        if status.st_size != length + tables + 4 or struct.unpack("<I", trailer[-4:])[0] != crc32(trailer[:-4]):
            return None
        view = memoryview(data)
        for page, crc in enumerate(struct.unpack_from(f"<{last - first}I", trailer, 4 * first)):
            if crc32(view[page * _PAGE : (page + 1) * _PAGE]) != crc:
                return None
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            os.utime(handle)
        return data[start - begin : end - begin]
    except OSError:
        return None  # a failing disk: the source has it
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path`. Raises BlockingIOError if somebody else does, another OSError where there are no locks."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            # Not by the close alone: a process forked meanwhile has the same lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


# ---- remote ---------------------------------------------------------------------------------------


def _scheme(url: str) -> str:
    match = _SCHEME.match(url)
    return (match[1] or match[2]).lower() if match else ""


def _is_http(url: str) -> bool:
    _refuse_pipe(url)
    return _scheme(url) in ("http", "https")


def _refuse_pipe(url: str) -> None:
    if _scheme(url) == "pipe":
        raise ValueError(
            "pipe: gives a stream, not ranges: name the http(s):// or s3:// URL, or save it to a disk first"
        )


def _remote(url: str, offset: int, size: int, total: int) -> bytes:
    if _is_http(url):
        return _http_range(url, offset, size, total)

    def cat(system: Any, path: str) -> bytes:
        data = system.cat_file(path, start=offset, end=offset + size)
        if len(data) != size:
            raise _Fleeting(f"{len(data):,} bytes came, not the {size:,} from byte {offset:,} on")
        return data

    return _through_fsspec(url, cat)


def _patiently(url: str, once: Callable[[], T]) -> T:
    """`once()`, again while it fails with _Fleeting. Raises OSError that names `url` after the last try."""
    tries = 0
    while True:
        try:
            return once()
        except _Fleeting as fleeting:
            reason, pause = shown(str(fleeting)), fleeting.pause
        tries += 1
        if tries > len(_PAUSES):
            raise OSError(f"{shown(url)}: {reason}, {tries} times: is it up, and does this node reach it?")
        if tries == 4:
            _tell_once("again", f"{shown(url)}: {reason}, {tries} times; trying on for a minute")
        _sleep(max(_PAUSES[tries - 1] * _jitter.uniform(0.5, 1), pause))


# ---- http ------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def _pool(process: int) -> "urllib3.PoolManager":
    """Connections of this process: two that share one after a fork would read each other's answers."""
    import urllib3

    return urllib3.PoolManager(
        maxsize=16,
        timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_SILENT_SECONDS),
        # Redirects only. Tries are counted by `_patiently`, which counts bodies that break off, too; and urllib3
        # would log the whole URL, signature included, to stderr at every try.
        retries=urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False
        ),
    )


@contextlib.contextmanager
def _answer(url: str, byte_range: str = "") -> "Iterator[urllib3.BaseHTTPResponse]":
    """An answer 200, 206 or 416 to a GET. Raises _Fleeting where another try may help, else OSError."""
    import urllib3
    from urllib3.exceptions import HTTPError, InvalidHeader, LocationValueError, MaxRetryError

    told = shown(url)
    response = None
    try:
        parts = urllib3.util.parse_url(url)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={byte_range}"} if byte_range else {})
        if parts.auth:
            headers |= urllib3.util.make_headers(basic_auth=_unquoted(parts.auth))
        plain = parts._replace(auth=None).url
        response = _pool(os.getpid()).request("GET", plain, headers=headers, preload_content=False)
        status = response.status
        if status in _TRY_AGAIN:
            pause = 0.0
            with contextlib.suppress(InvalidHeader):
                pause = min(urllib3.Retry().get_retry_after(response) or 0.0, _LONGEST_RETRY_AFTER)
            raise _Fleeting(f"HTTP {status} {response.reason}", pause)
        if status in (404, 410):
            raise FileNotFoundError(f"{told}: not there (HTTP {status}): check the name")
        if status in (401, 403):
            raise PermissionError(
                f"{told}: not allowed (HTTP {status}): check user and password, or ask for a new signed URL"
            )
        if status not in (200, 206, 416):
            raise OSError(f"{told}: HTTP {status} {response.reason}: open it with curl to see what the server says")
        yield response
    except LocationValueError:
        raise OSError(f"{told}: no valid URL: write it as http(s)://host/path") from None
    except HTTPError as error:
        reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        raise _Fleeting(f"{reason}") from None
    finally:
        if response is not None:
            response.close()  # a body that was not read to its end is dropped with its connection


def _unquoted(login: str) -> str:
    from urllib.parse import unquote

    return unquote(login)


def _http_range(url: str, offset: int, size: int, total: int) -> bytes:
    wanted = f"bytes {offset}-{offset + size - 1}/{total}"

    def once() -> bytes:
        with _answer(url, f"{offset}-{offset + size - 1}") as response:
            if response.status == 200:
                raise OSError(
                    f"{shown(url)}: the server ignores ranges: copy the shards to a disk, "
                    "or serve them from one that has ranges (nginx, S3; not python -m http.server)"
                )
            came = response.headers.get("Content-Range", "none").strip()
            if came not in (wanted, f"{wanted.partition('/')[0]}/*"):
                raise OSError(
                    f"{shown(url)}: asked for {wanted}, the server has {came}: "
                    "the shard was changed or cut: copy it again, or index it again"
                )
            body = response.read(size, decode_content=False)
            if len(body) != size:
                raise _Fleeting(f"the answer broke off after {len(body):,} of {size:,} bytes")
            return body

    return _patiently(url, once)


def _http_whole(url: str, file: BinaryIO) -> None:
    """The file into `file`, from the beginning at every try."""

    def once() -> None:
        file.seek(0)
        file.truncate()
        with _answer(url) as response:
            for piece in response.stream(1 << 20, decode_content=False):
                file.write(piece)

    _patiently(url, once)


def _http_size(url: str) -> tuple[int, bool]:
    """Bytes, and whether the server has ranges. By a GET of one byte: a URL signed for GET refuses HEAD."""

    def once() -> tuple[int, bool]:
        with _answer(url, "0-0") as response:
            ranges = response.status != 200
            text = response.headers.get("Content-Range" if ranges else "Content-Length", "")
            total = text.rpartition("/")[2]
            if not total.isdecimal():
                raise OSError(f"{shown(url)}: the server does not tell its size: copy it to a disk")
            return int(total), ranges

    return _patiently(url, once)


# ---- fsspec ----------------------------------------------------------------------------------------


def _through_fsspec(url: str, call: Callable[[Any, str], T]) -> T:
    """`call(file system, path)` with retries. fsspec keeps a file system for each process and thread by itself."""
    import fsspec

    told, scheme = shown(url), _scheme(url)

    def once() -> T:
        try:
            return call(*fsspec.core.url_to_fs(url))
        except _Fleeting:
            raise
        except ImportError as error:
            raise OSError(f"{told}: pip install {_PACKAGES.get(scheme, 'its package')} ({error})") from None
        except FileNotFoundError:
            raise FileNotFoundError(f"{told}: not there: check the name, and the endpoint of {scheme}://") from None
        except (PermissionError, IsADirectoryError, ValueError, TypeError, NotImplementedError) as error:
            kind = PermissionError if isinstance(error, PermissionError) else OSError
            raise kind(f"{told}: {shown(str(error))}: check the URL and what you may read") from None
        except Exception as error:  # backends raise all sorts: aiohttp's, botocore's, their own
            reason = f"{type(error).__name__}: {shown(str(error))}"
            # Missing or expired ones do not come by waiting: NoCredentialsError, DefaultCredentialsError, ...
            if "Credential" in type(error).__name__:
                raise PermissionError(f"{told}: {reason}: set the credentials of {scheme}:// on this node") from None
            raise _Fleeting(reason) from None

    return _patiently(url, once)


def _fsspec_size(url: str) -> int:
    found = _through_fsspec(url, lambda system, path: system.size(path))
    if found is None:
        raise OSError(f"{shown(url)}: its size is not told: copy it to a disk")
    return int(found)
