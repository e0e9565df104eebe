"""Every setting of a run: typed, bounded, explained under its field. Imports no torch.

    settings = config.load("configs/demo.yaml", ["optim.lr=3e-4"])

Rules: 1. the defaults below, 2. the YAML file over them, 3. dotted overrides over both.
What a run really used stands in its folder as `config.yaml`.
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
import os
import re
import stat
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SettingsError(ValueError):
    """Settings that cannot be used. The text names every fault, one a line, and the way out."""


class Section(BaseModel):
    """A group of settings: unknown names are refused, values are never coerced or changed later."""

    # Validators are built at the first use, and one for all of Config: 0.1 s of each command else (2026-11-24).
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, allow_inf_nan=False)


def _idle(section: Section, names: Iterable[str], needs: str) -> None:
    """Raises ValueError for a setting that is not at its default and does nothing without another one."""
    for name in names:
        if getattr(section, name) != type(section).model_fields[name].default:
            raise ValueError(f"{name} does nothing without {needs}")


Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has no tuples: a list of exactly two (three) numbers is taken for one.
Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1e6)]

WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Endings of files of weights, as against folders and ids."""


# timm itself passes over sections that it does not know: rand-m9-strong and rand-tstrong would be taken.
_N, _COUNT = r"\d+(?:\.\d+)?", r"[1-9]"
_RAND = rf"rand(?:-(?:m\d+|n{_COUNT}|p(?:0(?:\.\d+)?|1(?:\.0+)?)|mstd{_N}|mmax[1-9]\d*|inc[01]|t(?:weights|3aw?)))*"
_AUGMIX = rf"augmix(?:-(?:m\d+|w{_COUNT}|d{_COUNT}|a(?=[\d.]*[1-9]){_N}|b[01]|mstd{_N}))*"
_AUTO = rf"(?:v0r?|originalr?|3a)(?:-mstd{_N})?"
_AUTO_AUGMENT = re.compile(rf"none|trivial|{_RAND}|{_AUGMIX}|{_AUTO}")
_AUTO_AUGMENTS = (
    "none, trivial, rand (with -m9 -n2 -p0.5 -mstd0.5 -mmax10 -inc1 -tweights|t3a|t3aw), "
    "augmix (with -m3 -w3 -d2 -a1 -b1 -mstd0.5), v0, v0r, original, originalr, 3a (with -mstd0.5)"
)


