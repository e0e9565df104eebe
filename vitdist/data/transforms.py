"""Pictures to square uint8 pixels, and uint8 pixels to what the network takes.

    pixels = cut(payload, training_crop(config.data, rng), size=224)     # on the CPU, in a loader process
    inputs = normalise(images.to(device), mean, std, torch.float16)      # on the device, from uint8

JPEGs are decoded by simplejpeg (libjpeg-turbo: 1.4 to 1.5 times PIL's speed) and resized by torch's own uint8
kernel, the one under torchvision's `v2.functional.resized_crop`, which gives the same pixels at the same speed
but costs each process 2.7 s of CPU to import. Everything else (PNG, WebP, CMYK, pictures that libjpeg-turbo warns
about) goes through PIL, and so do pictures under 64 pixels, where a crop of whole pixels would be coarse: PIL takes
a box in fractions. Both are bilinear with antialiasing, as in `ViTImageProcessor`; they differ by 1 of 255.
Large JPEGs are halved by the decoder itself as long as the crop keeps `size` pixels.
benchmarks/loader.py measures all of it.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional as F

from vitdist.config import Data
from vitdist.data.recode import ORIENTATION, SIDEWAYS, UPRIGHT

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright picture."""

Crop = Callable[[int, int], Box]
"""The box to cut out of a picture of that width and height."""


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


def cut(payload: bytes | memoryview, crop: Crop, size: int) -> torch.Tensor:
    """Decode a picture file upright and in RGB, and resize the box that `crop` chooses: uint8 [3, size, size].

    Raises whatever PIL does for a broken file (OSError, ValueError, SyntaxError and more).
    """
    if is_jpeg(payload):
        try:
            pixels = _cut_jpeg(payload, crop, size)
        except ValueError:  # libjpeg-turbo warns; PIL decides whether that is serious
            pixels = None
        if pixels is not None:
            return pixels
    return torch.from_numpy(np.array(_cut_any(payload, crop, size))).permute(2, 0, 1)


def is_jpeg(payload: bytes | memoryview) -> bool:
    """By its content."""
    return bytes(payload[:3]) == b"\xff\xd8\xff"


_COARSE = 64
"""Pixels of the short side below which a box of whole pixels is too coarse."""


def _cut_jpeg(payload: bytes | memoryview, crop: Crop, size: int) -> torch.Tensor | None:
    """`cut` for common JPEGs, None for others. Raises ValueError for what libjpeg-turbo warns about."""
    stored_height, stored_width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    if colours in ("CMYK", "YCCK") or min(stored_height, stored_width) < _COARSE:
        return None
    orientation = jpeg_orientation(payload)
    turned = orientation in SIDEWAYS
    width, height = (stored_height, stored_width) if turned else (stored_width, stored_height)
    box = crop(width, height)
    surplus = int(min(box[2] - box[0], box[3] - box[1]) / size)
    if surplus >= 2:
        least = {"min_height": stored_height // surplus, "min_width": stored_width // surplus, "min_factor": 2}
    else:
        least = {}
    pixels = simplejpeg.decode_jpeg(payload, "RGB", **least)
    if orientation in UPRIGHT:
        pixels = np.array(Image.fromarray(pixels).transpose(UPRIGHT[orientation]))
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    left, right = whole(box[0] * across, box[2] * across, pixels.shape[1])
    top, bottom = whole(box[1] * down, box[3] * down, pixels.shape[0])
    region = torch.from_numpy(pixels)[top:bottom, left:right].permute(2, 0, 1)
    return F.interpolate(region[None], (size, size), mode="bilinear", antialias=True)[0]


def whole(start: float, stop: float, limit: int) -> tuple[int, int]:
    """The nearest whole pixels, at least one, within [0, limit)."""
    first = min(round(start), limit - 1)
    return first, max(first + 1, min(round(stop), limit))


def jpeg_orientation(payload: bytes | memoryview) -> int | None:
    """That of its EXIF, None if it has none."""
    # Reading EXIF costs PIL 60 us: only where the marker is there at all. It lies within the first segments.
    if b"Exif\0\0" not in bytes(payload[:4096]):
        return None
    return Image.open(io.BytesIO(payload)).getexif().get(ORIENTATION)


def _cut_any(payload: bytes | memoryview, crop: Crop, size: int) -> Image.Image:
    """`cut` through PIL."""
    image = Image.open(io.BytesIO(payload))
    orientation = image.getexif().get(ORIENTATION)
    width, height = reversed(image.size) if orientation in SIDEWAYS else image.size
    box = crop(width, height)
    # The decoder may drop resolution as long as the box keeps `size` pixels. Only JPEG can; others ignore it.
    surplus = int(min(box[2] - box[0], box[3] - box[1]) / size)
    if surplus >= 2:
        image.draft(None, (image.width // surplus, image.height // surplus))
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
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


def training_draw(settings: Data, rng: np.random.Generator) -> tuple[Crop, bool]:
    """How a sample is cropped, and whether it is flipped. All randomness comes from `rng`, the crop's too."""
    flipped = bool(rng.random() < settings.flip)
    return training_crop(settings, rng), flipped


def training_pixels(payload: bytes | memoryview, settings: Data, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Randomly cropped and flipped, uint8 [3, size, size]."""
    crop, flipped = training_draw(settings, rng)
    pixels = cut(payload, crop, size)
    return pixels.flip(-1) if flipped else pixels


def evaluation_pixels(payload: bytes | memoryview, settings: Data, size: int) -> torch.Tensor:
    """Centrally cropped, uint8 [3, size, size]."""
    return cut(payload, evaluation_crop(settings, size), size)


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
