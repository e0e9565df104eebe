"""A finished model at work: measured on shards, or asked about pictures.

    with dist.processes() as me:                                   # also under torchrun: each rank takes its share
        model = inference.load("runs/NAME", [], me.device)
        record, result = inference.evaluate(model, index, me)
    for answer in inference.predict(model, ["photos/a.jpg", ...]): ...

A source is a run folder (its model/), a model folder or id of Hugging Face, or a file of weights. Pictures go the way
of the evaluation in training: vitdist.data.transforms, not the processor of transformers, of which size, crop, mean
and std are taken.
"""

import contextlib
import csv
import difflib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from vitdist import config, console, decision, dist, results, rundir
from vitdist import evaluate as evaluate_
from vitdist.config import Config, Pixels
from vitdist.data import files, loader, storage, transforms
from vitdist.data.index import Index, read_classes
from vitdist.data.reader import Bad, MicroBatch
from vitdist.data.recode import Recipe, recode
from vitdist.decision import Decision
from vitdist.dist import Processes
from vitdist.rundir import RunDir

BATCH = 64
"""Samples of a forward pass, if nothing else is said."""

MOST_COLUMNS = 50
"""Classes that each have a column in a table of predictions; of more, the most probable ones are told."""
MOST_NAMED = 20
_SECTIONS = ("data", "model", "evaluation")
_SAID_OTHERWISE = {
    "data.train": "nothing is trained here, and what is read is named by the command: --data SHARDS, or the pictures",
    "data.val": "what is read is named by the command: --data SHARDS, or the pictures",
    "model.pretrained": "the model is the one that the command names: give that one there",
    "model.scratch": "the model is the one that the command names, and its shape is known",
    "model.head": "a finished model keeps its head: leave it out",
}
"""Settings that say what the command itself says, and what to do instead."""
_UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls classes that have no name."""


class Source(NamedTuple):
    """Where a model is, as `find` tells."""

    place: str
    """A model folder, a file of weights, or an id of the Hub."""
    run: RunDir | None
    file: bool
    """Whether it is a file of weights, which tells names and shapes alone."""


@dataclass(frozen=True)
class Classifier:
    net: nn.Module
    """On its device, in evaluation mode, fp32."""
    classes: list[str]
    """In the order of the logits."""
    settings: Config
    pixels: Pixels
    weights: str
    """What was loaded, left out and resized."""
    notes: list[str]
    decision: Decision | None
    device: torch.device
    source: Source

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, classes] of normalised images [B, 3, S, S]."""
        return self.net(pixel_values=images).logits

    def inputs(self, batch: MicroBatch) -> torch.Tensor:
        """The pictures of a batch, normalised, on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        return transforms.normalise(images, self.pixels.mean, self.pixels.std)


# ---- from a name to a model --------------------------------------------------------------------


def find(source: str) -> Source:
    """The model that `source` names. Raises ValueError for a run without one, and for what is not there."""
    path = Path(source).expanduser()
    run = RunDir(path)
    if run.config.is_file():
        if not (run.model / "config.json").is_file():
            record = rundir.state(run)
            at = f" at step {record['step']} of {record['total_steps']}" if "total_steps" in record else ""
            raise ValueError(
                f"{source}: a run without a model yet ({record['state']}{at}): it comes at the end of the run"
            )
        return Source(str(run.model), run, file=False)
    if source.endswith(config.WEIGHTS_FILES):
        if not path.is_file():
            raise ValueError(f"{source}: no such file of weights{_near(path)}")
        return Source(str(path), None, file=True)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{source}: is neither a run folder (config.yaml) nor a model of Hugging Face (config.json)"
            )
        return Source(str(path), None, file=False)
    # runs/NAME looks like an id of the Hub: a folder that is there says what was meant.
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1 or path.parent.is_dir():
        raise ValueError(f"{source}: no such run folder, model folder or file of weights{_near(path)}")
    return Source(source, None, file=False)


def _near(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def load(
    source: str, overrides: Sequence[str], device: torch.device, classes: list[str] | None = None, data: str = "none"
) -> Classifier:
    """The model that `source` names, whole: with its head.

    What its processor says of the pixels holds, unless `overrides` (data.mean=[...], model.image_size=...) say
    otherwise. `classes` are for a file of weights, which does not name its own; others bring theirs. `data` is the
    indexed folder that will be read. Raises ValueError for a source that cannot be used, and unusable settings.
    """
    from vitdist import export, model

    found = find(source)
    # First: without a network each question to the Hub takes a minute to fail.
    names = classes if found.file else export.class_names(found.place)
    settings, notes = _settings(found, overrides, data)
    if names is None:
        raise ValueError(
            f"{source}: a file of weights does not name its classes: make a folder of it, "
            f"vitdist export {source} --to hf --out FOLDER --classes NAMES.txt"
        )
    if found.file:
        notes.append("a file of weights does not name its classes: its numbers count in the list that is given")
    net, weights = model.build(settings.model, names, 0, device, exact_head=True)
    return Classifier(
        net=net,
        classes=names,
        settings=settings,
        pixels=config.pixels(settings, weights.mean, weights.std),
        weights=str(weights),
        notes=notes,
        decision=None if found.file else _decision(Path(found.place), names),
        device=device,
        source=found,
    )


def _decision(folder: Path, classes: list[str]) -> Decision | None:
    """The rule that a model folder carries. Raises ValueError for one of other classes."""
    rule = Decision.load(folder)
    if rule and rule.classes != classes:
        raise ValueError(f"{folder / 'decision.json'}: is for other classes than the model's, or for another order")
    return rule


def _settings(source: Source, overrides: Sequence[str], data: str) -> tuple[Config, list[str]]:
    """Settings of use: defaults, over them what the model's folder says, over them `overrides`; and what to tell."""
    from vitdist import export, weights

    strange = [text for text in overrides if text.partition(".")[0] not in _SECTIONS]
    if strange:
        raise ValueError(f"{strange[0]}: has no effect on a finished model; {', '.join(_SECTIONS)} have")
    for text in overrides:
        name = ".".join(text.partition("=")[0].split(".")[:2])  # alone: a URL in the value may hold a secret
        if name in _SAID_OTHERWISE:
            raise ValueError(f"{name}: has no effect on a finished model; {_SAID_OTHERWISE[name]}")
    raw: dict[str, Any] = {
        "data": {"train": "none", "val": data},
        "model": {"pretrained": source.place},
        "train": {"epochs": 1.0, "global_batch": 1},
    }
    notes: list[str] = []
    if not source.file:
        told, note = export.read_pixels(source.place)
        raw["model"] |= {"image_size": told.pop("image_size")} if "image_size" in told else {}
        raw["data"] |= told
        notes += [note] if note else []
    merged = config.override(raw, overrides)
    settings = config.parse(Config, merged, "settings")
    if source.file and "image_size" not in merged["model"]:
        held = weights.convert(weights.read(source.place, shapes_only=True), settings.model)
        merged["model"]["image_size"] = held.shape["image_size"]
        settings = config.parse(Config, merged, "settings")
    return settings, notes


