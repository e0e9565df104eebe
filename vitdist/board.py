"""A run's figures as TensorBoard reads them, in RUN/tensorboard: for who has no W&B.

    tensorboard --logdir runs

Rows that a later start took back are hidden by the event that it begins with.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

FLUSH_S = 5
"""Most of what a kill loses."""


class Board:
    """Writes event files; whatever fails there is told once and left out. `warn` takes a text."""

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        """`step`: the last one that holds. Rows of later ones, of starts before, are hidden from there on."""
        self._warn = warn
        self._writer = None
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warn("TensorBoard is not installed, so tracking.tensorboard writes nothing: pip install tensorboard")
            return
        self._summary, self._value = Summary, Summary.Value
        with self._left_out_if_it_fails():
            self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_S)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """A row of figures."""
        if self._writer is not None:
            with self._left_out_if_it_fails():
                # As one event: add_scalar makes one for each figure, and a row of 60 costs 3.5 ms instead of 1.1.
                values = [self._value(tag=name, simple_value=value) for name, value in figures.items()]
                self._writer.file_writer.add_summary(self._summary(value=values), step)

    def close(self) -> None:
        if self._writer is not None:
            with self._left_out_if_it_fails():
                self._writer.close()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its thread hands over whatever it met; training goes on
            self._writer = None
            self._warn(f"TensorBoard's file cannot be written ({type(error).__name__}: {error}): left out from here on")
