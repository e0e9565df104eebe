"""What runs, where, how far, why it waits or ended; logs, stop, cancel, resume.

    python launch/jobs.py                           # all runs: state, step, ETA, nodes, reason of what waits
    python launch/jobs.py RUN                       # one run: starts, checkpoints, what to do next
    python launch/jobs.py RUN logs -f --rank all    # also over to the next start, until the run ends
    python launch/jobs.py RUN follow                # the bar; Ctrl-C leaves the run alone
    python launch/jobs.py RUN why                   # the first rank that failed, and what to do
    python launch/jobs.py RUN stop --wait           # checkpoint first, and SLURM does not start it again
    python launch/jobs.py RUN cancel                # at once
    python launch/jobs.py RUN resume --nodes 8 optim.lr=1e-4

RUN is a name below --runs, the beginning of one, a path, a job id, or (for stop and cancel too) a sweep. Works without
SLURM and without its accounting; where SLURM is silent a run is UNKNOWN, never gone.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

if __name__ == "__main__":
    # Python put launch/ there, whose files would hide modules of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import completion, ending, follow, logs, shown, slurm, status, torchrun, why
from launch.status import LIVE, Status
from vitdist import console, faults, manifest, rundir
from vitdist.config import SettingsError
from vitdist.rundir import Attempt, RunDir

PATIENCE_S = 10.0
"""For an answer of SLURM."""
EVERY_S = 5.0
COMMANDS = {
    "logs": "what the ranks print (-f: as they print it)",
    "follow": "progress until the end; Ctrl-C leaves the run alone",
    "why": "why the run ended, or that it is well",
    "stop": "save a checkpoint, end, and do not start again",
    "cancel": "end at once",
    "resume": "go on from the newest checkpoint, also with other nodes, time and settings",
}
_SWEEP = "sweep.yaml"


class Sweep(NamedTuple):
    """Several runs that were sent off together."""

    path: Path
    points: list[RunDir]


def main(argv: Sequence[str] | None = None, launcher: str = torchrun.LAUNCHER) -> int:
    """The command; returns its exit code. `launcher`: a module with torchrun's flags, for tests."""
    parser = _parser()
    args = parser.parse_intermixed_args(list(sys.argv[1:] if argv is None else argv))
    try:
        code = _run(args, launcher)
        sys.stdout.flush()
        return code
    except (SettingsError, ValueError) as error:
        _say(f"error: {error}")
        return rundir.EXIT_REFUSED
    except BrokenPipeError:  # head, or a pager that was left
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        _say(f"error: {error.filename or args.runs}: {error.strerror or error}")
        return rundir.EXIT_REFUSED
    except KeyboardInterrupt:
        return follow.EXIT_LEFT


def _run(args: argparse.Namespace, launcher: str) -> int:
    if args.completion:
        from launch import submit

        print(completion.script(args.completion, {"jobs.py": _parser(), "submit.py": submit._parser()}, COMMANDS))
        return 0
    _check(args)
    if args.run is None:
        return _watched(args, lambda: _list(args))
    found = find(args.run, Path(args.runs))
    if isinstance(found, Sweep):
        return _of_sweep(args, found, launcher)
    actions: dict[str | None, Callable[[], int]] = {
        None: lambda: _watched(args, lambda: _details(args, found)),
        "logs": lambda: _logs(args, found),
        "follow": lambda: _follow(args, found),
        "why": lambda: _why(args, found),
        "stop": lambda: _stop(args, [found]),
        "cancel": lambda: _cancel(args, [found]),
        "resume": lambda: _resume(args, found.path, launcher),
    }
    return actions[args.command]()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- the command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _say(f"error: {message}; see --help")
        raise SystemExit(rundir.EXIT_REFUSED)


