"""Slow ranks and slow data are named; a rank's own times are told apart from its waiting."""

import socket
from collections.abc import Sequence

import pytest
import torch

from tests import ranks, watch_workers
from vitdist import metrics
from vitdist.metrics import Lags, Meter, Own, lag, quantiles

CPU = torch.device("cpu")


class Clock:
    """Instead of the time module: goes on when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_own_times_are_means_of_a_step_since_the_last_row(clock: Clock) -> None:
    meter = Meter(8, 1e9, 2, CPU)
    assert meter.own() == Own(0.0, 0.0)
    for row in (1, 2):
        for _ in range(4):
            for _ in range(2):  # micro-batches
                with meter.computing():
                    clock.now += 0.25 * row
            clock.now += 3.0  # the backward pass, with its waiting for peers
            meter.waited(0.125 * row)
            meter.step()
        assert meter.own() == meter.own() == Own(0.5 * row, 0.125 * row)
        assert meter.row(0)["perf/step_s"] == pytest.approx(3 + 0.5 * row)
    assert meter.own() == Own(0.0, 0.0)


def test_what_is_no_training_is_in_no_figure_but_the_time_left(clock: Clock) -> None:
    meter = Meter(8, 1e9, 2, CPU)
    clock.now += 60  # checkpoint, DeepSpeed, W&B
    meter.begin()
    clock.now += 30  # the first update waits for the loaders
    meter.waited(25)
    meter.step()
    meter.begin()
    for seconds in (1.0, 1.0, 4.0):
        clock.now += seconds
        meter.waited(0.3)
        meter.step()
        with meter.paused():
            clock.now += 10  # an evaluation, a save
    figures = meter.row(100)
    assert figures == pytest.approx(
        {
            "perf/images_per_s": 4.0,
            "perf/step_s": 2.0,
            "perf/step_p50_s": 1.0,
            "perf/step_p95_s": 4.0,
            "perf/step_max_s": 4.0,
            "perf/data_wait_pct": 15.0,
            "perf/eta_s": 100 * (2.0 + 10.0),
        }
    )
    assert (meter.busy_s, meter.images_per_s) == (6.0, 4.0)
    clock.now += 3.0
    meter.step()
    figures = meter.row(0)
    assert (figures["perf/step_s"], figures["perf/step_max_s"], figures["perf/eta_s"]) == (3.0, 3.0, 0.0)
    assert meter.images_per_s == 32 / 9


def test_a_row_of_the_first_update_alone_has_figures(clock: Clock) -> None:
    meter = Meter(8, 1e9, 2, CPU)
    meter.begin()
    clock.now += 2.0
    meter.step()
    figures = meter.row(9)
    assert (figures["perf/images_per_s"], figures["perf/step_p50_s"], figures["perf/eta_s"]) == (4.0, 2.0, 18.0)


def test_percentiles_are_times_of_steps() -> None:
    assert quantiles([float(i) for i in range(100, 0, -1)]) == {
        "perf/step_p50_s": 50.0,
        "perf/step_p95_s": 95.0,
        "perf/step_max_s": 100.0,
    }
    assert set(quantiles([2.0]).values()) == {2.0}


class Event:
    """A CUDA event that notes the time of a clock when it is recorded, as the GPU gets there."""

    clock: Clock
    synchronized = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        Event.synchronized += 1

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


def test_on_a_gpu_events_are_read_at_the_row_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA: that the calls exist there, a GPU must tell."""
    Event.clock = clock
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: None)
    monkeypatch.setattr(metrics, "MOST_EVENTS", 5)
    meter = Meter(8, 1e9, 1, torch.device("cuda"))
    for _ in range(4):
        for _ in range(2):
            with meter.computing():
                clock.now += 0.25
        meter.step()
    assert Event.synchronized == 0
    assert meter.own() == Own(0.5, 0.0)  # of 8 passes, 5 were timed
    assert Event.synchronized == 1


