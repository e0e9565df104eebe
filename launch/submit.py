"""Send a training to SLURM, or start it on this machine where there is none.

    python launch/submit.py --nodes 4                       # the default recipe on what there is
    python launch/submit.py --nodes 4 --config configs/demo.yaml --name digits optim.lr=1e-3 --follow
    python launch/submit.py --nodes 4 --dry-run | sbatch --test-only
    python launch/submit.py --resume digits --nodes 2       # goes on, also with other settings
    python launch/submit.py --name lr --sweep optim.lr=1e-4,3e-4 optim.layer_decay=0.65,0.75 --follow

Settings -> preflight -> run folder -> SLURM. Nothing is made before all that can be known wrong was looked at.
"""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    # Python put launch/ there, whose files would hide modules of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import allocation as allocations
from launch import cluster as clusters
from launch import folder, preflight, slurm, snapshot, sweep, torchrun
from launch.allocation import Allocation
from launch.cluster import Cluster
from launch.folder import Parts
from launch.preflight import Case, Finding
from launch.slurm import Slurm
from launch.sweep import Point, Sweep
from vitdist import changes, config, rundir
from vitdist.changes import Change
from vitdist.config import Config, SettingsError
from vitdist.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 10.0
"""For an answer of SLURM."""
DRY_PATIENCE_S = 0.5
"""A dry run takes less than a second."""
SBATCH_S = 120.0
"""For sbatch: a busy controller is asked again by it for a while."""
MOST_NODES, MOST_LOCAL_NODES = 10_000, 256
"""A slip of the finger ends here; each simulated node has a line in the script, and a torchrun."""
MANY_GPU_HOURS = 1000
"""Of all points, for one start: from here on a person is asked. 4 nodes of 8 GPUs for 12 hours are 384."""
LOCAL_MINUTES = 14 * 24 * 60
"""submitit ends local jobs too; this is meant as no limit."""


@dataclass(frozen=True)
class Plan:
    """What will run where."""

    source: Path
    """The YAML of the settings."""
    settings: Config
    """Of the first point, where there are several."""
    points: tuple[tuple[Point, Config], ...]
    """Of a sweep; () for a single run."""
    nodes: int
    processes: int
    """Ranks on each node."""
    cluster: Cluster | None
    """None: simulated nodes on this machine."""
    allocation: Allocation | None
    """The nodes that this shell has already: no job is queued."""
    slurm: Slurm | None
    devices: tuple[str, ...]
    """GPUs that simulated nodes share."""
    minutes: int
    after: tuple[str, ...]
    """Ids of the jobs that must be done first."""
    at_once: int | None
    """Points of a sweep at the same time."""
    group: str | None
    """Name of the sweep, and of its group in W&B."""
    notes: tuple[str, ...]
    """What the user should know before anything starts."""

    @property
    def signal_delay_s(self) -> int:
        return self.cluster.signal_delay_s if self.cluster else min(120, self.minutes * 30)

    @property
    def gpus(self) -> int:
        """On all nodes of one run."""
        gpus = self.cluster.gpus_per_node if self.cluster else 0
        return self.nodes * gpus if isinstance(gpus, int) else 0


@dataclass(frozen=True)
class Start:
    """One start of one run."""

    run: RunDir
    settings: Config
    attempt: int
    exists: bool
    changed: tuple[Change, ...] = ()
    """Settings that are other than in the run's folder."""
    number: int = 0
    """Of the point of a sweep."""


