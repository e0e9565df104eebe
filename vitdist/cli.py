"""The command `vitdist`: data before a run, the run's folder and its model afterwards.

vitdist pack photos shards                        # pictures -> indexed WebDataset tar shards
vitdist index shards/train                        # index tars that others made
vitdist stats shards                              # classes, copies, patients in both splits: a page
vitdist verify shards                             # are they what they were?
vitdist plan configs/skin.yaml --nodes 4          # layers and rates; memory, time, network and disk that it takes
vitdist checkpoints runs/NAME --verify            # what there is to go on from, and whether it is whole
vitdist report runs/NAME                          # the run as a page
vitdist evaluate runs/NAME --data shards/test     # its model on other shards
vitdist predict runs/NAME photos --csv table.csv  # its model on pictures
vitdist export runs/NAME --to onnx                # its model for others
vitdist sync runs/NAME                            # upload offline W&B rows where there is a network
"""

import argparse
import functools
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from vitdist import rundir
from vitdist.rundir import RunDir


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with a line on stderr for what cannot be done."""
    args = _parse(argv)
    try:
        return int(args.run(args) or 0)
    except BrokenPipeError:  # the reader of a pipe has seen enough (`| head`); Python would flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _refused(named)
    except BrokenProcessPool:
        return _refused("a process was killed, most often for want of memory: try fewer --workers")
    except ValueError as error:
        return _refused(str(error))
    except RuntimeError as error:
        if not str(error).startswith(_OF_PATHS):
            raise
        return _refused(str(error).rstrip("."))
    except KeyboardInterrupt:
        print(f"interrupted{args.interrupted}", file=sys.stderr)
        return 130


_OF_PATHS = ("Could not determine home directory", "Symlink loop")
"""What pathlib says of ~NAME where there is no such user, and of a circle of links, without a class of its own."""


def _refused(reason: str) -> int:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{rank}error: {reason}", file=sys.stderr)
    return rundir.EXIT_REFUSED


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; settings may stand anywhere after the command, which argparse alone does not allow."""
    parser = argparse.ArgumentParser(
        prog="vitdist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(interrupted="", overrides=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for group in (_make_shards, _look_at_shards, _change_shards, _plan_a_run, _use_a_model, _follow_a_run):
        group(commands)
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    if args.overrides is not None:
        texts = {name: value for name, value in vars(args).items() if name in ("source", "pictures")}
        texts = {"rest": rest} | {name: value for name, value in texts.items() if isinstance(value, list)}
        settings = args.overrides + [text for part in texts.values() for text in part if _SETTING.match(text)]
        args.overrides = sorted(settings, key=argv.index)  # of two for one setting, the last one holds
        others = {name: [text for text in part if not _SETTING.match(text)] for name, part in texts.items()}
        rest = others.pop("rest")
        vars(args).update(others)
        if not all(others.values()):
            commands.choices[args.command].error(f"settings alone: {' '.join(settings)}")
    if rest:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return args


_SETTING = re.compile(r"(data|model|train|loss|optim|engine|evaluation|checkpoint|tracking)\.[\w.]+=")
_GOES_ON = "; the same command goes on where it stopped"
Commands = Any  # argparse keeps the type of its sub-parsers to itself


def _make_shards(commands: Commands) -> None:
    pack = commands.add_parser("pack", help="pictures -> indexed WebDataset shards")
    pack.add_argument(
        "source",
        help="folder of class folders (or train/ and val/ of these), a table of path and label "
        "(.csv .tsv .jsonl .parquet), or a data set as `datasets` writes it",
    )
    pack.add_argument("out", help="folder for OUT/train and OUT/val")
    pack.add_argument(
        "--val-fraction", type=float, default=0.0, help="share of each class split off for validation, if there is none"
    )
    pack.add_argument(
        "--group-by",
        metavar="COLUMN",
        help="keep each patient, lesion, part ... on one side of the split: a column, or 'name:REGEX' whose first "
        "group is taken from the path",
    )
    pack.add_argument("--resize", type=int, metavar="PIXELS", help="JPEGs with at most that short side")
    pack.add_argument("--quality", type=int, help="of the JPEGs (default 95); alone it encodes again at full size")
    pack.add_argument("--root", help="folder that a table's paths start from (default: the table's own)")
    pack.add_argument("--image-column", help="column of a table with the path, if its name does not tell")
    pack.add_argument("--label-column", help="column of a table with the class, if its name does not tell")
    pack.add_argument("--split-column", help="column with train, val or test; 'none' ignores it")
    pack.add_argument("--classes", help="class names in the order of their numbers: a file with one a line")
    pack.add_argument("--shard-megabytes", type=_megabytes, default=256.0, help="largest size of a shard (default 256)")
    pack.add_argument(
        "--workers", type=_positive, help="processes (default: one a core); the bytes do not depend on it"
    )
    pack.set_defaults(run=_pack, interrupted=_GOES_ON)

    index = commands.add_parser("index", help="index tar shards that others made")
    index.add_argument(
        "shards", help="folder of .tar shards, or a pattern of paths or URLs: https://host/{0000..0099}.tar"
    )
    index.add_argument(
        "--label", default="cls", help="member with the label: cls (default), txt, or json:FIELD; a number or a name"
    )
    index.add_argument(
        "--classes", help="class names in the order of their numbers: a file with one a line, or another indexed folder"
    )
    index.add_argument("--out", help="folder for the index, if not beside the shards; must be given for URLs")
    index.add_argument("--workers", type=_positive, help="processes (default: one a core)")
    index.set_defaults(run=_index, interrupted=_GOES_ON)

    digits = commands.add_parser("digits", help="write scikit-learn's scanned digits as an ImageFolder")
    digits.add_argument("folder")
    digits.set_defaults(run=_digits)


def _look_at_shards(commands: Commands) -> None:
    verify = commands.add_parser("verify", help="are the shards what they were? names every broken sample")
    verify.add_argument("folder", help="indexed shards, or tars without an index, or a folder of such folders")
    verify.add_argument("--no-decode", action="store_true", help="checksums alone, without a test decode")
    verify.add_argument("--label", default="cls", help="for tars without an index: cls, txt or json:FIELD")
    verify.add_argument("--repair", metavar="OUT", help="write whole shards without the broken samples into OUT")
    verify.add_argument("--json", action="store_true", help="the findings as JSON")
    verify.add_argument("--workers", type=_positive, help="processes (default: one a core)")
    verify.set_defaults(run=_verify)

    stats = commands.add_parser("stats", help="classes, sizes, colours, copies and groups across splits; a page of it")
    stats.add_argument("folder", nargs="+", help="sets such as shards/train shards/val, or the folder of them")
    stats.add_argument("--samples", type=_positive, default=2000, help="pictures that mean and std are taken of")
    stats.add_argument("--out", help="FILE.html (default: stats.html beside the sets), or the chart as .svg or .png")
    stats.add_argument("--json", metavar="FILE", help="all of it, every pair of copies too")
    stats.add_argument("--workers", type=_positive, help="processes (default: one a core)")
    stats.set_defaults(run=_stats)

    ls = commands.add_parser("ls", help="a line for each sample: key, class, bytes, shard, group, path")
    ls.add_argument("folder")
    ls.add_argument("--class", dest="name", metavar="NAME", help="of this class alone")
    ls.add_argument("--no-paths", action="store_true", help="do not read the paths out of the shards: 7 times faster")
    ls.add_argument("--json", action="store_true", help="as JSON lines")
    ls.set_defaults(run=_ls)

    cat = commands.add_parser("cat", help="write a sample's picture, or another member, to stdout")
    cat.add_argument("folder")
    cat.add_argument("key", help="KEY, #ROW or the path packed from; with .EXT another member than the picture")
    cat.add_argument("-o", "--out", metavar="FILE", help="into a file")
    cat.set_defaults(run=_cat)


def _change_shards(commands: Commands) -> None:
    reshard = commands.add_parser(
        "reshard", help="indexed shards into new ones: of another size, mixed, several as one"
    )
    reshard.add_argument("source", nargs="+", help="indexed sets with the same classes")
    reshard.add_argument("out", help="folder for the new set")
    reshard.add_argument(
        "--shard-megabytes", type=_megabytes, default=256.0, help="largest size of a shard (default 256)"
    )
    reshard.add_argument(
        "--shuffle", type=int, metavar="SEED", help="mix the samples, where shards are sorted by class"
    )
    reshard.add_argument("--drop-unused-members", action="store_true", help="keep picture, label, path and group alone")
    reshard.add_argument("--workers", type=_positive, help="processes (default: one a core)")
    reshard.set_defaults(run=_reshard, interrupted=_GOES_ON)


def _plan_a_run(commands: Commands) -> None:
    plan = _with_settings(
        commands, "plan", "what a configuration trains (layers, rates) and takes: memory of a GPU, time, network, disk"
    )
    plan.add_argument("config", help="a configuration (.yaml)")
    plan.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings over those of the file")
    plan.add_argument("--classes", type=_positive, metavar="N", help="number of classes, if data.train is not here")
    plan.add_argument("--samples", type=_positive, metavar="N", help="training samples, if data.train is not here")
    plan.add_argument("--json", action="store_true", help="memory and cost as JSON (bytes, seconds, FLOP), no tables")
    where = plan.add_argument_group("the place (default: one node of 8 GPUs)")
    where.add_argument("--nodes", type=_positive, metavar="N")
    where.add_argument("--gpus-per-node", type=_positive, metavar="N")
    where.add_argument("--gpu-memory-gb", type=_amount, metavar="N", help="10^9 bytes of a GPU: whether it fits")
    where.add_argument("--cluster", metavar="FILE", help="a profile (slurm/NAME.yaml) that tells these and more")
    assumed = plan.add_argument_group("assumed")
    assumed.add_argument("--mfu", type=_share, default=0.4, metavar="P", help="share of a GPU's peak (default 0.4)")
    assumed.add_argument(
        "--tflops", type=_amount, default=790.0, metavar="N", help="that peak (default 790: H100, H200; A100: 312)"
    )
    assumed.add_argument(
        "--write-gb-s", type=_amount, default=0.5, metavar="N", help="GB/s of the run folder's disk (default 0.5)"
    )
    plan.set_defaults(run=_plan)


def _use_a_model(commands: Commands) -> None:
    evaluate = _with_settings(commands, "evaluate", "measure models on shards, or tell what runs have measured")
    evaluate.add_argument(
        "source",
        nargs="+",
        help="a run folder, a model folder or id of Hugging Face, or a file of weights (.safetensors, .pth); several "
        "runs without --data: their own evaluations, mean and deviation",
    )
    evaluate.add_argument("--data", metavar="SHARDS", help="indexed shards with the model's classes, in any order")
    evaluate.add_argument("--json", metavar="FILE", help="all of it; - for stdout, in place of the tables")
    evaluate.add_argument("--batch", type=_positive, help="samples of a forward pass of one rank (default 64)")
    evaluate.add_argument("--tta", choices=("none", "flip"), help="flip: the mean with the mirror image")
    point = evaluate.add_argument_group("operating point: from which probability on a class should be reported")
    point.add_argument("--recall-of", metavar="CLASS", help="the highest recall, with --at-precision")
    point.add_argument("--at-precision", type=_share, metavar="P")
    point.add_argument("--precision-of", metavar="CLASS", help="the highest precision, with --at-recall")
    point.add_argument("--at-recall", type=_share, metavar="R")
    evaluate.add_argument(
        "--write-decision",
        action="store_true",
        help="keep evaluation.unsure.* as decision.json in the model's folder, for `vitdist predict`",
    )
    evaluate.set_defaults(run=_evaluate)

    predict = _with_settings(commands, "predict", "a model's classes for pictures, as a table")
    predict.add_argument("source", help="a run folder, or a model folder or id of Hugging Face")
    predict.add_argument("pictures", nargs="+", metavar="PATH", help="pictures, and folders of them at any depth")
    predict.add_argument("--csv", metavar="FILE", help="the table as a file (default: stdout)")
    predict.add_argument(
        "--top",
        type=_positive,
        help="the TOP most probable classes (default: a column for each class; 1 on a terminal)",
    )
    predict.add_argument("--tta", choices=("none", "flip"), help="flip: the mean with the mirror image")
    predict.add_argument("--batch", type=_positive, default=64, help="pictures of a forward pass (default 64)")
    predict.add_argument("--workers", type=_whole, help="processes that decode (default: by cores with a GPU, else 0)")
    predict.set_defaults(run=_predict)

    export = _with_settings(commands, "export", "a model as a folder of Hugging Face with its card, or as ONNX")
    export.add_argument("source", help="a run folder, a model folder or id of Hugging Face, or a file of weights")
    export.add_argument("--to", choices=("hf", "onnx"), required=True)
    export.add_argument("--out", metavar="PATH", help="a folder (hf), or a file (onnx); default: in the run folder")
    export.add_argument("--classes", metavar="FILE", help="class names of a file of weights, one a line, in its order")
    export.add_argument(
        "--raw-pixels", action="store_true", help="onnx: takes uint8 pixels and answers probabilities, not logits"
    )
    export.set_defaults(run=_export)


def _with_settings(commands: Commands, name: str, words: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=words,
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings may follow as section.name=value: model.image_size=384 model.heads=12 data.eval_crop=1.0\n"
        "(`python -m vitdist.train --help` lists them)",
    )
    parser.set_defaults(overrides=[])
    return parser


def _follow_a_run(commands: Commands) -> None:
    checkpoints = commands.add_parser("checkpoints", help="list, verify and prune the checkpoints of a run")
    checkpoints.add_argument("folder", metavar="RUN")
    checkpoints.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    checkpoints.add_argument(
        "--prune",
        action="store_true",
        help="remove all but the newest --keep whole ones and the best, damaged ones that are older than a whole one, "
        "and what killed writers left",
    )
    checkpoints.add_argument(
        "--keep", type=_positive, metavar="N", help="with --prune (default: checkpoint.keep of the run)"
    )
    checkpoints.set_defaults(run=_checkpoints)

    report = commands.add_parser(
        "report",
        help="a run as a page, as Markdown or as figures, from its folder alone; of several their comparison",
        description="Without an option, the page. Of several runs, of a sweep or of a folder of runs, one comparison, "
        "in the folder that they share.",
    )
    report.add_argument(
        "folder", nargs="*", metavar="RUN", help="run folder, at any moment of the run; a sweep's; a folder of runs"
    )
    report.add_argument("--out", metavar="FILE", help="where to write the page or the Markdown")
    report.add_argument("--markdown", action="store_true", help="report.md, for a pull request or a paper")
    report.add_argument(
        "--figures", nargs="?", const="", metavar="FOLDER", help="each figure as SVG and PNG (default: RUN/figures)"
    )
    report.add_argument(
        "--watch", nargs="?", const="30", metavar="SECONDS", help="the page every 30 seconds while a run goes on"
    )
    report.add_argument("--each", action="store_true", help="of several runs, each one's own instead of a comparison")
    report.add_argument("--wandb", action="store_true", help="as a W&B Report, saved where the runs are at W&B")
    report.add_argument("--dry-run", action="store_true", help="with --wandb: only write what would be sent, as JSON")
    report.set_defaults(run=_report)

    sync = commands.add_parser(
        "sync", help="upload the offline W&B parts of runs, oldest first; safe to repeat, and while they train"
    )
    sync.add_argument("folder", nargs="*", metavar="RUN", help="a run, a sweep, or a folder of runs (default: runs)")
    sync.add_argument("--jobs", type=_positive, default=4, metavar="N", help="runs at a time (default 4)")
    sync.add_argument("--watch", nargs="?", const="60", metavar="SECONDS", help="again every 60 seconds, until Ctrl-C")
    sync.add_argument(
        "--include-online", action="store_true", help="also what runs that were online could not upload themselves"
    )
    sync.add_argument("--dry-run", action="store_true", help="tell what would be uploaded")
    sync.set_defaults(run=_sync, interrupted=_GOES_ON)


_NUMBER = re.compile(r"[0-9]{1,18}")


def _whole(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1, such as 0.95")
    return share


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 80")
    return amount


def _positive(text: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _megabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 1.1 <= size <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in megabytes, such as 256")
    return size


def _pack(args: argparse.Namespace) -> None:
    from vitdist.data.pack import pack

    pack(
        args.source,
        args.out,
        val_fraction=args.val_fraction,
        group_by=args.group_by,
        resize=args.resize,
        quality=args.quality,
        root=args.root,
        image_column=args.image_column,
        label_column=args.label_column,
        split_column=args.split_column,
        classes=args.classes,
        shard_bytes=round(args.shard_megabytes * 1e6),
        workers=args.workers,
    )


def _index(args: argparse.Namespace) -> None:
    from vitdist.data.index import Index, build, read_classes

    classes = read_classes(args.classes) if args.classes else None
    build(args.shards, classes, args.workers, label=args.label, out=args.out, progress=True)
    index = Index.open(args.out or args.shards)
    print(
        f"{index.folder}: {len(index):,} samples of {len(index.classes):,} classes in {len(index.shards):,} shards, "
        f"digest {index.digest[:12]}"
    )


def _verify(args: argparse.Namespace) -> int:
    from vitdist.data import verify

    return verify.run(
        args.folder,
        decode=not args.no_decode,
        label=args.label,
        out=args.repair,
        as_json=args.json,
        workers=args.workers,
    )


def _stats(args: argparse.Namespace) -> None:
    from vitdist.data import stats

    stats.run(args.folder, samples=args.samples, out=args.out, json_file=args.json, workers=args.workers)


def _ls(args: argparse.Namespace) -> None:
    from vitdist.data import browse

    browse.ls(args.folder, name=args.name, paths=not args.no_paths, as_json=args.json)


def _cat(args: argparse.Namespace) -> None:
    from vitdist.data import browse

    browse.cat(args.folder, args.key, args.out)


def _reshard(args: argparse.Namespace) -> None:
    from vitdist.data.reshard import reshard

    reshard(
        args.source,
        args.out,
        shard_bytes=round(args.shard_megabytes * 1e6),
        shuffle=args.shuffle,
        only_used=args.drop_unused_members,
        workers=args.workers,
    )


def _digits(args: argparse.Namespace) -> None:
    from vitdist.data.pack import write_digits

    write_digits(args.folder)


def _plan(args: argparse.Namespace) -> None:
    import json

    from vitdist import config, cost, plan

    settings = config.load(args.config, args.overrides)
    classes, samples = _of_training_set(settings, args)
    place = _place(args)
    assumed = cost.Assumed(args.tflops, args.mfu, args.write_gb_s)
    if args.json:
        print(json.dumps(plan.as_json(plan.budget(settings, classes, place, samples, assumed)), indent=2))
        return
    try:
        takes = plan.text(plan.budget(settings, classes, place, samples, assumed))
    except config.SettingsError as error:  # the batch does not divide
        if args.nodes or args.gpus_per_node or args.cluster:
            raise
        takes = f"memory and time: {error} (8 GPUs are taken; say --nodes N --gpus-per-node N)"
    try:
        print(f"{plan.table(settings, classes)}\n")
    except ImportError as error:
        print(f"no table of layers: {error.name} is not installed here\n")
    print(takes)


def _of_training_set(settings: Any, args: argparse.Namespace) -> tuple[int, int | None]:
    """Number of classes and of samples, as given or as the indexes tell; samples None where they are not known."""
    from vitdist.data.index import Index

    classes, samples, stream = args.classes, args.samples, settings.data.stream
    if stream and samples is None:
        samples = settings.data.stream_samples
    if classes is not None and samples is not None:
        return classes, samples
    try:
        sets = [settings.data.val] if stream else list(settings.data.train_sets)
        indexes = [Index.open(place, check=False) for place in sets]
    except (ValueError, OSError) as error:
        if classes is None:
            raise ValueError(f"{error}\nor say how many classes there will be: --classes N") from None
        return classes, samples
    if classes is None:
        classes = len(indexes[0].classes)
    return classes, sum(map(len, indexes)) if samples is None else samples


def _place(args: argparse.Namespace) -> Any:
    """By the options, the profile, and what is usual."""
    from vitdist import config, plan

    raw = config.read_yaml(args.cluster) if args.cluster else {}
    # The launcher checks profiles; here a number is taken where there is one. 120 s is its default.
    told = {name: value for name, value in raw.items() if isinstance(value, int | float) and 0 < value <= 1e6}
    delay = told.get("signal_delay_s", 120) if args.cluster else None
    cpus = int(told["cpus_per_task"]) if "cpus_per_task" in told else None
    gpus = args.gpus_per_node or int(told.get("gpus_per_node", 8))
    return plan.Place(args.nodes or 1, gpus, args.gpu_memory_gb or told.get("gpu_memory_gb"), cpus, delay)


def _evaluate(args: argparse.Namespace) -> int:
    if args.data is None:
        from vitdist import results

        points = ("recall_of", "at_precision", "precision_of", "at_recall")
        for option in ("tta", "batch", *points, "write_decision", "overrides"):
            if getattr(args, option):
                named = "settings need" if option == "overrides" else f"--{option.replace('_', '-')} needs"
                raise ValueError(f"{named} --data: without it the runs' own evaluations are shown")
        results.of_runs(_runs(args.source), args.json)
        return 0
    if len(args.source) > 1:
        raise ValueError(f"--data measures one model, not {len(args.source)}: give one, or leave --data out")
    from vitdist import inference

    asked = _operating_point(args)
    overrides = _as_settings(args, tta="evaluation.tta", batch="evaluation.batch")
    return inference.run_evaluate(
        args.source[0], args.data, overrides, json_file=args.json, point=asked, write_decision=args.write_decision
    )


def _operating_point(args: argparse.Namespace) -> tuple[str, float | None, float | None] | None:
    """Class, precision and recall that are asked for."""
    for of, at in (("recall_of", "at_precision"), ("precision_of", "at_recall")):
        if (getattr(args, of) is None) != (getattr(args, at) is None):
            raise ValueError(f"--{of.replace('_', '-')} and --{at.replace('_', '-')} belong together")
    if args.recall_of is not None and args.precision_of is not None:
        raise ValueError("give --recall-of or --precision-of, not both")
    name = args.recall_of if args.recall_of is not None else args.precision_of
    return None if name is None else (name, args.at_precision, args.at_recall)


def _as_settings(args: argparse.Namespace, **names: str) -> list[str]:
    """Options that are settings by another name, before the settings that are given as such."""
    given = [f"{name}={getattr(args, option)}" for option, name in names.items() if getattr(args, option) is not None]
    return given + args.overrides


def _predict(args: argparse.Namespace) -> int:
    from vitdist import inference

    return inference.run_predict(
        args.source,
        args.pictures,
        _as_settings(args, tta="evaluation.tta"),
        csv_file=args.csv,
        top=args.top,
        batch=args.batch,
        workers=args.workers,
    )


def _export(args: argparse.Namespace) -> None:
    from vitdist import inference

    inference.run_export(
        args.source, args.overrides, to=args.to, out=args.out, classes=args.classes, raw=args.raw_pixels
    )


def _runs(folders: list[str]) -> list[RunDir]:
    runs = [RunDir(Path(folder)) for folder in folders]
    for run in runs:
        if not run.config.exists():
            raise ValueError(f"{run.path} is no run folder (it has no config.yaml); run folders lie under runs/")
    return runs


def _checkpoints(args: argparse.Namespace) -> int:
    """A line for each checkpoint; returns 1 if one is damaged and stays."""
    from vitdist import config, manifest, selection

    (run,) = _runs([args.folder])
    if args.keep and not args.prune:
        raise ValueError("--keep: only with --prune")
    settings = config.load(run.config)
    found = selection.best(selection.history(run, settings.evaluation.best), settings.evaluation.best)
    best = found[0] if found else None
    entries = []
    for entry in manifest.entries(run, thorough=args.verify or args.prune):
        entries.append(entry)
        print(manifest.line(entry, entry.step == best, args.verify or args.prune))
    if not entries:
        print(f"{run.path}: no checkpoint yet")
    gone: list[int] = []
    if args.prune:
        whole = [entry.step for entry in entries if entry.fault is None]
        damaged = [entry.step for entry in entries if entry.fault]
        gone = manifest.superfluous(whole, damaged, args.keep or settings.checkpoint.keep, best)
        _prune(run, gone)
    return int(any(entry.fault and entry.step not in gone for entry in entries))


def _prune(run: RunDir, steps: list[int]) -> None:
    from vitdist import manifest

    try:
        with rundir.only_writer(run):
            manifest.clean(run)
            for step in steps:
                manifest.remove(run.checkpoints / manifest.name_of(step))
                print(f"removed {manifest.name_of(step)}")
    except BlockingIOError:
        raise ValueError(f"{run.path} is being trained: it prunes by itself; stop it first to prune by hand") from None


def _report(args: argparse.Namespace) -> int | None:
    from vitdist.report import folders, forms

    every, place, named = args.watch, args.figures, args.folder
    if every and not _NUMBER.fullmatch(every):  # `--watch runs/NAME`, which argparse takes for the seconds
        every, named = "30", [every, *named]
    if place and (not named or RunDir(Path(place)).config.exists()):
        place, named = "", [place, *named]
    if not named:
        raise ValueError("which run? vitdist report runs/NAME")
    if every and (args.markdown or place is not None or args.each):
        raise ValueError("--watch: one page is made again and again; leave --markdown, --figures and --each away")
    if args.out and place is not None and not args.markdown:
        raise ValueError("--out: names the page or the Markdown; --figures=FOLDER says where figures go")
    if args.each and (args.out or place):
        raise ValueError("--each: each run's report lies in its folder; leave --out and the folder of --figures away")
    if args.dry_run and not args.wandb:
        raise ValueError("--dry-run: belongs to --wandb; other reports are files and nothing else")
    if args.wandb and (every or args.markdown or args.out or place is not None):
        raise ValueError("--wandb: saves the W&B Report alone; ask for other reports without it")
    runs, home = folders.find([Path(folder) for folder in named])
    if args.wandb:
        return _report_to_wandb([([run], run.path) for run in runs] if args.each else [(runs, home)], args.dry_run)
    out = Path(args.out) if args.out else None
    for group in [[run] for run in runs] if args.each else [runs]:
        if every:
            forms.follow(functools.partial(forms.page, group, home, out), max(1, int(every)))
            continue
        made = [] if place is None else forms.drawings(group, home, Path(place) if place else None)
        if args.markdown:
            made.append(forms.text(group, home, out, made))
        print(*(made or [forms.page(group, home, out).path]), sep="\n")
    return None


def _report_to_wandb(groups: list[tuple[list[RunDir], Path]], dry_run: bool) -> int:
    """Save the report of each group of runs, with its JSON in that folder."""
    try:
        from vitdist.report import wandb_report
    except ModuleNotFoundError as error:
        if error.name not in ("wandb", "wandb_workspaces"):
            raise
        missing = error.name.replace("_", "-")
        raise ValueError(f"--wandb: {missing} is not installed: pip install {missing}") from None
    failed = 0
    for runs, home in groups:
        try:
            path, url = wandb_report.save(runs, home, dry_run)
            print(path if dry_run else url)
        except wandb_report.NotSavedError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
    return failed


def _sync(args: argparse.Namespace) -> int:
    from vitdist import sync

    every, folders = args.watch, args.folder
    if every and not _NUMBER.fullmatch(every):  # `--watch runs/NAME`, which argparse takes for the seconds
        every, folders = "60", [every, *folders]
    folders = folders or ["runs"]
    runs = sync.find(folders)
    if args.dry_run:
        return sync.listing(runs, args.include_online)
    if every:
        return sync.watch(folders, args.jobs, args.include_online, max(int(every), 1))
    return sync.once(runs, args.jobs, args.include_online)


if __name__ == "__main__":
    sys.exit(main())
