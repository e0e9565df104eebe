"""5,000 settings files and command lines that nobody would write: each is taken or refused, never a traceback, never a
hang, never a half-made run folder.

    python -m pytest tests/test_fuzz.py                 # the first cases of each command
    python -m pytest tests/test_fuzz.py -m full         # the others
    python -m tests.test_fuzz 1234                      # one case: its words, its file, what it answers

A case is a number, which seeds everything in it. The commands run in this process up to the edge where work would
begin: the trainer's `train`, submitit's executors and the rooms behind `vitdist` are stood in for.
"""

import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import submitit

from launch import follow, preflight, slurm, snapshot
from launch import submit as launch_submit
from vitdist import cli, config, rundir
from vitdist import train as trainer
from vitdist.config import Config
from vitdist.rundir import RunDir

ROOT = Path(__file__).parents[1]
CASES = 5000
IN_MAKE_TEST, CHUNK = 250, 250
"""Of CASES: as many as take some 10 s on a busy core. The others have the mark `full`."""
PATIENCE_S = 10.0
"""Of one case. The slowest takes a fifth of a second; the machine may be busy."""
MOST_LINES, MOST_SIGNS = 60, 10_000
"""Of an answer: argparse tells the usage of a command, settings tell each fault."""

# With shards that are there, so that not all of them end at the first look at the data.
SOURCES = [
    re.sub(r"^  (train|val): shards/.*$", r"  \1: shards/\1", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for path in sorted(ROOT.glob("configs/*.yaml"))
]
PROFILES = [
    *(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("slurm/*.yaml"))),
    "partition: gpu\naccount: vision\ngpus_per_node: 8\ncpus_per_task: 96\ntime: '12:00:00'\nmem_gb: all\n"
    "setup: [module load cuda/13.0]\nsrun_args: [--cpu-bind=none]\nexclude: node[3,17]\n",
]

# ---- what is put in ------------------------------------------------------------------------------------

SCALARS = [
    *("1e308", "9223372036854775807", "1e-300", "{x: 1e308}", "[1e308, 1e308]", "", "~", "null", "NaN", ".nan"),
    *(".inf", "-.inf", "1e400", "-1e400", "1e-400", "-0", "-1", "0", "0.5", "1e3", "9" * 400, "9" * 5000),
    *("-" + "9" * 5000, "0x" + "f" * 5000, "0x", "1_0__0_", "010", "0o17", "1e", "1.2.3", "true", "yes", "off"),
    *("None", "[]", "{}", "[[]]", "[1]", "[1, 2, 3, 4]", "{a: b}", "{1: 2}", "{null: 1}", "{[]: 1}", "2020-01-01"),
    *("12:30:45", "!!timestamp 2020-99-99", "!!timestamp x", "!!binary aGk=", "!!binary =", "!!set {a, b}"),
    *("!!int abc", "!!int ''", "!!int '+'", "!!float x", "!!float ''", "!!bool x", "!!null x", "!!omap [a: 1]"),
    *("!!pairs [a: 1]", "!!python/name:os.system", "!!python/object/apply:os.system ['touch hacked']", "!!str [1]"),
    *("!!map 3", "!!seq {}", "*x", "&x 1", "&x [*x]", "&x {a: *x}", "<<: *x", "{<<: {a: 1}}", "{<<: 3}"),
    *("{<<: [1]}", "!", "!<tag:x> 1", "@x", "`x`", "💥", '"\\ud800"', '"\\0"', '"\\x1b[31mred"', '"a\\nb"'),
    *('"\\x85\\u2028"', "'3e-4'", "'0x1f'", "'1_000'", "'null'", "' '", "../../x", "~", "~nobodyhere/x", "~/x"),
    *("/dev/null", "/proc/self/mem", "a" * 300, "a" * 5000, "/" + "a/" * 2500, "stream:", "stream:x.tar"),
    *("stream:pipe:touch hacked", "pipe:touch hacked", "stream:{0..999999999}.tar", "http://[bad", "http://"),
    *("s3://", "file:///etc/passwd", "://", "google/vit-large-patch16-224-in21k", "./none.pth", "rand-m9" * 50),
    *("rand-m999999999999999999999", "trivial", "augmix-m5", "auto", "all", "balanced"),
]  # fmt: skip

