"""Why an attempt ended, from its folder alone: the rank that failed first, apart from those that its end took along.

cause(run.attempt(0)).text      # "FloatingPointError: loss is nan (rank 3, step 7)"
lines(explain(run.attempt(0)))  # the same at length: who failed first, who only followed, what each node said
"""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch import torchrun
from vitdist import faults, rundir
from vitdist.faults import Fault
from vitdist.rundir import Attempt


class Cause(NamedTuple):
    text: str
    """One line."""
    cascade: bool
    """Whether it tells only of another rank's end."""


@dataclass(frozen=True, order=True)
class Told:
    """What is known of the end of one rank; the first in order is the cause."""

    cascade: bool
    time: float
    text: str
    rank: int
    fault: Fault | None = field(default=None, compare=False)
    """What the rank noted itself, or its peers of it."""


@dataclass(frozen=True)
class Explanation:
    """An attempt's end, for people and as JSON."""

    attempt: int
    state: str
    """done, stopped, requeued, refused, failed; running: nothing recorded its end."""
    first: str
    """What failed first, in one line; "" where nothing did."""
    only_followed: bool
    """Whether even that tells only of another rank's end: the first one left no word."""
    rank: int | None
    """The one that failed first."""
    word: str
    """One of faults.WORDS, or ""."""
    remedy: str
    """What to do, in one sentence, or ""."""
    log: str
    """Of that rank, or of the node job."""
    stacks: str
    """Where that rank stood when it hung, or ""."""
    also: list[str]
    """Other ranks that failed by themselves."""
    followed: list[str]
    """Ranks that only lost another one."""
    nodes: list[str]
    """What the nodes' own checks and jobs said."""
    warnings: list[str]
    """The last warnings before the end."""
    decision: str
    """Why it is, or is not, started again; "" where that was not recorded."""


# Words of the roll call before training, which no rank notes.
_OF_NODES = {
    "node_check_failed": "tell the keepers of the node that is named; the next start leaves it out",
    "never_came": "the node that is named did not start its task: `scontrol show node` tells more",
}
_ERROR_LINE = re.compile(r"^(rank \d+: )?(error: |[A-Za-z_][\w.]*(Error|Exception|Exit|Failed|Interrupt)\b)")
_WARNINGS = 3


def cause(attempt: Attempt) -> Cause:
    """Why an attempt failed, in one line, from what its ranks left behind."""
    if told := ends(attempt):
        first = min(told)
        return Cause(first.text, first.cascade)
    for path in sorted(attempt.path.glob("logs/node-*/node.json")):
        node = rundir.read_json(path) or {}
        if node.get("cause"):
            return Cause(f"{node['host']}: {node['cause']}", False)
    for log in _torchrun_logs(attempt):
        if line := last_line(tail(log)):
            return Cause(f"{line} ({log})", False)
    return Cause(f"no trainer left a word; the node logs are in {_submitit(attempt)}", True)


def ends(attempt: Attempt) -> list[Told]:
    """What is known of the ends of the ranks, in no order; [] if no rank failed or left a word."""
    noted = {fault.rank: fault for fault in faults.read(attempt)}
    told = [Told(fault.cascade, fault.time, faults.line(fault), fault.rank, fault) for fault in noted.values()]
    record = rundir.read_json(attempt.train) or {}
    error = record.get("error")
    if error and error["rank"] not in noted:  # its disk was full, or it ended before it could note anything
        text = f"{error['type']}: {faults.one_line(error['message'])} (rank {error['rank']}, step {error['step']})"
        told.append(Told(faults.peer_gone(text), 0.0, text, error["rank"]))
    # That a rank hangs others may have noted for it, also of one that was killed: then what came first counts.
    spoke = {rank for rank, fault in noted.items() if fault.word != "hang"} | ({error["rank"]} if error else set())
    for log in _torchrun_logs(attempt):
        for failure in torchrun.failures(tail(log)):
            killed = failure.code < 0 and failure.rank not in spoke
            if killed or (failure.code != rundir.EXIT_STOPPED and failure.rank not in spoke | noted.keys()):
                text, peer = _of_rank(failure, log.parent / f"rank-{failure.rank}.log", log)
                told.append(Told(peer, failure.time, text, failure.rank))
    return told


def explain(attempt: Attempt) -> Explanation:
    """Everything that an attempt's folder tells of its end."""
    launched, record = rundir.read_json(attempt.job) or {}, rundir.read_json(attempt.train) or {}
    state = str(launched.get("state") or record.get("state") or "running")
    told = sorted(ends(attempt))
    first = told[0] if told else None
    text, cascade = first.text if first else "", bool(first and first.cascade)
    if not first and state in ("failed", "refused"):
        text, cascade = cause(attempt)
    if launched.get("cause") and (not first or cascade):  # the node job may know more than the ranks: a lost node
        text, cascade = str(launched["cause"]), False
    word = first.fault.word if first and first.fault else str((launched.get("start") or {}).get("word") or "")
    text, remedy = split(text)
    rest = told[1:]
    events = [event for event in record.get("events", []) if isinstance(event, dict)]
    stacks = attempt.stacks(first.rank) if first else None
    return Explanation(
        attempt=attempt.number,
        state=state,
        first=text,
        only_followed=cascade,
        rank=first.rank if first else None,
        word=word,
        remedy=remedy or _remedy(text, word),
        log=str(rank_log(attempt, first.rank) or "") if first else str(_submitit(attempt)) if text else "",
        stacks=str(stacks) if stacks and stacks.exists() else "",
        also=[split(each.text)[0] for each in rest if not each.cascade],
        followed=_grouped([each for each in rest if each.cascade]),
        nodes=[node for node in _nodes(attempt) if not text or text not in node],
        warnings=[str(event.get("text")) for event in events[-_WARNINGS:]] if text else [],
        decision=_decision(launched),
    )


