"""Preflight: what each check finds, what it leaves alone, and that all of it is quick."""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch import disks, hub, preflight
from launch.cluster import Cluster
from launch.disks import Mount, Room
from launch.preflight import Case
from launch.slurm import Nodes, Slurm
from vitdist import config, rundir
from vitdist.config import SettingsError
from vitdist.rundir import RunDir

Put = Callable[[str, str], None]


def profile(**raw: object) -> Cluster:
    return config.parse(Cluster, {"gpus_per_node": 8, "cpus_per_task": 96, **raw}, "mine.yaml")


@pytest.fixture
def case(place: Path) -> Case:
    """A start of the tiny recipe on two nodes with 8 GPUs, in a shell without habits."""
    (place / "home").mkdir()
    settings = config.with_absolute_paths(config.load("tiny.yaml"))
    env = {"HOME": str(place / "home"), "PATH": os.environ["PATH"]}
    return Case(settings, RunDir(place / "runs" / "x"), 2, 8, env=env)


def changed(case: Case, *overrides: str) -> Case:
    raw = config.override(config.to_plain(case.settings), overrides)
    return replace(case, settings=config.with_absolute_paths(config.parse(config.Config, raw, "tiny.yaml")))


def said(case: Case, *only: str) -> list[str]:
    """The findings of these checks."""
    return [str(f) for f in preflight.check(case, [name for name in preflight.CHECKS if name not in only])]


# ---- names -----------------------------------------------------------------------------------------


def test_checks_have_names_that_can_be_left_out(case: Case, place: Path) -> None:
    (place / "shards" / "val" / "index.json").unlink()
    assert any("has no index" in text or "have no index" in text for text in said(case, "shards"))
    assert said(case, "shards")[0].endswith(" [shards]")
    assert not any(finding.check == "shards" for finding in preflight.check(case, preflight.skipped(["shards,space"])))
    with pytest.raises(SettingsError, match=r"--skip spase: no such check; did you mean space\?"):
        preflight.skipped(["shards", "spase"])
    with pytest.raises(SettingsError, match="there are: shards, classes, weights"):
        preflight.skipped(["everything"])
    assert preflight.skipped(["shards, time", "space"]) == {"shards", "time", "space"}
    assert all(
        line.split()[0] in preflight.CHECKS and len(line.split()) > 3 for line in preflight.describe().splitlines()
    )


def test_a_file_system_that_is_away_is_one_warning(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> Room:
        raise OSError(116, "Stale file handle", "/scratch")

    monkeypatch.setattr(disks, "free", away)
    assert said(case, "space") == ["warning: could not be looked at: /scratch Stale file handle [space]"]


def test_all_checks_together_take_less_than_two_seconds(case: Case, slurm: Put) -> None:
    there = Slurm({"gpu": [Nodes(4, 96, 8, None, ("h200",))]}, "gpu")
    began = time.process_time()
    preflight.check(replace(case, cluster=profile(), slurm=there, script="#!/bin/bash\n"))
    assert time.process_time() - began < 2


# ---- memory ----------------------------------------------------------------------------------------

VIT_L = "model.scratch={patch_size: 16, width: 1024, depth: 24, heads: 16}"


@pytest.mark.parametrize(
    ("raw", "micro", "level"),
    [
        ({"gpu_memory_gb": 80}, 64, ""),
        ({"gpu_memory_gb": 16}, 512, "error"),
        ({"gpu_type": "h200"}, 64, ""),
        ({"gpu_type": "nvidia_a100-sxm4-80gb"}, 64, ""),
        ({"gpu_type": "tesla_t4"}, 512, "error"),
        ({"gpu_type": "a100"}, 512, "warning"),  # sold with 40 and with 80 GB
        ({"gpu_type": "unheard_of"}, 512, ""),
        ({"gpus_per_node": 0}, 512, ""),
    ],
)
def test_R1_the_plan_is_held_against_the_gpu(case: Case, raw: dict[str, object], micro: int, level: str) -> None:
    large = changed(case, VIT_L, "model.image_size=224", f"train.global_batch={micro * 16}", "engine.zero=1")
    if level == "warning":  # between the two memories
        from vitdist import memory

        peak = memory.estimate(large.settings, 2, 16).peak / memory.GB
        fitting = next(m for m in range(512, 8, -8) if memory.fits(memory.estimate(
            changed(large, f"train.global_batch={m * 16}").settings, 2, 16), 80))  # fmt: skip
        assert peak > 80
        large = changed(large, f"train.global_batch={fitting * 16}")
    found = said(replace(large, cluster=profile(**raw)), "memory")
    assert len(found) == bool(level)
    if level:
        assert found[0].startswith(f"{level}: a rank needs about ")
        assert "GB at micro_batch" in found[0]
    if level == "error":
        assert re.search(r"; try: train\.\S+", found[0]), found


# ---- places ----------------------------------------------------------------------------------------

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
mds1@tcp:/scratch /scratch lustre rw 0 0
nas:/home /home nfs4 rw 0 0
/dev/nvme0n1 /home/me/my\\040disk xfs rw 0 0
odd /odd fuse.something rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/scratch/me/runs", "lustre", True),
        ("/scratching/me", "ext4", False),
        ("/home/me/my disk/runs", "xfs", False),
        ("/home/me/other", "nfs4", True),
        ("/odd/x", "fuse.something", None),
    ],
)
def test_the_mount_of_a_path(path: str, kind: str, shared: bool | None) -> None:
    found = disks.mount_of(Path(path), disks.read_mounts(MOUNTS))
    assert found
    assert (found.kind, found.shared) == (kind, shared)


