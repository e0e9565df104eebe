"""A run's mirror in Weights & Biases: one W&B run over all starts, that never slows or ends a training.

Rows are handed over; a thread of its own gives them to W&B. What W&B does not take is told once and left out.
"""

import base64
import contextlib
import io
import json
import math
import netrc
import os
import queue
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from PIL import Image

from vitdist import gallery, rundir, selection
from vitdist.config import Config
from vitdist.data import storage
from vitdist.rundir import RunDir

# W&B, in seconds. Its defaults: 90 for a server at the start, for ever at the end, and 15 of rows lost to a SIGKILL.
START_S, FINISH_S, FLUSH_S = 30.0, 60.0, 1
GRACE_S = 10.0
"""What W&B gets beyond START_S and FINISH_S before the training goes on without it."""
WAITING = 5_000
"""Rows that may wait for W&B; at 60 figures a row these are 10 MB."""
AT_ONCE, EVERY_S = 600, 1.0
"""Rows that W&B gets as they come, and the seconds after which it gets one more: each costs 2.3 ms of CPU time (60
figures, its service counted; benchmarks/log_rows.py), ten a second 2.3 percent of a core. metrics.jsonl has all."""
SERVICE_S = 30.0
"""For wandb-core to come up."""
HURRIED_S = 20.0
"""For the end of W&B where an attempt failed or was stopped: torchrun kills it after 30, SLURM after its KillWait."""
PROBE_EVERY_S = 30.0
"""How often the disk under W&B is tried: wandb-core tells nobody that it is full (0.31)."""
TRIED = 64 * 1024
"""Bytes written for it."""
SHOWN = 16
"""Pictures of a kind."""
SIDE = 256
"""Their longest side in pixels."""
MATRIX = 50
"""Classes up to which W&B gets a confusion matrix; its table has the square of them as rows."""
MOST_ROWS = 1_000
"""Of a table; W&B shows no more than 10,000 and loads all of them."""
CODE = {".py", ".yaml", ".yml", ".toml", ".sh", ".md", ".txt", ".diff", ".css", ".js"}
"""Endings of the files that are code."""
UPLOADED = 20_000_000
"""Bytes of a model that is uploaded: within FINISH_S at 3 Mbit/s. A larger one is a reference."""

Pictures = Sequence[dict[str, str]]
"""{"label", "jpeg": base64} of each."""


