"""Lists of values -> points, a record of them, and the table at the end."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch import sweep
from launch.status import Status
from launch.sweep import Point, Row, Sweep
from vitdist.config import SettingsError


def test_the_product_of_the_lists_the_last_one_varying_fastest() -> None:
    points = sweep.expand("lr", ["optim.lr=1e-4,3e-4", "train.epochs=5", "optim.layer_decay=0.65,0.75"])
    assert [point.name for point in points] == ["lr-00", "lr-01", "lr-02", "lr-03"]
    assert points[1].overrides == ("optim.lr=1e-4", "train.epochs=5", "optim.layer_decay=0.75")
    assert points[2].overrides == ("optim.lr=3e-4", "train.epochs=5", "optim.layer_decay=0.65")
    assert sweep.expand("x", [f"train.seed={','.join(map(str, range(101)))}"])[7].name == "x-007"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        (" a , b ", ["a", "b"]),
        ("[0.9, 0.95],[0.9, 0.99]", ["[0.9, 0.95]", "[0.9, 0.99]"]),
        ("{dog: 2, cat: 1},null", ["{dog: 2, cat: 1}", "null"]),
        ("'a,b',\"c,]\"", ["'a,b'", '"c,]"']),
        ('["a]", b],c', ['["a]", b]', "c"]),
        ("it's,fine", ["it's", "fine"]),
        ("https://host/a=b,x", ["https://host/a=b", "x"]),
    ],
)
def test_values_are_split_at_commas_outside_of_brackets_and_quotes(text: str, found: list[str]) -> None:
    assert sweep.values(text) == found


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=3), min_size=1, max_size=5, unique_by=str))
def test_lists_of_numbers_come_back_as_they_were(lists: list[list[int]]) -> None:
    assert [yaml.safe_load(value) for value in sweep.values(",".join(map(str, lists)))] == lists


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["optim.lr"], "--sweep 'optim.lr': write section.name=value,value"),
        (["=1,2"], "--sweep '=1,2': write section.name="),
        (["optim.lr=1,2", "optim.lr=3,4"], "--sweep optim.lr: is given twice"),
        (["optim.lr=1,,2"], "--sweep optim.lr: '1,,2': has an empty value"),
        (["optim.lr="], "has an empty value"),
        (["optim.lr=1,1"], "--sweep optim.lr: 1 is given twice"),
        (["optim.lr=[1,2"], "] is missing at its end"),
        (["optim.lr=1]"], "] closes nothing"),
        (["optim.lr='1,2"], "' is missing at its end"),
        (["optim.lr=1"], "a single point: give it as an override"),
        (["a=" + ",".join(map(str, range(40))), "b=" + ",".join(map(str, range(40)))], "1,600 points, more than 1,000"),
    ],
)
def test_X4_lists_that_mean_nothing_are_refused(items: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        sweep.expand("x", items)
    assert said in str(refused.value)


def test_numbers_as_slurm_takes_them() -> None:
    assert sweep.ranges([0, 1, 2, 3]) == "0-3"
    assert sweep.ranges([7, 0, 2, 3, 9, 8]) == "0,2-3,7-9"


def test_the_record_comes_back(tmp_path: Path) -> None:
    assert sweep.read(tmp_path) is None
    written = Sweep("lr", "macro_f1", tuple(sweep.expand("lr", ["optim.lr=1e-4,3e-4", "optim.betas=[0.9, 0.95],null"])))
    sweep.write(tmp_path, written)
    assert sweep.read(tmp_path) == written
    record = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert record["points"][1] == {"folder": "lr-01", "overrides": ["optim.lr=1e-4", "optim.betas=null"]}
    for damaged in ("points: [1]", "points: [{folder: ../x, overrides: []}]\nname: x\nmetric: top1", "- 1"):
        (tmp_path / "sweep.yaml").write_text(damaged)
        with pytest.raises(SettingsError, match=r"sweep\.yaml"):
            sweep.read(tmp_path)


def row(number: int, state: str, **summary: float) -> Row:
    status = Status(f"x-0{number}", "", state, step=4, total=9)
    return Row(Point(f"x-0{number}", (f"optim.lr={number}e-4",)), status, dict(summary))


def test_the_table_has_the_best_first_and_those_without_a_result_last() -> None:
    found = [row(0, "failed"), row(1, "done", top1=0.5, loss=1.5), row(2, "done", top1=0.75, loss=2)]
    table = sweep.table(found, "top1").splitlines()
    assert table[0].split() == ["run", "optim.lr", "top1", "macro_f1", "loss", "state"]
    assert [line.split()[0] for line in table[1:]] == ["x-02", "x-01", "x-00"]
    assert table[1].split() == ["x-02", "2e-4", "0.7500", "-", "2.0000", "done"]
    assert table[3].endswith("failed at step 4/9")
    assert len({line.index(line.split()[1]) for line in table}) == 1, "columns are aligned"
    assert [line.split()[0] for line in sweep.table(found, "loss").splitlines()[1:]] == ["x-01", "x-02", "x-00"]
