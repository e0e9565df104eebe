"""`vitdist plan`: the same layers, rates and counts as the trainer's groups; what a run takes, and what would fit."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from tests import workers
from vitdist import cli, config, model, plan
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


# ---- what it takes -----------------------------------------------------------------------------


LARGE = {"patch_size": 16, "width": 1024, "depth": 24, "heads": 16}


def large(*overrides: str) -> Config:
    raw = {
        "data": {"train": "none", "val": "none"},
        "model": {"scratch": LARGE},
        "train": {"global_batch": 4096, "epochs": 50},
    }
    return config.parse(Config, config.override(raw, overrides), "test")


def take(*overrides: str, samples: int | None = 1_281_167, **place: Any) -> plan.Budget:
    return plan.budget(large(*overrides), 1000, plan.Place(**place), samples)


def test_a_budget_for_people() -> None:
    lines = plan.text(take(nodes=4, gpu_memory_gb=80, signal_delay_s=120, cpus_per_node=96)).splitlines()
    assert lines[0] == "Memory of a GPU (4 x 8 GPUs, fp16, batch 4096 = 128 x 1 accumulated x 32 ranks)"
    assert lines[1].split() == ["part", "ZeRO", "0", "ZeRO", "1", "ZeRO", "2", "*", "ZeRO", "3"]
    assert lines[2].split() == ["weights", *["608.7", "MB"] * 3, "19.0", "MB"]
    table = {line[:28].strip(): line[28:].split() for line in lines[2:13]}
    assert table["moments"] == ["2.43", "GB", *["76.1", "MB"] * 3]
    assert [int(most) for most in table["largest micro batch, 80 GB"]] == sorted(
        int(most) for most in table["largest micro batch, 80 GB"]
    )
    text = "\n".join(lines)
    assert "fits: " in text
    assert 'tables that say 61.55 "GFLOPs" count one' in text
    assert "123.1 GFLOP forward, 369.3 with the backward pass" in text
    assert "15,639 updates, 23,658 PFLOP" in text
    assert "assumed: 40% of 790 TFLOP/s a GPU (--mfu, --tflops); without evaluations" in text
    assert "3.65 GB, 7.3 s at 0.5 GB/s (assumed: --write-gb-s)" in text
    assert "a save under way and its own, 14.6 s of 120: enough" in text
    assert max(map(len, lines)) < 160
    assert not any(mark in text for mark in "\x1b─")


def test_what_does_not_fit_comes_with_overrides_that_do() -> None:
    found = take("engine.zero=0", nodes=1, gpu_memory_gb=40)
    assert found.fits is False
    told = [line for line in plan.text(found).splitlines() if line.startswith("  would, with ")]
    assert len(told) == len(found.remedies) > 0
    for line in told:
        overrides = line.split(": ", 1)[1].split("  (")[0].split()
        assert take("engine.zero=0", *overrides, nodes=1, gpu_memory_gb=40).fits
    nothing = plan.text(take(nodes=1, gpu_memory_gb=2))
    assert "nothing here makes it fit" in nothing


def test_what_is_not_needed_is_told() -> None:
    text = plan.text(
        take("model.gradient_checkpointing=true", "engine.zero=3", "train.micro_batch=8", nodes=8, gpu_memory_gb=80)
    )
    assert "larger passes fit too: train.global_batch=4096 train.micro_batch=64 train.accumulation=1" in text
    assert "model.gradient_checkpointing=false fits too" in text
    assert "engine.zero=0 fits too and sends 87% less" in text
    assert "recomputation included" in text


def test_what_is_not_known_is_said() -> None:
    text = plan.text(take(samples=None))
    assert "GPU memory is not known: --gpu-memory-gb N" in text
    assert "how long the run is, is not known: --samples N" in text
    assert "largest micro batch, 141 GB" in text
    assert "stopping" not in text


def test_too_few_cores_and_too_short_a_delay() -> None:
    text = plan.text(take(nodes=1, cpus_per_node=8, signal_delay_s=10))
    assert "it has 8, which make 3,400 images/s: shards of smaller pictures decode faster" in text
    assert "TOO SHORT, raise signal_delay_s in the profile" in text
    assert re.search(r"decoding +on the GPU", plan.text(take("data.decode=gpu")))


def test_a_budget_as_json_is_in_bytes() -> None:
    found = take(nodes=4, gpu_memory_gb=80)
    told = json.loads(json.dumps(plan.as_json(found)))
    assert told["model"]["parameters"] == 304_326_632
    assert told["memory"]["zero_2"]["peak"] == found.memory.peak
    assert told["memory"]["zero_3"]["parts"]["weights"] == found.stages[3].state.weights
    assert told["fits"] is True
    assert told["cost"]["updates"] == 15_639
    assert told["assumed"]["mfu"] == 0.4


def test_shapes_of_a_pickle_come_from_the_model_itself(tmp_path: Path) -> None:
    net = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    told = ("model.heads=4", "model.layer_norm_eps=1e-6", "model.activation=gelu", "model.image_size=32")
    seen = []
    for name in ("w.pth", "w.safetensors"):
        save_file(net.state_dict(), tmp_path / name) if name.endswith("s") else torch.save(
            net.state_dict(), tmp_path / name
        )
        s = large("model.scratch=null", f"model.pretrained={tmp_path / name}", *told, "model.lora.rank=4")
        seen.append(plan.network(s, 7))
    assert seen[0] == seen[1]
    assert seen[0].parameters


def test_the_command_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(recipe("train.global_batch=16", "data.train=none", "model.image_size=16")))
    profile = tmp_path / "p.yaml"
    profile.write_text("gpus_per_node: 4\ngpu_memory_gb: 24\nsignal_delay_s: 90\ncpus_per_task: 16\npartition: gpu\n")
    base = ["plan", str(path), "--classes", "3", "--samples", "1000", "--cluster", str(profile)]
    assert cli.main(base) == 0
    shown = capsys.readouterr().out
    assert "03_head" in shown
    assert "(1 x 4 GPUs, fp16, batch 16 = 4 x 1 accumulated x 4 ranks)" in shown
    assert "fits: 1." in shown
    assert "of 90: enough" in shown
    assert "a model as small as this stays far below" in shown
    assert cli.main([*base, "--json", "--nodes", "2", "--gpus-per-node", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["batch"]["world"] == 4
    assert told["place"]["signal_delay_s"] == 90
    assert cli.main([*base, "--nodes", "3"]) == 2
    assert "train.global_batch 16 does not divide over 12 ranks" in capsys.readouterr().err
    assert cli.main(["plan", str(path), "--classes", "3", "train.global_batch=15"]) == 0
    assert "say --nodes N --gpus-per-node N" in capsys.readouterr().out
    assert cli.main(["plan", str(path)]) == 2
    assert "or say how many classes there will be: --classes N" in capsys.readouterr().err
    for odd in (["--mfu", "2"], ["--gpu-memory-gb", "-1"], ["--nodes", "0"], ["--tflops", "fast"]):
        with pytest.raises(SystemExit):
            cli.main([*base, *odd])
    assert "is not a number above 0" in capsys.readouterr().err
    assert cli.main([*base, "--nodes", "999999999"]) == 2
    assert "3,999,999,996 ranks: more than 1,000,000; use fewer --nodes" in capsys.readouterr().err


def test_the_budget_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(large()))
    code = (
        "import sys; from vitdist import cli; "
        f"assert not cli.main(['plan', {str(path)!r}, '--classes', '9', '--samples', '9', '--json']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"]["family"] == "vit"
