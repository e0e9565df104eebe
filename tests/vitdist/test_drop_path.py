"""Stochastic depth: the right shares, the same masks for every split, and exactly the branches that they name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import model_workers, ranks
from tests.ranks import matrix
from vitdist import drop_path, model
from vitdist.config import Lora, Model, Scratch

RATE = 0.5
SHAPE = Scratch(patch_size=8, width=32, depth=3, heads=2)
RATES = [0.0, 0.25, 0.5]
LORA = Lora(rank=2, targets="all-linear")


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small models whose blocks differ in kind."""
    import transformers as t

    common: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_dropout_prob": 0.0,
    }
    beit = {"intermediate_size": 64, "layer_scale_init_value": 0.5, "drop_path_rate": 0.3}
    nets = {
        "vit": t.ViTForImageClassification(t.ViTConfig(**common, intermediate_size=64)),
        "deit": t.DeiTForImageClassification(t.DeiTConfig(**common, intermediate_size=64)),
        "msn": t.ViTMSNForImageClassification(t.ViTMSNConfig(**common, intermediate_size=64)),
        "beit": t.BeitForImageClassification(t.BeitConfig(**common, **beit, use_relative_position_bias=True)),
        "dinov2": t.Dinov2ForImageClassification(t.Dinov2Config(**common, mlp_ratio=2, drop_path_rate=0.3)),
    }
    tmp_path = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    for name, net in nets.items():
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        net.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in nets}


# ---- masks -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.integers(0, 10**6),
)
def test_masks_do_not_depend_on_the_split(depth: int, world: int, accumulation: int, seed: int, step: int) -> None:
    rates = np.linspace(0, RATE, depth).tolist()
    total = 24 * world * accumulation
    start = step * total
    whole = drop_path.masks(rates, seed, step, (start, start + total), total)
    size = total // (world * accumulation)
    parts = [
        drop_path.masks(rates, seed, step, (start + i * size, start + (i + 1) * size), total)
        for i in range(world * accumulation)
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    assert whole.shape == (2 * depth, total)
    assert whole.dtype == np.float32


def test_shares_of_masks() -> None:
    """Of 20,000 samples: the share dropped, the mean of 1, no tie between branches, blocks, samples, steps or seeds."""
    n = 20_000
    drawn = drop_path.masks(RATES, 7, 0, (0, n), n)
    for branch, rate in enumerate(np.repeat(RATES, 2)):
        values = set(np.unique(drawn[branch]).tolist())
        assert values == ({1.0} if rate == 0 else {0.0, np.float32(1 / (1 - rate)).item()})
        spread = math.sqrt(rate * (1 - rate) / n)
        assert abs((drawn[branch] == 0).mean() - rate) <= 5 * spread
    ties = np.corrcoef(drawn[2:] == 0)
    assert np.abs(ties - np.eye(4)).max() < 5 / math.sqrt(n)
    neighbours = np.corrcoef(drawn[5, 1:] == 0, drawn[5, :-1] == 0)
    assert abs(neighbours[0, 1]) < 5 / math.sqrt(n)
    for seed, step in ((7, 1), (8, 0)):
        other = drop_path.masks(RATES, seed, step, (step * n, (step + 1) * n), n)
        assert abs(np.corrcoef(drawn[5] == 0, other[5] == 0)[0, 1]) < 5 / math.sqrt(n)


def test_no_mask_is_shared_with_augmentation() -> None:
    """The same numbers for mixing and for dropping would tie the two together."""
    ours = np.random.default_rng([3, 5, 4]).random(8, dtype=np.float32)
    assert np.array_equal(drop_path.masks([0.5], 3, 5, (5 * 4, 6 * 4), 4).T.ravel() == 0, ours < 0.5)


# ---- in a model --------------------------------------------------------------------------------


def by_hand(net: Any, pixels: Tensor, masks: Tensor) -> Tensor:
    """What transformers' blocks give, with branches times masks [2 L, B, 1, 1]; no hooks are used."""
    base = net.base_model
    hidden = base.embeddings(pixels)
    blocks = base.encoder.layer if hasattr(base, "encoder") else base.layers
    for i, block in enumerate(blocks):
        first = getattr(block, "layernorm_before", None) or block.norm1
        second = getattr(block, "layernorm_after", None) or block.norm2
        scale1, scale2 = (
            (block.layer_scale1.lambda1, block.layer_scale2.lambda1)
            if hasattr(block, "layer_scale1")
            else (getattr(block, "lambda_1", 1.0), getattr(block, "lambda_2", 1.0))
        )
        bias = getattr(block, "relative_position_bias", None)
        mask = None if bias is None else bias((4, 4))
        hidden = hidden + scale1 * masks[2 * i] * block.attention.forward(first(hidden), mask)[0]
        hidden = hidden + scale2 * masks[2 * i + 1] * block.mlp.forward(second(hidden))
    return hidden


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["vit", "deit", "msn", "beit", "dinov2"])
def test_a_family_drops_exactly_the_branches_that_the_masks_name(
    folders: dict[str, str], family: str, checkpointing: bool
) -> None:
    asked = Model(pretrained=folders[family], image_size=32, drop_path=RATE, gradient_checkpointing=checkpointing)
    net, _ = model.build(asked, list("ab"), 0)
    paths = model.drop_paths(net)
    assert paths
    assert paths.rates == pytest.approx(RATES)
    token = net.base_model.embeddings.cls_token
    for step in range(2):
        slots = (step * 12 + 6, step * 12 + 12)  # the second of two ranks
        paths.draw(3, step, slots, 12)
        logits = net(pixel_values=images()).logits
        masks = torch.from_numpy(drop_path.masks(RATES, 3, step, slots, 12))[:, :, None, None]
        expected = head(net, by_hand(net, images(), masks))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        # The recomputation in the backward pass sees the same masks: gradients are those of the same network.
        (gradient,) = torch.autograd.grad(logits.square().sum(), token)
        (reference,) = torch.autograd.grad(expected.square().sum(), token)
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)
        undropped = head(net, by_hand(net, images(), torch.ones_like(masks)))
        assert not torch.allclose(logits, undropped, atol=1e-3)


