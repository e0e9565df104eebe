"""Settings, a place and a fake SLURM for the launcher's tests; nothing here imports torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "launch" / "submit.py"

RECIPE = """\
data: {train: shards/train, val: shards/val}
model: {image_size: 32, scratch: {patch_size: 8, width: 64, depth: 4, heads: 4}}
train: {global_batch: 64, epochs: 2}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and (what a look at the folder takes for) indexed shards; no SLURM, no GPU."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    for split in ("train", "val"):
        folder = tmp_path / "shards" / split
        folder.mkdir(parents=True)
        (folder / "000.tar").write_bytes(bytes(10_240))
        shards = [{"name": "000.tar", "bytes": 10_240}]
        (folder / "index.json").write_text(json.dumps({"samples": 100, "classes": ["cat", "dog"], "shards": shards}))
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    # git, which snapshots ask, but no sbatch
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{_only(tmp_path, 'git')}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def _only(folder: Path, *names: str) -> Path:
    """A folder with links to a few system commands."""
    kept = folder / "kept"
    kept.mkdir()
    for name in (*names, "bash", "sh", "env"):
        for found in (Path("/usr/bin"), Path("/bin"), Path("/usr/local/bin")):
            if (found / name).exists() and not (kept / name).exists():
                (kept / name).symlink_to(found / name)
    return kept


@pytest.fixture
def command(place: Path) -> Callable[[str, str], None]:
    """Put a shell script under a command's name first in PATH."""

    def put(name: str, script: str) -> None:
        path = place / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    return put


@pytest.fixture
def slurm(command: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """A SLURM with one partition of 4 nodes, 8 GPUs and 96 cores each; returns `command`, to change it."""
    command("sinfo", "echo 'gpu*|4|96|gpu:h200:8(S:0-1)|2-00:00:00'")
    command("sbatch", "echo 4711")
    command("squeue", "echo 'PENDING|Resources'")
    for name in ("srun", "scontrol"):
        command(name, "exit 0")
    return command


def submit(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, str(SUBMIT), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
