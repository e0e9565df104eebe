"""The command: what it prints, what it refuses, what it leaves behind."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from launch import planning, scripts, snapshot
from launch import submit as launch_submit
from launch.cluster import Cluster, submitit_parameters
from tests.launch.conftest import ROOT, SUBMIT, submit
from vitdist import config, rundir
from vitdist.rundir import RunDir

Put = Callable[[str, str], None]
PROFILE = """\
partition: gpu
account: vision
gpus_per_node: 8
cpus_per_task: 96
time: "12:00:00"
setup: [module load cuda/13.0]
"""


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, run in this process."""
    try:
        code = launch_submit.main(list(arguments), launcher="standin")
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


# ---- dry run ---------------------------------------------------------------------------------------


GOLDENS: dict[str, tuple[str, list[str]]] = {
    "4nodes": ("{}", []),
    "array": ("{}", ["--sweep", "optim.lr=1e-4,3e-4", "optim.layer_decay=0.65,0.75", "--parallel", "2"]),
    "gres": ("{gpu_request: gres, gpu_type: h200, mem_gb: 900, exclusive: true}", []),
    "exclude": ("{exclude: 'bad[1-2]', constraint: ib&h200}", ["--exclude", "node7"]),
    "container": ("{container: {image: /images/vit.sif, binds: ['/scratch']}}", []),
}
"""Fields of the profile beside those of PROFILE, and more of the command line."""


