"""Shards and settings that several tests share, made once a session, read-only; a dated record of what was run."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import results
from tests import fake_wandb
from vitdist.data.pack import pack, write_digits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="NAME", help="publish the outcome as benchmarks/results/DATE-NAME.json")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With `--record`: how many tests of each file passed, failed and were skipped, and how long they took."""
    if not config.getoption("--record"):
        return
    files: dict[str, dict[str, float]] = {}
    not_passed: dict[str, str] = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            told = files.setdefault(report.nodeid.partition("::")[0], {})
            told[outcome] = told.get(outcome, 0) + 1
            if outcome != "passed":
                not_passed[report.nodeid] = outcome
    for report in (report for group in terminalreporter.stats.values() for report in group):
        if isinstance(report, pytest.TestReport):  # setup, call and teardown
            told = files[report.nodeid.partition("::")[0]]
            told["seconds"] = round(told.get("seconds", 0) + report.duration, 1)
    names = dict.fromkeys(name for told in files.values() for name in told)
    total = {name: round(sum(told.get(name, 0) for told in files.values()), 1) for name in names}
    results.publish(config.getoption("--record"), {"total": total, "not_passed": not_passed, "files": files})


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed shards of 60 + 21 small pictures of 3 classes that differ in colour."""
    folder = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 7)):
        for label, name in enumerate(("blue", "green", "red")):
            for number in range(count):
                pixels = generator.integers(0, 128, (20, 24, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 100
                path = folder / "pictures" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    pack(folder / "pictures", folder / "shards", workers=1, progress=False)
    return folder / "shards"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scikit-learn's digits: pictures/ and indexed shards/."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "pictures")
    pack(folder / "pictures", folder / "shards", workers=1, progress=False)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, squares: Path) -> Path:
    """A configuration file for `squares`: a tiny ViT, 12 steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
data: {{train: {squares}/train, val: {squares}/val, crop_scale: [0.7, 1.0], flip: 0.5}}
model: {{image_size: 16, scratch: {{patch_size: 8, width: 32, depth: 2, heads: 2}}}}
train: {{global_batch: 12, steps: 12}}
optim: {{lr: 3.0e-3}}
engine: {{threads: 1}}
evaluation: {{every_epochs: 1}}
tracking: {{log_every: 1, wandb: off}}
""")
    return path


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No key, no settings of the person at the machine, and waits that suit a test."""
    from vitdist import mirror

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, seconds in {"START_S": 1.5, "FINISH_S": 1.0, "GRACE_S": 20.0}.items():
        monkeypatch.setattr(mirror, name, seconds)
    return monkeypatch


@pytest.fixture
def server(wandb_home: pytest.MonkeyPatch) -> Iterator[fake_wandb.Server]:
    """A stand-in for W&B's server, with a key for it."""
    with fake_wandb.Server() as made:
        wandb_home.setenv("WANDB_BASE_URL", made.url)
        wandb_home.setenv("WANDB_API_KEY", "k" * 40)
        yield made
