"""The first pictures as the model gets them, after augmentation and mixing.

    inputs = Inputs(pixels, classes, journal.inputs)     # rank 0 of a new run
    inputs.see(images, target)                           # of each micro-batch; free once there are enough

Wrong colours, crops or labels show there.
"""

import base64
import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from vitdist.config import Pixels

MOST = 16
SIDE = 224
"""Longest side in pixels."""
SHARE = 0.05
"""Of a mixed label: less is not told."""


class Inputs:
    """Collects the first MOST pictures of this rank; `done` gets them, as {"label": ..., "jpeg": base64} of each."""

    def __init__(self, pixels: Pixels, classes: list[str], done: Callable[[list[dict[str, str]]], None]) -> None:
        self._pixels, self._classes, self._done = pixels, classes, done
        self._pictures: list[dict[str, str]] = []

    def see(self, images: Tensor, target: Tensor) -> None:
        """Take what is still wanted of `images` [N, 3, H, W], normalised, and `target`, [N] or [N, classes]."""
        if len(self._pictures) == MOST:
            return
        wanted = slice(0, MOST - len(self._pictures))
        for picture, label in zip(images[wanted].detach().float().cpu(), target[wanted].cpu(), strict=True):
            jpeg = base64.b64encode(self._jpeg(picture)).decode()
            self._pictures.append({"label": self._words(label), "jpeg": jpeg})
        if len(self._pictures) == MOST:
            self._done(self._pictures)

    def _words(self, label: Tensor) -> str:
        if label.ndim == 0:
            return self._classes[int(label)]
        shares = label / label.sum().clamp(min=1e-12)
        order = [int(i) for i in shares.argsort(descending=True)[:3] if shares[i] >= SHARE]
        if len(order) == 1:
            return self._classes[order[0]]
        return " + ".join(f"{shares[i]:.0%} {self._classes[i]}" for i in order)

    def _jpeg(self, picture: Tensor) -> bytes:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self._pixels.mean, self._pixels.std))
        levels = ((picture * std + mean).nan_to_num(0.0).clamp(0, 1) * 255).round().byte()
        made = Image.fromarray(levels.permute(1, 2, 0).numpy())
        made.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        made.save(file, "JPEG", quality=85)
        return file.getvalue()
