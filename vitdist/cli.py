"""The command `vitdist`: what one does with data before a run and with its folder afterwards.

vitdist pack photos shards            # ImageFolder -> indexed WebDataset tar shards
vitdist index shards/train            # index tars that others made
vitdist report runs/NAME              # the run as a page
vitdist sync runs/NAME                # upload offline W&B rows where there is a network
"""

import argparse
import subprocess
import sys
from pathlib import Path

from vitdist import rundir
from vitdist.rundir import RunDir


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with a line on stderr for what cannot be done."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (ValueError, OSError) as error:
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

    pack = commands.add_parser("pack", help="ImageFolder -> indexed WebDataset shards")
    pack.add_argument("source", help="folder of class folders, or one that holds train/ and val/ of these")
    pack.add_argument("out", help="folder for OUT/train and OUT/val")
    pack.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        help="share of each class split off for validation, if there is no val/",
    )
    pack.add_argument("--shard-megabytes", type=float, default=256.0, help="largest size of a shard (default 256)")
    pack.add_argument("--workers", type=int, help="processes (default: one a core); the bytes do not depend on it")
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
    index.add_argument("--workers", type=int, help="processes (default: one a core)")
    index.set_defaults(run=_index)

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


def _pack(args: argparse.Namespace) -> None:
    from vitdist.data.pack import pack

    pack(
        args.source,
        args.out,
        val_fraction=args.val_fraction,
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
