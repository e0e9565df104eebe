"""What test ranks do. Imported once by the fork server: see ranks.py."""

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vitdist import checkpoint, config, dist, manifest, model, optim, stop
from vitdist.config import Checkpoint, Config
from vitdist.data.index import Index
from vitdist.engine import Diverged, Engine
from vitdist.manifest import Identity
from vitdist.rundir import RunDir

CLASSES = [f"class {i}" for i in range(5)]


def settings(**changes: Any) -> Config:
    """A tiny ViT of 2 blocks (4 learning rates), global batch 16, clipping that bites."""
    raw: dict[str, Any] = {
        "data": {"train": "none", "val": "none"},
        "model": {
            "image_size": 16,
            "scratch": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0},
        },
        "train": {"global_batch": 16, "steps": 20},
        "optim": {"lr": 3e-3, "layer_decay": 0.5, "clip": 0.5, "warmup": 0.2},
        "engine": {"threads": 1},
    }
    return config.parse(Config, config.override(raw, [f"{name}={value}" for name, value in changes.items()]), "test")


def allow_fp16_on_cpu() -> None:
    """Let DeepSpeed's CPU accelerator run fp16, which it can but refuses: the real fp16 path under test."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]


def build(s: Config, me: dist.Processes, wrong_frozen: bool = False) -> tuple[Engine, config.Batch, Identity]:
    """An engine with a new model, of which what is frozen can be made wrong, for a checkpoint to put right."""
    batch = config.split_batch(s.train, me.world)
    net, _ = model.build(s.model, CLASSES, s.train.seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if wrong_frozen and not parameter.requires_grad:
                parameter.fill_(7.0)
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, s.optim, model.layer_name)
    layout, rest = checkpoint.layout(groups), checkpoint.rest(net)
    engine = Engine(net, groups, optim.optimizer(groups, s.optim, me.device), s, batch, me)
    identity = Identity(
        optimizer=s.optim.name,
        global_batch=batch.global_batch,
        model={"model_type": "vit"},
        classes=CLASSES,
        data="data",
        groups=layout,
        rest=rest,
    )
    return engine, batch, identity


def writer(
    run: RunDir, engine: Engine, me: dist.Processes, identity: Identity, attempt: int = 0, **settings: Any
) -> checkpoint.Writer:
    """A writer of checkpoints, as the trainer has it."""
    about = {
        "zero": engine._zero,
        "precision": engine.precision,
        "average": bool(engine._averages),
        "settings": {},
        "settings_digest": manifest.digest({}),
        "wandb": None,
        "versions": {},
    }
    run.path.mkdir(parents=True, exist_ok=True)
    written = checkpoint.Writer(run, engine, me, identity, Checkpoint(**settings), attempt, about)
    if me.first:
        written.claim()
    return written


def save(run: RunDir, engine: Engine, me: dist.Processes, identity: Identity) -> None:
    """A checkpoint, and its end."""
    written = writer(run, engine, me, identity)
    written.save({})
    written.wait()
    assert [outcome.fault for outcome in written.news()] == [None]


def resumed_step(run: RunDir, engine: Engine, me: dist.Processes, identity: Identity) -> int | None:
    found, passed_over = checkpoint.resume(run, engine, me, identity)
    assert not passed_over
    return found.step if found else None


def pictures(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up images and labels of a global batch, which depend on the step alone."""
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(step))
    labels = torch.arange(count) % len(CLASSES)
    images[:, 0] += labels[:, None, None]  # something to learn
    return images, labels


