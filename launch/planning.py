"""What will run where: the arguments and this machine -> a Plan. Nothing is made, SLURM is only asked.

plan = make_plan(args, env)      # env: of the shell. Raises SettingsError with all faults
plan.settings, plan.nodes, plan.cluster, plan.allocation, ...
"""

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import allocation as allocations
from launch import cluster as clusters
from launch import preflight, slurm, sweep
from launch.allocation import Allocation
from launch.cluster import Cluster
from launch.slurm import Slurm
from launch.sweep import Point
from vitdist import config, rundir
from vitdist.changes import Change
from vitdist.config import Config, SettingsError
from vitdist.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 10.0
"""For an answer of SLURM."""
DRY_PATIENCE_S = 0.5
"""A dry run takes less than a second."""
MOST_NODES, MOST_LOCAL_NODES = 10_000, 256
"""A slip of the finger ends here; each simulated node has a line in the script, and a torchrun."""
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
    """Name of the sweep that a run which goes on is a point of."""
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


# ---- settings and place ----------------------------------------------------------------------------


def make_plan(args: argparse.Namespace, env: Mapping[str, str]) -> Plan:
    """Everything that the arguments and this machine decide. Raises SettingsError with all faults."""
    faults = _wrong_together(args)
    resumed = run_named(args.resume, runs_folder(args.runs), "--resume") if args.resume else None
    before = _place_before(resumed)
    here = _allocation(args, env)
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
    devices = clusters.local_gpus(env.get("CUDA_VISIBLE_DEVICES")) if local else []
    recipe = args.config or ("configs/demo.yaml" if local and not devices else "configs/vit_large.yaml")
    source = _file(recipe)
    settings: Config | None = None
    points: tuple[tuple[Point, Config], ...] = ()
    profile, minutes = None, LOCAL_MINUTES
    after, done = tuple[str, ...](), list[str]()
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
        after, done = _awaited(args, local or here is not None)
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
        notes = [*notes, *(f"warning: {note}" for note in assumed), *_ignored(env)]
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
        notes=(*notes, *done),
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
        found.append((point, _grouped(settings, _name(args, source))))
    if faults:
        everywhere = len(found) == 0
        raise SettingsError(
            "\nerror: ".join(
                text if everywhere and len(faults) == 1 else f"{text}\n  in {len(at)} of the points: {at[0]}"
                for text, at in faults.items()
            )
        )
    return tuple(found)


def _grouped(settings: Config, sweep: str) -> Config:
    """`settings` with the points of a sweep in one group of W&B, unless they name another."""
    group = settings.tracking.group or sweep
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"group": group})})


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


def _ignored(env: Mapping[str, str]) -> list[str]:
    odd = sorted(name for name in env if name.startswith("SBATCH_"))
    what = f"{', '.join(odd)} of your shell would override the script and is left out; put it into the profile"
    return [f"warning: {what}"] if odd else []


def _allocation(args: argparse.Namespace, env: Mapping[str, str]) -> Allocation | None:
    """The nodes that this shell has, if it stands in a running allocation and nothing else is wanted."""
    job_id = allocations.find(env)
    if not job_id or args.cluster == "local":
        return None
    answer = slurm.ask(["scontrol", "show", "job", job_id, "-o"], PATIENCE_S)
    return allocations.read(answer, allocations.shares_step(env)) if answer else None


def _of_allocation(profile: Cluster, here: Allocation) -> tuple[Cluster, list[str]]:
    """The profile with what was allocated, and what to tell."""
    update = {"gpus_per_node": here.gpus, "cpus_per_task": here.cpus}
    queue = "`env -u SLURM_JOB_ID python launch/submit.py ...` queues a job instead"
    return profile.model_copy(update=update), [
        f"inside of allocation {here.job_id}: runs on its nodes at once; {queue}"
    ]


def _awaited(args: argparse.Namespace, at_once: bool) -> tuple[tuple[str, ...], list[str]]:
    """The jobs of --after, and what to tell of those that are done. Raises SettingsError for what will never be."""
    if not args.after:
        return (), []
    if at_once:
        raise SettingsError("--after: needs a job that SLURM queues; here say `first && second`")
    found, notes, faults = list[str](), list[str](), list[str]()
    for text in args.after:
        job_id, state, told = _of_job(text) if _JOB_ID.fullmatch(text) else _of_run(text, runs_folder(args.runs))
        if state == "done":
            notes.append(f"--after {text}: is done already")
        elif state in ("waits", "UNKNOWN") and job_id:
            found.append(job_id)
        else:
            faults.append(f"--after {text}: {told}")
    if faults:
        raise SettingsError("\nerror: ".join(faults))
    return tuple(found), notes


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

    run = run_named(text, runs, "--after")
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


# ---- names and places ---------------------------------------------------------------------------------


def runs_folder(text: str) -> Path:
    return _for_slurm(Path(os.path.expanduser(text)).absolute(), f"--runs {text!r}")


def _for_slurm(path: Path, given: str) -> Path:
    # SLURM expands % and \ in names of log files, and a script's line ends where the line does.
    if any(odd in "%\\" or not odd.isprintable() for odd in str(path)):
        raise SettingsError(f"{given}: SLURM cannot write logs to a path with %, \\ or signs that do not print")
    return path


def _file(text: str) -> Path:
    """A YAML of the caller's folder, else of the checkout."""
    here = os.path.expanduser(text)
    return ROOT / text if not os.path.exists(here) and os.path.exists(ROOT / text) else Path(here)


def run_named(text: str, runs: Path, flag: str) -> RunDir:
    """A run by its folder, or by its name among `runs`. Raises SettingsError."""
    for path in (Path(os.path.expanduser(text)).absolute(), runs / text):
        if (path / "config.yaml").is_file() or (path / sweep.FILE).is_file():
            return RunDir(_for_slurm(path, f"{flag} {text!r}"))
    names = [path.name for path in runs.iterdir()] if runs.is_dir() else []
    near = difflib.get_close_matches(Path(text).name, names, 1)
    hint = f"did you mean {near[0]}?" if near else "give its folder, or --runs where it lies"
    raise SettingsError(f"{flag} {text}: no such run in {runs}; {hint}")


def _name(args: argparse.Namespace, source: Path) -> str:
    """Of the run or sweep; decided once, as it may hold the time."""
    if args.resume:
        args.name = run_named(args.resume, runs_folder(args.runs), "--resume").name
    # A recipe's file may be called anything.
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem).strip("-._")[:80] or "run"
    args.name = args.name or f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return rundir.check_name(args.name)


def home_of(args: argparse.Namespace, plan: Plan) -> RunDir:
    """The folder of the run, or of the sweep."""
    if args.resume:
        return run_named(args.resume, runs_folder(args.runs), "--resume")
    return RunDir(runs_folder(args.runs) / _name(args, plan.source))
