"""Hangs are seen and named: the watchdog, and the time limits of process groups."""

import pytest

from tests import ranks, watch_workers


@pytest.mark.processes
def test_R6_groups_made_without_a_timeout_obey_the_bound() -> None:
    said, _ = ranks.run(watch_workers.groups_with_a_bound, 2, timeout=60)
    assert len(said) == 3
    for text in said:
        assert "imed out" in text, text


@pytest.mark.processes
def test_the_background_group_does_not_mix_with_control() -> None:
    for ahead, behind in ranks.run(watch_workers.two_threads, 2, 50):
        assert ahead == [[(0, i), (1, i)] for i in range(50)]
        assert behind == [[(0, -i), (1, -i)] for i in range(50)]