def head(net: Any, hidden: Tensor) -> Tensor:
    """transformers' own head on hidden states of the last block."""
    base = net.base_model
    hidden = base.layernorm(hidden)
    if net.config.model_type == "beit":
        return net.classifier(base.pooler(hidden))  # type: ignore[no-any-return]
    if net.config.model_type == "dinov2":
        return net.classifier(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1))  # type: ignore[no-any-return]
    return net.classifier(hidden[:, 0])  # type: ignore[no-any-return]


def test_evaluation_drops_nothing(folders: dict[str, str]) -> None:
    for family, folder in folders.items():
        one, _ = model.build(Model(pretrained=folder, image_size=32, drop_path=RATE), list("ab"), 0)
        two, _ = model.build(Model(pretrained=folder, image_size=32), list("ab"), 0)
        assert model.drop_paths(two) is None
        with torch.no_grad():
            assert torch.equal(one.eval()(pixel_values=images()).logits, two.eval()(pixel_values=images()).logits)
            # Without drop path of ours there is none either: the checkpoint's own rate would be drawn per rank.
            twice = [two.train()(pixel_values=images()).logits for _ in range(2)]
        assert torch.equal(*twice), family


def test_nothing_of_it_is_saved() -> None:
    bare, _ = model.build(Model(scratch=SHAPE, image_size=32), list("ab"), 0)
    net, _ = model.build(Model(scratch=SHAPE, image_size=32, drop_path=RATE), list("ab"), 0)
    assert [n for n, _ in net.named_modules()] == [n for n, _ in bare.named_modules()]
    assert net.state_dict().keys() == bare.state_dict().keys()
    assert not dict(net.named_buffers())


def test_training_without_a_draw_is_a_fault() -> None:
    net, _ = model.build(Model(scratch=SHAPE, image_size=32, drop_path=RATE), list("ab"), 0)
    with pytest.raises(AssertionError, match="draw"):
        net(pixel_values=images())