def main(argv: Sequence[str] | None = None, launcher: str = torchrun.LAUNCHER) -> int:
    """The command; returns its exit code. `launcher`: a module with torchrun's flags, for tests."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_intermixed_args(given)
    try:
        return _submit(args, given, launcher)
    except (SettingsError, ValueError) as error:
        _say(f"error: {error}")
        return rundir.EXIT_REFUSED
    except OSError as error:  # a full disk, a quota: the run folder has been taken back
        where = error.filename2 or error.filename or args.runs
        _say(f"error: {where}: {error.strerror or error}; nothing was submitted. Free space, or choose another --runs")
        return rundir.EXIT_REFUSED


def _submit(args: argparse.Namespace, given: list[str], launcher: str) -> int:
    _plain(given)
    if args.probe:
        from launch import probe

        return probe.run(args.cluster or "auto", ROOT / "slurm", PATIENCE_S, args.yes, args.dry_run)
    plan = make_plan(args)
    home = _home(args, plan)
    starts = _starts(home, plan)
    skip = preflight.skipped(args.skip)
    if not (args.dry_run or args.test_only):
        starts, code = _not_already(home, starts, args.follow)
        if not starts:
            return code
    for note in plan.notes:
        _say(note)
    cases = _cases(args, plan, home, starts)
    refused = _refused([preflight.check(case, skip) for case in cases], starts)
    if args.dry_run:
        _list_points(plan, starts)
        print(script(plan, home, starts), end="")
        return 0
    if args.test_only:
        return _test_only(plan, home, starts, refused)
    if refused or _refused([preflight.fetch(case, _say, skip) for case in cases], starts):
        return rundir.EXIT_REFUSED
    new_code = _goes_on(starts, home)
    if not _sure(args, plan, starts, new_code):
        _say("nothing was submitted")
        return rundir.EXIT_REFUSED
    argv = ["launch/submit.py", *given]
    if plan.cluster and not plan.allocation:
        return _to_slurm(plan, home, starts, argv, bool(new_code), args.follow, launcher)
    return _here(plan, home, starts, argv, bool(new_code), launcher)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- the command line ------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _say(f"error: {message}; see --help")
        raise SystemExit(rundir.EXIT_REFUSED)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python launch/submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # argparse reads % as a format
        epilog=f"settings (section.name=value overrides the file):\n{config.describe(Config)}".replace("%", "%%"),
    )
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings over those of the file")
    recipes = "what to train (default: configs/vit_large.yaml; configs/demo.yaml without SLURM and GPU)"
    parser.add_argument("--config", help=recipes)
    nodes = "simulated where there is no SLURM (default 1, or as before with --resume, or all of an allocation)"
    parser.add_argument("--nodes", type=int, metavar="N", help=nodes)
    places = "auto (slurm/default.yaml where SLURM answers, else local), local, or a profile slurm/NAME.yaml"
    parser.add_argument("--cluster", help=f"{places} (default: auto, or as before with --resume)")
    parser.add_argument("--name", help="name of run folder and job (default: CONFIG-UTC); one that exists is continued")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run: name or folder; its settings and place")
    parser.add_argument("--time", help="limit of one start: minutes, HH:MM:SS or D-HH:MM:SS (default: the profile's)")
    parser.add_argument("--exclude", metavar="NODES", help="nodes not to use, beside those of the profile: node[3,17]")
    after = (
        "start when this one is done: name, folder or job id; may be given again. If it fails, the job is taken away"
    )
    parser.add_argument("--after", action="append", default=[], metavar="RUN|JOB", help=after)
    lists = "a run for each combination of these values, all in one job array: optim.lr=1e-4,3e-4 train.epochs=5,10"
    parser.add_argument("--sweep", nargs="+", action="extend", default=[], metavar="NAME=A,B", help=lists)
    parser.add_argument("--parallel", type=int, metavar="K", help="points of a sweep at the same time (default: all)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders lie (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the script that would run, write nothing")
    parser.add_argument("--test-only", action="store_true", help="ask SLURM when it would start, queue nothing")
    names = f"leave out checks before the submission: {', '.join(preflight.CHECKS)}"
    parser.add_argument("--skip", action="append", default=[], metavar="CHECK[,CHECK]", help=names)
    parser.add_argument("--follow", action="store_true", help="show progress until the end (always so without SLURM)")
    parser.add_argument("--probe", action="store_true", help="write a first profile of this cluster: slurm/NAME.yaml")
    parser.add_argument("--yes", action="store_true", help="do not ask back (only a terminal is asked)")
    return parser


def _plain(given: Sequence[str]) -> None:
    """Raises SettingsError for arguments that no setting needs and a shell or SLURM would take for something else."""
    faults = []
    for text in given:
        if not text.isprintable():
            faults.append(f"{text!r}: holds signs that do not print, such as line breaks")
        elif any(sign in text for sign in ("$(", "${", "`")) and "pipe:" not in text:
            faults.append(f"{text!r}: is not expanded here; let your shell do it (no single quotes around it)")
    if faults:
        raise SettingsError("\nerror: ".join(faults))


def _runs(text: str) -> Path:
    path = Path(os.path.expanduser(text)).absolute()
    # SLURM expands % and \ in names of log files, and a script's line ends where the line does.
    if any(odd in "%\\" or not odd.isprintable() for odd in str(path)):
        raise SettingsError(f"--runs {text!r}: SLURM cannot write logs to a path with %, \\ or signs that do not print")
    return path


def _file(text: str) -> Path:
    """A YAML of the caller's folder, else of the checkout."""
    here = os.path.expanduser(text)
    return ROOT / text if not os.path.exists(here) and os.path.exists(ROOT / text) else Path(here)


def _run_named(text: str, runs: Path, flag: str) -> RunDir:
    """A run by its folder, or by its name among `runs`. Raises SettingsError."""
    for path in (Path(os.path.expanduser(text)).absolute(), runs / text):
        if (path / "config.yaml").is_file() or (path / sweep.FILE).is_file():
            return RunDir(path)
    names = [path.name for path in runs.iterdir()] if runs.is_dir() else []
    near = difflib.get_close_matches(Path(text).name, names, 1)
    hint = f"did you mean {near[0]}?" if near else "give its folder, or --runs where it lies"
    raise SettingsError(f"{flag} {text}: no such run in {runs}; {hint}")


# ---- settings and place ----------------------------------------------------------------------------


