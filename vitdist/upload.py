"""One run's W&B parts brought to a server: what of them is not there yet. A child of `vitdist sync`, one for each run.

    python -m vitdist.upload RUN [--online] [--training]      # a line of JSON for each part that was looked at

W&B's own `wandb sync` does the sending, but never gets a part itself. Tried with 0.31 against tests/fake_wandb.py
(2026-11-28): it appends at the server's last line whatever it is given, so that a part which was cut off comes twice;
it marks a part as uploaded, with exit code 0, whose rows the server refused; it ends a run that still trains as failed;
it stops at a damaged record. So it gets a copy of the part with the whole records alone, without the rows that the
server has, and the part is marked here, once that went without an error.

How many rows of a part the server has: `.syncstate`, which wandb writes beside a part before its first row leaves,
says at which of the run's steps the part begins; the server says at which the run ends.
"""

import argparse
import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from vitdist import rundir
from vitdist.rundir import RunDir


def _bounds(what: str, times: int, wait_s: float, most_s: float, answer_s: float) -> dict[str, float]:
    values = {"retry_max": times, "retry_wait_min_seconds": wait_s, "retry_wait_max_seconds": most_s}
    return {f"x_{what}_{name}": value for name, value in (values | {"timeout_seconds": answer_s}).items()}


ANSWER_S = 20.0
BOUNDS = {
    **_bounds("graphql", times=2, wait_s=0.5, most_s=1.0, answer_s=ANSWER_S),
    **_bounds("file_stream", times=3, wait_s=1.0, most_s=10.0, answer_s=60.0),
    **_bounds("file_transfer", times=3, wait_s=1.0, most_s=10.0, answer_s=300.0),
}
"""Of one request and its repetitions, so that a sync ends. W&B's own for rows: 7 days."""
ANSWERED = "vitdist_rows"
"""In a part's .syncstate: rows that the server has answered for, whatever it says of the run's end a minute later."""
STREAMS = {"stats", "output", "output_raw", "alert", "preempting"}
"""Records that add something to the run each time they are sent. Others say what is the case, and may be repeated."""
ARTIFACTS = {"artifact", "use_artifact", "noop_link_artifact"}
ORPHAN_S = 3.0
"""wandb-core sends on for up to 2 s after a process that was killed (0.31): so long its rows are not counted."""
BLOCK, HEAD = 32768, 7

Tell = Callable[[dict[str, Any]], None]


class Part(NamedTuple):
    """One start's file of rows, as it was when it was looked at."""

    log: Path
    size: int
    started: float
    project: str
    """ENTITY/PROJECT/ID, without an entity where W&B shall choose."""
    rows: int
    ended: bool
    """Its writer said that it is at its end."""
    damaged: int
    artifacts: bool
    """Tables are among them."""

    @property
    def folder(self) -> Path:
        return self.log.parent

    @property
    def online(self) -> bool:
        return not self.folder.name.startswith("offline-")

    @property
    def state(self) -> Path:
        return self.log.with_name(f"{self.log.name}.syncstate")

    @property
    def known(self) -> dict[str, Any]:
        """What wandb keeps of it; empty where a kill came between the file and its content."""
        text = self.state.read_text() if self.state.exists() else ""
        return dict(json.loads(text)) if text else {}

    @property
    def begin(self) -> int | None:
        """The run's step that the first row got at the server; None where no row was ever sent."""
        return self.known.get("starting_step")


def folders(run: RunDir, online: bool) -> list[Path]:
    """The folders of a run's parts by the time of their start, which their names carry."""
    names = ("offline-run-*", "run-*") if online else ("offline-run-*",)
    found = [path for name in names for path in run.wandb.glob(name) if path.is_dir()]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def log_of(folder: Path) -> Path | None:
    """A part's file of rows. Raises OSError where the folder cannot be read."""
    return next((folder / name for name in sorted(os.listdir(folder)) if name.endswith(".wandb")), None)


def uploaded(log: Path) -> bool:
    """Whether all of a part was uploaded. W&B marks it by an empty file, ours holds the size: a part may grow again."""
    try:
        size = log.with_name(f"{log.name}.synced").read_text()
    except FileNotFoundError:
        return False
    return not size or size == str(log.stat().st_size)


# ---- W&B's file of rows ------------------------------------------------------------------------


def records(log: Path, size: int) -> Iterator[bytes | None]:
    """The records in the first `size` bytes: blocks of LevelDB's log after a head of 7 bytes; None for a damaged piece.

    A record that is cut off at the end is left out without a word: the writer was killed, or goes on.
    Raises ValueError for another kind of file.
    """
    with open(log, "rb") as file:
        if size and file.read(HEAD)[:4] != b":W&B"[: min(size, 4)]:
            raise ValueError("no file of W&B's rows")
        whole: bytes | None = None
        place = HEAD
        while place + HEAD <= size:
            left = BLOCK - place % BLOCK
            file.seek(place)
            if left < HEAD:
                place += left
                continue
            check, length, kind = struct.unpack("<IHB", file.read(HEAD))
            if length <= left - HEAD and place + HEAD + length > size:
                return
            piece = file.read(min(length, left - HEAD))
            if length > left - HEAD or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != check:
                whole = None
                place += left  # where the next record begins is known at the next block alone
                yield None
                continue
            place += HEAD + length
            if kind in (1, 2):
                whole = piece
            elif whole is not None:
                whole += piece
            if kind in (1, 4) and whole is not None:
                yield whole
                whole = None


def append(file: io.BufferedWriter, record: bytes) -> None:
    """Add `record` to a file that has W&B's head."""
    first = True
    while first or record:
        left = BLOCK - file.tell() % BLOCK
        if left < HEAD:
            file.write(bytes(left))
            continue
        piece, record = record[: left - HEAD], record[left - HEAD :]
        kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]
        file.write(struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece)
        first = False


def look(log: Path, whole: bool) -> Part | None:
    """What a part holds; None if that is nothing. Without `whole` its rows are not counted."""
    from wandb.proto.wandb_internal_pb2 import Record

    size, rows, ended, damaged, artifacts, about = log.stat().st_size, 0, False, 0, False, None
    for data in records(log, size):
        if data is None:
            damaged += 1
            continue
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        rows += kind == "history"
        ended |= kind == "exit"
        artifacts |= kind in ARTIFACTS
        if kind == "run" and about is None:
            about = record.run
            if not whole:
                break
    if about is None:
        if damaged:
            raise ValueError("damaged where it says which run it is of")
        return None
    path = "/".join(name for name in (about.entity, about.project, about.run_id) if name)
    return Part(log, size, about.start_time.ToNanoseconds() / 1e9, path, rows, ended, damaged, artifacts)