def test_accumulated_micro_batches_may_be_backpropagated_late() -> None:
    net, _ = model.build(Model(scratch=SHAPE, image_size=32, drop_path=RATE), list("ab"), 0)
    paths = model.drop_paths(net)
    assert paths
    outputs = []
    for part in range(2):
        paths.draw(0, 0, (part * 6, part * 6 + 6), 12)
        outputs.append(net(pixel_values=images()).logits.sum())
    assert outputs[0] != outputs[1]
    for output in outputs:
        output.backward()


@pytest.mark.parametrize(("checkpointing", "lora"), matrix({(False, None), (True, LORA)}, [False, True], [None, LORA]))
def test_compiled_once_for_all_steps(tmp_path: Path, checkpointing: bool, lora: Lora | None) -> None:
    folder = tmp_path / "m"
    model.finished(*_scratch_state()).save_pretrained(folder)
    asked = Model(
        pretrained=str(folder), image_size=32, drop_path=RATE, gradient_checkpointing=checkpointing, lora=lora
    )
    net, _ = model.build(asked, list("ab"), 0)
    paths = model.drop_paths(net)
    assert paths
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    results = []
    for step in range(4):
        paths.draw(0, step, (step * 6, step * 6 + 6), 6)
        results.append(compiled(pixel_values=images()).logits)
        torch.testing.assert_close(results[-1], net(pixel_values=images()).logits)
    assert len(graphs) == 1
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    net.eval()
    compiled(pixel_values=images())
    net.train()
    paths.draw(0, 9, (54, 60), 6)
    torch.testing.assert_close(compiled(pixel_values=images()).logits, net(pixel_values=images()).logits)
    assert len(graphs) == 2, "evaluation has a graph of its own, and training keeps its one"
    assert not torch._dynamo.utils.counters["graph_break"]


def _scratch_state() -> tuple[nn.Module, dict[str, Tensor]]:
    net, _ = model.build(Model(scratch=SHAPE, image_size=32), list("ab"), 0)
    return net, net.state_dict()


def test_half_precision_stays_half() -> None:
    net, _ = model.build(Model(scratch=SHAPE, image_size=32, drop_path=RATE), list("ab"), 0)
    paths = model.drop_paths(net)
    assert paths
    paths.draw(0, 0, (0, 6), 6)
    single = net(pixel_values=images()).logits
    for dtype in (torch.float16, torch.bfloat16):
        half = net.to(dtype)(pixel_values=images().to(dtype)).logits
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), single, atol=0.05, rtol=0.05)


# ---- over ranks --------------------------------------------------------------------------------

_RANKS: dict[str, Any] = {"model.drop_path": RATE}


@pytest.mark.processes
@pytest.mark.parametrize(("world", "zero", "accumulation"), matrix({(2, 3, 2)}, [1, 2], [0, 2, 3], [1, 2]))
def test_ranks_and_accumulation_do_not_change_the_losses(world: int, zero: int, accumulation: int) -> None:
    reference, _, _ = ranks.run(model_workers.trained_with_drop_path, 1, _RANKS | {"engine.zero": 0}, 6)[0]
    changes = _RANKS | {"engine.zero": zero, "train.accumulation": accumulation, "model.gradient_checkpointing": True}
    losses, finished, dropped = ranks.run(model_workers.trained_with_drop_path, world, changes, 6)[0]
    assert losses == pytest.approx(reference, abs=1e-5)
    assert finished < 1e-5
    assert dropped > 0.01


@pytest.mark.processes
def test_adapters_and_drop_path_under_zero_3_in_half_precision(folders: dict[str, str]) -> None:
    changes = {
        "model.drop_path": RATE,
        "model.scratch": "null",
        "model.pretrained": folders["beit"],
        "model.lora.rank": 4,
        "engine.zero": 3,
        "engine.precision": "fp16",
        "engine.loss_scale_power": 8,
    }
    losses, finished, dropped = ranks.run(model_workers.trained_with_drop_path, 2, changes, 6)[0]
    assert losses[-1] < losses[0]
    assert finished < 0.02 < dropped