class Mirror:
    """One W&B run, driven by a daemon thread through a bounded queue: whatever W&B does, callers go on at once.

    `say` and `warn` take a text. Each way to fail is told of once.
    """

    def __init__(
        self,
        run: RunDir,
        settings: Config,
        about: dict[str, Any],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._run, self._settings, self._about, self._say, self._warn = run, settings.tracking, about, say, warn
        self._best = settings.evaluation.best
        self._items: queue.Queue[dict[str, Any] | Pictures | Literal["preempting", "end"]] = queue.Queue(WAITING)
        self._ready, self._given_up = threading.Event(), threading.Event()
        self._left_out = False
        self._dropped = 0
        self._allowed, self._asked = float(AT_ONCE), time.monotonic()
        self._late: dict[str, Any] | None = None
        """The newest row that came too soon; it stands for those before it."""
        self._code = 0
        self._doing = "start"
        self._next_probe = 0.0
        self._folder = run.wandb
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)

    def start(self) -> None:
        """Returns when W&B is ready or has failed; after START_S + GRACE_S in any case."""
        try:
            # Here and not in the thread: loaders are forked later, and a module half imported would lock theirs.
            import wandb  # noqa: F401
        except Exception as error:  # a broken installation raises anything
            self._fail(error)
            return
        self._thread.start()
        if not self._ready.wait(START_S + GRACE_S):
            self._warn(
                f"W&B has not started within {START_S + GRACE_S:.0f} s: the training goes on, its rows wait in memory"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Hand over a row; dropped where W&B is left out, where too many wait, and where rows come too fast for it."""
        now = time.monotonic()
        self._allowed, self._asked = min(AT_ONCE, self._allowed + (now - self._asked) / EVERY_S), now
        if "val/loss" in row:  # each of them counts, and the row of its step
            self._give_late()
        elif self._allowed < 1:
            self._late = row
            return
        self._allowed -= 1
        self._late = None
        self._give(row)

    def _give_late(self) -> None:
        if self._late is not None:
            self._give(self._late)
            self._late = None

    def _give(self, row: dict[str, Any]) -> None:
        if self._left_out:
            return
        try:
            self._items.put_nowait(row)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._warn(
                    f"W&B has not taken {WAITING} rows: further ones are left out there; {self._run.metrics.name} "
                    "has them all"
                )

    def inputs(self, pictures: Pictures) -> None:
        """Hand over the first pictures of the run; dropped where a row would be."""
        if not self._left_out:
            with contextlib.suppress(queue.Full):
                self._items.put_nowait(pictures)

    def preempting(self) -> None:
        """Mark the run as one that is being preempted."""
        self._urgent("preempting")

    def finish(self, code: int) -> None:
        """End the W&B run with exit code `code`; after a time it is given up, and its service killed."""
        self._code = code
        self._give_late()
        within_s = FINISH_S + GRACE_S if code == rundir.EXIT_DONE else HURRIED_S
        self._urgent("end")
        if self._thread.ident is None:
            return
        self._thread.join(within_s)
        if self._thread.is_alive():
            self._given_up.set()
            if not self._left_out:
                self._left_out = True
                self._warn(
                    f"W&B did not end within {within_s:.0f} s (at its {self._doing}) and is given up{self._rest()}"
                )
            # A stopped or stuck service would also hold up the exit of this process, which waits for it.
            _kill_services()
            self._thread.join(GRACE_S)
        if self._dropped:
            self._warn(f"W&B lacks {self._dropped} rows; {self._run.metrics.name} has them all")

    def _urgent(self, item: Literal["preempting", "end"]) -> None:
        while not self._left_out:
            try:
                self._items.put_nowait(item)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._items.get_nowait()
                    self._dropped += 1

    # ---- in the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            run = self._begin()
            self._ready.set()
            self._doing = "rows"
            while (item := self._items.get()) != "end":
                if item == "preempting":
                    run.mark_preempting()
                elif isinstance(item, dict):
                    run.log(item)
                else:
                    self._log_inputs(run, item)
                self._probe()
            self._doing = "end"
            self._next_probe = 0.0
            self._probe()
            if self._code == rundir.EXIT_DONE:
                self._log_results(run)
            run.finish(exit_code=self._code)
        except Exception as error:  # whatever a tracker raises, training goes on: see the head of this file
            self._fail(error)
        finally:
            self._ready.set()
            self._bury()

    def _fail(self, error: BaseException) -> None:
        told, self._left_out = self._left_out, True
        if told:
            return
        if self._doing == "end" and isinstance(error, TimeoutError):
            self._warn(f"W&B did not take all rows within {FINISH_S:.0f} s of the end{self._rest()}")
            return
        self._warn(f"W&B failed and is left out from here on ({_brief(error)}); {self._run.metrics.name} goes on")

    def _rest(self) -> str:
        """Where rows lie that a server has not taken, and how they get there."""
        if self._folder == self._run.wandb:
            return ""
        if not self._folder.is_relative_to(self._run.wandb):
            return f"; the rest lies elsewhere: wandb sync --include-online {self._folder}"
        return f"; the rest is in the run folder: vitdist sync --include-online {self._run.path}"

    def _bury(self) -> None:
        """Take down W&B's service now: its hook at exit would wait for it without a bound, or print a traceback."""
        import wandb

        if self._left_out:
            _kill_services()
        try:
            wandb.teardown(exit_code=self._code)
        except (Exception, SystemExit) as error:  # it exits with its service's code
            self._fail(error)

    def _begin(self) -> Any:
        """The W&B run: online where that is wanted and works, else offline."""
        import wandb

        wish = self._settings.wandb
        # W&B asks a person at a terminal for a key, and waits for the answer.
        online = wish != "offline" and (
            _has_key(wandb.setup().settings) or (wish == "online" and not sys.stdin.isatty())
        )
        if wish != "offline" and not online:
            self._say(
                f"W&B is kept offline, as there is no API key: `wandb login`, then `vitdist sync {self._run.path}`"
            )
        name = self._run.wandb_id
        if name is None:
            name = secrets.token_hex(4)
            rundir.publish(self._run.wandb / "run-id", name)
        _try_disk(self._run.wandb)
        if online:
            try:
                return self._init("online", name)
            except Exception as error:  # no network, no answer, a wrong key: all of them leave the offline way
                if self._given_up.is_set():
                    raise
                self._warn(
                    f"W&B cannot be reached ({_brief(error)}): kept offline, `vitdist sync {self._run.path}` uploads it"
                )
                with contextlib.suppress(Exception, SystemExit):
                    wandb.teardown()
        return self._init("offline", name)

    def _init(self, mode: Literal["online", "offline"], name: str) -> Any:
        import wandb

        run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            group=self._settings.group,
            job_type="train",
            id=name,
            name=self._run.name,
            dir=self._run.path,
            mode=mode,
            resume="allow",
            config=_public(self._about),
            # Remotes of git and captured output may hold secrets.
            settings=wandb.Settings(
                init_timeout=START_S,
                login_timeout=START_S,
                x_service_wait=SERVICE_S,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=FLUSH_S,
                console="off",
                disable_git=True,
                silent=True,
            ),
        )
        # W&B's own step is shifted when offline parts are joined; ours is the axis.
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step")
        higher = selection.higher_is_better(self._best)
        run.define_metric(f"val/{self._best}", step_metric="train/global_step", summary="max" if higher else "min")
        self._folder = Path(run.dir).parent
        if not self._folder.is_relative_to(self._run.wandb):  # what 0.31 does where it cannot write
            self._warn(f"W&B writes to {self._folder}, not to the run folder")
        return run

    # ---- what is not rows ----------------------------------------------------------------------

    def _log_inputs(self, run: Any, pictures: Pictures) -> None:
        import wandb

        _staged()
        images = [
            wandb.Image(Image.open(io.BytesIO(base64.b64decode(one["jpeg"]))), caption=one["label"], file_type="jpg")
            for one in pictures
        ]
        run.log({"inputs": images, "train/global_step": 0})

    def _log_results(self, run: Any) -> None:
        """What a finished run leaves; what W&B does not take of it is told, and the rest goes on."""
        found = rundir.read_json(self._run.evaluation)
        parts: dict[str, Callable[[], None]] = {}
        if found:
            parts["tables of classes"] = lambda: run.log(_tables(found))
            parts["validation pictures"] = lambda: run.log(_pictures(self._run, found["step"]))
        if "data" in self._settings.artifacts:
            parts["data as artifacts"] = lambda: self._log_data(run)
        if "model" in self._settings.artifacts and self._run.model.exists():
            parts["model as an artifact"] = lambda: self._log_model(run)
        if "code" in self._settings.artifacts and self._run.code.exists():
            parts["code as an artifact"] = lambda: self._log_code(run)
        for what, log in parts.items():
            try:
                log()
            except Exception as error:  # bad files of ours, or whatever W&B raises
                if self._given_up.is_set():
                    raise
                self._warn(f"W&B lacks the {what} ({_brief(error)}); the run folder has it")

    def _log_data(self, run: Any) -> None:
        """Training and validation set, by their digest: the shards stay where they are."""
        import wandb

        for kind, about in self._about.get("data", {}).items():
            if not about.get("digest"):  # of a stream nobody knows what is in it
                continue
            made = wandb.Artifact(f"{kind}-{about['digest'][:12]}", "dataset", metadata=about)
            with made.new_file("data.json") as file:
                json.dump(about, file, indent=1)
            for folder in about["folder"].split(" + "):
                if "://" not in folder:  # of a bucket W&B asks for its provider's library
                    made.add_reference(Path(folder).absolute().as_uri(), checksum=False)
            # What a run reads is `used`; offline W&B knows only of what it writes.
            (run.log_artifact if run.offline else run.use_artifact)(made)

    def _log_model(self, run: Any) -> None:
        import wandb

        model = self._run.model
        files = [file for file in model.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        made = wandb.Artifact(f"{self._run.name}-model", "model", metadata={"bytes": size, "folder": str(model)})
        if size <= UPLOADED:
            for file in files:  # mutable ones W&B would copy to the home folder first
                made.add_file(str(file), name=str(file.relative_to(model)), policy="immutable")
        else:
            made.add_reference(model.as_uri(), checksum=False)
        run.log_artifact(made)

    def _log_code(self, run: Any) -> None:
        run.log_code(str(self._run.code), name="code", include_fn=lambda path: Path(path).suffix in CODE)

    # ---- the disk under it ---------------------------------------------------------------------

    def _probe(self) -> None:
        """Tell of a full disk under W&B, which W&B itself keeps to its debug log."""
        if time.monotonic() < self._next_probe:
            return
        self._next_probe = time.monotonic() + PROBE_EVERY_S
        try:
            _try_disk(self._run.wandb)
        except OSError as error:
            self._next_probe = math.inf  # told once
            self._warn(
                f"W&B may lack rows: its folder cannot be written ({_brief(error)}); {self._run.metrics.name} goes on"
            )


def _tables(found: dict[str, Any]) -> dict[str, Any]:
    """Scores of each class and the confusion matrix, of an evaluation as evaluation.json has it."""
    import wandb

    columns = ("name", "support", "precision", "recall", "f1")
    hardest = sorted(found["per_class"], key=lambda scores: scores["f1"])[:MOST_ROWS]
    rows = [[scores[column] for column in columns] for scores in hardest]
    classes = wandb.Table(columns=["class", *columns[1:]], data=rows)
    names, confusion = found["classes"], found["confusion"]
    pairs = [(i, j, n) for i, line in enumerate(confusion) for j, n in enumerate(line)]
    if len(names) > MATRIX:
        wrong = [(i, j, n) for i, j, n in pairs if i != j and n]
        pairs = sorted(wrong, key=lambda pair: -pair[2])[:MOST_ROWS]
    table = wandb.Table(
        columns=["Actual", "Predicted", "nPredictions"], data=[[names[i], names[j], n] for i, j, n in pairs]
    )
    if len(names) <= MATRIX:
        fields = {name: name for name in table.columns}
        # What wandb.plot.confusion_matrix makes, of counts instead of all samples.
        table = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Confusion matrix"})
    return {"val/classes": classes, "val/confusion": table, "train/global_step": found["step"]}


def _pictures(run: RunDir, step: int) -> dict[str, Any]:
    """Validation pictures with their predictions: some of all, and the worst mistakes. Raises as gallery.seen does."""
    import wandb

    def table(samples: list[gallery.Seen]) -> Any:
        _staged()
        rows = []
        for one in samples:
            picture = Image.open(io.BytesIO(one.stored)).convert("RGB")
            picture.thumbnail((SIDE, SIDE))
            image = wandb.Image(picture, file_type="jpg")
            rows.append([image, one.label, one.predicted, round(one.confidence, 4), one.source])
        return wandb.Table(columns=["picture", "class", "predicted", "confidence", "source"], data=rows)

    shown = {"val/pictures": gallery.spread(run, SHOWN), "val/mistakes": gallery.mistakes(run, SHOWN)}
    return {name: table(samples) for name, samples in shown.items() if samples} | {"train/global_step": step}


def _staged() -> None:
    """W&B lays pictures down in a folder below /tmp that it makes once, when it is imported (0.31): what cleans /tmp
    on a node takes it away in a run of days."""
    with contextlib.suppress(ImportError, AttributeError):
        from wandb.sdk.data_types import _private

        os.makedirs(_private.MEDIA_TMP.name, exist_ok=True)


def _public(value: Any) -> Any:
    """`value` with the passwords and signatures of URLs taken out, in keys too."""
    if isinstance(value, dict):
        return {_public(key): _public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    return storage.shown(value) if isinstance(value, str) else value


def _brief(error: BaseException) -> str:
    """Type and first line of an error."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"


def _try_disk(folder: Path) -> None:
    """Write a few blocks and take them away again. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".room.") as file:
        file.write(bytes(TRIED))
        file.flush()
        os.fsync(file.fileno())


def _kill_services() -> None:
    """Kill the wandb-core processes that this process started."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, UnicodeDecodeError, ValueError, IndexError):
            continue  # it ended meanwhile, or has a name that is no text


def _has_key(settings: Any) -> bool:
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        return netrc.netrc().authenticators(urlparse(settings.base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