SHARP = [
    *("\x00", "\ufeff", "\t", "\r", "\x85", "\u2028", "\x1b[31m", "\x7f", "💥", "\u202e", "ٳ", "É", "&a ", "*a "),
    *("<<: ", "!!", "---\n", "...\n", "%YAML 9.9\n---\n", "%TAG ! x\n", "? ", "- ", ": ", ":", "#", "|", ">", "{"),
    *("}", "[", "]", ",", "'", '"', "@", "`", "\\", "\n", "\n\n", " ", "  ", "=", "%s", "%(x)s", "{0}"),
]  # fmt: skip

WORDS = [
    *("", " ", "-", "--", "---", "-x", "--bogus", "--config", "--nodes", "--name", "--time", "--runs", "--cluster"),
    *("--attempt", "--dry-run", "--follow", "--help", "-h", "--confi", "--nodes=", "--nodes=-1", "--nodes=1e3"),
    *("--nodes=100000000", "--nodes=4", "--nodes=" + "9" * 5000, "--config=", "--config=.", "--config=/"),
    *("--config=/dev/null", "--config=/dev/zero", "--config=pipe.yaml", "--config=folder.yaml"),
    *("--config=loop.yaml", "--config=dangling.yaml", "--config=good.yaml/x", "--config=" + "a" * 5000),
    *("--config=~nobodyhere/x", "--name=", "--name=..", "--name=../x", "--name=a/b", "--name=-x", "--name=a b"),
    *("--name=a\nb", "--name=$(id)", "--name=" + "a" * 101, "--name=💥", "--name=\udcff", "--name=a%j"),
    *("--name=.hidden", "--name=ok", "--name=CON", "--name=a;b", "--name=#SBATCH", "--runs=", "--runs=/proc/x"),
    *("--runs=good.yaml", "--runs=good.yaml/x", "--runs=" + "a" * 300, "--runs=~nobodyhere/x", "--runs=a\nb"),
    *("--runs=\udcff", "--runs=%j", "--runs=a\\b", "--runs=loop.yaml", "--runs=💥", "--runs=here"),
    *("--runs=a b'c\"d", "--time=", "--time=0", "--time=-1", "--time=soon", "--time=1:2:3:4", "--time=99:99"),
    *("--time=" + "9" * 5000, "--time=٣٣٣", "--time=1-", "--cluster=", "--cluster=local", "--cluster=auto"),
    *("--cluster=slurm/none.yaml", "--cluster=profile.yaml", "--cluster=good.yaml", "--cluster=folder.yaml"),
    *("--cluster=pipe.yaml", "--cluster=/dev/zero", "--warm-start=nowhere", "--warm-start=loop.yaml"),
    *("--warm-start=run", "--attempt=0", "--attempt=-1", "--attempt=x", "--attempt=" + "9" * 5000, "=", "=1", "a="),
    *("a.b", "a..b=1", ".=1", "a=b=c", "optim=1", "optim={}", "data=[]", "train=null", "optim.lr.x=1", "1a=2"),
    *("é.ü=1", "optim.lr=\udcff", "optim.lr=\x1b[31m", "data.train=\udcff", "data.val=\udcff"),
    *("data.val=~nobodyhere", "tracking.project=\udcff", "data.train={a: 1, ./a: 2}"),
    *("data.class_shares={bird: 1}", "data.cache=~nobodyhere", "train.steps=1" + "0" * 30),
    *("evaluation.unsure.costs={a: {b: 1}}", "model.lora={}", "model.freeze=all", "checkpoint.keep=" + "9" * 400),
    *("a." * 3000 + "b=1", "good.yaml", "shards/train", "nowhere", "folder.yaml", "loop.yaml", "good.yaml/x"),
    *("a" * 5000, "~nobodyhere/x", "\udcff", "💥", "--data", "--to", "onnx", "--out", "--json", "--csv", "--top"),
    *("0", "-1", "1e9", "9" * 5000, "nan", "inf", "٣", "%", "%s", "{}"),
]  # fmt: skip

