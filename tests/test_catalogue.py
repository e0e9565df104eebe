"""docs/when-it-breaks.md against the code: every fault has its row, every row its tests, every quoted text exists.

python -m tests.test_catalogue        # write the tests of each row anew, by the ids in their names
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "when-it-breaks.md"

FAULTS = {"L": 7, "R": 11, "S": 9, "C": 15, "D": 10, "N": 4, "W": 11, "X": 5}
"""Of each group as many: launch, ranks and nodes, signals, checkpoints, data, numerics, W&B, security and clocks."""
IDS = [f"{group}{number}" for group, count in FAULTS.items() for number in range(1, count + 1)]
MOST = 4
"""Tests that are named in a row; the id finds the others."""

_ROW = re.compile(r"^\| (?P<sign>.*?) \| .* \| (?P<id>[A-Z]\d+): (?P<tests>[^|]+) \|$", re.MULTILINE)
_EXCUSES = ("not yet: ", "not run here: ", "to come")


def rows() -> dict[str, tuple[str, str]]:
    """(sign, tests) of each id on the page."""
    found = [(row["id"], row["sign"], row["tests"]) for row in _ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    assert len({name for name, _, _ in found}) == len(found), "an id has two rows"
    return {name: (sign, tests) for name, sign, tests in found}


@functools.cache
def functions() -> dict[str, set[str]]:
    """Every test function under tests/, and the ids in its name."""
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = set(re.findall(r"(?<=_)[A-Z]\d+(?=_|$)", node.name))
    return found


def named(cell: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", cell)


def test_every_fault_has_a_row_in_its_place() -> None:
    assert list(rows()) == IDS


def test_every_row_names_tests_that_exist_or_says_why_not() -> None:
    known = functions()
    for name, (_, cell) in rows().items():
        listed = named(cell)
        assert listed or cell.startswith(_EXCUSES), f"{name}: neither tests nor a reason: {cell}"
        for test in listed:
            assert test in known, f"{name}: there is no {test}; run: python -m tests.test_catalogue"
            assert not known[test] or name in known[test], f"{name}: {test} is of {known[test]}"


def test_ids_in_names_of_tests_are_faults() -> None:
    for test, ids in functions().items():
        assert ids <= set(IDS), test


def test_a_wrong_name_would_be_found() -> None:
    assert named("`test_no_such`, `test_L1_x`; and `more`") == ["test_no_such", "test_L1_x"]
    assert "test_no_such" not in functions()
    assert functions()["test_every_fault_has_a_row_in_its_place"] == set()


def test_quoted_texts_are_in_the_code() -> None:
    """What stands in the first column as code, piece by piece, is somewhere a text of the program."""
    texts = []
    for folder in ("vitdist", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    everything = "\n".join(texts)
    quoted = [(name, text) for name, (sign, _) in rows().items() for text in re.findall(r"`([^`]+)`", sign)]
    pieces = [(name, piece.strip()) for name, text in quoted for piece in text.split("…")]
    missing = [
        (name, piece)
        for name, piece in pieces
        if len(piece) > 8 and not _OF_OTHERS.search(piece) and piece not in everything
    ]
    assert not missing
    assert len(pieces) > 100


# Words of SLURM, of pydantic, of the system and of Python; and names of files.
_OF_OTHERS = re.compile(
    r"^(PENDING|CANCELLED|NODE_FAIL|Restarts=|scontrol: |No space left|ModuleNotFoundError|input should|string should)"
    r"|WORD|attempts/K|\.tmp-"
)


def refresh() -> None:
    """Write the last column anew: tests that carry the id, then those that are named there and carry none."""
    known = functions()

    def cell(row: re.Match[str]) -> str:
        name, old = row["id"], row["tests"]
        own = sorted(test for test, ids in known.items() if name in ids)
        kept = [test for test in named(old) if test in known and not known[test]]
        listed = [f"`{test}`" for test in own[:MOST] + kept]
        more = f" and {len(own) - MOST} more" if len(own) > MOST else ""
        return row[0].replace(f"{name}: {old} |", f"{name}: {', '.join(listed)}{more} |") if listed else row[0]

    PAGE.write_text(_ROW.sub(cell, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    refresh()
