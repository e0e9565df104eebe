"""Runs and their starts as aligned text, for launch/jobs.py.

print(table(statuses, width=120, colour=True))
print(attempt_line(start(run.attempt(0))))
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from launch import status, why
from launch.status import Status
from vitdist import console, faults, rundir
from vitdist.rundir import Attempt


def table(found: Sequence[Status], width: int, colour: bool) -> str:
    """Runs as aligned text, the note cut to `width` columns (0: not); pure."""
    rows = [("NAME", "STATE", "STEP", "ETA", "IMAGES/S", "NODES", "AGE", "NOTE")]
    for each in found:
        rows.append(
            (
                faults.one_line(each.name, 100),
                each.state,
                step(each),
                "" if each.eta_s is None else console.duration(each.eta_s),
                "" if each.images_per_s is None else f"{each.images_per_s:,.0f}",
                faults.one_line(each.nodes, 40),
                status.age(each.age_s),
                faults.one_line(
                    f"{each.note}: {each.remedy}" if each.note and each.remedy else each.note or each.remedy
                ),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(wide) if 2 <= column <= 4 else cell.ljust(wide)
            for column, (cell, wide) in enumerate(zip(row[:7], widths, strict=True))
        ]
        note = row[7]
        room = width - sum(widths) - 2 * 7
        if width and len(note) > room:
            note = f"{note[: max(0, room - 1)]}…" if room > 8 else ""
        if colour and number:
            cells[1] = f"\033[{COLOURS.get(row[1], '0')}m{cells[1]}\033[0m"
        elif colour:
            cells, note = [f"\033[2m{cells[0]}", *cells[1:]], f"{note}\033[0m"
        lines.append("  ".join([*cells, note]).rstrip())
    return "\n".join(lines)


COLOURS = {
    **dict.fromkeys(("done", "running"), "32"),
    **dict.fromkeys(("pending", "starting", "stopping", "suspended"), "33"),
    **dict.fromkeys(("failed", "refused", "gone", "unreadable"), "31"),
    "UNKNOWN": "35",
}


def step(each: Status) -> str:
    if each.step is None:
        return ""
    return f"{each.step}/{each.total}" if each.total else str(each.step)


def start(attempt: Attempt) -> dict[str, Any]:
    """One start, as JSON has it."""
    about: dict[str, Any] = {"number": attempt.number}
    try:
        launched, trained = rundir.read_json(attempt.job) or {}, rundir.read_json(attempt.train) or {}
        state = launched.get("state") or trained.get("state") or "not begun"
        cause = launched.get("cause") or (trained.get("reason") if state != "done" else None)
        about |= {
            "state": state,
            "job": launched.get("job_id"),
            "hosts": status.compressed(launched.get("hosts") or ()),
            "started": launched.get("started") or trained.get("started"),
            "ended": launched.get("ended") or trained.get("ended"),
            "began_at": trained.get("resumed_from") or 0,
            "step": trained.get("step"),
            "cause": faults.one_line(why.split(str(cause))[0], 300) if cause else None,
            "decision": launched.get("decision"),
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        about |= {"state": "unreadable", "cause": faults.one_line(str(error), 200)}
    return about


def attempt_line(about: dict[str, Any]) -> str:
    parts = [str(about["number"])]
    if about.get("job"):
        parts.append(f"job {about['job']}" + (f" on {about['hosts']}" if about["hosts"] else ""))
    if about.get("started"):
        parts.append(
            f"{_local(about['started'])} to {_local(about['ended'])[-5:] if about.get('ended') else _open_end(about)}"
        )
    state = about["state"]
    if about.get("step") is not None:
        state += f" at step {about['step']}" if about["state"] != "running" else f" from step {about['began_at']}"
    told = [text for text in (about.get("cause"), about.get("decision")) if text]
    return "  ".join(parts) + f"  {state}" + (f": {'; '.join(told)}" if told else "")


def _open_end(about: dict[str, Any]) -> str:
    return "now" if about["state"] == "running" else "?"


def _local(time_: str) -> str:
    return f"{datetime.fromisoformat(time_).astimezone():%m-%d %H:%M}"
