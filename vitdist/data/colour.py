"""What happens to a training picture between crop and mixing: auto-augmentation, then colour jitter.

    colour.load(config.data)                            # once a rank, before loader processes fork
    pixels = colour.change(pixels, config.data, rng)    # in a loader process: uint8 [3, S, S]

Through PIL, as the published recipes do it: timm's operations for RandAugment, AutoAugment, 3-Augment and AugMix,
torchvision's TrivialAugment, PIL's own enhancers for the jitter. torchvision's kernels for tensors are about as fast
(benchmarks/augment.py) and cost the jitter 2.4 s of CPU to import. The libraries draw from the global generators,
which are seeded here for each picture and put back (160 us): pixels depend on `rng` alone, and dropout in the same
process on nothing of this.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from vitdist.config import Data

Policy = Callable[[Image.Image], Image.Image]
"""A picture to a changed one of the same size, with draws from the global generators."""

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def load(settings: Data) -> None:
    """Import what the settings need, so that loader processes have it."""
    _policy(settings.auto_augment, settings.mean)


def change(pixels: torch.Tensor, settings: Data, rng: np.random.Generator) -> torch.Tensor:
    """Auto-augmented, then jittered, as the settings ask: uint8 [3, S, S] to the same. All draws come from `rng`.

    A fault in here is none of the picture's: it is raised as it comes.
    """
    if not _asked(settings):
        return pixels
    # Planes lie one after the other, so to merge them takes 200 us, to interleave them by strides 500.
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels.numpy()])
    if policy := _policy(settings.auto_augment, settings.mean):
        with _seeded(int(rng.integers(2**32))):
            image = policy(image)
    if settings.colour_jitter:
        image = _jittered(image, settings.colour_jitter, rng)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _asked(settings: Data) -> bool:
    return settings.auto_augment != "none" or settings.colour_jitter > 0


def _jittered(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation by factors of 1 +- strength, in random order, as torchvision's ColorJitter."""
    factors = rng.uniform(1 - strength, 1 + strength, len(_ENHANCERS))
    for which in rng.permutation(len(_ENHANCERS)):
        image = _ENHANCERS[which](image).enhance(float(factors[which]))
    return image


@functools.cache
def _policy(notation: str, mean: tuple[float, ...] | None) -> Policy | None:
    """The transform of a notation; None for "none".

    What rotating and shifting lays bare takes the mean colour, grey if it is not given, as in timm; TrivialAugment's
    is black, as in torchvision.
    """
    if notation == "none":
        return None
    if notation == "trivial":
        from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

        return TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)  # torchvision's default is nearest
    from timm.data import auto_augment as timm

    parameters: dict[str, Any] = {
        # As in timm's transforms_imagenet_train, whose translate_const no notation of ours comes to use.
        "img_mean": tuple(min(255, round(255 * value)) for value in mean) if mean else (128, 128, 128),
        "interpolation": Image.Resampling.BILINEAR,  # as everything here; bicubic takes twice the time
    }
    if notation.startswith("rand"):
        transform = timm.rand_augment_transform(notation, parameters)
        operations = transform.ops
    elif notation.startswith("augmix"):
        transform = timm.augment_and_mix_transform(notation, parameters | {"translate_pct": 0.3})
        operations = transform.ops
    else:
        transform = timm.auto_augment_transform(notation, parameters)
        operations = [operation for both in transform.policy for operation in both]
    for operation in operations:
        if operation.aug_fn is timm.posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's (1.0.31) asks for 0 bits at its strongest, which gave a black picture until Pillow 13 refused it."""
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of random, NumPy and torch (of the CPU: manual_seed would reach the GPU's), for a while."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
