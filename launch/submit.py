"""Send a training to SLURM, or start it on this machine where there is none.

    python launch/submit.py --nodes 4                       # the default recipe on what there is
    python launch/submit.py --nodes 4 --config configs/demo.yaml --name digits optim.lr=1e-3 --follow
    python launch/submit.py --nodes 4 --dry-run | sbatch --test-only

Settings -> preflight -> run folder -> submitit. Nothing is made before all that can be known wrong was looked at.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # Python put launch/ there, whose files would hide modules of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from launch import cluster as clusters
from launch import preflight, slurm, snapshot, torchrun
from launch.cluster import Cluster
from launch.slurm import Slurm
from vitdist import changes, config, rundir
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
    nodes: int
    processes: int
    """Ranks on each node."""
    cluster: Cluster | None
    """None: simulated nodes on this machine."""
    slurm: Slurm | None
    devices: tuple[str, ...]
    """GPUs that simulated nodes share."""
    minutes: int
    notes: tuple[str, ...]
    """What the user should know before anything starts."""

    @property
    def signal_delay_s(self) -> int:
        return self.cluster.signal_delay_s if self.cluster else min(120, self.minutes * 30)


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
    plan = make_plan(args)
    name = rundir.check_name(args.name or f"{plan.source.stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    run = RunDir(_runs(args.runs) / name)
    exists = run.path.exists()
    changed = _changed(run, plan.settings) if exists else []
    for note in plan.notes:
        _say(note)
    attempt = run.next_attempt()
    findings = preflight.check(plan.settings, run.path.parent, plan.nodes, plan.cluster, plan.slurm)
    for finding in findings:
        _say(str(finding))
    if args.dry_run:
        print(script(plan, run, attempt), end="")
        return 0
    if exists and (code := _already(run, args.follow, changed)) is not None:
        return code
    if any(finding.level == "refuse" for finding in findings):
        return rundir.EXIT_REFUSED
    if exists:
        _say(f"{run.path} exists{'' if changed else ' with the same settings'}: continues at attempt {attempt}")
        for change in changed:
            _say(f"setting changed: {change}")
    if plan.cluster:
        return _to_slurm(plan, run, attempt, given, args.follow, launcher)
    return _to_this_machine(plan, run, attempt, given, launcher)


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
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="simulated where there is no SLURM (default 1)"
    )
    places = "auto (slurm/default.yaml where SLURM answers, else local), local, or a profile slurm/NAME.yaml"
    parser.add_argument("--cluster", default="auto", help=places)
    parser.add_argument("--name", help="name of run folder and job (default: CONFIG-UTC); one that exists is continued")
    parser.add_argument("--time", help="limit of one start: minutes, HH:MM:SS or D-HH:MM:SS (default: the profile's)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where run folders lie (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the script that would run, write nothing")
    parser.add_argument("--follow", action="store_true", help="show progress until the end (always so without SLURM)")
    return parser


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


# ---- settings and place ----------------------------------------------------------------------------


def make_plan(args: argparse.Namespace) -> Plan:
    """Everything that the arguments and this machine decide. Raises SettingsError with all faults."""
    faults: list[str] = []
    if args.nodes < 1:
        faults.append(f"--nodes {args.nodes}: at least 1")
    patience = DRY_PATIENCE_S if args.dry_run else PATIENCE_S
    there = slurm.partitions(patience) if args.cluster != "local" else None
    local = args.cluster == "local" or (args.cluster == "auto" and not there)
    most = MOST_LOCAL_NODES if local else MOST_NODES
    if args.nodes > most:
        faults.append(f"--nodes {args.nodes}: at most {most}" + (" simulated ones on one machine" if local else ""))
    devices = clusters.local_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) if local else []
    default = "configs/demo.yaml" if local and not devices else "configs/vit_large.yaml"
    source = _file(args.config or default)
    settings = profile = None
    minutes = LOCAL_MINUTES
    try:
        settings = config.with_absolute_paths(config.load(source, args.overrides))
    except SettingsError as error:
        faults.append(str(error))
    try:
        if args.time:
            minutes = slurm.minutes(args.time)
        if not local:
            profile = _profile("slurm/default.yaml" if args.cluster == "auto" else args.cluster, args.time)
            minutes = profile.minutes
    except ValueError as error:
        faults.append(str(error))
    if faults or settings is None:
        raise SettingsError("\nerror: ".join(faults))
    nodes, processes, notes = _place(args, local, devices, args.config or default)
    if profile:
        profile, assumed = clusters.resolve(profile, there)
        settings, profile = clusters.staged(settings, profile), clusters.offline(settings, profile)
        assert profile.gpus_per_node != "auto"
        nodes, processes = args.nodes, max(1, profile.gpus_per_node)
        notes = [f"warning: {note}" for note in assumed] + _ignored()
    # In a partition that does not exist the number of GPUs is a guess; preflight tells what is wrong.
    if not (profile and there and there.missing(profile.partition)):
        config.split_batch(settings.train, nodes * processes)
    return Plan(
        source=source,
        settings=settings,
        nodes=nodes,
        processes=processes,
        cluster=profile,
        slurm=there,
        devices=tuple(devices),
        minutes=minutes,
        notes=tuple(notes),
    )


def _profile(path: str, time: str | None) -> Cluster:
    return clusters.load(_file(path), time)


def _place(args: argparse.Namespace, local: bool, devices: list[str], source: str) -> tuple[int, int, list[str]]:
    """(nodes, ranks on each, what to tell) on this machine."""
    if not local:
        return args.nodes, 1, []
    why = "no SLURM" if args.cluster == "auto" else "--cluster local"
    if not devices:
        what = f"{source} on {args.nodes} local CPU worker{'s' if args.nodes > 1 else ''}"
        return args.nodes, 1, [f"{why} and no GPU here: {what}"]
    nodes = min(args.nodes, len(devices))
    each = len(devices) // nodes
    asked = f"{nodes} simulated node{'s' if nodes > 1 else ''}"
    if nodes < args.nodes:
        asked = f"{args.nodes} nodes asked, capped to {nodes}"
    idle = f", {len(devices) - nodes * each} left idle" if len(devices) % nodes else ""
    return nodes, each, [f"{why}: {asked} on this machine's {len(devices)} GPUs, {each} each{idle}"]


def _ignored() -> list[str]:
    odd = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    what = f"{', '.join(odd)} of your shell would override the script and is left out; put it into the profile"
    return [f"warning: {what}"] if odd else []


# ---- a run that exists -----------------------------------------------------------------------------


def _changed(run: RunDir, settings: Config) -> list[Change]:
    """What is other than in the run's folder. Raises SettingsError for what the run cannot go on with."""
    if not run.config.exists():
        raise SettingsError(f"{run.path} exists and is no run folder: choose another --name, or remove it")
    changed = changes.between(config.to_plain(config.load(run.config)), config.to_plain(settings))
    changes.refuse(changed, str(run.path))
    return changed


