"""The floor plan of docs/architecture.md, held: who may import whom, what stays free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("vitdist/**/*.py")])
# One file for each big library (two where a second job needs it); everything else goes through that file.
OWNERS = {
    "deepspeed": {"vitdist/engine.py"},
    "transformers": {"vitdist/model.py", "vitdist/export.py"},
    "peft": {"vitdist/model.py"},
    "timm": {"vitdist/data/colour.py", "vitdist/optim.py"},
    "psutil": {"vitdist/system.py"},
    "wandb": {"vitdist/mirror.py", "vitdist/upload.py", "vitdist/report/wandb_report.py"},
    "wandb_workspaces": {"vitdist/report/wandb_report.py"},
    "tensorboard": {"vitdist/board.py"},
    "webdataset": {"vitdist/data/pack.py", "vitdist/data/reader.py", "vitdist/data/stream.py"},
    "fsspec": {"vitdist/data/storage.py"},
    "urllib3": {"vitdist/data/storage.py"},
    "submitit": {"launch/submit.py", "launch/cluster.py", "launch/job.py"},
    "vl_convert": {"vitdist/report/charts.py", "vitdist/data/stats_page.py"},
}
ENVIRONMENT = {
    *("launch/submit.py", "launch/jobs.py", "launch/job.py", "launch/epilogue.py"),
    *("vitdist/cli.py", "vitdist/dist.py", "vitdist/train.py", "vitdist/nodecheck.py"),
}
HEAVY = {"torch", "deepspeed", "transformers", "webdataset", "wandb"}
TORCH_FREE = [
    "launch.submit",
    "launch.jobs",
    "launch.job",
    "launch.preflight",
    "launch.probe",
    "vitdist.train",
    "vitdist.session",
    "vitdist.config",
    "vitdist.rundir",
    "vitdist.stop",
    "vitdist.ledger",
    "vitdist.faults",
    "vitdist.watchdog",
    "vitdist.changes",
    "vitdist.shapes",
    "vitdist.memory",
    "vitdist.cost",
    "vitdist.plan",
    "vitdist.manifest",
    "vitdist.console",
    "vitdist.cli",
    "vitdist.sync",
    "vitdist.upload",
    "vitdist.report.page",
    "vitdist.report.forms",
    "vitdist.results",
    "vitdist.scores",
    "vitdist.selection",
    "vitdist.decision",
    "vitdist.data.index",
    "vitdist.data.order",
    "vitdist.data.storage",
    "vitdist.data.verify",
    "vitdist.data.stats",
    "vitdist.data.reshard",
    "vitdist.data.browse",
    "vitdist.data.sources",
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    return name(path)[: -len(".py")].replace("/", ".").removesuffix(".__init__")


def imports(path: Path, typing_too: bool = True) -> set[str]:
    """Modules that a file imports anywhere in it; those for type checkers alone can be left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out: set[ast.AST] = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                left_out |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_big_libraries_have_one_room(path: Path) -> None:
    tops = {found.split(".")[0] for found in imports(path)}
    for library, owners in OWNERS.items():
        assert library not in tops or name(path) in owners, f"{library} belongs in {owners}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_halves_meet_at_the_run_folder(path: Path) -> None:
    found = imports(path)
    if name(path).startswith("vitdist/"):
        assert not any(m.split(".")[0] == "launch" for m in found)
    else:
        ours = {m for m in found if m.startswith("vitdist.")}
        allowed = (
            "vitdist.config",
            "vitdist.rundir",
            "vitdist.console",
            "vitdist.faults",
            "vitdist.changes",
            "vitdist.cost",
            "vitdist.manifest",
            "vitdist.memory",
            "vitdist.shapes",
            "vitdist.data.index",
        )
        assert all(m.startswith(allowed) for m in ours), ours
        assert not any(m.split(".")[0] == "torch" for m in found)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_few_files_read_the_environment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert name(path) in ENVIRONMENT or not any(word in text for word in ("os.environ", "os.getenv", "sys.argv")), (
        "pass it in instead"
    )


@pytest.mark.parametrize("start", TORCH_FREE)
def test_login_node_rooms_load_no_torch(start: str) -> None:
    code = f"import {start}, sys; print({HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_no_room_imports_in_a_circle() -> None:
    ours = {module(path): set(imports(path, typing_too=False)) for path in FILES}
    arrows = {m: {n for n in found if n in ours and n != m} for m, found in ours.items()}
    while True:
        grounded = {m for m, to in arrows.items() if not to}
        if not grounded:
            break
        arrows = {m: to - grounded for m, to in arrows.items() if m not in grounded}
    assert not arrows, f"circle among {sorted(arrows)}"


