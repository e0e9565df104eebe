"""Names, shapes and layers of a model's parameters without torch, as `model.build` would make them.

    net = shapes.network(settings.model, classes=1000)
    sum(p.numel for p in net.parameters), net.tokens, net.macs

From closed forms for a ViT from scratch, from config.json of a folder (or of an id in the local cache of Hugging Face),
or from the header of a .safetensors file. A test holds every family against transformers' own classes.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitdist.config import Lora, Model

_FAMILIES = ("vit", "vit_mae", "vit_msn", "deit", "beit", "dinov2", "dinov2_with_registers")
_ADAPTED = {
    "query-value": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
}
_UNDECAYED = (  # as in optim.py
    "cls_token",
    "mask_token",
    "distillation_token",
    "register_tokens",
    "position_embeddings",
    "relative_position_bias_table",
)
_HEADER = 100_000_000
"""Most bytes of a header, as the library of safetensors has it."""


class Unknown(ValueError):
    """The shapes cannot be told without torch or the network; the text says why."""


class NotCached(Unknown):
    """They are known to the hub: asking it takes half a minute where there is no way to it."""


@dataclass(frozen=True)
class Parameter:
    """One tensor that is trained or frozen."""

    name: str
    shape: tuple[int, ...]
    layer: int
    """0 the embeddings, 1..L the blocks, L+1 the final norm and the head."""
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: see optim.decays."""
        return len(self.shape) > 1 and self.name.rpartition(".")[2] not in ("bias", *_UNDECAYED)

    @property
    def linear(self) -> bool:
        """Whether it belongs to a linear map or a convolution, which torch.autocast casts."""
        module = self.name.rpartition(".")[0]
        return module.endswith(("projection", "_proj", "fc1", "fc2", "classifier", "base_layer", ".default"))


@dataclass(frozen=True)
class Network:
    """A classifier of transformers, by its numbers."""

    family: str
    """vit, vit_msn, deit, beit, dinov2 or dinov2_with_registers."""
    width: int
    depth: int
    heads: int
    hidden: int
    """Width of the MLP."""
    patch: int
    image_size: int
    classes: int
    qkv_bias: bool = True
    gated: bool = False
    """SwiGLU: two matrices up, one down."""
    scaled: bool = False
    """LayerScale."""
    positions: bool = True
    """Absolute position embeddings."""
    relative: str = "none"
    """Relative position biases: none, own (each block) or shared."""
    masked: bool = False
    """Has a mask token, which is never trained."""
    registers: int = 0
    pool: str = "cls"
    """cls, mean or both."""
    twin: bool = False
    """Two heads, whose mean is the answer."""
    lora: Lora | None = None
    parameters: tuple[Parameter, ...] = ()

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Length of the sequence that a block sees."""
        return self.patches + 1 + self.registers + (self.family == "deit")

    @property
    def lowest(self) -> int:
        """Lowest layer with something trained; the backward pass ends there."""
        return min((p.layer for p in self.parameters if p.trained), default=self.depth + 1)

    @property
    def trained(self) -> int:
        """Number of scalars that are trained."""
        return sum(p.numel for p in self.parameters if p.trained)

    @property
    def total(self) -> int:
        """Number of scalars."""
        return sum(p.numel for p in self.parameters)

    def groups(self) -> list[list[Parameter]]:
        """The optimizer's parameter groups in its order: see optim.groups."""
        members: dict[tuple[int, bool], list[Parameter]] = {}
        for parameter in self.parameters:
            if parameter.trained:
                members.setdefault((parameter.layer, not parameter.decays), []).append(parameter)
        return [members[key] for key in sorted(members)]

    @property
    def macs(self) -> int:
        """Multiply-adds of one image's forward pass. ViT-L/16 at 224: 61.55e9; FLOP are twice as many."""
        return self._macs()[0]

    @property
    def flops(self) -> float:
        """FLOP of one image's forward and backward pass, 2 a multiply-add, as model.flops_per_image counts them."""
        return 2.0 * sum(self._macs())

    def _macs(self) -> tuple[int, int]:
        """Multiply-adds forward and backward: of each matrix, and of scores and values in attention."""
        lowest = self.lowest
        forward = 2 * self.tokens**2 * self.width * self.depth
        backward = 2 * 2 * self.tokens**2 * self.width * sum(lowest <= i for i in range(1, self.depth + 1))
        for p in self.parameters:
            if p.linear and len(p.shape) > 1:
                times = self.patches if p.layer == 0 else self.tokens if p.layer <= self.depth else 1
                forward += times * p.numel
                backward += times * p.numel * ((lowest <= p.layer) + p.trained)
        return forward, backward