def _already(run: RunDir, wanted: bool, changed: list[Change]) -> int | None:
    """The exit code if the run is done or still going; None if it can be continued."""
    if rundir.state(run)["state"] == "done" and not changes.longer(changed):
        _say(f"{run.path} is done; its report is {run.report}")
        return rundir.EXIT_DONE
    job_id = _last_job(run)
    if job_id:
        from launch import follow

        state = slurm.state(job_id)
        if state.split(" ")[0] in follow.QUEUED:
            if wanted:
                _say(f"{run.path} is job {job_id} already: {state}")
                return _follow_slurm(run, job_id, max(0, run.next_attempt() - 1))
            way_out = f"add --follow to watch it, or first scancel {job_id}"
            raise SettingsError(f"{run.path} is job {job_id} already, {state}: {way_out}")
    try:
        with rundir.only_writer(run):
            return None
    except BlockingIOError:
        raise SettingsError(f"{run.path} is being trained by another process; wait for it or stop it first") from None


def _last_job(run: RunDir) -> str | None:
    """The newest SLURM job of a run, by submitit's files."""
    ids = [int(path.name.split("_")[0]) for path in run.submitit.glob("[0-9]*_submission.sh")]
    return str(max(ids)) if ids else None


# ---- scripts ---------------------------------------------------------------------------------------


