"""The protocol of a save and what a resume takes: failures at every call, damaged, foreign and superseded checkpoints.

Mostly with a few tensors in the place of an engine; test_interrupted.py does it with whole runs.
"""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import interrupt_workers, ranks, workers
from tests.interrupt_workers import State, go_on, identity_of, save_states, writer_of
from vitdist import checkpoint, manifest, model, optim
from vitdist.checkpoint import Fenced, NoCheckpoint, SaveFailed
from vitdist.manifest import Damaged, Identity, Manifest
from vitdist.rundir import RunDir


def saved(path: Path, steps: int = 3) -> RunDir:
    """A run with a checkpoint of each of its steps, the newest two of which are there."""
    path.mkdir()
    save_states(RunDir(path), steps)
    return RunDir(path)


# ---- C1, C2: a save that ends at any call ---------------------------------------------------------------


@pytest.mark.processes
def test_C1_a_save_that_is_killed_at_any_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Each write, half of a write, fsync, rename, removal ... of a save and of the pruning after it, in turn."""
    (result,) = ranks.run(interrupt_workers.killed_at_every_call, 1, str(tmp_path))
    assert {"write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"} <= set(result["calls"])
    assert result["torn"] == []
    # Up to the rename the old one is the newest, from there on the new one.
    steps = result["steps"]
    assert len(steps) >= 20
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


@pytest.mark.processes
def test_C1_after_200_kills_at_random_moments_nothing_that_was_complete_is_lost(tmp_path: Path) -> None:
    (result,) = ranks.run(interrupt_workers.killed_at_random, 1, str(tmp_path), 200)
    assert result["faults"] == []
    assert result["kills"] == 200
    assert result["cut_short"] >= 20, result  # of them in the middle of a save


@pytest.mark.processes
@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
def test_C2_a_call_that_fails_in_a_save_costs_that_save_only(tmp_path: Path, how: str) -> None:
    """Each call in turn: the older ones stay whole, what failed is told, the next save succeeds."""
    (result,) = ranks.run(interrupt_workers.failed_at_every_call, 1, str(tmp_path), how)
    assert result["faults"] == []
    assert result["told"] >= {os.strerror(getattr(errno, how)), None}


@pytest.mark.processes
@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_C2_a_rank_whose_disk_is_full_has_all_give_up_the_save(tmp_path: Path, on_failure: str) -> None:
    first, second = ranks.run(interrupt_workers.one_of_two_fails, 2, str(tmp_path), on_failure)
    assert first == second
    reason = "No space left on device (rank 1)"
    if on_failure == "continue":
        assert first == {"told": [None, reason, None], "raised": None, "kept": [3, 1], "left": []}
    else:
        said = f"the checkpoint of step 2 could not be saved: {reason}"
        assert first == {"told": [None], "raised": said, "kept": [1], "left": []}


# ---- C4, C5, C6, C14: what lies there is not what was written -------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(place: float) -> Callable[[Path], None]:
    """Turns one bit at a relative place: 0 is the first byte, 1 the last."""

    def work(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[round(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return work


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def padded(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


FILES = ["manifest.json", "rank-0.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, a_folder, padded])
def test_C4_a_file_that_is_cut_empty_or_gone_is_passed_over_by_name(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = saved(tmp_path / "run")
    damage(run.checkpoints / "step-00000003" / name)
    if damage is padded and name == "manifest.json":  # which is no JSON any more
        assert manifest.verify(run.checkpoints / "step-00000003")
    state, passed_over = go_on(run)
    assert state.steps == 2
    (said,) = passed_over
    assert said.startswith(f"step-00000003: {name}"), said
    assert "\n" not in said


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.0001, 0.01, 0.3, 0.9, 1.0])
def test_C5_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str, place: float) -> None:
    """In the length, the header, the values; in the manifest too, which holds a digest of itself."""
    run = saved(tmp_path / "run")
    victim = run.checkpoints / "step-00000003" / name
    flip(place)(victim)
    state, passed_over = go_on(run)
    if passed_over:
        assert state.steps == 2
        assert passed_over[0].startswith("step-00000003: ")
    else:  # a blank between two fields became another blank
        assert name == "manifest.json"
        assert state.steps == 3
        folder = victim.parent
        assert manifest.read(folder) == Manifest.model_validate(json.loads((folder / name).read_text()))


@pytest.mark.parametrize(
    "content", [b"", b"step-00000001\n", b"step-99999999\n", b"../other\n", b"/etc/passwd", b"\xff\0", b"x" * 100_000]
)
def test_C6_the_pointer_is_never_followed(tmp_path: Path, content: bytes) -> None:
    """Stale, empty, dangling, out of the folder, no text: a resume looks for itself, and the next save mends it."""
    run = saved(tmp_path / "run")
    shutil.copytree(run.checkpoints / "step-00000002", run.path / "other")
    (run.checkpoints / "latest").write_bytes(content)
    state, passed_over = go_on(run)
    assert (state.steps, passed_over) == (3, [])
    written = writer_of(run, state, attempt=1)
    state.update()
    written.save({})
    written.wait()
    assert (run.checkpoints / "latest").read_text() == "step-00000004\n"


def test_C6_a_pointer_that_is_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "latest").symlink_to(tmp_path / "precious")
    state, _ = go_on(run)
    written = writer_of(run, state, attempt=1)
    state.update()
    written.save({})
    written.wait()
    assert (tmp_path / "precious").read_text() == "mine"
    assert (run.checkpoints / "latest").read_text() == "step-00000004\n"


def test_C4_no_whole_one_ends_the_start_with_every_reason(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    cut(run.checkpoints / "step-00000003" / "rank-0.safetensors")
    (run.checkpoints / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(NoCheckpoint) as raised:
        go_on(run)
    said = str(raised.value)
    assert "step-00000003: rank-0.safetensors has" in said
    assert "step-00000002: manifest.json is missing" in said
    assert "another name" in said


class Evil:
    """What a pickle does when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def signed(run: RunDir, step: int, **changes: Any) -> None:
    """Rewrite a manifest: its files' hashes are those of what lies there, as a stranger can have it too."""
    folder = run.checkpoints / manifest.name_of(step)
    record = json.loads((folder / "manifest.json").read_text())
    for name, told in record["files"].items():
        if (folder / name).is_file():
            told.update(bytes=(folder / name).stat().st_size, sha256=manifest.sha256(folder / name))
    (folder / "manifest.json").write_text(json.dumps(sealed(record | changes)))


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """With the digest that belongs to it, which anybody can compute."""
    return record | {"digest": manifest.own_digest(record)}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_C14_a_pickle_in_the_place_of_a_file_is_not_executed(tmp_path: Path, name: str, how: str) -> None:
    run = saved(tmp_path / "run")
    for step in (2, 3):
        victim = run.checkpoints / manifest.name_of(step) / name
        if how == "pickle":
            victim.write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
        else:
            torch.save({"a": Evil(tmp_path / "executed")}, victim)
        if name != "manifest.json":
            signed(run, step)
    with pytest.raises((NoCheckpoint, Damaged), match=r"safetensors|manifest\.json"):
        go_on(run)
    with pytest.raises(ValueError, match=r"safetensors|manifest\.json|no checkpoint that can be used"):
        checkpoint.weights(checkpoint.newest(run.path))
    assert not (tmp_path / "executed").exists()


