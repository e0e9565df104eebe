"""Checkpoints: written beside training, appear whole, resumed by any number of ranks.

    writer = Writer(run, engine, me, ...)      # all ranks
    writer.save(best=120)                      # waits for a copy in host memory; a thread writes it
    writer.wait()                              # before a stop, and before the next save

    checkpoints/step-00000120/manifest.json        what is in it (manifest.py); the folder is renamed into place last
                              rank-R.safetensors   what rank R held: kind/parameter -> flat values, and where they begin

DeepSpeed's own checkpoints are not used. Its `latest` is published before all ranks have written; its flat buffers
hang on the number of ranks and the order of the groups, and are loaded into other groups without a word; changing the
number of ranks takes a conversion that loses each group's rate in stage 3; its files are pickles. Here each value lies
under its parameter's name, so that any number of ranks at any stage finds its own part, and nothing is executed.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from vitdist import manifest, rundir
from vitdist.config import Checkpoint
from vitdist.dist import Processes
from vitdist.manifest import Damaged, File, Group, Identity, Manifest
from vitdist.rundir import RunDir

if TYPE_CHECKING:
    from vitdist.engine import Engine, Piece

_CHUNK = 8 << 20
"""Bytes that are hashed and written at once: Python's lock is free meanwhile, so the step loop runs on."""
_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class NoCheckpoint(ValueError):
    """Checkpoints exist but none can be resumed; the text names each with its reason."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, and checkpoint.on_failure asks for an end."""


class Fenced(RuntimeError):
    """A newer start of the run has taken over: this one must not publish anything."""