def network(model: Model, classes: int) -> Network:
    """What `model.build` makes of these settings. Raises Unknown, or ValueError where it could not be made."""
    if model.scratch:
        made = model.scratch
        net = Network(
            "vit", made.width, made.depth, made.heads, round(made.width * made.mlp_ratio), made.patch_size,
            model.image_size, classes,
        )  # fmt: skip
    elif model.weights_file:
        net = _of_file(model, classes)
    else:
        net = _of_folder(str(model.pretrained), classes)
    if model.image_size % net.patch:
        raise ValueError(
            f"model.image_size {model.image_size} is not a multiple of the checkpoint's patch size {net.patch}"
        )
    net = _pooled(replace(net, image_size=model.image_size), model.pool)
    net = replace(net, lora=model.lora)
    return replace(net, parameters=tuple(_with_training(net, model)))


# ---- where the numbers come from ---------------------------------------------------------------------


def _of_folder(source: str, classes: int) -> Network:
    """By config.json of a folder, or of an id that was fetched before."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
    elif source.startswith(("/", ".", "~")):
        raise Unknown(f"{source}: no such folder")
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json")
        if not isinstance(found, str):
            raise NotCached(
                f"{source} is not in the local cache of Hugging Face, so its shapes are not known here; "
                f"`hf download {source} config.json` brings them"
            )
        path = Path(found)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return of_config(told, classes)
    except OSError as error:
        raise Unknown(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, Unknown):
            raise Unknown(f"{path} {error}") from None
        raise Unknown(f"{path} is no configuration of a model ({type(error).__name__}: {error})") from None


def of_config(told: Mapping[str, Any], classes: int) -> Network:
    """The numbers of transformers' configuration `told`, without parameters. Raises Unknown.

    Where it is silent, the defaults of transformers' configuration classes hold.
    """
    family = told.get("model_type")
    if family not in _FAMILIES:
        raise Unknown(f"is of a model of type {family!r}, not one of: {', '.join(_FAMILIES)}")
    dinov2, beit = family.startswith("dinov2"), family == "beit"
    width = int(told.get("hidden_size", 768))
    gated = dinov2 and bool(told.get("use_swiglu_ffn", False))
    hidden = int(told.get("intermediate_size", 3072))
    if dinov2:
        hidden = int(width * told.get("mlp_ratio", 4))
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
    shared, own = (bool(beit and told.get(f"use_{kind}relative_position_bias")) for kind in ("shared_", ""))
    if shared and own:
        raise Unknown("has relative position biases of both kinds")
    return Network(
        family="vit" if family == "vit_mae" else str(family),
        width=width,
        depth=int(told.get("num_hidden_layers", 12)),
        heads=int(told.get("num_attention_heads", 12)),
        hidden=hidden,
        patch=_side(told.get("patch_size", 14 if family == "dinov2" else 16)),
        image_size=_side(told.get("image_size", 224)),
        classes=classes,
        qkv_bias=bool(told.get("qkv_bias", True)),
        gated=gated,
        scaled=dinov2 or (beit and told.get("layer_scale_init_value", 0.1) > 0),
        positions=not beit or bool(told.get("use_absolute_position_embeddings", False)),
        relative="own" if own else "shared" if shared else "none",
        masked=(
            family == "dinov2_with_registers"
            or (family == "dinov2" and bool(told.get("use_mask_token", True)))
            or (beit and bool(told.get("use_mask_token", False)))
        ),
        registers=int(told.get("num_register_tokens", 4)) if family == "dinov2_with_registers" else 0,
        pool="both" if dinov2 else "mean" if beit and told.get("use_mean_pooling", True) else "cls",
        twin="DeiTForImageClassificationWithTeacher" in (told.get("architectures") or []),
    )


def _side(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise Unknown(f"is not for square pictures and patches, but {size}")
    return int(sides.pop())


def _of_file(model: Model, classes: int) -> Network:
    """By the header of a .safetensors file with the names of timm, DeiT, MAE, DINO or BEiT: see weights.py."""
    path = Path(str(model.pretrained)).expanduser()
    if path.suffix != ".safetensors":
        raise Unknown(f"{path} is a pickle, whose shapes only torch reads")
    if model.heads is None:
        raise ValueError(f"model.pretrained {path}: a file of weights does not tell model.heads")
    held = _header(path)
    anchor = next(
        (m for name in held if (m := re.fullmatch(r"((?:.*\.)?)blocks\.(?:0\.)?0\.norm1\.weight", name))), None
    )
    if anchor is None:
        raise Unknown(f"{path} has no blocks.0.norm1.weight, so it is no ViT of timm, DeiT, MAE, DINO or BEiT")
    own = {
        re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name.removeprefix(anchor[1])): shape
        for name, shape in held.items()
        if name.startswith(anchor[1]) or name in ("head.weight", "head.bias")
    }
    block = {name.removeprefix("blocks.0."): shape for name, shape in own.items() if name.startswith("blocks.0.")}
    try:
        width, _, patch, _ = own["patch_embed.proj.weight"]
        gate = block.get("mlp.w12.weight")
        up = gate or block["mlp.fc1.weight"]
        down = block["mlp.w3.weight" if gate else "mlp.fc2.weight"]
    except (KeyError, ValueError):
        raise Unknown(f"{path} is no whole ViT: patch_embed.proj or the MLP of block 0 is missing") from None
    gated, scaled = up[0] == 2 * down[1], any(name in block for name in ("ls1.gamma", "gamma_1"))
    registers = next((own[name][1] for name in ("reg_token", "register_tokens") if name in own), 0)
    tables = {
        "own": "attn.relative_position_bias_table" in block,
        "shared": any(n.startswith("rel_pos_bias.") for n in own),
    }
    relative = next((kind for kind, there in tables.items() if there), "none")
    pooled = model.pool != "auto" or "fc_norm.weight" in own or "head.weight" in own
    if registers or gated:
        family = "dinov2_with_registers" if registers else "dinov2"
    elif relative != "none":
        family = "beit"
    elif scaled:
        family = "beit" if pooled else "dinov2"
    elif "dist_token" in own:
        family = "deit"
    else:
        family = "beit" if "fc_norm.weight" in own else "vit"
    dinov2 = family.startswith("dinov2")
    return Network(
        family=family,
        width=width,
        depth=len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
        heads=model.heads,
        hidden=down[1],
        patch=patch,
        image_size=model.image_size,
        classes=classes,
        qkv_bias=any(name in block for name in ("attn.qkv.bias", "attn.q_bias", "attn.q.bias")),
        gated=gated,
        scaled=dinov2 or scaled,
        positions=family != "beit" or "pos_embed" in own,
        relative=relative,
        masked=dinov2,
        registers=registers,
        pool="both" if dinov2 else "mean" if "fc_norm.weight" in own else "cls",
        twin="head_dist.weight" in own,
    )


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a .safetensors file: 8 bytes of length, a table in JSON, the values."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _HEADER:
                raise Unknown(f"{path} is no .safetensors file")
            table = json.loads(file.read(length))
        tensors = {name: entry["shape"] for name, entry in table.items() if name != "__metadata__"}
        return {name: tuple(int(side) for side in shape) for name, shape in tensors.items()}
    except OSError as error:
        raise Unknown(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise error if isinstance(error, Unknown) else Unknown(f"{path} is no .safetensors file") from None


def _pooled(net: Network, wanted: str) -> Network:
    """As model.py changes the class for a head on the class token or on the mean of the patches."""
    if wanted in ("auto", net.pool):
        return net
    if net.pool == "both" or net.family == "deit":
        raise ValueError(f"model.pool={wanted}: transformers' {net.family} pools its own way; use auto")
    if net.family == "beit":
        return replace(net, pool=wanted)
    return replace(net, family="beit", qkv_bias=True, masked=False, pool=wanted)


# ---- parameters ------------------------------------------------------------------------------------------


def _with_training(net: Network, model: Model) -> Iterator[Parameter]:
    """All parameters in the order of the modules: which are trained, with adapters where they are asked for."""
    freeze: int | str = "all" if model.lora else model.freeze
    adapted = _ADAPTED[model.lora.targets] if model.lora else ()
    for name, shape, layer in _parameters(net):
        head = "classifier." in name
        trained = head or not (name.endswith("mask_token") or freeze == "all" or layer < int(freeze))
        module, _, kind = name.rpartition(".")
        if not module.endswith(adapted) or not adapted:
            yield Parameter(name, shape, layer, trained)
            continue
        yield Parameter(f"{module}.base_layer.{kind}", shape, layer, False)
        if kind == "bias" or not _has_bias(net, module):
            assert model.lora
            out, into = (shape[0], net.hidden if module.endswith(("fc2", "down_proj")) else net.width)
            yield Parameter(f"{module}.lora_A.default.weight", (model.lora.rank, into), layer)
            yield Parameter(f"{module}.lora_B.default.weight", (out, model.lora.rank), layer)


def _has_bias(net: Network, module: str) -> bool:
    if module.endswith("k_proj") and net.family == "beit":
        return False
    return net.qkv_bias or not module.endswith(("q_proj", "k_proj", "v_proj"))


def _parameters(net: Network) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, layer) in the order of transformers' modules."""
    width, beit, dinov2 = net.width, net.family == "beit", net.family.startswith("dinov2")
    base = "vit" if net.family == "vit_msn" else net.family
    top = f"{base}.embeddings"
    yield f"{top}.cls_token", (1, 1, width), 0
    if net.masked:
        yield f"{top}.mask_token", (1, width) if dinov2 else (1, 1, width), 0
    # A module's own parameters come before those of its children, in the order of their definition.
    if net.positions:
        yield f"{top}.position_embeddings", (1, net.patches + 1 + (net.family == "deit"), width), 0
    if net.family == "deit":
        yield f"{top}.distillation_token", (1, 1, width), 0
    if net.family == "dinov2_with_registers":
        yield f"{top}.register_tokens", (1, net.registers, width), 0
    yield f"{top}.patch_embeddings.projection.weight", (width, 3, net.patch, net.patch), 0
    yield f"{top}.patch_embeddings.projection.bias", (width,), 0
    table = ((2 * (net.image_size // net.patch) - 1) ** 2 + 3, net.heads)
    last = net.depth + 1
    if net.relative == "shared":
        yield f"{base}.shared_position_bias.relative_position_bias_table", table, last
    for i in range(net.depth):
        block = f"{base}.encoder.layer.{i}" if dinov2 else f"{base}.layers.{i}"
        for name, shape in _block(net, table):
            yield f"{block}.{name}", shape, i + 1
    norm = f"{base}.pooler.layernorm" if beit and net.pool == "mean" else f"{base}.layernorm"
    yield f"{norm}.weight", (width,), last
    yield f"{norm}.bias", (width,), last
    for head in ("cls_classifier", "distillation_classifier") if net.twin else ("classifier",):
        yield f"{head}.weight", (net.classes, width * (2 if dinov2 else 1)), last
        yield f"{head}.bias", (net.classes,), last


def _block(net: Network, table: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden, beit, dinov2 = net.width, net.hidden, net.family == "beit", net.family.startswith("dinov2")

    def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        if _has_bias(net, name):
            yield f"{name}.bias", (out,)

    def norm(name: str) -> Iterable[tuple[str, tuple[int, ...]]]:
        return (f"{name}.weight", (width,)), (f"{name}.bias", (width,))

    if beit and net.scaled:
        yield "lambda_1", (width,)
        yield "lambda_2", (width,)
    if dinov2:
        yield from norm("norm1")
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from linear(f"attention.{part}", width, width)
    if dinov2:
        yield "layer_scale1.lambda1", (width,)
        yield from norm("norm2")
    else:
        yield from norm("layernorm_before")
        yield from norm("layernorm_after")
    for part in ("gate_proj", "up_proj") if net.gated else ("fc1",):
        yield from linear(f"mlp.{part}", hidden, width)
    yield from linear(f"mlp.{'down_proj' if net.gated else 'fc2'}", width, hidden)
    if dinov2:
        yield "layer_scale2.lambda1", (width,)
    if net.relative == "own":
        yield "relative_position_bias.relative_position_bias_table", table
