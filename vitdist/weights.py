"""Files of weights that are not transformers': names of timm, DeiT, MAE, DINO, DINOv2 and BEiT into transformers'.

    held = weights.convert(weights.read(path), settings.model)      # family, shape, tensors by name, what was left out

What shapes tell is read off them: width, depth, patch, resolution, MLP ratio, classes, pooling. What they do not tell
(heads, epsilon, activation) is asked for by name. A tensor that takes part in the forward pass and has no place in
transformers' classes is an error, never left out. A pickle is opened with `weights_only=True`: nothing in it runs.
"""

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitdist.config import Model

_USUAL_HEADS = {192: "ViT-Ti 3", 384: "ViT-S 6", 768: "ViT-B 12", 1024: "ViT-L 16", 1280: "ViT-H 16", 1536: "ViT-g 24"}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
_PARTS = {  # of a block: here, in ViT, DeiT and BEiT, in DINOv2 where it differs
    "norm1": ("layernorm_before", "norm1"),
    "norm2": ("layernorm_after", "norm2"),
    "attn.q": ("attention.q_proj",),
    "attn.k": ("attention.k_proj",),
    "attn.v": ("attention.v_proj",),
    "attn.proj": ("attention.o_proj",),
    "attn.relative_position_bias_table": ("relative_position_bias.relative_position_bias_table",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
    "mlp.gate": ("mlp.gate_proj",),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
    "scale1": ("lambda_1", "layer_scale1.lambda1"),
    "scale2": ("lambda_2", "layer_scale2.lambda1"),
}
_ARITHMETIC = ("blocks.", "patch_embed.", "pos_embed", "dist_token", "norm", "fc_norm.", "attn_pool.", "rope")
"""Beginnings of names that take part in the forward pass: one without a place is an error."""


@dataclass
class Held:
    """What a file holds, as transformers names it."""

    family: str
    """vit, deit, beit, dinov2 or dinov2_with_registers."""
    shape: dict[str, Any]
    """Arguments of the family's configuration."""
    tensors: dict[str, Tensor]
    """float32, by the names of the family's classifier."""
    ignored: list[str] = field(default_factory=list)
    """The file's names of what was left out."""


def read(path: str | Path, shapes_only: bool = False) -> dict[str, Tensor]:
    """The tensors of a file by its own names, out of {"model": ...} and the like; on the meta device if `shapes_only`.

    Raises ValueError for a file that is missing, torn, holds no tensors or would run code.
    """
    try:
        if Path(path).suffix == ".safetensors":
            found: Any = _safetensors(path, shapes_only)
        else:
            # MAE, DeiT and DINO keep their command line beside the weights: a Namespace is a bag of values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"model.pretrained {path}: no such file") from None
    except Exception as error:  # unpickling what is torn raises anything
        raise ValueError(unreadable(path, error)) from None
    while isinstance(found, Mapping):
        inner = next((found[key] for key in ("model", "state_dict", "teacher") if _is_state(found.get(key))), None)
        if inner is None:
            break
        found = inner
    if not _is_state(found):
        raise ValueError(f"model.pretrained {path}: holds no tensors by name, but {_listing(found)}")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _safetensors(path: str | Path, shapes_only: bool) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if shapes_only:
            return {n: torch.empty(file.get_slice(n).get_shape(), device="meta") for n in file.keys()}  # noqa: SIM118
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def unreadable(source: str | Path, error: Exception) -> str:
    """Why weights could not be read, in one line: the text of the ValueError to raise."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return (
            f"model.pretrained {source}: this pickle asks for {code[1]}, which is no tensor and may run code; it was "
            "not opened: take a .safetensors of it, or save its state_dict alone where you trust it"
        )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"model.pretrained {source}: torn, or no file of weights ({reason[:150]})"


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and any(isinstance(v, Tensor) or _is_state(v) for v in found.values())


def _listing(found: Any) -> str:
    return f"a mapping of {', '.join(map(str, list(found)[:5]))}" if isinstance(found, Mapping) else f"a {type(found)}"


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError naming the tensors that hold NaN or infinity."""
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.is_meta and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"model.pretrained {source}: NaN or infinite values in {short(bad)}")


def short(names: Iterable[str]) -> str:
    """Names for one line: all of them if they are few, else the first part of each with its number."""
    names = list(names)
    if len(names) <= 4:
        return ", ".join(names)
    depth = 1 if len({name.split(".")[0] for name in names}) > 1 else 2
    counts: dict[str, int] = {}
    for name in names:
        begin = ".".join(name.split(".")[:depth])
        counts[begin] = counts.get(begin, 0) + 1
    parts = [f"{begin}.* ({n})" if n > 1 else begin for begin, n in counts.items()]
    return ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")


