"""Stochastic depth for every ViT of transformers, drawn by (seed, step, slot in the global batch).

    paths = DropPaths(blocks, rate, device)
    paths.draw(seed, step, slots, global_batch)      # before each forward pass in training
    net(pixel_values=images)

transformers' ViT, DeiT and MSN have no drop path; BEiT's and DINOv2's draw from torch's generator, so that their masks
depend on the rank. Here a hook multiplies what comes out of each block's attention and MLP, for each sample, by 0 or by
1 / (1 - rate) (Huang et al. 2016; the rate rises linearly over the blocks, as in timm and MAE). LayerScale and hidden
dropout, which follow, commute with it. Masks are no parameters and no buffers: checkpoints and ZeRO do not see them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def masks(
    rates: Sequence[float], seed: int, step: int, slots: tuple[int, int], global_batch: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [2 L, B]: factor of each branch (attention and MLP of block 0, of block 1, ...) for slots [start, stop).

    Drawn for the whole of global batch `step`, so that a slot's masks do not depend on how it is split over ranks.
    """
    rng = np.random.default_rng([seed, step, 4])  # 1 to 3: samples, pairs and single slots, see data/augment.py
    twice = np.repeat(np.asarray(rates, dtype=np.float32), 2)
    mine = slice(slots[0] - step * global_batch, slots[1] - step * global_batch)
    drawn = rng.random((global_batch, len(twice)), dtype=np.float32)[mine]
    return np.ascontiguousarray(((drawn >= twice) / (1 - twice)).T.astype(np.float32))


class DropPaths:
    """The masks of a model's next forward pass; in evaluation they do nothing."""

    def __init__(self, blocks: Sequence[nn.Module], rate: float, device: torch.device) -> None:
        """Hooks `attention` and `mlp` of each block; their outputs have samples first."""
        self.rates = np.linspace(0, rate, len(blocks)).tolist()
        self.device = device
        self.masks: Tensor | None = None
        for i, block in enumerate(blocks):
            if self.rates[i]:
                block.get_submodule("attention").register_forward_hook(self._hook(2 * i))
                block.get_submodule("mlp").register_forward_hook(self._hook(2 * i + 1))

    def draw(self, seed: int, step: int, slots: tuple[int, int], global_batch: int) -> None:
        """Masks of slots [start, stop) of the stream, all of global batch `step`, for the next forward and backward."""
        drawn = torch.from_numpy(masks(self.rates, seed, step, slots, global_batch))
        # A new tensor each time: one changed in place would be gone for a backward pass that is still to come.
        self.masks = drawn[:, :, None, None].to(self.device, non_blocking=True)

    def _hook(self, branch: int) -> Any:
        def drop(module: nn.Module, args: Any, output: Any) -> Any:
            if not module.training:
                return None
            assert self.masks is not None, "draw() comes before the forward pass"
            mask = self.masks[branch]
            if isinstance(output, tuple):  # attention gives its weights too
                return (output[0] * mask.to(output[0].dtype), *output[1:])
            return output * mask.to(output.dtype)

        return drop