def update(engine: Engine, s: Config, batch: config.Batch, me: dist.Processes, spoil: float = 1.0) -> float:
    """One update; the mean loss over ranks."""
    images, labels = pictures(engine.steps, batch.global_batch)
    engine.set_lr(optim.schedule(engine.steps - engine.skipped, 20, s.optim))
    mine, losses = slice(me.rank * batch.global_batch // me.world, (me.rank + 1) * batch.global_batch // me.world), []
    pairs = zip(images[mine].split(batch.micro_batch), labels[mine].split(batch.micro_batch), strict=True)
    for x, y in pairs:
        loss = F.cross_entropy(engine.forward(x.to(engine.dtype)).float(), y)
        engine.backward(loss * spoil)
        engine.step()
        losses.append(float(loss.detach()))
    return me.mean(sum(losses) / len(losses))


def losses(changes: dict[str, Any], count: int) -> list[float]:
    s = settings(**changes)
    with dist.processes(1) as me:
        engine, batch, _ = build(s, me)
        return [update(engine, s, batch, me) for _ in range(count)]


def fp16_overflow(changes: dict[str, Any]) -> dict[str, Any]:
    """Ten updates in fp16 of which the third overflows; what the engine did."""
    allow_fp16_on_cpu()
    s = settings(**changes)
    with dist.processes(1) as me:
        engine, batch, _ = build(s, me)
        seen: dict[str, list[Any]] = {"loss": [], "scale": [], "skipped": [], "lr": []}
        for step in range(10):
            seen["loss"].append(update(engine, s, batch, me, spoil=1e6 if step == 2 else 1.0))
            seen["scale"].append(engine.loss_scale)
            seen["skipped"].append(engine.skipped)
            seen["lr"].append(engine.lrs())
        return {**seen, "steps": engine.steps, "dtype": str(engine.dtype)}


def fp16_where_it_cannot() -> str:
    """The refusal of fp16 on a device without it (some CPUs have it)."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    with dist.processes(1) as me:
        try:
            build(settings(**{"engine.precision": "fp16"}), me)
        except ValueError as error:
            return str(error)
    return "not refused"


def rates_after_resume(changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """Five updates, a checkpoint, a fresh engine that resumes; rates, decays and the next losses of both."""
    s, run = settings(**changes), RunDir(Path(folder))
    if s.engine.precision == "fp16":
        allow_fp16_on_cpu()
    with dist.processes(1) as me:
        engine, batch, identity = build(s, me)
        for _ in range(5):
            update(engine, s, batch, me)
        before, groups_before, skipped_before = engine.lrs(), members(engine), engine.skipped
        save(run, engine, me, identity)
        straight = [update(engine, s, batch, me) for _ in range(3)]
        again, _, _ = build(s, me)
        resumed = resumed_step(run, again, me, identity)
        again.set_lr(optim.schedule(again.steps - again.skipped, 20, s.optim))
        after, groups_after = again.lrs(), members(again)
        continued = [update(again, s, batch, me) for _ in range(3)]
        weights = [
            torch.equal(a, b)
            for a, b in zip(
                engine.full_weights(keep=True).values(), again.full_weights(keep=True).values(), strict=True
            )
        ]
        return {
            "resumed": resumed,
            "before": before,
            "after": after,
            "members": (groups_before, groups_after),
            "skipped": skipped_before,
            "straight": straight,
            "continued": continued,
            "equal": all(weights),
            "decays": again.weight_decays(),
            "scales": dict(zip(again.names, again.scales, strict=True)),
        }


def members(engine: Engine) -> dict[str, list[str]]:
    """The parameters whose weights the optimizer's group of each name really holds, as DeepSpeed tells."""
    wrapped, names = engine._optimizer, {id(p): name for name, p in engine._engine.module.named_parameters()}
    lists = [group["params"] for group in wrapped.param_groups]
    for inside in ("bit16_groups", "fp16_groups"):  # the wrappers' lists of what the model computes with
        lists = getattr(wrapped, inside, lists)
    assert len(lists) == len(engine.names)
    return {name: [names[id(p)] for p in held] for name, held in zip(engine.names, lists, strict=True)}


def rule(name: str, parameter: torch.Tensor, s: Config) -> tuple[float, float]:
    """Scale of the rate and weight decay of a parameter, told by its name; for models of 2 blocks."""
    block = re.search(r"layers?\.(\d+)\.", name)
    layer = int(block[1]) + 1 if block else 0 if "embeddings" in name else 3
    bare = parameter.ndim < 2 or name.endswith(("cls_token", "position_embeddings"))
    return s.optim.layer_decay ** (3 - layer), 0.0 if bare else s.optim.weight_decay


def against_torch(changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """Six updates, with a new engine and a resume after three, and the same of plain torch without any of our code."""
    s, run = settings(**changes), RunDir(Path(folder))
    with dist.processes(1) as me:
        engine, batch, identity = build(s, me)
        net, _ = model.build(s.model, CLASSES, s.train.seed)
        first = {name: p.detach().clone() for name, p in net.named_parameters()}
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        rules = [rule(name, p, s) for name, p in trained.items()]
        own = [
            {"params": [p], "lr": 0.0, "weight_decay": decay}
            for p, (_, decay) in zip(trained.values(), rules, strict=True)
        ]
        plain = {
            "adamw": lambda: torch.optim.AdamW(own),
            "sgd": lambda: torch.optim.SGD(own, momentum=0.9, nesterov=True),
            "lion": lambda: Lion(own),
        }[s.optim.name]()
        norms = []
        for step in range(6):
            if step == 3:
                save(run, engine, me, identity)
                engine, _, _ = build(s, me)
                checkpoint.resume(run, engine, me, identity)
            update(engine, s, batch, me)
            images, labels = pictures(step, batch.global_batch)
            plain.zero_grad()
            F.cross_entropy(net(pixel_values=images).logits, labels).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), s.optim.clip or torch.inf)
            norms.append((engine.grad_norm, float(norm)))
            for group, (scale, _) in zip(plain.param_groups, rules, strict=True):
                group["lr"] = optim.schedule(step, 20, s.optim) * scale
            plain.step()
        ours = engine.full_weights(keep=True)
        off = {name: float((ours[name] - p.detach()).abs().mean()) for name, p in net.named_parameters()}
        moved = {name: float((first[name] - p.detach()).abs().mean()) for name, p in net.named_parameters()}
        return {"norms": norms, "off": off, "moved": moved, "trained": list(trained)}


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023, as it is printed."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = 0.9 * m + 0.1 * p.grad
                p -= group["lr"] * (c.sign() + group["weight_decay"] * p)
                m.copy_(0.99 * m + 0.01 * p.grad)