class Data(Section):
    train: str | Annotated[dict[str, Share], Field(min_length=1)]
    """Folder or URL of indexed training shards (made by `vitdist pack`); several as {folder: share of the batches}.
    stream:URLS.tar reads shards without an index in webdataset's way: no exact order, no exact resume."""
    val: str
    """Folder or URL of indexed validation shards with the same classes."""
    class_shares: Literal["natural", "sqrt", "balanced"] | dict[str, Share] = "natural"
    """How often each class comes. natural: as in the data; balanced: all alike; sqrt: by the root of their number.
    Or {class: share, ...} in relation to each other; classes not named have 1."""
    workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """Loader processes for each rank; 0 loads in the rank itself. auto: 0 on a CPU, else its cores, at most 8."""
    crop_scale: Pair = (0.08, 1.0)
    """Share of the picture's area that a random resized crop keeps (Inception's 0.08 to 1)."""
    crop_ratio: Pair = (3 / 4, 4 / 3)
    """Width to height of a random resized crop."""
    flip: Fraction = 0.5
    """Chance of a horizontal flip. 0 where left and right differ (digits, text)."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the central crop over the resized short side in evaluation (224/256)."""
    mean: Triple | None = None
    """Mean of each channel, pixels in 0 to 1. Default: what the checkpoint's folder says; 0.5 from scratch; must be
    given for a file of weights, which does not tell (ImageNet's 0.485, 0.456, 0.406 in DeiT, MAE, DINO)."""
    std: Triple | None = None
    """Standard deviation of each channel, pixels in 0 to 1; default as for `mean` (ImageNet: 0.229, 0.224, 0.225)."""
    auto_augment: str = "none"
    """none; trivial (TrivialAugment); or in timm's notation: rand-m9-mstd0.5-inc1 (RandAugment as in MAE, BEiT, DeiT),
    3a (DeiT III), augmix-m5-w4, original."""
    colour_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation are each changed by a factor of 1 +- at most this (0.3 in DeiT III)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of Beta(alpha, alpha), from which mixup draws the share of each of two pictures (0.8 in DeiT); 0: off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """The same for the area that cutmix cuts from the partner (1.0 in DeiT); with mixup too, each pair draws which."""
    mix_chance: Fraction = 1.0
    """Chance of a pair to be mixed at all, where mixup or cutmix is on."""
    mix_by: Literal["pair", "batch"] = "pair"
    """What draws its own kind and share of mixing: each pair of samples, or one draw for the whole global batch."""
    erase: Fraction = 0.0
    """Chance of a rectangle, 0.02 to 0.33 of the picture, to be erased (0.25 in DeiT)."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """gpu: JPEGs are decoded and cropped on the GPU (torchcodec, nvJPEG); loader processes only read."""
    max_bad: Fraction = 0.001
    """Share of the training samples that may be broken before the run ends; one always may, unless it is 0."""
    cache: str | None = None
    """Folder on a disk of the node that keeps what was read of remote (or slow) shards, for all ranks of the node."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Most that `cache` holds, in 10^9 bytes; what was not used longest goes first."""
    stream_samples: Annotated[int, Field(ge=1)] | None = None
    """stream: the number of samples that count as one epoch."""
    allow_pipe: bool = False
    """stream: allow pipe:COMMAND as a shard. It runs on every node: only for settings that you trust."""

    @property
    def train_sets(self) -> dict[str, float]:
        """Folder or URL of each indexed training set, and its share of the batches."""
        return {self.train: 1.0} if isinstance(self.train, str) else self.train

    @property
    def stream(self) -> str | None:
        """The shards to be read without an index, if the training set is such."""
        prefix = "stream:"
        return self.train[len(prefix) :] if isinstance(self.train, str) and self.train.startswith(prefix) else None

    @model_validator(mode="after")
    def _streams(self) -> "Data":
        if any(name.startswith("stream:") for name in self.train_sets) and self.stream is None:
            raise ValueError("train: a stream: cannot be mixed with other sets; index its shards with `vitdist index`")
        if (self.stream is None) != (self.stream_samples is None):
            raise ValueError("stream_samples: give it with train=stream:..., and only then")
        if self.stream and self.class_shares != "natural":
            raise ValueError("class_shares: a stream: has no index to choose by; index its shards with `vitdist index`")
        if not any(self.train_sets.values()):
            raise ValueError("train: one of the sets must have a share above 0")
        return self

    @model_validator(mode="after")
    def _augmentation(self) -> "Data":
        if not (self.mixup or self.cutmix):
            _idle(self, ("mix_chance", "mix_by"), "data.mixup or data.cutmix")
        if not _AUTO_AUGMENT.fullmatch(self.auto_augment):
            raise ValueError(f"auto_augment {self.auto_augment!r} is not known; there are: {_AUTO_AUGMENTS}")
        if self.decode == "gpu" and (self.auto_augment != "none" or self.colour_jitter):
            raise ValueError(
                "data.auto_augment and data.colour_jitter work on pixels in loader processes, which data.decode=gpu "
                "does not make there: use data.decode=cpu, or set them to none and 0"
            )
        return self

    @model_validator(mode="after")
    def _ranges(self) -> "Data":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two rising numbers above 0, not [{low}, {high}]")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is a share of the picture: at most 1, not {self.crop_scale[1]}")
        if self.std and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both data.mean and data.std, or neither")
        return self


class Scratch(Section):
    """The shape of a ViT that starts from random weights."""

    patch_size: Annotated[int, Field(ge=1)] = 16
    width: Annotated[int, Field(ge=1)] = 192
    """Hidden size."""
    depth: Annotated[int, Field(ge=1, le=200)] = 12
    """Number of blocks."""
    heads: Annotated[int, Field(ge=1)] = 3
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0

    @model_validator(mode="after")
    def _heads_divide(self) -> "Scratch":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, through `peft`): the checkpoint is frozen, adapters and head are trained."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["attention", "query-value", "all-linear"] = "query-value"
    """Which linear layers of each block get an adapter; query-value as in the paper."""


