"""The trained model for others: a Hugging Face folder with a model card, or an ONNX file that was held to torch.

    export.write(run.model, model.finished(net, weights), pixels, export.card(...))
    pipeline("image-classification", model="runs/NAME/model")       # opens what `write` wrote
    difference = export.onnx(Path("model.onnx"), net, pixels, classes)

`read_pixels` is the way back: what an image processor, ours or another's, says of size, crop, mean and std.
"""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitdist import config, rundir
from vitdist.config import Config, Pixels
from vitdist.data import storage
from vitdist.results import METRICS, between_words, class_cells, figure, worst_first

if TYPE_CHECKING:
    from torch import nn

    from vitdist.decision import Decision

CARD = "README.md"
MOST_DIFFERENCE = 1e-4
"""Between a logit of onnxruntime and torch's, fp32 on the CPU. 5e-7 was seen on small models, 1e-5 on ViT-L."""


# ---- a folder of Hugging Face ------------------------------------------------------------------


def write(
    folder: Path, model: "nn.Module", pixels: Pixels, card: str | None, decision: "Decision | None" = None
) -> None:
    """Write a whole fp32 `model` with its image processor, card and rule of decision; the folder appears whole.

    Goes through `save_pretrained`, which writes the names that every version of transformers reads;
    DeepSpeed's own dump has the names of the version that trained.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    _processor(pixels).save_pretrained(temporary)
    if card is not None:
        (temporary / CARD).write_text(card, encoding="utf-8")
    if decision:
        decision.save(temporary)
    _put(temporary, folder)


def copy(source: Path, folder: Path) -> None:
    """A finished model folder at another place; it appears whole. Raises ValueError if `folder` is no place for it."""
    refuse_other_folders(folder)
    if folder.resolve() == source.resolve():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    _put(temporary, folder)


def refuse_other_folders(folder: Path) -> None:
    """Raises ValueError for a place that holds something else than a model, which would be lost."""
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise ValueError(f"--out {folder}: is there already, and is no model folder: choose another place")
    folder.parent.mkdir(parents=True, exist_ok=True)


def _put(temporary: Path, folder: Path) -> None:
    for path in temporary.iterdir():
        rundir.sync_file(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    rundir.sync_folder(folder.parent)


def _processor(pixels: Pixels) -> Any:
    """The evaluation's transform as a processor: short side resized, central crop, scaled to 0..1, normalised."""
    from PIL import Image
    from transformers import CLIPImageProcessor  # ViT's own has no central crop

    side = pixels.image_size
    return CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(side / pixels.eval_crop)},
        resample=Image.Resampling.BILINEAR,  # as vitdist/data/transforms.py resizes
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        do_convert_rgb=True,
    )


def read_pixels(source: str) -> tuple[dict[str, Any], str | None]:
    """What a model's processor says of the fields of `Pixels`, as far as it does; and what we do otherwise than it.

    `source` is a folder or an id of the Hub. Without a processor image_size comes from the model's configuration.
    Raises ValueError for pictures that are not square and for other scales than 0..1.
    """
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:  # it has none; a model that is not there at all is told by who loads the weights
        try:
            size = getattr(AutoConfig.from_pretrained(source), "image_size", None)
        except (OSError, ValueError):
            size = None
        return ({"image_size": size} if isinstance(size, int) else {}), None
    found, note = _geometry(said, source)
    if not said.get("do_rescale", True) or abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{source}: its processor does not scale pixels to 0..1, which is all that we can do")
    if said.get("do_normalize", True):
        found |= {name: said[f"image_{name}"] for name in ("mean", "std") if said.get(f"image_{name}")}
    else:
        found |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    return found, note


def class_names(source: str) -> list[str]:
    """Of a folder or id, in the order of its logits: LABEL_0, LABEL_1, ... where it does not name them.

    Raises ValueError if there is no model.
    """
    from transformers import AutoConfig

    try:
        names = AutoConfig.from_pretrained(source).id2label
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source}: cannot be loaded: {reason} (without a network: fetch it once where there is one, "
            "`hf download ID`, and give the folder)"
        ) from None
    return [names[i] for i in range(len(names))]


