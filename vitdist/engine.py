"""The only file that knows DeepSpeed: precision, ZeRO, accumulation, clipping, one update, the average of the weights.

    engine = Engine(net, groups, optimizer, settings, batch, me)
    engine.backward(loss(engine.forward(images))); engine.step()
    with engine.averaged():
        weights = engine.full_weights(keep=me.first)

DeepSpeed gets a ready torch optimizer and no scheduler: see optim.py.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from vitdist.config import Batch, Config, Optim
from vitdist.dist import Processes

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Diverged(RuntimeError):
    """The gradients are beyond repair; raised on all ranks alike, before anything is updated."""


def choose_precision(asked: str, device: torch.device, autocast: bool = False) -> str:
    """fp16, bf16 or fp32 for `engine.precision`; with `autocast` bf16. Raises ValueError if the device cannot.

    fp16 under autocast is refused: DeepSpeed 0.19 then clips the gradients before torch's GradScaler unscales them (a
    norm of 70,490 was told and clipped instead of 1.08), and skips an overflow without a word to it, so that its scale
    never falls.
    """
    if autocast and asked not in ("auto", "bf16"):
        raise ValueError(
            f"engine.autocast multiplies in bf16 only, not in {asked}: use engine.precision=bf16, or autocast=false"
        )
    if autocast:
        asked = "bf16"
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
    if engine.autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16"}[precision]}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def average_decay(update: int, settings: Optim) -> float:
    """What the average keeps of itself at applied update number `update` (0-based); the rest are the new weights.

    `ema`, and with `ema_warmup` at first (1 + update) / (10 + update), as TensorFlow's ExponentialMovingAverage has it.
    """
    return min(settings.ema, (1 + update) / (10 + update)) if settings.ema_warmup else settings.ema


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
        engine = settings.engine
        precision = choose_precision(engine.precision, me.device, engine.autocast)
        self.precision = f"{precision} autocast" if engine.autocast else precision
        # Under autocast weights and input stay fp32; torch casts what it multiplies.
        self.dtype = torch.float32 if engine.autocast else _DTYPES[precision]
        self.device = me.device
        # Kept here, not only in the optimizer's groups: loading a checkpoint overwrites those.
        self.scales = [group["lr_scale"] for group in groups]
        self.names = [group["name"] for group in groups]
        self._members = [list(group["names"]) for group in groups]
        self._zero, self._rank, self._optim = engine.zero, me.rank, settings.optim
        deepspeed_logger.setLevel(logging.WARNING)
        # DeepSpeed probes all its optional operators with a compiler (7 s) to find whether it can compile a
        # shared-memory all-reduce for CPUs (50 s more), which only its inference calls. None is needed here.
        deepspeed.ops.__compatible_ops__ = {}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=deepspeed_config(settings, batch, precision)
        )
        assert len(self._optimizer.param_groups) == len(self.scales), "DeepSpeed dropped a parameter group"
        self._half_without_zero = hasattr(self._optimizer, "fp32_groups")
        if self._half_without_zero:
            # To make room for its states DeepSpeed has taken a step without gradients: Adam counts it, weight decay
            # was applied, and SGD's momentum holds it. The other wrappers do not.
            self._optimizer.refresh_fp32_params()
            self._optimizer.state.clear()
        # In fp32 without ZeRO, DeepSpeed clips but does not tell the norm.
        self._plain = engine.zero == 0 and self.dtype == torch.float32
        self._norm = 0.0
        self._averages = [master.detach().clone() for master in self._masters()] if settings.optim.ema else []
        self._averages_are_in = False
        if engine.compile:
            self._engine.compile()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of normalised images [B, 3, S, S] in `self.dtype`."""
        return self._engine(pixel_values=images).logits

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro-batch's mean loss; DeepSpeed divides by the accumulation."""
        self._engine.backward(loss)

    def step(self) -> None:
        """After the last micro-batch: reduce, clip, update or skip, average. Before it: nothing but counting."""
        assert not self._averages_are_in, "the weights are the averages: not to be trained"
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
        if self._averages and self._engine.was_step_applied():
            decay = average_decay(self.steps - self.skipped - 1, self._optim)
            with torch.no_grad():
                torch._foreach_lerp_(self._averages, self._masters(), 1 - decay)

    def set_lr(self, lr: float) -> None:
        """Give each group `lr` x its scale."""
        for group, scale in zip(self._optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale

    def lrs(self) -> dict[str, float]:
        """Learning rate of each group by its name."""
        return {name: group["lr"] for name, group in zip(self.names, self._optimizer.param_groups, strict=True)}

    def weight_decays(self) -> dict[str, float]:
        """Weight decay of each group by its name."""
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

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights, if optim.ema asks for an average; all ranks enter and leave.

        Masters and averages change places, so that no third copy is needed, and back, bit for bit. Not after an
        exception: it ends the run, and the ranks that did not raise would not come to gather.
        """
        if not self._averages:
            yield
            return
        self._exchange()
        yield
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        optimizer = self._optimizer
        if self._zero == 3:
            optimizer._partition_all_parameters()
        for master, average in zip(self._masters(), self._averages, strict=True):
            held = master.clone()  # of one group: a 26th or so of the model
            master.copy_(average)
            average.copy_(held)
        # The weights that the model computes with are copies of the masters, but for fp32 without ZeRO.
        if self._zero == 3:  # as at the end of its step
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._zero:
            optimizer.update_lp_params()
        elif self._half_without_zero:
            for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_(halves, masters)
        self._averages_are_in = not self._averages_are_in

    def _masters(self) -> list[torch.Tensor]:
        """The fp32 weights that the optimizer of this rank updates: flat pieces under ZeRO, else parameters."""
        if self._zero == 3:  # which shows them in no group between its steps
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]

    def _fragments(self, masters: list[torch.Tensor]) -> dict[str, tuple[int, torch.Tensor]]:
        """What this rank holds of each trained parameter: name -> (offset in the flat parameter, flat values).

        Views of `masters`, or of tensors of the same layout. No rank holds padding; without ZeRO each holds all.
        """
        if self._zero == 0:
            names = [name for group in self._members for name in group]
            return {name: (0, whole.view(-1)) for name, whole in zip(names, masters, strict=True)}
        found = {}
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._zero == 3:
                number, begin, size = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                offset = self._rank * size
                size = min(size, parameter.ds_numel - offset)
            elif parameter._hp_mapping is None:  # all of it is on other ranks
                continue
            else:
                held, number = parameter._hp_mapping, parameter._hp_mapping.param_group_index
                offset = held.lp_fragment_address.start
                begin, size = held.hp_fragment_address.start, held.hp_fragment_address.numel
            if size > 0:
                found[name] = offset, masters[number].narrow(0, begin, size)
        return found

    def full_weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """Whole fp32 weights by name on the CPU; all ranks call it, those that `keep` get them.

        From the masters; frozen parameters, which have none, as the model holds them (rounded to half precision).
        """
        weights = {}
        whole = self._fragments(self._masters()) if self._zero == 0 else {}
        for name, parameter in self._engine.module.named_parameters():
            # Under ZeRO it is gathered from the ranks; a frozen parameter is not known to the optimizer.
            full = whole[name][1].view_as(parameter) if name in whole else safe_get_full_fp32_param(parameter)
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero == 3 and full is None):
                if keep:
                    weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        for name, buffer in self._engine.module.named_buffers():
            if keep:
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def save(self, folder: Path, tag: str) -> None:
        """Write weights, optimizer and averages into folder/tag; all ranks call it."""
        assert not self._averages_are_in, "the weights are the averages: not to be saved as weights"
        # DeepSpeed would publish `latest` before the other ranks have written.
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if self._averages and (self._zero or self._rank == 0):
            # Views of a few flat tensors: torch.save writes each of those once.
            torch.save(self._fragments(self._averages), folder / tag / f"average-{self._rank}.pt")

    def load(self, folder: Path, tag: str) -> None:
        """Take weights, optimizer, averages, loss scale and counters from folder/tag; all ranks call it."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise ValueError(f"{folder / tag}: DeepSpeed found no checkpoint")
        files = sorted((folder / tag).glob("average-*.pt"))
        if bool(files) != bool(self._averages):
            raise ValueError(
                f"{folder / tag} has {'an' if files else 'no'} average of the weights, and optim.ema is "
                f"{self._optim.ema}: use the setting that the run began with, or another run name"
            )
        if files:
            self._load_averages(files)

    def _load_averages(self, files: list[Path]) -> None:
        """Put the fragments together that other ranks, or as many as there were, have written."""
        mine = self._fragments(self._averages)
        left = {name: values.numel() for name, (_, values) in mine.items()}
        for file in files:
            # Mapped: what other ranks need is not read.
            saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            for name in mine.keys() & saved.keys():
                (offset, values), (saved_offset, saved_values) = mine[name], saved[name]
                begin = max(offset, saved_offset)
                end = min(offset + len(values), saved_offset + len(saved_values))
                if begin < end:
                    values[begin - offset : end - offset].copy_(saved_values[begin - saved_offset : end - saved_offset])
                    left[name] -= end - begin
        lost = [name for name, count in left.items() if count]
        if lost:
            raise ValueError(f"{files[0].parent}: the average of {lost[0]} is not all there ({len(lost)} such)")
