"""Pictures to square uint8 pixels, and uint8 pixels to what the network takes.

    pixels = cut(payload, training_crop(config.data, rng), size=224)     # on the CPU, in a loader process
    inputs = normalise(images.to(device), mean, std, torch.float16)      # on the device, from uint8

PIL cuts and resizes in one call. Measured on one core with 400x533 JPEGs of 31 KB, decoding included: PIL
bilinear 325 pictures/s, torchvision v2 on uint8 399, `torch.nn.functional.interpolate` on uint8 374. But
importing torchvision costs each process 2.7 s of CPU, and both kernels cut at whole pixels only, where PIL
takes a box in fractions: that matters for 8-pixel digits. Bilinear with antialiasing is also what
`ViTImageProcessor` does, so an exported model sees the same pixels. For large JPEGs `draft` lets the decoder
itself halve the picture: 60 instead of 5 pictures/s at 12 megapixels.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from vitdist.config import Data

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright picture."""

Crop = Callable[[int, int], Box]
"""The box to cut out of a picture of that width and height."""

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


def training_crop(settings: Data, rng: np.random.Generator) -> Crop:
    """Random resized crop (Inception): `crop_scale` of the area, sides as `crop_ratio`, anywhere it fits."""

    def crop(width: int, height: int) -> Box:
        for _ in range(10):
            area = width * height * rng.uniform(*settings.crop_scale)
            narrow, wide = settings.crop_ratio
            ratio = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                break
        else:  # long, narrow pictures: the largest central box of an allowed ratio
            ratio = min(max(width / height, settings.crop_ratio[0]), settings.crop_ratio[1])
            w, h = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - w) * rng.random(), (height - h) * rng.random()
        return left, top, left + w, top + h

    return crop


def evaluation_crop(settings: Data, size: int) -> Crop:
    """Short side to round(size / eval_crop), then the central `size` pixels: as one box of the original."""
    share = size / round(size / settings.eval_crop)

    def crop(width: int, height: int) -> Box:
        side = min(width, height) * share
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    return crop


def cut(payload: bytes, crop: Crop, size: int) -> Image.Image:
    """Decode a picture file upright and in RGB, and resize the box that `crop` chooses to size x size.

    Raises whatever PIL does for a broken file (OSError, ValueError, SyntaxError and more).
    """
    image = Image.open(io.BytesIO(payload))
    orientation = image.getexif().get(_ORIENTATION)
    width, height = reversed(image.size) if orientation in (5, 6, 7, 8) else image.size
    box = crop(width, height)
    # The decoder may drop resolution as long as the box keeps `size` pixels. Only JPEG can; others ignore it.
    surplus = int(min(box[2] - box[0], box[3] - box[1]) / size)
    if surplus >= 2:
        image.draft(None, (image.width // surplus, image.height // surplus))
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    across, down = image.width / width, image.height / height
    left, top, right, bottom = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    inside = (left, top, min(right, image.width), min(bottom, image.height))  # rounding may pass the edge
    return _rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=inside)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, as in X-ray exports; PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette with transparent entries warns without this step
    return image.convert("RGB")


def training_pixels(payload: bytes, settings: Data, size: int, rng: np.random.Generator) -> np.ndarray:
    """Randomly cropped and flipped, uint8 [size, size, 3]. All randomness comes from `rng`."""
    flipped = rng.random() < settings.flip
    image = cut(payload, training_crop(settings, rng), size)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image)


def evaluation_pixels(payload: bytes, settings: Data, size: int) -> np.ndarray:
    """Centrally cropped, uint8 [size, size, 3]."""
    return np.asarray(cut(payload, evaluation_crop(settings, size), size))


def normalise(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(images / 255 - mean) / std on the images' device: uint8 [B, 3, H, W] to `dtype` [B, 3, H, W]."""
    mean_, std_ = (_channels(tuple(values), images.device) for values in (mean, std))
    return images.contiguous().float().mul_(1 / 255).sub_(mean_).div_(std_).to(dtype)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [C, 1, 1]. Cached: the copy of a new one would make the CPU wait for the GPU at every step."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
