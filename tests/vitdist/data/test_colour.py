"""Auto-augmentation and jitter: what timm, torchvision and PIL do, by sample.

python -m pytest tests/vitdist/data/test_colour.py
"""

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from vitdist.config import Data
from vitdist.data import augment, colour

SIZE = 32
KNOWN = ["trivial", "rand-m9-mstd0.5-inc1", "rand-m15-mmax20-n3-p1-tweights", "rand-t3a", "augmix-m5-w4",
         "augmix-d2-b1", "original", "originalr-mstd0.5", "v0", "v0r", "3a"]  # fmt: skip


def settings(**values: Any) -> Data:
    return Data(train="-", val="-", **values)


def picture(size: int = SIZE) -> torch.Tensor:
    """Smooth, with colours: edges and tones that every operation changes."""
    y, x = np.mgrid[:size, :size] / size
    planes = [255 * x, 255 * y * x, 200 * (1 - y)]
    return torch.from_numpy(np.stack(planes).astype(np.uint8))


def changed(seed: int, **values: Any) -> torch.Tensor:
    return colour.change(picture(), settings(**values), np.random.default_rng(seed))


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def reference(notation: str, mean: tuple[int, ...]) -> Any:
    """The transform as its library makes it."""
    if notation == "trivial":
        from torchvision.transforms import v2

        return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    how = {"translate_const": int(SIZE * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BILINEAR}
    if notation.startswith("augmix"):
        return augment_and_mix_transform(notation, how | {"translate_pct": 0.3})
    make = rand_augment_transform if notation.startswith("rand") else auto_augment_transform
    return make(notation, how)


@pytest.mark.parametrize("notation", KNOWN)
@pytest.mark.parametrize("mean", [None, (0.485, 0.456, 0.406)], ids=["grey", "mean"])
def test_pixels_are_the_librarys(notation: str, mean: tuple[float, ...] | None) -> None:
    theirs = reference(notation, (124, 116, 104) if mean else (128, 128, 128))
    how = settings(auto_augment=notation, **({"mean": mean, "std": (1.0, 1.0, 1.0)} if mean else {}))
    different, refused = 0, 0
    for seed in range(40):
        ours = colour.change(picture(), how, np.random.default_rng(seed))
        drawn = int(np.random.default_rng(seed).integers(2**32))
        random.seed(drawn), np.random.seed(drawn), torch.manual_seed(drawn)
        try:
            expected = as_pixels(theirs(as_image(picture())))
        except ValueError:  # Pillow, of 0 bits: see colour._posterize
            refused += 1
            continue
        assert torch.equal(ours, expected)
        different += not torch.equal(ours, picture())
    assert different > 15
    assert refused < 5


def test_the_strongest_posterize_keeps_a_bit() -> None:
    """Where timm asks Pillow for none: half of the strongest RandAugments of this operation would end a run."""
    from timm.data import auto_augment as timm

    policy = colour._policy("rand-m10-inc1", None)
    (operation,) = (op for op in policy.ops if op.name == "PosterizeIncreasing")
    operation.prob = 1.0
    assert sorted(np.unique(np.array(operation(as_image(picture()))))) == [0, 128]
    weakest = colour._policy("rand-m30-mmax30-p1", None).ops[4]  # keeps 12 of 8 bits
    assert (weakest.name, weakest(as_image(picture()))) == ("Posterize", as_image(picture()))
    assert timm.NAME_TO_OP["PosterizeIncreasing"] is timm.posterize  # other users of timm find it as it was
    colour._policy.cache_clear()


def test_the_same_rng_gives_the_same_pixels_whatever_went_before() -> None:
    for values in ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {"auto_augment": "trivial"}, {"colour_jitter": 0.4}):
        first = [changed(seed, **values) for seed in range(12)]
        random.seed(99), np.random.seed(99), torch.manual_seed(99)
        again = [changed(seed, **values) for seed in reversed(range(12))][::-1]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert len({pixels.numpy().tobytes() for pixels in first}) > 6