class Model(Section):
    pretrained: str | None = None
    """A Hugging Face id or folder of a ViT (ViT, DeiT, BEiT, DINOv2, ViT-MAE, ViT-MSN), or a file of weights
    (.safetensors, .pth) with the names of timm, DeiT, MAE or DINO. Give this or `scratch`."""
    scratch: Scratch | None = None
    """Random weights of this shape. Give this or `pretrained`."""
    warm_start: str | None = None
    """A run folder, or one of its checkpoints: the run begins with those weights (the averaged ones, if there are) in
    the model of `pretrained` or `scratch`, and with nothing else of it. What differs in shape, or the head of other
    classes, begins as without it."""
    image_size: Annotated[int, Field(ge=8, le=2048)] = 224
    """Side of the square input in pixels. Position embeddings of a checkpoint are interpolated to it."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads of a file of weights, whose shapes do not tell them (ViT-Ti 3, S 6, B 12, L and H 16)."""
    layer_norm_eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the layer norms of a file of weights (timm, DeiT, MAE, DINO: 1e-6)."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] | None = None
    """Activation of the blocks of a file of weights (timm, DeiT, MAE, DINO: gelu; OpenAI's CLIP: quick_gelu)."""
    head: Literal["auto", "new", "keep"] = "auto"
    """A checkpoint's classifier. auto: kept where its class names are those of the data; keep: kept whatever its names,
    an error if its size differs; new: begins anew."""
    pool: Literal["auto", "cls", "mean"] = "auto"
    """What the head sees: the class token, or the mean of the patches (as MAE fine-tunes); auto: as the checkpoint has
    it, cls from scratch."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth (Huang et al. 2016): chance of the last block's branches to be left out for a sample, rising
    linearly from 0 at the first block. Drawn by (seed, step, slot), so the number of ranks does not matter."""
    freeze: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """Lowest layers that are not trained: 1 the embeddings, n + 1 the first n blocks too; all: everything but the head
    (linear probe)."""
    lora: Lora | None = None
    """Low-rank adapters instead of full fine-tuning; model.lora.rank=8 turns them on."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more arithmetic, far less memory."""

    @property
    def weights_file(self) -> bool:
        """Whether `pretrained` is a file of weights, which says nothing but names and shapes."""
        return self.pretrained is not None and self.pretrained.endswith(WEIGHTS_FILES)

    @model_validator(mode="after")
    def _one_start(self) -> "Model":
        if (self.pretrained is None) == (self.scratch is None):
            raise ValueError("give exactly one of model.pretrained and model.scratch (NAME=null takes one away)")
        if self.scratch and self.image_size % self.scratch.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.scratch.patch_size}")
        return self

    @model_validator(mode="after")
    def _of_files(self) -> "Model":
        told = [name for name in ("heads", "layer_norm_eps", "activation") if getattr(self, name) is not None]
        if told and not self.weights_file:
            raise ValueError(
                f"{told[0]}: only for a file of weights ({', '.join(WEIGHTS_FILES)}); scratch and folders say it"
            )
        return self

    @model_validator(mode="after")
    def _partial(self) -> "Model":
        if self.lora and self.freeze:
            raise ValueError("freeze: model.lora already freezes the checkpoint; give one of them")
        if self.scratch and (self.freeze or self.lora or self.head == "keep"):
            raise ValueError("freeze, lora and head=keep need model.pretrained: random weights must be trained")
        return self


