"""Profiles: what they may say, what `auto` becomes, what submitit is told."""

import os
import re
import shlex
import subprocess
import sys
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


# ---- the environment of the trainers ---------------------------------------------------------------

FULL: dict[str, object] = {
    "environment": "/site/it's.sh",
    "setup": ["module load cuda"],
    "env": {"NCCL_DEBUG": "INFO", "GREETING": "a 'b' $(id) `id` \"c\"", "NUMBER": 3},
    "network_interface": "ib0",
    "infiniband": "mlx5_0,mlx5_1",
    "hf_home": "/shared/hf",
    "compile_cache": "$TMPDIR/compiled",
    "export": "none",
}


def test_lines_of_a_full_profile() -> None:
    assert cluster.site_lines(parse(**FULL)) == [
        """[ -r '/site/it'"'"'s.sh' ] || { echo "the profile's environment "'/site/it'"'"'s.sh'" cannot be read on """
        """$(hostname)" >&2; exit 1; }; source '/site/it'"'"'s.sh'""",
        "export SLURM_EXPORT_ENV=ALL",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export NCCL_IB_HCA=mlx5_0,mlx5_1",
        "export HF_HOME=/shared/hf",
        'export TORCHINDUCTOR_CACHE_DIR="${TMPDIR:?is not set here}/compiled/inductor"',
        'export TRITON_CACHE_DIR="${TMPDIR:?is not set here}/compiled/triton"',
        'export TORCH_EXTENSIONS_DIR="${TMPDIR:?is not set here}/compiled/torch_extensions"',
        "export NCCL_DEBUG=INFO",
        """export GREETING='a '"'"'b'"'"' $(id) `id` "c"'""",
        "export NUMBER=3",
        "module load cuda",
    ]