def convert(tensors: Mapping[str, Tensor], settings: Model) -> Held:
    """The file `settings.pretrained`, read by `read`, as one of transformers' classifiers.

    Raises ValueError for a file with other names, with tensors that no class has a place for, and where settings
    are missing that shapes do not tell.
    """
    path = str(settings.pretrained)
    check_finite(tensors, path)
    own, ignored = _own_names(tensors, path)
    own = _split(own)
    _check(own, path)
    family = _family(own, settings)
    shape = _shape(own, family, settings)
    own["cls_token"] = own["cls_token"].reshape(1, 1, -1)
    _positions(own, family, shape["image_size"] // shape["patch_size"])
    names = _names(own, family, shape)
    taken = {new: own[old].float().clone() for old, new in names.items()}
    left = [name for name in own if name not in names]
    strange = [name for name in left if name.startswith(_ARITHMETIC) and not name.endswith("relative_position_index")]
    # A bias on keys adds the same to all scores of a query: it cancels in the softmax, and BEiT has none.
    strange = [name for name in strange if not (family == "beit" and name.endswith("attn.k.bias"))]
    if strange:
        raise ValueError(
            f"model.pretrained {path}: no {family} of transformers has a place for {strange[0]} "
            f"({len(strange)} such tensors), which the forward pass uses"
        )
    kept_out = [name for name in left if not name.endswith("attn.k.bias")]
    return Held(family, shape, taken, sorted([*ignored, *kept_out]))


def _check(own: Mapping[str, Tensor], path: str) -> None:
    """Raises ValueError if what the shape is read off is not there, or not of a ViT's dimensions."""
    mlp = "blocks.0.mlp.gate.weight" if "blocks.0.mlp.gate.weight" in own else "blocks.0.mlp.fc1.weight"
    dimensions = {"patch_embed.proj.weight": 4, mlp: 2, "cls_token": None, "pos_embed": 3, "register_tokens": 3}
    for name, expected in dimensions.items():
        if name not in own and name not in ("pos_embed", "register_tokens"):
            raise ValueError(f"model.pretrained {path}: a ViT needs {name}, which is not in the file")
        if name in own and expected and own[name].ndim != expected:
            raise ValueError(f"model.pretrained {path}: {name} is {list(own[name].shape)}, which is no ViT's")
    if own["patch_embed.proj.weight"].shape[1] != 3:
        raise ValueError(f"model.pretrained {path}: takes {own['patch_embed.proj.weight'].shape[1]} channels, not 3")
    numbers = sorted({int(number[1]) for name in own if (number := re.match(r"blocks\.(\d+)\.", name))})
    if numbers != list(range(len(numbers))):
        gap = next(i for i, number in enumerate(numbers) if i != number)
        raise ValueError(f"model.pretrained {path}: has block {numbers[-1]}, but no block {gap}")


def _own_names(tensors: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], list[str]]:
    """The ViT's tensors without what stands before their names (module., backbone., encoder.); names of the others."""
    anchors = (re.fullmatch(r"((?:.*\.)?)blocks\.(?:0\.)?0\.norm1\.weight", name) for name in tensors)
    prefix = next((match[1] for match in anchors if match), None)
    if prefix is None:
        hugging = [n for n in tensors if "patch_embeddings.projection" in n or "layernorm_before" in n]
        if hugging:
            folder = Path(path).parent
            there = f"={folder}" if (folder / "config.json").is_file() else " the folder with its config.json"
            raise ValueError(
                f"model.pretrained {path}: has the names of transformers ({hugging[0]}): give model.pretrained{there}"
            )
        begins = dict.fromkeys(name.split(".")[0] for name in tensors)
        raise ValueError(
            f"model.pretrained {path}: no ViT of timm, DeiT, MAE or DINO (no blocks.0.norm1.weight); its names begin "
            f"with {', '.join(list(begins)[:8])}{' ...' if len(begins) > 8 else ''}"
        )
    own, others = {}, []
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            # DINOv2 trains blocks in chunks: blocks.CHUNK.NUMBER, counted through.
            own[re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name[len(prefix) :])] = tensor
        elif name in ("head.weight", "head.bias"):
            own[name] = tensor
        else:
            others.append(name)
    return own, others


