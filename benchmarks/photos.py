"""Pictures with the statistics of photos: 1/f noise, 500x375 and 375x500, JPEGs of some 97 KB (ImageNet's mean is 110).

photos = photos.jpegs(600)                      # bytes, the same ones each time
photos.shards(folder, 600, per_shard=100)       # the same as WebDataset tars, by webdataset's own writer
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image


def jpegs(number: int) -> Iterator[bytes]:
    """Deterministic; one takes 0.03 s."""
    for i in range(number):
        rng = np.random.default_rng(i)
        height, width = (375, 500) if i % 2 else (500, 375)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = 1
        spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
        spectrum[:, 0, 0] = 0
        field = np.fft.irfft2(spectrum, (height, width))
        field /= field.std()
        field[1:] = 0.7 * field[:1] + 0.3 * field[1:]  # colours follow brightness
        pixels = np.clip(120 + 55 * field, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(80, 94)))
        yield buffer.getvalue()


def shards(folder: Path, number: int, per_shard: int, classes: int = 10, mtime: float | None = 0) -> None:
    """Tars of `per_shard` photos with class numbers; `mtime=None` is the writer's default, with PAX headers."""
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    writer = None
    for i, content in enumerate(jpegs(number)):
        if i % per_shard == 0:
            if writer:
                writer.close()
            writer = TarWriter(str(folder / f"{i // per_shard:04d}.tar"), encoder=False, mtime=mtime)
        writer.write({"__key__": f"{i:08d}", "jpg": content, "cls": str(i % classes).encode()})
    if writer:
        writer.close()
