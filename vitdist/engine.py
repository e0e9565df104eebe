"""The only file that knows DeepSpeed: precision, ZeRO, accumulation, clipping, one update.

DeepSpeed gets a ready torch optimizer and no scheduler: see optim.py.
"""

import logging
import math
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from vitdist.config import Batch, Config
from vitdist.dist import Processes

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Diverged(RuntimeError):
    """The gradients are beyond repair; raised on all ranks alike, before anything is updated."""


def choose_precision(asked: str, device: torch.device) -> str:
    """fp16, bf16 or fp32 for `engine.precision`. Raises ValueError if the device cannot."""
    if asked == "auto":
        # bf16 on a CPU was measured slower than fp32 for models that one trains there: docs/architecture.md.
        return "fp16" if device.type == "cuda" else "fp32"
    if asked == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("engine.precision fp16 needs a GPU; use auto, bf16 or fp32 on this machine")
    if asked == "bf16" and not get_accelerator().is_bf16_supported():
        raise ValueError("engine.precision bf16 is not supported by this device; use auto, fp16 or fp32")
    return asked


def deepspeed_config(settings: Config, batch: Batch, precision: str) -> dict[str, Any]:
    """What DeepSpeed is told; `precision` is one of fp16, bf16, fp32."""
    engine = settings.engine
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": settings.optim.clip,
        "zero_optimization": {"stage": engine.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if precision == "fp16":
        config["fp16"] = {
            "enabled": True,
            "initial_scale_power": engine.loss_scale_power,
            "loss_scale_window": engine.loss_scale_window,
            "hysteresis": engine.loss_scale_hysteresis,
        }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


class Engine:
    """A model under DeepSpeed. One update: `forward` and `backward` for each micro-batch, `step` after each."""

    def __init__(
        self,
        net: nn.Module,
        groups: list[dict[str, Any]],
        optimizer: torch.optim.Optimizer,
        settings: Config,
        batch: Batch,
        me: Processes,
    ) -> None:
        self.precision = choose_precision(settings.engine.precision, me.device)
        self.dtype = _DTYPES[self.precision]
        self.device = me.device
        # Kept here, not only in the optimizer's groups: loading a checkpoint overwrites those.
        self.scales = [group["lr_scale"] for group in groups]
        self.names = [group["name"] for group in groups]
        deepspeed_logger.setLevel(logging.WARNING)
        # DeepSpeed probes all its optional operators with a compiler (7 s) to find whether it can compile a
        # shared-memory all-reduce for CPUs (50 s more), which only its inference calls. None is needed here.
        deepspeed.ops.__compatible_ops__ = {}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=deepspeed_config(settings, batch, self.precision)
        )
        assert len(self._optimizer.param_groups) == len(self.scales), "DeepSpeed dropped a parameter group"
        # In fp32 without ZeRO, DeepSpeed clips but does not tell the norm.
        self._plain = settings.engine.zero == 0 and self.precision == "fp32"
        self._norm = 0.0
        if settings.engine.compile:
            self._engine.compile()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of normalised images [B, 3, S, S] in `self.dtype`."""
        return self._engine(pixel_values=images).logits

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro-batch's mean loss; DeepSpeed divides by the accumulation."""
        self._engine.backward(loss)

    def step(self) -> None:
        """After the last micro-batch: reduce, clip, update or skip. Before it: nothing but counting."""
        if self._plain and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._norm):  # every other engine of DeepSpeed skips such an update by itself
                raise Diverged("the gradients are not finite")
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise Diverged("the gradients overflow in fp16 even at the smallest loss scale") from None
            raise

    def set_lr(self, lr: float) -> None:
        """Give each group `lr` x its scale."""
        for group, scale in zip(self._optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale

    def lrs(self) -> dict[str, float]:
        """Learning rate of each group by its name."""
        return {name: group["lr"] for name, group in zip(self.names, self._optimizer.param_groups, strict=True)}

    def weight_decays(self) -> dict[str, float]:
        return {n: g["weight_decay"] for n, g in zip(self.names, self._optimizer.param_groups, strict=True)}

    @property
    def steps(self) -> int:
        """Updates tried, skipped ones included: the place in the data."""
        return int(self._engine.global_steps)

    @property
    def skipped(self) -> int:
        """Updates skipped for an overflow: the schedule does not count them."""
        return int(self._engine.skipped_steps)

    @property
    def loss_scale(self) -> float:
        """The factor on fp16 losses; 1 in other precisions."""
        return float(getattr(self._optimizer, "cur_scale", 1.0)) if self.precision == "fp16" else 1.0

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient of the last update over all ranks, before clipping."""
        norm = self._norm if self._plain else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def full_weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """Whole fp32 weights by name on the CPU; all ranks call it, those that `keep` get them.

        From the masters; in half precision without ZeRO, where DeepSpeed does not link them, from the weights.
        """
        weights = {}
        for name, parameter in self._engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)  # gathers it from the ranks
            if keep:
                weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        for name, buffer in self._engine.module.named_buffers():
            if keep:
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def save(self, folder: Path, tag: str) -> None:
        """Write weights and optimizer into folder/tag; all ranks call it."""
        # DeepSpeed would publish `latest` before the other ranks have written.
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Take weights, optimizer, loss scale and counters from folder/tag; all ranks call it."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise ValueError(f"{folder / tag}: DeepSpeed found no checkpoint")