COMMANDS = [
    *("pack nowhere out", "pack photos out --val-fraction 0.2 --resize 64"),
    *("pack good.yaml out --classes good.yaml", "index nowhere", "index empty --label json:x"),
    *("index {0..9}.tar --out out", "digits good.yaml/x", "verify nowhere --json"),
    *("verify empty --repair out --no-decode", "stats nowhere --samples 5", "stats empty --out x.svg"),
    *("ls nowhere", "ls empty --class cat --json", "cat nowhere KEY", "cat empty #1 -o out"),
    *("reshard nowhere empty out --shuffle 3", "plan good.yaml", "plan good.yaml optim.lr=1e-3 --classes 7"),
    *("plan nowhere.yaml", "evaluate nowhere empty", "evaluate run --data nowhere --tta flip"),
    "evaluate nowhere --data empty --recall-of a --at-precision 0.9 --write-decision",
    *("predict run photos --csv x.csv --top 3", "predict nowhere good.yaml --batch 2"),
    *("export run --to onnx --raw-pixels", "export ./none.pth --to hf --out out --classes good.yaml", "report run"),
    "report run --markdown --figures",
    *("report nowhere", "sync run", "checkpoints run", "checkpoints run --verify"),
    *("checkpoints run --prune --keep 2", "checkpoints nowhere"),
]  # fmt: skip


@dataclass
class Case:
    """One thing that somebody might type, and the file that it names."""

    number: int
    command: str
    words: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    bad: bool = False
    """Whether it must be refused, whatever else is in it."""

    def __str__(self) -> str:
        files = "".join(f"\n{name}: {_short(content)}" for name, content in self.files.items())
        words = [_short(word) for word in self.words]
        return f"case {self.number}: {self.command} {' '.join(words)}{files}"


def _short(value: str | bytes) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:200]} ...{len(value):,}... {text[-100:]}"


def make(number: int) -> Case:
    """The case of a number: always the same."""
    rng = random.Random(number)
    kind = ("train", "submit", "profile", "vitdist", "vitdist", "train words", "submit words", "index")[number % 8]
    bad = False
    if kind in ("train", "submit", "profile"):
        content, bad = mutated(rng, rng.choice(PROFILES if kind == "profile" else SOURCES))
        bad = bad and not (kind == "profile" and not content.strip(b"#"))  # a profile may say nothing
        files = {"profile.yaml" if kind == "profile" else "case.yaml": content}
        if kind == "train":
            words = ["case.yaml", "--name", "x"]
            return Case(number, rng.choice(("train", "vitdist plan")), words, files, bad)
        way = ["--config", "good.yaml", "--cluster", "profile.yaml"] if kind == "profile" else ["--config", "case.yaml"]
        return Case(number, "submit", [*way, "--name", "x", *rng.choice(([], ["--dry-run"]))], files, bad)
    if kind == "index":
        record = '{"samples": 100, "classes": ["cat", "dog"], "digest": "a", "shards": [{"name": "0.tar", "bytes": 0}]}'
        content, _ = mutated(rng, record)
        return Case(number, "submit", ["--config", "good.yaml", "--name", "x"], {"shards/train/index.json": content})
    if kind == "vitdist":
        return Case(number, "vitdist", reworded(rng, rng.choice(COMMANDS).split()))
    if kind == "train words":
        start = rng.choice((["good.yaml"], ["run"], ["good.yaml", "--name", "x", "optim.lr=1e-3"]))
        return Case(number, "train", reworded(rng, start))
    start = ["--config", "good.yaml", "--name", "x", "--nodes", "2"]
    return Case(number, "submit", reworded(rng, [*start, *rng.choice(([], ["--dry-run"]))]))


def reworded(rng: random.Random, words: list[str]) -> list[str]:
    """Words with some of them put in, replaced, doubled, left out, or with a sharp sign inside."""
    names = [name for name, *_ in config.flat(Config)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(words) + 1)
        how = rng.randrange(6)
        if how <= 1:
            words.insert(place, rng.choice(WORDS))
        elif how == 2:
            words.insert(place, f"{rng.choice(names)}={rng.choice(SCALARS)}")
        elif how == 3 and words:
            words[place % len(words)] = rng.choice(WORDS)
        elif how == 4 and words:
            words.pop(place % len(words))
        elif words:
            word = words[place % len(words)]
            cut = rng.randrange(len(word) + 1)
            words[place % len(words)] = word[:cut] + rng.choice(SHARP).replace("\x00", "\udc00") + word[cut:]
    return words


