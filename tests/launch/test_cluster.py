"""Profiles: what they may say, what `auto` becomes, what submitit is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import cluster
from launch import slurm as slurms
from launch.cluster import Cluster
from launch.slurm import Nodes, Slurm
from vitdist import config
from vitdist.config import SettingsError
from vitdist.rundir import RunDir

ROOT = Path(__file__).parents[2]
RUN = RunDir(Path("/scratch/runs/vit"))


@pytest.mark.parametrize("profile", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_profile_is_usable(profile: Path) -> None:
    parsed = config.parse(Cluster, config.read_yaml(profile), profile)
    resolved, _ = cluster.resolve(parsed, None)
    assert cluster.submitit_parameters(resolved, 4, "vit", RUN)["time"] == 720


def test_a_commented_setting_of_the_default_profile_is_a_setting() -> None:
    for line in (ROOT / "slurm" / "default.yaml").read_text().splitlines():
        name = line.removeprefix("# ").partition(":")[0]
        if line.startswith("# ") and name.isidentifier() and line.partition(":")[2].strip():
            assert name in Cluster.model_fields, line


def parse(**raw: object) -> Cluster:
    return config.parse(Cluster, raw, "slurm/mine.yaml")


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "exclude", "comment", "gpu_type"])
@pytest.mark.parametrize("value", ["gpu\n#SBATCH --uid=0", "a$(id)", "a`id`", "a'b", 'a"b', "a b", "", "-x", "gpu\n"])
def test_X2_what_reaches_an_sbatch_line_is_checked(field: str, value: str) -> None:
    with pytest.raises(SettingsError, match=field):
        parse(**{field: value})


@given(st.text(max_size=20))
def test_X2_a_partition_that_is_taken_is_one_plain_word(value: str) -> None:
    try:
        taken = parse(partition=value).partition
    except SettingsError:
        return
    assert taken is not None
    assert not set(taken) & set(" \n\r\t'\"$`\\;|&<>(){}#!*?~")


@pytest.mark.parametrize("flag", ["--x; id", "-n 4", "--a=$(id)", "--a\n"])
def test_X2_srun_flags_are_checked(flag: str) -> None:
    with pytest.raises(SettingsError, match="srun_args"):
        parse(srun_args=[flag])


def test_L1_a_misspelt_setting_is_named() -> None:
    with pytest.raises(SettingsError, match=r"partiton: unknown setting; did you mean partition\?"):
        parse(partiton="gpu")


def test_S9_a_time_limit_leaves_room_to_save() -> None:
    with pytest.raises(SettingsError, match="too short to start and to save"):
        parse(time=4)
    assert parse(time=5).minutes == 5


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        (5, 5),
        ("30:00", 30),
        ("12:00:00", 720),
        ("1-12", 2160),
        ("2-01:30", 2970),
        ("1-00:00:01", 1441),
        ("0:30", 1),
    ],
)
def test_time_limits_are_slurms(text: int | str, minutes: int) -> None:
    assert slurms.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "1:2:3:4", "1.5", "12:61", "9" * 5000, "٣٣", "9999999-0"])
def test_L1_a_bad_time_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write minutes"):
        slurms.minutes(text)


def test_an_unquoted_time_in_yaml_is_no_number_of_seconds(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("time: 12:00:00\n")
    assert config.parse(Cluster, config.read_yaml(tmp_path / "mine.yaml"), "mine.yaml").minutes == 720


SINFO = """\
gpu*|3|96|gpu:a100:8(S:0-1)|2-00:00:00
gpu*|1|64+|gpu:a100:4(S:0,2-3),craynetwork:1|2-00:00:00
cpu|9|32|(null)|infinite
two|2|48|gpu:4|infinite
"""


def test_sinfo_is_read() -> None:
    slurm = slurms._read_sinfo(SINFO)
    assert slurm.default == "gpu"
    assert slurm.partitions["gpu"] == [Nodes(3, 96, 8, 2880, ("a100",)), Nodes(1, 64, 4, 2880, ("a100",))]
    assert slurm.partitions["cpu"] == [Nodes(9, 32, 0, None)]
    assert slurm.partitions["two"] == [Nodes(2, 48, 4, None)]
    assert slurm.missing("gpu,gpux") == ["gpux"]
    assert slurm.near("gpux") == "did you mean gpu?"


@pytest.mark.parametrize(
    ("raw", "gpus", "cpus", "said"),
    [
        ({}, 4, 48, "there are nodes with 4, 8"),
        ({"gpus_per_node": 8}, 8, 96, ""),
        ({"gpus_per_node": 2}, 2, 24, ""),
        ({"partition": "cpu"}, 0, 32, ""),
        ({"partition": "two", "cpus_per_task": 7}, 4, 7, ""),
    ],
)
def test_auto_asks_slurm(raw: dict[str, object], gpus: int, cpus: int, said: str) -> None:
    resolved, notes = cluster.resolve(parse(**raw), slurms._read_sinfo(SINFO))
    assert (resolved.gpus_per_node, resolved.cpus_per_task) == (gpus, cpus)
    assert said in " ".join(notes)
    assert bool(notes) == bool(said)


def test_auto_without_slurm_says_what_it_assumes() -> None:
    resolved, notes = cluster.resolve(parse(), None)
    assert (resolved.gpus_per_node, resolved.cpus_per_task) == (8, 64)
    assert [note.split(":")[0] for note in notes] == ["gpus_per_node", "cpus_per_task"]


def test_parameters_of_submitit() -> None:
    chosen = parse(
        partition="gpu",
        gpus_per_node=4,
        gpu_type="a100",
        cpus_per_task=48,
        mem_gb=500,
        exclusive=True,
        time="1:00:00",
        setup=["module load cuda"],
        srun_args=["--cpu-bind=none"],
    )
    told = cluster.submitit_parameters(chosen, 2, "vit", RUN)
    assert told["gpus_per_node"] == "a100:4"
    assert told["additional_parameters"] == {"requeue": True, "mem": "500G"}
    assert told["srun_args"] == ["--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=48", "--cpu-bind=none"]
    assert (told["nodes"], told["ntasks_per_node"], told["time"], told["exclusive"]) == (2, 1, 60, True)
    assert told["setup"].index("module load cuda") < len(told["setup"]) - 1
    assert told["setup"][-1].startswith("export PYTHONPATH=/scratch/runs/vit/code")
    gres = cluster.submitit_parameters(
        chosen.model_copy(update={"gpu_request": "gres", "mem_gb": "default"}), 2, "vit", RUN
    )
    assert gres["gres"] == "gpu:a100:4"
    assert "gpus_per_node" not in gres
    assert "mem" not in gres["additional_parameters"]


def test_X2_paths_are_quoted_in_setup() -> None:
    lines = cluster.setup_lines(RunDir(Path("/scratch/a b/it's")), [])
    assert lines[0] == """cd '/scratch/a b/it'"'"'s/code' || exit 1"""


def test_devices_of_this_machine() -> None:
    assert cluster.local_gpus("") == []
    assert cluster.local_gpus("-1") == []
    assert cluster.local_gpus("2,3") == ["2", "3"]
    assert cluster.local_gpus("GPU-8f,GPU-9a") == ["GPU-8f", "GPU-9a"]


def test_L2_no_slurm_is_no_answer(place: Path) -> None:
    assert slurms.partitions(1) is None


def test_L2_a_slurm_that_hangs_is_no_answer(slurm: Callable[[str, str], None]) -> None:
    assert isinstance(slurms.partitions(5), Slurm)
    slurm("sinfo", "exec /bin/sleep 60")
    assert slurms.partitions(0.2) is None