def make_plan(args: argparse.Namespace) -> Plan:
    """Everything that the arguments and this machine decide. Raises SettingsError with all faults."""
    faults = _wrong_together(args)
    resumed = _run_named(args.resume, _runs(args.runs), "--resume") if args.resume else None
    before = _place_before(resumed)
    here = _allocation(args)
    wanted = args.cluster or ("local" if before.get("scheduler") == "local" and not here else "auto")
    asked = args.nodes if args.nodes is not None else here.nodes if here else before.get("nodes", 1)
    if asked < 1:
        faults.append(f"--nodes {asked}: at least 1")
    there = slurm.partitions(DRY_PATIENCE_S if args.dry_run else PATIENCE_S) if wanted != "local" else None
    stored = before.get("profile") if not args.cluster else None
    local = wanted == "local" or (wanted == "auto" and not there and not stored)
    most = MOST_LOCAL_NODES if local else here.nodes if here else MOST_NODES
    if asked > most:
        what = " simulated ones on one machine" if local else f": so many has allocation {here.job_id}" if here else ""
        faults.append(f"--nodes {asked}: at most {most}{what}")
    devices = clusters.local_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) if local else []
    recipe = args.config or ("configs/demo.yaml" if local and not devices else "configs/vit_large.yaml")
    source = _file(recipe)
    settings: Config | None = None
    points: tuple[tuple[Point, Config], ...] = ()
    profile, minutes, after = None, LOCAL_MINUTES, tuple[str, ...]()
    try:
        if resumed or not args.sweep:
            source, points, settings = _settings(args, source, resumed)
        else:
            points = _swept(args, source)
            settings = points[0][1]
    except SettingsError as error:
        faults.append(str(error))
    try:
        if args.time:
            minutes = slurm.minutes(args.time)
        if not local:
            profile = _profile(args, stored, resumed)
            minutes = profile.minutes
    except ValueError as error:
        faults.append(str(error))
    try:
        after = _awaited(args, local or here is not None)
    except SettingsError as error:
        faults.append(str(error))
    if faults or settings is None:
        raise SettingsError("\nerror: ".join(dict.fromkeys(faults)))
    nodes, processes, notes = _place(asked, args.cluster, local, devices, args.resume or recipe)
    if profile:
        if here:
            profile, notes = _of_allocation(profile, here)
            minutes = here.minutes or LOCAL_MINUTES
        profile, assumed = clusters.resolve(profile, there)
        points = tuple((point, clusters.staged(its, profile)) for point, its in points)
        settings = clusters.staged(settings, profile)
        if "weights" not in preflight.skipped(args.skip):  # else the nodes fetch them
            profile = clusters.offline(settings, profile)
        assert profile.gpus_per_node != "auto"
        nodes, processes = asked, max(1, profile.gpus_per_node)
        notes = [*notes, *(f"warning: {note}" for note in assumed), *_ignored()]
    elif args.exclude:
        notes.append("warning: --exclude has no effect on this machine")
    # In a partition that does not exist the number of GPUs is a guess; preflight tells what is wrong.
    if not (profile and there and there.missing(profile.partition)):
        _split(points, settings, nodes * processes)
    return Plan(
        source=source,
        settings=settings,
        points=points,
        nodes=nodes,
        processes=processes,
        cluster=profile,
        allocation=here if profile else None,
        slurm=there,
        devices=tuple(devices),
        minutes=minutes,
        after=after,
        at_once=args.parallel,
        group=before.get("sweep"),
        notes=tuple(notes),
    )


def _wrong_together(args: argparse.Namespace) -> list[str]:
    """Arguments that contradict each other."""
    faults = []
    for flag, given in (("--config", args.config), ("--name", args.name), ("--sweep", args.sweep)):
        if args.resume and given:
            faults.append(f"--resume {args.resume}: brings its own {flag[2:]}; leave {flag} out")
    if args.parallel is not None and (args.parallel < 1 or not (args.sweep or args.resume)):
        what = "at least 1" if args.parallel < 1 else "is for --sweep"
        faults.append(f"--parallel {args.parallel}: {what}")
    swept = [item.partition("=")[0] for item in args.sweep]
    both = [name for name in (text.partition("=")[0] for text in args.overrides) if name in swept]
    faults += [f"{name}: is in --sweep and given besides" for name in both]
    return faults


def _place_before(run: RunDir | None) -> dict[str, Any]:
    """Where a run was sent, by its folder; {} for a new one."""
    return config.read_yaml(run.cluster) if run and run.cluster.exists() else {}


def _settings(
    args: argparse.Namespace, source: Path, resumed: RunDir | None
) -> tuple[Path, tuple[tuple[Point, Config], ...], Config]:
    """(where from, points of a sweep that goes on, settings of the run or of its first point)."""
    if resumed and (known := sweep.read(resumed.path)):
        points = tuple(
            (point, _loaded(RunDir(resumed.path.parent / point.name).config, args.overrides)) for point in known.points
        )
        return resumed.path / sweep.FILE, points, points[0][1]
    source = resumed.config if resumed else source
    return source, (), _loaded(source, args.overrides)


def _loaded(source: Path, overrides: Sequence[str]) -> Config:
    return config.with_absolute_paths(config.load(source, overrides))


def _swept(args: argparse.Namespace, source: Path) -> tuple[tuple[Point, Config], ...]:
    """The points of --sweep with their settings. Raises SettingsError with the faults of all of them."""
    found, faults, same = list[tuple[Point, Config]](), dict[str, list[str]](), dict[str, str]()
    for point in sweep.expand(_name(args, source), args.sweep):
        try:
            settings = _loaded(source, [*args.overrides, *point.overrides])
        except SettingsError as error:
            faults.setdefault(str(error), []).append(" ".join(point.overrides))
            continue
        twin = same.setdefault(config.to_yaml(settings), " ".join(point.overrides))
        if twin != " ".join(point.overrides):
            faults.setdefault(f"--sweep: {twin} means the same as another point", []).append(" ".join(point.overrides))
        found.append((point, settings))
    if faults:
        everywhere = len(found) == 0
        raise SettingsError(
            "\nerror: ".join(
                text if everywhere and len(faults) == 1 else f"{text}\n  in {len(at)} of the points: {at[0]}"
                for text, at in faults.items()
            )
        )
    return tuple(found)


def _split(points: Sequence[tuple[Point, Config]], settings: Config, world: int) -> None:
    """Raises SettingsError where a batch cannot be split, naming the points."""
    faults: dict[str, str] = {}
    for where, its in [(f" ({' '.join(point.overrides)})", its) for point, its in points] or [("", settings)]:
        try:
            config.split_batch(its.train, world)
        except SettingsError as error:
            faults.setdefault(str(error), where)
    if faults:
        raise SettingsError("\nerror: ".join(text + where for text, where in faults.items()))


