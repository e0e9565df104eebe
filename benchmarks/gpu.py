"""Training speed of ViT-L/16 on one GPU, through the product's own engine, data and model.

    python benchmarks/gpu.py wheels DIR      # where there is a package index: what a bare GPU image lacks
    python benchmarks/gpu.py --wheels DIR    # on the GPU machine: install, check, measure, one table
    python benchmarks/gpu.py --tiny          # the same path with a tiny model on a CPU: does the script work?

Measures fp16 under ZeRO-1 and ZeRO-2, eager and compiled, over batch sizes, from memory and from JPEG
shards: images/s, MFU, memory, loss scale, and that the loss falls. Each case is a process of its own.
The JSON goes to benchmarks/results/, dated.

MFU is against 2,139 images/s: 790 TFLOP/s, the best matrix multiplication that stas00/ml-engineering
measured on H100/H200, over 369.3 GFLOP an image forward and backward (docs/architecture.md).
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Beside deepspeed, not in the images of PyTorch that clusters offer.
LACKING = [
    "webdataset",
    "braceexpand",
    "hjson",
    "py-cpuinfo",
    "msgpack",
    "ninja",
    "einops",
    "submitit",
    "cloudpickle",
    "pyarrow",
    "isal",
    "simplejpeg",
]
CEILING_TFLOPS = 790.0


def fetch_wheels(folder: Path, python: str) -> None:
    """Put wheels of LACKING for that version of Python on x86-64 Linux into `folder`."""
    pip = [sys.executable, "-m", "pip"]
    platforms = [flag for minor in (17, 27, 28) for flag in ("--platform", f"manylinux_2_{minor}_x86_64")]
    foreign = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *foreign, "-d", folder, *LACKING], check=True)
    # No wheel is published; without its compiled operators it is pure Python.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", folder, "deepspeed"], env=environment, check=True)
    print(f"{len(list(folder.glob('*.whl')))} wheels in {folder}")


def install_wheels(folder: Path) -> str:
    """Install what cannot be imported from `folder` into a temporary folder; returns it for PYTHONPATH."""
    target = tempfile.mkdtemp(prefix="vitdist-wheels-")
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"error: no wheels in {folder}; make them with: python benchmarks/gpu.py wheels {folder}")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, *wheels],
        check=True,
    )
    return target


def cases(tiny: bool) -> list[dict[str, Any]]:
    """What is measured, the most telling first: a run that is cut short keeps those."""
    if tiny:
        return [{"zero": z, "compile": False, "batch": 4, "source": s} for z in (1, 2) for s in ("memory", "shards")]
    rows = [
        {"zero": 1, "compile": c, "batch": b, "source": "memory"} for c in (True, False) for b in (256, 128, 384, 64)
    ]
    rows += [{"zero": 2, "compile": c, "batch": 256, "source": "memory"} for c in (True, False)]
    rows += [{"zero": 1, "compile": True, "batch": 256, "source": "shards"}]
    if importlib.util.find_spec("torchcodec"):
        rows += [{"zero": 1, "compile": True, "batch": 256, "source": "shards, decoded on the GPU"}]
    return rows


def make_shards(folder: Path, count: int) -> None:
    """Shards of `count` JPEGs of a photo's size (500x375, quality 90): noise with the 1/f spectrum of photographs."""
    import numpy as np
    from PIL import Image

    from vitdist.data.pack import pack

    generator = np.random.default_rng(0)
    radius = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None]) + 1 / 500
    photos = folder / "photos"
    for i in range(count):
        phases = np.exp(2j * np.pi * generator.random((3, *radius.shape)))
        image = np.fft.irfft2(phases / radius, s=(375, 500))
        image = (image - image.mean()) / image.std() * 50 + 128
        path = photos / ("train" if i % 8 else "val") / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype("uint8").transpose(1, 2, 0)).save(path, quality=90)
    pack(photos, folder / "shards")


