"""Models from scratch and from a local folder, position embeddings at another size, the exported folder."""

from pathlib import Path

import pytest
import torch

from vitdist import model
from vitdist.config import Model, Scratch

SHAPE = Scratch(patch_size=8, width=32, depth=2, heads=2)


def saved(folder: Path) -> Path:
    net, _ = model.build(Model(scratch=SHAPE, image_size=32), ["a", "b", "c"], seed=1)
    net.save_pretrained(folder)
    return folder


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = (model.build(Model(scratch=SHAPE, image_size=32), ["a", "b"], seed=s)[0] for s in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_new_head_for_other_classes_and_the_rest_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    original, _ = model.build(Model(scratch=SHAPE, image_size=32), ["a", "b", "c"], seed=1)
    net, weights = model.build(Model(pretrained=str(folder), image_size=32), ["x", "y"], seed=0)
    assert weights.missing == ["classifier.bias", "classifier.weight"]
    assert net.classifier.out_features == 2
    assert net.config.id2label == {0: "x", 1: "y"}
    for name, parameter in net.named_parameters():
        if not name.startswith("classifier"):
            assert torch.equal(parameter, original.get_parameter(name)), name


def test_position_embeddings_are_interpolated_to_another_size(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    net, weights = model.build(Model(pretrained=str(folder), image_size=48), ["a", "b", "c"], seed=0)
    assert weights.resized == ["position_embeddings 4x4 to 6x6"]
    images = torch.randn(2, 3, 48, 48)
    small, _ = model.build(Model(pretrained=str(folder), image_size=32), ["a", "b", "c"], seed=0)
    expected = small(pixel_values=images, interpolate_pos_encoding=True).logits
    assert torch.allclose(net(pixel_values=images).logits, expected, atol=1e-5)


def test_a_model_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.pretrained '.*nowhere' cannot be loaded.*hf download"):
        model.build(Model(pretrained=str(tmp_path / "nowhere"), image_size=32), ["a", "b"], seed=0)