def mutated(rng: random.Random, text: str) -> tuple[bytes, bool]:
    """A file like `text`, and whether nobody could take it for settings."""
    how = rng.randrange(12)
    if how == 0:
        return bomb(rng)
    if how == 1:
        return rng.choice(
            [
                (b"", True),
                (b"\xff\xfe", True),
                (text.encode("utf-16"), False),
                (text.encode("utf-32-le"), True),
                (text.encode() + b"\xff", True),
                (text.encode() + b"\x00", True),
                (b"\x00" * 100, True),
                (b"\x7fELF\x02\x01\x01", True),
                (b"[1, 2]", True),
                (b"just words", True),
                (b"\xef\xbb\xbf" + text.encode(), False),
                (text.encode().replace(b"\n", b"\r\n"), False),
                (text.encode().replace(b"  ", b"\t"), text.count("\n  ") > 0),
                (rng.randbytes(rng.randrange(1, 2000)), False),
            ]
        )
    if how <= 4:  # bytes
        content = bytearray(text.encode())
        for _ in range(rng.choice((1, 1, 2, 5, 50))):
            place, length = rng.randrange(len(content) or 1), rng.randrange(1, 40)
            kind = rng.randrange(5)
            if kind == 0:
                content[place : place + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                del content[place : place + length]
            elif kind == 2:
                content[place:place] = content[place : place + length]
            else:
                content[place:place] = rng.choice(SHARP if kind == 3 else SCALARS).encode("utf-8", "surrogatepass")
        return bytes(content), False
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        line = rng.choice([i for i, line in enumerate(lines) if ":" in line.split("#")[0]] or [0])
        name, colon, _ = lines[line].partition(":")
        kind = rng.randrange(6)
        if kind <= 2:
            lines[line] = f"{name}{colon} {rng.choice(SCALARS)}"
        elif kind == 3:
            lines.insert(line, lines[rng.randrange(len(lines))])
        elif kind == 4:
            indent = name[: len(name) - len(name.lstrip())]
            lines.insert(line, f"{indent}{rng.choice(SCALARS)}: {rng.choice(SCALARS)}")
        else:
            del lines[line]
        if not lines:
            break
    return "\n".join(lines).encode("utf-8", "surrogatepass"), False


def bomb(rng: random.Random) -> tuple[bytes, bool]:
    """A small file that means something large, or that leads a parser down."""
    deep = rng.choice((60, 500, 5000, 20_000))
    wide = rng.choice((30, 3000, 10_000))
    laughs = rng.choice(
        (
            "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
            "a0: &a0 {x: lol}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60)),
            "a0: &a0 {x: lol}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
            "data: &d\n  train: *d\n",
            "data: &d [*d, *d]\n",
        )
    )
    text = rng.choice(
        (
            laughs,
            laughs,
            "data: " + "[" * deep,
            "data: " + "[" * deep + "]" * deep,
            "data: " + "{a: " * deep + "1" + "}" * deep,
            "\n".join(" " * i + "a:" for i in range(min(deep, 700))),
            "".join(f"key{i}: {i}\n" for i in range(wide)),
            "data: {" + ", ".join(f"key{i}: {i}" for i in range(wide)) + "}",
            "data: [" + "1, " * wide + "1]",
            "data:\n  train: " + "x" * wide * 100,
            "x" * wide * 100 + ": 1",
            "? " * deep,
            "- " * deep,
            "data: !!" * min(deep, 5000),
            "a" * 30 + " \n" * wide,
            "#" * wide * 20,
            "data: '" + "\n" * wide,
            "data: " + "&a " * min(deep, 5000),
        )
    )
    return text.encode(), True


# ---- where it is put in --------------------------------------------------------------------------------


class Hang(BaseException):
    """A case took longer than PATIENCE_S."""


GOOD = """\
data: {train: shards/train, val: shards/val}
model: {image_size: 32, scratch: {patch_size: 8, width: 64, depth: 4, heads: 4}}
train: {global_batch: 64, epochs: 2}
"""
INDEX = '{"samples": 100, "classes": ["cat", "dog"]}'


def lay_out(place: Path) -> None:
    """A working folder with what words may name."""
    (place / "good.yaml").write_text(GOOD)
    for split in ("train", "val"):
        (place / "shards" / split).mkdir(parents=True)
        (place / "shards" / split / "0.tar").touch()
        (place / "shards" / split / "index.json").write_text(INDEX)
    for name in ("photos", "empty", "folder.yaml"):
        (place / name).mkdir()
    (place / "loop.yaml").symlink_to("loop.yaml")
    (place / "dangling.yaml").symlink_to("nothing")
    os.mkfifo(place / "pipe.yaml")
    with contextlib.chdir(place):
        settings = config.with_absolute_paths(config.load("good.yaml"))
    run = RunDir(place / "run")
    rundir.publish(run.config, config.to_yaml(settings))
    rundir.publish_json(run.attempt(0).train, {"attempt": 0, "state": "stopped", "step": 7, "total_steps": 9})


def tree(place: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, but for the lock that a look at a run leaves, and for .index, where `vitdist index` keeps
    what it has done, to go on there."""
    return {
        str(path.relative_to(place)): (path.lstat().st_mtime_ns if not path.is_dir() else 0, path.lstat().st_size)
        for path in place.rglob("*")
        if path.name not in (".lock", ".index")
    } | {"": (0, 0)}


SLURM = slurm.Slurm({"gpu": [slurm.Nodes(4, 96, 8, 2880)], "cpu": [slurm.Nodes(9, 32, 0, None)]}, "gpu")


class Executor:
    """submitit's executor of this machine: takes what is handed over."""

    def __init__(self, folder: Path, **_: object) -> None:
        self.folder = Path(folder)

    def update_parameters(self, **parameters: object) -> None:
        self.parameters = parameters

    def submit(self, _: object) -> Any:
        return types.SimpleNamespace(job_id="4711", _process=types.SimpleNamespace(terminate=lambda: None))


def begin(place: Callable[[], RunDir], settings: Config, *_: object, **__: object) -> int:
    """In place of the trainer's `train`: the sums that it does with the settings, and the run folder that it makes."""
    batch = config.split_batch(settings.train, 2)
    assert config.total_steps(settings.train, batch, 1000) >= 1
    assert config.scaled(settings.optim, batch.global_batch).lr >= 0
    run = place()
    if not run.attempts():
        assert config.load(run.config) == settings, "the settings of the run folder are others"
    return 0


@contextlib.contextmanager
def edges(number: int) -> Iterator[None]:
    """Stand-ins for what would train, submit, copy, or read a network."""
    from vitdist import inference, plan, tracking
    from vitdist.data import index, pack
    from vitdist.report import charts

    def refuse(*_: object, **__: object) -> Any:
        raise ValueError("this far and no further")

    def take(_: Path, run: RunDir, *__: object) -> None:
        run.code.mkdir(parents=True)

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "WORLD_SIZE", "RANK"))]:
            patch.delenv(name)
        rng = random.Random(f"place {number}")
        patch.setenv("CUDA_VISIBLE_DEVICES", rng.choice(("", "0,1,2,3")))
        there = rng.choice((None, SLURM, SLURM))
        patch.setattr(trainer, "train", begin)
        patch.setattr(tracking, "to_file", lambda _: None)  # turns this process's output away for good
        patch.setattr(trainer.stop, "install", lambda: trainer.stop.StopRequest())
        patch.setattr(slurm, "partitions", lambda _: there)
        for name in ("commands", "script"):
            patch.setitem(preflight.CHECKS, name, lambda _: [])
        patch.setattr(preflight, "fetch", lambda *_, **__: [])
        patch.setattr(snapshot, "take", take)
        patch.setattr(snapshot, "changed", lambda *_: [])
        patch.setattr(launch_submit, "_sbatch", lambda _: "4711")
        patch.setattr(slurm, "test_only", lambda *_: (None, "silent"))
        patch.setattr(submitit, "LocalExecutor", Executor)
        patch.setattr(follow, "follow", lambda *_, **__: 0)
        patch.setattr(slurm, "state", lambda _: "GONE")
        patch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)
        patch.setattr(plan, "table", lambda settings, classes: f"{settings.optim.lr} {classes}")
        patch.setattr(charts, "vega", lambda: "")
        find = inference.find
        patch.setattr(inference, "load", lambda source, *_, **__: refuse(find(source)))
        patch.setattr(pack, "write_digits", refuse)
        patch.setattr(index, "map_in_order", refuse, raising=False)
        yield