def look(engine: Engine) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The whole weights, and what the model makes of some pictures."""
    engine.eval()
    with torch.no_grad():
        logits = engine.forward(pictures(0, 8)[0].to(engine.dtype)).float()
    engine.train()
    return engine.full_weights(keep=True), logits


def same(one: Any, other: Any) -> bool:
    """Whether two looks are equal, bit for bit."""
    pairs = zip([*one[0].values(), one[1]], [*other[0].values(), other[1]], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def average(changes: dict[str, Any], folder: str, skip: int | None = None) -> dict[str, Any]:
    """Six updates, of which number `skip` overflows, with the average of the weights; then a resume."""
    s, run = settings(**changes), RunDir(Path(folder))
    if s.engine.precision == "fp16":
        allow_fp16_on_cpu()
    with dist.processes(1) as me:
        engine, batch, identity = build(s, me)
        reference = {name: w.double() for name, w in engine.full_weights(keep=True).items()}
        applied = 0
        for step in range(6):
            skipped = engine.skipped
            update(engine, s, batch, me, spoil=1e6 if step == skip else 1.0)
            if engine.skipped == skipped:
                decay = min(s.optim.ema, (1 + applied) / (10 + applied) if s.optim.ema_warmup else 1.0)
                applied += 1
                for name, w in engine.full_weights(keep=True).items():
                    reference[name] = decay * reference[name] + (1 - decay) * w.double()
        seen = look(engine)
        with engine.averaged():
            inside = look(engine)
        restored = look(engine)
        save(run, engine, me, identity)
        again, _, _ = build(s, me, wrong_frozen=True)
        checkpoint.resume(run, again, me, identity)
        with again.averaged():
            resumed = look(again)
        for _ in range(2):
            update(engine, s, batch, me)
            update(again, s, batch, me)
        with engine.averaged(), again.averaged():
            straight, continued = look(engine), look(again)
        net, _ = model.build(s.model, CLASSES, s.train.seed)
        net.load_state_dict(inside[0])
        wanted = net.to(torch.bfloat16 if "bf16" in engine.precision else engine.dtype)
        with torch.no_grad():
            logits = wanted(pixel_values=pictures(0, 8)[0].to(wanted.dtype)).logits.float()
        return {
            "applied": applied,
            "skipped": engine.skipped,
            "off": max(float((inside[0][name] - w).abs().max()) for name, w in reference.items()),
            "far": max(float((seen[0][name] - w).abs().max()) for name, w in reference.items()),
            "restored": same(seen, restored),
            "resumed": same(inside, resumed),
            "continued": same(straight, continued),
            "logits_off": float((inside[1] - logits).abs().max()),
            "logits_far": float((seen[1] - logits).abs().max()),
        }


def across(changes: dict[str, Any], folder: str, steps: int, more: int) -> dict[str, Any]:
    """Resume what lies in `folder` or begin, do `steps` updates, save; then `more` updates: losses, weights, groups."""
    s, run = settings(**changes), RunDir(Path(folder))
    if s.engine.precision == "fp16":
        allow_fp16_on_cpu()
    with dist.processes(1) as me:
        engine, batch, identity = build(s, me, wrong_frozen=bool(manifest.steps(run)))
        resumed = resumed_step(run, engine, me, identity)
        for _ in range(steps):
            update(engine, s, batch, me)
        if steps:
            save(run, engine, me, identity)
        counted = {
            float(value) for state in engine._base.state.values() for name, value in state.items() if name == "step"
        }
        losses = [update(engine, s, batch, me) for _ in range(more)]
        with engine.averaged():
            average = engine.full_weights(keep=True)
        return {
            "resumed": resumed,
            "losses": losses,
            "counted": counted,
            "scale": engine.loss_scale,
            "rates": engine.lrs(),
            "decays": engine.weight_decays(),
            "members": members(engine),
            # As arrays: torch sends tensors as shared memory, which goes with this process.
            "weights": {name: w.numpy() for name, w in engine.full_weights(keep=True).items()},
            "average": {name: w.numpy() for name, w in average.items()},
        }


def first_step(changes: dict[str, Any]) -> dict[str, Any]:
    """Whether an engine starts with the weights it is given, rounded, and by how many rates its first update moves."""
    s = settings(**changes)
    if s.engine.precision == "fp16":
        allow_fp16_on_cpu()
    with dist.processes(1) as me:
        given, _ = model.build(s.model, CLASSES, s.train.seed)
        engine, batch, _ = build(s, me)
        began = engine.full_weights(keep=True)
        equal = all(torch.equal(began[n], p.detach().to(engine.dtype).float()) for n, p in given.named_parameters())
        update(engine, s, batch, me)
        kept = 1 - engine.lrs()["03_head"] * s.optim.weight_decay
        move = engine.full_weights(keep=True)["classifier.weight"] - kept * began["classifier.weight"]
        return {"equal": equal, "moved": float(move.abs().mean()) / engine.lrs()["03_head"]}


def ended_by(changes: dict[str, Any], spoil: float) -> dict[str, Any]:
    """A good update and one with a loss that is `spoil` times as large: what becomes of the second."""
    s = settings(**changes)
    if s.engine.precision == "fp16":
        allow_fp16_on_cpu()
    with dist.processes(1) as me:
        engine, batch, _ = build(s, me)
        update(engine, s, batch, me)
        before = engine.full_weights(keep=True)
        try:
            update(engine, s, batch, me, spoil=spoil)
            fate = "skipped" if engine.skipped else "applied"
        except Diverged as error:
            fate = str(error)
        after = engine.full_weights(keep=True)
        return {"fate": fate, "untouched": all(torch.equal(before[name], after[name]) for name in before)}


def best(folder: str) -> dict[str, Any]:
    """A checkpoint after each of five updates, two kept and the best; that one loaded, and what cannot be."""
    s, run = settings(), RunDir(Path(folder))
    with dist.processes(1) as me:
        engine, batch, identity = build(s, me)
        weights, kept, written = {}, [], writer(run, engine, me, identity)
        for _ in range(5):
            update(engine, s, batch, me)
            weights[engine.steps] = engine.full_weights(keep=True)
            written.save({}, best=min(engine.steps, 2))
            written.wait()
            kept.append(manifest.steps(run))
        checkpoint.load_step(run, engine, me, identity, 2)
        loaded = engine.full_weights(keep=True)
        refusals = []
        for step, other in ((3, identity), (2, identity.model_copy(update={"optimizer": "lion"}))):
            try:
                checkpoint.load_step(run, engine, me, other, step)
            except ValueError as error:
                refusals.append(str(error))
        victim = run.checkpoints / "step-00000002" / "rank-0.safetensors"
        if me.first:
            victim.write_bytes(victim.read_bytes()[:-7])
        me.barrier()
        try:
            checkpoint.load_step(run, engine, me, identity, 2)
        except ValueError as error:
            refusals.append(str(error))
        return {
            "kept": kept,
            "step": engine.steps,
            "equal": [step for step, w in weights.items() if all(torch.equal(w[n], loaded[n]) for n in w)],
            "refusals": refusals,
        }


def resume_with(changes: dict[str, Any], folder: str) -> str:
    """Try to resume a run's checkpoint under changed settings; the refusal's text."""
    s, run = settings(**changes), RunDir(Path(folder))
    with dist.processes(1) as me:
        engine, _, identity = build(s, me)
        try:
            found, skipped = checkpoint.resume(run, engine, me, identity)
        except ValueError as error:
            return str(error)
        return f"resumed at {found.step if found else None}, passed over {skipped}"


def train(
    arguments: list[str], cwd: str, output: str, stop_at: int | None = None, elsewhere: tuple[str, str] | None = None
) -> int:
    """The trainer's own main in this rank, its output in a file; at step `stop_at` the last rank is asked to stop.

    `elsewhere`: the last rank has the second folder where the others have the first.
    """
    os.chdir(cwd)
    from vitdist import train as trainer
    from vitdist.report import charts

    charts.vega = lambda: "window.vegaEmbed = null;"  # type: ignore[assignment]  # test_report.py has the real one: 3 s

    rank = int(os.environ["RANK"])
    if stop_at is not None and rank == int(os.environ["WORLD_SIZE"]) - 1:
        original = trainer._update

        def update_then_signal(session: Any, *rest: Any) -> Any:
            result = original(session, *rest)
            if session.engine.steps == stop_at:
                os.kill(os.getpid(), signal.SIGUSR2)
            return result

        trainer._update = update_then_signal
    if elsewhere and rank == int(os.environ["WORLD_SIZE"]) - 1:
        opened = Index.open
        Index.open = lambda place, cache=None: opened(str(place).replace(*elsewhere), cache)  # type: ignore[method-assign]
    with (
        open(f"{output}.{rank}", "w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return trainer.main(arguments)


def stop_flag() -> list[Any]:
    """Every rank's view of a stop that only rank 1 was asked for."""
    request = stop.install()
    with dist.processes(1) as me:
        if me.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return [me.any(bool(request)), request.reason]


