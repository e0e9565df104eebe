"""A ViT of transformers for classification, and the layer that each of its parameters belongs to.

    net, weights = model.build(settings.model, classes, seed)
    net(pixel_values=images).logits                 # [B, classes]

The only file that builds models with transformers. What comes out is always one of its own classes, with resolution,
pooling and head as asked already inside, so that a finished model is an ordinary folder that anybody opens.

Layer numbers follow BEiT and MAE: 0 the embeddings, 1..L the blocks, L+1 the final norm and the head. They are read
off the tree of modules, not off prefixes of names: transformers renamed `vit.encoder.layer.N` to `vit.layers.N` in
5.9, and a rule by prefix with a silent rest gives every block the head's learning rate.
"""

import importlib
import math
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitdist import weights as foreign
from vitdist.config import Lora, Model, Scratch, Triple
from vitdist.drop_path import DropPaths

# What importing transformers' ViT loads without need: torch's compiler, for masks that are traced and for paged
# attention, the server of language models, and, where they are installed, torchvision for its names of interpolations,
# accelerate and SciPy for detection losses.
_UNUSED = (
    *("is_accelerate_available", "is_scipy_available", "is_torchvision_available"),
    *("is_torch_distributed_available", "is_torch_flex_attn_available"),
)
_SERVER = "transformers.generation.continuous_batching"
_STAND_INS = (
    *(_SERVER, f"{_SERVER}.cache"),
    *(
        f"transformers.integrations.{name}"
        for name in ("eager_paged", "deepgemm", "sonicmoe", "finegrained_fp8", "flex_attention")
    ),
    "torch._dynamo._trace_wrapped_higher_order_op",
)


class _StandIn(ModuleType):
    """A module in which every name is a class that nothing is an instance of."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package, of which parts are asked for

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"keys": staticmethod(list)})  # some are tables of functions: empty ones


def import_quickly(compiles: bool = False) -> None:
    """Import what a trainer needs of transformers, without torchvision, accelerate, SciPy and torch's compiler.

    1.5 s of a core instead of 4.3, and 180 MB less memory (5.23, 2026-11-28, medians of 5). `compiles`: the process
    will compile the model, and needs the compiler.

    For a process that trains and exports one ViT and ends: its language models and detection losses miss parts that
    were left out. Where another version of transformers has other names, its import is only slower, or is done anew.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    from transformers import utils
    from transformers.utils import import_utils

    here = [(module, name) for module in (utils, import_utils) for name in _UNUSED if hasattr(module, name)]
    before = [(module, name, getattr(module, name)) for module, name in here]
    stand_ins = [name for name in _STAND_INS if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in stand_ins})
    for module, name in here:
        setattr(module, name, lambda: False)
    allow_in_graph = torch.compiler.allow_in_graph
    if not compiles:  # a decorator there: to note one method for the compiler, it loads all of it
        torch.compiler.allow_in_graph = _as_it_is
    try:
        importlib.import_module("transformers.models.vit.modeling_vit")
    except ImportError:
        for name in [name for name in sys.modules if name.startswith("transformers.")]:
            if name not in ("transformers.utils", "transformers.utils.import_utils"):
                del sys.modules[name]
    finally:
        torch.compiler.allow_in_graph = allow_in_graph
        for module, name, function in before:
            setattr(module, name, function)
        for name in stand_ins:
            del sys.modules[name]


def _as_it_is(function: Any) -> Any:
    return function


