"""The command `vitdist`: what one does with data before a run and with its folder afterwards.

vitdist pack photos shards            # pictures -> indexed WebDataset tar shards
vitdist index shards/train            # index tars that others made
vitdist stats shards                  # classes, copies, patients in both splits: a page
vitdist verify shards                 # are they what they were?
vitdist report runs/NAME              # the run as a page
vitdist sync runs/NAME                # upload offline W&B rows where there is a network
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from vitdist import rundir
from vitdist.rundir import RunDir


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with a line on stderr for what cannot be done."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except BrokenPipeError:  # the reader of a pipe has seen enough (`| head`); Python would flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"error: {named}", file=sys.stderr)
        return rundir.EXIT_REFUSED
    except BrokenProcessPool:
        print("error: a process was killed, most often for want of memory: try fewer --workers", file=sys.stderr)
        return rundir.EXIT_REFUSED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return rundir.EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitdist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    pack.set_defaults(run=_pack)

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
    index.set_defaults(run=_index)

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
    reshard.set_defaults(run=_reshard)

    digits = commands.add_parser("digits", help="write scikit-learn's scanned digits as an ImageFolder")
    digits.add_argument("folder")
    digits.set_defaults(run=_digits)

    report = commands.add_parser("report", help="write RUN/report.html from the run folder")
    report.add_argument("folder", nargs="+", metavar="RUN")
    report.set_defaults(run=_report)

    sync = commands.add_parser("sync", help="upload the offline W&B parts of runs, oldest first; safe to repeat")
    sync.add_argument("folder", nargs="+", metavar="RUN")
    sync.set_defaults(run=_sync)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
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


def _runs(folders: list[str]) -> list[RunDir]:
    runs = [RunDir(Path(folder)) for folder in folders]
    for run in runs:
        if not run.config.exists():
            raise ValueError(f"{run.path} is no run folder (it has no config.yaml); run folders lie under runs/")
    return runs


def _report(args: argparse.Namespace) -> None:
    from vitdist import report

    for run in _runs(args.folder):
        print(report.write(run))


def _sync(args: argparse.Namespace) -> int:
    code = 0
    for run in _runs(args.folder):
        parts = sorted(p for p in run.wandb.glob("offline-run-*") if not any(p.glob("*.synced")))
        if not parts:
            print(f"{run.path}: nothing to upload")
            continue
        # Parts of one W&B run are appended in the order of their start, which their names carry.
        done = subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, parts)])
        code = code or done.returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
