"""JPEGs decoded and cropped on the device (data.decode=gpu): loader processes only read, verify and choose boxes.

    encoded = device_decode.pack(files)          # in a loader process: JPEG files in one tensor
    images = device_decode.pixels(encoded, rest, device, size)     # in the rank: nvJPEG through torchcodec

For nodes with few cores a GPU: decoding takes 75 % of a loader's time. What is no plain JPEG (PNG, CMYK, turned by
EXIF) is still decoded by the loader. Another decoder rounds otherwise: pixels differ a little from data.decode=cpu.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from torch.nn import functional as F

from vitdist.config import Data
from vitdist.data import transforms


class Encoded(NamedTuple):
    """The JPEG files of a micro-batch of B samples."""

    data: torch.Tensor
    """uint8 [bytes of all files]"""
    sizes: torch.Tensor
    """int64 [B]: bytes of each; 0 for a sample that the loader decoded."""
    boxes: torch.Tensor
    """int64 [B, 4]: left, top, right, bottom of the crop in pixels."""
    flipped: torch.Tensor
    """bool [B]"""


class Jpeg(NamedTuple):
    """One file that the device is to decode."""

    payload: bytes
    box: tuple[int, int, int, int]
    flipped: bool


def check() -> None:
    """Raises ValueError if the decoder is not there."""
    try:
        from torchcodec.decoders import decode_jpeg  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"data.decode=gpu needs torchcodec 0.16 or newer ({reason}): pip install torchcodec, or data.decode=cpu"
        ) from None


def jpeg(payload: memoryview, settings: Data, rng: np.random.Generator) -> Jpeg | None:
    """What the device needs of a picture file, or None, with `rng` untouched, if it is no plain, whole JPEG.

    Raises ValueError for a header that is broken.
    """
    if not transforms.is_jpeg(payload) or transforms.jpeg_orientation(payload) not in (None, 1):
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    # The end mark may be followed by padding; a file without one is cut off, which PIL shall tell.
    if colours in ("CMYK", "YCCK") or b"\xff\xd9" not in bytes(payload[-64:]):
        return None
    crop, flipped = transforms.training_draw(settings, rng)
    box = crop(width, height)
    left, right = transforms.whole(box[0], box[2], width)
    top, bottom = transforms.whole(box[1], box[3], height)
    return Jpeg(bytes(payload), (left, top, right, bottom), flipped)


def pack(slots: Sequence[Jpeg | None]) -> Encoded:
    """The files of a micro-batch; None where the loader decodes."""
    files = [slot.payload if slot else b"" for slot in slots]
    joined = b"".join(files)
    return Encoded(
        data=torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8),
        sizes=torch.tensor([len(file) for file in files]),
        boxes=torch.tensor([slot.box if slot else (0, 0, 0, 0) for slot in slots]),
        flipped=torch.tensor([bool(slot and slot.flipped) for slot in slots]),
    )


def pixels(
    encoded: Encoded,
    rest: torch.Tensor,
    device: torch.device,
    size: int,
    instead: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """uint8 [B, 3, size, size] on `device`; `rest`: [B, 3, size, size] with the pixels of samples of size 0.

    `instead`: uint8 [3, size, size] for the slot of a file that this decoder cannot decode; without it RuntimeError.
    """
    from torchcodec.decoders import decode_jpeg

    images = rest.to(device, non_blocking=True).clone()
    here = torch.nonzero(encoded.sizes).flatten().tolist()
    files = [file for file in encoded.data.split(encoded.sizes.tolist()) if len(file)]
    boxes, flipped = encoded.boxes.tolist(), encoded.flipped.tolist()

    def alone(file: torch.Tensor) -> torch.Tensor | None:
        try:
            return decode_jpeg(file, mode="RGB", device=device)
        except RuntimeError:
            if instead is None:
                raise
            return None

    try:
        decoded = decode_jpeg(files, mode="RGB", device=device) if files else []
    except RuntimeError:  # of one file, it does not say which
        decoded = [alone(file) for file in files]
    for slot, picture in zip(here, decoded, strict=True):
        if picture is None:
            assert instead
            images[slot] = instead(slot).to(device)
            continue
        left, top, right, bottom = boxes[slot]
        region = picture[None, :, top:bottom, left:right]
        if device.type == "cuda":  # the antialiasing kernel takes uint8 on CPUs only
            region = F.interpolate(region.float(), (size, size), mode="bilinear", antialias=True)
            region = region.round_().clamp_(0, 255).to(torch.uint8)
        else:
            region = F.interpolate(region, (size, size), mode="bilinear", antialias=True)
        images[slot] = region[0].flip(-1) if flipped[slot] else region[0]
    return images
