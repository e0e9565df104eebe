"""A Hugging Face ViT for classification, and the layer that each of its parameters belongs to.

The only file that builds models with transformers. Layer numbers follow BEiT and MAE: 0 the
embeddings, 1..L the blocks, L+1 the final norm and the head. They are read off the tree of modules,
not off prefixes of names: transformers renamed `vit.encoder.layer.N` to `vit.layers.N` in 5.9, and a
rule by prefix with a silent rest gives every block the head's learning rate.
"""

from dataclasses import dataclass

import torch
from torch import nn

from vitdist.config import Model, Scratch


@dataclass(frozen=True)
class Weights:
    """What became of a checkpoint's tensors; all empty for a model from scratch."""

    source: str
    missing: list[str]
    ignored: list[str]
    resized: list[str]
    mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    """Of the pixels that the checkpoint was trained with; None where it does not tell."""

    def __str__(self) -> str:
        if self.source == "scratch":
            return "random weights"
        parts = [
            f"{name} {', '.join(names)}"
            for name, names in (("new:", self.missing), ("left out:", self.ignored), ("resized:", self.resized))
            if names
        ]
        return f"weights of {self.source}" + (f" ({'; '.join(parts)})" if parts else "")


def build(
    settings: Model, classes: list[str], seed: int, device: torch.device | None = None
) -> tuple[nn.Module, Weights]:
    """A classifier of `classes` on `device`; the same `seed` gives the same new weights on every rank and device.

    Its forward takes pixel_values [B, 3, S, S] and returns an object with logits [B, classes].
    Raises ValueError if `pretrained` cannot be had or is no ViT classifier.
    """
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if settings.scratch:
        net, weights = _scratch(settings.scratch, settings.image_size, labels), Weights("scratch", [], [], [])
    else:
        net, weights = _pretrained(str(settings.pretrained), settings.image_size, labels)
    if settings.gradient_checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (net.to(device) if device else net), weights


def _scratch(shape: Scratch, image_size: int, labels: dict) -> nn.Module:
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTForImageClassification

    config = ViTConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=round(shape.width * shape.mlp_ratio),
        patch_size=shape.patch_size,
        image_size=image_size,
        layer_norm_eps=1e-6,  # timm, MAE, DeiT; transformers' 1e-12 is below half precision's resolution
        **labels,
    )
    return ViTForImageClassification(config)


def _pretrained(source: str, image_size: int, labels: dict) -> tuple[nn.Module, Weights]:
    from transformers import AutoModelForImageClassification

    try:
        net, info = AutoModelForImageClassification.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.pretrained {source!r} cannot be loaded: {reason} "
            "(without a network: fetch it once where there is one, `hf download ID`, and give the folder)"
        ) from None
    mismatched = sorted(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])
    resized = _resize_positions(net, image_size)
    missing = sorted({*info["missing_keys"], *mismatched})
    return net, Weights(source, missing, sorted(info["unexpected_keys"]), resized)


@torch.no_grad()
def _resize_positions(net: nn.Module, image_size: int) -> list[str]:
    """Interpolate position embeddings to another input size once, as MAE and DeiT do (bicubic).

    Doing it in every forward (`interpolate_pos_encoding`) would cost time and keep the old size on export.
    """
    if net.config.image_size == image_size:
        return []
    embeddings = net.base_model.embeddings
    patches, old = embeddings.patch_embeddings, embeddings.position_embeddings
    patch = patches.patch_size[0]
    if image_size % patch:
        raise ValueError(f"model.image_size {image_size} is not a multiple of the checkpoint's patch size {patch}")
    before, after = round((old.shape[1] - 1) ** 0.5), image_size // patch
    grid = old[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, after * after, -1)
    embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :1], grid], dim=1))
    patches.image_size = embeddings.image_size = (image_size, image_size)
    patches.num_patches = after * after
    net.config.image_size = image_size
    return [f"position_embeddings {before}x{before} to {after}x{after}"]


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


def describe(settings: Model, net: nn.Module, weights: Weights) -> dict[str, object]:
    """The model as a record: name, weights, parameters, trainable."""
    return {
        "name": settings.pretrained or "ViT from scratch",
        "weights": str(weights),
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
    }


def flops_per_image(net: nn.Module) -> float:
    """FLOP of one image's forward and backward pass, 2 a multiply-add; backward counts twice the forward.

    ViT-L/16 at 224: 3 x 123.1 = 369.3 GFLOP. Tables that say 61.6 "GFLOPs" count multiply-adds forward.
    """
    c = net.config
    patches = (c.image_size // c.patch_size) ** 2
    tokens, width = patches + 1, c.hidden_size
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * c.intermediate_size
    forward = patches * 3 * c.patch_size**2 * width + c.num_hidden_layers * block + width * c.num_labels
    return 3.0 * 2.0 * forward