# ---- on shards ---------------------------------------------------------------------------------


def run_evaluate(
    source: str,
    data: str,
    overrides: Sequence[str],
    json_file: str | None = None,
    point: tuple[str, float | None, float | None] | None = None,
    write_decision: bool = False,
) -> int:
    """`vitdist evaluate SOURCE --data DATA`; returns the exit code, 1 if samples could not be read.

    `point`: a class, and the precision or the recall that an operating point of it is to reach.
    """
    with dist.processes() as me:
        index = Index.open(data)
        if point and point[0] not in index.classes:
            raise ValueError(f"{data}: there is no class {point[0]!r}; there are: {', '.join(index.classes[:20])}")
        model = load(source, overrides, me.device, index.classes, data)
        unsure, rule = model.settings.evaluation.unsure, None
        if write_decision:
            if unsure is None or not Path(model.source.place).is_dir():
                raise ValueError(
                    "--write-decision keeps what evaluation.unsure.cost=... says in a model's folder: give both"
                )
            rule = decision.of(unsure, model.classes)  # now: costs of classes that it does not name are refused
        if me.first:
            print(model.weights, file=sys.stderr)
        with console.progress("evaluating", len(index), "images", wanted=me.first) as show:
            found, result = evaluate(model, index, me, show)
        if not me.first:
            return 0
        for text in found["notes"]:
            print(text, file=sys.stderr)
        if point:
            found["operating_point"] = _operating_point(index.classes, result, *point)
        if json_file == "-":
            print(json.dumps({"schema": rundir.SCHEMA, **found}, indent=1, ensure_ascii=False))
        else:
            results.show(found, f"{source} on {storage.shown(index.folder)}")
            if json_file:
                rundir.publish_json(Path(json_file), found)
        for bad in result.bad:
            print(f"could not be read: {bad.key} of {bad.shard}: {bad.detail}", file=sys.stderr)
        if rule:
            rule.save(Path(model.source.place))
            print(f"decision.json is in {model.source.place}", file=sys.stderr)
        return int(bool(result.bad))