def measure(case: dict[str, Any], shards: Path, tiny: bool, seconds: float) -> dict[str, Any]:
    """Train one case for `seconds` after a warm-up, in this process."""
    import torch
    from torch.nn import functional as F

    from vitdist import config, dist, model, optim
    from vitdist.data import device_decode, loader, transforms
    from vitdist.engine import Engine

    shape = (
        {"patch_size": 8, "width": 32, "depth": 2, "heads": 2}
        if tiny
        else {"patch_size": 16, "width": 1024, "depth": 24, "heads": 16}
    )
    settings = config.parse(
        config.Config,
        {
            "data": {
                "train": str(shards / "train"),
                "val": str(shards / "val"),
                "decode": "gpu" if "decoded" in case["source"] else "cpu",
            },
            "model": {"image_size": 32 if tiny else 224, "scratch": shape},
            "train": {"micro_batch": case["batch"], "steps": 10_000},
            "optim": {"lr": 3e-4, "warmup": 0.001},
            "engine": {"zero": case["zero"], "compile": case["compile"]},
        },
        "benchmark",
    )
    with dist.processes() as me:
        batch = config.split_batch(settings.train, me.world)
        net, _ = model.build(settings.model, ["a", "b"], 0)
        layer, depth = model.layers(net)
        groups = optim.groups(net, layer, depth, settings.optim, model.layer_name)
        flops = model.flops_per_image(net)
        engine = Engine(net, groups, optim.optimizer(groups, settings.optim, me.device), settings, batch, me)
        training = loader.open_training(settings, batch.global_batch)
        stream = training.batches(batch, me.rank, 0, me.local_world)
        fixed = next(stream)
        engine.train()
        losses: list[float] = []
        waited = 0.0

        def step() -> None:
            nonlocal waited
            asked = time.monotonic()
            micro = fixed if case["source"] == "memory" else next(stream)
            waited += time.monotonic() - asked
            engine.set_lr(optim.schedule(engine.steps - engine.skipped, 10_000, settings.optim))
            if micro.encoded:
                images = device_decode.pixels(micro.encoded, micro.images, me.device, settings.model.image_size)
            else:
                images = micro.images.to(me.device, non_blocking=True)
            labels = micro.labels.to(me.device, non_blocking=True)
            x = transforms.normalise(images, (0.5,) * 3, (0.5,) * 3, engine.dtype)
            loss = F.cross_entropy(engine.forward(x).float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))

        def wait_for_device() -> None:
            if me.device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(3 if tiny else 10):
            step()
        wait_for_device()
        waited, begun, steps = 0.0, time.monotonic(), 0
        while time.monotonic() - begun < seconds:
            step()
            steps += 1
        wait_for_device()
        elapsed = time.monotonic() - begun
        rate = steps * batch.micro_batch / elapsed
        gpu = me.device.type == "cuda"
        return {
            **case,
            "precision": engine.precision,
            "images_per_s": rate,
            "steps": steps,
            "mfu_pct": 100 * rate * flops / (CEILING_TFLOPS * 1e12) if gpu else None,
            "data_wait_pct": 100 * waited / elapsed,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
            "loss_scale": engine.loss_scale,
            "skipped": engine.skipped,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }


def check_gpu() -> dict[str, Any]:
    """fp16 on the device at hand: a few updates with an overflow forced, which must be skipped."""
    import torch

    from tests import workers
    from vitdist import dist

    s = workers.settings(
        **{"engine.precision": "auto", "engine.loss_scale_power": 12, "engine.loss_scale_hysteresis": 1}
    )
    with dist.processes() as me:
        engine, batch, _ = workers.build(s, me)
        losses = [workers.update(engine, s, batch, me, spoil=1e6 if step == 2 else 1.0) for step in range(10)]
        return {
            "precision": engine.precision,
            "skipped": engine.skipped,
            "loss_scale": engine.loss_scale,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "device": str(me.device),
            "torch": torch.__version__,
        }


def child(arguments: list[str], limit: float) -> dict[str, Any]:
    """Run this file again for one case; its result, or the reason that there is none."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {limit:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


HEAD = "ZeRO     mode batch  source  images/s  MFU %    GiB wait %   scale  loss"


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    mode = "compiled" if row["compile"] else "eager"
    head = f"{row['zero']:>4} {mode:>8} {row['batch']:>5} {row['source']:>7} "
    if "error" in row:
        return head + row["error"]
    mfu, memory = (f"{row[name]:.1f}" if row[name] is not None else "-" for name in ("mfu_pct", "memory_gib"))
    return head + (
        f"{row['images_per_s']:>9.1f} {mfu:>6} {memory:>6} {row['data_wait_pct']:>6.1f} {row['loss_scale']:>7.0f}  "
        f"{row['first_loss']:.3f} -> {row['last_loss']:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="*", help="wheels DIR: fetch wheels; nothing: measure")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python, for wheels (default 3.12)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting cases after this long (default 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command[:1] == ["wheels"] and len(args.command) == 2:
        fetch_wheels(Path(args.command[1]), args.python)
        return 0
    if args.command:
        parser.error("the only command is: wheels DIR")
    if args.case == "check":
        print(json.dumps(check_gpu()))
        return 0
    if args.case:
        print(json.dumps(measure(json.loads(args.case), args.shards, args.tiny, 2 if args.tiny else 15)))
        return 0
    if args.wheels:
        os.environ["PYTHONPATH"] = install_wheels(args.wheels)
        sys.path.insert(0, os.environ["PYTHONPATH"])
    sys.path.insert(0, str(ROOT))
    return benchmark(args)


def benchmark(args: argparse.Namespace) -> int:
    """Check, then measure every case; table and JSON."""
    begun, flags = time.monotonic(), ["--tiny"] if args.tiny else []
    checked = child([*flags, "--case", "check"], 300)
    print(f"check: {checked}")
    if "error" in checked:
        return 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), 64 if args.tiny else 4096)
        print(HEAD)
        for case in cases(args.tiny):
            if time.monotonic() - begun > 60 * args.minutes:
                print(f"left out after {args.minutes} minutes: {case}")
                continue
            found = child([*flags, "--case", json.dumps(case), "--shards", str(Path(folder) / "shards")], 240)
            rows.append(case | found)
            print(line(rows[-1]), flush=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": "tiny" if args.tiny else "ViT-L/16 at 224 px",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "ceiling_tflops": CEILING_TFLOPS,
        "check": checked,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{'tiny-' if args.tiny else ''}{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
