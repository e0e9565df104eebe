"""Every setting has a rule for a run that goes on."""

import pytest

from vitdist import changes, config
from vitdist.changes import Effect
from vitdist.config import Config

NAMES = [name for name, *_ in config.flat(Config)]


def plain(**changed: object) -> dict[str, object]:
    raw = {"data": {"train": "a", "val": "b"}, "model": {"pretrained": "c"}, "train": {"global_batch": 8, "epochs": 1}}
    given = [f"{name}={value}" for name, value in changed.items()]
    return config.to_plain(config.parse(Config, config.override(raw, given), "test"))  # type: ignore[no-any-return]


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    assert {changes.effect(name) for name in NAMES} == set(Effect)
    for prefix in changes.RULES:
        assert any(name == prefix or name.startswith(f"{prefix}.") for name in NAMES), prefix
    with pytest.raises(KeyError):
        changes.effect("nothing.of.ours")


def test_C10_a_changed_rate_is_told_with_its_rule() -> None:
    found = changes.between(plain(**{"optim.lr": 1e-3}), plain(**{"optim.lr": 1e-2, "engine.zero": 3}))
    assert [str(change) for change in found] == [
        "optim.lr: 0.001 -> 0.01: from here on; what was trained stays",
        "engine.zero: 2 -> 3: the checkpoint is converted; sums run in another order, so the last bits differ",
    ]
    assert not changes.between(plain(), plain())


def test_sections_that_come_and_go_are_told_by_their_settings() -> None:
    (first, *_) = changes.between(plain(), plain(**{"model.lora.rank": 4}))
    assert (first.name, first.before, first.after, first.effect) == ("model.lora.rank", None, 4, Effect.CHECKED)


def test_a_setting_that_did_not_exist_then_counts_as_its_default() -> None:
    old = plain()
    del old["engine"]["hang_s"]  # type: ignore[attr-defined]
    assert not changes.between(old, plain())
    (change,) = changes.between(old, plain(**{"engine.hang_s": 5}))
    assert (change.name, change.before, change.after) == ("engine.hang_s", 600.0, 5.0)


@pytest.mark.parametrize("name", ["optim.name", "train.seed", "model.lora.alpha"])
def test_what_would_repeat_samples_mix_optimizers_or_scale_adapters_is_refused(name: str) -> None:
    assert changes.effect(name) is Effect.REFUSED