def copy(part: Part, to: Path, without: int, unfinished: bool, bare: bool = False) -> None:
    """Write `part` to `to` without its first rows, that many. Files and models of one that is unfinished come later.

    `bare`: without artifacts, whatever it is.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    seen = 0
    with open(part.log, "rb") as source, open(to, "wb") as file:
        file.write(source.read(HEAD))
        for data in records(part.log, part.size):
            if data is None:
                continue
            kind = Record.FromString(data).WhichOneof("record_type")
            old = seen < without
            seen += kind == "history"
            if old and (kind in STREAMS or kind == "history" or (unfinished and kind == "files")):
                continue
            if (unfinished or bare) and kind in ARTIFACTS:
                continue
            append(file, data)


# ---- a run -------------------------------------------------------------------------------------


def upload(run: RunDir, online: bool, training: bool, tell: Tell) -> None:
    """Upload what the server lacks of the run, its parts in the order of their start; tells of each.

    `training`: the newest part may still grow. Raises ConnectionError for what other runs would meet as well, and
    ValueError for other refusals.
    """
    with _desk(run) as desk:
        _upload(run, desk, online, training, tell)


def _upload(run: RunDir, desk: Path, online: bool, training: bool, tell: Tell) -> None:
    import wandb

    parts, todo = _parts(run, online, training, tell)
    wandb.setup(wandb.Settings(**BOUNDS))
    there = {part.log: _there(part, parts) for part in todo}
    for part in todo:
        last, got = part.log == parts[-1].log, there[part.log]
        unfinished = training and last and not part.ended
        told = {"part": part.folder.name, "rows": part.rows, "sent": part.rows - got, "unfinished": unfinished}
        if unfinished and (part.online or got == part.rows):
            tell(told | {"sent": 0})  # the training uploads it itself, or has written nothing since
            continue
        if part.online and not last and got == part.rows:
            _mark(part)
            continue
        try:
            url = _send(desk, part, got, unfinished, last)
        except ValueError as error:
            if unfinished or not part.artifacts:
                raise
            # Rows do not wait for what a server may refuse for ever: a quota, a permission, a version.
            url = _send(desk, part, _there(part, parts), unfinished, last, bare=True)
            told |= {"note": f"without its tables and artifacts: {error}"}
        if unfinished:
            rundir.publish(part.state, json.dumps(part.known | {ANSWERED: part.rows}))
        else:
            _mark(part)
        tell(told | {"url": url, "damaged": part.damaged})


def _parts(run: RunDir, online: bool, training: bool, tell: Tell) -> tuple[list[Part], list[Part]]:
    """Every part that can be read, and those of them that are to be uploaded; tells of the others."""
    found, todo = [], []
    every, offline = folders(run, online=True), folders(run, online=False)
    for folder in every:
        mine = online or folder in offline
        try:
            log = log_of(folder)
            due = mine and log is not None and not uploaded(log)
            part = look(log, due) if log else None
        except (OSError, ValueError) as error:
            if mine:
                tell({"part": folder.name, "error": f"cannot be read: {getattr(error, 'strerror', None) or error}"})
            continue
        if part:
            found.append(part)
            todo += [part] * due
        elif mine and not (training and folder == every[-1]):  # that one has only just begun
            tell({"part": folder.name, "empty": True})
    return sorted(found, key=lambda part: part.started), sorted(todo, key=lambda part: part.started)


def _there(part: Part, parts: list[Part]) -> int:
    """How many of the part's rows the server has."""
    begin = part.begin
    end = 0 if begin is None else _end(part)
    if begin is None or not end:
        return 0
    # Where the next part begins at the server, its rows of this one end; of two at one place the first has none there.
    me = (begin, part.started)
    later = [other.begin for other in parts if other.begin is not None and (other.begin, other.started) > me]
    answered = part.known.get(ANSWERED, 0)
    return min(max(min([end, *later]) - begin, answered), part.rows)


def _end(part: Part) -> int:
    """The step after the run's last one at the server; 0 where it has no such run. Raises as `upload`."""
    import wandb

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            api = wandb.Api(timeout=int(ANSWER_S))
            known = api.run(part.project)
    except Exception as error:
        if "Could not find run" in str(error):
            return 0
        raise _failure(str(error)) from None
    return min(known.lastHistoryStep + 1, known.historyLineCount)


