"""What test ranks measure of DeepSpeed's real buffers and collectives: see ranks.py and workers.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tests import workers
from vitdist import dist
from vitdist.engine import Engine
from vitdist.rundir import RunDir


def _bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Of the storages that are not in `seen`, which they then are."""
    total = 0
    for tensor in tensors:
        storage = None if tensor is None else tensor.untyped_storage()
        if storage is not None and storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _gradients(engine: Engine) -> list[Tensor | None]:
    """What an update begins with."""
    optimizer, parameters = engine._optimizer, list(engine._engine.module.parameters())
    if engine._zero == 3:
        return [optimizer.grad_partitions_flat_buffer]
    if engine._zero:
        return [g for group in optimizer.averaged_gradients.values() for g in group or []]
    return [p.grad for p in parameters]


def _buckets(engine: Engine) -> list[Tensor | None]:
    held = getattr(engine._optimizer, "ipg_buckets", {}).values() if engine._zero else []
    return [b for bucket in held for b in (bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer])]


def held(changes: dict[str, Any], folder: str | None = None) -> dict[str, Any]:
    """Bytes of the real storages in the second update: of each part, of buckets, of gathered weights; `saved` files."""
    s = workers.settings(**changes)
    if s.engine.precision == "fp16":
        workers.allow_fp16_on_cpu()
    with dist.processes(1) as me:
        engine, batch, identity = workers.build(s, me)
        images, labels = workers.pictures(0, batch.global_batch)
        images = F.interpolate(images, size=s.model.image_size)
        parameters = list(engine._engine.module.parameters())
        found: dict[str, int] = {"buckets": 0, "gathered": 0}
        for part in range(2 * batch.accumulation):
            loss = F.cross_entropy(
                engine.forward(images[: batch.micro_batch].to(engine.dtype)).float(), labels[: batch.micro_batch]
            )
            if part and engine._zero == 3:
                own = {p.ds_tensor.untyped_storage().data_ptr() for p in parameters}
                found["gathered"] = _bytes([p.data for p in parameters], own)
            sizes: list[int] = []
            last = next(p for p in parameters if p.requires_grad)  # whose gradient comes last
            hook = last.register_hook(lambda _, into=sizes: into.append(_bytes(_buckets(engine), set())))
            engine.backward(loss)
            hook.remove()
            found["buckets"] = max(found["buckets"], *sizes, _bytes(_buckets(engine), set()))
            gradients = _bytes(_gradients(engine), set())
            engine.step()
        weights = [p.ds_tensor for p in parameters] if engine._zero == 3 else parameters
        seen: set[int] = set()
        found["weights"] = _bytes(weights, seen)
        found["gradients"] = gradients
        found["masters"] = _bytes(engine._masters(), seen)
        found["moments"] = _bytes((v for state in engine._base.state.values() for v in state.values()), seen)
        found["average"] = _bytes(engine._averages, seen)
        if engine._zero == 3:
            found["kept"] = _bytes([p.data for p in parameters], seen)
        if folder:
            run = RunDir(Path(folder))
            workers.save(run, engine, me, identity)
        return found