def _profile(args: argparse.Namespace, stored: Mapping[str, Any] | None, resumed: RunDir | None) -> Cluster:
    """The profile: that of --cluster, else the resumed run's, else slurm/default.yaml; --time and --exclude over it."""
    if stored and resumed:
        profile = config.parse(Cluster, {**stored} | ({"time": args.time} if args.time else {}), resumed.cluster)
    else:
        wanted = args.cluster if args.cluster not in (None, "auto") else "slurm/default.yaml"
        by_name = wanted == Path(wanted).stem  # `--cluster mine` is slurm/mine.yaml
        profile = clusters.load(_file(f"slurm/{wanted}.yaml" if by_name else wanted), args.time)
    if not args.exclude:
        return profile
    both = ",".join(filter(None, [profile.exclude, args.exclude]))
    return config.parse(Cluster, config.to_plain(profile) | {"exclude": both}, f"--exclude {args.exclude}")


def _place(asked: int, wanted: str | None, local: bool, devices: list[str], source: str) -> tuple[int, int, list[str]]:
    """(nodes, ranks on each, what to tell) on this machine."""
    if not local:
        return asked, 1, []
    why = "--cluster local" if wanted == "local" else "no SLURM"
    if not devices:
        what = f"{source} on {asked} local CPU worker{'s' if asked > 1 else ''}"
        return asked, 1, [f"{why} and no GPU here: {what}"]
    nodes = min(asked, len(devices))
    each = len(devices) // nodes
    told = f"{nodes} simulated node{'s' if nodes > 1 else ''}"
    if nodes < asked:
        told = f"{asked} nodes asked, capped to {nodes}"
    idle = f", {len(devices) - nodes * each} left idle" if len(devices) % nodes else ""
    return nodes, each, [f"{why}: {told} on this machine's {len(devices)} GPUs, {each} each{idle}"]


def _ignored() -> list[str]:
    odd = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    what = f"{', '.join(odd)} of your shell would override the script and is left out; put it into the profile"
    return [f"warning: {what}"] if odd else []


def _allocation(args: argparse.Namespace) -> Allocation | None:
    """The nodes that this shell has, if it stands in a running allocation and nothing else is wanted."""
    job_id = allocations.find(os.environ)
    if not job_id or args.cluster == "local":
        return None
    answer = slurm.ask(["scontrol", "show", "job", job_id, "-o"], PATIENCE_S)
    return allocations.read(answer) if answer else None


def _of_allocation(profile: Cluster, here: Allocation) -> tuple[Cluster, list[str]]:
    """The profile with what was allocated, and what to tell."""
    update = {"gpus_per_node": here.gpus, "cpus_per_task": here.cpus}
    queue = "`env -u SLURM_JOB_ID python launch/submit.py ...` queues a job instead"
    return profile.model_copy(update=update), [
        f"inside of allocation {here.job_id}: runs on its nodes at once; {queue}"
    ]


def _awaited(args: argparse.Namespace, at_once: bool) -> tuple[str, ...]:
    """The jobs of --after. Raises SettingsError for what will never be done."""
    if not args.after:
        return ()
    if at_once:
        raise SettingsError("--after: needs a job that SLURM queues; here say `first && second`")
    found, faults = list[str](), list[str]()
    for text in args.after:
        job_id, state, told = _of_job(text) if _JOB_ID.fullmatch(text) else _of_run(text, _runs(args.runs))
        if state == "done":
            _say(f"--after {text}: is done already")
        elif state in ("waits", "UNKNOWN") and job_id:
            found.append(job_id)
        else:
            faults.append(f"--after {text}: {told}")
    if faults:
        raise SettingsError("\nerror: ".join(faults))
    return tuple(found)


_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")