@pytest.mark.parametrize("name", GOLDENS)
def test_the_sbatch_script_is_the_golden_one(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, more = GOLDENS[name]
    (place / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(PROFILE) | yaml.safe_load(profile)))
    before = tree(place)
    arguments = ["--config", "tiny.yaml", "--cluster", "mine.yaml", "--nodes", "4", "--name", "vit", "--dry-run", *more]
    code, out, err = in_process(capsys, *arguments)
    assert code == 0, err
    text = out.replace(sys.executable, "PYTHON").replace(str(place), "PLACE")
    assert text == (ROOT / "tests" / "golden" / f"sbatch_{name}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0
    assert tree(place) == before
    # Not in reach of a SLURM: told, but a dry run refuses only settings.
    assert "error: sbatch, srun, scontrol: not in PATH" in err
    points = [line for line in err.splitlines() if line.startswith("vit-")]
    assert len(points) == (4 if name == "array" else 0)


def test_the_script_is_the_one_that_submitit_makes(place: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    profile = config.parse(Cluster, yaml.safe_load(PROFILE) | {"exclude": "bad[1-2]", "exclusive": True}, "")
    parameters = submitit_parameters(profile, 4, "vit", RunDir(place / "a b"))
    theirs = _make_sbatch_string(command="python x", folder=place / "a b", **parameters)
    assert scripts.sbatch(parameters, "python x", place / "a b" / "%j") == theirs


@pytest.mark.parametrize(("site", "told"), [("", ""), ("set -eu\ntrap 'echo bye $?' EXIT\n", "bye 7\n")])
@pytest.mark.parametrize("looks", [0, 1])
def test_the_batch_scripts_last_act_keeps_the_exit_code_and_a_sites_trap(
    place: Path, site: str, told: str, looks: int
) -> None:
    """Run by bash, with a `python` that says how it was called and ends well or not."""
    lines = scripts._epilogue(place / "it's a run" / "submitit")
    python = place / "py thon"
    python.write_text(f'#!/bin/sh\necho "$*"\nexit {looks}\n')
    python.chmod(0o755)
    text = site + "\n".join(lines).replace(shlex.quote(sys.executable), shlex.quote(str(python)))
    for code, said in ((7, f"-u -m launch.epilogue {place}/it's a run/submitit 7\n"), (0, "")):
        done = subprocess.run(["bash", "-c", f"{text}\n(exit {code})"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout == said + told.replace("7", str(code))


def test_a_dry_run_is_what_will_be_submitted(slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.yaml").write_text(PROFILE)
    slurm("sbatch", f'[ "$1" = --parsable ] && /bin/cat "$2" > {place}/sent.sh; echo 4711')
    arguments = ["--config", "tiny.yaml", "--cluster", "mine.yaml", "--nodes", "4", "--name", "vit", "train.epochs=3"]
    code, script, _ = in_process(capsys, *arguments, "--dry-run")
    assert code == 0
    assert not (place / "runs").exists()
    code, out, _ = in_process(capsys, *arguments)
    run = RunDir(place / "runs" / "vit")
    assert code == 0
    assert script == run.submit.read_text() == (place / "sent.sh").read_text()
    assert "job 4711: 4 nodes with 8 ranks each" in out
    assert str(run.path) in out
    assert "asks for    4 nodes x 8 GPUs x 12:00 h = 384 GPU-hours a start" in out
    assert "starts      not known" in out
    assert "follow      python launch/jobs.py runs/vit logs -f" in out
    assert (run.path / "slurm_job").read_text() == "4711\n"
    assert (run.submitit / "4711_submitted.pkl").exists()


def test_a_dry_run_here_is_a_script_of_torchruns(place: Path) -> None:
    before = tree(place)
    done = submit("--config", "tiny.yaml", "--nodes", "2", "--name", "x", "--dry-run", "--cluster", "local")
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stdout.count(" -m torch.distributed.run --nnodes 2 ") == 2
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert tree(place) == before


def test_findings_of_a_dry_run_are_on_stderr(place: Path) -> None:
    (place / "shards" / "val" / "index.json").unlink()
    done = submit("--config", "tiny.yaml", "--nodes", "2", "--name", "x", "--dry-run")
    assert done.returncode == 0
    assert "no SLURM and no GPU here: tiny.yaml on 2 local CPU workers" in done.stderr
    assert (
        f"error: data.val: {place}/shards/val: its shards have no index; run: vitdist index {place}/shards/val"
        in done.stderr
    )
    assert "error" not in done.stdout


def test_a_dry_run_takes_less_than_a_second(place: Path) -> None:
    (place / "mine.yaml").write_text(PROFILE)
    times = []
    for _ in range(3):
        began = time.monotonic()
        submit("--config", "tiny.yaml", "--cluster", "mine.yaml", "--nodes", "4", "--name", "vit", "--dry-run")
        times.append(time.monotonic() - began)
    assert min(times) < 1, times


def test_no_heavy_library_is_imported(place: Path) -> None:
    code = (
        "import sys; from launch import submit, job, follow, snapshot; "
        "submit.main(['--config', 'tiny.yaml', '--dry-run', '--cluster', 'local']); "
        "print([m for m in ('torch', 'numpy', 'deepspeed', 'transformers', 'webdataset', 'wandb') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_complete(place: Path) -> None:
    text = submit("--help").stdout
    for option in ("--config", "--nodes", "--cluster", "--name", "--time", "--runs", "--dry-run", "--follow"):
        assert option in text
    for name, _, _, explanation in config.flat(config.Config):
        assert name in text
        assert " ".join(explanation.split()) in text


def test_it_runs_from_any_folder(place: Path) -> None:
    elsewhere = place / "else where"
    elsewhere.mkdir()
    done = submit(
        "--config", "configs/demo.yaml", "--cluster", "slurm/default.yaml", "--name", "x", "--dry-run", cwd=elsewhere
    )
    assert done.returncode == 0, done.stderr
    assert f"'{elsewhere}/runs/x/code'" in done.stdout


# ---- which place, which recipe ---------------------------------------------------------------------


def plan(*arguments: str) -> planning.Plan:
    return planning.make_plan(launch_submit._parser().parse_intermixed_args(list(arguments)), os.environ)


@pytest.mark.parametrize(
    ("asked", "gpus", "nodes", "each", "said"),
    [
        (1, "0,1,2,3", 1, 4, "1 simulated node on this machine's 4 GPUs, 4 each"),
        (2, "0,1,2,3", 2, 2, "2 simulated nodes on this machine's 4 GPUs, 2 each"),
        (8, "0,1,2,3", 4, 1, "8 nodes asked, capped to 4 on this machine's 4 GPUs, 1 each"),
        (2, "0,1,2", 2, 1, "1 each, 1 left idle"),
    ],
)
def test_gpus_without_slurm(
    place: Path, monkeypatch: pytest.MonkeyPatch, asked: int, gpus: str, nodes: int, each: int, said: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    found = plan("--nodes", str(asked))
    assert found.source.name == "vit_large.yaml"
    assert (found.nodes, found.processes, found.cluster) == (nodes, each, None)
    assert said in found.notes[0]


def test_neither_slurm_nor_gpu(place: Path) -> None:
    found = plan("--nodes", "4")
    assert found.source.name == "demo.yaml"
    assert (found.nodes, found.processes) == (4, 1)
    assert found.notes == ("no SLURM and no GPU here: configs/demo.yaml on 4 local CPU workers",)


def test_slurm_is_taken_where_it_answers(slurm: Put, place: Path) -> None:
    found = plan("--nodes", "4")
    assert found.source.name == "vit_large.yaml"
    assert found.cluster
    assert (found.nodes, found.processes, found.cluster.cpus_per_task) == (4, 8, 96)
    slurm("sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert plan("--nodes", "4").cluster is None


# ---- bad input -------------------------------------------------------------------------------------

REFUSED = {
    "unknown setting": (
        ["optim.ler=1"],
        r"error: tiny.yaml: unusable settings\n  optim.ler: unknown setting; did you mean optim.lr\?",
    ),
    "wrong type": (["optim.lr=fast"], r"optim.lr: input should be a valid number, not 'fast'"),
    "no override": (["--nodes", "2", "fast"], r"'fast': an override is written section.name=value"),
    "missing config": (["--config", "tinny.yaml"], r"tinny.yaml: no such file; did you mean tiny.yaml\?"),
    "missing profile": (["--cluster", "slurm/mars.yaml"], r"mars.yaml: no such file"),
    "batch does not divide": (["--nodes", "3"], r"train.global_batch 64 does not divide over 3 ranks: use 63 or 66"),
    "no nodes": (["--nodes", "0"], r"error: --nodes 0: at least 1"),
    "negative nodes": (["--nodes=-2"], r"error: --nodes -2: at least 1"),
    "nodes in words": (["--nodes", "four"], r"error: argument --nodes: invalid int value: 'four'; see --help"),
    "bad time": (["--time", "soon"], r"error: time 'soon': write minutes"),
    "bad name": (["--name", "../x"], r"error: run name '../x': use 1 to 100 letters"),
    "odd folder": (["--runs", "a%j"], r"error: --runs 'a%j': SLURM cannot write logs"),
    "a slip of the finger": (
        ["--nodes", "40000", "--cluster", "local"],
        r"error: --nodes 40000: at most 256 simulated",
    ),
    "no such user": (["--config", "~nobodyhere/x.yaml"], r"error: ~nobodyhere/x.yaml: no such file"),
    "signs that do not print": (["--runs", "a\x1b[31m"], r"error: 'a\\x1b\[31m': holds signs that do not print"),
    "a time without end": (["--time", "9" * 5000], r"error: time '9{40}...': write minutes"),
    "unknown option": (["--gpus", "2"], r"error: unrecognized arguments: --gpus"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_L1_X4_bad_input_is_refused_and_leaves_nothing(
    case: str, dry: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = REFUSED[case]
    before = tree(place)
    config_ = [] if "--config" in arguments else ["--config", "tiny.yaml"]
    code, out, err = in_process(capsys, *config_, *arguments, *dry)
    assert code == 2
    assert re.search(said, err), err
    assert out == ""
    assert "Traceback" not in err
    assert tree(place) == before


def test_L1_all_faults_are_told_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(
        capsys, "--config", "tiny.yaml", "--nodes", "0", "--time", "soon", "optim.lr=-1", "train.epoch=2"
    )
    assert code == 2
    for name in ("--nodes 0", "time 'soon'", "optim.lr", "train.epoch"):
        assert name in err


def test_L1_no_traceback_as_a_command(place: Path) -> None:
    done = submit("--config", "tiny.yaml", "optim.ler=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: tiny.yaml: unusable settings\n  optim.ler: unknown setting; did you mean optim.lr?\n"


def break_shards(place: Path, how: str) -> None:
    train, val = place / "shards" / "train", place / "shards" / "val"
    if how == "folder":
        train.rename(place / "shards" / "old")
    elif how == "tars":
        (train / "000.tar").unlink()
    elif how == "index":
        (train / "index.json").unlink()
    elif how == "torn":
        (train / "index.json").write_text("{")
    elif how == "empty":
        (train / "index.json").write_text('{"samples": 0, "classes": []}')
    elif how == "classes":
        (val / "index.json").write_text(json.dumps({"samples": 9, "classes": ["cat", "bird"]}))
    elif how == "order":
        (val / "index.json").write_text(json.dumps({"samples": 9, "classes": ["dog", "cat"]}))
    elif how == "cut":
        shard = {"name": "000.tar", "bytes": 5}
        (train / "index.json").write_text(json.dumps({"samples": 9, "classes": ["cat", "dog"], "shards": [shard]}))
    elif how == "single":
        for folder in (train, val):
            (folder / "index.json").write_text(json.dumps({"samples": 9, "classes": ["cat"]}))


def test_several_sets_shares_and_places_out_of_reach(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each set is looked at; what lies behind a URL or elsewhere on the nodes is not."""
    common = ("--config", "tiny.yaml", "--name", "x", "--dry-run", "--cluster", "local")
    for override, said in (
        ("data.train={shards/train: 3, shards/none: 1}", "data.train: .*/shards/none: no such folder"),
        ("data.class_shares={bird: 2}", "data.class_shares: there is no class 'bird'; there are: cat, dog"),
        ("data.train=https://host/shards/train", ""),
        ("data.class_shares={dog: 2}", ""),
        ("loss.class_weights={fox: 2}", "loss.class_weights: there is no class 'fox'"),
        ("evaluation.unsure.costs={dog: {wolf: 9}}", "evaluation.unsure.costs: there is no class 'wolf'"),
        ("data.val=shards/train", ""),
    ):
        _, _, err = in_process(capsys, *common, override)
        assert re.search(said, err) if said else "error" not in err, err
    record = {"samples": 9, "classes": ["cat", "dog"], "base": "https://host/shards"}
    (place / "shards/train/000.tar").unlink()
    (place / "shards/train/index.json").write_text(json.dumps(record))
    assert "error" not in in_process(capsys, *common)[2]


def test_a_local_checkpoint_is_looked_at(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is there, and a file of weights gets by settings what its shapes do not tell, all of it named at once."""
    recipe = (place / "tiny.yaml").read_text().replace("scratch: {patch_size: 8, width: 64, depth: 4, heads: 4}", "")
    (place / "tuned.yaml").write_text(recipe.replace("32, }", "32}"))
    (place / "vit.pth").touch()
    (place / "bare").mkdir()
    (place / "bare" / "model.safetensors").touch()
    (place / "whole").mkdir()
    (place / "whole" / "config.json").touch()
    # The activation is asked for by the trainer, which sees whether the file has a gated MLP, and so none.
    told = ["model.heads=3", "model.layer_norm_eps=1e-6"]
    pixels = ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"]
    for overrides, said in (
        (["model.pretrained=./none"], r"model.pretrained: \S+/none: no such file or folder"),
        (["model.pretrained=bare"], r"bare: has no config.json; did you mean \S+/bare/model.safetensors\?"),
        (["model.pretrained=whole"], ""),
        (["model.pretrained=google/vit-large-patch16-224-in21k"], ""),
        (
            ["model.pretrained=vit.pth"],
            r"give: model.heads .*; model.layer_norm_eps .*; data.mean .*; data.std",
        ),
        (
            ["model.pretrained=vit.pth", *told[:1], *pixels],
            r"so give: model.layer_norm_eps \(1e-6 in .*\) \[weights\]\n",
        ),
        (["model.pretrained=vit.pth", *told, *pixels], ""),
    ):
        common = ("--config", "tuned.yaml", "--name", "x", "--dry-run", "--cluster", "local")
        _, _, err = in_process(capsys, *common, *overrides)
        assert re.search(said, err) if said else "error" not in err, err


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("folder", r"no such folder; to make it of pictures run: vitdist pack FOLDER \S+/shards"),
        ("tars", r"holds no shards \(\*.tar\); if it holds pictures, run: vitdist pack \S+/shards/train OUT"),
        ("index", r"its shards have no index; run: vitdist index \S+/shards/train"),
        ("torn", r"index.json cannot be read"),
        ("empty", r"its index names no pictures"),
        (
            "classes",
            r"data.train and data.val differ in the classes bird, dog: pack both with one `vitdist pack FOLDER OUT`",
        ),
        ("order", r"data.train and data.val have their classes in different orders: pack both with one `vitdist pack"),
        ("cut", r"000\.tar is not as long as indexed: bring it back, or save what is whole: vitdist verify"),
        ("single", r"a single class, 'cat': there is nothing to tell apart"),
    ],
)
def test_D4_D6_shards_are_looked_at(how: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_shards(place, how)
    before = tree(place)
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x")
    assert code == 2
    assert re.search(said, err), err
    assert tree(place) == before


@pytest.mark.parametrize(
    ("profile", "arguments", "said"),
    [
        ("partition: gpux", [], r"error: partition gpux: this cluster has none of that name; did you mean gpu\?"),
        ("partition: gpu", ["--nodes", "8"], r"error: --nodes 8: partition gpu has 4 nodes with 8 GPUs"),
        ("partition: gpu", ["--time", "5-00:00:00"], r"error: time 5-00:00:00: partition gpu allows 2880 minutes"),
        (
            "partition: gpu",
            ["--time", "3"],
            r"error: \S+: unusable settings\n  time 3 is too short to start and to save in",
        ),
        ('partition: "gpu$(id)"', [], r"partition: string should match pattern"),
    ],
)
def test_L2_X2_the_profile_is_checked(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str], profile: str, arguments: list[str], said: str
) -> None:
    (place / "mine.yaml").write_text(profile)
    before = tree(place)
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--cluster", "mine.yaml", "--name", "x", *arguments)
    assert code == 2
    assert re.search(said, err), err
    assert tree(place) == before


def test_L2_what_sbatch_says_is_shown_and_nothing_is_left(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm("sbatch", "echo 'sbatch: error: Invalid account or account/partition combination specified' >&2; exit 1")
    before = tree(place)
    code, out, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x")
    assert code == 2
    assert out == ""
    said = "SLURM refuses the job: sbatch: error: Invalid account or account/partition combination specified [script]"
    assert err.splitlines()[-1] == f"error: {said}"
    assert tree(place) == before


def test_L4_runs_that_is_a_file_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--runs", "tiny.yaml")
    assert code == 2
    assert "tiny.yaml is a file; choose another folder" in err


def test_L4_a_folder_without_the_right_to_write_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_submit.preflight.os, "access", lambda *_: False)  # root may write everywhere
    before = tree(place)
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x")
    assert code == 2
    assert f"error: --runs {place}/runs: you may not write in {place}; choose another folder with --runs" in err
    assert tree(place) == before


# ---- the run folder --------------------------------------------------------------------------------


def test_X1_X3_what_a_submission_leaves(
    slurm: Put, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm("sbatch", f"env > {place}/env; pwd > {place}/pwd; echo 4711")
    for name in ("SLURM_CPU_BIND", "SLURM_JOB_ID", "SBATCH_PARTITION", "RANK", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "secret-or-stale")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x", "--nodes", "2", "optim.lr=3e-4")
    assert code == 0
    assert "SBATCH_PARTITION of your shell would override the script and is left out" in err
    run = RunDir(place / "runs" / "x")
    settings = config.load(run.config)
    assert settings.data.train == str(place / "shards" / "train")
    assert settings.optim.lr == 3e-4
    where = yaml.safe_load(run.cluster.read_text())
    assert (where["scheduler"], where["nodes"], where["processes"]) == ("slurm", 2, 8)
    assert where["profile"]["gpus_per_node"] == 8
    assert (run.code / "launch" / "job.py").read_bytes() == (ROOT / "launch" / "job.py").read_bytes()
    assert json.loads(run.env.read_text())["argv"][:3] == ["launch/submit.py", "--config", "tiny.yaml"]
    assert run.submitit.stat().st_mode & 0o777 == 0o700
    # What sbatch hands on to the job.
    env = dict(line.split("=", 1) for line in (place / "env").read_text().splitlines() if "=" in line)
    assert env["SLURM_CONF"] == "/etc/slurm.conf"
    assert not {"SLURM_CPU_BIND", "SLURM_JOB_ID", "SBATCH_PARTITION", "RANK"} & set(env)
    assert env["PYTHONPATH"].split(":")[0] == str(run.code)
    assert (place / "pwd").read_text().strip() == str(run.code)
    assert os.environ["SLURM_CPU_BIND"] == "secret-or-stale"
    for path in run.path.rglob("*"):
        assert path.is_dir() or b"secret-or-stale" not in path.read_bytes(), path


def test_X3_pickles_lie_where_nobody_else_can_write(
    slurm: Put, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle is code that the job runs: a folder that was opened to others is closed, another user's is refused."""
    arguments = ("--config", "tiny.yaml", "--name", "x")
    assert in_process(capsys, *arguments)[0] == 0
    slurm("squeue", "true")
    run = RunDir(place / "runs" / "x")
    run.submitit.chmod(0o777)
    assert in_process(capsys, *arguments)[0] == 0
    assert run.submitit.stat().st_mode & 0o777 == 0o700
    me = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: me + 1)
        code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert f"error: {run.submitit} is another user's: what lies there would be run as you" in err
    run.submitit.rename(place / "elsewhere")
    run.submitit.symlink_to(place / "elsewhere")
    code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert "is a link" in err


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati"])
def test_X5_records_are_in_utc_whatever_the_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert abs(datetime.fromisoformat(rundir.now()).timestamp() - time.time()) < 5
        assert rundir.now().endswith("+00:00")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_L3_a_job_that_is_queued_is_not_submitted_twice(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--config", "tiny.yaml", "--name", "x")
    assert in_process(capsys, *arguments)[0] == 0
    code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert "is job 4711 already, PENDING (Resources): add --follow to watch it, or first scancel 4711" in err
    slurm("squeue", "true")
    code, _, err = in_process(capsys, *arguments)
    assert code == 0
    assert "exists with the same settings: continues at attempt 0" in err


def test_L3_a_silent_slurm_may_still_have_the_job(slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", "tiny.yaml", "--name", "x")
    assert in_process(capsys, *arguments)[0] == 0
    slurm("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert f"SLURM does not answer, so job 4711 of {place}/runs/x may still run: try again later" in err
    assert in_process(capsys, *arguments, "--yes")[0] == 0


def test_L2_a_failed_continuation_leaves_the_run_as_it_was(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--config", "tiny.yaml", "--name", "x")
    assert in_process(capsys, *arguments)[0] == 0
    slurm("squeue", "true")
    slurm("sbatch", "echo no >&2; exit 1")
    before = set(tree(place))
    assert in_process(capsys, *arguments)[0] == 2
    assert set(tree(place)) - before == {str(place / "runs" / "x" / ".lock")}


# ---- what a shell or SLURM would take for something else ----------------------------------------------

ODD = {
    "newline": "a\n#SBATCH --uid=0",
    "quote": "a'; id; '",
    "double quote": 'a"b',
    "command": "$(touch pwned)",
    "backtick": "`touch pwned`",
    "variable": "${HOME}",
    "up": "../../x",
    "flag": "--uid=0",
    "blank": "a b",
    "nul": "a\0b",
}
PLACES: dict[str, Callable[[str], list[str]]] = {
    "name": lambda odd: [f"--name={odd}"],
    "resume": lambda odd: [f"--resume={odd}"],
    "after": lambda odd: [f"--after={odd}"],
    "exclude": lambda odd: [f"--exclude={odd}"],
    "time": lambda odd: [f"--time={odd}"],
    "config": lambda odd: [f"--config={odd}"],
    "cluster": lambda odd: [f"--cluster={odd}"],
    "setting": lambda odd: [f"optim.{odd}=1"],
    "value": lambda odd: [f"optim.lr={odd}"],
    "sweep": lambda odd: ["--sweep", f"optim.{odd}=1,2"],
    "swept value": lambda odd: ["--sweep", f"optim.lr={odd},2"],
    **{
        f"profile {field}": lambda odd, field=field: [f"--cluster={field}.yaml"]
        for field in ("partition", "account", "qos", "comment", "constraint", "exclude", "gpu_type")  # type: ignore[misc]
    },
}


@pytest.mark.parametrize("where", PLACES)
def test_X2_odd_texts_are_refused_wherever_they_stand(
    where: str, slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm("sbatch", f"touch {place}/sent; echo 4711")
    for what, odd in ODD.items():
        if where.startswith("profile "):
            field = where.removeprefix("profile ")
            (place / f"{field}.yaml").write_text(yaml.safe_dump({"gpus_per_node": 8, field: odd}))
        arguments = PLACES[where](odd)
        config_ = [] if where in ("config", "resume") else ["--config", "tiny.yaml"]
        before = tree(place)
        code, out, err = in_process(capsys, *config_, *arguments)
        assert code == 2, (what, out, err)
        assert out == ""
        assert err.startswith("error: "), (what, err)
        assert "Traceback" not in err
        assert tree(place) == before, what


def test_X2_texts_that_are_free_reach_no_shell(slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A project of W&B may have quotes in its name; a path may lead up. Both stand in config.yaml alone."""
    project = 'it\'s "ours"; id #'
    overrides = [f"tracking.project={json.dumps(project)}", "data.train=../" + place.name + "/shards/train"]
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x", *overrides)
    assert code == 0, err
    run = RunDir(place / "runs" / "x")
    assert config.load(run.config).tracking.project == project
    assert config.load(run.config).data.train == str(place / "shards" / "train")
    assert "ours" not in run.submit.read_text()


# ---- sweeps ----------------------------------------------------------------------------------------

LISTS = ["--sweep", "optim.lr=1e-4,3e-4", "optim.layer_decay=0.65,0.75"]


def test_L1_faults_of_all_points_are_told_before_anything_is_made(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(place)
    for lists, said in (
        (["optim.lr=1e-4,fast", "optim.layer_decay=0.65,7"], ["not 'fast'", "optim.layer_decay", "in 1 of the points"]),
        (["optim.ler=1,2"], ["optim.ler: unknown setting; did you mean optim.lr?"]),
        (["train.global_batch=64,33"], ["train.global_batch 33 does not divide", "(train.global_batch=33)"]),
        (["optim.lr=1e-4,0.0001"], ["--sweep: optim.lr=1e-4 means the same as another point", "optim.lr=0.0001"]),
    ):
        code, out, err = in_process(capsys, "--config", "tiny.yaml", "--nodes", "2", "--sweep", *lists)
        assert (code, out) == (2, "")
        assert all(text in err for text in said), err
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "optim.lr=1", *LISTS, "--parallel", "0")
    assert "optim.lr: is in --sweep and given besides" in err
    assert "--parallel 0: at least 1" in err
    assert tree(place) == before


def test_a_sweep_goes_on_with_the_points_that_are_left(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "tiny.yaml", "--name", "s", *LISTS]
    code, out, err = in_process(capsys, *arguments, "--parallel", "3")
    assert code == 0, err
    assert "job 4711: 4 points, 3 at once, each 1 node with 8 ranks, 720 minutes a start" in out
    assert "asks for    4 points x 1 node x 8 GPUs x 12:00 h = 384 GPU-hours a start" in out
    home, points = RunDir(place / "runs" / "s"), [RunDir(place / "runs" / f"s-0{i}") for i in range(4)]
    assert "#SBATCH --array=0-3%3" in home.submit.read_text()
    assert [config.load(run.config).optim.lr for run in points] == [1e-4, 1e-4, 3e-4, 3e-4]
    assert {config.load(run.config).tracking.group for run in points} == {"s"}, "one group of W&B"
    assert [(run.path / "slurm_job").read_text() for run in points] == [f"4711_{i}\n" for i in range(4)]
    assert (points[0].code / "launch" / "job.py").samefile(home.code / "launch" / "job.py"), "stored once"
    for number in (0, 2):
        done = {"attempt": 0, "state": "done", "step": 9, "total_steps": 9, "summary": {"top1": number / 10}}
        rundir.publish_json(points[number].attempt(0).train, done)
    slurm("squeue", "true")
    slurm("sbatch", "echo 4712")
    code, out, err = in_process(capsys, "--resume", "s", "tracking.log_every=7")
    assert code == 0, err
    assert "#SBATCH --array=1,3%2" in home.submit.read_text()
    assert f"{points[0].path} is done" in err
    assert (points[1].path / "slurm_job").read_text() == "4712_1\n"
    assert config.load(points[3].config).tracking.log_every == 7
    code, _, err = in_process(capsys, *arguments[:-1], "optim.layer_decay=0.65,0.7")
    assert code == 2
    assert "is a sweep of other points: choose another --name" in err
    code, _, err = in_process(capsys, *arguments[:4])
    assert code == 2
    assert "is a sweep: --resume s goes on with it" in err


def test_a_sweep_that_slurm_refuses_leaves_nothing(slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm("sbatch", '[ "$1" = --test-only ] || { echo "QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }')
    before = tree(place)
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "s", *LISTS)
    assert code == 2
    assert "SLURM refused the job: QOSMaxSubmitJobPerUserLimit" in err
    assert tree(place) == before


def test_without_slurm_the_points_run_one_after_another(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_submit.main(["--config", "tiny.yaml", "--name", "s", *LISTS[:2]], launcher="standin")
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "point 2 of 2, s-01: optim.lr=3e-4" in err
    table = out[out.index("run   optim.lr") :].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["s-00", "s-01"]
    assert [line.split()[-1] for line in table[1:]] == ["done", "done"]


# ---- runs after runs ---------------------------------------------------------------------------------


def test_a_run_is_resumed_by_its_name_with_its_settings_and_place(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.yaml").write_text(PROFILE)
    first = ["--config", "tiny.yaml", "--cluster", "mine.yaml", "--name", "x", "--nodes", "4", "optim.lr=3e-4"]
    assert in_process(capsys, *first)[0] == 0
    slurm("squeue", "true")
    (place / "mine.yaml").unlink()
    (place / "tiny.yaml").unlink()
    run = RunDir(place / "runs" / "x")
    for arguments in (["x"], [str(run.path)], ["runs/x"]):
        code, script, err = in_process(capsys, "--resume", *arguments, "--dry-run")
        assert (code, script) == (0, run.submit.read_text()), err
    code, out, err = in_process(capsys, "--resume", "x", "--nodes", "2", "--time", "1:00:00", "train.epochs=5")
    assert code == 0, err
    assert "job 4711: 2 nodes with 8 ranks each, partition gpu, 60 minutes a start" in out
    assert (config.load(run.config).optim.lr, config.load(run.config).train.epochs) == (3e-4, 5)
    for arguments, said in (
        (["--resume", "xy"], f"--resume xy: no such run in {place}/runs; did you mean x?"),
        (["--resume", "x", "--config", "a.yaml"], "--resume x: brings its own config; leave --config out"),
        (["--resume", "x", "--name", "z"], "--resume x: brings its own name; leave --name out"),
        (["--resume", "x", *LISTS], "--resume x: brings its own sweep; leave --sweep out"),
    ):
        code, _, err = in_process(capsys, *arguments)
        assert code == 2
        assert f"error: {said}" in err


def test_a_resume_that_sbatch_refuses_leaves_the_place_as_it_was(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.yaml").write_text(PROFILE)
    first = ["--config", "tiny.yaml", "--cluster", "mine.yaml", "--name", "x", "--nodes", "4"]
    assert in_process(capsys, *first)[0] == 0
    run = RunDir(place / "runs" / "x")
    before = [path.read_bytes() for path in (run.cluster, run.submit, run.config)]
    slurm("squeue", "true")
    slurm("sbatch", '[ "$1" = --parsable ] || exit 0; echo "Job violates accounting policy" >&2; exit 1')
    code, _, err = in_process(capsys, "--resume", "x", "--nodes", "2", "train.epochs=5")
    assert code != 0
    assert "accounting policy" in err
    assert [path.read_bytes() for path in (run.cluster, run.submit, run.config)] == before


@pytest.mark.parametrize(
    ("file", "name"), [("my recipe.yaml", "my-recipe"), ("münch.yaml", "m-nch"), ("--.yaml", "run")]
)
def test_a_recipe_may_be_called_anything(place: Path, capsys: pytest.CaptureFixture[str], file: str, name: str) -> None:
    (place / file).write_text((place / "tiny.yaml").read_text())
    code, out, err = in_process(capsys, f"--config={file}", "--dry-run", "--cluster", "local")
    assert code == 0, err
    assert re.search(rf"runs/{name}-\d{{8}}-\d{{6}}", out)


def test_a_run_in_a_folder_that_slurm_would_expand_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = place / "p%j" / "ok"
    odd.mkdir(parents=True)
    (odd / "config.yaml").write_text((place / "tiny.yaml").read_text())
    code, _, err = in_process(capsys, "--resume", str(odd), "--dry-run")
    assert code == 2
    assert "SLURM cannot write logs to a path with %" in err


def test_after_waits_for_a_job_that_may_still_be_done(
    slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "tiny.yaml", "--name"]
    assert in_process(capsys, *arguments, "first")[0] == 0
    slurm("squeue", "echo '4711|RUNNING|None|node1|N/A'")
    slurm("sbatch", "echo 4712")
    for after in ("first", "4711"):
        code, out, err = in_process(capsys, *arguments, f"after-{after}", "--after", after)
        assert code == 0, err
        assert "starts      after job 4711" in out
        script = RunDir(place / "runs" / f"after-{after}").submit.read_text()
        assert "#SBATCH --dependency=afterok:4711\n" in script
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    slurm("squeue", "exit 1")  # silent, which is not gone
    code, _, err = in_process(capsys, *arguments, "silent", "--after", "4711")
    assert code == 0, err
    slurm("squeue", "echo '4711|FAILED|NonZeroExitCode|node1|N/A'")
    for after, said in (("4711", "job 4711 has ended: FAILED"), ("none", "no such run"), ("4713", "knows no job 4713")):
        code, _, err = in_process(capsys, *arguments, "third", "--after", after)
        assert code == 2
        assert f"error: --after {after}: " in err
        assert said in err
    slurm("squeue", "echo '4711|COMPLETED|None|node1|N/A'")
    code, _, err = in_process(capsys, *arguments, "third", "--after", "4711")
    assert code == 0
    assert "--after 4711: is done already" in err
    assert "dependency" not in RunDir(place / "runs" / "third").submit.read_text()
    code, _, err = in_process(capsys, *arguments, "x", "--after", "4711", "--cluster", "local")
    assert code == 2
    assert "--after: needs a job that SLURM queues" in err


@pytest.mark.parametrize(("answer", "sent"), [("y", True), ("", False), ("no", False)])
def test_a_person_is_asked_for_what_is_dear(
    answer: str,
    sent: bool,
    slurm: Put,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{answer}\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    dear = ["--config", "tiny.yaml", "--name", "x", "--nodes", "4", "--time", "2-00:00:00"]
    code, _, err = in_process(capsys, *dear)
    assert "this asks for up to 1,536 GPU-hours a start. Go on? [y/N]" in err
    assert code == (0 if sent else 2)
    assert (place / "runs").exists() == sent
    if not sent:
        code, _, err = in_process(capsys, *dear, "--yes")
        assert code == 0
        assert "Go on?" not in err


def test_scripts_are_never_asked(slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x", "--nodes", "4", "--time", "2-00:00:00")
    assert code == 0
    assert "Go on?" not in err
    assert "1,536 GPU-hours" in out


def test_what_slurm_says_of_the_start(slurm: Put, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soon = f"{datetime.now() + timedelta(hours=2, minutes=5, seconds=20):%Y-%m-%dT%H:%M:%S}"
    said = f"sbatch: Job 1 to start at {soon} using 96 processors on nodes gpu[1-4] in partition gpu"
    slurm("sbatch", f'[ "$1" = --test-only ] && echo "{said}" >&2 || echo 4711')
    arguments = ["--config", "tiny.yaml", "--name", "x", "--nodes", "4"]
    before = tree(place)
    code, out, _ = in_process(capsys, *arguments, "--test-only")
    assert code == 0
    assert f"starts      about {soon.replace('T', ' ')[:16]}, in 2:05 h, as it looks now on gpu[1-4]" in out
    assert tree(place) == before
    slurm("sbatch", "exec /bin/sleep 60")
    launch_submit.PATIENCE_S, before_s = 0.3, launch_submit.PATIENCE_S
    try:
        code, out, _ = in_process(capsys, *arguments, "--test-only")
    finally:
        launch_submit.PATIENCE_S = before_s
    assert code == 1
    assert "starts      not known: SLURM does not answer" in out
    code, _, err = in_process(capsys, *arguments, "--test-only", "--cluster", "local")
    assert code == 2
    assert "--test-only: asks SLURM about a job" in err


def finished(place: Path, state: str) -> RunDir:
    """A run of the recipe whose first attempt ended so."""
    run = RunDir(place / "runs" / "x")
    settings = config.with_absolute_paths(config.load("tiny.yaml"))
    rundir.publish(run.config, config.to_yaml(settings))
    rundir.publish_json(run.attempt(0).train, {"attempt": 0, "state": state, "step": 7, "total_steps": 9})
    return run


def test_C10_what_a_run_cannot_go_on_with_is_another_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(place, "stopped")
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x", "optim.lr=0.5", "train.seed=3")
    assert code == 2
    assert "cannot go on with other settings of these; use what it began with, or another --name" in err
    assert "train.seed: 0 -> 3" in err
    assert "optim.lr" not in err


def test_C10_a_changed_setting_is_told_with_its_rule(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(place, "stopped")
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x", "optim.lr=0.5")
    assert code == 0, err
    assert "setting changed: optim.lr: 0.001 -> 0.5: from here on; what was trained stays" in err
    assert config.load(run.config).optim.lr == 0.5


def test_a_done_run_goes_on_when_it_is_made_longer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(place, "done")
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x", "train.steps=99", "train.epochs=null")
    assert code == 0, err
    assert "continues at attempt 1" in err


def test_S8_a_done_run_points_at_its_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(place, "done")
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x")
    assert code == 0
    assert f"is done; its report is {run.report}" in err


def test_L3_a_run_that_is_being_trained_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rundir.only_writer(finished(place, "running")):
        code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x")
    assert code == 2
    assert "is being trained by another process" in err


def test_L3_a_folder_that_is_no_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "x").mkdir(parents=True)
    code, _, err = in_process(capsys, "--config", "tiny.yaml", "--name", "x")
    assert code == 2
    assert "exists and is no run folder: choose another --name, or remove it" in err


# ---- the whole chain on this machine, with the stand-in ----------------------------------------------


def test_a_local_run_ends_with_a_table(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = launch_submit.main(["--config", "tiny.yaml", "--nodes", "2", "--name", "x"], launcher="standin")
    out, err = capfd.readouterr()
    assert code == 0, err
    for shown in ("top-1", "96.00 %", "0.950", "1,234", "0:01:01"):
        assert shown in out
    assert "x: 8/8  loss 0.1250  done" in out
    run = RunDir(place / "runs" / "x")
    assert rundir.read_json(run.attempt(0).job)["state"] == "done"  # type: ignore[index]
    # The trainers ran the run's own copy of the code.
    assert str(run.code) in run.attempt(0).rank_log(1, 1).read_text()


def test_a_local_failure_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STANDIN", json.dumps({"refuse": "shards without pictures"}))
    code = launch_submit.main(["--config", "tiny.yaml", "--name", "x"], launcher="standin")
    assert code == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: ValueError: shards without pictures (rank 0, step 0)"


def test_ctrl_c_saves_and_the_same_command_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C of a terminal: SIGINT to every process of its group."""
    code = "import sys; from launch import submit; sys.exit(submit.main(sys.argv[1:], launcher='standin'))"
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        "STANDIN": json.dumps({"until_asked": True}),
    }
    arguments = ["--config", "tiny.yaml", "--nodes", "2", "--name", "x"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run in the background of a script inherits that SIGINT is ignored, which no terminal does.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    run = RunDir(place / "runs" / "x")
    deadline = time.monotonic() + 20
    while (rundir.read_json(run.attempt(0).train) or {}).get("step", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "stopping: the run saves a checkpoint first" in said
    assert re.search(
        r"stopped at step \d+ of 8, checkpoint saved; the same command with --name x goes on from there", said
    )
    reached = rundir.read_json(run.attempt(0).train)["step"]  # type: ignore[index]
    monkeypatch.setenv("STANDIN", json.dumps({"steps": reached + 2}))
    assert launch_submit.main(arguments, launcher="standin") == 0
    assert "continues at attempt 1" in capfd.readouterr().err
    assert rundir.read_json(run.attempt(1).train)["resumed_from"] == reached  # type: ignore[index]


def test_following_slurm_tells_the_end(slurm: Put, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """sbatch runs the script's command on the spot, as a cluster of one idle node would."""
    slurm("srun", 'while [[ "$1" == --* ]]; do [[ "$1" == --output ]] && shift; shift; done; exec "$@"')
    node = "SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_JOB_NODELIST=localhost"
    run_it = f"SLURM_JOB_ID=4711 {node} bash $2 > {place}/job.out 2>&1 &"
    slurm("sbatch", f'[ "$1" = --parsable ] && {{ {run_it} }}\necho 4711')
    slurm("squeue", "echo 'RUNNING|None'")
    (place / "mine.yaml").write_text("{gpus_per_node: 0, cpus_per_task: 1}")
    arguments = ["--config", "tiny.yaml", "--cluster", "mine.yaml", "--name", "x", "--follow"]
    code = launch_submit.main(arguments, launcher="standin")
    out, err = capfd.readouterr()
    assert code == 0, err + (place / "job.out").read_text()
    assert "96.00 %" in out
    assert rundir.read_json(RunDir(place / "runs" / "x").attempt(0).job)["scheduler"] == "slurm"  # type: ignore[index]
    assert SUBMIT.exists()


def test_L4_a_full_disk_is_one_line_and_leaves_nothing(
    place: Path, slurm: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "a", None, "runs/x/code/a")

    monkeypatch.setattr(snapshot, "take", full)
    assert launch_submit.main(["--config", "tiny.yaml", "--name", "x"]) == 2
    assert "runs/x/code/a: No space left on device; nothing was submitted" in capsys.readouterr().err
    assert not (place / "runs").exists()