# Options that belong to some commands only; None: the list and RUN alone.
_OF: dict[str, tuple[str | None, ...]] = {
    "active": (None,),
    "watch": (None,),
    "every": (None,),
    "json": (None, "why"),
    "f": ("logs",),
    "rank": ("logs",),
    "node": ("logs",),
    "lines": ("logs",),
    "attempt": ("logs", "why"),
    "wait": ("stop",),
    "yes": ("cancel", "resume"),
    "nodes": ("resume",),
    "time": ("resume",),
    "follow": ("logs", "resume"),
    "overrides": ("resume",),
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python launch/jobs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="commands:\n" + "\n".join(f"  {name:<8}{what}" for name, what in COMMANDS.items()),
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="name, beginning of a name, path or job id")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="resume: settings from here on")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders lie (default: runs)")
    parser.add_argument("--json", action="store_true", help="for programs (list, RUN, why)")
    parser.add_argument("--active", action="store_true", help="list: only what waits, runs or is not known")
    parser.add_argument("--watch", action="store_true", help="list, RUN: again and again, until Ctrl-C")
    parser.add_argument("--every", type=float, metavar="S", help=f"--watch: seconds between (default {EVERY_S:g})")
    parser.add_argument("-f", action="store_true", help="logs: go on as they grow, until the run ends")
    parser.add_argument("--rank", metavar="R", help="logs: of this rank (default 0), or all")
    parser.add_argument("--node", type=_natural, metavar="N", help="logs: only of ranks on this node, from 0")
    parser.add_argument("--attempt", type=_natural, metavar="K", help="logs, why: of this start (default: the newest)")
    parser.add_argument("-n", "--lines", type=_natural, metavar="L", help="logs: only the last L lines")
    parser.add_argument("--wait", action="store_true", help="stop: until it has saved and ended")
    parser.add_argument("--yes", action="store_true", help="cancel, resume: ask nothing")
    parser.add_argument("--nodes", type=int, metavar="N", help="resume: on so many nodes")
    parser.add_argument("--time", metavar="T", help="resume: limit of one start")
    parser.add_argument("--follow", action="store_true", help="resume: show progress until the end; logs: as -f")
    shells = f"print a script that completes commands, options, runs and settings: {', '.join(completion.SHELLS)}"
    parser.add_argument("--completion", choices=completion.SHELLS, help=shells)
    return parser


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return int(text)


def _check(args: argparse.Namespace) -> None:
    """Raises SettingsError for what does not go together; `logs RUN` is taken for `RUN logs`."""
    if args.run in COMMANDS and args.command not in COMMANDS and not os.path.exists(Path(args.runs) / args.run):
        args.run, args.command = args.command, args.run
    if args.command is not None and args.run is None:
        raise SettingsError(f"{args.command}: of which run? python launch/jobs.py RUN {args.command}")
    if args.command is not None and args.command not in COMMANDS:
        raise SettingsError(f"{_quoted(args.command)}: no command; {_meant(args.command, COMMANDS)}")
    wrong = []
    for name, commands in _OF.items():
        if getattr(args, name) not in (None, False, []) and args.command not in commands:
            option = "settings" if name == "overrides" else "-f" if name == "f" else f"--{name}"
            to = " and ".join(command or "the list" for command in commands)
            wrong.append(f"{option}: belongs to {to}")
    if args.active and args.run:
        wrong.append("--active: belongs to the list")
    if args.every is not None and not 0.1 <= args.every <= 86_400:
        wrong.append(f"--every {args.every:g}: from 0.1 to 86400 seconds")
    if args.nodes is not None and args.nodes < 1:
        wrong.append(f"--nodes {args.nodes}: at least 1")
    if wrong:
        raise SettingsError("\nerror: ".join(wrong))


def _meant(word: str, known: Sequence[str] | dict[str, str], least: float = 0.6) -> str:
    close = difflib.get_close_matches(word, list(known), 3, least)
    return f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(sorted(known)[:10])}"


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


# ---- which run -----------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run, be it a broken one."""
    return os.path.exists(folder / "config.yaml") or os.path.exists(folder / "attempts")