def _of_job(job_id: str) -> tuple[str, str, str]:
    """(id, done, waits, UNKNOWN or ended, what to tell) of a job by its number, of all of an array too."""
    known = slurm.jobs([job_id], PATIENCE_S)
    if known is None:
        return job_id, "UNKNOWN", "SLURM does not answer"
    states = {job.state for job in known.values() if job_id in (job.id, job.id.split("_")[0])}
    if states == {"COMPLETED"}:
        return job_id, "done", ""
    lost = states & {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
    if not states or lost:
        return job_id, "ended", f"job {job_id} has ended: {', '.join(lost)}" if lost else f"SLURM knows no job {job_id}"
    return job_id, "waits", ""


def _of_run(text: str, runs: Path) -> tuple[str, str, str]:
    """The same of a run, or of all points of a sweep, by its records and its job."""
    from launch import status

    run = _run_named(text, runs, "--after")
    known = sweep.read(run.path)
    members = [RunDir(run.path.parent / point.name) for point in known.points] if known else [run]
    found, _ = status.read_all(members, PATIENCE_S)
    states = {one.state for one in found}
    if states == {"done"}:
        return "", "done", ""
    job_id = slurm.job_of(run) or ""
    ended = [one for one in found if one.state not in ("done", "UNKNOWN", *status.LIVE)]
    if ended or not job_id:
        one = (ended or found)[0]
        what = f"is {one.state}" if ended else "has no job of SLURM"
        return job_id, "ended", f"{one.name} {what}: first --resume {shlex.quote(text)}"
    return job_id, "UNKNOWN" if "UNKNOWN" in states else "waits", ""


# ---- which runs ------------------------------------------------------------------------------------


def _name(args: argparse.Namespace, source: Path) -> str:
    """Of the run or sweep; decided once, as it may hold the time."""
    if args.resume:
        args.name = _run_named(args.resume, _runs(args.runs), "--resume").name
    args.name = args.name or f"{source.stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return rundir.check_name(args.name)


def _home(args: argparse.Namespace, plan: Plan) -> RunDir:
    """The folder of the run, or of the sweep."""
    if args.resume:
        return _run_named(args.resume, _runs(args.runs), "--resume")
    return RunDir(_runs(args.runs) / _name(args, plan.source))


def _starts(home: RunDir, plan: Plan) -> list[Start]:
    """The runs to start. Raises SettingsError with the faults of all that exist and cannot go on so."""
    if not plan.points:
        if sweep.read(home.path):
            raise SettingsError(f"{home.path} is a sweep: --resume {home.name} goes on with it; or give another --name")
        return [_start(home, plan.settings)]
    known = sweep.read(home.path)
    points = tuple(point for point, _ in plan.points)
    if known and known.points != points:
        raise SettingsError(f"{home.path} is a sweep of other points: choose another --name")
    if not known and home.path.exists():
        raise SettingsError(f"{home.path} exists and is no sweep: choose another --name, or remove it")
    found, faults = list[Start](), list[str]()
    for number, (point, settings) in enumerate(plan.points):
        try:
            found.append(_start(RunDir(home.path.parent / point.name), settings, number))
        except SettingsError as error:
            faults.append(str(error))
    if faults:
        raise SettingsError("\nerror: ".join(faults))
    return found


def _start(run: RunDir, settings: Config, number: int = 0) -> Start:
    exists = run.path.exists()
    changed = _changed(run, settings) if exists else []
    return Start(run, settings, run.next_attempt(), exists, tuple(changed), number)


def _changed(run: RunDir, settings: Config) -> list[Change]:
    """What is other than in the run's folder. Raises SettingsError for what the run cannot go on with."""
    if not run.config.exists():
        raise SettingsError(f"{run.path} exists and is no run folder: choose another --name, or remove it")
    changed = changes.between(config.to_plain(config.load(run.config)), config.to_plain(settings))
    changes.refuse(changed, str(run.path))
    return changed


def _cases(args: argparse.Namespace, plan: Plan, home: RunDir, starts: Sequence[Start]) -> list[Case]:
    """What preflight looks at. The script, of all points together, is tried once."""
    with _clean_environment(None):
        env = dict(os.environ)
    asked = plan.cluster and not (plan.allocation or args.dry_run or args.test_only)
    text = script(plan, home, starts) if asked else None
    first = Case(
        plan.settings,
        starts[0].run,
        plan.nodes,
        plan.processes,
        plan.cluster,
        plan.slurm,
        env=env,
        script=text,
        points=len(starts),
        dry=args.dry_run,
        patience_s=DRY_PATIENCE_S if args.dry_run else PATIENCE_S,
    )
    return [
        replace(first, settings=start.settings, run=start.run, script=None if number else text)
        for number, start in enumerate(starts)
    ]


def _refused(findings: Sequence[Sequence[Finding]], starts: Sequence[Start]) -> bool:
    """Tell what preflight found, of each start; returns whether something of it refuses."""
    found: dict[str, list[str]] = {}
    for start, its in zip(starts, findings, strict=True):
        for finding in its:
            text = str(finding)
            if len(starts) > 1:  # told once, though each point has a folder of its own
                text = text.replace(str(start.run.path), str(start.run.path.parent / "*"))
            found.setdefault(text, []).append(start.run.name)
    for text, names in found.items():
        _say(text if len(names) == len(starts) else f"{text} ({', '.join(names[:3])}{', ...' if names[3:] else ''})")
    return any(finding.level == "refuse" for its in findings for finding in its)


def _not_already(home: RunDir, starts: Sequence[Start], follow: bool) -> tuple[list[Start], int]:
    """The starts of runs that are neither done nor still going, and the exit code if there are none."""
    left = []
    for start in starts:
        if start.exists and (code := _already(start, follow)) is not None:
            if len(starts) == 1:
                return [], code
            continue
        left.append(start)
    if not left:
        _show_table(home)
    return left, rundir.EXIT_DONE


def _already(start: Start, follow: bool) -> int | None:
    """The exit code if the run is done or still going; None if it can be continued."""
    run = start.run
    if rundir.state(run)["state"] == "done" and not changes.longer(start.changed):
        _say(f"{run.path} is done; its report is {run.report}")
        return rundir.EXIT_DONE
    job_id = slurm.job_of(run)
    if job_id:
        from launch.follow import QUEUED

        state = slurm.state(job_id)
        if state.split(" ")[0] in QUEUED:
            if follow:
                _say(f"{run.path} is job {job_id} already: {state}")
                return _follow_slurm(run, job_id, max(0, run.next_attempt() - 1))
            way_out = f"add --follow to watch it, or first scancel {job_id}"
            raise SettingsError(f"{run.path} is job {job_id} already, {state}: {way_out}")
    try:
        with rundir.only_writer(run):
            return None
    except BlockingIOError:
        raise SettingsError(f"{run.path} is being trained by another process; wait for it or stop it first") from None


def _goes_on(starts: Sequence[Start], home: RunDir) -> list[Path]:
    """Tell what continues with what; returns the files of the code that are other than at the last start."""
    new_code: list[Path] = []
    for start in starts:
        if not start.exists:
            continue
        how = "" if start.changed else " with the same settings"
        _say(f"{start.run.path} exists{how}: continues at attempt {start.attempt}")
        for change in start.changed:
            _say(f"setting changed: {change}")
        if start.run.code.exists() and not new_code:
            new_code = snapshot.changed(ROOT, start.run.code)
    if new_code:
        names = ", ".join(map(str, new_code[:3])) + (" ..." if len(new_code) > 3 else "")
        _say(f"the code differs from that of the last start ({names}): this start takes the new one")
    return new_code


# ---- questions -------------------------------------------------------------------------------------


def _sure(args: argparse.Namespace, plan: Plan, starts: Sequence[Start], new_code: Sequence[Path]) -> bool:
    """Ask back, on a terminal only, for what is dear or may be a mistake; True where there is nothing to ask."""
    questions = []
    hours = plan.gpus * plan.minutes / 60 * len(starts)
    if hours >= MANY_GPU_HOURS and not plan.allocation:
        questions.append(f"this asks for up to {hours:,.0f} GPU-hours a start")
    if new_code:
        questions.append("this run goes on with other code than it had")
    if args.yes or not questions or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print(f"{'; '.join(questions)}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---- scripts ---------------------------------------------------------------------------------------


def script(plan: Plan, home: RunDir, starts: Sequence[Start]) -> str:
    """Exactly what will run: by sbatch, by bash in an allocation, or as a torchrun for each simulated node."""
    if not plan.cluster:
        return "#!/bin/bash\n" + "".join(_local_script(plan, start) for start in starts)
    if plan.allocation:
        return "\n".join(_allocation_script(plan, start) for start in starts)
    return _sbatch_script(plan, home, starts)


def _sbatch_script(plan: Plan, home: RunDir, starts: Sequence[Start]) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = _parameters(plan, home)
    more = parameters["additional_parameters"]
    if plan.after:
        # afterok: who waits for a run wants what it leaves; a requeue is no end. SLURM takes away what can never
        # start, instead of leaving it in the queue for ever.
        parameters["dependency"] = "afterok:" + ":".join(plan.after)
        more["kill-on-invalid-dep"] = "yes"
    if not plan.points:
        return _make_sbatch_string(command=_task(home.submitit), folder=home.submitit, **parameters)
    # Each point has its pickles and logs in its own folder, whose name ends with the number: %2a in SLURM's words.
    digits = len(plan.points[0][0].name) - len(home.name) - 1
    numbers = [start.number for start in starts]
    parameters["array_parallelism"] = min(plan.at_once or len(starts), len(starts))
    if len(numbers) < len(plan.points):
        more["array"] = f"{sweep.ranges(numbers)}%{parameters['array_parallelism']}"
    own = f'{shlex.quote(str(home.path))}-"$(printf %0{digits}d "$SLURM_ARRAY_TASK_ID")"/submitit'
    logs = Path(f"{home.path}-%{digits}a") / "submitit"
    return _make_sbatch_string(command=_task(own), folder=logs, map_count=len(plan.points), **parameters)


def _parameters(plan: Plan, home: RunDir) -> dict[str, Any]:
    assert plan.cluster
    parameters = clusters.submitit_parameters(plan.cluster, plan.nodes, home.name, home)
    return parameters | {"setup": [*parameters["setup"], *_group(plan, home)]}


def _group(plan: Plan, home: RunDir) -> list[str]:
    """A shell line that puts the points of a sweep into one group of W&B."""
    name = home.name if plan.points else plan.group
    return [f"export WANDB_RUN_GROUP={shlex.quote(name)}"] if name else []


def _task(submitit: Path | str) -> str:
    """What srun starts on each node; a text is quoted already."""
    where = submitit if isinstance(submitit, str) else shlex.quote(str(submitit))
    return f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {where}"


def _allocation_script(plan: Plan, start: Start) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = _parameters(plan, start.run)
    size = allocations.srun_args(plan.nodes, allocations.shares_step(os.environ))
    parameters["srun_args"] = [*parameters["srun_args"], *size]
    command = allocations.task(_task(start.run.submitit))
    return allocations.script(_make_sbatch_string(command=command, folder=start.run.submitit, **parameters))


def _local_script(plan: Plan, start: Start) -> str:
    from launch.job import local_port

    run = start.run
    lines = [f"# {plan.nodes} simulated nodes of {run.path}", *clusters.setup_lines(run, [])]
    for node in range(plan.nodes):
        devices = ",".join(plan.devices[node * plan.processes :][: plan.processes])
        port = local_port(run, start.attempt)
        command = torchrun.argv(
            sys.executable, plan.nodes, node, plan.processes, torchrun.LOCAL, port, str(run.path), start.attempt
        )
        lines.append(f"CUDA_VISIBLE_DEVICES={devices} {shlex.join(command)} &")
    return "\n".join([*lines, "wait", ""])


def _list_points(plan: Plan, starts: Sequence[Start]) -> None:
    for start in starts if plan.points else ():
        point, _ = plan.points[start.number]
        _say(sweep.label(point) + (f" (attempt {start.attempt})" if start.exists else ""))


def _test_only(plan: Plan, home: RunDir, starts: Sequence[Start], refused: bool) -> int:
    """Ask SLURM about the script; returns 0 if it would take it, 2 if not, 1 if it does not say."""
    if not plan.cluster or plan.allocation:
        raise SettingsError("--test-only: asks SLURM about a job, and this would start at once; --dry-run shows it")
    with _clean_environment(None):
        fine, said = slurm.test_only(script(plan, home, starts), PATIENCE_S)
    _list_points(plan, starts)
    print(f"{_size(plan)}: {_hours(plan, len(starts))}")
    print(f"starts      {_when(fine, said)}")
    return rundir.EXIT_REFUSED if refused or fine is False else 0 if fine else 1


def _when(fine: bool | None, said: str) -> str:
    """The estimated start in words."""
    at = slurm.starts(said)
    if not fine or at is None:
        return f"not known{f': {said}' if not fine else ''}"
    seconds = (datetime.fromisoformat(at) - datetime.now()).total_seconds()
    nodes = said.partition(" on nodes ")[2].split(" ")[0]
    where = f" on {nodes}" if nodes else ""
    if seconds < 60:
        return f"at once, as it looks now{where}"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {at.replace('T', ' ')[:16]}, in {hours}:{minutes:02} h, as it looks now{where}"


def _size(plan: Plan) -> str:
    ranks = f"{plan.processes} rank{'s' if plan.processes > 1 else ''}"
    return f"{plan.nodes} nodes with {ranks} each" if plan.nodes > 1 else f"1 node with {ranks}"


def _hours(plan: Plan, runs: int) -> str:
    """What is asked for, for one start."""
    what, number = (
        (f"{plan.gpus // plan.nodes} GPU{'s' if plan.gpus > plan.nodes else ''}", plan.gpus)
        if plan.gpus
        else ("no GPU", plan.nodes)
    )
    hours = number * plan.minutes / 60 * runs
    times = f"{runs} points x " if runs > 1 else ""
    nodes = f"{plan.nodes} node{'s' if plan.nodes > 1 else ''}"
    total = f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"
    unit = "GPU-hours" if plan.gpus else "node-hours"
    return (
        f"{times}{plan.nodes} nodes x {what} x {plan.minutes // 60}:{plan.minutes % 60:02} h = {total} {unit} a start"
    )


# ---- submission ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _clean_environment(code: Path | None, kept: Sequence[str] = ("SLURM_CONF",)) -> Iterator[None]:
    """Submit from the run's code, and without what a surrounding job or torchrun has left in the environment.

    SLURM_CPU_BIND of an outer allocation silently cut a job to one core. SLURM_CONF says which SLURM it is.
    """
    leftovers = ("SLURM_", "SLURMD_", "SRUN_", "SALLOC_", "SBATCH_", "SUBMITIT_", "PMI_", "PMIX_", "TORCHELASTIC_")
    ranks = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
    before = dict(os.environ)
    for name in before:
        if (name.startswith(leftovers) or name in ranks) and name not in kept:
            del os.environ[name]
    if code:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [before.get("PYTHONPATH")])])
    try:
        with contextlib.chdir(code) if code else contextlib.nullcontext():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _folders(
    plan: Plan, home: RunDir, starts: Sequence[Start], argv: list[str], new_code: bool, text: str
) -> Iterator[None]:
    """The run folders, and that of the sweep; taken back if the body fails."""
    place = {"scheduler": "slurm" if plan.cluster else "local", "nodes": plan.nodes, "processes": plan.processes}
    if plan.cluster:
        place["profile"] = config.to_plain(plan.cluster)
    if name := home.name if plan.points else plan.group:
        place["sweep"] = name
    swept = home if plan.points else None
    with contextlib.ExitStack() as stack:
        if swept:
            record = Sweep(home.name, plan.settings.evaluation.best, tuple(point for point, _ in plan.points))
            parts = Parts(plan.settings, place, text, max(s.attempt for s in starts), argv, ROOT, swept, new_code)
            stack.enter_context(folder.swept(home, record, parts))
        for start in starts:
            own = text if plan.cluster and not plan.allocation else script(plan, home, [start])
            parts = Parts(start.settings, place, own, start.attempt, argv, ROOT, swept, new_code)
            stack.enter_context(folder.made(start.run, parts))
        yield