def script(plan: Plan, run: RunDir, attempt: int) -> str:
    """Exactly what will run: the sbatch script, or the torchrun of each simulated node."""
    if not plan.cluster:
        return _local_script(plan, run, attempt)
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(run.submitit))}"
    parameters = clusters.submitit_parameters(plan.cluster, plan.nodes, run.name, run)
    return _make_sbatch_string(command=command, folder=run.submitit, **parameters)


def _local_script(plan: Plan, run: RunDir, attempt: int) -> str:
    from launch.job import local_port

    lines = ["#!/bin/bash", f"# {plan.nodes} simulated nodes of {run.path}", *clusters.setup_lines(run, [])]
    for node in range(plan.nodes):
        devices = ",".join(plan.devices[node * plan.processes :][: plan.processes])
        port = local_port(run, attempt)
        command = torchrun.argv(
            sys.executable, plan.nodes, node, plan.processes, torchrun.LOCAL, port, str(run.path), attempt
        )
        lines.append(f"CUDA_VISIBLE_DEVICES={devices} {shlex.join(command)} &")
    return "\n".join([*lines, "wait", ""])


# ---- submission ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _run_folder(plan: Plan, run: RunDir, attempt: int, given: list[str]) -> Iterator[None]:
    """The run folder with everything that a start needs; taken back if the body fails."""
    new, new_parent = not run.path.exists(), not run.path.parent.exists()
    before: bytes | None = None
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _freeze_code(run, attempt, ["launch/submit.py", *given])
        place = {"scheduler": "slurm" if plan.cluster else "local", "nodes": plan.nodes, "processes": plan.processes}
        profile = {"profile": config.to_plain(plan.cluster)} if plan.cluster else {}
        rundir.publish(run.cluster, yaml.safe_dump(place | profile, sort_keys=False, allow_unicode=True))
        rundir.publish(run.submit, script(plan, run, attempt))
        _private(run.submitit)
        before = None if new else run.config.read_bytes()
        rundir.publish(run.config, config.to_yaml(plan.settings))
        yield
    except BaseException:
        if new:
            shutil.rmtree(run.path, ignore_errors=True)
            if new_parent:
                with contextlib.suppress(OSError):
                    run.path.parent.rmdir()
        else:
            if before is not None:
                with contextlib.suppress(OSError):  # a full disk, of which the error tells that is raised below
                    rundir.publish(run.config, before)
            # What submitit writes before it has a job id.
            for left in (*run.submitit.glob("[!_]" * 32 + ".pkl"), *run.submitit.glob(".submission_file_*")):
                if not left.is_symlink():
                    left.unlink(missing_ok=True)
        raise