def evaluate(
    model: Classifier, index: Index, me: Processes, show: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], evaluate_.Evaluation]:
    """Measure `model` on every sample of `index` once; all ranks call it. `show` is told of the samples that are done.

    The first value is as evaluation.json, with what was measured on what; {} but on rank 0. Class names of model and
    data must be the same, in any order: all figures follow that of the data. Raises ValueError if they are not.
    """
    order, note = class_order(model.classes, index.classes, index.folder)
    settings, asked = model.settings, model.settings.evaluation
    if asked.unsure:
        decision.of(asked.unsure, index.classes)  # refuses what it cannot use, before the work
    batches: Iterable[MicroBatch] = loader.evaluation_batches(
        index, settings, me.rank, me.world, asked.batch or BATCH, me.local_world
    )

    def forward(images: torch.Tensor) -> torch.Tensor:
        return model.logits(images)[:, order]

    if show:
        batches = _counting(batches, me.world, len(index), show)
    result = evaluate_.evaluate(
        forward, batches, model.inputs, len(index.classes), len(index), me, tta=asked.tta, thorough=True
    )
    if not me.first:
        return {}, result
    record, rule = evaluate_.record(result, index.classes, asked, thorough=True)
    if model.decision and not rule and result.probabilities is not None:  # the rule that the model's folder carries
        costs = np.array(model.decision.costs)[np.ix_(order, order)].tolist()
        rule = replace(model.decision, classes=index.classes, costs=costs)
        record["decision"] = decision.summary(result.probabilities, result.labels, rule)
    about = {
        "model": model.source.place,
        "weights": model.weights,
        "data": index.summary(),
        "notes": [*model.notes, *([note] if note else [])],
        "pixels": config.to_plain(model.pixels),
        "ranks": me.world,
    }
    return about | record, result


def _operating_point(
    classes: list[str], result: evaluate_.Evaluation, name: str, precision: float | None, recall: float | None
) -> dict[str, Any]:
    """From which probability on a class is to be reported, for results.show."""
    if result.probabilities is None:
        raise ValueError("an operating point needs the probabilities of all samples, which are too many here")
    c = classes.index(name)
    point = decision.operating_point(result.probabilities[:, c], result.labels == c, precision, recall)
    return {"class": name, "asked": {"precision": precision, "recall": recall}, **asdict(point)}


def class_order(mine: list[str], theirs: list[str], where: str) -> tuple[list[int], str | None]:
    """The place among `mine`, a model's classes, of each of `theirs`, a data set's; and what is worth telling.

    Raises ValueError unless both are the same set of names. A model whose classes are LABEL_0, LABEL_1, ... has
    none: its numbers count in the list of the data.
    """
    if mine == theirs:
        return list(range(len(theirs))), None
    if all(map(_UNNAMED.fullmatch, mine)) and len(mine) == len(theirs):
        return list(range(len(theirs))), "the model does not name its classes: its numbers are taken for the data's"
    only_mine, only_theirs = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    if only_mine or only_theirs:
        sides = ((only_mine, "the model alone has"), (only_theirs, "the data alone have"))
        told = "; ".join(
            f"{words} {', '.join(names[:5])}{' ...' * (len(names) > 5)}" for names, words in sides if names
        )
        raise ValueError(
            f"{where}: its {len(theirs)} classes are not the model's {len(mine)} ({told}): "
            "index the shards with the model's list (vitdist index --classes)"
        )
    place = {name: i for i, name in enumerate(mine)}
    return [place[name] for name in theirs], "model and data count their classes in another order: matched by name"