def _pickle(plan: Plan, start: Start, launcher: str) -> Path:
    """The node job of a start, under a name that it has until SLURM gives it a number."""
    import uuid

    from submitit.helpers import DelayedSubmission

    from launch.job import NodeJob

    job = DelayedSubmission(
        NodeJob(str(start.run.path), plan.processes, start.attempt, "slurm", (), plan.signal_delay_s, launcher)
    )
    # Time limits and preemptions are no failures: they are not counted.
    job.set_timeout(plan.minutes, 1_000_000)
    path = start.run.submitit / f"{uuid.uuid4().hex}.pkl"
    job.dump(path)
    return path


def _to_slurm(
    plan: Plan, home: RunDir, starts: list[Start], argv: list[str], new_code: bool, follow: bool, launcher: str
) -> int:
    text = script(plan, home, starts)
    with _folders(plan, home, starts, argv, new_code, text), _clean_environment(home.code):
        pickles = [_pickle(plan, start, launcher) for start in starts]
        when = _when(*slurm.test_only(text, PATIENCE_S)) if not plan.after else f"after job {', '.join(plan.after)}"
        job_id = _sbatch(home)
        for start, pickle in zip(starts, pickles, strict=True):
            own = f"{job_id}_{start.number}" if plan.points else job_id
            pickle.rename(start.run.submitit / f"{own}_submitted.pkl")  # the node jobs wait for it
            rundir.publish(start.run.path / "slurm_job", f"{own}\n")
        if plan.points:
            rundir.publish(home.path / "slurm_job", f"{job_id}\n")
    _tell(plan, home, starts, job_id, when)
    if not follow:
        return 0
    return _follow_sweep(home, job_id) if plan.points else _follow_slurm(home, job_id, starts[0].attempt)


