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
import gc
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    gc.disable()  # imports make no garbage, and looking for it takes a tenth of their time
    # Python put launch/ there, whose files would hide modules of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # pydantic would look through every installed package for plugins, a tenth of a dry run.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from launch import allocation as allocations
from launch import folder, preflight, slurm, sweep, torchrun
from launch.folder import Parts
from launch.planning import DRY_PATIENCE_S, PATIENCE_S, ROOT, Plan, Start, home_of, make_plan
from launch.preflight import Case, Finding
from launch.scripts import script
from launch.sweep import Sweep
from vitdist import changes, config, rundir
from vitdist.changes import Change
from vitdist.config import Config, SettingsError
from vitdist.rundir import RunDir

SBATCH_S = 120.0
"""For sbatch: a busy controller is asked again by it for a while."""
MANY_GPU_HOURS = 1000
"""Of all points, for one start: from here on a person is asked. 4 nodes of 8 GPUs for 12 hours are 384."""


def main(argv: Sequence[str] | None = None, launcher: str = torchrun.LAUNCHER) -> int:
    """The command; returns its exit code. `launcher`: a module with torchrun's flags, for tests."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_intermixed_args(given)
    try:
        return _submit(args, given, launcher)
    except (SettingsError, ValueError) as error:
        _say(f"error: {error}")
        return rundir.EXIT_REFUSED
    except KeyboardInterrupt:
        _say("interrupted; nothing was submitted")
        return 130
    except BrokenPipeError:  # `| head`: what it says goes nowhere, what it did stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a quota: the run folder has been taken back
        where = error.filename2 or error.filename or args.runs
        _say(f"error: {where}: {error.strerror or error}; nothing was submitted. Free space, or choose another --runs")
        return rundir.EXIT_REFUSED


def _submit(args: argparse.Namespace, given: list[str], launcher: str) -> int:
    _plain(given)
    if args.probe:
        from launch import probe

        return probe.run(args.cluster or "auto", ROOT / "slurm", PATIENCE_S, args.yes, args.dry_run)
    plan = make_plan(args, os.environ)
    home = home_of(args, plan)
    starts = _starts(home, plan)
    skip = preflight.skipped(args.skip)
    if not (args.dry_run or args.test_only):
        starts, code = _not_already(home, starts, args.follow, args.yes)
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
    def format_help(self) -> str:
        """With every setting, whose explanations are read from the source for it."""
        settings = f"settings (section.name=value overrides the file):\n{config.describe(Config)}"
        self.epilog = settings.replace("%", "%%")  # argparse reads % as a format
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        _say(f"error: {message}; see --help")
        raise SystemExit(rundir.EXIT_REFUSED)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python launch/submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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


# ---- which runs ------------------------------------------------------------------------------------


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


def _not_already(home: RunDir, starts: Sequence[Start], follow: bool, sure: bool) -> tuple[list[Start], int]:
    """The starts of runs that are neither done nor still going, and the exit code if there are none."""
    if follow and sweep.read(home.path):
        going = [job for job in (_queued(start.run) for start in starts if start.exists) if job]
        if going:
            _say(f"{home.path} is job {going[0][0].split('_')[0]} already")
            return [], _follow_sweep(home, going[0][0].split("_")[0])
    left = []
    for start in starts:
        if start.exists and (code := _already(start, follow, sure)) is not None:
            if len(starts) == 1:
                return [], code
            continue
        left.append(start)
    if not left:
        _show_table(home)
    return left, rundir.EXIT_DONE


def _already(start: Start, follow: bool, sure: bool) -> int | None:
    """The exit code if the run is done or still going; None if it can be continued."""
    run = start.run
    if rundir.state(run)["state"] == "done" and not changes.longer(start.changed):
        _say(f"{run.path} is done; its report is {run.report}")
        return rundir.EXIT_DONE
    if job := _queued(run):
        job_id, state = job
        if follow:
            _say(f"{run.path} is job {job_id} already: {state}")
            return _follow_slurm(run, job_id, max(0, run.next_attempt() - 1))
        way_out = f"add --follow to watch it, or first scancel {job_id}"
        raise SettingsError(f"{run.path} is job {job_id} already, {state}: {way_out}")
    if not sure and _unknown(run):
        what = f"SLURM does not answer, so job {slurm.job_of(run)} of {run.path} may still run"
        raise SettingsError(f"{what}: try again later; --yes goes on all the same")
    try:
        with rundir.only_writer(run):
            return None
    except BlockingIOError:
        raise SettingsError(f"{run.path} is being trained by another process; wait for it or stop it first") from None


def _queued(run: RunDir) -> tuple[str, str] | None:
    """The job of a run that waits or runs, and its state in SLURM's words."""
    from launch.follow import QUEUED

    job_id = slurm.job_of(run)
    state = slurm.state(job_id) if job_id else "GONE"
    return (job_id, state) if job_id and state.split(" ")[0] in QUEUED else None