@dataclass(frozen=True)
class Outcome:
    """What became of a save; the same on all ranks."""

    step: int
    fault: str | None
    blocked_s: float
    """What the step loop waited for it on this rank: the previous save and the copy."""
    seconds: float
    """From the call to the published folder."""
    bytes: int
    """Of all ranks."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int
    manifest: Manifest
    damaged: tuple[int, ...]
    """Steps of those that were passed over."""


# ---- what a checkpoint belongs to ------------------------------------------------------------------


def layout(groups: list[dict[str, Any]]) -> list[Group]:
    """The parameter groups for an Identity, before DeepSpeed changes them."""
    return [
        Group(
            name=g["name"],
            lr_scale=g["lr_scale"],
            weight_decay=g["weight_decay"],
            parameters={name: list(p.shape) for name, p in zip(g["names"], g["params"], strict=True)},
        )
        for g in groups
    ]


def rest(net: torch.nn.Module) -> dict[str, list[int]]:
    """Shapes of what is in the model and is not trained, before ZeRO-3 takes them away."""
    frozen = {name: list(p.shape) for name, p in net.named_parameters() if not p.requires_grad}
    return frozen | {name: list(b.shape) for name, b in net.named_buffers()}


# ---- writing ---------------------------------------------------------------------------------------


class Writer:
    """Writes the checkpoints of one attempt; each rank has one, and all call its methods together.

    A save in flight is agreed on over a process group of its own, so that it crosses no collective of the step loop.
    """

    def __init__(
        self,
        run: RunDir,
        engine: "Engine",
        me: Processes,
        identity: Identity,
        settings: Checkpoint,
        attempt: int,
        about: dict[str, Any],
    ) -> None:
        """`about`: further fields of the Manifest (zero, precision, settings, wandb, versions ...)."""
        self._run, self._engine, self._me, self._identity = run, engine, me, identity
        self._settings, self._attempt, self._about = settings, attempt, about
        self._host = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._news: list[Outcome] = []
        self._saved: int | None = None
        self._damaged: set[int] = set()
        """By their content, of which a look at sizes knows nothing."""
        self._token = secrets.token_hex(8) if me.first else ""

    @property
    def _fence(self) -> Path:
        return self._run.checkpoints / "writer.json"

    def claim(self) -> None:
        """Rank 0, before anything is read: from now on no earlier attempt publishes a checkpoint. Raises OSError."""
        self._run.checkpoints.mkdir(exist_ok=True)
        rundir.publish_json(self._fence, {"attempt": self._attempt, "token": self._token})

    def save(self, position: dict[str, float], best: int | None = None) -> None:
        """Take a checkpoint of the step just done, unless there is one; the step of `best` is kept beside the newest.

        Returns when the state is copied, or with checkpoint.asynchronous=false when it is written. Raises SaveFailed
        if the save before failed and checkpoint.on_failure says stop, once this one has been tried: the disk may have
        room again. Raises Fenced if a newer attempt has taken over.
        """
        began = time.monotonic()
        step = self._engine.steps
        failed: SaveFailed | None = None
        try:
            self.wait()
        except SaveFailed as error:
            failed = error
        if self._saved == step:
            if self._me.first:
                self._prune(best)
            return
        header, body = self._copy()
        record = {
            "format": manifest.FORMAT,
            "step": step,
            "attempt": self._attempt,
            "saved": rundir.now(),
            "world": self._me.world,
            "counters": self._engine.counters(),
            "position": position,
            "identity": self._identity.model_dump(),
            "wandb": self._run.wandb_id if self._me.first else None,  # it is rank 0's record that is published
            **self._about,
        }
        blocked = time.monotonic() - began
        work = threading.Thread(
            target=self._write, args=(step, record, header, body, best, began, blocked), name="checkpoint", daemon=True
        )
        self._thread = work
        work.start()
        if failed:
            with contextlib.suppress(SaveFailed):
                self.wait()
            ended = "is saved" if self._saved == step else "could not be either"
            raise SaveFailed(f"{failed}; that of step {step}, where the run ends, {ended}")
        if not self._settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is done. Raises as `save` does, on all ranks alike."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, outcome, self._error, self._outcome = self._error, self._outcome, None, None
        if error:
            raise error
        assert outcome
        self._news.append(outcome)
        if outcome.fault is None:
            self._saved = outcome.step
        elif self._settings.on_failure == "stop":
            raise SaveFailed(f"the checkpoint of step {outcome.step} could not be saved: {outcome.fault}")

    def news(self) -> list[Outcome]:
        """What became of saves since the last call; does not wait."""
        if self._thread is not None and not self._thread.is_alive() and self._error is None:
            assert self._outcome
            if self._outcome.fault is None or self._settings.on_failure == "continue":
                self.wait()
        news, self._news = self._news, []
        return news

    @property
    def must_stop(self) -> bool:
        """Whether this rank knows of a save that has failed, and checkpoint.on_failure says stop; does not wait."""
        over = self._thread is not None and not self._thread.is_alive() and self._error is None
        failed = over and self._outcome is not None and self._outcome.fault is not None
        return failed and self._settings.on_failure == "stop"

    def close(self, seconds: float = 60.0) -> None:
        """At the end of an attempt that failed: let a save in flight finish, but not for ever."""
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint that this attempt has seen published or resumed from."""
        return self._saved

    def began_at(self, resumed: Resumed) -> None:
        """The attempt goes on from there."""
        self._saved, self._damaged = resumed.step, set(resumed.damaged)

    # The state in host memory, in the order of the file that it becomes.

    def _copy(self) -> tuple[bytes, memoryview]:
        pieces = dict(sorted(self._engine.pieces().items()))
        if self._engine.replicated:  # each rank has all: each writes its share
            pieces = dict(list(pieces.items())[self._me.rank :: self._me.world])
        offsets = {key: piece.offset for key, piece in pieces.items()}
        tensors = {key: piece.values for key, piece in pieces.items()} | _random_state()
        # Wide types first, so that every tensor lies at a multiple of its width.
        order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
        table: dict[str, Any] = {"__metadata__": {"format": "vitdist", "offsets": json.dumps(offsets)}}
        end = 0
        places = []
        for key in order:
            values = tensors[key]
            begin, end = end, end + values.numel() * values.element_size()
            table[key] = {
                "dtype": _TYPES[values.dtype],
                "shape": [values.numel()],
                "data_offsets": [begin, end],
            }
            places.append((values, begin, end))
        if self._host.numel() != end:
            # Kept for the next save: fresh memory costs a page fault every 4 KiB, pinned memory far more.
            self._host = torch.empty(end, dtype=torch.uint8, pin_memory=self._me.device.type == "cuda")
        for values, begin, end in places:
            self._host[begin:end].view(values.dtype).copy_(values, non_blocking=True)
        if self._me.device.type == "cuda":
            torch.cuda.synchronize()
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text, memoryview(self._host.numpy())

    # In the thread.

    def _write(
        self,
        step: int,
        record: dict[str, Any],
        header: bytes,
        body: memoryview,
        best: int | None,
        began: float,
        blocked: float,
    ) -> None:
        try:
            fault, size = self._commit(step, record, header, body, best)
            self._outcome = Outcome(step, fault, blocked, time.monotonic() - began, size)
        except BaseException as error:
            self._error = error  # for `wait`, in the thread that can act on it

    def _commit(
        self, step: int, record: dict[str, Any], header: bytes, body: memoryview, best: int | None
    ) -> tuple[str | None, int]:
        """The protocol: write and sync apart, vote, publish. Returns (why it failed, bytes of all ranks)."""
        me, group = self._me, self._me.background
        final = self._run.checkpoints / manifest.name_of(step)
        # Attempt and a random word: a late writer of an old attempt never meets this folder.
        temporary = self._run.checkpoints / me.from_first(
            f"{manifest.TEMPORARY}{final.name}-{self._attempt}-{secrets.token_hex(4)}", group
        )
        mine: tuple[File | None, str | None]
        try:
            temporary.mkdir(exist_ok=True)
            mine = write_file(temporary / manifest.file_of(me.rank), header, body), None
        except Exception as error:  # whatever it is: the others wait for this rank's vote
            mine = None, getattr(error, "strerror", None) or repr(error)
        votes = me.gather(mine, group)
        faults = [(rank, text) for rank, (_, text) in enumerate(votes) if text]
        if faults:
            ranks = ", ".join(str(rank) for rank, _ in faults[:8])
            fault: str | None = f"{faults[0][1]} (rank{'s' if len(faults) > 1 else ''} {ranks})"
            if me.first:
                shutil.rmtree(temporary, ignore_errors=True)
            me.from_first(None, group)  # nobody goes on to write anew before it is gone
            return fault, 0
        files = {manifest.file_of(rank): file for rank, (file, _) in enumerate(votes) if file}
        fault, fenced = me.from_first(self._publish(temporary, final, record, files, best) if me.first else None, group)
        if fenced:
            raise Fenced(fault)
        return fault, sum(file.bytes for file in files.values())

    def _publish(
        self, temporary: Path, final: Path, record: dict[str, Any], files: dict[str, File], best: int | None
    ) -> tuple[str | None, bool]:
        """Rank 0: manifest, rename, pointer. Returns (why it failed, whether a newer attempt has taken over)."""
        published = False
        try:
            record = record | {"files": {name: file.model_dump() for name, file in files.items()}}
            record["digest"] = manifest.own_digest(record)
            Manifest.model_validate({"schema": rundir.SCHEMA, **record})  # what no start could read is no checkpoint
            rundir.publish_json(temporary / "manifest.json", record)
            fence = rundir.read_json(self._fence) or {}
            if fence.get("token") != self._token:
                shutil.rmtree(temporary, ignore_errors=True)
                return (
                    f"attempt {fence.get('attempt')} of {self._run.path} has taken over while attempt {self._attempt} "
                    "still ran: this one ends and leaves the run alone"
                ), True
            if final.exists():  # a damaged one: a whole one would have been resumed
                manifest.remove(final)
            os.rename(temporary, final)
            published = True
            self._damaged.discard(int(record["step"]))
            rundir.sync_folder(self._run.checkpoints)
            rundir.publish(self._run.checkpoints / "latest", final.name + "\n")
        except (OSError, ValueError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return (None if published else getattr(error, "strerror", None) or str(error)), False
        self._prune(best)
        return None, False

    def _prune(self, best: int | None) -> None:
        """What is not needed any more, unless a newer attempt has taken over; what cannot be removed harms nothing."""
        try:
            if (rundir.read_json(self._fence) or {}).get("token") != self._token:
                return
        except (OSError, ValueError):
            return
        try:
            entries = list(manifest.entries(self._run, thorough=False))
        except OSError as error:
            print(f"{self._run.checkpoints} cannot be looked through, nothing is pruned: {error.strerror}")
            return
        whole = [entry.step for entry in entries if entry.fault is None and entry.step not in self._damaged]
        damaged = [entry.step for entry in entries if entry.step not in whole]
        for step in manifest.superfluous(whole, damaged, self._settings.keep, best):
            try:
                manifest.remove(self._run.checkpoints / manifest.name_of(step))
            except OSError as error:
                print(f"{manifest.name_of(step)} cannot be removed: {error.strerror}")


def write_file(path: Path, header: bytes, body: memoryview) -> File:
    """A synced file of the format of safetensors, hashed on the way. Raises OSError.

    The library's own `save_file` holds Python's lock while it writes, and the file would have to be read again for
    its hash; the format is a length, a table in JSON and the bytes (https://github.com/huggingface/safetensors).
    """
    told = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for part in (memoryview(header), body):
            for begin in range(0, len(part), _CHUNK):
                chunk = part[begin : begin + _CHUNK]
                told.update(chunk)
                while chunk:
                    chunk = chunk[os.write(handle, chunk) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return File(bytes=len(header) + len(body), sha256=told.hexdigest())


# ---- reading ---------------------------------------------------------------------------------------


def resume(
    run: RunDir, engine: "Engine", me: Processes, identity: Identity, seed: int = 0
) -> tuple[Resumed | None, list[str]]:
    """Load the newest whole checkpoint; all ranks call it, rank 0 holding the lock of the run.

    Returns (where the run goes on or None, what was passed over and why). `seed`: of the random state of ranks, where
    there are not as many as before. Raises NoCheckpoint if there are checkpoints and none is whole: a run never starts
    over in silence. Raises ValueError if the newest whole one belongs to another run, with the first difference.
    """
    if me.first:
        manifest.clean(run)
    passed_over, damaged = [], []
    for step in me.from_first(manifest.steps(run) if me.first else None):
        folder = run.checkpoints / manifest.name_of(step)
        found, fault = _inspect(folder, me)
        if found is None:
            passed_over.append(f"{folder.name}: {fault}")
            damaged.append(step)
            continue
        _load(folder, found, engine, me, identity, seed)
        return Resumed(step, found, tuple(damaged)), passed_over
    if passed_over:
        raise NoCheckpoint(
            f"{run.checkpoints}: no checkpoint can be resumed: {'; '.join(passed_over)}. Begin anew under another name"
        )
    return None, []


def load_step(run: RunDir, engine: "Engine", me: Processes, identity: Identity, step: int) -> None:
    """Load the checkpoint of `step`, as of the best one for the export; all ranks call it.

    Raises ValueError, on all ranks, if it is not there, not whole, or of other settings.
    """
    folder = run.checkpoints / manifest.name_of(step)
    found, fault = _inspect(folder, me)
    if found is None:
        raise Damaged(f"{folder} cannot be loaded: {fault}")
    _load(folder, found, engine, me, identity, seed=0)


def weights(folder: Path) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """(manifest, whole tensors by the model's names) of a checkpoint, the averaged weights where there are some.

    fp32; frozen parameters and buffers as they were. Raises Damaged if it is not whole.
    """
    found = manifest.read(folder)
    if fault := manifest.fault(folder, found, found.files):
        raise Damaged(fault)
    trained = {name: shape for group in found.identity.groups for name, shape in group.parameters.items()}
    source = _Pieces(folder, found)
    whole = {}
    for name, shape in (trained | found.identity.rest).items():
        kinds = ("average", "master") if name in trained else ("frozen", "buffer")
        kind = next((kind for kind in kinds if source.has(f"{kind}/{name}")), None)
        if kind is None:
            raise Damaged(f"{name} is not in it")
        values = torch.zeros(torch.Size(shape), dtype=source.dtype(f"{kind}/{name}"))
        source.fill(f"{kind}/{name}", 0, values.view(-1))
        whole[name] = values
    return found, whole


def newest(place: Path) -> Path:
    """The checkpoint's folder that `place` means: itself, or the newest whole one of a run. Raises ValueError."""
    if (place / "manifest.json").exists():
        return place
    run, reasons = RunDir(place), []
    for step in manifest.steps(run):
        folder = run.checkpoints / manifest.name_of(step)
        fault = manifest.verify(folder)
        if fault is None:
            return folder
        reasons.append(f"{folder.name}: {fault}")
    raise ValueError(f"{place} has no checkpoint that can be used" + (f" ({'; '.join(reasons)})" if reasons else ""))


def _inspect(folder: Path, me: Processes) -> tuple[Manifest | None, str | None]:
    """(manifest, None), or (None, what is wrong), the same on all ranks, which share the reading."""
    found: Manifest | None = None
    fault = None
    if me.first:
        try:
            found = manifest.read(folder)
        except Damaged as error:
            fault = str(error)
    found, fault = me.from_first((found, fault))
    if found is None:
        return None, fault
    mine = sorted(found.files)[me.rank :: me.world]
    faults = [text for text in me.gather(manifest.fault(folder, found, mine)) if text]
    return (None, faults[0]) if faults else (found, None)


def _load(folder: Path, found: Manifest, engine: "Engine", me: Processes, identity: Identity, seed: int) -> None:
    difference = identity.first_difference(found.identity)
    if difference:
        raise ValueError(
            f"{folder.name} cannot be continued: {difference}. Use what the run began with, or start another run "
            f"(--name) from its weights: model.warm_start={folder}"
        )
    source = cast(_Pieces, _alike(me, lambda: _Pieces(folder, found)))
    kinds = {key.partition("/")[0] for key in source} - {"master", "average", "frozen", "buffer"}

    def fill(pieces: "dict[str, Piece]") -> None:
        for key, piece in pieces.items():
            kind, _, name = key.partition("/")
            if kind == "average" and not found.average:  # optim.ema was turned on since: it begins with the weights
                key = f"master/{name}"
            source.fill(key, piece.offset, piece.values)

    engine.restore(kinds, lambda pieces: _alike(me, lambda: fill(pieces)), found.counters.model_dump(), found.precision)
    if found.world == me.world:
        _alike(me, lambda: _set_random_state(source.random_state(me.rank)))
    else:
        torch.manual_seed(hash((seed, found.step, me.rank)) % 2**63)
    assert engine.steps == found.step


def _alike(me: Processes, work: Callable[[], Any]) -> Any:
    """`work()` on each rank. Raises Damaged on all if one cannot: the others would wait in the next collective."""
    result, fault = None, None
    try:
        result = work()
    except Damaged as error:
        fault = str(error)
    faults = [text for text in me.gather(fault) if text]
    if faults:
        raise Damaged(faults[0])
    return result


class _Pieces:
    """The files of all ranks as one: reads from whoever wrote it."""

    def __init__(self, folder: Path, found: Manifest) -> None:
        self._where: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._random: dict[int, dict[str, torch.Tensor]] = {}
        self._folder = folder
        for rank in range(found.world):
            path = folder / manifest.file_of(rank)
            try:
                # Mapped: what is not asked for is not read.
                with safe_open(path, framework="pt") as file:
                    offsets = json.loads((file.metadata() or {}).get("offsets", "{}"))
                    for key in file.keys():  # noqa: SIM118 - not a dictionary
                        values = file.get_tensor(key)
                        if values.ndim != 1:
                            raise ValueError(f"{key} is not flat")
                        if key.startswith("rng/"):
                            self._random.setdefault(rank, {})[key.removeprefix("rng/")] = values
                        else:
                            self._where.setdefault(key, []).append((int(offsets[key]), values))
            except (
                SafetensorError,
                LookupError,
                ValueError,
                TypeError,
                AttributeError,
                ArithmeticError,
                RecursionError,
            ) as error:
                raise Damaged(f"{path} is not what its manifest says ({error})") from None

        if found.average != any(key.startswith("average/") for key in self._where):
            raise Damaged(f"{folder} is not what its manifest says (average of the weights: {found.average})")

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def has(self, key: str) -> bool:
        return key in self._where

    def dtype(self, key: str) -> torch.dtype:
        return self._where[key][0][1].dtype

    def random_state(self, rank: int) -> dict[str, torch.Tensor]:
        """Raises Damaged if there is none."""
        if rank not in self._random:
            raise Damaged(f"{self._folder}: rank {rank} has no random state")
        return self._random[rank]

    def fill(self, key: str, offset: int, into: torch.Tensor) -> None:
        """Copy values [offset, offset + len(into)) of a flattened parameter. Raises Damaged if some are nowhere."""
        left = len(into)
        for begins, values in self._where.get(key, []):
            first, last = max(offset, begins), min(offset + len(into), begins + len(values))
            if first < last:
                into[first - offset : last - offset].copy_(values[first - begins : last - begins])
                left -= last - first
        if left:
            raise Damaged(f"{self._folder}: {key} is not all there ({left:,} of {len(into):,} values are missing)")


def _random_state() -> dict[str, torch.Tensor]:
    state = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise Damaged(f"the random state cannot be set ({str(error).splitlines()[0]})") from None
