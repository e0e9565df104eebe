"""A learning rate per layer, weight decay where it belongs, the optimizers, and the schedule in closed form.

Layer-wise decay after BEiT (Bao et al. 2021) and MAE (He et al. 2021): the layer with number i of
L+1 gets lr x layer_decay^(L+1-i). The loop sets lr = schedule(step) x scale itself before each
update, so that no scheduler of a library and no checkpoint can flatten the groups to one rate
(DeepSpeed's WarmupDecayLR does, and so does its ZeRO-3 universal checkpoint).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vitdist.config import Optim

# Tokens and positions are no weights of a linear map; timm decays none of them. BEiT's own code decays its table of
# relative positions and DINOv2's its tokens and positions: the two that differ.
_TOKENS = (
    "cls_token",
    "mask_token",
    "distillation_token",
    "register_tokens",
    "position_embeddings",
    "relative_position_bias_table",
)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to weights with two or more dimensions that are no token or position.

    So not to norms, LayerScale's gammas (1-D) and biases; to LoRA's adapters, which are matrices, yes.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and name.rpartition(".")[2] not in _TOKENS


def groups(
    net: nn.Module, layer: Mapping[str, int], depth: int, settings: Optim, name_of: Callable[[int, int], str]
) -> list[dict[str, Any]]:
    """Parameter groups for torch optimizers, ordered by layer, decayed before undecayed; none is empty.

    Each has params, names, name, lr_scale, lr and weight_decay. Frozen parameters are in none
    (an empty group breaks torch's schedulers under DeepSpeed).
    """
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            members.setdefault((layer[name], not decays(name, parameter)), []).append((name, parameter))
    made = []
    for (number, bare), pairs in sorted(members.items()):
        scale = settings.layer_decay ** (depth + 1 - number)
        made.append(
            {
                "name": name_of(number, depth) + ("_no_decay" if bare else ""),
                "params": [p for _, p in pairs],
                "names": [n for n, _ in pairs],
                "lr_scale": scale,
                "lr": settings.lr * scale,
                "weight_decay": 0.0 if bare else settings.weight_decay,
            }
        )
    return made


def schedule(step: int, total: int, settings: Optim, steps_per_epoch: float = 1.0) -> float:
    """Learning rate of the head for update number `step` (0-based) of `total`.

    Warm-up: lr (step+1)/warmup steps, so that the first update already moves. Then, with progress p
    from 0 at the first update at the peak to 1 at the last one: cosine lr (m + (1-m)(1+cos(pi p))/2),
    linear lr (1-(1-m)p), constant lr, where m is min_lr. wsd is linear in the last `fall` of the run.

    By epoch, an update has the progress of the first update that its pass over the data begins with, and p = 1 is
    where the next pass would begin: the last pass keeps the rate that it begins with, above m.
    """
    warmup = round(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    now, end = step, total - 1
    if settings.schedule_by == "epoch":
        # Less what the product may be rounded up by: a pass must not begin after its first update.
        now, end = math.ceil(math.floor(step / steps_per_epoch) * steps_per_epoch - 1e-6), total
    begin = max(warmup, end - round(settings.fall * total)) if settings.schedule == "wsd" else warmup
    p = min(1.0, max(0, now - begin) / max(1, end - begin))
    floor = settings.min_lr
    if settings.schedule == "cosine":
        return settings.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * p)) / 2)
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * (1 - (1 - floor) * p)


def optimizer(param_groups: list[dict[str, Any]], settings: Optim, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, SGD with Nesterov momentum, or Lion (timm's) over `groups`.

    All three work element by element, so that ZeRO may cut and join their tensors as it likes. LAMB and LARS do not:
    they need the norm of each whole tensor, and ZeRO 1 to 3 hold flat pieces of several.
    Fused on a GPU where torch has it: one kernel for each group, of which ViT-L has 52.
    """
    of_torch = [{k: v for k, v in group.items() if k not in ("names", "name")} for group in param_groups]
    fused = device.type == "cuda"  # on a CPU it works too, with other bits
    if settings.name == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(of_torch, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if settings.name == "lion":
        from timm.optim import Lion  # it brings torchvision: 3 s

        return Lion(of_torch, betas=settings.betas or (0.9, 0.99))
    return torch.optim.AdamW(of_torch, betas=settings.betas or (0.9, 0.999), eps=settings.eps, fused=fused)


def without_compiler() -> None:
    """Have torch's optimizers do without its compiler, in a process that compiles nothing: loading it costs 2 s a rank.

    Some of their methods must not be traced, and a step breaks the graph of what is: to say so, both load the compiler
    at their first call. What they wrap is called by itself here (torch 2.15); where a version wraps otherwise, the
    compiler is loaded after all.
    """
    for method in vars(torch.optim.Optimizer).values():
        function = getattr(method, "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            setattr(function, "__dynamo_disable", function)  # where torch/_compile.py keeps it after the first call
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        step = getattr(kind.step, "__wrapped__", None)
        if step is not None:
            kind.step = torch.no_grad()(step)  # as the wrapper does, unless `differentiable` is asked for


def describe(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as a record: name, lr_scale, weight_decay, number of tensors and of parameters."""
    return [
        {key: group[key] for key in ("name", "lr_scale", "weight_decay")}
        | {"tensors": len(group["params"]), "parameters": sum(p.numel() for p in group["params"])}
        for group in param_groups
    ]