def _private(folder: Path) -> None:
    """Make a folder that nobody else can write to: a pickle is code. Raises SettingsError for another user's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
        whose = "is a link" if stat.S_ISLNK(found.st_mode) else "is another user's"
        raise SettingsError(f"{folder} {whose}: what lies there would be run as you; take it away")
    folder.chmod(0o700)


def _freeze_code(run: RunDir, attempt: int, argv: list[str]) -> None:
    """The code of this start: as the last one's, or of the checkout as it is now, the last one's kept beside it."""
    if run.code.exists():
        changed = snapshot.changed(ROOT, run.code)
        if not changed:
            return
        names = ", ".join(map(str, changed[:3])) + (" ..." if len(changed) > 3 else "")
        _say(f"the code differs from that of the last start ({names}): this start takes the new one")
        for path in (run.code, run.patch, run.env):
            if path.exists():
                path.rename(path.with_name(f"{path.stem}-before-attempt-{attempt}{path.suffix}"))
    snapshot.take(ROOT, run, argv)


@contextlib.contextmanager
def _clean_environment(run: RunDir) -> Iterator[None]:
    """Submit from the run's code, and without what a surrounding job or torchrun has left in the environment.

    SLURM_CPU_BIND of an outer allocation silently cut a job to one core. SLURM_CONF says which SLURM it is.
    """
    leftovers = ("SLURM_", "SLURMD_", "SRUN_", "SALLOC_", "SBATCH_", "SUBMITIT_", "PMI_", "PMIX_", "TORCHELASTIC_")
    ranks = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
    before = dict(os.environ)
    for name in before:
        if (name.startswith(leftovers) or name in ranks) and name != "SLURM_CONF":
            del os.environ[name]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(run.code), *filter(None, [before.get("PYTHONPATH")])])
    try:
        with contextlib.chdir(run.code):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _to_slurm(plan: Plan, run: RunDir, attempt: int, given: list[str], wanted: bool, launcher: str) -> int:
    import submitit

    from launch.job import NodeJob

    assert plan.cluster
    job = NodeJob(str(run.path), plan.processes, attempt, "slurm", (), plan.signal_delay_s, launcher)
    try:
        with _run_folder(plan, run, attempt, given), _clean_environment(run):
            # Time limits and preemptions are no failures: they are not counted.
            executor = submitit.SlurmExecutor(run.submitit, max_num_timeout=1_000_000)
            executor.update_parameters(**clusters.submitit_parameters(plan.cluster, plan.nodes, run.name, run))
            sent = executor.submit(job)
    except submitit.core.utils.FailedJobError as error:
        raise SettingsError(f"SLURM refused the job: {' '.join(str(error).split())}") from None
    where = f", partition {plan.cluster.partition}" if plan.cluster.partition else ""
    size = f"{plan.nodes} nodes with {plan.processes} ranks each"
    print(f"job {sent.job_id}: {size}{where}, {plan.minutes} minutes a start")
    print(f"run folder  {run.path}")
    if wanted:
        return _follow_slurm(run, sent.job_id, attempt)
    print(f"follow      tail -F {run.attempt(attempt).rank_log(0, 0)}")
    print(f"            squeue -j {sent.job_id}; scancel {sent.job_id}")
    return 0


def _follow_slurm(run: RunDir, job_id: str, since: int) -> int:
    from launch import follow

    try:
        return follow.follow(run, follow.Slurm(job_id), since)
    except KeyboardInterrupt:
        again = f"the same command with --name {run.name} --follow watches it"
        _say(f"job {job_id} goes on; {again}, scancel {job_id} ends it")
        return 130


def _to_this_machine(plan: Plan, run: RunDir, attempt: int, given: list[str], launcher: str) -> int:
    import submitit

    from launch import follow
    from launch.job import NodeJob

    job = NodeJob(str(run.path), plan.processes, attempt, "local", plan.devices, plan.signal_delay_s, launcher)
    with _run_folder(plan, run, attempt, given), _clean_environment(run), _deaf_children():
        executor = submitit.LocalExecutor(run.submitit)
        executor.update_parameters(
            tasks_per_node=plan.nodes,
            timeout_min=plan.minutes,
            signal_delay_s=plan.signal_delay_s,
            stderr_to_stdout=True,
        )
        sent = executor.submit(job)
    controller = sent._process
    assert controller
    print(f"run folder  {run.path}", flush=True)
    print(f"logs        {run.attempt(attempt).rank_log(0, 0)}", flush=True)
    asked: list[None] = []

    def stop() -> None:
        _say("ending at once" if asked else "stopping: the run saves a checkpoint first; Ctrl-C again ends it at once")
        asked.append(None)
        controller.terminate()  # submitit's controller passes it on to every node's job

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    return follow.follow(run, follow.Local(controller), attempt, on_interrupt=stop)


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