def test_L4_disks_that_other_nodes_do_not_see_are_told(
    case: Case, slurm: Put, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(case, cluster=profile())
    slurm("sinfo", "printf '10.0.0.1\\n10.0.0.2\\n'")
    monkeypatch.setattr(disks, "mounts", lambda: [Mount("/", "ext4", "/dev/sda1")])
    (text,) = said(here, "folder")
    assert text.startswith(f"warning: the run folder ({case.run.path}), data.train ({place}/shards/train), data.val (")
    assert "lie on ext4 at /, a disk of this machine, which other nodes may not see" in text
    monkeypatch.setattr(
        disks, "mounts", lambda: [Mount("/", "lustre", "mds"), Mount(str(place / "runs"), "tmpfs", "t")]
    )
    (text,) = said(here, "folder")
    assert f"the run folder ({case.run.path}) lies on tmpfs at {place}/runs, memory of this machine" in text
    monkeypatch.setattr(disks, "mounts", lambda: [Mount("/", "lustre", "mds")])
    assert said(here, "folder") == []
    # A cluster that is this machine, and no cluster at all.
    monkeypatch.setattr(disks, "mounts", lambda: [Mount("/", "ext4", "/dev/sda1")])
    slurm("sinfo", "echo 127.0.0.1")
    assert said(here, "folder") == []
    assert said(case, "folder") == []


def test_R7_room_for_the_checkpoints_is_looked_at(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    large = changed(case, VIT_L, "model.image_size=224", "train.global_batch=1024")
    monkeypatch.setattr(disks, "quotas", lambda *_: [])
    for gb, level in ((100, ""), (12, "warning: "), (2, "error: ")):
        monkeypatch.setattr(disks, "free", lambda _, gb=gb: Room(gb * 10**9, 10**9))
        found = said(large, "space")
        assert len(found) == bool(level)
        if level:  # 304 million parameters with AdamW: 12 bytes each
            what = rf"has {gb}\.0 GB, where 4 checkpoints of 3\.6 GB \(by its parameters\) and logs take 15\.6 GB"
            assert re.match(f"{level}.* {what}", found[0]), found
    monkeypatch.setattr(disks, "free", lambda _: Room(10**12, 100))
    assert re.search(r"has room for 100 more files, and about [\d,]+ are needed", said(large, "space")[0])
    # Quotas count as the disk does, for all points of a sweep together.
    monkeypatch.setattr(disks, "free", lambda _: Room(10**12, None))
    monkeypatch.setattr(disks, "quotas", lambda *_: [Room(20 * 10**9, None)])
    assert said(large, "space") == []
    assert "your quota leaves 20.0 GB" in said(replace(large, points=4), "space")[0]
    assert said(replace(large, points=4, dry=True), "space") == []


QUOTA = """\
Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
nas:/home  8921344  10000000 11000000  0   81231   0   100000  0
nas:/a-name-that-is-so-long-that-it-stands-alone
            500*  400  500  1732460000  7  0  0  0
"""
LUSTRE = "     /scratch [1000]*  1000 0  6d23h  8123  0  9000       -\n"


def test_quotas_are_read() -> None:
    assert disks.read_quotas(QUOTA) == [
        ("nas:/home", Room((11_000_000 - 8_921_344) * 1024, 100_000 - 81_231)),
        ("nas:/a-name-that-is-so-long-that-it-stands-alone", Room(0, None)),
    ]
    assert disks.read_quotas(LUSTRE) == [("/scratch", Room(0, 9000 - 8123))]
    assert disks.read_quotas("quota: no such thing\n") == []


def test_quota_commands_are_asked_for_the_mount(command: Put) -> None:
    command("quota", f"/bin/cat <<'END'\n{QUOTA}END\nexit 1")
    command("lfs", f'[ "$5" = /scratch ] && echo "{LUSTRE}"')
    (home,) = disks.quotas(Mount("/home", "nfs4", "nas:/home"), "me", 5)
    assert home.files == 18_769
    assert disks.quotas(Mount("/scratch", "lustre", "mds:/scratch"), "me", 5) == [Room(0, 877)]
    command("quota", "exec /bin/sleep 60")
    assert disks.quotas(Mount("/home", "nfs4", "nas:/home"), "me", 0.2) == []


def test_S9_the_warning_leaves_time_to_save(case: Case) -> None:
    large = replace(changed(case, VIT_L, "model.image_size=224", "train.global_batch=1024"), cluster=profile())
    assert said(large, "time") == []
    huge = changed(large, "model.scratch={patch_size: 14, width: 1280, depth: 32, heads: 16}")
    (text,) = said(replace(huge, cluster=profile(signal_delay_s=30)), "time")
    assert text.startswith("warning: signal_delay_s 30: a checkpoint may take (at 0.5 GB/s, assumed) 15 s"), text
    attempt = case.run.attempt(0)
    for seconds, level in ((20.0, ""), (90.0, "warning"), (200.0, "error")):
        rundir.publish_json(attempt.train, {"saved": {"seconds": seconds, "bytes": 10**9, "blocked_s": 1.0}})
        found = said(large, "time")
        assert len(found) == bool(level)
        if level:
            assert found[0].startswith(f"{level}: signal_delay_s 120: a checkpoint took {seconds:.0f} s"), found
    assert "set it to 330 in the profile" in found[0]
    assert said(replace(large, cluster=None), "time") == []


# ---- weights ---------------------------------------------------------------------------------------


def checkpoint(folder: Path, **about: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **about}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("labels", "rule", "text"),
    [
        ({"0": "cat", "1": "dog"}, "keep", ""),
        ({"0": "a", "1": "b", "2": "c"}, "keep", "error: model.head=keep: .* has a head of 3 classes, where one of 2"),
        ({"0": "dog", "1": "cat"}, "auto", ""),
        ({"0": "cat", "1": "dogs"}, "auto", ""),  # half of them: other data
        ({"0": "cat", "1": "dog", "2": "cow"}, "auto", "warning: the head of .* begins anew: .* differ in cow"),
        ({"0": "LABEL_0", "1": "LABEL_1"}, "auto", ""),
        ({"0": "a", "1": "b", "2": "c"}, "new", ""),
    ],
)
def test_D6_a_kept_head_has_the_classes_of_the_data(
    case: Case, place: Path, labels: dict[str, str], rule: str, text: str
) -> None:
    folder = checkpoint(place / "vit", id2label=labels)
    tuned = changed(case, "model.scratch=null", f"model.pretrained={folder}", f"model.head={rule}")
    found = said(tuned, "classes")
    assert len(found) == bool(text)
    assert not text or re.match(text, found[0]), found


def test_D6_a_checkpoint_without_a_head_cannot_keep_it(case: Case, place: Path) -> None:
    folder = checkpoint(place / "vit", architectures=["ViTModel"])
    tuned = changed(case, "model.scratch=null", f"model.pretrained={folder}", "model.head=keep")
    assert "has no head, where one of 2 is needed" in said(tuned, "classes")[0]


def test_L4_places_of_weights_that_are_not_there(case: Case) -> None:
    for override, text in (
        ("model.pretrained=vit.pth", "vit.pth: no such file or folder"),
        ("model.pretrained=./vit", "/vit: no such file or folder"),
        ("model.pretrained='a name'", "neither a folder here nor a name of Hugging Face"),
        ("model.warm_start=runs/none", "runs/none: no such run or checkpoint"),
    ):
        parts = ["model.scratch=null"] if "pretrained" in override else []
        assert any(text in found for found in said(changed(case, *parts, override), "weights")), override


FILES = {
    "config.json": json.dumps({"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}}).encode(),
    "preprocessor_config.json": b"{}",
    "model.safetensors": b"w" * 1000,
    "pytorch_model.bin": b"w" * 2000,
    "README.md": b"read me",
}


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A hub with one model, org/vit; its address, and what it was asked for."""
    asked: list[str] = []
    commit = "1" * 40

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            asked.append(f"{self.command} {self.path}")

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            name = path.rsplit("/", 1)[1]
            headers, code = {}, 200
            if path.startswith("/api/models/org/vit/tree"):
                data = json.dumps([
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in FILES.items()
                ]).encode()  # fmt: skip
            elif path.startswith("/api/models/org/vit"):
                siblings = [{"rfilename": n, "size": len(b)} for n, b in FILES.items()]
                data = json.dumps({"id": "org/vit", "sha": commit, "siblings": siblings}).encode()
            elif path.startswith("/org/vit/resolve/") and name in FILES:
                data = FILES[name]
                headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            else:
                data, code, headers = b"{}", 404, {"X-Error-Code": "RepoNotFound"}
            self.send_response(code)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", asked
        finally:
            running.shutdown()
            thread.join()


def test_weights_of_the_hub_are_fetched_once_and_only_what_is_needed(
    case: Case, place: Path, server: tuple[str, list[str]]
) -> None:
    endpoint, asked = server
    tuned = replace(changed(case, "model.scratch=null", "model.pretrained=org/vit"), cluster=profile())
    cache = place / "home" / ".cache" / "huggingface" / "hub"
    assert said(tuned, "weights") == [f"org/vit is not in {cache}: it is fetched before the job is queued"]
    told: list[str] = []
    assert preflight.fetch(tuned, told.append, endpoint=endpoint) == []
    assert told == [f"fetching org/vit into {cache}: 0.00 GB, once for all runs"]
    snapshot = hub.cached("org/vit", cache)
    assert snapshot
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    number = len(asked)
    assert preflight.fetch(tuned, told.append, endpoint=endpoint) == []
    assert (len(asked), len(told)) == (number, 1)
    assert said(tuned, "weights") == []
    # Its configuration is known now, so that its head is looked at; half a snapshot is none.
    keep = changed(tuned, "model.head=keep")
    assert said(keep, "classes") == []
    (place / "shards/train/index.json").write_text(json.dumps({"samples": 9, "classes": ["a", "b", "c"]}))
    (place / "shards/val/index.json").write_text(json.dumps({"samples": 9, "classes": ["a", "b", "c"]}))
    assert "has a head of 2 classes, where one of 3" in said(keep, "classes")[0]
    (snapshot / "model.safetensors").resolve().unlink()
    assert hub.cached("org/vit", cache) is None


def test_a_hub_out_of_reach_is_refused_with_the_way_out(
    case: Case, place: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = replace(changed(case, "model.scratch=null", "model.pretrained=org/other"), cluster=profile())
    (finding,) = preflight.fetch(tuned, print, endpoint=server[0])
    assert finding.level == "refuse"
    assert "model.pretrained: org/other cannot be fetched from here (there is no such model" in finding.text
    (finding,) = preflight.fetch(tuned, print, endpoint="http://127.0.0.1:9")
    home = place / "home" / ".cache" / "huggingface"
    assert finding.text.endswith(f"HF_HOME={home} hf download org/other; or copy the model's folder and give its path")
    assert preflight.fetch(tuned, print, skip=["weights"], endpoint="http://127.0.0.1:9") == []
    monkeypatch.setattr(disks, "free", lambda _: Room(0, None))
    (finding,) = preflight.fetch(changed(tuned, "model.pretrained=org/vit"), print, endpoint=server[0])
    assert "has 0.00 GB, and it takes 0.00 GB" in finding.text
    assert preflight.fetch(replace(tuned, cluster=None), print, endpoint="http://127.0.0.1:9") == []
    offline = replace(tuned, env={**tuned.env, "HF_HUB_OFFLINE": "1"})
    (text,) = said(offline, "weights")
    assert text.startswith("error: model.pretrained: org/other is not in ")
    assert "HF_HUB_OFFLINE forbids to fetch it" in text


@pytest.mark.parametrize(
    ("env", "raw", "folder"),
    [
        ({}, {}, "/home/me/.cache/huggingface/hub"),
        ({"HF_HOME": "/a"}, {}, "/a/hub"),
        ({"HF_HOME": "/a", "HF_HUB_CACHE": "/b"}, {}, "/b"),
        ({"HF_HOME": "/a"}, {"hf_home": "/c"}, "/c/hub"),
        ({"SCRATCH": "/s"}, {"hf_home": "$SCRATCH/hf"}, "/s/hf/hub"),
        ({}, {"hf_home": "$SCRATCH/hf"}, None),
        ({}, {"hf_home": "~/hf"}, "/home/me/hf/hub"),
        ({"HF_HOME": "/a", "XDG_CACHE_HOME": "/x"}, {"export": "none"}, "/home/me/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, {}, "/x/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_job_will_look(env: dict[str, str], raw: dict[str, object], folder: str | None) -> None:
    found = hub.cache_folder(profile(**raw), {"HOME": "/home/me", **env})
    assert found == (Path(folder) if folder else None)


def test_what_is_needed_of_a_repository() -> None:
    assert hub.needed(["a.md", "config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = ["config.json", "model.safetensors.index.json", *parts, "pytorch_model.bin", "onnx/model.onnx"]
    assert hub.needed(names) == ["config.json", "model.safetensors.index.json", *parts]


# ---- the cluster -----------------------------------------------------------------------------------

MIXED = Slurm({"gpu": [Nodes(2, 96, 8, 600, ("a100",)), Nodes(4, 96, 8, 600, ("h100",)), Nodes(1, 32, 0, 600)]}, "gpu")


@pytest.mark.parametrize(
    ("raw", "nodes", "text"),
    [
        ({"time": "4:00:00"}, 2, "partition gpu has nodes with a100 and with h100, and a job may get both"),
        ({"time": "4:00:00"}, 1, ""),
        ({"time": "4:00:00", "gpu_type": "h100"}, 4, ""),
        ({"time": "4:00:00", "gpu_type": "h100"}, 5, "--nodes 5: partition gpu has 4 nodes with 8 h100 GPUs"),
        ({"time": "4:00:00", "gpu_type": "h10"}, 1, "has none of that type; did you mean h100?"),
        ({"time": "4:00:00", "constraint": "ib"}, 2, ""),
        ({"time": "12:00:00", "gpu_type": "h100"}, 1, "partition gpu allows 600 minutes; use --time 600"),
        ({"time": "4:00:00", "gpus_per_node": 4, "gpu_request": "none"}, 7, ""),
    ],
)
def test_L6_R9_nodes_are_enough_and_alike(case: Case, raw: dict[str, object], nodes: int, text: str) -> None:
    found = said(replace(case, cluster=profile(**raw), slurm=MIXED, nodes=nodes), "capacity")
    assert len(found) == bool(text), found
    assert not text or text in found[0]


def test_L2_the_script_is_tried(case: Case, slurm: Put, place: Path) -> None:
    here = replace(case, cluster=profile(), script="#!/bin/bash\n#SBATCH --account=me\n")
    slurm("sbatch", f"/bin/cat > {place}/sent; echo $1 >> {place}/sent; echo 'sbatch: Job 1 to start at now' >&2")
    assert said(here, "script") == []
    assert (place / "sent").read_text() == "#!/bin/bash\n#SBATCH --account=me\n--test-only\n"
    slurm("sbatch", "echo 'allocation failure: Invalid qos specification' >&2; exit 1")
    assert said(here, "script") == [
        "error: SLURM refuses the job: allocation failure: Invalid qos specification [script]"
    ]
    slurm("sbatch", "echo 'allocation failure: Requested nodes are busy' >&2; exit 1")
    assert said(here, "script")[0].startswith("warning: SLURM cannot say whether it takes the job: ")
    slurm("sbatch", "exec /bin/sleep 60")
    assert said(replace(here, patience_s=0.2), "script")[0].startswith("warning: SLURM cannot say")
    assert said(replace(here, script=None), "script") == []


def test_L4_what_a_container_needs_is_there(case: Case, place: Path) -> None:
    box = {"image": f"{place}/none.sif", "binds": ["/no/such/place:/data:ro"]}
    found = said(replace(case, cluster=profile(container=box, environment=f"{place}/none.sh")), "container")
    assert found == [
        f"error: environment: {place}/none.sh: no such file, or it may not be read [container]",
        f"error: container.image: {place}/none.sif: no such file [container]",
        "warning: container.binds: /no/such/place is not on this machine; the nodes must have it [container]",
    ]
    odd = replace(case, run=RunDir(place / "a,b" / "x"), cluster=profile(container={"image": "docker://x"}))
    assert "a container cannot be given a path with a comma or colon" in said(odd, "container")[0]


# ---- W&B -------------------------------------------------------------------------------------------


def test_X1_the_mode_of_wandb_is_told_and_never_the_key(case: Case, place: Path) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    assert said(case, "tracking")[0].startswith("W&B: offline, as no API key is found (`wandb login`); upload later: ")
    (finding,) = preflight.check(changed(case, "tracking.wandb=online"), set(preflight.CHECKS) - {"tracking"})
    assert (finding.level, "no API key is found" in finding.text) == ("refuse", True)
    shell = replace(case, env={**case.env, "WANDB_API_KEY": key})
    assert said(shell, "tracking") == ["W&B: online, with the key in WANDB_API_KEY"]
    hidden = replace(shell, cluster=profile(export="none"))
    assert said(hidden, "tracking")[0].startswith("W&B: offline, as no API key is found")
    netrc = place / "home" / ".netrc"
    netrc.write_text(f"machine example.org login me password x\nmachine api.wandb.ai\n  login user\n  password {key}\n")
    assert said(hidden, "tracking") == [f"W&B: online, with the key in {netrc}; without internet on the nodes, offline"]
    own = place / "home" / ".config" / "wandb" / "settings"
    own.parent.mkdir(parents=True)
    own.write_text("[default]\nbase_url = https://wandb.mine.org\n")
    assert said(case, "tracking")[0].startswith("W&B: offline")
    own.write_text(f"[default]\napi_key = {key}\n")
    assert said(case, "tracking") == [f"W&B: online, with the key in {own}"]
    assert said(changed(case, "tracking.wandb=offline"), "tracking")[0].startswith("W&B: offline, as set; upload later")
    assert said(changed(case, "tracking.wandb=off"), "tracking") == []
    everything = [*said(case, *preflight.CHECKS), *said(shell, *preflight.CHECKS), *said(hidden, *preflight.CHECKS)]
    assert not any(key in text for text in everything)