def bash(lines: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    script = "\n".join([*lines, "env"])
    return subprocess.run(["/bin/bash"], input=script, capture_output=True, text=True, env=env, timeout=30, check=False)


def test_X2_a_shell_runs_nothing_of_a_value(tmp_path: Path) -> None:
    script = tmp_path / "it's a.sh"
    script.write_text("export OF_SITE=1\nfalse\n")
    raw = FULL | {"environment": str(script), "setup": ["export LAST=$GREETING"]}
    done = bash(cluster.site_lines(parse(**raw)), TMPDIR="/t m/p", PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["GREETING"] == found["LAST"] == "a 'b' $(id) `id` \"c\""
    assert found["TRITON_CACHE_DIR"] == "/t m/p/compiled/triton"
    assert found["OF_SITE"] == "1"


def test_a_job_ends_where_its_environment_cannot_be_had(tmp_path: Path) -> None:
    lines = cluster.site_lines(parse(environment=f"{tmp_path}/none.sh"))
    done = bash(lines, PATH=os.environ["PATH"])
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the profile's environment {tmp_path}/none.sh cannot be read on " in done.stderr
    done = bash(cluster.site_lines(parse(hf_home="$SCRATCH/hf")), PATH=os.environ["PATH"])
    assert done.returncode != 0
    assert "SCRATCH: is not set here" in done.stderr


@given(st.text(max_size=12))
def test_X2_a_node_path_that_is_taken_runs_nothing(text: str) -> None:
    for start in ("/", "$TMPDIR/", ""):
        try:
            taken = parse(hf_home=start + text).hf_home
        except SettingsError:
            continue
        assert taken is not None
        line = cluster.quoted(taken)
        inside = re.sub(r"\$\{[A-Z][A-Z0-9_]*:\?is not set here\}", "", line)
        if line.startswith('"'):
            assert not set(inside[1:-1]) & set('"\\`$!\n\r')
        else:
            assert shlex.split(line) == [taken if not taken.startswith("~/") else f"$HOME/{taken[2:]}"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"env": {"WANDB_API_KEY": "x"}}, "env: WANDB_API_KEY looks like a secret"),
        ({"env": {"HF_TOKEN": "x"}}, "env: HF_TOKEN looks like a secret"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
        ({"env": {"MASTER_ADDR": "x"}}, "env: MASTER_ADDR is set by the launcher"),
        ({"env": {"SLURM_CPU_BIND": "x"}}, "is set by the launcher"),
        ({"env": {"A;B": "x"}}, "env: 'A;B' is not usable: the name of a variable"),
        ({"env": {"A": "x\ny"}}, "env: .* is not usable: one line"),
        ({"sbatch_args": ["--time=3"]}, "sbatch_args: --time: use the field time"),
        ({"sbatch_args": ["--output=x"]}, "sbatch_args: --output: the launcher sets it"),
        ({"sbatch_args": ["--x; id"]}, "sbatch_args"),
        ({"environment": "/a/$(id).sh"}, "environment: .* is not usable: an absolute path"),
        ({"compile_cache": "$tmp/x"}, "compile_cache"),
        ({"node_disk": "relative"}, "node_disk"),
        ({"network_interface": "ib0 ib1"}, "network_interface: 'ib0 ib1' is not usable: names with commas"),
        ({"container": {"image": "--evil"}}, "container.image"),
        ({"container": {"image": "x.sif", "binds": ["/a,/b"]}}, "container.binds"),
        ({"container": {"image": "x.sif", "python": "-c"}}, "container.python"),
        ({"container": {"image": "x.sif", "runtme": "pyxis"}}, r"container.runtme: unknown setting; did you mean"),
        ({"gpus_per_node": 0, "numa_binding": "node"}, "needs gpus_per_node above 0"),
        ({"gpu_request": "none"}, "gpus_per_node must be a number"),
        ({"container": {"image": "a", "runtime": "pyxis"}, "export": "none"}, "with pyxis use export: all"),
    ],
)
def test_L1_X1_X2_what_a_profile_may_not_say(raw: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        parse(**raw)


def test_site_switches_reach_the_script() -> None:
    told = cluster.submitit_parameters(
        parse(
            gpus_per_node=4,
            cpus_per_task=8,
            gpu_request="none",
            reservation="week",
            export="none",
            sbatch_args=["--licenses=scratch:1", "--nice"],
            cpu_bind="cores",
            srun_args=["--mpi=none"],
        ),
        1,
        "vit",
        RUN,
    )
    assert told["additional_parameters"] == {
        "requeue": True,
        "mem": "0",
        "reservation": "week",
        "export": "NONE",
        "licenses": "scratch:1",
        "nice": True,
    }
    assert "gpus_per_node" not in told
    assert told["srun_args"][-2:] == ["--cpu-bind=cores", "--mpi=none"]


def test_paths_in_a_profile_are_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vit.sif").touch()
    profile = tmp_path / "site" / "mine.yaml"
    profile.write_text("environment: mine.sh\ncontainer: {image: vit.sif}\n")
    monkeypatch.chdir(tmp_path)
    found = cluster.load("site/mine.yaml", "30:00")
    assert found.environment == f"{tmp_path}/site/mine.sh"
    assert found.container
    assert found.container.image == f"{tmp_path}/site/vit.sif"
    assert found.minutes == 30
    profile.write_text("container: {image: 'nvcr.io#nvidia/pytorch:25.09-py3', runtime: pyxis}\n")
    box = cluster.load(profile).container
    assert box
    assert box.image == "nvcr.io#nvidia/pytorch:25.09-py3"


@pytest.mark.parametrize(
    ("raw", "types", "expected"),
    [
        ({"gpu_memory_gb": 96}, (), (96, 96)),
        ({"gpu_type": "a100"}, (), (40, 80)),
        ({"gpu_type": "nvidia_a100-sxm4-80gb"}, (), (80, 80)),
        ({"gpu_type": "nvidia_h100_80gb_hbm3"}, (), (80, 80)),
        ({"gpu_type": "a100_1g.10gb"}, (), (10, 10)),
        ({}, ("h200",), (141, 141)),
        ({}, ("h200", "v100"), (16, 141)),
        ({"gpu_type": "l40s"}, (), (48, 48)),
        ({"gpu_type": "tpu"}, (), None),
        ({}, (), None),
    ],
)
def test_memory_of_a_gpu_by_its_type(
    raw: dict[str, object], types: tuple[str, ...], expected: tuple[float, float] | None
) -> None:
    assert cluster.gpu_memory_gb(parse(**raw), types) == expected


# ---- what a node starts ----------------------------------------------------------------------------

COMMAND = ["/venv/bin/python", "-m", "torch.distributed.run", "--nnodes", "2", "-m", "vitdist.train", "/runs/a b"]


def test_wrap_without_a_container() -> None:
    assert cluster.wrap(COMMAND, parse()) == COMMAND
    bound = cluster.wrap(COMMAND, parse(numa_binding="node", prefix=["numactl", "--localalloc"]))
    assert bound[:2] == ["numactl", "--localalloc"]
    assert bound[2:7] == ["/venv/bin/python", "-m", "torch.distributed.run", "--numa-binding", "node"]
    assert bound[7:] == COMMAND[3:]


def test_wrap_with_apptainer() -> None:
    box = {"image": "/img/vit.sif", "binds": ["/data:/data:ro"], "python": "/opt/python", "args": ["--writable-tmpfs"]}
    assert cluster.wrap(COMMAND, parse(gpus_per_node=8, container=box), ["/runs/a b", "/shards"]) == [
        *("apptainer", "exec", "--nv", "--env", "PYTHONNOUSERSITE=1"),
        *("--bind", "/runs/a b", "--bind", "/shards", "--bind", "/data:/data:ro", "--writable-tmpfs", "/img/vit.sif"),
        *("sh", "-c", 'trap "" USR2; exec "$@"', "sh", "/opt/python", *COMMAND[1:]),
    ]
    plain = cluster.wrap(COMMAND, parse(gpus_per_node=0, container={"image": "a", "runtime": "singularity"}))
    assert plain[:2] == ["singularity", "exec"]
    assert "--nv" not in plain


def test_wrap_with_pyxis() -> None:
    box = {"image": "nvcr.io#nvidia/pytorch:25.09-py3", "runtime": "pyxis", "binds": ["/data"]}
    chosen = parse(cpus_per_task=96, container=box, env={"NCCL_DEBUG": "INFO"}, prefix=["numactl"])
    assert cluster.wrap(COMMAND, chosen, ["/runs"], "node7") == [
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node7", "--mem=0", "--cpus-per-task=96"),
        *("--cpu-bind=none", "--input=none", "--unbuffered", "--container-image=nvcr.io#nvidia/pytorch:25.09-py3"),
        "--container-mounts=/runs:/runs,/data:/data",
        "--container-env=PYTHONPATH,OMP_NUM_THREADS,CUDA_VISIBLE_DEVICES,NCCL_DEBUG",
        *("numactl", "sh", "-c", 'trap "" USR2; exec "$@"', "sh", "python3", *COMMAND[1:]),
    ]


def test_a_container_sees_what_a_run_needs() -> None:
    settings = config.parse(
        config.Config,
        {
            "data": {"train": {"/d/a": 1, "s3://x/y": 1}, "val": "/d/a/val", "cache": "$TMPDIR/c"},
            "model": {"pretrained": "org/vit"},
            "train": {"global_batch": 8, "epochs": 1},
        },
        "x",
    )
    chosen = parse(hf_home="/shared/hf", compile_cache="$TMPDIR/c")
    assert cluster.places(RunDir(Path("/d/runs/x")), settings, chosen) == ["/d/a", "/d/runs/x", "/shared/hf"]


APPTAINER = """\
#!/bin/bash
# Records its arguments and becomes the command, as the real one does, with signals back at their defaults (Go's exec).
printf '%s\\n' "$@" > {record}
while [ "$1" != {image} ]; do shift; done
shift
exec env --default-signal=USR2 "$@"
"""


def test_USR2_is_ignored_inside_of_a_container(tmp_path: Path) -> None:
    """SLURM sends it to torchrun too, which would die of it; an inherited "ignored" does not get through apptainer."""
    image, record = tmp_path / "vit.sif", tmp_path / "record"
    (tmp_path / "apptainer").write_text(APPTAINER.format(record=record, image=image))
    (tmp_path / "apptainer").chmod(0o755)
    (tmp_path / "torchrun.py").write_text(
        "import signal, sys; print(signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN, sys.argv[1:])\n"
    )
    chosen = parse(gpus_per_node=0, container={"image": str(image), "python": sys.executable})
    command = cluster.wrap(["python", "-m", "torchrun", "--nnodes", "2", "a b"], chosen, [str(tmp_path)])
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "True ['--nnodes', '2', 'a b']\n", done.stderr
    assert record.read_text().splitlines()[:3] == ["exec", "--env", "PYTHONNOUSERSITE=1"]


def test_the_node_disk_becomes_the_cache_of_shards() -> None:
    settings = config.load(ROOT / "configs" / "demo.yaml")
    assert cluster.staged(settings, parse()) == settings
    staged = cluster.staged(settings, parse(node_disk="/local/", node_disk_gb=500))
    assert (staged.data.cache, staged.data.cache_gb) == ("/local/vitdist-cache", 500)
    on_each = config.with_absolute_paths(cluster.staged(settings, parse(node_disk="$TMPDIR")))
    assert on_each.data.cache == "$TMPDIR/vitdist-cache"
    own = config.load(ROOT / "configs" / "demo.yaml", ["data.cache=/mine"])
    assert cluster.staged(own, parse(node_disk="/local")) == own


def test_jobs_with_weights_of_the_hub_ask_nobody() -> None:
    scratch = config.load(ROOT / "configs" / "demo.yaml")
    tuned = config.load(ROOT / "configs" / "vit_large.yaml")
    assert cluster.offline(scratch, parse()) == parse()
    assert "export HF_HUB_OFFLINE=1" in cluster.site_lines(cluster.offline(tuned, parse()))
    assert cluster.offline(tuned, parse(env={"HF_HUB_OFFLINE": 0})).env == {"HF_HUB_OFFLINE": 0}


def test_every_field_is_explained() -> None:
    page = (ROOT / "docs" / "your-cluster.md").read_text()
    for name, _, _, explanation in config.flat(Cluster):
        assert explanation, name
        assert f"`{name}`" in page, name
