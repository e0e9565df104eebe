"""--probe: what recorded answers of several SLURM versions become, and what it does with a file that is there.

The answers follow the documented formats of the commands; no site stood behind them but the dev cluster (22.05).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import probe
from launch import submit as launch_submit
from launch.cluster import Cluster
from launch.probe import Answers, Site
from vitdist import config
from vitdist.config import SettingsError

ANSWERS = Path(__file__).parent / "answers"
Put = Callable[[str, str], None]


def answers(version: str) -> Answers:
    def text(name: str) -> str:
        path = ANSWERS / version / f"{name}.txt"
        return path.read_text() if path.exists() else ""

    return Answers(*(text(n) for n in ("sinfo", "partitions", "config", "assoc", "user", "qos", "srun")))


def written(site: Site) -> dict[str, object]:
    """The fields of the profile, as it is read back."""
    text = probe.profile(site, probe.choose(site), "2026-11-24")
    raw = yaml.safe_load(text)
    config.parse(Cluster, raw, "probed.yaml")
    return raw


EXPECTED: dict[str, dict[str, object]] = {
    # No accounting, an old selector, GPUs not in the default partition.
    "20.11": {
        "partition": "gpu",
        "gpus_per_node": 4,
        "gpu_request": "gres",
        "cpus_per_task": 40,
        "mem_gb": "all",
        "time": "12:00:00",
    },
    # The default account is not for the partition; the default quality of service is not either.
    "22.05": {
        "partition": "a100",
        "account": "vision",
        "qos": "normal",
        "gpus_per_node": 4,
        "cpus_per_task": 128,
        "mem_gb": "all",
        "time": "12:00:00",
    },
    # Two types of GPUs, a node with a broken one, less memory than the node has.
    "23.11": {
        "partition": "ml",
        "account": "main",
        "gpus_per_node": 8,
        "gpu_type": "nvidia_h100_80gb_hbm3",
        "cpus_per_task": 192,
        "mem_gb": 878,
        "time": "12:00:00",
    },
    # Slices in the default partition; others are down or root's.
    "24.05": {
        "partition": "h200",
        "account": "team-a",
        "qos": "standard",
        "gpus_per_node": 8,
        "cpus_per_task": 192,
        "mem_gb": "all",
        "time": "04:00:00",
    },
}


@pytest.mark.parametrize("version", sorted(EXPECTED))
def test_a_profile_of_recorded_answers(version: str) -> None:
    site = probe.read(answers(version))
    assert site.version.startswith(version)
    found = written(site)
    assert found.pop("signal_delay_s") == 120
    assert found == EXPECTED[version]
    for choice in probe.choose(site):
        assert choice.why, choice


def test_what_it_says_of_where_a_choice_comes_from() -> None:
    site = probe.read(answers("22.05"))
    text = probe.profile(site, probe.choose(site), "2026-11-24", apptainer=True)
    for line in (
        "#   * a100 (default): 30 x (4 GPUs a100, 128 cores, 515 GB), 6 x (4 GPUs a100, 128 cores, 1030 GB); time",
        "#     restricted: 64 x (8 GPUs a100, 128 cores, 515 GB); time no limit",
        "# the partition takes it; also yours: nlp",
        "# the partition does not take your default, free",
        "# they were sold with 40 and 80: `nvidia-smi` on a node tells",
        "# not needed: this partition gives whole nodes anyway",
        "A preemption here sends TERM alone and kills after GraceTime and 30 sec (KillWait)",
        "# container: {runtime: apptainer, image: /shared/vitdist.sif}",
    ):
        assert line in text
    assert all(line.isprintable() for line in text.splitlines())
    # What is commented out is a field with a value that can be had by taking the # away.
    for line in text.splitlines():
        name, colon, _ = line.removeprefix("# ").partition(":")
        if line.startswith("# ") and colon and name.isidentifier() and name in Cluster.model_fields:
            config.parse(Cluster, {"gpus_per_node": 4} | yaml.safe_load(line.removeprefix("# ")), line)


def test_a_limit_of_the_quality_of_service_counts() -> None:
    site = probe.read(answers("22.05"))
    mine = (probe.Association("vision", "", ("normal",), "normal"),)
    assert written(site._replace(associations=mine, walls={"normal": 90}))["time"] == "01:30:00"


def test_pyxis_is_found() -> None:
    site = probe.read(answers("24.05"))
    assert "# container: {runtime: pyxis, " in probe.profile(site, probe.choose(site), "2026-11-24")


def test_a_cluster_that_is_closed_to_the_user_is_told() -> None:
    site = probe.read(answers("22.05"))
    none = (probe.Association("strangers", "elsewhere", ("normal",), "normal"),)
    with pytest.raises(SettingsError, match="no partition that is up, open to your accounts"):
        probe.choose(site._replace(associations=none))


@pytest.mark.parametrize("noise", ["", "Welcome to the cluster!\n", "a|b\n", "x|up|many|1|1|(null)|1:00|idle\n"])
def test_lines_of_another_form_are_passed_over(noise: str) -> None:
    told = answers("20.11")
    assert written(probe.read(told._replace(sinfo=noise + told.sinfo)))["partition"] == "gpu"


def test_odd_names_cannot_leave_their_place() -> None:
    line = "gpu|up|1|8|1000|gpu:4|1:00:00|idle\n"
    told = answers("20.11")._replace(sinfo="a$(id)|up|9|8|1000|gpu:8|1:00:00|idle\n" + line)
    site = probe.read(told)._replace(associations=(probe.Association('true: "x', "", (), ""),))
    with pytest.raises(SettingsError, match="account"):
        written(site)
    assert written(probe.read(told))["partition"] == "gpu"


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def site(command: Put) -> Put:
    """SLURM's commands with the recorded answers of 23.11."""
    folder = ANSWERS / "23.11"
    command("sinfo", f"exec /bin/cat {folder}/sinfo.txt")
    command(
        "scontrol", f'[ "$2" = partition ] && exec /bin/cat {folder}/partitions.txt; exec /bin/cat {folder}/config.txt'
    )
    command("sacctmgr", f'[ "$3" = assoc ] && exec /bin/cat {folder}/assoc.txt; [ "$3" = user ] && echo main; exit 0')
    return command