def test_C14_torch_and_pickle_files_beside_a_checkpoint_are_not_looked_at(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    folder = run.checkpoints / "step-00000003"
    for name in ("mp_rank_00_model_states.pt", "optimizer.pkl", "rank-1.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    torch.save(Evil(tmp_path / "executed"), run.checkpoints / "step-00000009.pt")
    assert go_on(run)[0].steps == 3
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "stranger", ["../../precious", "/etc/passwd", "rank-0.safetensors/..", "rank-0.safetensors\n", ""]
)
def test_C14_a_manifest_with_names_out_of_its_folder_is_refused(tmp_path: Path, stranger: str) -> None:
    run = saved(tmp_path / "run")
    record = json.loads((run.checkpoints / "step-00000003" / "manifest.json").read_text())
    told = record["files"]["rank-0.safetensors"]
    for files in ({stranger: told}, {"rank-0.safetensors": told, stranger: told}):
        signed(run, 3, files=files)
        state, (said,) = go_on(run)
        assert state.steps == 2
        assert "manifest.json is damaged (files: " in said
        assert "\n" not in said


def header_of(length: int, table: Any, values: int = 64) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length < 0 else length).to_bytes(8, "little") + text + bytes(values)


def one_tensor(offsets: str, shape: tuple[int, ...] = (16,)) -> bytes:
    told = {"dtype": "F32", "shape": shape, "data_offsets": [0, 64]}
    return header_of(-1, {"__metadata__": {"offsets": offsets}, "master/a": told})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x08", header_of(2**63, {}), header_of(10**9, {}), header_of(-1, b"{" * 10_000),
        header_of(-1, {"master/a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}),
        header_of(-1, {"master/a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}),
        *(one_tensor(offsets) for offsets in ("[]", "{", "{}", '{"master/a": -5}', '{"master/a": null}')),
        *(one_tensor(offsets) for offsets in ('{"master/a": 1e400}', "[" * 100_000, '{"master/a": 984}')),
        one_tensor('{"master/a": 0}', shape=(4, 4)),
    ],
)  # fmt: skip
def test_C14_a_strangers_file_is_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    """Its manifest fits, so only what is in the file itself can tell."""
    run = saved(tmp_path / "run")
    (run.checkpoints / "step-00000003" / "rank-0.safetensors").write_bytes(content)
    signed(run, 3)
    state = State()
    with pytest.raises(ValueError, match=r"step-00000003") as raised:
        checkpoint.resume(run, state, interrupt_workers.Alone(), identity_of(state))
    assert len(str(raised.value)) < 1000
    with pytest.raises(ValueError, match=r"is not|not all there"):
        checkpoint.weights(run.checkpoints / "step-00000003")


@settings(deadline=None, max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.data(),
)
@example([], None)
@example("x", None)
@example({"schema": "x"}, None)
@example({"format": []}, None)
def test_C14_no_manifest_breaks_the_look_for_whole_ones(three: RunDir, record: Any, data: Any) -> None:
    """Any JSON, also as one field of a good record: a reason, or whole; never another exception."""
    path = three.checkpoints / "step-00000003" / "manifest.json"
    good = path.read_text()
    if data is not None and data.draw(st.booleans()):
        fields = json.loads(good)
        record = sealed(fields | {data.draw(st.sampled_from(sorted(fields))): record})
    try:
        path.write_text(json.dumps(record))
        told = manifest.verify(path.parent)
        state, passed_over = go_on(three)
    finally:
        path.write_text(good)
    assert state.steps == (2 if told else 3)
    assert passed_over == ([f"step-00000003: {told}"] if told else [])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that is put right again after each example."""
    return saved(tmp_path_factory.mktemp("manifests") / "run")


# ---- C8, C9: what does not belong to the run ---------------------------------------------------------

CLASSES = [f"class {number}" for number in range(20)]


def identity(classes: list[str] = CLASSES, frozen: str | None = None, **changes: Any) -> Identity:
    """Of a tiny ViT; parameters whose name begins with `frozen` are not trained."""
    s = workers.settings(**changes)
    net, _ = model.build(s.model, classes, s.train.seed)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, s.optim, model.layer_name)
    return Identity(
        optimizer=s.optim.name,
        global_batch=16,
        model=model.configuration(net),
        classes=classes,
        data="data",
        groups=checkpoint.layout(groups),
        rest=checkpoint.rest(net),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.scratch.width": 64}, r"projection.weight had the shape \[32, 3, 8, 8\], now \[64, 3, 8, 8\]"),
        ({"model.scratch.depth": 3}, r"vit.layers.2.attention.q_proj.weight is new"),
        ({"model.scratch.depth": 1}, r"vit.layers.1.attention.q_proj.weight was a trained parameter, and is none now"),
        ({"model.scratch.heads": 4}, r"num_attention_heads of the model's configuration was 2, now 4"),
        ({"model.image_size": 32}, r"position_embeddings had the shape \[1, 5, 32\], now \[1, 17, 32\]"),
        ({"classes": CLASSES[:-1]}, r"class 19"),
        ({"classes": [*CLASSES, "twenty-one"]}, r"twenty-one"),
        ({"classes": [*CLASSES[:-1], "renamed"]}, r"class 19.*renamed"),
        ({"classes": [*CLASSES[:10], CLASSES[11], CLASSES[10], *CLASSES[12:]]}, r"class 10.*class 11"),
    ],
)  # fmt: skip
def test_C8_another_model_or_other_classes_are_refused_by_the_first_difference(
    changes: dict[str, Any], said: str
) -> None:
    difference = identity(**changes).first_difference(identity())
    assert difference
    assert re.search(said, difference), difference
    assert "\n" not in difference
    assert len(difference) < 300


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"frozen": "vit.layers.0"}, "vit.layers.0.attention.q_proj.weight was a trained parameter"),
        ({"frozen": "vit.layers.0"}, {}, "vit.layers.0.attention.q_proj.weight is new"),
        ({"frozen": "vit.layers.0"}, {"frozen": "vit.layers.1"}, "vit.layers.1.attention.q_proj.weight was a trained"),
    ],
)  # fmt: skip
def test_C9_what_is_frozen_or_thawed_is_refused_by_name(before: Any, after: Any, said: str) -> None:
    difference = identity(**after).first_difference(identity(**before))
    assert difference
    assert said in difference


@pytest.mark.parametrize("change", ["no_decay", "layer"])
def test_C9_a_parameter_in_another_group_is_refused_by_name(change: str) -> None:
    """As after a change of the rule in the code; DeepSpeed would load the values of other parameters."""
    was = identity()
    groups = {group.name: dict(group.parameters) for group in was.groups}
    source, target, name = {
        "no_decay": ("03_head", "03_head_no_decay", "classifier.weight"),
        "layer": (*[n for n in groups if n.startswith(("01_", "02_")) and "no_decay" not in n],
                  "vit.layers.0.attention.q_proj.weight"),
    }[change]  # fmt: skip
    groups[target][name] = groups[source].pop(name)
    moved = [group.model_copy(update={"parameters": groups[group.name]}) for group in was.groups]
    difference = was.model_copy(update={"groups": moved}).first_difference(was)
    assert difference
    assert f"{name} was in the parameter group {source}, now in {target}" in difference


def test_C9_rates_and_decays_of_groups_may_change() -> None:
    """They are settings, with a rule of their own: changes.py."""
    was = identity()
    for changes in ({"optim.layer_decay": 0.9}, {"optim.weight_decay": 0.2}, {"optim.lr": 1.0}):
        assert identity(**changes).first_difference(was) is None, changes


def test_C9_a_start_with_another_identity_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    state = State()
    other = identity_of(state)
    other = other.model_copy(update={"groups": [other.groups[0].model_copy(update={"parameters": {"b": [1000]}})]})
    with pytest.raises(ValueError, match="a was a trained parameter, and is none now") as raised:
        checkpoint.resume(run, state, interrupt_workers.Alone(), other)
    assert "warm-start" in str(raised.value) or "warm_start" in str(raised.value)
    assert state.steps == 0
    assert state.whole()


# ---- C11, C13, C15, R9: in what order ------------------------------------------------------------------


def test_C11_a_step_that_is_saved_again_after_a_rollback_holds_the_new(tmp_path: Path) -> None:
    """Steps 3 is damaged; the run goes back to 2, and its third step has another result."""
    run = saved(tmp_path / "run")
    cut(run.checkpoints / "step-00000003" / "rank-0.safetensors")
    state, passed_over = go_on(run)
    assert (state.steps, len(passed_over)) == (2, 1)
    written = writer_of(run, state, attempt=1)
    state.update()
    for values in state.pieces().values():
        values.values.add_(0.5)
    written.save({})
    written.wait()
    assert [outcome.fault for outcome in written.news()] == [None]
    assert manifest.steps(run) == [3, 2]
    assert manifest.verify(run.checkpoints / "step-00000003") is None
    assert manifest.read(run.checkpoints / "step-00000003").attempt == 1
    again = State()
    checkpoint.resume(run, again, interrupt_workers.Alone(), identity_of(again))
    assert torch.equal(again.pieces()["master/a"].values, state.pieces()["master/a"].values)
    assert not manifest.left_over(run)


@settings(deadline=None, max_examples=200)
@given(st.sets(st.integers(0, 40)), st.data(), st.integers(2, 5), st.none() | st.integers(0, 40))
def test_C13_what_is_pruned_is_never_needed(steps: set[int], data: Any, keep: int, best: int | None) -> None:
    damaged = data.draw(st.sets(st.sampled_from(sorted(steps)))) if steps else set()
    whole = sorted(steps - damaged)
    gone = manifest.superfluous(whole, sorted(damaged), keep, best)
    left = [step for step in whole if step not in gone]
    assert set(gone) <= steps
    assert len(left) >= min(keep, len(whole))
    assert left[-keep:] == whole[-keep:]
    assert best not in gone or best in damaged
    assert len(left) <= keep + 1
    # A damaged one is taken away only where a newer whole one is left.
    assert all(left and left[-1] > step for step in set(gone) & damaged)


def test_C13_the_only_whole_one_outlives_damaged_newer_ones(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", steps=2)
    cut(run.checkpoints / "step-00000002" / "rank-0.safetensors")
    state, _ = go_on(run)
    assert state.steps == 1
    written = writer_of(run, state, attempt=1)
    kept = []
    for _ in range(3):
        state.update()
        written.save({}, best=1)
        written.wait()
        kept.append(manifest.steps(run))
    assert kept == [[2, 1], [3, 2, 1], [4, 3, 1]]
    assert all(entry.fault is None for entry in manifest.entries(run, thorough=True))


def test_C15_weights_are_taken_of_complete_checkpoints_only(tmp_path: Path) -> None:
    """While a save is in the middle of its file, and where the newest is torn."""
    run = saved(tmp_path / "run")
    state, _ = go_on(run)
    written = writer_of(run, state, attempt=1)
    state.update()
    original, seen = checkpoint.write_file, []

    def look_in_the_middle(path: Path, header: bytes, body: memoryview) -> Any:
        original(path, header, body[: len(body) // 2])
        folder = checkpoint.newest(run.path)
        found, values = checkpoint.weights(folder)
        seen.append((folder.name, found.step, float(values["a"][0])))
        return original(path, header, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_file", look_in_the_middle)
        written.save({})
        written.wait()
    assert seen == [("step-00000003", 3, 3002.0)]  # the average of step 3
    assert checkpoint.newest(run.path).name == "step-00000004"
    cut(run.checkpoints / "step-00000004" / "rank-0.safetensors")
    assert checkpoint.newest(run.path).name == "step-00000003"
    with pytest.raises(Damaged, match="instead of"):
        checkpoint.weights(run.checkpoints / "step-00000004")


def test_R9_a_writer_of_an_older_attempt_publishes_nothing(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    zombie, _ = go_on(run)
    of_zombie = writer_of(run, zombie, attempt=1)
    heir, _ = go_on(run)
    of_heir = writer_of(run, heir, attempt=2)
    zombie.update()
    of_zombie.save({})
    with pytest.raises(Fenced, match=r"attempt 2 of .* has taken over while attempt 1 still ran"):
        of_zombie.wait()
    assert manifest.steps(run) == [3, 2]
    assert not manifest.left_over(run)
    heir.update()
    of_heir.save({})
    of_heir.wait()
    assert [outcome.fault for outcome in of_heir.news()] == [None]
    assert manifest.read(run.checkpoints / "step-00000004").attempt == 2


def test_R9_a_writer_of_an_older_attempt_takes_nothing_away(tmp_path: Path) -> None:
    """It has saved its step, so that there is nothing to write, and does not know the best one of its heir."""
    run = saved(tmp_path / "run")
    zombie, _ = go_on(run)
    of_zombie = writer_of(run, zombie, attempt=1)
    zombie.update()
    of_zombie.save({}, best=4)
    of_zombie.wait()
    heir, _ = go_on(run)
    of_heir = writer_of(run, heir, attempt=2)
    for _ in range(3):
        heir.update()
        of_heir.save({}, best=4)
        of_heir.wait()
    assert manifest.steps(run) == [7, 6, 4]
    of_zombie.save({}, best=None)
    assert manifest.steps(run) == [7, 6, 4]


@pytest.mark.parametrize(("name", "what"), [(FILES[0], "pipe"), (FILES[1], "pipe"), (FILES[1], "endless")])
def test_C14_what_is_no_file_is_not_read(tmp_path: Path, name: str, what: str) -> None:
    """A pipe would wait for ever, and /dev/zero, which has 0 bytes by its size, never ends."""
    run = saved(tmp_path / "run")
    victim = run.checkpoints / "step-00000003" / name
    record = json.loads((run.checkpoints / "step-00000003" / "manifest.json").read_text())
    record["files"]["rank-0.safetensors"]["bytes"] = 0
    (run.checkpoints / "step-00000003" / "manifest.json").write_text(json.dumps(sealed(record)))
    victim.unlink()
    if what == "pipe":
        os.mkfifo(victim)
    else:
        victim.symlink_to("/dev/zero")
    code = interrupt_workers.in_fork(lambda: check_passed_over(run), bound_s=20)
    assert code == 0


def check_passed_over(run: RunDir) -> None:
    state, passed_over = go_on(run)
    assert (state.steps, len(passed_over)) == (2, 1)


def test_R9_a_writer_that_is_overtaken_in_its_save_publishes_nothing(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    zombie, _ = go_on(run)
    of_zombie = writer_of(run, zombie, attempt=1)
    zombie.update()
    original = checkpoint.write_file

    def overtaken(path: Path, header: bytes, body: memoryview) -> Any:
        result = original(path, header, body)
        writer_of(run, State(), attempt=2)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_file", overtaken)
        of_zombie.save({})
        with pytest.raises(Fenced):
            of_zombie.wait()
    assert go_on(run)[0].steps == 3


def test_C3_a_failed_save_is_told_and_ends_the_run_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run")
    state, _ = go_on(run)
    written = writer_of(run, state, attempt=1, on_failure="stop")
    state.update()

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_file", full)
    written.save({})
    with pytest.raises(SaveFailed, match=r"step 4 could not be saved: No space left on device \(rank 0\)"):
        written.wait()
    monkeypatch.undo()
    assert go_on(run)[0].steps == 3


def test_C3_a_run_that_ends_for_a_failed_save_tries_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path / "run")
    state, _ = go_on(run)
    written = writer_of(run, state, attempt=1, on_failure="stop")

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_file", full)
    state.update()
    assert not written.must_stop
    written.save({})
    written.close()
    assert written.must_stop
    assert written.news() == []
    monkeypatch.undo()
    state.update()
    with pytest.raises(SaveFailed, match=r"step 4 could not .*; that of step 5, where the run ends, is saved"):
        written.save({})
    assert go_on(run)[0].steps == 5


def test_C4_a_folder_that_cannot_be_looked_at_is_passed_over(tmp_path: Path) -> None:
    """What a bad moment of shared storage says of one old checkpoint ends no save and no resume."""
    run = saved(tmp_path / "run")
    odd = run.checkpoints / manifest.name_of(9)
    odd.symlink_to("x" * 300)  # every look at it is refused: File name too long
    state, _ = go_on(run)
    assert state.steps == 3
    written = writer_of(run, state, attempt=1)
    state.update()
    written.save({})
    written.wait()
    assert [outcome.fault for outcome in written.news()] == [None]
    assert "it cannot be read (File name too long)" in str([entry.fault for entry in manifest.entries(run, True)])


@pytest.mark.parametrize("left", [b"3f\xe1a9c01", b"", b"../../x"])
def test_W6_a_damaged_name_of_the_wandb_run_ends_no_save(tmp_path: Path, left: bytes) -> None:
    run = saved(tmp_path / "run")
    run.wandb.mkdir(exist_ok=True)
    (run.wandb / "run-id").write_bytes(left)
    state, _ = go_on(run)
    written = writer_of(run, state, attempt=1)
    state.update()
    written.save({})
    written.wait()
    assert manifest.read(run.checkpoints / manifest.name_of(4)).wandb is None


def test_a_strangers_manifest_of_a_billion_ranks_costs_no_memory(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    path = run.checkpoints / manifest.name_of(3) / "manifest.json"
    record = json.loads(path.read_text())
    record["world"] = 10**12
    record["digest"] = manifest.own_digest(record)
    path.write_text(json.dumps(record))
    with pytest.raises(manifest.Damaged, match=r"files: 1 for 1,000,000,000,000 ranks"):
        manifest.read(path.parent)