def _send(desk: Path, part: Part, got: int, unfinished: bool, last: bool, bare: bool = False) -> str:
    """Upload `part` without its first `got` rows. Returns the run's address. Raises as `upload`."""
    import wandb
    from wandb.cli.cli import cli

    place, before = desk / part.folder.name, len(_logged(desk))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rest = place / part.log.name
    copy(part, rest, got, unfinished, bare)
    (place / "files").symlink_to(part.folder / "files")
    state = place / part.state.name
    if part.begin is None:
        state.symlink_to(part.state)  # wandb writes it before the first row leaves
    else:
        state.write_text(json.dumps(_resumed(part, got)))
    # Only the last part says how the run ended, and only once it did.
    wandb.setup(wandb.Settings(x_update_finish_state=last and not unfinished, **BOUNDS))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main(["sync", "--include-online", str(rest)], standalone_mode=False)
        except Exception as error:  # of click, which wraps what wandb raised
            print(f"wandb: ERROR {getattr(error, 'message', error)}")
    text = said.getvalue()
    wrong = [*re.findall(r"^wandb: ERROR (?:\[\S+\] )?(.*)", text, re.MULTILINE), *_logged(desk)[before:]]
    if wrong or "Finished syncing" not in text:
        raise _failure("; ".join(dict.fromkeys(wrong)) or "W&B's service died of it")
    shutil.rmtree(place)
    found = re.search(r"View run .*?at (\S+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _resumed(part: Part, got: int) -> dict[str, Any]:
    """What wandb shall know of a part that goes on after its first `got` rows. Raises as `upload`."""
    known, end = part.known, _end(part)
    if got < part.rows and known["starting_step"] + got < end:
        # Others' rows follow: the rest comes after them, as if the part had begun that much before their end.
        known["starting_step"] = end - got
        rundir.publish(part.state, json.dumps(known))
    return known | {"starting_step": known["starting_step"] + got}


@contextlib.contextmanager
def _desk(run: RunDir) -> Iterator[Path]:
    """A folder to work in: wandb leaves logs where it is called, and a mark beside what it uploads."""
    desk = run.wandb / ".sync"
    shutil.rmtree(desk, ignore_errors=True)  # what a killed sync left
    desk.mkdir()
    try:
        with contextlib.chdir(desk):
            yield desk
    finally:
        shutil.rmtree(desk, ignore_errors=True)


def _logged(desk: Path) -> list[str]:
    """Errors in the log of `wandb sync`: what it prints of a server's refusal leaves out the reason."""
    found = []
    for log in sorted(desk.glob("wandb/logs/debug-sync*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if '"level":"ERROR' in line:
                said = json.loads(line)
                found.append(f"{said['msg']} {said.get('status', '')}".strip())
    return found


def _mark(part: Part) -> None:
    rundir.publish(part.log.with_name(f"{part.log.name}.synced"), str(part.size))


def _failure(text: str) -> Exception:
    import wandb

    settings = wandb.setup().settings
    address = urlparse(settings.base_url)
    server = f"{address.hostname}:{address.port}" if address.port else str(address.hostname)
    return explained(text.replace(settings.api_key, "...") if settings.api_key else text, server)


def explained(text: str, server: str) -> Exception:
    """What went wrong, and what to do: a ConnectionError where other runs would meet it too, else a ValueError."""
    status = re.search(r"(?:HTTP|status|error|upload:) ([1-5]\d\d)\b", text)
    if re.search(r"API key|not authenticated", text, re.IGNORECASE):
        return ConnectionError(f"no key for {server}, or none that can be one: `wandb login`{_OTHER}")
    if status and status[1] in ("401", "403"):
        return ConnectionError(f"{server} refuses the key or what is done with it ({status[1]}): `wandb login`{_OTHER}")
    if status and status[1] in ("429", "500", "502", "503", "504"):
        return ConnectionError(f"{server} is in trouble ({status[1]}): the same command goes on later")
    if network := _NETWORK.search(text):
        return ConnectionError(f"{server} cannot be reached ({network[1]}): run it where there is a network{_OTHER}")
    return ValueError(f"{server} did not take it ({' '.join(text.split())[:300]})")


_NETWORK = re.compile(
    r".*(connection re\w+|no such host|no route to host|network is unreachable|Client\.Timeout|deadline exceeded"
    r"|did not respond in time)",
    re.DOTALL,
)
_OTHER = " (another server: WANDB_BASE_URL)"


@contextlib.contextmanager
def alone(run: RunDir) -> Iterator[None]:
    """Hold the run's uploads; in the file is who does. Raises BlockingIOError if that is another process."""
    with open(run.wandb / ".sync.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # no locks on this file system
                raise
        killed = file.tell() > 0
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        if killed:
            time.sleep(ORPHAN_S)
        try:
            yield
        finally:
            file.truncate(0)


def main() -> int:
    """Returns 0, or 1 where a part could not be uploaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--online", action="store_true", help="parts that were online too")
    parser.add_argument("--training", action="store_true", help="the newest part may still grow")
    args = parser.parse_args()
    os.nice(10)  # a login node is others' too
    failed = False

    def tell(told: dict[str, Any]) -> None:
        nonlocal failed
        failed |= "error" in told
        print(json.dumps(told), flush=True)

    run = RunDir(args.run.resolve())
    try:
        with alone(run):
            upload(run, args.online, args.training, tell)
    except BlockingIOError:
        tell({"busy": True})
    except ConnectionError as error:
        tell({"error": str(error), "server": True})
    except ValueError as error:
        tell({"error": str(error)})
    except OSError as error:
        tell({"error": f"{error.filename}: {error.strerror}" if error.filename else str(error)})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