def test_probe_writes_once_and_says_what_it_decided(
    site: Put, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_submit, "ROOT", place)
    (place / "slurm").mkdir()
    path = place / "slurm" / "Ceres.yaml"
    assert launch_submit.main(["--probe", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("# Ceres: written by `python launch/submit.py --probe` on 20")
    assert not path.exists()
    assert launch_submit.main(["--probe"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{path}: the profile of Ceres, SLURM 23.11.10"
    assert "gpu_type        nvidia_h100_80gb_hbm3" in out
    assert "Not known from here, in the file as comments: qos, gpu_memory_gb, gpu_request, exclusive" in out
    assert "--cluster Ceres --nodes 1 --dry-run" in out
    path.write_text("mine: true\n")
    assert launch_submit.main(["--probe"]) == 2
    assert f"{path} exists: --yes replaces it, --dry-run prints" in capsys.readouterr().err
    assert path.read_text() == "mine: true\n"
    assert launch_submit.main(["--probe", "--yes"]) == 0
    assert "partition: ml" in path.read_text()
    assert launch_submit.main(["--probe", "--cluster", "other"]) == 0
    assert launch_submit.main(["--probe", "--cluster", "./here.yaml"]) == 0
    assert (place / "slurm" / "other.yaml").read_text() == (place / "here.yaml").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("a b", "--cluster 'a b': use letters, digits"),
        ("../x", "--cluster ../x: give a name, or the path of a .yaml"),
        ("none/x.yaml", "/none is no folder"),
        ("-x", "expected one argument"),
    ],
)
def test_L1_a_bad_name_is_refused(wanted: str, text: str, site: Put, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = launch_submit.main(["--probe", "--cluster", wanted])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2
    assert text in capsys.readouterr().err


def test_L2_no_slurm_and_a_silent_one_are_told(
    place: Path, command: Put, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch_submit.main(["--probe"]) == 2
    assert "sinfo: not in PATH; run --probe on a login node" in capsys.readouterr().err
    command("sinfo", "exec /bin/sleep 60")
    monkeypatch.setattr(launch_submit, "PATIENCE_S", 0.2)
    assert launch_submit.main(["--probe"]) == 2
    assert "SLURM does not answer (sinfo) within 0.2 s" in capsys.readouterr().err