def logits_and_labels(samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up logits float32 [N, C] in halves, so that many are equal, and labels [N] that they mostly agree with."""
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += 1
    return (2 * logits).round() / 2, labels


def evaluation(
    samples: int, classes: int, batch: int, tta: str = "none", broken: tuple[int, ...] = (), doubled: bool = False
) -> Any:
    """Evaluate a model whose pictures are its logits; `doubled`: the last rank sees its first sample twice."""
    from vitdist import evaluate
    from vitdist.data.order import evaluation_ids
    from vitdist.data.reader import Bad, MicroBatch

    logits, labels = logits_and_labels(samples, classes)
    with dist.processes(1) as me:
        ids, _ = evaluation_ids(samples, me.rank, me.world, batch)
        if doubled and me.rank == me.world - 1:
            ids[1] = ids[0]
        batches = []
        for rows in torch.from_numpy(ids).split(batch):
            mask = (rows >= 0) & ~torch.isin(rows, torch.tensor(broken, dtype=torch.int64))
            bad = [Bad(row, "shard", str(row), "changed", "") for row in rows.tolist() if row in broken]
            batches.append(MicroBatch(torch.zeros(len(rows), 3, 1, 1), labels[rows], rows, mask, bad))
        try:
            return evaluate.evaluate(
                lambda images: images[:, 0, 0],
                batches,
                lambda each: logits[each.ids][:, None, None].expand(-1, 3, 1, -1),
                classes,
                samples,
                me,
                tta=tta,  # type: ignore[arg-type]
            )
        except (AssertionError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def fp16_norms(changes: dict[str, Any], count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each update in fp16."""
    allow_fp16_on_cpu()
    s = settings(**changes)
    with dist.processes(1) as me:
        engine, batch, _ = build(s, me)
        return [(update(engine, s, batch, me), engine.grad_norm) for _ in range(count)]


def bus() -> float | None:
    """The speed of an all-reduce."""
    with dist.processes(1) as me:
        return dist.bus_bandwidth(me)
