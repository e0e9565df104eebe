"""Whether cores keep up with the model. python -m pytest tests/vitdist/data/test_supply.py"""

from pathlib import Path

import pytest
import torch

from vitdist.config import Data
from vitdist.data import supply
from vitdist.data.index import Index
from vitdist.data.reader import Samples
from vitdist.data.supply import Supply


def test_a_starved_gpu_is_told_with_the_way_out() -> None:
    text = Supply(per_core=200.0, demand=900.0, cores=2, gpu=True).text()
    assert text.startswith("warning: need 5 cpus per GPU for 900 images/s, have 2 (200 images/s a core)")
    assert "vitdist pack --resize 256" in text


def test_a_fed_gpu_and_a_cpu() -> None:
    assert Supply(500.0, 900.0, 8, True).text() == "data: 2 of 8 cpus per GPU feed 900 images/s (500 images/s a core)"
    assert Supply(300.0, 100.0, 1, False).text() == "pictures take about 25 % of the time (300 images/s a core)"
    assert Supply(1000.0, 0.1, 1, True).needed == 1


def test_it_is_measured(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demand falls with the arithmetic of the model, in the same measure."""
    samples = Samples(Index.open(squares / "train"), Data(train="-", val="-"), 16, 0, training=True)
    threads = torch.get_num_threads()
    monkeypatch.setattr(supply, "matmul_flops", lambda *_: 2e12)
    small, large = (supply.check(samples, flops, torch.device("cpu"), torch.float32, 2) for flops in (1e9, 1e10))
    assert small.demand == pytest.approx(10 * large.demand) == pytest.approx(0.45 * 2000)
    assert small.per_core > 0
    assert torch.get_num_threads() == threads


def test_matrix_multiplication_is_counted() -> None:
    assert supply.matmul_flops(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
