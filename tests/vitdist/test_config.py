"""Settings: shipped files, refusals that help, batches that multiply up."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vitdist import config
from vitdist.config import Config, SettingsError, Train

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "data": {"train": "a", "val": "b"},
    "model": {"scratch": {}},
    "train": {"global_batch": 32, "epochs": 1},
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_read_and_say_what_they_cost(path: Path) -> None:
    settings = config.load(path)
    assert config.parse(Config, config.read_yaml(path), path) == settings
    head = path.read_text().split("\n\n", 1)[0] + path.read_text()[:1500]
    for word in ("Cost:", "Expected:", "python launch/submit.py"):
        assert word in head


def test_every_setting_is_explained_or_plain() -> None:
    plain = {"patch_size", "depth", "heads", "width", "mlp_ratio", "betas", "eps", "alpha", "dropout", "rank"}
    for name, words, _, text in config.flat(Config):
        assert text or name.split(".")[-1] in plain, name
        assert words


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optim.layer_deacy=0.5"], "optim.layer_deacy: unknown setting; did you mean optim.layer_decay?"),
        (["lr=1"], "lr: unknown setting; did you mean optim.lr?"),
        (["optim.lr=fast"], "optim.lr: input should be a valid number, not 'fast'"),
        (["optim.lr=true"], "optim.lr: input should be a valid number, not True"),
        (["train.global_batch=3.5"], "train.global_batch: input should be a valid integer"),
        (["optim.lr=-1"], "optim.lr: input should be greater than 0, not -1"),
        (["engine.zero=4"], "engine.zero: input should be 0, 1, 2 or 3, not 4"),
        (["data.crop_scale=[1, 0.5]"], "data: crop_scale must be two rising numbers"),
        (["optim.lr_scaling=sqrt"], "optim: lr_scaling does nothing without optim.lr_batch"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.95]"], "optim: betas does nothing without optim.name=adamw"),
        (["optim.momentum=0.5"], "optim: momentum does nothing without optim.name=sgd"),
        (["data.mix_by=batch"], "data: mix_by does nothing without data.mixup or data.cutmix"),
        (["train.steps=3"], "train: give exactly one of train.epochs and train.steps"),
        (["model.pretrained=x"], "model: give exactly one of model.pretrained and model.scratch"),
        (["model.scratch.heads=5"], "model.scratch: width 192 is not a multiple of heads 5"),
        (["optim.lr"], "an override is written section.name=value"),
        (["optim.lr=[1"], "is not a YAML value"),
        (["data=3"], "data: input should be"),
    ],
)
def test_L1_refusals_name_the_setting_and_the_way_out(overrides: list[str], reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config.parse(Config, config.override(MINIMAL, overrides), "x.yaml")
    assert reason in str(caught.value)


def test_L1_all_faults_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        config.parse(Config, config.override(MINIMAL, ["optim.lr=0", "optim.eps=0", "data.flop=1"]), "x.yaml")
    assert len(str(caught.value).splitlines()) == 4


def test_yaml_means_what_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 3e-4\nb: off\nc: 1_000\nd: true\ne: '3e-4'\nf: -2E5\ng: 2.5e+3\n")
    assert config.read_yaml(path) == {"a": 3e-4, "b": "off", "c": 1000, "d": True, "e": "3e-4", "f": -2e5, "g": 2500.0}


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2]", "must hold settings"),
        ("a: [", "not valid YAML: line 1, column 5"),
        ("\xff\xfe", "cannot be read: no UTF-8 at byte 0"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: 'a' is given twice"),
        (LAUGHS, "more than 100,000 values"),
        ("a: &a {b: *a}", "line 1, column 4: an alias inside of what it stands for"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("a: " + "[" * 5000, "nested more than 50 deep"),
        ("a: 9223372036854775808", "too large: whole numbers go to 2^63"),
        ("a: " + "9" * 5000, "too large"),
        ("a: !!int ''", "'' is no int"),
        ("a: !!timestamp 2020-99-99", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: '" + " " * 1_000_000 + "'", "over 1,000,000 bytes"),
    ],
)
def test_L1_files_that_are_no_settings(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=re.escape(reason)) as told:
        config.read_yaml(path)
    assert str(told.value).startswith(f"{path}: ")
    assert len(str(told.value)) < 400


def test_L1_places_that_are_no_files(tmp_path: Path) -> None:
    """A pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path, reason in (
        (tmp_path / "pipe.yaml", "is no file"),
        (Path("/dev/zero"), "is no file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "loop.yaml", "cannot be read: Too many levels of symbolic links"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long"),
        (tmp_path / "pipe.yaml" / "x", "cannot be read: Not a directory"),
    ):
        with pytest.raises(SettingsError, match=reason) as told:
            config.read_yaml(path)
        assert len(str(told.value)) < 400
    place = tmp_path / "with a mark.yaml"
    place.write_bytes("\ufeffa: 1\r\nb: 2\r\n".encode())
    assert config.read_yaml(place) == {"a": 1, "b": 2}


