"""The table of `vitdist plan`: the same layers, rates and counts as the trainer's groups, and no weights."""

import re
from pathlib import Path

import pytest

from tests import workers
from vitdist import config, model, plan
from vitdist.config import Config


def recipe(*overrides: str) -> Config:
    return config.parse(Config, config.override(config.to_plain(workers.settings()), overrides), "test")


def test_rows_count_each_parameter_once_and_have_the_rates_of_their_layers() -> None:
    s = recipe("optim.layer_decay=0.5", "optim.lr=0.004")
    made = plan.make(s, 7)
    net = model.build(s.model, list("abcdefg"), seed=0)[0]
    assert [row.name for row in made.rows] == ["00_embeddings", "01_block", "02_block", "03_head"]
    assert [row.modules for row in made.rows] == ["embeddings", "layers.0", "layers.1", "layernorm, classifier"]
    assert [row.lr for row in made.rows] == [0.0005, 0.001, 0.002, 0.004]
    assert sum(row.parameters for row in made.rows) == sum(p.numel() for p in net.parameters())
    assert made.groups == 8
    head = made.rows[-1]
    assert (head.decayed, head.undecayed, head.frozen) == (7 * 32, 7 + 2 * 32, 0)


def test_frozen_layers_have_no_rate(tmp_path: Path) -> None:
    model.build(recipe().model, ["a", "b"], seed=0)[0].save_pretrained(tmp_path)
    pretrained = ("model.scratch=null", f"model.pretrained={tmp_path}")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # the configuration is enough
    made = plan.make(recipe(*pretrained, "model.freeze=2"), 3)
    assert [row.lr is None for row in made.rows] == [True, True, False, False]
    assert all(row.frozen == (row.parameters if row.lr is None else 0) for row in made.rows)
    probe = plan.make(recipe(*pretrained, "model.freeze=all"), 3).rows
    assert [row.parameters - row.frozen for row in probe] == [0, 0, 0, 3 * 32 + 3]
    adapted = plan.make(recipe(*pretrained, "model.lora.rank=4"), 3).rows
    assert [row.decayed for row in adapted] == [0, 2 * 4 * 2 * 32, 2 * 4 * 2 * 32, 3 * 32]
    assert adapted[1].modules == "layers.0"


def test_the_rate_follows_the_batch_whatever_the_number_of_ranks() -> None:
    train = ("train.global_batch=1024", "train.micro_batch=32", "train.accumulation=4")  # of 8 ranks
    scaled = plan.make(recipe(*train, "optim.lr=0.001", "optim.lr_batch=256"), 3)
    assert scaled.rows[-1].lr == pytest.approx(0.004)
    text = plan.table(recipe(*train, "optim.lr=0.001", "optim.lr_batch=256"), 3)
    assert "lr 0.001 is meant for batches of 256 and follows (linear) to 1024" in text
    alone = plan.table(recipe("train.global_batch=null", "train.micro_batch=32", "optim.lr_batch=16"), 3)
    assert "to 32, that of one rank: train.global_batch is not given" in alone


def test_a_vit_large_takes_no_memory_and_has_52_groups() -> None:
    shape = "{patch_size: 16, width: 1024, depth: 24, heads: 16, mlp_ratio: 4.0}"
    s = recipe(f"model.scratch={shape}", "model.image_size=224", "optim.layer_decay=0.75")
    made = plan.make(s, 1000)
    assert made.groups == 52
    assert sum(row.parameters for row in made.rows) == 304_326_632  # ViT-L/16 with 1,000 classes
    assert all(p.is_meta for p in model.skeleton(s.model, 1000).parameters())


def test_the_table_is_plain_text_where_no_terminal_is() -> None:
    lines = plan.table(recipe(), 3).splitlines()
    assert lines[0].split() == ["layer", "modules", "peak", "lr", "parameters", "decayed", "not", "decayed", "frozen"]
    assert re.fullmatch(r"03_head +layernorm, classifier +0\.003 +163 +96 +67 +-", lines[4])
    made = plan.make(recipe(), 3).rows
    total = [f"{sum(getattr(row, field) for row in made):,}" for field in ("parameters", "decayed", "undecayed")]
    assert lines[5].split() == ["total", *total, "0"]
    assert "\x1b" not in "".join(lines)
    assert "─" not in "".join(lines)
    assert lines[-3].startswith("adamw, 8 groups, lr 0.003 x 0.5 for each layer down, weight decay 0.05, clip 0.5")


def test_the_table_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "│" in plan.table(recipe(), 3)
