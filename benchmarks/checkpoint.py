"""What checkpoints cost a run, and how fast a resume verifies and loads.

.venv/bin/python benchmarks/checkpoint.py              # some 15 minutes on 2 cores, 14 GiB of memory
.venv/bin/python benchmarks/checkpoint.py --part cost  # or resume

cost: ViT-Ti at 224 px with an average of the weights (92 MB of state), real updates. Windows of 10 updates
with and without a checkpoint take turns, in an order that is drawn for each pair; told is the median over pairs of the
time that a checkpoint adds, with the 95 percent interval of a bootstrap over pairs, that time as a share of 50 (and of
5) updates, and how long the step loop stood still.
resume: ViT-L with AdamW's state, made here. Reading and hashing its files, as `vitdist checkpoints --verify` does,
takes turns with a whole resume, which verifies too. With --cold the cache of files is emptied before each (as root).
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import results
from vitdist import checkpoint, config, dist, manifest, model, optim
from vitdist.config import Config
from vitdist.dist import Processes
from vitdist.engine import Engine
from vitdist.manifest import Identity
from vitdist.rundir import RunDir

WINDOW = 10
"""Updates between two looks at the clock: what a checkpoint costs falls within some two updates after it, and the noise
of the 40 that follow would drown it (blocks of 50 gave intervals of +-6 percent)."""
SHAPES = {"ti": (192, 12, 3), "l": (1024, 24, 16)}


def settings(shape: str, batch: int, **changes: Any) -> Config:
    width, depth, heads = SHAPES[shape]
    raw: dict[str, Any] = {
        "data": {"train": "none", "val": "none"},
        "model": {"image_size": 224, "scratch": {"width": width, "depth": depth, "heads": heads}},
        "train": {"global_batch": batch, "steps": 1_000_000},
    }
    return config.parse(Config, config.override(raw, [f"{k}={v}" for k, v in changes.items()]), "benchmark")


class Trained:
    """A model of 1,000 classes, its engine and a writer in a folder of its own."""

    def __init__(self, s: Config, me: Processes, folder: Path) -> None:
        self.s, self.me, self.run = s, me, RunDir(folder)
        folder.mkdir(exist_ok=True)
        batch = config.split_batch(s.train, me.world)
        net, _ = model.build(s.model, [f"class {i}" for i in range(1000)], 0)
        layer, depth = model.layers(net)
        groups = optim.groups(net, layer, depth, s.optim, model.layer_name)
        self.identity = Identity(
            optimizer=s.optim.name,
            global_batch=batch.global_batch,
            model={},
            classes=[],
            data="",
            groups=checkpoint.layout(groups),
            rest=checkpoint.rest(net),
        )
        self.engine = Engine(net, groups, optim.optimizer(groups, s.optim, me.device), s, batch, me)
        about = {"zero": s.engine.zero, "precision": self.engine.precision, "average": bool(s.optim.ema)}
        about |= {"settings": {}, "settings_digest": "", "versions": {}}
        self.writer = checkpoint.Writer(self.run, self.engine, me, self.identity, s.checkpoint, 0, about)
        self.writer.claim()
        self.images = torch.randn(batch.micro_batch, 3, 224, 224)
        self.labels = torch.arange(batch.micro_batch)

    def update(self) -> None:
        self.engine.set_lr(1e-4)
        self.engine.backward(F.cross_entropy(self.engine.forward(self.images).float(), self.labels))
        self.engine.step()

    def window(self, saves: tuple[int, ...]) -> float:
        """Seconds of WINDOW updates with a checkpoint after each given one, written beside those that follow."""
        began = time.perf_counter()
        for number in range(1, WINDOW + 1):
            self.update()
            if number in saves:
                self.writer.save({})
        self.writer.wait()
        return time.perf_counter() - began


def cost(me: Processes, folder: Path, pairs: int, batch: int) -> dict[str, Any]:
    trained = Trained(
        settings("ti", batch, **{"optim.ema": 0.999, "engine.threads": torch.get_num_threads()}), me, folder
    )
    trained.window(())
    trained.window((1,))
    trained.writer.news()
    rng, told = np.random.default_rng(0), {}
    for every, saves in ((50, (1,)), (5, (1, 6))):
        without, extra, blocked, seconds, size = [], [], [], [], 0
        for _ in range(pairs):
            times = {}
            for with_it in rng.permutation([True, False]):
                times[bool(with_it)] = trained.window(saves if with_it else ())
            news = trained.writer.news()
            assert len(news) == len(saves), "a save went missing"
            assert not any(saved.fault for saved in news)
            without.append(times[False] / WINDOW)
            extra.append((times[True] - times[False]) / len(saves))
            blocked.append(statistics.mean(saved.blocked_s for saved in news))
            seconds += [saved.seconds for saved in news]
            size = news[-1].bytes
        update = statistics.median(without)
        low, high = _interval(extra, rng)
        told[f"every_{every}_updates"] = {
            "pairs of windows": pairs,
            "bytes of a checkpoint": size,
            "update, ms": round(1e3 * update),
            "a checkpoint costs, ms": round(1e3 * statistics.median(extra)),
            "95 % interval, ms": f"{1e3 * low:.0f} to {1e3 * high:.0f}",
            "costs, % of throughput": round(100 * statistics.median(extra) / (every * update), 2),
            "95 % interval, %": f"{100 * low / (every * update):.2f} to {100 * high / (every * update):.2f}",
            "step loop stands still, % of time": round(100 * statistics.median(blocked) / (every * update), 3),
            "write, ms (median)": round(1e3 * statistics.median(seconds)),
        }
    return told


def _interval(values: list[float], rng: np.random.Generator) -> tuple[float, float]:
    """95 percent interval of the median over resamples of the pairs."""
    draws = rng.choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def resume(me: Processes, folder: Path, rounds: int, cold: bool) -> dict[str, Any]:
    trained = Trained(settings("l", 1), me, folder)
    engine = trained.engine
    engine.restore(
        {"exp_avg", "exp_avg_sq"},
        lambda pieces: None,
        {"steps": 7, "skipped": 0, "optimizer": {"step": 7.0}, "loss_scaler": {}},
        "fp32",
    )
    trained.writer.save({})
    trained.writer.wait()
    (saved,) = trained.writer.news()
    place = trained.run.checkpoints / manifest.name_of(7)
    hashing, resuming = [], []
    for _ in range(rounds):
        for which in ("hash", "resume"):
            if cold:
                _empty_cache()
            began = time.perf_counter()
            if which == "hash":
                assert manifest.verify(place) is None
                hashing.append(time.perf_counter() - began)
            else:
                found, passed_over = checkpoint.resume(trained.run, engine, me, trained.identity)
                assert found
                assert not passed_over
                resuming.append(time.perf_counter() - began)
    ratio = statistics.median(b / a for a, b in zip(hashing, resuming, strict=True))
    return {
        f"resume_of_ViT-L_{'cold' if cold else 'cached'}": {
            "bytes": saved.bytes,
            "read and hash, s": round(statistics.median(hashing), 2),
            "resume (verify and load), s": round(statistics.median(resuming), 2),
            "ratio of times": round(ratio, 2),
            "speed of the resume, MB/s": round(saved.bytes / 1e6 / statistics.median(resuming)),
            "write, s": round(saved.seconds, 2),
            "copy to host memory, s (first, with its page faults)": round(saved.blocked_s, 2),
        }
    }


def _empty_cache() -> None:
    import os

    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["cost", "resume", "all"], default="all")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument(
        "--batch", type=int, default=4, help="pictures of an update: the fewer, the dearer a checkpoint"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=Path.cwd()))
    try:
        with dist.processes() as me:
            if args.part in ("cost", "all"):
                figures |= cost(me, folder / "ti", args.pairs, args.batch)
            if args.part in ("resume", "all"):
                figures |= resume(me, folder / "l", args.rounds, args.cold)
    finally:
        shutil.rmtree(folder)
    results.publish("checkpoint", figures)


if __name__ == "__main__":
    main()