_HALF: Triple = (0.5, 0.5, 0.5)
_OF_ANY_VIT = (  # settings that a ViT shares with BEiT
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "num_labels",
)
_LINEARS = {
    "query-value": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Weights:
    """What became of a checkpoint's tensors; all empty for a model from scratch."""

    source: str
    missing: list[str] = field(default_factory=list)
    """Names of what begins anew."""
    ignored: list[str] = field(default_factory=list)
    """The checkpoint's names of what was left out."""
    resized: list[str] = field(default_factory=list)
    mean: Triple | None = None
    std: Triple | None = None
    """Of the pixels that the checkpoint was trained with; None where it does not tell."""
    classes: list[str] | None = None
    """Of the checkpoint's head; None where it has no head or no names."""
    loaded: int = 0
    """Number of the model's tensors that came from the checkpoint."""

    def __str__(self) -> str:
        if self.source == "scratch":
            return "random weights"
        told = (("new", self.missing), ("left out", self.ignored), ("resized", self.resized))
        parts = [f"; {name}: {foreign.short(names)}" for name, names in told if names]
        return f"weights of {self.source}: {self.loaded} tensors loaded{''.join(parts)}"


def build(
    settings: Model,
    classes: list[str] | None,
    seed: int,
    device: torch.device | None = None,
    exact_head: bool = False,
) -> tuple[Any, Weights]:
    """A classifier of `classes` (None: of those that the checkpoint names) on `device`.

    Its forward takes pixel_values [B, 3, S, S] and returns an object with logits [B, classes]. The same `seed` gives
    the same new weights on every rank and device. `exact_head`: for using a finished model; its head must be the
    checkpoint's, and it comes in evaluation mode. Raises ValueError for weights that cannot be had or do not fit.
    """
    if exact_head:
        settings = settings.model_copy(update={"head": "keep"})
    torch.manual_seed(seed)
    net, weights = _fitted(settings, classes, "cpu")
    if device:
        net = net.to(device)
    if settings.drop_path:
        net.drop_paths = DropPaths(_blocks(net), settings.drop_path, device or torch.device("cpu"))
    return net.train(not exact_head), weights


def skeleton(settings: Model, classes: int) -> nn.Module:
    """What `build` makes, on the meta device: of a checkpoint only configuration and shapes are read."""
    settings = settings.model_copy(update={"head": "new"})
    return _fitted(settings, [str(i) for i in range(classes)], "meta")[0]


def drop_paths(net: nn.Module) -> DropPaths | None:
    """Whose `draw` must be called before each forward pass in training; None where model.drop_path is 0."""
    return getattr(net, "drop_paths", None)


def finished(net: Any, weights: Mapping[str, Tensor]) -> Any:
    """A plain classifier of transformers on the CPU that holds `weights` (whole, fp32, by the names of `net`).

    Adapters are merged, and drop path is gone: what `save_pretrained` writes opens without this package. Under ZeRO-3
    `net` itself holds no weights.
    """
    with torch.device("meta"):
        whole = type(net)(net.config)
        tuner = _with_adapters(whole, net.peft_config["default"]) if hasattr(net, "peft_config") else None
    # Merging changes the matrices in place; without adapters what was given is read only.
    whole.load_state_dict({name: t.clone() if tuner else t for name, t in weights.items()}, assign=True)
    if tuner:
        whole = tuner.merge_and_unload()
    return whole.requires_grad_(True).eval()


# ---- where weights come from -------------------------------------------------------------------


def _fitted(settings: Model, classes: list[str] | None, device: str) -> tuple[Any, Weights]:
    """The network with resolution, pooling, head and trained parts as asked, on "cpu" or "meta"."""
    if settings.scratch:
        assert classes is not None
        net, weights = _scratch(settings.scratch, settings.image_size, len(classes), device)
    elif settings.weights_file:
        net, weights = _from_file(settings, device)
    else:
        net, weights = _from_folder(str(settings.pretrained), device)
    with torch.no_grad():
        weights.resized.extend(_resize(net, settings.image_size))
        net = _pool(net, settings.pool, weights)
        if settings.pretrained:
            classes = _head(net, settings.head, classes, weights)
    assert classes is not None
    config = net.config
    config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    missing = sorted(set(weights.missing))
    loaded = 0 if settings.scratch else len(net.state_dict()) - len(missing)
    _choose_trained(net, settings)
    if settings.gradient_checkpointing:
        # transformers 5.23 warns of the old name, 5.17 may have no other.
        enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return net, replace(weights, missing=missing, ignored=sorted(set(weights.ignored)), loaded=loaded)


def _classes(family: str) -> tuple[Any, Any]:
    """transformers' configuration and classifier of a family. Raises ValueError for what is no plain ViT."""
    import transformers

    # An encoder that MAE trained is a ViT; transformers has no classifier of its own for it.
    names = {
        "vit": "ViT",
        "vit_mae": "ViT",
        "vit_msn": "ViTMSN",
        "deit": "DeiT",
        "beit": "Beit",
        "dinov2": "Dinov2",
        "dinov2_with_registers": "Dinov2WithRegisters",
    }
    if family not in names:
        raise ValueError(f"is a model of type {family!r}, not one of: {', '.join(names)}")
    name = names[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForImageClassification")


def _scratch(shape: Scratch, image_size: int, classes: int, device: str) -> tuple[Any, Weights]:
    config_class, net_class = _classes("vit")
    config = config_class(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=round(shape.width * shape.mlp_ratio),
        patch_size=shape.patch_size,
        image_size=image_size,
        num_labels=classes,
        layer_norm_eps=1e-6,  # timm, MAE, DeiT; transformers' 1e-12 is below half precision's resolution
    )
    with torch.device(device):
        return net_class(config), Weights("scratch", mean=_HALF, std=_HALF)


def _from_folder(source: str, device: str) -> tuple[Any, Weights]:
    """A folder or id of transformers, at its own size and with its own head."""
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.set_verbosity_error()  # its report of loading is many lines; ours is one
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        family, made_for = config.model_type, config.architectures or []
        config_class, net_class = _classes(family)
        if family == "vit_mae":
            config = config_class(**{name: getattr(config, name) for name in (*_OF_ANY_VIT, "qkv_bias")})
        if "DeiTForImageClassificationWithTeacher" in made_for:  # two heads, whose mean is the answer
            net_class = transformers.DeiTForImageClassificationWithTeacher
        config.image_size, config.patch_size = _side(config.image_size), _side(config.patch_size)
        config.drop_path_rate = 0.0  # ours is drawn by seed and step: see drop_path.py
        config.num_labels = max(1, config.num_labels)
        if device == "meta":
            with torch.device("meta"):
                return net_class(config), Weights(source)
        net, info = net_class.from_pretrained(
            source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(foreign.unreadable(source, error)) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = " (without a network: fetch it once where there is one, `hf download ID`, and give the folder)"
        raise ValueError(
            f"model.pretrained {source!r} cannot be loaded: {reason}{remedy if isinstance(error, OSError) else ''}"
        ) from None
    _check_fit(source, info, config.num_hidden_layers)
    foreign.check_finite(net.state_dict(), source)
    mean, std = _pixels(source)
    missing = sorted(info["missing_keys"])
    labels = [config.id2label[i] for i in range(config.num_labels)]
    headless = any("classifier" in name for name in missing)
    named = not headless and labels != [f"LABEL_{i}" for i in range(len(labels))]
    return net, Weights(
        source, missing, sorted(info["unexpected_keys"]), mean=mean, std=std, classes=labels if named else None
    )


def _side(size: int | Sequence[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"is not for square pictures and patches, but {size}")
    return sides.pop()


def _check_fit(source: str, info: Mapping[str, Any], depth: int) -> None:
    """Raises ValueError if tensors do not fit the configuration beside them."""
    for name, held, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"model.pretrained {source}: {name} is {list(held)}, but by its config.json it must be {list(expected)}"
        )
    body = re.compile(r"(?:^|\.)(?:layers?\.\d+\.|embeddings\.(?!mask_token))")
    for kind, what in (("missing_keys", "has no"), ("unexpected_keys", "has a tensor without a place,")):
        for name in sorted(info[kind]):
            if body.search(name) and not name.startswith("decoder."):
                raise ValueError(
                    f"model.pretrained {source}: {what} {name}; its config.json is of another model ({depth} blocks)"
                )


def _pixels(source: str) -> tuple[Triple | None, Triple | None]:
    """Mean and standard deviation that the checkpoint's preprocessor_config.json tells."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        told, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):  # there is none
        return None, None
    if not told.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = (told.get(name) for name in ("image_mean", "image_std"))
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        return None, None
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _from_file(settings: Model, device: str) -> tuple[Any, Weights]:
    """A file of weights with the names of timm and others, at its own size and with its own head."""
    path = str(settings.pretrained)
    held = foreign.convert(foreign.read(path, shapes_only=device == "meta"), settings)
    config_class, net_class = _classes(held.family)
    if "distillation_classifier.weight" in held.tensors:
        import transformers

        net_class = transformers.DeiTForImageClassificationWithTeacher
    with torch.device("meta"):
        net = net_class(config_class(**held.shape))
    expected, tensors, missing = net.state_dict(), dict(held.tensors), []
    for name, place in expected.items():
        if name not in tensors:
            # Without a bias is with a bias of zero; all else that may be absent is new in fine-tuning anyway.
            biasless = held.family == "beit" and name.endswith(("q_proj.bias", "v_proj.bias"))
            if not (biasless or name.endswith("mask_token") or "classifier." in name or name in _norms(net)):
                raise ValueError(f"model.pretrained {path}: has no tensor for {name}; is the file whole?")
            tensors[name] = _blank(name, place, device)
            missing.append(name)
        elif tensors[name].shape != place.shape:
            raise ValueError(
                f"model.pretrained {path}: {name} would be {list(tensors[name].shape)}, but by the other tensors and "
                f"settings it must be {list(place.shape)}"
            )
    extra = tensors.keys() - expected.keys()
    if extra:
        raise ValueError(
            f"model.pretrained {path}: no place for {foreign.short(sorted(extra))}, which other blocks lack"
        )
    net.load_state_dict(tensors, assign=True)
    return net, Weights(path, missing, held.ignored)


def _norms(net: Any) -> set[str]:
    """Names of the norm before the head: after the blocks, or after the mean of the patches."""
    base = net.base_model_prefix
    return {f"{base}.{place}layernorm.{kind}" for place in ("", "pooler.") for kind in ("weight", "bias")}


def _blank(name: str, place: Tensor, device: str) -> Tensor:
    """What a norm, a bias or a token is before anything was learnt."""
    return torch.full_like(place, 1.0 if name.endswith("layernorm.weight") else 0.0, device=device)


# ---- made to measure ---------------------------------------------------------------------------


def _resize(net: Any, image_size: int) -> list[str]:
    """Position embeddings and relative biases interpolated to another input size once; tells what it did.

    By the class's own formula, so that the result is what transformers would compute in every forward pass: bicubic
    without antialiasing (as MAE and DeiT do), with it for DINOv2 with registers, bilinear for BEiT's biases. timm
    antialiases: its numbers differ a little at another size.
    """
    embeddings = net.base_model.embeddings
    patches = embeddings.patch_embeddings
    patch = net.config.patch_size
    if image_size % patch:
        raise ValueError(f"model.image_size {image_size} is not a multiple of the checkpoint's patch size {patch}")
    before, after = net.config.image_size // patch, image_size // patch
    resized, positions = [], embeddings.position_embeddings
    if before != after and positions is not None:
        tokens = positions.shape[1] - before**2 + after**2
        fresh = embeddings.interpolate_pos_encoding(
            positions.new_empty(1, tokens, positions.shape[2]), image_size, image_size
        )
        embeddings.position_embeddings = nn.Parameter(fresh.contiguous())
        resized.append(f"position_embeddings {before}x{before} to {after}x{after}")
    biases = [m for m in net.modules() if hasattr(m, "relative_position_bias_table")]
    if before != after and biases:
        old, new = 2 * before - 1, 2 * after - 1
        for bias in biases:
            table = bias.relative_position_bias_table
            grid = table[:-3].reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = nn.functional.interpolate(grid, size=(new, new), mode="bilinear")
            grid = grid.permute(0, 2, 3, 1).reshape(new * new, -1)
            bias.relative_position_bias_table = nn.Parameter(torch.cat([grid, table[-3:]]))
            bias.window_size, bias.num_relative_distance = (after, after), new * new + 3
        resized.append(f"relative_position_bias_table {old}x{old} to {new}x{new}")
    patches.image_size, patches.num_patches = (image_size, image_size), after**2
    if hasattr(embeddings, "image_size"):
        embeddings.image_size = patches.image_size
    net.config.image_size = image_size
    return resized


def _pool(net: Any, wanted: str, weights: Weights) -> Any:
    """The network with a head on the class token ("cls") or on the mean of the patches ("mean").

    transformers' ViT pools the class token only. BEiT's class with absolute positions, without relative biases and
    LayerScale, is the same network with mean(patches), norm, head, as MAE fine-tunes and timm's fc_norm. It has no bias
    on keys: one adds the same to all scores of a query and cancels in the softmax.
    """
    import transformers

    old = net.config
    family = old.model_type
    has = "both" if family.startswith("dinov2") else "mean" if getattr(old, "use_mean_pooling", False) else "cls"
    if wanted in ("auto", has):
        return net
    if has == "both" or family == "deit":
        raise ValueError(f"model.pool={wanted}: transformers' {type(net).__name__} pools its own way; use auto")
    if family == "beit":
        config = transformers.BeitConfig(**old.to_dict())
    else:
        config = transformers.BeitConfig(
            **{name: getattr(old, name) for name in _OF_ANY_VIT},
            use_absolute_position_embeddings=True,
            layer_scale_init_value=0.0,
            drop_path_rate=0.0,
        )
    config.use_mean_pooling = wanted == "mean"
    with torch.device("meta"):
        pooled = transformers.BeitForImageClassification(config)
    mine = f"{net.base_model_prefix}."
    tensors = {
        name.replace(mine, "beit.", 1) if name.startswith(mine) else name: (name, t)
        for name, t in net.state_dict().items()
    }
    taken = {}
    for name, place in pooled.state_dict().items():
        if name not in tensors:
            weights.missing.append(name)
        taken[name] = tensors[name][1] if name in tensors else _blank(name, place, net.device.type)
    pooled.load_state_dict(taken, assign=True)
    left = [old_name for name, (old_name, _) in tensors.items() if name not in taken and "k_proj.bias" not in name]
    weights.ignored.extend(name for name in left if name not in weights.missing)
    weights.missing[:] = [name for name in weights.missing if name not in left]
    return pooled


def _head(net: Any, rule: str, classes: list[str] | None, weights: Weights) -> list[str]:
    """Keep the checkpoint's head (a distilled DeiT has two) or begin another, by model.head; returns the classes."""
    heads = {name: module for name, module in net.named_children() if isinstance(module, nn.Linear)}
    has = not any(f"{name}.weight" in weights.missing for name in heads)
    size, named = next(iter(heads.values())).out_features, weights.classes
    if classes is None:
        if named is None:
            raise ValueError(
                f"model.pretrained {weights.source} does not name its classes: data with classes is needed"
            )
        classes = named
    if rule == "keep" and not (has and size == len(classes)):
        held = f"a head of {size} classes" if has else "no head"
        raise ValueError(f"model.pretrained {weights.source} has {held}, where one of {len(classes)} is needed")
    same = named is not None and sorted(named) == sorted(classes)
    if has and (rule == "keep" or (rule == "auto" and same)):
        if named is not None and same and named != classes:
            order = [named.index(name) for name in classes]
            for head in heads.values():
                head.weight.copy_(head.weight[order])
                head.bias.copy_(head.bias[order])
        return classes
    for name, old in heads.items():
        fresh = nn.Linear(old.in_features, len(classes), device=net.device)
        nn.init.normal_(fresh.weight, std=net.config.initializer_range)
        nn.init.zeros_(fresh.bias)
        setattr(net, name, fresh)
        tensors = [f"{name}.{kind}" for kind in ("weight", "bias")]
        weights.ignored.extend(tensor for tensor in tensors if tensor not in weights.missing)
        weights.missing.extend(tensors)
    net.num_labels = len(classes)
    return classes


def _choose_trained(net: Any, settings: Model) -> None:
    """Freeze what is not trained, add adapters."""
    heads = tuple(f"{name}." for name, module in net.named_children() if isinstance(module, nn.Linear))
    if settings.lora:
        _with_adapters(net, _lora(settings.lora))
    layer, depth = layers(net)
    if settings.freeze != "all" and settings.freeze > depth + 1:
        raise ValueError(f"model.freeze {settings.freeze}: there are {depth} blocks: at most {depth + 1}, or all")
    for name, parameter in net.named_parameters():
        if name.endswith("mask_token"):  # of pretraining: takes no part in the forward pass
            parameter.requires_grad_(False)
        elif name.startswith(heads):
            parameter.requires_grad_(True)
        elif settings.freeze == "all" or layer[name] < settings.freeze:
            parameter.requires_grad_(False)


def _lora(settings: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_LINEARS[settings.targets],
    )


def _with_adapters(net: nn.Module, config: Any) -> Any:
    """Adapters put into `net`, which stays the outer module and of its class; the value can merge them."""
    from peft.tuners.lora import LoraModel

    return LoraModel(net, config, "default")


# ---- layers ------------------------------------------------------------------------------------


def _blocks(net: Any) -> nn.ModuleList:
    depth = net.config.num_hidden_layers
    return next(m for m in net.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def layers(net: nn.Module) -> tuple[dict[str, int], int]:
    """(layer of each parameter by name, number of blocks L). Raises ValueError for one that no rule names."""
    base = net.base_model
    blocks = next((m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    embeddings = getattr(base, "embeddings", None)
    if base is net or blocks is None or embeddings is None:
        raise ValueError(
            f"{type(net).__name__}: not a ViT with embeddings, blocks and a head; its layers have no order"
        )
    depth = len(blocks)
    rules: list[tuple[nn.Module, int]] = [(embeddings, 0)]
    rules += [(block, 1 + i) for i, block in enumerate(blocks)]
    # Direct children that follow the blocks: final norm (MAE and BEiT count it with the head), pooler, head.
    after = [m for m in base.children() if m is not embeddings and not any(b is blocks for b in m.modules())]
    after += [m for m in net.children() if m is not base]
    rules += [(module, depth + 1) for module in after]
    layer = {id(p): number for module, number in rules for p in module.parameters()}
    unnamed = [name for name, p in net.named_parameters() if id(p) not in layer]
    if unnamed:
        raise ValueError(f"{type(net).__name__}: no layer is known for {', '.join(unnamed)}")
    return {name: layer[id(p)] for name, p in net.named_parameters()}, depth


def layer_name(layer: int, depth: int) -> str:
    """Short and sorting in the order of layers: 00_embeddings, 01_block .. 25_head."""
    kind = "embeddings" if layer == 0 else "head" if layer == depth + 1 else "block"
    return f"{layer:02d}_{kind}"


def dropout(net: nn.Module) -> bool:
    """Whether units or attention weights are dropped in training, of the checkpoint's own accord or in adapters."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in net.modules()) or any(
        getattr(net.config, name, 0.0) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
    )


# What says nothing of what the model computes, or is compared by itself.
_OF_NO_WEIGHT = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
)


def configuration(net: nn.Module) -> dict[str, Any]:
    """The model's configuration as transformers has it, without classes, paths and versions."""
    held: Any = net.config
    return {name: value for name, value in sorted(held.to_dict().items()) if name not in _OF_NO_WEIGHT}


@torch.no_grad()
def take(net: nn.Module, tensors: Mapping[str, torch.Tensor], head: bool) -> tuple[int, list[str]]:
    """Copy `tensors` into the model's of the same name and shape, the classifier's only with `head`.

    Returns (how many were taken, the names of the model's own that stay as they are).
    """
    heads = tuple(f"{name}." for name, module in net.named_children() if isinstance(module, nn.Linear))
    left, own = [], {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, mine in own.items():
        other = tensors.get(name)
        if other is None or other.shape != mine.shape or (name.startswith(heads) and not head):
            left.append(name)
        else:
            mine.copy_(other)
    return len(own) - len(left), left


def describe(settings: Model, net: nn.Module, weights: Weights) -> dict[str, object]:
    """The model as a record: name, weights, parameters, trainable."""
    return {
        "name": settings.pretrained or "ViT from scratch",
        "weights": str(weights),
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
    }


def flops_per_image(net: nn.Module) -> float:
    """FLOP of one image's forward and backward pass, 2 a multiply-add.

    Backward counts a multiplication for the gradient of the input, where something below is trained, and one for that
    of the weight, where it is: twice the forward in full fine-tuning. ViT-L/16 at 224: 3 x 123.1 = 369.3 GFLOP.
    Tables that say 61.6 "GFLOPs" count multiply-adds forward.
    """
    config: Any = net.config
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1 + getattr(config, "num_register_tokens", 0) + (config.model_type == "deit")
    layer, depth = layers(net)
    lowest = min((layer[name] for name, p in net.named_parameters() if p.requires_grad), default=depth + 1)
    total = sum(2 * tokens**2 * config.hidden_size * (3 if lowest <= i else 1) for i in range(1, depth + 1))
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            macs = module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d):
            macs = module.in_channels * module.out_channels * math.prod(module.kernel_size)
        else:
            continue
        number = layer[f"{name}.weight"]
        times = patches if number == 0 else tokens if number <= depth else 1
        total += times * macs * (1 + (lowest <= number) + module.weight.requires_grad)
    return 2.0 * total
