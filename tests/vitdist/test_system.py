"""What nodes and GPUs tell: asked for at rows alone, reduced over ranks, left out where nothing tells it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdist import system
from vitdist.system import Gpu, Machine, Now

CPU = torch.device("cpu")


def test_of_this_machine(tmp_path: Path) -> None:
    machine = Machine(CPU, tmp_path)
    busy_until = time.process_time() + 0.05
    while time.process_time() < busy_until:
        pass
    now = machine.now()
    assert 0 < now.cpu_pct <= 100
    assert 0 < now.ram_pct <= 100
    assert now.disk_free_gib is not None
    assert now.disk_free_gib > 0
    assert (now.peak_gib, now.gpu) == (None, None)
    assert Machine(CPU, None).now().disk_free_gib is None
    assert Machine(CPU, tmp_path / "gone").now().disk_free_gib is None


def test_figures_are_means_and_of_what_is_scarce_the_worst() -> None:
    one = Now(cpu_pct=20, ram_pct=30, disk_free_gib=100, peak_gib=60, gpu=Gpu(90, 60, 500))
    other = Now(cpu_pct=40, ram_pct=95, disk_free_gib=None, peak_gib=70, gpu=Gpu(100, 85, 700))
    assert system.figures([one, other]) == {
        "sys/cpu_pct": 30,
        "sys/ram_pct": 95,
        "sys/disk_free_gib": 100,
        "perf/memory_gib": 70,
        "sys/gpu_pct": 95,
        "sys/gpu_temperature_c": 85,
        "sys/gpu_power_w": 600,
    }
    # On a CPU, and on GPUs of which one does not tell
    assert set(system.figures([one._replace(peak_gib=None, gpu=None, disk_free_gib=None)])) == {
        "sys/cpu_pct", "sys/ram_pct",
    }  # fmt: skip
    assert system.figures([one, other._replace(gpu=None)])["sys/gpu_pct"] == 90


class Cuda:
    """A stand-in for what torch.cuda tells of a GPU: that the calls exist there, a GPU must tell."""

    asked = 0
    broken = False

    def max_memory_allocated(self, device: torch.device) -> int:
        return 3 << 30

    def utilization(self, device: torch.device) -> int:
        self.asked += 1
        if self.broken:
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")
        return 97

    def temperature(self, device: torch.device) -> int:
        return 61

    def power_draw(self, device: torch.device) -> int:
        return 412_500


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda: Any = Cuda()
    for name in ("max_memory_allocated", "utilization", "temperature", "power_draw"):
        assert callable(getattr(torch.cuda, name))
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


def test_a_gpu_tells_of_itself_until_it_cannot(cuda: Cuda) -> None:
    machine = Machine(torch.device("cuda", 0), None)
    assert cuda.asked == 0
    assert machine.now().gpu == Gpu(busy_pct=97, temperature_c=61, power_w=412.5)
    cuda.broken = True
    for _ in range(3):
        now = machine.now()
        assert (now.gpu, now.peak_gib) == (None, 3.0)
    assert cuda.asked == 2
