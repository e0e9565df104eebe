"""What the starts of a run came to: lost steps, goodput, time and hours, from the records that they leave."""

from pathlib import Path

import pytest

from vitdist import assembly, faults, history, ledger, rundir
from vitdist.ledger import Ledger, Start
from vitdist.rundir import RunDir
from vitdist.tracking import Journal


@pytest.mark.parametrize(
    ("spans", "lost"),
    [
        ([], []),
        ([(0, 50)], [0]),
        ([(0, 50), (50, 80), (80, 90)], [0, 0, 0]),  # stopped with a checkpoint
        ([(0, 57), (40, 63), (60, 90)], [17, 3, 0]),  # killed
        ([(0, 57), (40, 40), (40, 90)], [17, 0, 0]),  # one that did not come to a step
        ([(0, 100), (50, 80), (0, 30)], [100, 30, 0]),  # the third from the beginning: the first came to nothing too
    ],
)
def test_lost_are_the_steps_from_which_no_later_start_went_on(spans: list[tuple[int, int]], lost: list[int]) -> None:
    assert ledger.undone(spans) == lost


def test_figures_are_of_all_starts() -> None:
    starts = [
        Start(trained=True, first=0, last=150, seconds=3600.0, ranks=8, threads=2),
        Start(trained=False, first=0, last=0, seconds=360.0, ranks=0, threads=0),  # ended before it told its ranks
        Start(trained=True, first=100, last=250, seconds=1800.0, ranks=4, threads=4),
    ]
    assert ledger.figures(starts, gpu=True) == pytest.approx(
        {
            "run/wall_s": 5760.0,
            "run/gpu_hours": 8 + 0.4 + 2,
            "run/restarts": 2,
            "run/lost_steps": 50,
            "run/goodput_pct": 100 * 250 / 300,
        }
    )
    assert ledger.figures(starts, gpu=False)["run/core_hours"] == pytest.approx(16 + 1.6 + 8)
    assert ledger.figures([Start(True, 40, 40, 1.0, 1, 1)], gpu=True)["run/goodput_pct"] == 100.0


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_rows_go_on_from_what_earlier_starts_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(ledger, "time", clock)
    past = [Start(trained=True, first=0, last=120, seconds=100.0, ranks=2, threads=1)]
    now = Ledger(past, clock.now, ranks=4, threads=1, gpu=True)
    now.goes_on_from(100)
    clock.now += 50
    row = now.row(140, trained_s=20.0)
    assert row["run/training_pct"] == pytest.approx(40.0)
    assert row["run/wall_s"] == 150.0
    assert row["run/gpu_hours"] == pytest.approx(400 / 3600)
    assert (row["run/restarts"], row["run/lost_steps"], row["run/goodput_pct"]) == (1, 20, 87.5)


def written(run: RunDir, number: int, rows: list[tuple[int, float]], **record: object) -> None:
    about = {"started": "2026-11-28T10:00:00+00:00", **record}
    rundir.publish_json(run.attempt(number).train, about)
    with open(run.metrics, "a") as file:
        for step, seconds in rows:
            file.write(f'{{"attempt": {number}, "time": {BEGAN + seconds}, "train/global_step": {step}}}\n')


BEGAN = 1795860000.0


def test_a_start_is_read_from_its_record_its_rows_and_its_faults(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    told = {"world": 4, "threads": 2}
    written(run, 0, [(10, 60), (20, 90)], resumed_from=None, step=15, **told)  # killed: its rows say the most
    written(run, 1, [(25, 60)], resumed_from=15, step=30, ended="2026-11-28T10:02:00+00:00", **told)
    written(run, 2, [], step=0)  # killed before it trained
    written(run, 3, [(40, 30)], resumed_from=30, step=30, **told)
    fault = faults.Fault(
        rank=1, host="n1", step=44, phase="training", word="killed", cascade=False, type="Killed", message="x",
        where="", time=BEGAN + 45,
    )  # fmt: skip
    faults.note(run.attempt(3), fault)
    reached = history.read(run).reached
    starts = [ledger.start(a, reached.get(a.number), faults.read(a)) for a in run.attempts()]
    assert starts == [
        Start(trained=True, first=0, last=20, seconds=90.0, ranks=4, threads=2),
        Start(trained=True, first=15, last=30, seconds=120.0, ranks=4, threads=2),
        Start(trained=False, first=0, last=0, seconds=0.0, ranks=0, threads=0),
        Start(trained=True, first=30, last=44, seconds=45.0, ranks=4, threads=2),
    ]
    rundir.publish_json(run.attempt(2).job, {"state": "failed", "ended": "2026-11-28T10:00:20+00:00"})
    assert ledger.start(run.attempt(2), None, []).seconds == 20.0
    assert ledger.start(run.attempt(9), None, []) == Start(False, 0, 0, 0.0, 0, 0)


@pytest.mark.parametrize("record", ["", "[]", '{"started": "yesterday"}', '{"step": "x"}', '{"schema": 99}'])
def test_a_damaged_record_of_an_earlier_start_costs_figures_alone(tmp_path: Path, record: str) -> None:
    run = RunDir(tmp_path / "run")
    for number, text in enumerate([record, '{"resumed_from": null, "step": 7}']):
        run.attempt(number).path.mkdir(parents=True)
        run.attempt(number).train.write_text(text)
    with Journal(run, run.attempt(2), first=True) as journal:
        assert [start.last for start in assembly._past(run, 2, journal)] == [7]
    (event,) = (rundir.read_json(run.attempt(2).train) or {})["events"]
    assert event["text"].startswith("start 0 is left out of the figures of the run: ")