def test_R11_the_slowest_rank_is_a_figure_of_the_row() -> None:
    owns = [Own(1.0, 0.0), Own(1.0, 0.5), Own(3.0, 0.1), Own(1.2, 0.0)]
    assert lag(owns, 4.0) == {
        "perf/slowest_rank": 2.0,
        "perf/slowest_rank_ratio": 3.0,
        "perf/data_wait_max_pct": 12.5,
        "perf/data_wait_slowest_rank": 1.0,
    }
    # Of two ranks the mean of both would be the median.
    assert lag([Own(1.0, 0.0), Own(2.0, 0.0)], 4.0)["perf/slowest_rank_ratio"] == 2.0
    assert lag([Own(0.0, 0.0)], 0.0) == {
        "perf/slowest_rank": 0.0,
        "perf/slowest_rank_ratio": 1.0,
        "perf/data_wait_max_pct": 0.0,
        "perf/data_wait_slowest_rank": 0.0,
    }


HOSTS = ["n0", "n0", "n1", "n1"]
EVEN = [Own(1.0, 0.1)] * 4


def said(lags: Lags, *rows: Sequence[Own]) -> list[list[str]]:
    seen = [lags.see(row, 4.0, HOSTS) for row in rows]
    assert all(("waits for its data" in text) == (kind == "slow_data") for found in seen for kind, text in found)
    return [[text for _, text in found] for found in seen]


def test_R11_a_slow_rank_is_named_once_after_three_rows() -> None:
    lags, slow = Lags(), [*EVEN[:2], Own(1.7, 0.1), EVEN[3]]
    first, second, third, *later = said(lags, slow, slow, slow, slow, slow, slow)
    assert not first
    assert not second
    assert not any(later)
    (text,) = third
    assert text.startswith("rank 2 (n1) is slow: its forward passes take 1.7 s of a step of 4 s, those of the ")
    assert not any(said(lags, EVEN, slow, slow, slow))  # once for the whole run
    (text,) = said(lags, *[[Own(2.0, 0.1), *EVEN[1:]]] * 3)[-1]
    assert text.startswith("rank 0 (n0) is slow")


def test_R11_a_rank_that_was_slow_now_and_then_is_not_named() -> None:
    slow = [*EVEN[:3], Own(1.7, 0.1)]
    assert not any(said(Lags(), slow, slow, EVEN, slow, slow, EVEN, slow))


@pytest.mark.parametrize(
    "owns",
    [
        EVEN,
        [*EVEN[:3], Own(1.45, 0.1)],  # 1.45 times the median
        [*[Own(0.2, 0.1)] * 3, Own(0.5, 0.1)],  # 2.5 times, but 8 % of the step
        [*EVEN[:3], Own(1.0, 1.9)],  # waits for data in 48 %
        [Own(1.0, 2.5)] * 3 + [Own(1.0, 0.1)],  # most wait for data: no rank is to blame
    ],
)
def test_R11_ranks_that_are_not_clearly_slow_are_not_named(owns: list[Own]) -> None:
    assert not any(said(Lags(), *[owns] * 6))


def test_R11_a_rank_whose_data_come_late_is_named_once() -> None:
    late = [Own(1.0, 0.0), Own(1.0, 2.5), *EVEN[2:]]
    rows = said(Lags(), *[late] * 6)
    assert [len(row) for row in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[2][0].startswith("rank 1 (n0) waits for its data in 62 % of the time, and all wait for it")


def test_R11_both_kinds_are_told_of_one_rank() -> None:
    both = [Own(1.0, 0.0), Own(1.7, 2.2), *EVEN[2:]]
    assert [len(row) for row in said(Lags(), *[both] * 5)] == [0, 0, 2, 0, 0]


@pytest.mark.processes
def test_R11_a_slow_rank_among_real_ones_is_named() -> None:
    one, other = ranks.run(watch_workers.a_slow_rank, 2, timeout=60)
    assert one == other
    figures, texts = one
    assert figures["perf/slowest_rank"] == 1.0
    assert figures["perf/slowest_rank_ratio"] > 1.5
    (text,) = texts
    assert text.startswith(f"rank 1 ({socket.gethostname()}) is slow: ")
