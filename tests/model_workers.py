"""What test ranks do with models: see ranks.py and workers.py."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests import workers
from vitdist import dist, model, optim
from vitdist.data.order import rank_slots


def trained_with_drop_path(changes: dict[str, Any], count: int) -> tuple[list[float], float, float]:
    """Losses of `count` updates; how far from the ranks' logits those of the finished model are, and how far those of
    a forward pass with dropped branches."""
    if changes.get("engine.precision") == "fp16":
        workers.allow_fp16_on_cpu()
    s = workers.settings(**changes)
    with dist.processes(1) as me:
        engine, batch, _ = workers.build(s, me)
        net = engine._engine.module
        paths = model.drop_paths(net)
        assert paths
        engine.train()
        losses = []
        for step in range(count):
            images, labels = workers.pictures(step, batch.global_batch)
            engine.set_lr(optim.schedule(step, 20, s.optim))
            parts: list[Tensor] = []
            for part in range(batch.accumulation):
                start, stop = rank_slots(step, part, me.rank, batch)
                paths.draw(s.train.seed, step, (start, stop), batch.global_batch)
                mine = slice(start - step * batch.global_batch, stop - step * batch.global_batch)
                logits = engine.forward(images[mine].to(engine.dtype)).float()
                loss = F.cross_entropy(logits, labels[mine])
                engine.backward(loss)
                engine.step()
                parts.append(loss.detach())
            losses.append(me.mean(float(torch.stack(parts).mean())))
        images, _ = workers.pictures(0, 8)
        with torch.no_grad():
            paths.draw(0, 0, (0, 8), 8)
            dropped = engine.forward(images.to(engine.dtype)).float()
            engine.eval()
            held = engine.forward(images.to(engine.dtype)).float()
            whole = model.finished(net, engine.full_weights(keep=True))
            away = float((whole(pixel_values=images).logits - held).abs().max())
            return losses, away, float((dropped - held).abs().max())