def lines(found: Explanation) -> list[str]:
    """An explanation as aligned text, a fact a line."""
    named: list[tuple[str, str]] = []
    if found.first:
        named.append(("first", found.first + (" (it only followed: the first left no word)" * found.only_followed)))
    named += [("what to do", found.remedy), ("and then", found.decision)]
    named.append(("log", found.log))
    named.append(("stacks", found.stacks))
    for title, texts in (
        ("also failed", found.also),
        ("followed", found.followed),
        ("nodes", found.nodes),
        ("before", found.warnings),
    ):
        named += [(title if number == 0 else "", text) for number, text in enumerate(texts)]
    return [f"{title:<12}{faults.one_line(text, 2000)}" for title, text in named if text]


def split(text: str) -> tuple[str, str]:
    """A cause in one line -> (what happened, what to do); the second is "" where it does not say."""
    for remedy in faults.WORDS.values():
        if text.endswith(f"; {remedy}"):
            return text.removesuffix(f"; {remedy}"), remedy
    return text, ""


def rank_log(attempt: Attempt, rank: int) -> Path | None:
    """The log of a rank, whichever node it was on; None if it has none."""
    return next(iter(attempt.path.glob(f"logs/node-*/rank-{rank}.log")), None)


def _decision(launched: dict[str, Any]) -> str:
    if not launched.get("decision") or launched.get("state") == "done":
        return ""
    again = "is started again" if launched.get("state") == "requeued" else "is not started again"
    left = f", without {', '.join(map(str, launched['exclude']))}" if launched.get("exclude") else ""
    return f"it {again}: {launched['decision']}{left}"


def _remedy(text: str, word: str) -> str:
    known = faults.WORDS | _OF_NODES
    if word in known:
        return known[word]
    return faults.WORDS["killed"] if "was killed by SIGKILL" in text else ""


def _grouped(told: Iterable[Told]) -> list[str]:
    """One line for all ranks that say the same of another's end."""
    groups: dict[str, list[int]] = {}
    for each in told:
        what = f"{each.fault.word}: {each.fault.type}: {each.fault.message}" if each.fault else split(each.text)[0]
        # Addresses and ports differ, and what happened does not.
        groups.setdefault(re.sub(r"\[?[\d.a-f:]*\]?:\d+", "...", what), []).append(each.rank)
    return [f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}: {what}" for what, ranks in groups.items()]


def spans(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in found)


def _nodes(attempt: Attempt) -> list[str]:
    """What the nodes' checks found and how their jobs ended, where that is no plain end."""
    found: list[str] = []
    for folder in sorted(attempt.path.glob("logs/node-*"), key=_number):
        check, node = rundir.read_json(folder / "check.json") or {}, rundir.read_json(folder / "node.json") or {}
        host = str(check.get("host") or node.get("host") or folder.name)
        found += [f"{host}: {fault}" for fault in _texts(check.get("faults"))]
        found += [f"{host}: warning: {warning}" for warning in _texts(check.get("warnings"))]
        if node.get("cause"):
            found.append(f"{host}: {split(str(node['cause']))[0]}")
    return found


def _texts(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else []


def _number(folder: Path) -> int:
    number = folder.name.removeprefix("node-")
    return int(number) if number.isdecimal() else -1


def _torchrun_logs(attempt: Attempt) -> list[Path]:
    return sorted(attempt.path.glob("logs/node-*/torchrun.log"), key=lambda log: _number(log.parent))


def _submitit(attempt: Attempt) -> Path:
    return attempt.path.parents[1] / "submitit"


def _of_rank(failure: torchrun.Failure, log: Path, torchrun_log: Path) -> tuple[str, bool]:
    if failure.code < 0:
        name = signal.Signals(-failure.code).name
        # NCCL's own watchdog aborts the process of a rank that waited too long for another one.
        waited = name == "SIGABRT" and "ollective operation timeout" in tail(log)
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"rank {failure.rank} was killed by {name}{hint} ({log})", waited
    line = last_line(tail(log)) or last_line(tail(torchrun_log))
    return f"rank {failure.rank}: {line.removeprefix(f'rank {failure.rank}: ')} ({log})", faults.peer_gone(line)


def last_line(text: str) -> str:
    """The last line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _ERROR_LINE.match(line)), lines[-1] if lines else "")


def tail(path: Path) -> str:
    """The end of a log; a trainer may have written gigabytes."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 200_000))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
