"""The fault of a rank: its word, whether it is the root, and the record of it."""

import dataclasses
import errno
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed

from vitdist import checkpoint, config, faults, manifest, rundir
from vitdist.data.reader import DataFailed
from vitdist.engine import Diverged
from vitdist.faults import Fault
from vitdist.rundir import Attempt
from vitdist.train import TrainingFailed

GLOO_GONE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38211"
GLOO_LATE = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv"
NCCL_GONE = "NCCL error in: ProcessGroupNCCL.cpp:3356, remote process exited or there was a network error"


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path / "attempts" / "0")


def caught(raising: Callable[[], object]) -> BaseException:
    try:
        raising()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def raised(error: BaseException) -> BaseException:
    def throw() -> None:
        raise error

    return caught(throw)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (config.SettingsError("optim.lr: not a number"), "configuration_validation_failure"),
        (ValueError("data.train: a single class"), "configuration_validation_failure"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (checkpoint.SaveFailed("step 4 could not be saved: No space left on device (rank 1)"), "disk_full"),
        (checkpoint.SaveFailed("step 4 could not be saved: Input/output error (rank 1)"), "storage_failure"),
        (OSError(errno.ESTALE, "Stale file handle"), "storage_failure"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), "filesystem_permission_denied"),
        (ValueError("--runs /x: /x/a cannot be made (Permission denied)"), "filesystem_permission_denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data"), "artifact_or_path_not_found"),
        (OSError(errno.EMFILE, "Too many open files"), "too_many_open_files"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "port_in_use"),
        (ModuleNotFoundError("No module named 'deepspeed'"), "software_missing"),
        (ValueError("step-4 cannot be continued: optim.name is lion, was adamw"), "checkpoint_compatibility_mismatch"),
        (checkpoint.NoCheckpoint("no checkpoint can be resumed: step-4: torn"), "checkpoint_damaged"),
        (manifest.Damaged("step-4: rank-1 has another hash"), "checkpoint_damaged"),
        (checkpoint.Fenced("attempt 3 has taken over"), "superseded"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "cuda_oom"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "gpu_failure"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."), "out_of_memory"),
        (RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly"), "data_failure"),
        (
            RuntimeError(
                "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's "
                "workers are out of shared memory."
            ),
            "shared_memory_full",
        ),
        (Diverged("the gradients are not finite"), "nan_or_inf"),
        (TrainingFailed("the loss is nan at step 7: the run diverged"), "nan_or_inf"),
        (TrainingFailed("40 samples could not be used by step 9 (40 undecodable)"), "data_failure"),
        (DataFailed("https://host/a.tar: Connection reset by peer"), "data_failure"),
        (KeyboardInterrupt(), "user_cancelled"),
        (RuntimeError(GLOO_GONE), "peer_lost"),
        (torch.distributed.DistBackendError(NCCL_GONE), "peer_lost"),
        (RuntimeError(GLOO_LATE), "collective_timeout"),
        (RuntimeError("Application timeout caused pair closure"), "collective_timeout"),
        (
            torch.distributed.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
            "collective_timeout",
        ),
        (RuntimeError("something else"), "framework_crash"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_R4_a_fault_has_the_word_of_the_catalogue(error: BaseException, word: str) -> None:
    fault = faults.of(raised(error), 3, 7, "training")
    assert fault.word == word
    assert fault.cascade == (word in ("peer_lost", "collective_timeout"))
    assert (fault.rank, fault.step, fault.phase, fault.type) == (3, 7, "training", type(error).__name__)
    assert fault.host == socket.gethostname()
    assert abs(fault.time - time.time()) < 60
    assert faults.WORDS[word] in faults.line(fault)


@pytest.mark.parametrize(
    ("raising", "word"),
    [
        (lambda: torch.empty(10**14), "out_of_memory"),
        (lambda: torch.ones(2, 3) @ torch.ones(2, 3), "shape_mismatch"),
        (lambda: torch.ones(2) + torch.ones(3), "shape_mismatch"),
        (lambda: torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 2).state_dict()), "shape_mismatch"),
        (lambda: torch.load(Path(__file__)), "checkpoint_damaged"),
        (lambda: (Path(__file__) / "x").read_text(), "artifact_or_path_not_found"),
    ],
)
def test_the_words_of_libraries_are_known(raising: Callable[[], object], word: str) -> None:
    assert faults.of(caught(raising), 0, 0, "").word == word


def chained(inner: Exception, outer: Exception, how: str) -> BaseException:
    def work() -> None:
        try:
            raise inner
        except Exception as error:
            if how == "from":
                raise outer from error
            if how == "none":
                raise outer from None
            raise outer  # noqa: B904 - what happens in a clean-up

    return caught(work)


def test_the_fault_is_looked_for_in_what_led_to_an_exception() -> None:
    disk, gone, other = OSError(errno.ENOSPC, "full"), RuntimeError(GLOO_GONE), RuntimeError("cannot save")
    assert faults.of(chained(disk, other, "from"), 0, 0, "").word == "disk_full"
    assert faults.of(chained(disk, other, "none"), 0, 0, "").word == "disk_full"
    # Leaving after a fault, a rank may lose its peers: it is the root all the same, whatever the fault was.
    for first, word in ((disk, "disk_full"), (ValueError("bad"), "configuration_validation_failure")):
        fault = faults.of(chained(first, gone, "while leaving"), 0, 0, "")
        assert (fault.word, fault.cascade, fault.type) == (word, False, type(first).__name__)
    # What wraps a peer's end on purpose tells of that end.
    assert faults.of(chained(gone, other, "from"), 0, 0, "").cascade
    # A ValueError is bad input only where nobody wrapped it.
    assert faults.of(chained(ValueError("x"), RuntimeError("fault after step 3"), "from"), 0, 0, "").word == (
        "framework_crash"
    )


def test_the_place_is_in_our_own_code() -> None:
    fault = faults.of(caught(lambda: config.override({}, ["a=1", "b"])), 0, 0, "start")
    assert fault.where.startswith("vitdist/config.py:"), fault
    # Below torch's frames, that of the caller.
    fault = faults.of(caught(lambda: torch.nn.Linear(2, 3)(torch.ones(5))), 0, 0, "start")
    assert fault.where.startswith("tests/vitdist/test_faults.py:"), fault
    assert fault.where.endswith(" in <lambda>")
    assert faults.of(RuntimeError("never raised"), 0, 0, "").where == ""
    assert faults.place("<frozen importlib._bootstrap>", 1, "f") == faults.place(os.__file__, 1, "f") == ""
    bug = faults.of(caught(lambda: faults.root([None])), 0, 0, "")  # type: ignore[list-item]
    assert bug.word == "program_error"


def test_a_record_is_read_as_it_was_noted(attempt: Attempt) -> None:
    noted = [faults.of(raised(RuntimeError(f"{rank}\n\x1b[31m")), rank, 7, "training") for rank in (11, 2)]
    for fault in noted:
        faults.note(attempt, fault)
    assert faults.read(attempt) == noted[::-1]
    assert rundir.read_json(attempt.fault(2)) is not None
    assert "\x1b" not in faults.line(noted[0])
    assert "\n" not in faults.line(noted[0])


def test_the_first_fault_of_a_rank_stands(attempt: Attempt) -> None:
    first, second = (faults.of(raised(RuntimeError(text)), 1, 7, "training") for text in ("first", "second"))
    faults.note(attempt, first)
    faults.note(attempt, second)
    assert faults.read(attempt) == [first]


def test_C3_a_full_disk_does_not_hide_the_fault(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rundir, "publish_json", full)
    fault = faults.of(raised(Diverged("the gradients are not finite")), 1, 7, "training")
    faults.note(attempt, fault)
    said = capsys.readouterr().err
    assert "rank-1.json cannot be written (No space left on device)" in said
    assert faults.line(fault) in said


GOOD = {
    "schema": 1, "rank": 0, "host": "n1", "step": 3, "phase": "training", "time": 5.5, "word": "hang",
    "cascade": False, "type": "Hang", "message": "m", "where": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        json.dumps(GOOD).encode()[:-20],
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 5000 + b"}",
        b" " * (1 << 21),
        *(
            json.dumps(GOOD | change).encode()
            for change in (
                {"schema": 2},
                {"schema": None},
                {"rank": "0"},
                {"rank": True},
                {"cascade": 0},
                {"time": float("nan")},
                {"time": float("inf")},
                {"time": 10**400},
                {"message": None},
                {"where": ["x"]},
            )
        ),
        json.dumps({k: v for k, v in GOOD.items() if k != "word"}).encode(),
    ],
    ids=itertools.count(),
)
def test_torn_and_foreign_records_are_passed_over_with_a_word(
    attempt: Attempt, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, record in ((0, content), (1, json.dumps(GOOD | {"rank": 1, "more": 1, "time": 5}).encode())):
        attempt.fault(rank).parent.mkdir(parents=True, exist_ok=True)
        attempt.fault(rank).write_bytes(record)
    attempt.fault(2).mkdir()
    assert [(fault.rank, fault.time) for fault in faults.read(attempt)] == [(1, 5.0)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("is no record of a fault and is left out" in line for line in said)


def test_no_records_are_no_faults(attempt: Attempt) -> None:
    assert faults.read(attempt) == []
    assert faults.root([]) is None


def test_R4_the_root_is_the_first_that_is_no_cascade() -> None:
    base = Fault(0, "n", 3, "training", 0.0, "peer_lost", True, "RuntimeError", "", "")
    early_cascade = dataclasses.replace(base, rank=1, time=1.0)
    root = dataclasses.replace(base, rank=2, time=2.0, word="disk_full", cascade=False)
    later = dataclasses.replace(root, rank=3, time=3.0)
    alike = dataclasses.replace(root, rank=4)
    found = [early_cascade, later, alike, root]
    for _ in range(5):
        random.shuffle(found)
        assert faults.root(found) == root
    assert faults.root([early_cascade]) is None


def test_a_line_says_all_and_what_to_do() -> None:
    fault = Fault(3, "node2", 120, "saving", 1.0, "disk_full", False, "OSError", "No space", "vitdist/a.py:1 in f")
    text = faults.line(fault)
    assert text.startswith("disk_full, rank 3 on node2, step 120, saving: OSError: No space at vitdist/a.py:1 in f; ")
    assert text.endswith(faults.WORDS["disk_full"])
    assert faults.line(dataclasses.replace(fault, word="of another vitdist", where="")).endswith("OSError: No space")