def _geometry(said: dict[str, Any], source: str) -> tuple[dict[str, Any], str | None]:
    """Side of the input, and share of the resized short side that the central crop keeps."""
    resized = _side(said.get("size"), source) if said.get("do_resize", True) else None
    cropped = _side(said.get("crop_size"), source) if said.get("do_center_crop") else None
    side = cropped or resized
    if side is None:
        return {}, None
    note = None
    if cropped is None and not isinstance(said.get("size"), int) and "shortest_edge" not in said["size"]:
        note = f"its processor squeezes pictures into {side} x {side}; here they keep their shape, and lose their ends"
    if resized is not None and side > resized:
        raise ValueError(f"{source}: its processor pads pictures of {resized} to {side} pixels, which we cannot")
    return {"image_size": side, "eval_crop": side / resized if resized else 1.0}, note


def _side(size: Any, source: str) -> int | None:
    """Of {"height": S, "width": S}, {"shortest_edge": S} or S."""
    if isinstance(size, dict):
        sides = {value for name, value in size.items() if name in ("height", "width", "shortest_edge") and value}
        if len(sides) > 1:
            raise ValueError(f"{source}: its processor makes pictures that are not square ({size})")
        return next(iter(sides), None)
    return size


# ---- ONNX --------------------------------------------------------------------------------------


