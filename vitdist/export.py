"""The trained model as a Hugging Face folder, which `pipeline("image-classification", model=...)` opens."""

import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from vitdist import rundir
from vitdist.config import Pixels


def write(folder: Path, net: nn.Module, weights: dict[str, torch.Tensor], pixels: Pixels) -> None:
    """Write `weights` (whole, fp32, by name) of `net` with its image processor; the folder appears whole.

    Goes through `save_pretrained`, which writes the names that every version of transformers reads;
    DeepSpeed's own dump has the names of the version that trained.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    whole = type(net)(net.config)  # under ZeRO-3 the trained module holds no weights
    whole.load_state_dict(weights)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    whole.save_pretrained(temporary)
    _processor(pixels).save_pretrained(temporary)
    for path in temporary.iterdir():
        rundir.sync_file(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    rundir.sync_folder(folder.parent)


def _processor(pixels: Pixels):
    """The evaluation's transform as a processor: short side resized, central crop, scaled to 0..1, normalised."""
    from transformers import CLIPImageProcessor  # ViT's own has no central crop

    side = pixels.image_size
    return CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(side / pixels.eval_crop)},
        resample=Image.Resampling.BILINEAR,  # as vitdist/data/transforms.py resizes
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        do_convert_rgb=True,
    )