class Train(Section):
    global_batch: Annotated[int, Field(ge=1)] | None = None
    """Samples of one update over all ranks = micro_batch x accumulation x ranks. Give any two, or the global batch."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Samples of one forward pass of one rank."""
    accumulation: Annotated[int, Field(ge=1)] | None = None
    """Forward passes of one rank for each update."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Length of the run in passes over the training set. Give this or `steps`."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the run in updates. Give this or `epochs`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides initial weights, order and augmentation; the same seed gives the same run."""
    max_skipped: Annotated[int, Field(ge=1)] = 20
    """Updates in a row whose loss or gradients are not finite (each is skipped by all ranks) after which the run ends.
    fp16 may halve its loss scale 16 times before the first update."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps (NAME=null takes one away)")
        if self.global_batch is None and self.micro_batch is None:
            raise ValueError("give train.global_batch (the samples of one update), or train.micro_batch")
        return self


class Loss(Section):
    kind: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """cross_entropy; bce: a binary one for each class (DeiT III); focal (Lin et al. 2017): easy samples weigh less."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that is spread evenly over all classes."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: exponent; 0 is cross-entropy."""
    class_weights: Literal["none", "inverse", "effective"] | dict[str, Share] = "none"
    """Weight of each class. inverse: by 1 / its number of samples; effective: by the effective number (Cui et al.
    2019); or {class: weight, ...}, others 1. Counted as the classes come, so after data.class_shares."""
    effective_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """effective: beta; nearer to 1 is nearer to inverse."""
    logit_adjustment: Annotated[float, Field(ge=0)] = 0.0
    """tau times the log of each class's share is added to its logit in training (Menon et al. 2021); 1 aims at balanced
    accuracy, 0 is off."""


class Optim(Section):
    name: Literal["adamw", "sgd", "lion"] = "adamw"
    """adamw (Loshchilov and Hutter 2019); sgd with Nesterov momentum; lion (Chen et al. 2023; a third to a tenth of
    AdamW's rate, three to ten times its weight decay)."""
    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    """Peak learning rate of the head; the layers below get lr x layer_decay^(distance from the head)."""
    lr_batch: Annotated[int, Field(ge=1)] | None = None
    """Global batch that `lr` is meant for (256 in MAE's base rates); another one scales it. Default: lr as it is."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How lr follows the global batch, with lr_batch: in proportion (Goyal et al. 2017), or to its root (Adam)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Factor from one layer to the one below it (BEiT, MAE). 1 gives all layers the same rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of weights with two or more dimensions; others have none. Decoupled in adamw and lion, added to the
    gradient in sgd."""
    betas: Pair | None = None
    """adamw (default 0.9, 0.999) and lion (default 0.9, 0.99)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """adamw."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient over all ranks; 0 does not clip."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """From the peak, after the warm-up, down to min_lr at the last step; wsd: warm-up, stable, then a linear fall."""
    schedule_by: Literal["step", "epoch"] = "step"
    """epoch: the rate stays the same during each pass over the data, but for the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the run in which the rate rises linearly to its peak."""
    fall: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the run in which the rate falls at the end."""
    min_lr: Fraction = 0.01
    """Rate at the end of the schedule, as a share of the peak."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average of the fp32 weights (0.9999 in EVA-02), which is then evaluated and exported; 0: off."""
    ema_warmup: bool = True
    """The decay begins at 1/10 and rises as (1 + step) / (10 + step), so that short runs forget where they began."""

    @model_validator(mode="after")
    def _of_others(self) -> "Optim":
        if self.lr_batch is None:
            _idle(self, ("lr_scaling",), "optim.lr_batch")
        if self.name == "sgd":
            _idle(self, ("betas", "eps"), "optim.name=adamw")
        else:
            _idle(self, ("momentum",), "optim.name=sgd")
        return self

    @model_validator(mode="after")
    def _betas(self) -> "Optim":
        if self.betas and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, not {list(self.betas)}")
        if self.schedule == "wsd" and self.warmup + self.fall > 1:
            raise ValueError(f"warmup {self.warmup} and fall {self.fall} are more than the whole run")
        return self


class Engine(Section):
    zero: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 replicates, 1 shards the optimizer, 2 the gradients too, 3 the weights too."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 with dynamic loss scaling on a GPU, fp32 on a CPU."""
    loss_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    """fp16: the loss scale starts at 2 to this power."""
    loss_scale_window: Annotated[int, Field(ge=1)] = 1000
    """fp16: steps without an overflow after which the scale doubles."""
    loss_scale_hysteresis: Annotated[int, Field(ge=1)] = 2
    """fp16: overflows before the scale is halved."""
    autocast: bool = False
    """Half precision by torch.autocast inside DeepSpeed: weights stay fp32, matrices are multiplied in `precision`."""
    compile: bool = False
    """torch.compile the model: slower start, faster steps on a GPU."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """CPU threads of one rank; auto: its share of the cores. Recorded, since it changes the last bits of sums."""
    hang_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any progress of a rank after which the run counts as hung: all stacks are written into the run
    folder and the attempt ends. Start-up and export may take three times as long."""


class Unsure(Section):
    """When the model should say that it does not know: for inspection and medicine."""

    costs: dict[str, dict[str, Share]] | None = None
    """Cost of calling a sample of one class (outer name) another (inner name); what is not named costs 1, right 0."""
    cost: Annotated[float, Field(gt=0)] = 0.5
    """Cost of saying `unsure`, which is said where every class is expected to cost more (Chow 1970)."""


class Evaluation(Section):
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training set between evaluations; default 1. The last step is always evaluated."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Updates between evaluations, instead of `every_epochs`."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Samples of one rank in one forward pass; default: twice the micro batch (no gradients to keep)."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation. flip: the mean of the probabilities of a picture and its mirror image."""
    best: Literal["top1", "top5", "balanced_accuracy", "macro_f1", "auroc", "loss", "calibration_error"] = "top1"
    """Metric of the best checkpoint, which is kept beside the newest ones."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without a better `best` after which the run ends early."""
    export: Literal["last", "best"] = "last"
    """Whose weights the run ends with. best: chosen on the validation samples, so its figures are a little too good."""
    bootstrap: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Resamples for the 95 percent intervals of the last evaluation, on at most 20,000 samples; 0: none."""
    unsure: Unsure | None = None
    """Let the result say `unsure`; evaluation.unsure.cost=0.3 turns it on."""

    @model_validator(mode="after")
    def _one_rhythm(self) -> "Evaluation":
        if self.every_epochs and self.every_steps:
            raise ValueError(
                "give evaluation.every_epochs or evaluation.every_steps, not both (NAME=null takes one away)"
            )
        return self


class Checkpoint(Section):
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; default: at each evaluation. A stop signal and the end always save."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest complete checkpoints kept. At least 2: the newest may turn out torn."""
    asynchronous: bool = True
    """Train on while a checkpoint is written: the step waits only for a copy in host memory. false: for the disk."""
    on_failure: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be written does (a full disk). continue: a warning, and the next one is tried at
    its time; stop: the run ends. The older checkpoints stay in any case."""


class Tracking(Section):
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between rows in metrics.jsonl, on the console and in W&B."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where an API key is found, else offline (upload later with `vitdist sync`)."""
    project: str = "vitdist"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; default: that of the key."""
    group: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Group of the run in W&B; default: the sweep that it is a point of."""
    artifacts: Annotated[tuple[Literal["code", "data", "model"], ...], Field(strict=False)] = ("code", "data", "model")
    """What a finished run leaves in W&B as artifacts. Shards, and a model above 20 MB, stay where they are: W&B is told
    their path."""
    tensorboard: bool = False
    """Write RUN/tensorboard too (needs the package tensorboard)."""


class Config(Section):
    data: Data
    model: Model
    train: Train
    # {} and not a factory, which would build a validator of its own for each section
    loss: Loss = Field(default={}, validate_default=True)
    optim: Optim = Field(default={}, validate_default=True)
    engine: Engine = Field(default={}, validate_default=True)
    evaluation: Evaluation = Field(default={}, validate_default=True)
    checkpoint: Checkpoint = Field(default={}, validate_default=True)
    tracking: Tracking = Field(default={}, validate_default=True)


class Pixels(Section):
    """How pictures become the input of a model."""

    image_size: int
    eval_crop: float
    mean: Triple
    std: Triple


class Batch(Section):
    """How one update is split over ranks: global_batch = micro_batch x accumulation x world."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world: int


def split_batch(train: Train, world: int) -> Batch:
    """Derive what `train` leaves open of global batch, micro batch and accumulation for `world` ranks.

    Raises SettingsError if the numbers do not multiply up, naming values that would.
    """
    if train.global_batch is None:
        assert train.micro_batch is not None
        accumulation = train.accumulation or 1
        return Batch(
            global_batch=train.micro_batch * accumulation * world,
            micro_batch=train.micro_batch,
            accumulation=accumulation,
            world=world,
        )
    total = train.global_batch
    if total % world:
        near = sorted({max(1, total // world) * world, (total // world + 1) * world})
        raise SettingsError(
            f"train.global_batch {total} does not divide over {world} ranks: "
            f"use {' or '.join(map(str, near))}, or another number of nodes"
        )
    per_rank = total // world
    if train.micro_batch and train.accumulation:
        if train.micro_batch * train.accumulation != per_rank:
            raise SettingsError(
                f"train.global_batch {total} is not micro_batch {train.micro_batch} x accumulation "
                f"{train.accumulation} x {world} ranks = {train.micro_batch * train.accumulation * world}: "
                "leave one of them out"
            )
        micro, accumulation = train.micro_batch, train.accumulation
    elif train.micro_batch:
        # A cluster with fewer ranks accumulates; one with more simply has less to do in each rank.
        micro = min(train.micro_batch, per_rank)
        accumulation = per_rank // micro
        if micro * accumulation != per_rank:
            raise SettingsError(
                f"train.global_batch {total} gives each of {world} ranks {per_rank} samples, "
                f"which micro_batch {micro} does not divide: use {math.gcd(per_rank, micro)}, or leave it out"
            )
    else:
        accumulation = train.accumulation or 1
        micro, rest = divmod(per_rank, accumulation)
        if rest:
            raise SettingsError(
                f"train.global_batch {total} gives each of {world} ranks {per_rank} samples, "
                f"which accumulation {accumulation} does not divide"
            )
    return Batch(global_batch=total, micro_batch=micro, accumulation=accumulation, world=world)


def scaled(optim: Optim, global_batch: int) -> Optim:
    """`optim` with the rate that its `lr` and `lr_batch` mean at `global_batch`."""
    if optim.lr_batch is None:
        return optim
    ratio = global_batch / optim.lr_batch
    factor = ratio if optim.lr_scaling == "linear" else math.sqrt(ratio)
    return optim.model_copy(update={"lr": optim.lr * factor, "lr_batch": None})


def pixels(settings: Config, mean: Triple | None, std: Triple | None) -> Pixels:
    """What the settings say, and where they are silent the checkpoint's mean and std, None if it does not tell.

    Raises SettingsError if neither does.
    """
    data = settings.data
    mean, std = data.mean or mean, data.std or std
    if mean is None or std is None:
        raise SettingsError(
            f"data.mean and data.std must be given: {settings.model.pretrained} does not tell with which pixels it was "
            "trained (timm, DeiT, MAE, DINO mostly: data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225])"
        )
    return Pixels(image_size=settings.model.image_size, eval_crop=data.eval_crop, mean=mean, std=std)


def total_steps(train: Train, batch: Batch, samples: int) -> int:
    """Updates of the whole run over a training set of `samples`; at least 1."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return max(1, round(train.epochs * samples / batch.global_batch))


# ---- YAML, overrides, errors -------------------------------------------------------------------


MOST_BYTES = 1_000_000
"""Of a file of settings: a weight for each of ImageNet-21k's classes takes a third of it."""
MOST_VALUES, DEEPEST = 100_000, 50
"""Names and values of a file, and how deep they may lie in each other. What an alias repeats counts again: 500 bytes of
aliases can mean 2^60 values."""
MOST_FAULTS = 20
"""That are told one by one."""

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][\d_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_PATTERNS = {name: re.compile(rf"(?:{pattern})\Z", re.ASCII) for name, (pattern, _) in _SCALARS.items()}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema and `<<`. PyYAML follows YAML 1.1, in which 3e-4 is a string, off is false and 12:00:00 is
    43200, and has dates, sets and bytes, whose constructors fail on what they do not expect."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in _PATTERNS and not (isinstance(node, yaml.ScalarNode) and _PATTERNS[kind].match(node.value)):
            raise _fault_at(node, f"{_shown(node.value)} is no {kind}")
        return super().construct_object(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Within 64 bits: what reckons with settings need not fear overflows, nor Python its own limit of digits."""
        digits = node.value.replace("_", "")
        number = int(digits, 16 if "x" in digits else 10) if len(digits) <= 20 else 2**63
        if abs(number) >= 2**63:
            raise _fault_at(node, f"{_shown(node.value)} is too large: whole numbers go to 2^63")
        return number


class _Dumper(yaml.SafeDumper):
    """Quotes what either of the two YAMLs would take for something else than text."""

    def text(self, value: str) -> yaml.ScalarNode:
        """PyYAML would fold at the line breaks of Unicode, and read a blank for each."""
        return self.represent_scalar(_TAG + "str", value, style=None if value.isprintable() else '"')


_KEPT = {None, *(_TAG + name for name in ("null", "bool", "float", "str", "seq", "map"))}
_Loader.yaml_constructors = {tag: make for tag, make in _Loader.yaml_constructors.items() if tag in _KEPT}
_Loader.yaml_implicit_resolvers = {}
for _name, (_, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _PATTERNS[_name], _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _PATTERNS[_name], _first)
_Loader.add_constructor(_TAG + "int", _Loader.whole_number)
_Dumper.add_representer(str, _Dumper.text)

Settings = TypeVar("Settings", bound=Section)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingsError if it is missing, unreadable or no mapping."""
    place = _cut(str(path))
    try:
        # A pipe would be waited for, and a device may never end.
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise SettingsError(f"{place}: is no file")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SettingsError(f"{place}: over {MOST_BYTES:,} bytes, so no settings")
        raw = _meaning(content.decode())
    except FileNotFoundError:
        folder = Path(path).parent
        near = difflib.get_close_matches(Path(path).name, [p.name for p in folder.glob("*.yaml")], 1)
        hint = f"; did you mean {folder / near[0]}?" if near else f"; there are: {_listing(folder)}"
        raise SettingsError(f"{place}: no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{place}: cannot be read: no UTF-8 at byte {error.start:,}") from None
    except OSError as error:
        raise SettingsError(f"{place}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{place}: not valid YAML: {_where(error)}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: must hold settings as `name: value`, not a {type(raw).__name__}")
    return raw


def _meaning(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError, also for what is too large, too deep or names a setting twice."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measured(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {DEEPEST} deep") from None
    finally:
        loader.dispose()


def _measured(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node means, aliases written out, and how deep they lie. Raises yaml.YAMLError."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    fault = None
    if id(node) in known:
        measure = known[id(node)]
        if measure:
            return measure
        fault = "an alias inside of what it stands for"
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        names = Counter((name.tag, name.value) for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        twice = [
            name for name, _ in node.value if isinstance(name, yaml.ScalarNode) and names[name.tag, name.value] > 1
        ]
        if twice:
            raise _fault_at(twice[1], f"{_shown(twice[1].value)} is given twice")
    if not fault:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        measures = [_measured(part, known) for part in parts]
        values, levels = 1 + sum(m[0] for m in measures), 1 + max((m[1] for m in measures), default=0)
        if values > MOST_VALUES:
            fault = f"more than {MOST_VALUES:,} values"
        elif levels > DEEPEST:
            fault = f"nested more than {DEEPEST} deep"
        known[id(node)] = values, levels
    if fault:
        raise _fault_at(node, fault)
    return values, levels


def _fault_at(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _where(error: yaml.YAMLError) -> str:
    """A fault of YAML in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    what = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(what.split())}"


def _shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    return _cut(repr(value), 100)


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def _listing(folder: Path) -> str:
    return ", ".join(sorted(str(p) for p in folder.glob("*.yaml"))) or f"no .yaml files in {folder}"


def override(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`raw` with each `dotted.name=value` of `overrides` put in; values are read as YAML."""
    merged = {key: override(value, []) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not all(part.isidentifier() for part in name.split(".")) or name.count(".") >= DEEPEST:
            raise SettingsError(f"{_shown(text)}: an override is written section.name=value, such as optim.lr=3e-4")
        try:
            parsed = _meaning(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"{_shown(text)}: is not a YAML value ({_where(error)})") from None
        *parents, leaf = name.split(".")
        place = merged
        for part in parents:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[leaf] = parsed
    return merged


def parse(kind: type[Settings], raw: Mapping[str, Any], source: str | Path) -> Settings:
    """Check `raw` against `kind`. Raises SettingsError with the faults, the dotted name of each and a hint."""
    faults = [f"{name}: {_shown(text)} is no UTF-8" for name, text in _texts(raw) if not _encodable(text)]
    more = 0
    try:
        settings = kind.model_validate(raw)
    except ValidationError as error:
        # Where a setting may be of several types, the fault of the type that was meant is the one to tell.
        told = error.errors(include_url=False)
        found = [
            (_fault(kind, e["loc"], e["msg"], e["type"], e.get("input")), e["type"]) for e in told[: 5 * MOST_FAULTS]
        ]
        meant = {fault.split(":")[0] for fault, code in found if not code.endswith("_type")}
        faults += dict.fromkeys(f for f, code in found if not code.endswith("_type") or f.split(":")[0] not in meant)
        more = len(told) - len(found)
    if more + len(faults) > MOST_FAULTS:
        faults[MOST_FAULTS:] = [f"and {more + len(faults) - MOST_FAULTS:,} more"]
    if faults:
        raise SettingsError(f"{_cut(str(source))}: unusable settings\n" + "\n".join(f"  {fault}" for fault in faults))
    return settings


def _texts(raw: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in settings, names too."""
    if isinstance(raw, str):
        yield name, raw
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        yield from ((name, key),) if isinstance(key, str) else ()
        yield from _texts(value, f"{name}.{key}".removeprefix("."))
    for value in raw if isinstance(raw, list) else ():
        yield from _texts(value, name)


def _encodable(text: str) -> bool:
    """Whether records and logs can hold it: a command line may have other bytes, YAML half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Defaults <- the YAML file <- dotted overrides."""
    return parse(Config, override(read_yaml(path), overrides), path)


def with_absolute_paths(settings: Config) -> Config:
    """Local folders made absolute, so that a job that runs elsewhere finds them."""
    given = settings.data
    train: Any = {_absolute(place): share for place, share in given.train_sets.items()}
    if len(train) < len(given.train_sets):
        raise SettingsError(f"data.train: one folder is named twice: {', '.join(given.train_sets)}")
    if given.stream:
        train = "stream:" + "::".join(_absolute_pattern(part) for part in given.stream.split("::"))
    data = given.model_copy(
        update={
            "train": next(iter(train)) if isinstance(given.train, str) and isinstance(train, dict) else train,
            "val": _absolute(given.val),
            # $TMPDIR and the like are the node's to fill in.
            "cache": given.cache if not given.cache or given.cache.startswith("$") else _absolute(given.cache),
        }
    )
    model, pretrained = settings.model, settings.model.pretrained
    if pretrained and (os.path.exists(pretrained) or pretrained.startswith((".", "/", "~"))):
        model = model.model_copy(update={"pretrained": _absolute(pretrained)})
    if model.warm_start:
        model = model.model_copy(update={"warm_start": _absolute(model.warm_start)})
    return settings.model_copy(update={"data": data, "model": model})


def _absolute_pattern(pattern: str) -> str:
    """Of paths; a brace pattern that begins with a brace, a URL and a command stay as they are."""
    return pattern if ":" in pattern or pattern.startswith(("/", "{")) else f"{Path.cwd()}/{pattern}"


def _absolute(path: str) -> str:
    if "://" in path:
        return path
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, no such user, a NUL
        raise SettingsError(f"{_shown(path)}: is no path: {getattr(error, 'strerror', None) or error}") from None


def _fault(kind: type[Section], loc: tuple[int | str, ...], message: str, code: str, given: Any) -> str:
    # pydantic adds the tried member of a union to `loc`; only names of fields help the user.
    names, fields = list[str](), _fields(kind)
    for part in loc:
        if isinstance(part, str) and (part in fields or (code == "extra_forbidden" and part == loc[-1])):
            names.append(part)
            fields = _fields(_section_of(fields[part].annotation)) if part in fields else {}
    dotted = _cut(".".join(name if name.isprintable() else repr(name)[1:-1] for name in names))
    if code == "extra_forbidden":
        siblings = _fields(_section_at(kind, names[:-1]))
        near = difflib.get_close_matches(names[-1], siblings, 1)
        if near:
            return f"{dotted}: unknown setting; did you mean {'.'.join([*names[:-1], near[0]])}?"
        elsewhere = [n for n, _, _, _ in flat(kind) if n.split(".")[-1] == names[-1]]
        hint = f"did you mean {elsewhere[0]}?" if elsewhere else f"there are: {', '.join(siblings)}"
        return f"{dotted}: unknown setting; {hint}"
    if code == "missing":
        return f"{dotted}: must be given"
    message = message.removeprefix("Value error, ")
    if code == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {message[0].lower()}{message[1:]}, not {_shown(given)}"


def _fields(kind: type[Section] | None) -> dict[str, Any]:
    return dict(kind.model_fields) if kind else {}


def _section_of(annotation: Any) -> type[Section] | None:
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((m for m in members if isinstance(m, type) and issubclass(m, Section)), None)


def _section_at(kind: type[Section], names: list[str]) -> type[Section] | None:
    found: type[Section] | None = kind
    for name in names:
        found = _section_of(_fields(found)[name].annotation)
    return found


def flat(kind: type[Section], prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """(dotted name, type in words, default, explanation) of every setting; a required one has default `...`."""
    rows: list[tuple[str, str, Any, str]] = []
    explained = _explanations(kind)
    for name, field in kind.model_fields.items():
        inner = _section_of(field.annotation)
        if inner:
            rows += flat(inner, f"{prefix}{name}.")
        else:
            default = ... if field.is_required() else field.default
            rows.append((prefix + name, _type_in_words(field.annotation), default, explained.get(name, "")))
    return rows


def _explanations(kind: type[Section]) -> dict[str, str]:
    """The text under each field. pydantic can read them too, but does so whenever a class is made."""
    body = _classes(sys.modules[kind.__module__].__file__ or "")[kind.__name__].body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@functools.cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    """Of a file of settings, read once: `inspect.getsource` reads it through again for each class, half a second."""
    tree = ast.parse(Path(file).read_bytes())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _type_in_words(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is Annotated:
        return _type_in_words(args[0])
    if isinstance(annotation, types.UnionType) or origin is typing.Union:
        return "|".join(_type_in_words(a) for a in args if a is not type(None))
    if origin is dict:
        return "{name: number, ...}"
    if origin is tuple:
        return "[" + ", ".join("..." if a is ... else _type_in_words(a) for a in args) + "]"
    return {int: "integer", float: "number", str: "text", bool: "true|false"}.get(annotation, str(annotation))


def describe(kind: type[Section]) -> str:
    """The settings as text for `--help`: name, type, default, explanation."""
    lines = []
    for name, words, default, text in flat(kind):
        shown = "required" if default is ... else f"default {to_plain(default)}"
        lines.append(f"  {name}  ({words}; {shown})" + (f"\n      {' '.join(text.split())}" if text else ""))
    return "\n".join(lines)


def to_plain(value: Any) -> Any:
    """Settings as YAML can write them: sections as mappings, tuples as lists."""
    if isinstance(value, BaseModel):
        return {name: to_plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    return value


def to_yaml(settings: Section) -> str:
    """Settings as YAML text that `parse` reads back to an equal object."""
    return yaml.dump(to_plain(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def difference(old: Section, new: Section) -> list[str]:
    """One line `name: old -> new` for each setting that differs."""
    lines = []
    for name, _, _, _ in flat(type(old)):
        before, after = _get(old, name), _get(new, name)
        if before != after:
            lines.append(f"{name}: {to_plain(before)} -> {to_plain(after)}")
    return lines


def _get(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = None if settings is None else getattr(settings, part)
    return settings