def _counting(
    batches: Iterable[MicroBatch], world: int, samples: int, show: Callable[[int], None]
) -> Iterator[MicroBatch]:
    """The batches as they are; `show` is told how many samples all ranks have done, if they are as fast as this one."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.ids)
        show(min(samples, done * world))


# ---- on pictures -------------------------------------------------------------------------------


class Answer(NamedTuple):
    path: str
    probabilities: np.ndarray | None
    """float32 [classes]; None for a picture that cannot be read."""
    error: str


def pictures(paths: Iterable[str]) -> list[str]:
    """The files of `paths`, each once; of folders, at any depth, the pictures that `vitdist pack` takes.

    Raises ValueError for a path that leads nowhere, and for a folder without pictures.
    """
    found: dict[str, None] = {}
    for path in paths:
        if Path(path).is_dir():
            inside = [e.path for e in files.walk(path, frozenset()) if files.extension(e.name) in files.PICTURES]
            if not inside:
                raise ValueError(f"{path}: no pictures in it ({', '.join(files.PICTURES)})")
            found.update(dict.fromkeys(inside))
        elif Path(path).exists():
            found[path] = None
        else:
            raise ValueError(f"{path}: no such picture or folder{_near(Path(path))}")
    return list(found)


class Pictures(torch.utils.data.Dataset):
    """Picture files as an evaluation sees them. A broken one has a masked slot, and is told in `bad`."""

    def __init__(self, paths: Sequence[str], settings: config.Data, size: int) -> None:
        self.paths, self.settings, self.size = paths, settings, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, wanted: Sequence[int]) -> MicroBatch:
        images = torch.zeros((len(wanted), 3, self.size, self.size), dtype=torch.uint8)
        mask, bad = torch.ones(len(wanted), dtype=torch.bool), list[Bad]()
        for slot, number in enumerate(wanted):
            path = self.paths[number]
            try:
                # As `vitdist pack` would have stored it: BMP and TIFF by way of PNG.
                content = recode(Path(path).read_bytes(), Recipe())[1]
                images[slot] = transforms.evaluation_pixels(content, self.settings, self.size)
            except OSError as error:
                bad.append(Bad(number, "", path, "unreadable", error.strerror or str(error)))
            except Exception as error:  # PIL raises ValueError, SyntaxError, struct.error and others
                bad.append(Bad(number, "", path, "undecodable", f"not decodable: {error}"))
        mask[[wanted.index(each.id) for each in bad]] = False
        return MicroBatch(images, torch.zeros(len(wanted), dtype=torch.int64), torch.tensor(wanted), mask, bad)


@torch.no_grad()
def predict(
    model: Classifier, paths: Sequence[str], batch: int = BATCH, workers: int | None = None
) -> Iterator[Answer]:
    """What `model` says of each picture of `paths`, in their order, as it comes.

    Probabilities are those of the evaluation: the same pixels, the same mean over mirror images (evaluation.tta).
    """
    settings = model.settings
    dataset = Pictures(paths, settings.data, settings.model.image_size)
    numbers = [list(range(first, min(first + batch, len(paths)))) for first in range(0, len(paths), batch)]
    processes = loader.worker_count(settings, 1) if workers is None else workers
    for found in loader.closing(loader.in_processes(dataset, processes, batch_sampler=numbers)):
        probabilities = evaluate_.probabilities(model.logits, model.inputs(found), settings.evaluation.tta)
        rows = probabilities.cpu().numpy()
        errors = {each.id: each.detail for each in found.bad}
        for slot, number in enumerate(found.ids.tolist()):
            yield Answer(paths[number], rows[slot] if found.mask[slot] else None, errors.get(number, ""))


def run_predict(
    source: str,
    paths: Sequence[str],
    overrides: Sequence[str],
    csv_file: str | None = None,
    top: int | None = None,
    batch: int = BATCH,
    workers: int | None = None,
) -> int:
    """`vitdist predict SOURCE PATHS`; returns the exit code, 1 if pictures could not be read.

    CSV goes into a file, which appears whole, or into a pipe, row by row; on a terminal a table comes at the end.
    """
    found = pictures(paths)
    model = load(source, overrides, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for note in model.notes:
        print(note, file=sys.stderr)
    began, broken = time.monotonic(), list[Answer]()
    terminal = csv_file is None and sys.stdout.isatty()
    if top is None and terminal:
        top = 1  # beside a path there is no room for more
    elif top is None and len(model.classes) > MOST_COLUMNS:
        top = 5
    sheet = Sheet(model.classes, model.decision, min(top, len(model.classes)) if top else None)
    with contextlib.ExitStack() as stack:
        if terminal:
            write: Callable[[list[str]], Any] = stack.enter_context(results.table(sheet.head))
        elif csv_file:
            file = io.TextIOWrapper(stack.enter_context(rundir.appearing(Path(csv_file))), "utf-8", newline="")
            write = csv.writer(file, lineterminator="\n").writerow
            stack.callback(file.flush)
            write(sheet.head)
        else:
            write = csv.writer(sys.stdout, lineterminator="\n").writerow
            write(sheet.head)
        show = stack.enter_context(console.progress("predicting", len(found), "images"))
        for done, answer in enumerate(predict(model, found, batch, workers), 1):
            write(sheet.row(answer))
            show(done)
            broken += [answer] if answer.error else []
    for answer in broken[:MOST_NAMED]:
        print(f"could not be read: {printable(answer.path)}: {answer.error}", file=sys.stderr)
    if len(broken) > MOST_NAMED:
        print(f"... and {len(broken) - MOST_NAMED:,} more, with their errors in the table", file=sys.stderr)
    seconds = time.monotonic() - began
    told = f"{len(found):,} pictures in {seconds:.1f} s" + (
        f", {len(broken):,} of them could not be read" if broken else ""
    )
    print(told + (f": {csv_file}" if csv_file else ""), file=sys.stderr)
    return int(bool(broken))


@dataclass(frozen=True)
class Sheet:
    """The table of predictions: its head, and a row for each answer, all text."""

    classes: list[str]
    rule: decision.Decision | None
    top: int | None
    """So many classes with their probabilities; None: a column with its probability for each class."""

    @property
    def head(self) -> list[str]:
        """path, predicted, confidence, decision (where the model has a rule), the classes, error."""
        if self.top is None:
            more = [f"p({name})" for name in self.classes]
        else:
            more = [f"{what}_{place}" for place in range(2, self.top + 1) for what in ("predicted", "confidence")]
        return ["path", "predicted", "confidence", *(["decision"] if self.rule else []), *more, "error"]

    def row(self, answer: Answer) -> list[str]:
        """Probabilities with 6 digits; empty cells where the picture cannot be read."""
        path, probabilities = printable(answer.path), answer.probabilities
        if probabilities is None:
            return [path, *[""] * (len(self.head) - 2), answer.error]
        best = np.argsort(-probabilities, kind="stable")[: self.top or 1]
        pairs = [text for i in best for text in (self.classes[i], f"{probabilities[i]:.6g}")]
        said = self.rule.apply(probabilities[None]) if self.rule else []
        more = [f"{p:.6g}" for p in probabilities] if self.top is None else pairs[2:]
        return [path, *pairs[:2], *said, *more, ""]


def printable(path: str) -> str:
    """A path whose bytes are no UTF-8 as text that can be written."""
    return path.encode("utf-8", "backslashreplace").decode()


# ---- for others --------------------------------------------------------------------------------


def run_export(
    source: str,
    overrides: Sequence[str],
    to: str,
    out: str | None = None,
    classes: str | None = None,
    raw: bool = False,
) -> None:
    """`vitdist export SOURCE --to hf|onnx`."""
    from vitdist import export, model

    found = find(source)
    if raw and to != "onnx":
        raise ValueError("--raw-pixels: is for --to onnx; a folder of Hugging Face has an image processor instead")
    if overrides and found.run and to == "hf":
        raise ValueError(f"settings: a run's model is copied as it is; to change it, give its folder: {found.place}")
    if out is None and (found.run is None or found.file):
        raise ValueError("--out: where shall it go? Only a run folder has a place of its own for what is exported")
    if classes and not found.file:
        raise ValueError(f"--classes: {source} names its classes itself")
    if to == "hf" and found.run:
        card = export.card(*_of_run(found.run), _pixels(found))
        if out is not None:
            export.copy(Path(found.place), Path(out))
        rundir.publish(Path(out or found.place) / export.CARD, card)
        print(f"{out or found.place}: a model of Hugging Face with its card")
        return
    names = read_classes(classes) if classes else None
    used = load(source, overrides, torch.device("cpu"), names)
    print(used.weights, file=sys.stderr)
    if to == "hf":
        whole = model.finished(used.net, used.net.state_dict())
        place = Path(str(out))
        export.refuse_other_folders(place)
        export.write(place, whole, used.pixels, None, used.decision)
        print(
            f"{place}: a model of Hugging Face; write its card, README.md, yourself: nothing is known of its training"
        )
        return
    file = Path(out) if out else Path(found.place).with_name("model.onnx")
    difference, opset = export.onnx(file, used.net, used.pixels, used.classes, raw)
    print(f"{file}: opset {opset}, at most {difference:.1e} from torch ({file.stat().st_size / 1e6:,.1f} MB)")


def _of_run(run: RunDir) -> tuple[str, Config, dict[str, Any], dict[str, Any]]:
    """What a card tells of a finished run."""
    evaluation = rundir.read_json(run.evaluation)
    if evaluation is None:
        raise ValueError(f"{run.path}: has no evaluation.json to write a card from")
    return run.name, config.load(run.config), rundir.state(run), evaluation


def _pixels(source: Source) -> Pixels:
    from vitdist import export

    return config.parse(Pixels, export.read_pixels(source.place)[0], source.place)
