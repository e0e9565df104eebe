"""What a changed setting does to a run that goes on: a rule for each setting. Imports no torch.

    for change in changes.between(old, new): print(change)      # "optim.lr: 1e-3 -> 1e-4: from here on"

A checkpoint holds the settings that its run had. Where they are other now, be it by the command line or an edited
config.yaml, the difference is told with its rule; what cannot be changed is refused.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitdist import config
from vitdist.config import Config, SettingsError


class Effect(enum.Enum):
    """What becomes of a change."""

    NOTHING = "the weights are the same with it"
    NOW = "from here on; what was trained stays"
    CHECKED = "goes on if what it leads to is the same (classes, data, shapes, global batch), else it is refused"
    CONVERTED = "the checkpoint is converted; sums run in another order, so the last bits differ"
    REFUSED = "cannot be changed"


# The longest name that a setting begins with decides.
RULES: dict[str, Effect] = {
    "data": Effect.NOW,
    "data.train": Effect.CHECKED,
    "data.class_shares": Effect.CHECKED,
    "data.stream_samples": Effect.CHECKED,
    "data.workers": Effect.NOTHING,
    "data.cache": Effect.NOTHING,
    "data.cache_gb": Effect.NOTHING,
    "data.max_bad": Effect.NOTHING,
    "data.allow_pipe": Effect.NOTHING,
    "model": Effect.CHECKED,
    "model.drop_path": Effect.NOW,
    "model.lora.dropout": Effect.NOW,
    # The adapters' output is multiplied by alpha / rank: the model would be another, and no shape tells.
    "model.lora.alpha": Effect.REFUSED,
    "model.gradient_checkpointing": Effect.NOTHING,
    "model.warm_start": Effect.NOTHING,
    "train": Effect.NOW,
    "train.global_batch": Effect.CHECKED,
    "train.micro_batch": Effect.CHECKED,
    "train.accumulation": Effect.CHECKED,
    # Another order and other crops: samples of this epoch would come twice or not at all.
    "train.seed": Effect.REFUSED,
    "train.max_skipped": Effect.NOTHING,
    "loss": Effect.NOW,
    "optim": Effect.NOW,
    "optim.name": Effect.REFUSED,
    "engine": Effect.CONVERTED,
    "engine.loss_scale_power": Effect.NOTHING,
    "engine.loss_scale_window": Effect.NOW,
    "engine.loss_scale_hysteresis": Effect.NOW,
    "engine.hang_s": Effect.NOTHING,
    "evaluation": Effect.NOTHING,
    # They decide when a run ends.
    "evaluation.patience": Effect.NOW,
    "evaluation.best": Effect.NOW,
    # Metrics of two validation sets are not compared: the best step may be another one.
    "data.val": Effect.NOW,
    "checkpoint": Effect.NOTHING,
    "tracking": Effect.NOTHING,
}


class Change(NamedTuple):
    """A setting that is other than it was."""

    name: str
    before: Any
    after: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}: {self.effect.value}"


def effect(name: str) -> Effect:
    """The rule of the setting `name`, as `optim.lr`. Raises KeyError for a name that no section has."""
    parts = name.split(".")
    while ".".join(parts) not in RULES:
        if not parts:
            raise KeyError(name)
        parts.pop()
    return RULES[".".join(parts)]


def between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs, in the order of the sections; both as plain nested values (config.to_plain).

    One that did not exist when the old ones were written counts as its default.
    """
    found = []
    for name, _, default, _ in config.flat(Config):
        before, after = _get(old, name), _get(new, name)
        if before is _MISSING:
            before = config.to_plain(default)
        if after is not _MISSING and before != after:
            found.append(Change(name, before, after, effect(name)))
    return found


def refuse(changed: Sequence[Change], what: str) -> None:
    """Raises SettingsError, naming all, if a run (`what`) cannot go on with some of the changes."""
    refused = [change for change in changed if change.effect is Effect.REFUSED]
    if refused:
        lines = "\n  ".join(f"{change.name}: {change.before} -> {change.after}" for change in refused)
        raise SettingsError(
            f"{what} cannot go on with other settings of these; use what it began with, or another --name (with "
            f"model.warm_start for its weights)\n  {lines}"
        )


def longer(changed: Sequence[Change]) -> bool:
    """Whether the length of the run is another, so that a finished one may go on."""
    return any(change.name in ("train.steps", "train.epochs") for change in changed)


_MISSING = object()


def _get(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            return _MISSING
        settings = settings.get(part, _MISSING)
        if settings is _MISSING:
            return _MISSING
    return settings