def answer(case: Case, place: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a case. Raises what the command does not catch, and Hang."""
    for name, content in case.files.items():
        (place / name).write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    main: Callable[[], int | None] = {
        "train": lambda: trainer.main(case.words),
        "submit": lambda: launch_submit.main(case.words, launcher="standin"),
        "vitdist": lambda: cli.main(case.words),
        "vitdist plan": lambda: cli.main(["plan", case.words[0], "--classes", "3"]),
    }[case.command]

    def hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        with (
            edges(case.number),
            contextlib.chdir(place),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = main() or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), err.getvalue()


def judge(case: Case, place: Path) -> tuple[int | None, str]:
    """(exit code, what is wrong with the answer to a case); "" if nothing is."""
    before = {name: entry for name, entry in tree(place).items() if name not in case.files}
    try:
        code, out, err = answer(case, place)
    except Hang:
        return None, f"no answer in {PATIENCE_S} s"
    except BaseException as error:
        return None, "".join(traceback.format_exception(error, limit=-6))
    after = {name: entry for name, entry in tree(place).items() if name not in case.files}
    wrong = ""
    if (place / "hacked").exists():
        wrong = "a command was run"
    elif "Traceback" in out + err:
        wrong = f"a traceback: {err}"
    elif code not in (0, rundir.EXIT_REFUSED):
        wrong = f"exit code {code}: {err}"
    elif code == 0:
        wrong = f"taken: {_short(out)}" if case.bad else ""
    elif "error" not in err:
        wrong = f"not told as an error: {_short(err)}"
    elif err.count("\n") > MOST_LINES or len(err) > MOST_SIGNS:
        wrong = f"an answer of {err.count(chr(10))} lines and {len(err):,} signs: {_short(err)}"
    elif before != after:
        wrong = f"left behind {sorted(set(after.items()) ^ set(before.items()))}: {err}"
    return code, wrong


CHUNKS = [
    pytest.param(first, marks=[pytest.mark.full] if first >= IN_MAKE_TEST else [], id=f"from {first}")
    for first in range(0, CASES, CHUNK)
]


@pytest.mark.parametrize("first", CHUNKS)
def test_L1_X2_X4_whatever_is_typed_is_taken_or_refused(first: int, tmp_path: Path) -> None:
    place, number = tmp_path / "0", 0
    place.mkdir()
    lay_out(place)
    untouched = tree(place)
    codes: dict[int | None, int] = {}
    faults = []
    for case in map(make, range(first, first + CHUNK)):
        code, wrong = judge(case, place)
        codes[code] = codes.get(code, 0) + 1
        if wrong:
            faults.append(f"{case}\n-> {wrong}")
        if tree(place) != untouched:
            number += 1
            place = tmp_path / str(number)
            place.mkdir()
            lay_out(place)
            untouched = tree(place)
    assert not faults, f"{len(faults)} of {CHUNK} cases:\n\n" + "\n\n".join(faults[:5])
    # What is refused at the first word tests no more than that: some must get through.
    assert codes[0] > CHUNK / 25
    assert codes[2] > CHUNK / 4


def test_a_case_is_its_number() -> None:
    first, again = [str(make(number)) for number in range(200)], [str(make(number)) for number in range(200)]
    assert first == again
    assert len(set(first)) > 190


def main(number: int) -> None:
    """Show one case and what is answered to it."""
    case = make(number)
    print(case)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        print(judge(case, Path(folder)))
        print(*answer(case, Path(folder)), sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