def onnx(path: Path, model: Any, pixels: Pixels, classes: list[str], raw: bool = False) -> tuple[float, int]:
    """Write `model` (fp32, on the CPU) to `path`; returns the largest difference from torch, and the opset.

    Input `pixel_values` float32 [B, 3, S, S], normalised; output `logits` [B, classes]; any B. With `raw` the input is
    uint8, as pictures are, and the output `probabilities`. Classes, mean, std and size stand in the file's metadata.
    Raises ValueError, and leaves no file, where onnxruntime and torch differ by more than MOST_DIFFERENCE.
    """
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(f'ONNX needs {", ".join(absent)}: pip install "vitdist[onnx]"')
    import numpy as np
    import onnxruntime
    import torch

    graph = _graph(model.eval(), pixels, raw)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, pixels.image_size, pixels.image_size)  # of 1 the exporter would make a constant

    def example(batch: int) -> torch.Tensor:
        if raw:
            return torch.randint(0, 256, (batch, *shape[1:]), generator=generator, dtype=torch.uint8)
        return torch.randn((batch, *shape[1:]), generator=generator)

    output = "probabilities" if raw else "logits"
    with torch.no_grad():
        held_to = [(images, graph(images)) for images in map(example, (1, 2, 5))]
    # The exporter of torch 2.15 cannot follow scaled_dot_product_attention under BEiT's relative biases.
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        program = torch.onnx.export(
            graph,
            (example(2),),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=[output],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch cannot write this {type(model).__name__} as ONNX: {reason}") from error
    finally:
        model.set_attn_implementation(attention)
    assert program is not None
    about = {"classes": classes, "mean": list(pixels.mean), "std": list(pixels.std)}
    about |= {"image_size": pixels.image_size, "eval_crop": pixels.eval_crop}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = 0.0
    for images, expected in held_to:
        (found,) = session.run([output], {"pixel_values": images.numpy()})
        difference = max(difference, float(np.abs(found - expected.numpy()).max()))
    if not difference <= MOST_DIFFERENCE:
        for leftover in (path, Path(f"{path}.data")):  # beyond 2 GB the weights lie in a file of their own
            leftover.unlink(missing_ok=True)
        raise ValueError(f"{path}: onnxruntime and torch differ by {difference:.1e}, more than {MOST_DIFFERENCE}")
    return difference, program.model.opset_imports[""]


def _graph(model: Any, pixels: Pixels, raw: bool) -> "nn.Module":
    """What is exported: tensor in, tensor out."""
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            for name in ("mean", "std"):
                self.register_buffer(name, torch.tensor(getattr(pixels, name)).view(-1, 1, 1))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            if raw:
                pixel_values = (pixel_values.float() / 255 - self.mean) / self.std
            logits = self.model(pixel_values=pixel_values).logits
            return logits.softmax(-1) if raw else logits

    return Graph().eval()


# ---- the model card ----------------------------------------------------------------------------

_HUB_METRICS = {"top1": "accuracy", "top5": "accuracy", "macro_f1": "f1", "auroc": "roc_auc"}
"""Names that the Hub has for metrics."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def card(name: str, settings: Config, record: dict[str, Any], evaluation: dict[str, Any], pixels: Pixels) -> str:
    """The README.md of a run's model, as Hugging Face's hub reads it. Pure.

    `settings` as the user gave them; `record` the trainer's record of its attempt; `evaluation` evaluation.json.
    It names no path of the machine, of folders their last two parts, and no password, signature or command.
    """
    parts = [
        f"---\n{_head(name, settings, record, evaluation)}---\n",
        f"# {name}\n",
        _what(settings, record, evaluation),
        _results(settings, evaluation),
        _use(pixels),
        _limits(settings, evaluation),
        _data(settings, record),
        _recipe(settings, record),
    ]
    return "\n".join(parts)


def _head(name: str, settings: Config, record: dict[str, Any], evaluation: dict[str, Any]) -> str:
    base = _hub_id(settings)
    # No name of a data set of the Hub is known: the type is how it lies on the disk.
    data = {"name": _short(record["data"]["val"]["folder"]), "type": "webdataset", "split": "validation"}
    measured = [
        {"type": _HUB_METRICS.get(metric, metric), "name": words, "value": round(evaluation["metrics"][metric], 5)}
        for metric, words in METRICS.items()
        if evaluation["metrics"].get(metric) is not None
    ]
    results = [{"task": {"type": "image-classification"}, "dataset": data, "metrics": measured}]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-classification"}
    head |= {"tags": ["vision", "image-classification", "vitdist"]}
    head |= {"base_model": base} if base else {}
    head |= {"model-index": [{"name": name, "results": results}]}
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return text + "# license: yours to choose, within what the data and the weights that it began with allow\n"


def _what(settings: Config, record: dict[str, Any], evaluation: dict[str, Any]) -> str:
    net = record["model"]
    if settings.model.scratch:
        start = "trained from random weights"
    else:
        start = f"fine-tuned from {_hub_id(settings) or _short(str(settings.model.pretrained))}"
    return (
        f"A vision transformer ({net['parameters'] / 1e6:.1f} M parameters, {settings.model.image_size} pixels) that "
        f"tells {len(evaluation['classes']):,} classes apart, {start} with vitdist.\n"
    )


def _results(settings: Config, evaluation: dict[str, Any]) -> str:
    found, intervals = evaluation["metrics"], evaluation.get("intervals") or {}
    unread = f" ({found['unreadable']:,} could not be read)" if found.get("unreadable") else ""
    lines = [
        "## Results\n",
        f"On {found['samples']:,} validation samples{unread}, each counted once; {evaluation['step']:,} updates:\n",
        "| metric | value | 95 % interval |",
        "| --- | --- | --- |",
    ]
    for metric, words in METRICS.items():
        if found.get(metric) is not None:
            between = between_words(metric, intervals.get(metric))
            lines.append(f"| {words} | {figure(metric, found[metric])} | {between} |")
    if settings.evaluation.export == "best":
        lines.append(
            "\nThese are the best of several evaluations on these same samples, so the figures are a little too good."
        )
    shown, occurring = worst_first(evaluation)
    few = f" (the lowest {len(shown)} of {occurring:,})" if len(shown) < occurring else ""
    lines += [
        f"\nOf each class, the lowest recall first{few}:\n",
        "| class | samples | recall | 95 % interval | precision | F1 | most often taken for |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(map(_cell, class_cells(row, evaluation)))} |" for row in shown]
    return "\n".join(lines) + "\n"


def _use(pixels: Pixels) -> str:
    side = pixels.image_size
    short = round(side / pixels.eval_crop)
    return f"""## How to use it

```python
from transformers import pipeline

classify = pipeline("image-classification", model="THIS_FOLDER")
print(classify("picture.jpg"))
```

A folder of pictures into a table, decoded exactly as in the evaluation above:

    vitdist predict THIS_FOLDER PICTURES --csv predictions.csv

Input: RGB, upright; the short side resized to {short} pixels, the central {side} x {side} cut out; scaled to 0..1,
mean {list(pixels.mean)}, standard deviation {list(pixels.std)}.
"""


def _limits(settings: Config, evaluation: dict[str, Any]) -> str:
    names, samples = evaluation["classes"], evaluation["metrics"]["samples"]
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
    unsure = (
        "It may answer `unsure`, as decision.json in this folder says (`vitdist predict` does; the pipeline does not)."
        if settings.evaluation.unsure
        else "It always answers one of them, also for a picture that shows something else."
    )
    return f"""## Intended use and limits

- For pictures like those that it was trained on, each showing one of: {listed}. {unsure}
- The figures were measured on the {samples:,} samples of one validation split; other cameras, places, patients or parts
  may give other figures. Measure on your own pictures before you rely on it:
  `vitdist evaluate THIS_FOLDER --data SHARDS`.
- Not a medical device, nor a safety component: it was not tested as one.
"""


def _data(settings: Config, record: dict[str, Any]) -> str:
    lines = [
        "## Data\n",
        "| | samples | classes | smallest class | largest class | digest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    counts = ("samples", "classes", "smallest_class", "largest_class")
    for kind, words in (("train", "training"), ("val", "validation")):
        of = record["data"][kind]
        # Several sets stand there as "A + B"; in a stream a plus may be part of a command.
        folders = [of["folder"]] if settings.data.stream else of["folder"].split(" + ") if "folder" in of else []
        where = f"{words} ({' + '.join(map(_short, folders))})" if folders else words
        cells = (f"{of[key]:,}" if key in of else "-" for key in counts)
        lines.append(f"| {where} | {' | '.join(cells)} | {of.get('digest', '-')} |")
    shares = settings.data.class_shares
    told = shares if isinstance(shares, str) else ", ".join(f"{name} {share:g}" for name, share in shares.items())
    words = "Classes came as often as there are samples of them." if shares == "natural" else f"Class shares: {told}."
    return "\n".join(lines) + f"\n\n{words}\n"


def _recipe(settings: Config, record: dict[str, Any]) -> str:
    batch = record["batch"]
    length = f"{settings.train.epochs:g} epochs" if settings.train.epochs else f"{record['total_steps']:,} updates"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    split = f"{batch['micro_batch']:,} x {batch['accumulation']} accumulated x {batch['world']} ranks"
    given = yaml.safe_dump(_given(settings), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"""## Recipe

{settings.optim.name}, {length} of global batches of {batch["global_batch"]:,} ({split}), {record["precision"]},
ZeRO-{record["zero"]}, on {record["device"]}. All settings that differ from vitdist's defaults, as the file
that makes this model again:

```yaml
{given}```

    torchrun --nproc-per-node {batch["world"]} -m vitdist.train recipe.yaml

Start: {_short_words(record["model"]["weights"], settings)}. Versions: {versions}.
"""


def _given(settings: Config) -> dict[str, Any]:
    """The settings that are not the defaults, nested, without this machine's paths."""
    found: dict[str, Any] = {}
    for dotted, _, default, _ in config.flat(Config):
        *parents, leaf = dotted.split(".")
        value: Any = settings
        for part in (*parents, leaf):
            value = getattr(value, part, None)
        place = found
        if value == default or value is None:
            continue
        for part in parents:
            place = place.setdefault(part, {})
        place[leaf] = config.to_plain(value)
    data = found["data"]
    data["train"] = (
        _short(data["train"])
        if isinstance(data["train"], str)
        else {_short(place): share for place, share in data["train"].items()}
    )
    data["val"] = _short(data["val"])
    data.pop("cache", None)
    # That these are there at all turns something on, also with nothing but defaults in them.
    for parent, name in (("model", "lora"), ("model", "scratch"), ("evaluation", "unsure")):
        section = getattr(getattr(settings, parent), name)
        if section is not None:
            found.setdefault(parent, {}).setdefault(name, config.to_plain(section))
    if "pretrained" in found["model"]:
        found["model"]["pretrained"] = _short(found["model"]["pretrained"])
    found.pop("tracking", None)
    return found


def _hub_id(settings: Config) -> str | None:
    """The checkpoint's id on the Hub: local folders are absolute in a run's settings."""
    source = settings.model.pretrained
    return source if source and _HUB_ID.fullmatch(source) and not settings.model.weights_file else None


def _short(place: str) -> str:
    """What may be published of a folder, id, URL or stream: it hides this machine's paths, secrets and commands."""
    if place.startswith("stream:"):
        return "stream:" + "::".join(map(_short_part, place.removeprefix("stream:").split("::")))
    return "::".join(map(_short_part, storage.shown(place).split("::")))  # "::" may stand in a password too


def _short_part(place: str) -> str:
    if "pipe:" in place:
        return "pipe:..."
    place = place.removeprefix("file://")
    if "://" in place:
        return storage.shown(place).partition("?")[0]
    return "/".join(Path(place).parts[-2:])


def _short_words(words: str, settings: Config) -> str:
    source = settings.model.pretrained
    return words.replace(source, _short(source)) if source else words


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
