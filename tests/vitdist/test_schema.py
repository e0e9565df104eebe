"""The table of docs/reports.md and the rows of a run name the same figures."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests import ranks, workers
from tests.vitdist.test_metrics import Event
from vitdist import ledger, metrics, rundir, system
from vitdist.data.index import Index
from vitdist.rundir import RunDir

PAGE = Path(__file__).parents[2] / "docs" / "reports.md"
PATTERNS = {"lr/<group>": r"lr/\d\d_\w+", "data/bad_<reason>": r"data/bad_(?!samples$)\w+"}
NOT_FIGURES = {"train/global_step", "attempt", "time"}


def documented() -> set[str]:
    """Keys of the first column of the schema's table."""
    schema = PAGE.read_text(encoding="utf-8").partition("## What is logged")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", schema, re.MULTILINE)
    return {key for cell in rows for key in re.findall(r"`([^`]+)`", cell)}


def named(keys: set[str]) -> set[str]:
    """`keys` as the table names them."""

    def name(key: str) -> str:
        return next((pattern for pattern, form in PATTERNS.items() if re.fullmatch(form, key)), key)

    return {name(key) for key in keys}


@pytest.fixture
def of_gpus(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a run on GPUs has beside: of the functions that make the figures."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    now = system.Now(cpu_pct=1, ram_pct=1, disk_free_gib=1, peak_gib=1, gpu=system.Gpu(1, 1, 1))
    return {
        *metrics.Meter(8, 1e9, 1, torch.device("cuda")).row(1),
        *system.figures([now]),
        *ledger.figures([ledger.Start(True, 0, 1, 1.0, 1, 1)], gpu=True),
    }


@pytest.mark.processes
def test_the_table_names_what_rows_have_and_nothing_else(
    tmp_path: Path, recipe: Path, squares: Path, of_gpus: set[str]
) -> None:
    """A run over one epoch with a broken sample, and what GPUs add."""
    shutil.copytree(squares, tmp_path / "shards")
    index = Index.open(tmp_path / "shards" / "train")
    shard, offset, size = index.span(3)
    content = bytearray(Path(index.places[shard].url).read_bytes())
    content[offset + size // 2] ^= 1
    Path(index.places[shard].url).write_bytes(content)
    how = [f"data.train={tmp_path}/shards/train", "data.max_bad=0.1", "train.steps=5"]
    (code,) = ranks.run(
        workers.train, 1, [str(recipe), "--name", "r", *how], str(tmp_path), str(tmp_path / "output"), None, None
    )
    assert code == 0, (tmp_path / "output.0").read_text()
    rows = rundir.rows(RunDir(tmp_path / "runs" / "r"))
    keys = {key for row in rows for key in row} - NOT_FIGURES
    assert named(keys | of_gpus) == documented()
    assert {"lr/00_embeddings", "data/bad_changed", "val/top1"} <= keys
    for row in rows:
        assert set(row) >= NOT_FIGURES
        assert all(value is None or isinstance(value, int | float) for value in row.values())
