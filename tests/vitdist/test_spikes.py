"""Spikes of the loss are told once and rightly; noise, falls and single batches are no spikes."""

import math
import random
import statistics
from collections.abc import Callable

import pytest

from vitdist import spikes
from vitdist.spikes import Spikes


def falling(steps: int, noise: float, seed: int = 0) -> list[float]:
    """A loss from 2.3 to 0.4 with the noise of batches."""
    draw = random.Random(seed)
    return [0.4 + 1.9 * math.exp(-step / 150) + draw.gauss(0, noise) for step in range(steps)]


def with_spike(losses: list[float], at: int, height: float) -> list[float]:
    """Risen at step `at` (counted from 1), and back after some ten steps."""
    return [loss + (height * math.exp((at - step) / 5) if step >= at else 0) for step, loss in enumerate(losses, 1)]


def said(losses: list[float], rows: int = 1) -> list[str]:
    """What is told where every `rows` steps are one row of the log."""
    watched = Spikes()
    return [text for i in range(0, len(losses), rows) for text in watched.see(i, losses[i : i + rows])]


def test_N3_a_spike_is_told_once_with_its_step_and_what_is_usual() -> None:
    losses = with_spike(falling(1500, 0.03), 1234, 2.0)
    (text,) = said(losses)
    assert text.startswith("the loss rose to 2.37 at step 1,234, from 0.403 in the 50 steps before: ")
    assert text.endswith("lower optim.lr, lengthen optim.warmup or set optim.clip")
    # How many steps a row has changes nothing, nor where a start began.
    assert said(losses, rows=10) == said(losses, rows=700) == [text]
    assert " at step 1,034," in said(losses[200:])[0]


def test_N3_a_second_spike_is_told_and_no_more_than_five_are() -> None:
    losses = falling(12_000, 0.02)
    for number in range(7):
        losses = with_spike(losses, 600 + 1600 * number, 1.0 + number)
    found = said(losses)
    assert [text.partition(" at step ")[2].split(", from")[0] for text in found] == [
        "600", "2,200", "3,800", "5,400", "7,000",
    ]  # fmt: skip
    assert ["further spikes of this start are not told" in text for text in found] == [False] * 4 + [True]


def test_N3_a_loss_that_stays_up_is_told_once() -> None:
    losses = falling(600, 0.03)
    assert len(said(losses + [2.3 + random.Random(1).gauss(0, 0.03) for _ in range(900)])) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda step, loss: loss,
        lambda step, loss: loss + 3 * (step % 40 == 0),  # one odd batch now and then
        lambda step, loss: loss + 3 * (step % 60 in (0, 1)),  # or two together
        lambda step, loss: math.nan if step % 7 == 0 else loss,  # skipped ones, told by themselves
        lambda step, loss: loss / 100,  # a rise of less than a tenth
        lambda step, loss: loss + 0.001 * max(0, step - 300),  # a slow one
        lambda step, loss: loss if step < 80 or step > 88 else 5.0,  # before anything is usual
    ],
)
def test_N3_what_is_no_spike_is_not_told(change: Callable[[int, float], float]) -> None:
    assert said([change(step, loss) for step, loss in enumerate(falling(1500, 0.05))], rows=10) == []


@pytest.mark.parametrize("noise", [0.003, 0.05, 0.3])
def test_N3_noise_is_no_spike(noise: float) -> None:
    """Of a batch of thousands, of hundreds, of a few."""
    assert said(falling(8000, noise, seed=1), rows=10) == []


def test_N3_late_in_a_training_single_samples_are_no_spikes() -> None:
    """Batches of 16 of which one in twelve holds a sample that is called wrong: a median loss of 0.002."""
    draw = random.Random(2)
    losses = [
        0.002 * math.exp(draw.gauss(0, 1)) + draw.uniform(0.1, 0.6) * (draw.random() < 1 / 12) for _ in range(8000)
    ]
    assert max(losses) > 100 * statistics.median(losses)
    assert said(losses, rows=10) == []


def test_the_window_is_looked_at_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = Spikes._look
    monkeypatch.setattr(Spikes, "_look", lambda self: (looks.append(1), look(self)))
    said(falling(1050, 0.05))
    assert len(looks) == (1050 - spikes.WINDOW) / spikes.REFRESH
