"""What a run folder says, collected for a report: settings, records of all starts, rows, the newest evaluation.

It is read without torch, at any moment of a run; what is missing is left empty.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from vitdist import config, faults, gallery, history, ledger, rundir
from vitdist.config import Config
from vitdist.data import index
from vitdist.data.index import Index
from vitdist.history import History
from vitdist.rundir import RunDir

PAIRS = 10

Record = dict[str, Any]
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Start:
    """One attempt as the report tells it; times in seconds since 1970."""

    number: int
    state: str
    why: str
    where: str
    began: float | None
    ended: float | None
    first: int
    """Steps done when it began."""
    last: int
    """Steps done at its end; of one that was killed as far as rows tell, so at least."""
    trained: bool
    """Whether it came as far as going on with the training."""
    remedy: str
    """What to do about its end, if a rank noted what that was."""
    events: list[Record]
    left_out: int
    """Events beyond those that its record holds."""
    ranks: int = 0
    """0 for one that ended before it told; the next too."""
    threads: int = 0
    """Of a rank."""

    @property
    def seconds(self) -> float:
        # Two hosts' clocks may disagree.
        return max(0.0, self.ended - self.began) if self.ended and self.began else 0.0


@dataclass(frozen=True)
class Facts:
    """What a run folder says; `record` is the newest that a trainer wrote (see rundir.state)."""

    run: RunDir
    settings: Record
    env: Record
    record: Record
    starts: list[Start]
    history: History
    evaluation: Record
    sets: dict[str, Index | Exception] = field(default_factory=dict)
    """What `shards` found, once: a server that does not answer is waited for."""

    def about(self, name: str) -> Record:
        """A part of the trainer's record, {} where it is missing."""
        return self.record.get(name) or {}

    def series(self, key: str) -> Points:
        """(step, value) of one figure, without gaps, infinities and NaN."""
        steps, values = self.history.series(key)
        return list(zip(steps.tolist(), values.tolist(), strict=True))

    def middle(self, key: str) -> float | None:
        """Median of one figure over the run."""
        _, values = self.history.series(key)
        return float(np.median(values)) if len(values) else None

    @property
    def seconds(self) -> float:
        return sum(start.seconds for start in self.starts)

    @property
    def scores(self) -> Record:
        """Figures of the newest evaluation, {} before the first one."""
        return self.evaluation.get("metrics") or self.about("summary")


def read(run: RunDir) -> Facts:
    """Collect a run folder; missing files give empty records."""
    figures, attempts = history.read(run), run.attempts()
    starts = [_start(a, a is attempts[-1], *figures.reached.get(a.number, (0, None))) for a in attempts]
    record = rundir.state(run)
    if starts:  # a killed trainer's record says "running" for ever; the launcher may know more
        record = {**record, "state": starts[-1].state}
    return Facts(
        run=run,
        settings=config.read_yaml(run.config) if run.config.exists() else {},
        env=rundir.read_json(run.env) or {},
        record=record,
        starts=starts,
        history=figures,
        evaluation=rundir.read_json(run.evaluation) or {},
    )


def _start(attempt: rundir.Attempt, newest: bool, step: int, seen: float | None) -> Start:
    record, job = rundir.read_json(attempt.train) or {}, rundir.read_json(attempt.job) or {}
    noted = faults.read(attempt)
    fault = heard = faults.root(noted) or next(iter(noted), None)
    state = record.get("state", "running")
    if state == "running":
        known = job.get("state") in ("done", "failed", "refused", "stopped", "requeued")
        # lost: no one lived to say how it ended
        state = job["state"] if known else "failed" if fault else "running" if newest else "lost"
    if state in ("done", "stopped"):
        fault = heard = None  # a rank that lost the others while all were leaving
    error, first = record.get("error"), record.get("resumed_from") or 0
    told, remedy = _launched(str(job.get("cause") or ""))
    why = f"{error['type']}: {error['message']}" if error else record.get("reason") or told
    if fault and fault.cascade and told and not told.startswith(f"{fault.word},"):
        why, fault = told, None  # of a rank that left no word itself: it was killed, or its node went away
    if fault:
        remedy = faults.WORDS.get(fault.word, "")
        host, at = fault.host and f" on {fault.host}", fault.where and f" at {fault.where}"
        what = f"rank {fault.rank}{host}, step {fault.step:,}, {fault.phase}{at}"
        why = f"{fault.word.replace('_', ' ')} ({what}): {fault.type}: {fault.message}"
    hosts = list(dict.fromkeys(job.get("hosts") or ()))  # simulated nodes share one
    nodes = ", ".join(hosts[:8]) + (" ..." if hosts[8:] else "")
    began, ended = (record.get(key) or job.get(key) for key in ("started", "ended"))
    seen = max(heard.time, seen or 0.0) if heard else seen
    return Start(
        number=attempt.number,
        state=state,
        why=why,
        where=f"Job {job['job_id']} on {nodes}" if hosts else "",
        began=datetime.fromisoformat(began).timestamp() if began else None,
        ended=datetime.fromisoformat(ended).timestamp() if ended else seen,
        first=first,
        last=max(record.get("step") or 0, step, first, heard.step if heard else 0),
        trained="resumed_from" in record,
        remedy=remedy if fault or why == told else "",
        events=list(record.get("events") or ()),
        left_out=record.get("events_left_out", 0),
        ranks=record.get("world", 0),
        threads=record.get("threads", 0),
    )


