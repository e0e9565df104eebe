"""slurm/dev-cluster on the real SLURM: what it prints, that its nodes work, that nothing outlives `stop`."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "slurm" / "dev-cluster"
INSTALLED = shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
HOW = "SLURM is not installed: run 'sudo slurm/dev-cluster install' to enable these tests"
pytestmark = pytest.mark.slurm
if not INSTALLED and not os.environ.get("CI"):
    pytest.skip(HOW, allow_module_level=True)

USR2_TO_FILES = """#!/bin/sh
#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive --time=5 --signal=USR2@10 --output=job.log
srun sh -c '
    trap "touch got.$SLURMD_NODENAME; exit 0" USR2
    touch up.$SLURMD_NODENAME
    while :; do sleep 0.1; done'
"""


def dev_cluster(folder: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(COMMAND), "--dir", str(folder), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *args: str) -> tuple[int, str, str]:
    process = dev_cluster(folder, *args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def slurm(folder: Path, *command: str, cwd: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    env["SLURM_CONF"] = f"{folder}/slurm.conf"
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(what: Callable[[], bool], message: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"after {seconds} s: {message}"
        time.sleep(0.05)


def processes_of(folder: Path) -> list[str]:
    """`PID NAME` of all that live with this folder in their command, environment or working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(entry / name).read_text(errors="replace") for name in ("cmdline", "environ")]
            texts.append(os.readlink(entry / "cwd"))
        except OSError:
            continue
        if any(str(folder) in text for text in texts):
            found.append(f"{entry.name} {(entry / 'comm').read_text().strip()}")
    return found


@contextmanager
def stopped_at_the_end() -> Iterator[Path]:
    """A folder for a cluster. pytest's own tmp_path can be too long for SLURM's sockets."""
    if not INSTALLED:
        pytest.fail(f"{HOW} (and not skipped, as CI is set)", pytrace=False)
    folder = Path(tempfile.mkdtemp(prefix="dev-cluster-", dir="/tmp"))
    try:
        yield folder
    finally:
        run(folder, "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    with stopped_at_the_end() as path:
        yield path


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Path, str]]:
    """A cluster of two nodes, started by four commands at once, and what each printed."""
    with stopped_at_the_end() as folder:
        starts = [dev_cluster(folder, "start", "2") for _ in range(4)]
        ends = [(*process.communicate(timeout=90), process.returncode) for process in starts]
        assert [code for _, _, code in ends] == [0] * 4, ends
        assert len({out for out, _, _ in ends}) == 1
        yield folder, ends[0][0]


def test_starts_at_once_make_one_cluster(cluster: tuple[Path, str]) -> None:
    folder, _ = cluster
    names = [line.split()[1] for line in processes_of(folder)]
    assert (names.count("slurmctld"), names.count("slurmd")) == (1, 2)


def test_start_prints_the_export_line_and_nothing_else(cluster: tuple[Path, str]) -> None:
    folder, printed = cluster
    assert printed == f"export SLURM_CONF={folder}/slurm.conf\n"


def test_start_again_changes_nothing(cluster: tuple[Path, str]) -> None:
    folder, printed = cluster
    before = processes_of(folder)
    assert run(folder, "start", "2")[:2] == (0, printed)
    assert processes_of(folder) == before


def test_start_refuses_another_number_of_nodes(cluster: tuple[Path, str]) -> None:
    code, out, err = run(cluster[0], "start", "3")
    assert (code, out) == (1, "")
    assert "stop it first" in err
    assert err.count("\n") == 1


def test_status_shows_the_nodes(cluster: tuple[Path, str]) -> None:
    folder, printed = cluster
    code, out, _ = run(folder, "status")
    assert code == 0
    assert "slurmctld node1 node2" in out
    assert out.endswith(printed)


def test_a_step_runs_on_every_node_with_all_cores(cluster: tuple[Path, str]) -> None:
    cores = str(len(os.sched_getaffinity(0)))
    step = ("srun", "-N2", "--ntasks-per-node=1", "-c", cores, "printenv", "SLURMD_NODENAME")
    assert sorted(slurm(cluster[0], *step).split()) == ["node1", "node2"]


def test_S4_preemption_sends_usr2_to_the_step_on_every_node(cluster: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = cluster
    (tmp_path / "job.sh").write_text(USR2_TO_FILES)
    slurm(folder, "sbatch", "job.sh", cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("up.*"))) == 2, "the job runs on two nodes")
    high = ("sbatch", "--partition=high", "--exclusive", "--nodes=2", "--output=high.log", "--wrap=echo done")
    slurm(folder, *high, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("got.*"))) == 2, "both steps got USR2")
    assert sorted(p.name for p in tmp_path.glob("got.*")) == ["got.node1", "got.node2"]
    log = tmp_path / "high.log"
    wait_for(lambda: log.exists() and log.read_text() == "done\n", "the job that preempts runs")


def test_start_revives_a_killed_slurmd_and_stop_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    code, export, err = run(folder, "start", "1")
    assert code == 0, err
    pid = tmp_path / "pid"  # of a task that carries no trace of the cluster in its environment
    task = f"srun env -i sh -c 'echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 300'"
    slurm(folder, "sbatch", "-o", "/dev/null", "--wrap", task, cwd=tmp_path)
    wait_for(pid.exists, "the step's task runs")

    slurmd = next(line.split()[0] for line in processes_of(folder) if line.endswith(" slurmd"))
    os.kill(int(slurmd), signal.SIGKILL)
    wait_for(lambda: run(folder, "status")[0] == 3, "status tells that a slurmd is dead")
    assert "; dead: node1\n" in run(folder, "status")[1]
    assert run(folder, "start", "1")[:2] == (0, export)
    assert run(folder, "status")[0] == 0

    for line in processes_of(folder):
        if line.endswith(" slurmd"):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    assert run(folder, "stop")[0] == 0
    assert processes_of(folder) == []
    assert not is_alive(int(pid.read_text()))
    assert not folder.exists()
    assert run(folder, "stop")[:2] == (0, "")
    assert run(folder, "status")[0] == 3


def is_alive(pid: int) -> bool:
    """Not counting a zombie: in a container there may be nobody to reap it."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_folder_that_slurm_cannot_use_is_refused(folder: Path) -> None:
    (folder / "thesis.tex").touch()
    for path in (folder / "a b", folder / ("x" * 60), folder):
        code, out, err = run(path, "start")
        assert (code, out, err.count("\n")) == (1, "", 1), err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
