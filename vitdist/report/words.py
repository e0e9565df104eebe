"""A run in words and figures as people say them, for all forms of its report."""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vitdist import config, history, rundir
from vitdist.data import storage
from vitdist.report import folders
from vitdist.report.facts import Facts, Record, Start, undone, waits

DONE = "finished"
SILENT_S = 600  # and ten times the usual distance of rows: evaluations and saves are shorter


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    whole = round(seconds)
    for size, name, rest, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            more = whole % size // rest
            return f"{whole // size} {name}" + (f" {more} {small}" if more else "")
    return f"{whole} s"


def figure(value: Any) -> str:
    """A number with the digits that matter; other things as text, URLs without what is secret in them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else open_to_all(str(value))
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def setting(value: Any) -> str:
    """A setting as it was given, with all its digits; URLs without what is secret in them."""
    if value is None or isinstance(value, str):
        return "none" if value is None else open_to_all(value)
    return json.dumps(_open(value), ensure_ascii=False)


def _open(value: Any) -> Any:
    """`value` with all text in it open to all."""
    if isinstance(value, dict):
        return {key: _open(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_open(part) for part in value]
    return open_to_all(value) if isinstance(value, str) else value


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%-d %b %Y, %H:%M} UTC"


def verdict(facts: Facts) -> tuple[str, str]:
    """(a word for the badge, what became of the run in a sentence or two)."""
    record, scores, error = facts.record, facts.scores, facts.about("error")
    step, total = max((s.last for s in facts.starts), default=0), record.get("total_steps")
    place = f"step {step:,}" + (f" of {total:,}" if total else "")
    good = ""
    if "top1" in scores:
        interval = (facts.evaluation.get("intervals") or {}).get("top1")
        between = f", 95% interval {100 * interval[0]:.1f} to {percent(interval[1])}" if interval else ""
        good = f"{percent(scores['top1'])} of the validation samples are classified right (top-1{between})"
        good += f", macro-F1 {scores['macro_f1']:.3f}" if "macro_f1" in scores else ""
    match record["state"]:
        case "done":
            took = f" in {duration(facts.seconds)}" if facts.seconds else ""
            starts = f" and {len(facts.starts)} starts" if len(facts.starts) > 1 else ""
            return DONE, f"Trained to the end, {step:,} steps{took}{starts}{good and ': '}{good}."
        case "failed" | "refused":
            cause, noted = facts.starts[-1].why or "No cause is recorded", facts.starts[-1].remedy
            own = error.get("rank") is not None and not noted and cause.startswith(f"{error['type']}:")
            rank = f" on rank {error['rank']}" if own else ""
            word, text = "failed", f"Failed at {place}{rank}. {cause.rstrip('.')}."
        case "stopped" | "requeued":
            word, why = "stopped", facts.starts[-1].why
            text = f"Stopped at {place}{why and ' by '}{why}; it can go on from its last checkpoint."
        case "running":
            left = [f", about {duration(eta)} left" for _, eta in facts.series("perf/eta_s")[-1:]]
            quiet = silence(facts)
            word = "running"
            text = f"At {place}; nothing was written for {duration(quiet)}." if quiet else f"At {place}{''.join(left)}."
        case _:
            return "submitted", "Nothing has been trained yet."
    return word, text + (f" At the newest evaluation {good}." if good else "")


def now() -> float:
    """Seconds since 1970."""
    return time.time()


def silence(facts: Facts) -> float:
    """Seconds for which a run that should write rows wrote none; 0 where that is no longer than usual."""
    _, times = facts.history.series(history.TIME)
    seen = [one for one in (*times[-1:].tolist(), facts.starts[-1].began) if one]
    quiet = now() - max(seen) if seen else 0.0
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return quiet if quiet > max(SILENT_S, 10 * usual) else 0.0


def going(facts: Facts) -> bool:
    """Whether the run has not come to its end, or will be started once more."""
    if facts.record["state"] in ("submitted", "running", "requeued"):
        return True
    job = rundir.read_json(facts.run.attempts()[-1].job) or {}
    return job.get("state") == "requeued"


def cost(facts: Facts) -> tuple[str, str]:
    """(how many, of what): GPU-hours of all starts together, on a CPU core-hours."""
    ranks, threads = facts.record.get("world", 1), facts.record.get("threads", 1)
    gpu = facts.record.get("device", "CPU") != "CPU"
    # A start that ended before it told how many it had counts as the newest does, as in the ledger.
    parts = (s.seconds * (s.ranks or ranks) * (1 if gpu else s.threads or threads) for s in facts.starts)
    return figure(sum(parts) / 3600), "GPU-hours" if gpu else "CPU core-hours"


def goodput(starts: Sequence[Start]) -> str:
    """How many of the steps done were kept, in words; empty before the first step."""
    done = sum(start.last - start.first for start in starts if start.trained)
    if not done:
        return ""
    kept = done - sum(undone(starts))
    between = sum(filter(None, waits(starts)))
    text = f"Goodput {percent(kept / done)}: {kept:,} of {done:,} steps done were kept"
    text += f", in {len(starts)} starts" if len(starts) > 1 else ""
    return text + (f" with {duration(between)} between them." if between >= 1 else ".")


def open_to_all(text: str) -> str:
    """Text that may hold a URL, without passwords and signatures: a report is passed on."""
    return storage.shown(text) if "://" in text else text


def submission(env: Record, name: str, point: Sequence[str] = ()) -> str:
    """The command that submitted a run, for one of this name; empty if it was not submitted.

    Of a `point` of a sweep, which are its settings, the command that would have submitted it alone.
    """
    argv = [open_to_all(str(part)) for part in env.get("argv") or ()]
    if not argv or not argv[0].endswith("submit.py"):
        return ""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--name")
    if point:
        parser.add_argument("--sweep", nargs="+", action="extend")
        parser.add_argument("--parallel")
    _, kept = parser.parse_known_args(argv)
    return shlex.join(["python", *kept, *map(open_to_all, point), "--name", name])


def reproduction(facts: Facts) -> list[str]:
    """The commands that run the same once more."""
    run, env, at = facts.run, facts.env, shlex.quote(str(facts.run.path))
    lines = [f"git checkout {env['commit']}"] if env.get("commit") else []
    lines += [f"git apply {at}/patch.diff"] if env.get("dirty") and run.patch.exists() else []
    direct = f"torchrun --nproc-per-node {facts.record.get('world', 1)} -m vitdist.train {at}/config.yaml"
    again = f"{run.name}-again"
    if went_on(facts):  # its settings may be other than those of its first command
        place = config.read_yaml(run.cluster) if run.cluster.exists() else {}
        nodes = ["--nodes", str(place["nodes"])] if place.get("nodes") else []
        return [*lines, shlex.join([*_SUBMIT, "--config", str(run.config), *nodes, "--name", again])]
    return [*lines, submission(env, again, folders.overrides(run)) or direct]


def resumption(facts: Facts) -> str:
    """The command that goes on with the run."""
    run = facts.run
    if went_on(facts):
        return shlex.join([*_SUBMIT, "--resume", str(run.path)])
    direct = f"torchrun --nproc-per-node {facts.record.get('world', 1)} -m vitdist.train {shlex.quote(str(run.path))}"
    return submission(facts.env, run.name, folders.overrides(run)) or direct


_SUBMIT = ("python", "launch/submit.py")


def went_on(facts: Facts) -> bool:
    """Whether a run that was submitted was resumed: then no single command made it."""
    argv = [str(part) for part in facts.env.get("argv") or ()]
    if not argv or not argv[0].endswith("submit.py"):
        return False
    resumed = any(part == "--resume" or part.startswith("--resume=") for part in argv)
    return resumed or sum(start.trained for start in facts.starts) > 1