def test_L1_thousands_of_faults_are_counted_and_twenty_told() -> None:
    with pytest.raises(SettingsError) as told:
        config.parse(Config, MINIMAL | {f"x{i}": i for i in range(3000)}, "x.yaml")
    assert str(told.value).splitlines()[-1] == "  and 2,980 more"
    assert str(told.value).count("\n") == 21
    with pytest.raises(SettingsError) as told:
        config.parse(Config, config.override(MINIMAL, ["optim.name=" + "x" * 100_000]), "x.yaml")
    assert len(str(told.value)) < 400
    with pytest.raises(SettingsError, match=r"tracking.project: 'a\\ud800' is no UTF-8"):
        config.parse(Config, config.override(MINIMAL, ['tracking.project="a\\ud800"']), "x.yaml")


@pytest.mark.parametrize("name", ["optim.lr", "optim.weight_decay", "train.epochs", "evaluation.unsure.cost"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400"])
def test_L1_what_is_not_finite_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name}: input should be "):
        config.parse(Config, config.override(MINIMAL, [f"{name}={value}"]), "x.yaml")


def test_L1_a_missing_file_names_the_likely_one() -> None:
    with pytest.raises(SettingsError, match=r"did you mean .*demo\.yaml"):
        config.read_yaml(ROOT / "configs" / "demmo.yaml")


@pytest.mark.parametrize(
    "text",
    ["3e-4", "0x1f", "1_000", "off", "null", "~", "2020-01-01", "12:30", "\x85\u2028a b", "a\nb", "💥", " x ", "<<"],
)
def test_text_survives_being_written(text: str) -> None:
    """Also what one YAML takes for text and the other for a number: runs read their folder's config.yaml again."""
    raw = config.override(MINIMAL, [])
    raw["tracking"] = {"project": text}
    raw["data"] = raw["data"] | {"class_shares": {text: 2.0}}
    settings = config.parse(Config, raw, "x.yaml")
    again = yaml.load(config.to_yaml(settings), config._Loader)
    assert config.parse(Config, again, "x.yaml") == settings
    assert yaml.safe_load(config.to_yaml(settings))["tracking"]["project"] == text


def test_settings_survive_being_written(tmp_path: Path) -> None:
    settings = config.parse(Config, config.override(MINIMAL, ["optim.lr=3e-4", "data.crop_scale=[0.1, 0.2]"]), "x")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(settings))
    assert config.load(path) == settings
    changed = config.parse(Config, config.override(MINIMAL, ["optim.lr=1e-3", "model.scratch.depth=3"]), "x")
    assert config.difference(settings, changed) == [
        "data.crop_scale: [0.1, 0.2] -> [0.08, 1.0]",
        "model.scratch.depth: 12 -> 3",
        "optim.lr: 0.0003 -> 0.001",
    ]


@given(
    st.integers(1, 64),
    st.one_of(st.none(), st.integers(1, 512)),
    st.one_of(st.none(), st.integers(1, 64)),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_batches_multiply_up_or_are_refused(
    world: int, total: int | None, micro: int | None, accumulation: int | None
) -> None:
    if total is None and micro is None:
        return
    train = Train(global_batch=total, micro_batch=micro, accumulation=accumulation, steps=1)
    try:
        batch = config.split_batch(train, world)
    except SettingsError as error:
        named = "train.global_batch" in str(error)
        assert named, error  # noqa: PT017 - a refusal is one of two lawful answers
        return
    assert batch.global_batch == batch.micro_batch * batch.accumulation * world
    assert total is None or batch.global_batch == total
    assert accumulation is None or batch.accumulation == accumulation
    assert micro is None or batch.micro_batch <= micro


def test_steps_of_a_run() -> None:
    train = Train(global_batch=32, epochs=2.5)
    assert config.total_steps(train, config.split_batch(train, 4), 1000) == 78
    assert config.total_steps(Train(global_batch=32, steps=7), config.split_batch(train, 4), 1000) == 7


@pytest.mark.parametrize("place", ["~nobodyhere/x", "a\0b"])
def test_L1_what_is_no_path_is_refused(place: str) -> None:
    settings = config.parse(Config, config.override(MINIMAL, []), "x.yaml")
    odd = settings.model_copy(update={"data": settings.data.model_copy(update={"val": place})})
    with pytest.raises(SettingsError, match="is no path: ") as told:
        config.with_absolute_paths(odd)
    assert len(str(told.value)) < 300


def test_one_folder_twice_in_a_mixture_is_refused() -> None:
    settings = config.load(ROOT / "configs/demo.yaml", ["data.train={shards/a: 3, ./shards/a: 1}"])
    with pytest.raises(SettingsError, match="one folder is named twice"):
        config.with_absolute_paths(settings)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("data.train={shards/a: -3}", "data.train: input should be greater than or equal to 0, not -3"),
        ("data.class_shares=balancd", "data.class_shares: input should be 'natural', 'sqrt' or 'balanced'"),
    ],
)
def test_of_several_types_the_one_that_was_meant_is_told(override: str, fault: str) -> None:
    with pytest.raises(SettingsError) as told:
        config.load(ROOT / "configs/demo.yaml", [override])
    assert fault in str(told.value)
    assert str(told.value).count("\n") == 1