def _launched(cause: str) -> tuple[str, str]:
    """(what happened, what to do) of the launcher's words for an attempt's end."""
    if "was killed by SIGKILL" in cause:
        return cause, faults.WORDS["killed"]
    for remedy in faults.WORDS.values():
        if cause.endswith(f"; {remedy}"):
            return cause.removesuffix(f"; {remedy}"), remedy
    return cause, ""


def undone(starts: Sequence[Start]) -> list[int]:
    """Of each start the steps that came to nothing: those beyond the one from which a later start went on."""
    lost = iter(ledger.undone([(start.first, start.last) for start in starts if start.trained]))
    return [next(lost) if start.trained else 0 for start in starts]


def waits(starts: Sequence[Start]) -> list[float | None]:
    """Seconds from the end of the start before to the beginning of each; None where that is not known."""
    found: list[float | None] = [None] if starts else []
    for before, start in itertools.pairwise(starts):
        found.append(max(0.0, start.began - before.ended) if start.began and before.ended else None)
    return found


def differing(settings: Record, base: Record | None = None) -> list[tuple[str, Any, Any]]:
    """(dotted name, value, usual value) of settings that are not those of `base`, or not the defaults.

    A usual value of "required" stands where there is no default.
    """
    rows = []
    for name, _, default, _ in config.flat(Config):
        value, usual = _part(settings, name), _part(base, name)
        if base is None:
            usual = "required" if default is ... else config.to_plain(default)
        if value != usual and not (value is None and base is None):
            rows.append((name, value, usual))
    return rows


def _part(settings: Any, name: str) -> Any:
    """The setting of this dotted name; None where there is none."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def confused(confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
    """(true, predicted, samples, share of the true class) of the mistakes made most often."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, off.shape), strict=True)]
    return [(i, j, int(off[i, j]), float(off[i, j] / confusion[i].sum())) for i, j in pairs if off[i, j]]


def shards(facts: Facts, kind: str) -> Index:
    """The "train" or "val" set; several as one. Raises OSError, ValueError, KeyError where it is out of reach."""
    if kind not in facts.sets:
        try:
            given = facts.settings["data"][kind]
            found = index.join([Index.open(one) for one in ([given] if isinstance(given, str) else given)])
            gallery.same(facts.run, kind, found)
            facts.sets[kind] = found
        except (OSError, ValueError, KeyError) as error:
            facts.sets[kind] = error
    kept = facts.sets[kind]
    if isinstance(kept, Exception):
        raise kept
    return kept


def class_counts(facts: Facts, kind: str) -> dict[str, int]:
    """Class -> samples of "train" or "val" as indexed, or {} where the shards are out of reach."""
    try:
        found = shards(facts, kind)
    except (OSError, ValueError, KeyError):
        scores = facts.evaluation.get("per_class", ()) if kind == "val" else ()
        return {c["name"]: c["support"] for c in scores}
    return dict(zip(found.classes, found.counts, strict=True))


def spread(labels: np.ndarray, classes: int, most: int) -> list[int]:
    """At most `most` samples to show, class after class: as many of each, evenly out of it; of many classes some."""
    present = np.flatnonzero(np.bincount(labels, minlength=classes))
    shown = present[np.linspace(0, len(present) - 1, min(len(present), most)).astype(int)]
    found: list[int] = []
    for c in shown:
        own = np.flatnonzero(labels == c)
        found += own[np.linspace(0, len(own) - 1, min(len(own), most // len(shown))).astype(int)].tolist()
    return found


# ---- the recipe ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The file of settings that a run was submitted with, as its snapshot of the code keeps it."""

    name: str
    expected: str
    """What its head says that it brings; empty where it says nothing."""
    changed: list[tuple[str, Any, Any]]
    """(dotted name, value of the run, value of the recipe) of settings that differ."""

    @property
    def lowest(self) -> float | None:
        """The lowest percentage that is expected."""
        found = re.search(r"([\d.]+)(?: to [\d.]+)? %", self.expected)
        return float(found[1]) if found else None


def _given(facts: Facts) -> str:
    """The recipe's file as the first start that named one had it; "" where none did."""
    # A resume with other code keeps the records of the starts before it under these names.
    kept = sorted(facts.run.path.glob("env-before-attempt-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    for env in (*((rundir.read_json(path) or {}) for path in kept), facts.env):
        if env.get("recipe"):
            return str(env["recipe"])
        argv = [str(part) for part in env.get("argv") or ()]
        for part, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            if part == "--config" or part.startswith("--config="):
                return following if part == "--config" else part.partition("=")[2]
    return ""


def recipe(facts: Facts) -> Recipe | None:
    """None of a run that was not submitted with one, or whose snapshot does not have it."""
    given = _given(facts)
    file = facts.run.code / "configs" / Path(given).name
    if not given or not facts.settings or not file.is_file():
        return None
    try:
        base = config.to_plain(config.load(file))
    except ValueError:
        return None  # of another version
    head = " ".join(line.lstrip("# ") for line in file.read_text(encoding="utf-8").split("\n\ndata:")[0].splitlines())
    said = re.search(r"Expected: (.+?\.)(?: [A-Z]|$)", head)
    changed = [
        (name, value, usual)
        for name, value, usual in differing(facts.settings, base)
        # A place may be given from where one is; it is kept from the root.
        if not (isinstance(usual, str) and isinstance(value, str) and value.endswith(f"/{usual}"))
    ]
    return Recipe(f"configs/{file.name}", said[1] if said else "", changed)