def _sbatch(home: RunDir) -> str:
    """Queue RUN/submit.sh; returns the job's id. Raises SettingsError with SLURM's words."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(home.submit)],
            capture_output=True,
            text=True,
            timeout=SBATCH_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        look = f"look with `squeue --name {home.name}` whether it is there before you try again"
        raise SettingsError(f"sbatch has not answered in {SBATCH_S:.0f} s: {look}") from None
    job_id = done.stdout.strip().split("\n")[-1].split(";")[0]  # with clusters: 4711;name
    if done.returncode or not job_id.isdigit():
        said = " ".join(f"{done.stderr} {done.stdout}".split())
        raise SettingsError(f"SLURM refused the job: {said or f'sbatch: exit code {done.returncode}'}")
    return job_id


def _tell(plan: Plan, home: RunDir, starts: Sequence[Start], job_id: str, when: str) -> None:
    """What was submitted, and what to do with it."""
    assert plan.cluster
    where = f", partition {plan.cluster.partition}" if plan.cluster.partition else ""
    size = _size(plan)
    if plan.points:
        at_once = f", {plan.at_once} at once" if plan.at_once and plan.at_once < len(starts) else ""
        size = f"{len(starts)} points{at_once}, each {size}"
    print(f"job {job_id}: {size}{where}, {plan.minutes} minutes a start")
    run = shlex.quote(_shown(starts[0].run.path))
    if plan.points:
        print(f"sweep       {home.path}")
        print(f"run folders {starts[0].run.path} ... {starts[-1].run.name}")
    else:
        print(f"run folder  {home.path}")
    print(f"asks for    {_hours(plan, len(starts))}")
    print(f"starts      {when}")
    again = f"python launch/submit.py --resume {shlex.quote(_shown(home.path))} --follow"
    print(f"follow      {again if plan.points else f'python launch/jobs.py {run} logs -f'}")
    print(f"stop        python launch/jobs.py {run} stop; at once: scancel {job_id}", flush=True)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _follow_slurm(run: RunDir, job_id: str, since: int) -> int:
    from launch import follow

    try:
        return follow.follow(run, follow.Slurm(job_id), since)
    except KeyboardInterrupt:
        again = f"the same command with --name {run.name} --follow watches it"
        _say(f"job {job_id} goes on; {again}, scancel {job_id} ends it")
        return 130


def _follow_sweep(home: RunDir, job_id: str) -> int:
    """Tell of each change until all points have ended, then the table; returns the exit code."""
    try:
        code = sweep.follow(home, _say)
    except KeyboardInterrupt:
        again = f"python launch/submit.py --resume {shlex.quote(_shown(home.path))} --follow"
        _say(f"job {job_id} goes on; {again} watches it, scancel {job_id} ends it")
        return 130
    _show_table(home)
    return code


def _show_table(home: RunDir) -> None:
    if known := sweep.read(home.path):
        print(sweep.table(sweep.rows(home, known), known.metric), flush=True)


# ---- on this machine, or on the nodes of an allocation -----------------------------------------------


def _here(plan: Plan, home: RunDir, starts: list[Start], argv: list[str], new_code: bool, launcher: str) -> int:
    """Run the starts one after another, watched; returns the exit code of the worst."""
    text = script(plan, home, starts)
    with _folders(plan, home, starts, argv, new_code, text):
        process = _begin(plan, home, starts[0], launcher)
    codes = []
    for number, start in enumerate(starts):
        if number:
            process = _begin(plan, home, start, launcher)
        if plan.points:
            _say(f"point {number + 1} of {len(starts)}, {sweep.label(plan.points[start.number][0])}")
        code, asked = _watch(plan, start, process)
        codes.append(code)
        if asked:
            break
    if plan.points:
        _show_table(home)
        if len(codes) < len(starts):
            _say(f"--resume {shlex.quote(_shown(home.path))} goes on with the sweep")
    return next((code for code in codes if code == rundir.EXIT_STOPPED), max(codes))


def _begin(plan: Plan, home: RunDir, start: Start, launcher: str) -> "subprocess.Popen[bytes]":
    """Start a run's node jobs; returns the process that stands for all of them."""
    from launch.job import NodeJob

    group = {"WANDB_RUN_GROUP": name} if (name := home.name if plan.points else plan.group) else {}
    if here := plan.allocation:
        pickle = _pickle(plan, start, launcher)
        pickle.rename(start.run.submitit / f"{here.job_id}_submitted.pkl")
        with _clean_environment(start.run.code, allocations.KEPT):
            # A session of its own: the terminal's Ctrl-C would make srun end the nodes, and is ours to pass on.
            return subprocess.Popen(
                ["bash", str(start.run.submit)],
                stdin=subprocess.DEVNULL,
                env=os.environ | group,
                start_new_session=True,
            )
    import submitit

    run = start.run
    job = NodeJob(str(run.path), plan.processes, start.attempt, "local", plan.devices, plan.signal_delay_s, launcher)
    with _clean_environment(run.code), _deaf_children():
        os.environ.update(group)
        executor = submitit.LocalExecutor(run.submitit)
        executor.update_parameters(
            tasks_per_node=plan.nodes,
            timeout_min=plan.minutes,
            signal_delay_s=plan.signal_delay_s,
            stderr_to_stdout=True,
        )
        controller = executor.submit(job)._process
    assert controller
    return controller


def _watch(plan: Plan, start: Start, process: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    """Show a run until its end; returns its exit code, and whether it was asked to stop."""
    from launch import follow

    run = start.run
    print(f"run folder  {run.path}", flush=True)
    print(f"logs        {run.attempt(start.attempt).rank_log(0, 0)}", flush=True)
    asked: list[None] = []

    def stop() -> None:
        _say("ending at once" if asked else "stopping: the run saves a checkpoint first; Ctrl-C again ends it at once")
        if plan.allocation and not asked:
            # The node jobs ask for no new start then; srun passes USR2 on to all of them.
            rundir.publish_json(run.path / "stop.json", {"time": rundir.now(), "by": "Ctrl-C", "checkpoint": True})
            process.send_signal(signal.SIGUSR2)
        else:
            process.terminate()  # submitit's controller passes it on to every node's job, as srun does
        asked.append(None)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    return follow.follow(run, follow.Local(process), start.attempt, on_interrupt=stop), bool(asked)


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """What starts here ignores the Ctrl-C of the terminal, which reaches all of its processes: submitit's controller
    would kill the nodes a second after it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