def _unknown(run: RunDir) -> bool:
    """Whether its job may still be there: its records tell of no end, and SLURM is silent, which is not gone."""
    from launch import status

    return slurm.job_of(run) is not None and status.read_one(run, PATIENCE_S)[1].state == "UNKNOWN"


def _goes_on(starts: Sequence[Start], home: RunDir) -> list[Path]:
    """Tell what continues with what; returns the files of the code that are other than at the last start."""
    from launch import snapshot

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


# ---- what SLURM says of it -------------------------------------------------------------------------


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
    number = plan.gpus or plan.nodes
    hours = number * plan.minutes / 60 * runs
    each = plan.gpus // plan.nodes
    parts = [f"{runs} points"] if runs > 1 else []
    parts.append(f"{plan.nodes} node{'s' if plan.nodes > 1 else ''}")
    parts.append(f"{each} GPU{'s' if each > 1 else ''}" if each else "no GPU")
    parts.append(f"{plan.minutes // 60}:{plan.minutes % 60:02} h")
    total = f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"
    return f"{' x '.join(parts)} = {total} {'GPU' if each else 'node'}-hours a start"


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
    inside = plan.source.is_relative_to(ROOT)
    own_recipe = str(plan.source.relative_to(ROOT) if inside else plan.source)
    recipe = "" if plan.source.parent == home.path else own_recipe  # a run that goes on has its own file of settings
    with contextlib.ExitStack() as stack:
        if swept:
            record = Sweep(home.name, plan.settings.evaluation.best, tuple(point for point, _ in plan.points))
            parts = Parts(
                plan.settings, place, text, max(s.attempt for s in starts), argv, ROOT, swept, new_code, recipe
            )
            stack.enter_context(folder.swept(home, record, parts))
        for start in starts:
            own = text if plan.cluster and not plan.allocation else script(plan, home, [start])
            parts = Parts(start.settings, place, own, start.attempt, argv, ROOT, swept, new_code, recipe)
            stack.enter_context(folder.made(start.run, parts))
        yield


def _pickle(plan: Plan, start: Start, launcher: str) -> Path:
    """The node job of a start, under a name that it has until SLURM gives it a number."""
    import uuid

    from submitit.helpers import DelayedSubmission

    from launch.job import NodeJob

    place = (str(start.run.path), plan.processes, start.attempt)
    own = plan.allocation is None
    job = DelayedSubmission(NodeJob(*place, "slurm", (), plan.signal_delay_s, launcher, requeues=own))
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
        with _deaf_children():  # a Ctrl-C while sbatch runs would leave a job in the queue that nobody knows of
            job_id = _sbatch(home)
        try:
            for start, pickle in zip(starts, pickles, strict=True):
                own = f"{job_id}_{start.number}" if plan.points else job_id
                pickle.rename(start.run.submitit / f"{own}_submitted.pkl")  # the node jobs wait for it
                rundir.publish(start.run.path / "slurm_job", f"{own}\n")
            if plan.points:
                rundir.publish(home.path / "slurm_job", f"{job_id}\n")
        except BaseException:  # the folder is taken back, and so is the job
            subprocess.run(["scancel", job_id], timeout=PATIENCE_S, check=False)
            raise
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

    if here := plan.allocation:
        pickle = _pickle(plan, start, launcher)
        pickle.rename(start.run.submitit / f"{here.job_id}_submitted.pkl")
        with _clean_environment(start.run.code, allocations.KEPT):
            # A session of its own: the terminal's Ctrl-C would make srun end the nodes, and is ours to pass on.
            return subprocess.Popen(["bash", str(start.run.submit)], stdin=subprocess.DEVNULL, start_new_session=True)
    import submitit

    run = start.run
    job = NodeJob(str(run.path), plan.processes, start.attempt, "local", plan.devices, plan.signal_delay_s, launcher)
    with _clean_environment(run.code), _deaf_children():
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
    with _before_the_end(plan, stop):
        return follow.follow(run, follow.Local(process), start.attempt, on_interrupt=stop), bool(asked)


@contextlib.contextmanager
def _before_the_end(plan: Plan, stop: Callable[[], None]) -> Iterator[None]:
    """Stop as SLURM stops a batch job: a while before the limit. An allocation's steps get no warning."""
    if not plan.allocation or not plan.allocation.end:
        yield
        return
    left_s = (datetime.fromisoformat(plan.allocation.end) - datetime.now()).total_seconds()
    timer = threading.Timer(max(0.0, left_s - plan.signal_delay_s), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
    gc.freeze()
    gc.enable()
    sys.exit(main())
