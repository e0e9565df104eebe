"""The only file that knows DeepSpeed: precision, ZeRO, accumulation, clipping, one update, the average of the weights.

    engine = Engine(net, groups, optimizer, settings, batch, me)
    engine.backward(loss(engine.forward(images))); engine.step()
    with engine.averaged():
        weights = engine.full_weights(keep=me.first)

DeepSpeed gets a ready torch optimizer and no scheduler: see optim.py.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from vitdist.config import Batch, Config, Optim
from vitdist.dist import Processes

# The numbers of DeepSpeed's loss scalers that change while training; without ZeRO there is no hysteresis.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Piece(NamedTuple):
    """A part of a parameter, or of what belongs to it."""

    offset: int
    """Where it begins in the flattened parameter."""
    values: torch.Tensor
    """[n] values from there."""


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
        # It asks whether the optimizer is its own Muon, and importing that loads all of torch's compiler (2 s a rank).
        for module, name in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
            stand_in = ModuleType(f"deepspeed.runtime.zero.muon.{module}")
            setattr(stand_in, name, type(name, (), {}))  # which no optimizer is
            sys.modules.setdefault(stand_in.__name__, stand_in)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=deepspeed_config(settings, batch, precision)
        )
        assert len(self._optimizer.param_groups) == len(self.scales), "DeepSpeed dropped a parameter group"
        # Inside DeepSpeed's wrapper, where there is one; its states are those of the masters.
        self._base: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        self._half_without_zero = hasattr(self._optimizer, "fp32_groups")
        if self._half_without_zero:
            # To make room for its states DeepSpeed has taken a step without gradients: Adam counts it, weight decay
            # was applied, and SGD's momentum holds it. The other wrappers do not.
            self._optimizer.refresh_fp32_params()
            self._optimizer.state.clear()
        # In fp32 without ZeRO, DeepSpeed clips but does not tell the norm.
        self._plain = engine.zero == 0 and self.dtype == torch.float32
        self._norm, self._norm_factor = 0.0, 1.0
        self._averages = [master.detach().clone() for master in self._masters()] if settings.optim.ema else []
        self._averages_are_in = False
        if engine.compile:
            self._engine.compile()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of normalised images [B, 3, S, S] in `self.dtype`."""
        return self._engine(pixel_values=images).logits

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro-batch's mean loss; DeepSpeed divides by the accumulation.

        A loss that is not finite makes every gradient NaN: reduced over the ranks, it has all of them skip the update
        alike, without another collective.
        """
        # 0 where the loss is finite, else NaN; nothing waits for the device.
        factor = 1 + (loss - loss).detach()
        if self._half_without_zero and self.precision == "fp16":
            # DeepSpeed 0.19.8 divides these gradients by the loss scale without having multiplied the loss by it:
            # clipping never bites, and SGD's updates are 65,536 times too small.
            factor = factor * self.loss_scale
        self._engine.backward(loss * factor)

    def step(self) -> None:
        """After the last micro-batch: reduce, clip, update or skip, average. Before it: nothing but counting."""
        assert not self._averages_are_in, "the weights are the averages: not to be trained"
        if self._plain and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._norm):
                self._skip()
                return
        if self._half_without_zero and self._engine.is_gradient_accumulation_boundary():
            self._norm_factor = self.loss_scale  # DeepSpeed tells the norm of the scaled gradients there
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

    def _skip(self) -> None:
        """Every other engine of DeepSpeed skips an update that is not finite by itself; this one would apply it."""
        engine = self._engine
        engine.zero_grad()
        engine.losses = None
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1
        engine.global_samples += engine.train_batch_size()

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
        return float(self._scaler().cur_scale) if self.precision == "fp16" else 1.0

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient of the last update over all ranks, before clipping."""
        norm = self._norm if self._plain else self._engine.get_global_grad_norm()
        return float(norm) / self._norm_factor if norm is not None else 0.0

    @property
    def replicated(self) -> bool:
        """Whether each rank holds all of the state."""
        return self._zero == 0

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
        self._compute_with_masters()
        self._averages_are_in = not self._averages_are_in

    def _compute_with_masters(self) -> None:
        """The weights that the model computes with are copies of the masters, but for fp32 without ZeRO: renew them."""
        optimizer = self._optimizer
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

    def _masters(self) -> list[torch.Tensor]:
        """The fp32 weights that the optimizer of this rank updates: flat pieces under ZeRO, else parameters."""
        if self._zero == 3:  # which shows them in no group between its steps
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]

    def _fragments(self, masters: list[torch.Tensor]) -> dict[str, Piece]:
        """What this rank holds of each trained parameter.

        Views of `masters`, or of tensors of the same layout. No rank holds padding; without ZeRO each holds all.
        """
        if self._zero == 0:
            names = [name for group in self._members for name in group]
            return {name: Piece(0, whole.detach().view(-1)) for name, whole in zip(names, masters, strict=True)}
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
                found[name] = Piece(offset, masters[number].detach().narrow(0, begin, size))
        return found

    def full_weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """Whole fp32 weights by name on the CPU; all ranks call it, those that `keep` get them.

        From the masters; frozen parameters, which have none, as the model holds them (rounded to half precision).
        """
        weights = {}
        whole = self._fragments(self._masters()) if self._zero == 0 else {}
        for name, parameter in self._engine.module.named_parameters():
            # Under ZeRO it is gathered from the ranks; a frozen parameter is not known to the optimizer.
            full = whole[name].values.view_as(parameter) if name in whole else safe_get_full_fp32_param(parameter)
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero == 3 and full is None):
                if keep:
                    weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        for name, buffer in self._engine.module.named_buffers():
            if keep:
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def pieces(self, everywhere: bool = False) -> dict[str, Piece]:
        """What this rank holds of the state of training, by `kind/parameter`: live views, to be copied or filled.

        Kinds: master (the fp32 weights), average, what the optimizer keeps of each weight (exp_avg, exp_avg_sq,
        momentum_buffer), frozen (as the model holds it), buffer. Over all ranks they are whole; without ZeRO each rank
        has all of it. Of what is alike on all ranks, rank 0 alone tells, unless `everywhere`, to fill it.
        """
        tells = self.replicated or everywhere or self._rank == 0
        assert not self._averages_are_in, "the weights are the averages: not to be taken for weights"
        kinds = {"master": self._masters(), **self._optimizer_states()}
        if self._averages:
            kinds["average"] = self._averages
        found = {}
        for kind, tensors in kinds.items():
            for name, piece in self._fragments(tensors).items():
                found[f"{kind}/{name}"] = piece
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad and (part := self._frozen(parameter, tells)):
                found[f"frozen/{name}"] = part
        for name, buffer in self._engine.module.named_buffers():
            if tells:
                found[f"buffer/{name}"] = Piece(0, buffer.detach().view(-1))
        return found

    def counters(self) -> dict[str, Any]:
        """The numbers of the state of training, the same on all ranks."""
        scaler = self._scaler()
        states = self._base.state
        numbers = {
            name: float(value)
            for state in (states[master] for master in self._masters() if master in states)
            for name, value in state.items()
            if value is not None and not (torch.is_tensor(value) and value.ndim)
        }
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "optimizer": numbers,
            "loss_scaler": {
                # In bf16 without ZeRO it has numbers of no use, None among them.
                name: value
                for name in _SCALER
                if isinstance(value := getattr(scaler, name, None), int | float)
            },
        }

    @torch.no_grad()
    def restore(
        self, kinds: set[str], fill: Callable[[dict[str, Piece]], None], counters: dict[str, Any], precision: str
    ) -> None:
        """Take a state of training: `fill` writes into the views it is given. All ranks call it.

        `kinds`: the optimizer's kinds that were saved; `precision`: in which it was. Where the state came from another
        number of ranks, stage or precision makes no difference: every group keeps its own rate, decay and steps.
        """
        states = self._base.state
        for group, masters in zip(self._base.param_groups, self._masters_by_group(), strict=True):
            on_device = group.get("fused") or group.get("capturable")  # where torch.optim keeps its step counts
            for master in masters:
                states[master] = {kind: torch.zeros_like(master) for kind in sorted(kinds)} | {
                    name: torch.tensor(value, device=master.device if on_device else "cpu")
                    for name, value in counters["optimizer"].items()
                }
        if self._zero == 3:
            self._optimizer._partition_all_parameters()
        fill(self.pieces(everywhere=True))
        self._compute_with_masters()
        engine, scaler = self._engine, self._scaler()
        engine.global_steps, engine.skipped_steps = counters["steps"], counters["skipped"]
        engine.micro_steps = counters["steps"] * engine.gradient_accumulation_steps()
        engine.global_samples = counters["steps"] * engine.train_batch_size()
        if precision == self.precision == "fp16":  # one of another precision would scale what was not scaled
            for name, value in counters["loss_scaler"].items():
                if hasattr(scaler, name):
                    setattr(scaler, name, value)

    def _optimizer_states(self) -> dict[str, list[torch.Tensor]]:
        """Tensors that the optimizer keeps, kind -> one for each master; {} before the first update."""
        masters = self._masters()
        states = [self._base.state.get(master, {}) for master in masters]
        kinds = {kind for state in states for kind, value in state.items() if torch.is_tensor(value) and value.ndim}
        # Without ZeRO a weight that takes no part in the forward pass has no state: zeros, as where it lies in a piece.
        return {
            kind: [
                torch.zeros_like(master) if (value := state.get(kind)) is None else value
                for state, master in zip(states, masters, strict=True)
            ]
            for kind in sorted(kinds)
        }

    def _masters_by_group(self) -> list[list[torch.Tensor]]:
        """The masters of each of the optimizer's groups."""
        if self._zero != 3:
            return [list(group["params"]) for group in self._base.param_groups]
        groups: list[list[torch.Tensor]] = [[] for _ in self._base.param_groups]
        for number, master in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            groups[self._optimizer.sub_group_to_group_id[number]].append(master)
        return groups

    def _scaler(self) -> Any:
        """What holds the loss scale: its class depends on the stage."""
        optimizer = self._optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)

    def _frozen(self, parameter: nn.Parameter, tells: bool) -> Piece | None:
        if self._zero != 3:
            return Piece(0, parameter.detach().view(-1)) if tells else None
        held = parameter.ds_tensor
        offset = self._rank * held.ds_numel
        size = min(held.ds_numel, parameter.ds_numel - offset)
        return Piece(offset, held.detach().view(-1)[:size]) if size > 0 else None