def below(runs: Path) -> list[RunDir]:
    """The runs in a folder, by name. Raises SettingsError where the folder cannot be read."""
    try:
        with os.scandir(runs.absolute()) as entries:
            folders = [Path(entry.path) for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingsError(f"--runs {runs}: {error.strerror}") from None
    return [RunDir(folder) for folder in sorted(folders) if is_run(folder)]


def find(text: str, runs: Path) -> RunDir | Sweep:
    """The run that is meant: a name, a path, a job id, the only one that begins so. Raises SettingsError."""
    if not text.strip():
        raise SettingsError("RUN is empty: give a name, a path or a job id")
    named = runs / text
    for folder in ([named] if re.fullmatch(r"[\w.-]+", text) else []) + [Path(os.path.expanduser(text))]:
        if found := _at(folder):
            return found
    there = below(runs)
    if re.fullmatch(r"\d{1,10}(_\d{1,7})?", text) and (found := _by_job(text, there)):
        return found
    begins = [run for run in there if run.name.startswith(text)]
    if len(begins) == 1:
        return begins[0]
    if begins:
        # A sweep's points begin with its name.
        raise SettingsError(
            f"{_quoted(text)}: which of {', '.join(run.name for run in begins[:6])}{', ...' * (len(begins) > 6)}?"
        )
    if not there:
        raise SettingsError(f"{_quoted(text)}: no runs in {runs.absolute()}; give their folder with --runs")
    raise SettingsError(f"{_quoted(text)}: no such run in {runs}; {_meant(text, [run.name for run in there], 0.5)}")


def _at(folder: Path) -> RunDir | Sweep | None:
    if is_run(folder):
        return RunDir(folder.resolve())
    if os.path.exists(folder / _SWEEP):
        from launch import sweep

        found = sweep.read(folder)
        points = [RunDir(folder.resolve().parent / point.name) for point in (found.points if found else ())]
        return Sweep(folder.resolve(), [run for run in points if is_run(run.path)])
    return None


def _by_job(text: str, there: Sequence[RunDir]) -> RunDir | None:
    """The run with this job, its newest one first, else one of an earlier start."""
    with contextlib.suppress(StopIteration):
        return next(run for run in there if slurm.job_of(run) == text)
    for run in there:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if any(str((rundir.read_json(each.job) or {}).get("job_id")) == text for each in run.attempts()):
                return run
    return None


# ---- the list ------------------------------------------------------------------------------------


def _watched(args: argparse.Namespace, show: Callable[[], str]) -> int:
    """Print what `show` makes: once, or again and again."""
    if not args.watch:
        print(show())
        return 0
    terminal = sys.stdout.isatty()
    try:
        while True:
            text = show()
            # Home, each line with its rest erased, then all below: a cleared screen would flicker.
            print("\033[H" + text.replace("\n", "\033[K\n") + "\033[K\n\033[J" if terminal else f"{text}\n", end="")
            sys.stdout.flush()
            time.sleep(args.every or EVERY_S)
            if not terminal:
                print()
    except KeyboardInterrupt:
        return 0


def _list(args: argparse.Namespace) -> str:
    runs = Path(args.runs)
    found, answered = status.read_all(below(runs), PATIENCE_S)
    return _listed(args, found, answered)


def _listed(args: argparse.Namespace, found: list[Status], answered: bool) -> str:
    found = sorted(found, key=lambda each: (-each.age_s, each.name))
    if args.active:
        found = [each for each in found if each.state in (*LIVE, "UNKNOWN")]
    if args.json:
        return json.dumps([dataclasses.asdict(each) for each in found], indent=1, ensure_ascii=False)
    silence = "" if answered else "SLURM does not answer: what it alone knows is UNKNOWN"
    if silence and not args.watch:
        _say(silence)
    if not found:
        return f"no {'active ' * args.active}runs in {args.runs}"
    width = shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0
    text = shown.table(found, width, _colour())
    return f"{text}\n{silence}" if silence and args.watch else text


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


# ---- one run -------------------------------------------------------------------------------------


def _details(args: argparse.Namespace, run: RunDir) -> str:
    folder, found = status.read_one(run, PATIENCE_S)
    checkpoints = [] if folder.broken else list(manifest.entries(run, thorough=False))
    whole = next((entry.step for entry in checkpoints if entry.fault is None), None)
    attempts = [] if folder.broken else [shown.start(attempt) for attempt in run.attempts()]
    for each in attempts:
        if each["state"] == "running" and (each is not attempts[-1] or found.state not in (*LIVE, "UNKNOWN")):
            each["state"] = "cut off"  # by a node's end, or a signal that leaves no time for a record
    next_steps = _next(args, run, found, whole)
    if args.json:
        about = dataclasses.asdict(found) | {
            "attempts": attempts,
            "checkpoints": [{"name": e.path.name, "step": e.step, "fault": e.fault} for e in checkpoints],
            "goes_on_from": whole,
            "next": next_steps,
        }
        return json.dumps(about, indent=1, ensure_ascii=False)
    state = found.state
    if _colour():
        state = f"\033[{shown.COLOURS.get(state, '0')}m{state}\033[0m"
    figures = [f"step {shown.step(found)}" if found.step is not None else ""]
    figures += [f"{found.images_per_s:,.0f} images/s" if found.images_per_s is not None else ""]
    figures += [f"loss {found.loss:.4f}" if found.loss is not None and found.state in LIVE else ""]
    figures += [f"ETA {console.duration(found.eta_s)}" if found.eta_s is not None else "", found.note]
    lines = [f"{faults.one_line(run.name, 100)}  {state}" + "".join(f", {text}" for text in figures if text)]
    about_job = f"{found.job}{f' on {found.nodes}' if found.nodes else ''}" if found.job else ""
    lines += [f"folder       {run.path}"]
    lines += [f"{'job' if folder.job_id else 'process':<13}{about_job}"] if about_job else []
    for number, each in enumerate(attempts):
        lines.append(f"{'' if number else 'starts':<13}{shown.attempt_line(each)}")
    for number, entry in enumerate(checkpoints):
        lines.append(f"{'' if number else 'checkpoints':<13}{manifest.line(entry, best=False, verified=False)}")
    if not checkpoints and attempts:
        lines.append("checkpoints  none")
    if found.remedy and found.remedy not in ("why", "resume"):
        lines.append(f"{'what to do':<13}{found.remedy}")
    lines += [f"{'' if number else 'next':<13}{text}" for number, text in enumerate(next_steps)]
    return "\n".join(lines)


def _next(args: argparse.Namespace, run: RunDir, found: Status, whole: int | None) -> list[str]:
    """Commands that make sense in this state, ready to be copied."""
    me = _command(args, run)
    goes_on = f"# goes on from step {whole}" if whole is not None else "# begins anew: there is no checkpoint"
    resume = f"{me} resume  {goes_on}"
    match found.state:
        case "pending":
            return [f"{me} follow", f"{me} cancel"]
        case "starting" | "running" | "suspended" | "stopping":
            return [f"{me} logs -f", f"{me} stop  # a checkpoint first", f"{me} cancel  # at once"]
        case "done":
            report = [f"open {shlex.quote(str(run.report))}"] if run.report.exists() else []
            return [*report, f"{me} resume {_longer(run, found)}  # makes it longer"]
        case "stopped" | "cancelled":
            return [resume]
        case "failed" | "refused" | "gone":
            return [f"{me} why", f"{me} logs", resume]
        case "UNKNOWN" if found.job:
            return [f"squeue -j {found.job}", f"{me} logs"]
        case _:
            return []


def _longer(run: RunDir, found: Status) -> str:
    """An override that doubles the length of a finished run, in the unit that it was given in."""
    from vitdist import config

    try:
        train = config.load(run.config).train
    except (SettingsError, OSError):
        return "train.steps=..."
    if train.steps is None and train.epochs:
        return f"train.epochs={2 * train.epochs:g}"
    return f"train.steps={2 * (found.total or train.steps or 1)}"


def _command(args: argparse.Namespace, run: RunDir) -> str:
    """This command for a run, as it can be typed where the user is."""
    runs = Path(args.runs)
    if run.path.parent == runs.resolve():
        place = "" if args.runs == "runs" else f"--runs {shlex.quote(args.runs)} "
        return f"python launch/jobs.py {place}{shlex.quote(run.name)}"
    return f"python launch/jobs.py {shlex.quote(str(run.path))}"


def _why(args: argparse.Namespace, run: RunDir) -> int:
    folder, found = status.read_one(run, PATIENCE_S)
    if folder.broken:
        raise SettingsError(f"{run.path}: {folder.broken}")
    attempt = _attempt_of(run, args.attempt)
    whole = ending.kept(run)
    explained = why.explain(attempt) if attempt else None
    if args.json:
        about = {"run": dataclasses.asdict(found), "attempt": dataclasses.asdict(explained) if explained else None}
        print(json.dumps(about, indent=1, ensure_ascii=False))
        return 0
    at = f" at step {shown.step(found)}" if found.step is not None else ""
    words = {"done": "done, and well", "running": "running, and well", "UNKNOWN": "not known"}
    print(f"{run.name}: {words.get(found.state, found.state)}{at}" + (f"; {found.note}" if found.note else ""))
    if attempt and explained:
        if args.attempt is not None or explained.state != found.state:
            print(f"{'start':<12}{shown.attempt_line(shown.start(attempt) | {'cause': None, 'decision': None})}")
        for line in why.lines(explained):
            print(line)
    if args.attempt is None:
        for number, text in enumerate(_earlier(run, attempt)):
            print(f"{'' if number else 'earlier':<12}{text}")
    if found.state not in (*LIVE, "done"):
        for number, text in enumerate(t for t in _next(args, run, found, whole) if not t.endswith(" why")):
            print(f"{'' if number else 'next':<12}{text}")
    return 0


def _earlier(run: RunDir, newest: Attempt | None) -> list[str]:
    """Starts before the newest that ended otherwise than by SLURM's own will."""
    found = []
    for attempt in run.attempts():
        if newest and attempt.number < newest.number:
            found.append(shown.attempt_line(shown.start(attempt)))
    return found[-5:]


def _attempt_of(run: RunDir, number: int | None) -> Attempt | None:
    attempts = run.attempts()
    if number is None:
        return attempts[-1] if attempts else None
    chosen = next((attempt for attempt in attempts if attempt.number == number), None)
    if chosen is None:
        there = f"it has {attempts[0].number} to {attempts[-1].number}" if attempts else "it has none yet"
        raise SettingsError(f"--attempt {number}: {there}")
    return chosen


def _logs(args: argparse.Namespace, run: RunDir) -> int:
    rank = args.rank
    if rank is None:
        chosen = None if args.node is not None else 0
    elif rank == "all":
        chosen = None
    elif rank.isascii() and rank.isdecimal() and len(rank) < 10:
        chosen = int(rank)
    else:
        raise SettingsError(f"--rank {_quoted(rank)}: a number from 0, or all")
    choice = logs.Choice(chosen, args.node, args.attempt, args.lines)
    if not (args.f or args.follow):
        logs.show(run, choice, sys.stdout.buffer)
        return 0
    if args.attempt is not None:
        _attempt_of(run, args.attempt)
    try:
        return logs.tail(run, choice, _job(run), sys.stdout.buffer)
    except KeyboardInterrupt:
        return follow.EXIT_LEFT


def _job(run: RunDir) -> follow.Job:
    folder = status.look(run)
    if folder.broken:
        raise SettingsError(f"{run.path}: {folder.broken}")
    return follow.Slurm(folder.job_id) if folder.job_id else follow.Here(run)


def _follow(args: argparse.Namespace, run: RunDir) -> int:
    folder = status.look(run)
    if folder.broken:
        raise SettingsError(f"{run.path}: {folder.broken}")
    newest = folder.attempt.number if folder.attempt else 0
    # A job that waits for its first start is not told the end of the one before.
    begun = folder.attempt is not None and (folder.job_id is None or folder.job.get("job_id") == folder.job_id)
    since = newest if begun or folder.attempt is None else newest + 1
    return follow.attached(run, folder.job_id, since, f"{_command(args, run)} follow")


# ---- doing something about it --------------------------------------------------------------------


def _stop(args: argparse.Namespace, runs: Sequence[RunDir]) -> int:
    asked = []
    for run in runs:
        found = ending.stop(run, _say)
        if found.state in LIVE:
            asked.append(run)
        else:
            print(f"{run.name} is {found.state}: nothing to stop")
    if not args.wait:
        if asked:
            print(f"{_command(args, asked[-1])} stop --wait waits until it has saved")
        return 0
    code = 0
    for run in asked:
        try:
            found = ending.ended(run)
        except KeyboardInterrupt:
            _say(f"{run.name} is being stopped all the same")
            return follow.EXIT_LEFT
        whole = ending.kept(run)
        goes_on = f"{_command(args, run)} resume goes on from " + (f"step {whole}" if whole else "the beginning")
        at = f" at step {shown.step(found)}" if found.step is not None else ""
        print(f"{run.name} is {found.state}{at}" + (f"; {goes_on}" if found.state != "done" else ""))
        if found.state not in ("stopped", "done"):
            _say(f"{run.name}: {found.note or 'it ended without saving'}")
            code = follow.EXIT_FAILED
    return code


def _cancel(args: argparse.Namespace, runs: Sequence[RunDir]) -> int:
    for run in runs:
        _, found = status.read_one(run, PATIENCE_S)
        whole = ending.kept(run) if found.state != "unreadable" else None
        keeps = "there is no checkpoint yet"
        if whole is not None:
            behind = max(0, (found.step or 0) - whole)
            keeps = f"kept: {manifest.name_of(whole)}" + (f", {behind} steps behind" if behind else "")
        if found.state == "pending" and whole is None:
            keeps = "it has not begun"
        if found.state in LIVE and not args.yes and sys.stdin.isatty():
            at = f" at step {shown.step(found)}" if found.step is not None else ""
            if not _confirmed(f"cancel {run.name}, {found.state}{at}? {keeps} (`stop` saves first) [y/N] "):
                print("nothing was changed")
                return rundir.EXIT_REFUSED
        if ending.cancel(run, _say).state not in LIVE:
            print(f"{run.name} is {found.state}: nothing to cancel")
        else:
            print(f"{run.name}: {keeps}; {_command(args, run)} resume {'begins anew' if whole is None else 'goes on'}")
    return 0


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _resume(args: argparse.Namespace, folder: Path, launcher: str) -> int:
    from launch import submit

    given = ["--resume", str(folder)]
    given += ["--nodes", str(args.nodes)] if args.nodes is not None else []
    given += ["--time", args.time] if args.time else []
    given += [flag for flag, wanted in (("--follow", args.follow), ("--yes", args.yes)) if wanted]
    return submit.main([*given, *args.overrides], launcher)


def _of_sweep(args: argparse.Namespace, sweep: Sweep, launcher: str) -> int:
    """The points of a sweep: listed, stopped, cancelled or resumed together."""
    if args.command is None:
        return _watched(args, lambda: _listed(args, *status.read_all(sweep.points, PATIENCE_S)))
    if args.command == "stop":
        return _stop(args, sweep.points)
    if args.command == "cancel":
        if not args.yes and sys.stdin.isatty():
            if not _confirmed(f"cancel all {len(sweep.points)} points of {sweep.path.name}? [y/N] "):
                print("nothing was changed")
                return rundir.EXIT_REFUSED
            args.yes = True
        return _cancel(args, sweep.points)
    if args.command == "resume":
        return _resume(args, sweep.path, launcher)
    first = sweep.points[0].name if sweep.points else f"{sweep.path.name}-00"
    raise SettingsError(f"{sweep.path.name} is a sweep: {args.command} takes one of its points, such as {first}")


if __name__ == "__main__":
    sys.exit(main())