def _split(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused matrices taken apart: qkv, and the two halves of SwiGLU; one spelling for each part."""
    parts: dict[str, Tensor] = {}
    for name, tensor in own.items():
        block, _, kind = name.rpartition(".")
        if name.startswith("blocks.") and block.endswith(".attn.qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                parts[f"{block[:-3]}{letter}.{kind}"] = part
        elif name.startswith("blocks.") and kind in ("q_bias", "v_bias"):
            parts[f"{block}.{kind[0]}.bias"] = tensor
        elif name.startswith("blocks.") and block.endswith((".mlp.w12", ".mlp.fc1")) and _is_swiglu(own, name):
            for letter, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                parts[f"{block.rpartition('.')[0]}.{letter}.{kind}"] = part
        elif name.startswith("blocks.") and block.endswith((".mlp.w3", ".mlp.fc2")) and _is_swiglu(own, name):
            parts[f"{block.rpartition('.')[0]}.down.{kind}"] = tensor
        else:
            name = re.sub(r"^(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))$", r"\1scale\2\3", name)
            parts[{"reg_token": "register_tokens"}.get(name, name)] = tensor
    return parts


def _is_swiglu(own: Mapping[str, Tensor], name: str) -> bool:
    """Whether the first matrix of a block's MLP gives twice what the second takes."""
    mlp = name[: name.index(".mlp.") + len(".mlp.")]
    first, second = (
        own.get(f"{mlp}{a}.weight", own.get(f"{mlp}{b}.weight")) for a, b in (("w12", "fc1"), ("w3", "fc2"))
    )
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _family(own: Mapping[str, Tensor], settings: Model) -> str:
    """The class of transformers that computes what the file's network does.

    LayerScale with one pooled token (DeiT III) is BEiT's class with absolute positions; DINOv2's head sees the class
    token and the mean of the patches together, as DINOv2's own linear evaluation does.
    """
    pooled = settings.pool != "auto" or "fc_norm.weight" in own or "head.weight" in own
    if "register_tokens" in own or "blocks.0.mlp.gate.weight" in own:
        if pooled:
            why = "registers" if "register_tokens" in own else "SwiGLU"
            raise ValueError(
                f"model.pretrained {settings.pretrained}: with {why}, transformers has only a head on class token and "
                "mean together: leave model.pool at auto and take a file without head and fc_norm"
            )
        return "dinov2_with_registers" if "register_tokens" in own else "dinov2"
    if any("relative_position_bias" in name or name.startswith("rel_pos_bias") for name in own):
        return "beit"
    if "blocks.0.scale1" in own:
        return "beit" if pooled else "dinov2"
    if "dist_token" in own:
        return "deit"
    return "beit" if "fc_norm.weight" in own else "vit"


def _shape(own: Mapping[str, Tensor], family: str, settings: Model) -> dict[str, Any]:
    """Arguments of the configuration, from shapes and settings."""
    width, _, patch, _ = own["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in own if name.startswith("blocks.")})
    asked = _asked(settings, width, "blocks.0.mlp.gate.weight" in own)
    head = own.get("head.weight")
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "patch_size": patch,
        "image_size": _grid(own, str(settings.pretrained)) * patch,
        "num_labels": head.shape[0] if head is not None and head.ndim == 2 else 1,
        **asked,
    }
    if family.startswith("dinov2"):
        shape |= {"mlp_ratio": _dinov2_ratio(own, width, str(settings.pretrained)), "layerscale_value": 1.0}
        shape["use_swiglu_ffn"] = "blocks.0.mlp.gate.weight" in own
        shape["qkv_bias"] = "blocks.0.attn.q.bias" in own
    else:
        shape["intermediate_size"] = own["blocks.0.mlp.fc1.weight"].shape[0]
    if family == "dinov2_with_registers":
        shape["num_register_tokens"] = own["register_tokens"].shape[1]
    if family in ("vit", "deit"):
        shape["qkv_bias"] = "blocks.0.attn.q.bias" in own
    if family == "beit":
        shape |= {
            "use_absolute_position_embeddings": "pos_embed" in own,
            "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in own,
            "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in own,
            "layer_scale_init_value": 0.1 if "blocks.0.scale1" in own else 0.0,
            "use_mean_pooling": "fc_norm.weight" in own,
            "drop_path_rate": 0.0,
        }
    return shape


def _asked(settings: Model, width: int, swiglu: bool) -> dict[str, Any]:
    """What shapes do not tell; all that is missing in one error."""
    usual = _USUAL_HEADS.get(width, f"width / 64 = {max(1, width // 64)} mostly")
    hints = {"heads": f"model.heads: {usual}", "layer_norm_eps": "model.layer_norm_eps: 1e-6 in timm, DeiT, MAE, DINO"}
    if not swiglu:
        hints["activation"] = "model.activation: gelu mostly"
    missing = [hint for name, hint in hints.items() if getattr(settings, name) is None]
    if missing:
        raise ValueError(
            f"model.pretrained {settings.pretrained}: a file of weights of width {width} does not tell everything; "
            f"give {'; '.join(missing)}"
        )
    if swiglu and settings.activation is not None:
        raise ValueError(
            f"model.pretrained {settings.pretrained}: has a gated MLP, which is taken for DINOv2's SwiGLU: leave "
            "model.activation out"
        )
    assert settings.heads is not None
    if width % settings.heads:
        raise ValueError(f"model.heads {settings.heads} does not divide the width {width} of {settings.pretrained}")
    activation = {} if settings.activation is None else {"hidden_act": _ACTIVATIONS[settings.activation]}
    return {"num_attention_heads": settings.heads, "layer_norm_eps": settings.layer_norm_eps} | activation


def _grid(own: Mapping[str, Tensor], path: str) -> int:
    """Patches along a side."""
    if "pos_embed" not in own:
        table = next((t for n, t in own.items() if n.endswith("relative_position_bias_table")), None)
        if table is None:
            raise ValueError(f"model.pretrained {path}: has no position embeddings (pos_embed)")
        return (math.isqrt(table.shape[0] - 3) + 1) // 2
    count = own["pos_embed"].shape[1]
    registers = own["register_tokens"].shape[1] if "register_tokens" in own else 0
    # In front of the patches: all tokens, the class token alone, or none (timm's no_embed_class, as in DeiT III).
    for before in (1 + registers + ("dist_token" in own), 1, 0):
        if math.isqrt(count - before) ** 2 == count - before:
            return math.isqrt(count - before)
    raise ValueError(f"model.pretrained {path}: pos_embed has {count} positions, which is no square of patches")


def _dinov2_ratio(own: Mapping[str, Tensor], width: int, path: str) -> int:
    """DINOv2's configuration has a whole ratio; SwiGLU keeps two thirds of it, rounded up to a multiple of 8."""
    gate = own.get("blocks.0.mlp.gate.weight")
    hidden = own["blocks.0.mlp.fc1.weight"].shape[0] if gate is None else gate.shape[0]
    for ratio in range(1, 17):
        if hidden == (ratio * width if gate is None else (int(ratio * width * 2 / 3) + 7) // 8 * 8):
            return ratio
    raise ValueError(
        f"model.pretrained {path}: an MLP of {hidden} on a width of {width} is no whole ratio, which DINOv2 has"
    )


def _positions(own: dict[str, Tensor], family: str, grid: int) -> None:
    """Position embeddings with one for each token that the family gives one to: the same sums, token by token."""
    if "pos_embed" not in own:
        return
    old = own["pos_embed"]
    before = old.shape[1] - grid**2
    expected = 2 if family == "deit" else 1
    if before > expected and "register_tokens" in own:  # timm's with positions: added once and for all
        own["register_tokens"] = own["register_tokens"] + old[:, 1:before]
    first = old[:, : min(before, expected)]
    nothing = old.new_zeros(1, expected - first.shape[1], old.shape[2])
    own["pos_embed"] = torch.cat([first, nothing, old[:, before:]], dim=1)


def _names(own: Mapping[str, Tensor], family: str, shape: Mapping[str, Any]) -> dict[str, str]:
    """Name in the file (after `_split`) -> name in transformers, for all that has a place."""
    dinov2 = family.startswith("dinov2")
    mean = shape.get("use_mean_pooling", False)
    tops = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token" if family == "deit" else None,
        "register_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token" if dinov2 else None,
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "rel_pos_bias.relative_position_bias_table": "shared_position_bias.relative_position_bias_table",
    }
    norm, place = ("fc_norm", "pooler.layernorm") if mean else ("norm", "layernorm")
    tops |= {f"{norm}.{kind}": f"{place}.{kind}" for kind in ("weight", "bias")}
    names = {old: f"{family}.{new}" for old, new in tops.items() if new and old in own}
    blocks = f"{family}.encoder.layer" if dinov2 else f"{family}.layers"
    for name in own:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias|)", name)
        if match and match[2] in _PARTS and not (family == "beit" and name.endswith("attn.k.bias")):
            names[name] = f"{blocks}.{match[1]}.{_PARTS[match[2]][-1 if dinov2 else 0]}{match[3]}"
    twin = "head_dist.weight" in own
    heads = {"head": "cls_classifier" if twin else "classifier", "head_dist": "distillation_classifier"}
    for kind in ("weight", "bias"):
        names |= {f"{old}.{kind}": f"{new}.{kind}" for old, new in heads.items() if f"{old}.{kind}" in own}
    return names
