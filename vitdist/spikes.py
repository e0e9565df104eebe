"""Spikes of the training loss are told: a few steps one after the other whose loss stands far above what is usual.

    for text in spikes.see(step, losses):     # the loss of each step after `step`, the mean over ranks
        journal.warn("loss_spike", text)

What is usual is told by the median of the last steps and the median distance from it (MAD), which odd steps cannot bend
(Leys et al. 2013, J. Exp. Soc. Psychol. 49:764). That alone would cry wolf: late in a training most batches have hardly
a loss, and one wrong label in a batch of 16 stands 20 deviations out. So what is looked at is the median of each five
steps, which one or two odd batches cannot lift, and it must also lie farther out than any single batch did lately, and
rise by `LEAST`. In 10,900 steps of eight trainings on real pictures, and in 180,000 of made noise, nothing was told; of
rises to twice the loss, put into those trainings, 69 % were (2026-11-28).
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

TOGETHER = 5
"""Steps of which the median is looked at: a spike lasts for three at least."""
WINDOW = 50
"""Steps that tell what is usual; before twice as many nothing is told. Longer ones are bent by the fall of the loss."""
LATELY = 500
"""Steps of which the highest batch is remembered."""
DEVIATIONS = 6.0
"""Above the median; a deviation is 1.4826 MAD, as of a normal distribution."""
FARTHER = 1.5
"""Times as far above the median as that batch."""
LEAST = 0.1
"""Nats above the median: less does no harm, however rare it is."""
MOST = 5
"""Spikes of one start that are told."""
REFRESH = 5
"""Steps between two looks at the window: a look takes 15 us."""


class Spikes:
    """Watches the losses of one start; pure but for its memory."""

    def __init__(self) -> None:
        self._newest: deque[tuple[int, float]] = deque(maxlen=TOGETHER)
        """Steps and losses."""
        self._usual: deque[float] = deque(maxlen=WINDOW)
        """Medians of `TOGETHER` steps."""
        self._rises: deque[float] = deque(maxlen=LATELY)
        """How far each step stood above the usual, up to the newest."""
        self._seen, self._told = 0, 0
        self._inside = False
        self._median, self._limit = 0.0, math.inf

    def see(self, step: int, losses: Sequence[float]) -> list[str]:
        """What is to be said of the steps after `step`; a loss that is not finite is passed over."""
        found = []
        for number, loss in enumerate(losses, step + 1):
            if not math.isfinite(loss):
                continue
            if math.isfinite(self._limit):  # else nothing is usual yet
                self._rises.append(self._newest[0][1] - self._median)
            self._newest.append((number, loss))
            middle = statistics.median(value for _, value in self._newest)
            if len(self._usual) == WINDOW and self._seen % REFRESH == 0:
                self._look()
            above = middle > self._limit and len(self._rises) >= WINDOW
            if above and not self._inside and self._told < MOST:
                self._told += 1
                found.append(self._text())
            self._inside = above
            self._usual.append(middle)
            self._seen += 1
        return found

    def _look(self) -> None:
        """Take the limit anew."""
        self._median = statistics.median(self._usual)
        deviation = 1.4826 * statistics.median(abs(value - self._median) for value in self._usual)
        self._limit = self._median + max(DEVIATIONS * deviation, FARTHER * max(self._rises, default=0.0), LEAST)

    def _text(self) -> str:
        high = [(step, loss) for step, loss in self._newest if loss > self._limit]
        last = " (further spikes of this start are not told)" if self._told == MOST else ""
        return (
            f"the loss rose to {max(loss for _, loss in high):.3g} at step {high[0][0]:,}, from {self._median:.3g} in "
            f"the {WINDOW} steps before{last}: if it stays up or rises again, lower optim.lr, lengthen optim.warmup or "
            "set optim.clip"
        )