@pytest.mark.parametrize("notation", ["trivial", "rand-m9", "3a", "augmix"])
def test_the_global_generators_are_left_alone(notation: str) -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(3)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for seed in range(5):
        changed(seed, auto_augment=notation, colour_jitter=0.3)
    assert (random.random(), np.random.random()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_generators_are_put_back_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(image: Image.Image) -> Image.Image:
        random.random(), np.random.random(), torch.rand(1)
        raise RuntimeError("a fault of the library")

    monkeypatch.setattr(colour, "_policy", lambda *_: fails)
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    with pytest.raises(RuntimeError, match="of the library"):
        changed(0, auto_augment="trivial")
    assert random.getstate() == before[0]
    assert np.random.get_state()[2] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_jitter_is_pils_in_random_order() -> None:
    enhancers, orders, factors = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color], set(), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        drawn, order = rng.uniform(0.7, 1.3, 3), rng.permutation(3).tolist()
        image = as_image(picture())
        for which in order:
            image = enhancers[which](image).enhance(drawn[which])
        assert torch.equal(changed(seed, colour_jitter=0.3), as_pixels(image))
        orders.add(tuple(order))
        factors.extend(drawn)
    assert len(orders) == 6
    assert (min(factors) < 0.72, max(factors) > 1.28) == (True, True)


def test_jitter_is_torchvisions() -> None:
    """Its ColorJitter on the same picture, given our factors and order: at most 1 of 255 apart a step."""
    from torchvision.transforms.v2 import functional

    steps = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn, order = rng.uniform(0.7, 1.3, 3), rng.permutation(3)
        expected = picture()
        for which in order:
            expected = steps[which](expected, drawn[which])
        difference = (changed(seed, colour_jitter=0.3).int() - expected.int()).abs()
        assert difference.max() <= 3


def test_jitter_comes_after_auto_augment() -> None:
    both = changed(3, auto_augment="3a", colour_jitter=0.4)
    rng = np.random.default_rng(3)
    first = colour.change(picture(), settings(auto_augment="3a"), rng)
    assert torch.equal(both, colour.change(first, settings(colour_jitter=0.4), rng))
    assert not torch.equal(both, first)


def test_nothing_asked_draws_nothing() -> None:
    rng, pixels = np.random.default_rng(0), picture()
    assert colour.change(pixels, settings(), rng) is pixels
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("notation", [*KNOWN, "none", "rand", "rand-m9-mstd101"])
def test_known_notations_pass(notation: str) -> None:
    augment.check(settings(auto_augment=notation), 3)


@pytest.mark.parametrize(
    "notation",
    ["", "random", "rand-m9-strong", "rand-x3", "rand-m9.5", "rand-n0", "rand-p2", "rand-m9-tall", "augmix-w0",
     "augmix-a0", "augmix-a0.0", "augmix-x", "3b", "original-m9", "trivial-m9", "None", "rand-m9\n"],
)  # fmt: skip
def test_others_are_refused_with_what_there_is(notation: str) -> None:
    with pytest.raises(ValueError, match=r"is not known; there are: none, trivial, rand .*augmix.*3a"):
        augment.check(settings(auto_augment=notation), 2)


@pytest.mark.parametrize("values", [{"auto_augment": "trivial"}, {"colour_jitter": 0.1}])
def test_pixels_made_on_the_device_cannot_be_changed_before(values: dict[str, Any]) -> None:
    augment.check(settings(decode="gpu"), 2)
    with pytest.raises(ValueError, match=r"use data\.decode=cpu"):
        augment.check(settings(decode="gpu", **values), 2)


def test_jitter_alone_loads_no_library() -> None:
    code = (
        "import sys; from vitdist.config import Data; from vitdist.data import augment\n"
        "augment.check(Data(train='-', val='-', colour_jitter=0.3), 2)\n"
        "print([name in sys.modules for name in ('timm', 'torchvision')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[False, False]\n"


def test_the_check_makes_the_transform_and_so_loads_its_library() -> None:
    colour._policy.cache_clear()
    augment.check(settings(auto_augment="3a"), 2)
    assert colour._policy.cache_info().currsize == 1