def test_only_the_trainer_knows_the_rooms() -> None:
    """Hub and spokes: a room of vitdist/ imports the ground floor, its own folder, and few others by name."""
    ground = {"vitdist", "vitdist.config", "vitdist.rundir", "vitdist.stop", "vitdist.console", "vitdist.dist"}
    rooms_of_data = {m for m in map(module, FILES) if m.startswith("vitdist.data")}
    lawful = {
        # The trainer's own: what its chapters share, and what comes before its loop.
        "vitdist.session": {"vitdist.watchdog", *rooms_of_data},
        "vitdist.assembly": {
            *(
                f"vitdist.{room}"
                for room in ("checkpoint", "decision", "engine", "faults", "history", "inputs", "ledger")
            ),
            *(f"vitdist.{room}" for room in ("loss", "manifest", "metrics", "model", "optim", "selection", "session")),
            *(f"vitdist.{room}" for room in ("spikes", "system", "tracking")),
            *rooms_of_data,
        },
        "vitdist.introduction": {
            *(f"vitdist.{room}" for room in ("changes", "checkpoint", "model", "session")),
            *rooms_of_data,
        },
        "vitdist.decision": {"vitdist.scores"},
        "vitdist.evaluate": {"vitdist.scores", "vitdist.decision"},
        "vitdist.results": {"vitdist.scores"},
        # The card has the words of results, and hides the secrets of URLs.
        "vitdist.export": {"vitdist.results", "vitdist.data", "vitdist.data.storage"},
        # The second hub: what train.py is to a run, this is to a finished model.
        "vitdist.inference": {
            *(f"vitdist.{room}" for room in ("decision", "evaluate", "export", "model", "results", "weights")),
            *rooms_of_data,
        },
        "vitdist.model": {"vitdist.weights", "vitdist.drop_path"},
        "vitdist.tracking": {"vitdist.mirror", "vitdist.board"},
        # Hides the secrets of URLs.
        "vitdist.mirror": {"vitdist.gallery", "vitdist.selection", "vitdist.data", "vitdist.data.storage"},
        "vitdist.gallery": {"vitdist.data", "vitdist.data.index"},
        "vitdist.watchdog": {"vitdist.faults"},
        "vitdist.checkpoint": {"vitdist.manifest"},
        "vitdist.memory": {"vitdist.shapes"},
        "vitdist.cost": {"vitdist.memory", "vitdist.shapes"},
        "vitdist.plan": {f"vitdist.{room}" for room in ("cost", "memory", "model", "optim", "shapes")},
        "vitdist.report.facts": {
            "vitdist.data",
            "vitdist.data.index",
            "vitdist.faults",
            "vitdist.gallery",
            "vitdist.history",
            "vitdist.ledger",
        },
        "vitdist.report.page": {"vitdist.gallery", "vitdist.results"},  # pictures of the worst mistakes
        # storage hides the secrets of URLs
        "vitdist.report.words": {"vitdist.data", "vitdist.data.storage", "vitdist.history"},
        "vitdist.report.charts": {"vitdist.results", "vitdist.selection"},
        "vitdist.report.markdown": {"vitdist.results"},
        "vitdist.report.compare": {"vitdist.results", "vitdist.scores", "vitdist.selection"},
        "vitdist.report.wandb_report": {"vitdist.results", "vitdist.selection"},
        "vitdist.sync": {"vitdist.upload", "vitdist.report", "vitdist.report.folders"},
        "vitdist.cli": {
            *(f"vitdist.{room}" for room in ("cost", "inference", "manifest", "plan", "results", "selection", "sync")),
            *(m for m in map(module, FILES) if m.startswith(("vitdist.data", "vitdist.report"))),
        },
    }
    ours = {module(path) for path in FILES}
    for path in FILES:
        mine = module(path)
        if not mine.startswith("vitdist.") or mine == "vitdist.train":
            continue
        rooms = {m for m in imports(path, typing_too=False) if m in ours} - ground - lawful.get(mine, set())
        for folder in ("vitdist.data", "vitdist.report"):
            if mine.startswith(f"{folder}."):
                rooms = {m for m in rooms if not m.startswith(folder)}
        assert not rooms, f"{mine} reaches into {sorted(rooms)}"


def test_no_drawers_for_everything() -> None:
    assert not [name(path) for path in FILES if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_every_file_says_what_it_is() -> None:
    silent = [
        name(path) for path in FILES if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent
