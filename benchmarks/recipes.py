"""Fine-tuning against training from scratch, layer decay, optimizers and remedies for uneven classes, side by side.

vitdist pack cifar10 shards/cifar10 && .venv/bin/python benchmarks/recipes.py cifar10 \\
    --shards shards/cifar10 --weights vit_p4_32_cifar10.safetensors --seeds 3

Each variant trains for equally many steps in a process of its own on one thread, `--jobs` at a time; variants and
seeds take turns, so that a busy machine slows all alike. The tables of docs/recipes.md come from here. Neither
pictures nor weights come with the project: `--shards` is a folder with train/ and val/ (or test/) as `vitdist pack`
makes it, `--weights` a small ViT in timm's names (width 128, depth 4, patch 4, trained on CIFAR-10).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from rich.progress import Progress

from benchmarks import results

ROOT = Path(__file__).parents[1]
SCRATCH = "{patch_size: 4, width: 128, depth: 4, heads: 4, mlp_ratio: 2.0}"
IMAGENET = {"data.mean": "[0.4914, 0.4822, 0.4465]", "data.std": "[0.247, 0.2435, 0.2616]"}
FILE = {"model.heads": 4, "model.layer_norm_eps": 1e-5, "model.activation": "gelu", **IMAGENET}

COMMON = {
    "train.global_batch": 64,
    "optim.weight_decay": 0.05,
    "optim.warmup": 0.1,
    "engine.zero": 0,
    "engine.threads": 1,
    "data.workers": 0,
    "tracking.wandb": "off",
    "checkpoint.every_steps": 100_000,
    "evaluation.every_steps": 100_000,
}
SETS = {
    # The checkpoint has seen these pictures whole: crops of 32 pixels, blown up again, are other pictures to it.
    "cifar10": {
        "model.image_size": 32,
        "train.steps": 150,
        "data.crop_scale": "[1.0, 1.0]",
        "data.crop_ratio": "[1.0, 1.0]",
        "data.eval_crop": 1.0,
    },
    "steel": {"model.image_size": 48, "train.steps": 200, "data.crop_scale": "[0.5, 1.0]", "data.eval_crop": 1.0},
    "skin": {"model.image_size": 32, "train.steps": 200, "data.crop_scale": "[0.5, 1.0]", "data.eval_crop": 1.0},
}
"""What a set's runs share."""

SGD = {"optim.name": "sgd", "optim.weight_decay": 1e-4}


def variants(data: str, weights: Path) -> dict[str, dict[str, object]]:
    """Overrides of each row of the table of `data`."""
    known = data == "cifar10"
    file = {"model.pretrained": str(weights), "model.head": "keep" if known else "new", **FILE}
    # What needs no more than a touch gets a small rate and an average; a new task gets that of training.
    small = {"optim.lr": 3e-5, "optim.ema": 0.99, "loss.label_smoothing": 0.0}
    tuned = {**file, "optim.layer_decay": 0.75, "optim.lr": 1e-3, **(small if known else {})}
    rows = {
        "from scratch, AdamW": {"model.scratch": SCRATCH, "optim.layer_decay": 1.0, "optim.lr": 1e-3},
        "checkpoint, AdamW, layer decay 0.75": tuned,
        "checkpoint, AdamW, no layer decay": {**tuned, "optim.layer_decay": 1.0},
        "checkpoint, SGD, layer decay 0.75": {**tuned, **SGD, "optim.lr": 1e-3 if known else 0.05},
    }
    if known:
        rows["checkpoint, SGD, no layer decay"] = {**tuned, **SGD, "optim.lr": 1e-3, "optim.layer_decay": 1.0}
        rows["checkpoint, AdamW, layer decay 0.75, rate 1e-3"] = {**tuned, "optim.lr": 1e-3}
    if data == "skin":
        rows["... class weights, inverse"] = {**tuned, "loss.class_weights": "inverse"}
        rows["... balanced sampling"] = {**tuned, "data.class_shares": "balanced"}
        rows["... sampling by the root"] = {**tuned, "data.class_shares": "sqrt"}
        rows["... logit adjustment 1"] = {**tuned, "loss.logit_adjustment": 1.0}
    return rows


def command(recipe: Path, name: str, overrides: dict[str, object]) -> list[str]:
    """The trainer's command line of one run."""
    given = [f"{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", "vitdist.train", str(recipe), "--name", name, *given]


def run(argv: list[str], folder: Path) -> dict[str, object]:
    """Train in `folder`; its evaluation and its seconds. Raises RuntimeError with the log's last line."""
    name = argv[argv.index("--name") + 1]
    began = time.monotonic()
    log = folder / f"{name}.log"
    with open(log, "w") as out:
        code = subprocess.run(argv, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment()).returncode
    if code:
        raise RuntimeError(f"{name} failed ({log}): {log.read_text().strip().splitlines()[-1]}")
    record = json.loads((folder / "runs" / name / "evaluation.json").read_text())
    return {**record, "seconds": time.monotonic() - began}


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def summary(data: str, found: list[dict[str, object]]) -> dict[str, object]:
    """Mean and sample standard deviation over seeds of what a row shows."""
    values: dict[str, list[float]] = {}
    for each in found:
        for metric in ("top1", "balanced_accuracy", "macro_f1"):
            values.setdefault(metric, []).append(100 * each["metrics"][metric])
        if data == "skin":
            recall = {row["name"]: row["recall"] for row in each["per_class"]}
            values.setdefault("melanoma_recall", []).append(100 * recall["mel"])
        values.setdefault("seconds", []).append(each["seconds"])
    return {
        metric: {
            "mean": statistics.mean(of),
            "sd": statistics.stdev(of) if len(of) > 1 else 0.0,
            "of_seeds": [round(v, 2) for v in of],
        }
        for metric, of in values.items()
    }


def table(rows: dict[str, dict[str, object]]) -> str:
    """The rows as Markdown."""
    metrics = [m for m in next(iter(rows.values())) if m != "seconds"]
    lines = [
        "| | " + " | ".join(m.replace("_", " ") for m in metrics) + " | seconds |",
        "| --- |" + " --- |" * (len(metrics) + 1),
    ]
    for name, row in rows.items():
        cells = [f"{row[m]['mean']:.1f} +- {row[m]['sd']:.1f}" for m in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['seconds']['mean']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("/tmp/vitdist-bench/recipes"), help="folder for the runs")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings for every run")
    args = parser.parse_intermixed_args()
    shards = args.shards.resolve()
    for path in (shards / "train", args.weights):
        if not path.exists():
            sys.exit(f"error: {path} is not there; see the head of this file for what to give")
    folder = args.work / f"{args.set}-{int(time.time())}"
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"train": str(shards / "train"), "val": str(shards / "val")}}))
    rows = {n: o for n, o in variants(args.set, args.weights.resolve()).items() if not args.only or args.only in n}
    more = dict(text.split("=", 1) for text in args.overrides)
    todo = [
        (name, command(recipe, f"{i}-seed{seed}", {**COMMON, **SETS[args.set], **own, "train.seed": seed, **more}))
        for seed in range(args.seeds)
        for i, (name, own) in enumerate(rows.items())
    ]
    found: dict[str, list[dict[str, object]]] = {name: [] for name in rows}
    with Progress() as bar, ThreadPoolExecutor(args.jobs) as pool:
        task = bar.add_task(args.set, total=len(todo))
        for (name, _), result in zip(todo, pool.map(lambda job: run(job[1], folder), todo), strict=True):
            found[name].append(result)
            bar.advance(task)
    done = {name: summary(args.set, each) for name, each in found.items()}
    print(table(done))
    results.publish(f"recipe-{args.set}", {"settings": {**COMMON, **SETS[args.set], **more}, "rows": done})


if __name__ == "__main__":
    main()
