"""What there is to pack, and how it is split. python -m pytest tests/vitdist/data/test_sources.py"""

import io
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from vitdist.data import sources, split
from vitdist.data.files import Picture
from vitdist.data.sources import DataSet, Options


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str = b"picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def listed(data: DataSet) -> dict[str, dict[str, tuple[str, str]]]:
    """Split -> source -> class name, group"""
    return {
        name: {os.fsdecode(p.source): (data.classes[p.label], p.group) for p in part.pictures}
        for name, part in data.parts.items()
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a1.jpg", "a2.png", "deep/b1.tif", "deep/b2.jpg"):
        put(tmp_path / "photos" / name)
    return tmp_path / "photos"


TABLE = "file,label\na1.jpg,cat\na2.png,dog\ndeep/b1.tif,cat\ndeep/b2.jpg,dog\n"
EXPECTED = {"a1.jpg": ("cat", ""), "a2.png": ("dog", ""), "deep/b1.tif": ("cat", ""), "deep/b2.jpg": ("dog", "")}


def records(text: str) -> list[dict[str, str]]:
    header, *rows = (line.split(",") for line in text.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "semicolons", "bom"])
def test_tables_of_paths(photos: Path, form: str) -> None:
    path = photos / f"table.{form if form in ('csv', 'tsv', 'jsonl', 'parquet') else 'csv'}"
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(records(TABLE)), path)
    elif form == "jsonl":
        put(path, "".join(json.dumps(record) + "\n" for record in records(TABLE)))
    else:
        text = TABLE.replace(",", {"tsv": "\t", "semicolons": ";"}.get(form, ","))
        put(path, "\ufeff" * (form == "bom") + text)
    assert listed(sources.read(path)) == {"train": EXPECTED}


def test_columns_root_and_splits_can_be_told(photos: Path, tmp_path: Path) -> None:
    rows = "who,file,species,label,part\n007,a1.jpg,cat,1,train\n7,a2.png,dog,0,Training\n007,deep/b1.tif,cat,1,dev\n"
    table = put(tmp_path / "elsewhere" / "table.csv", rows.replace("1,dev", "1,train") + "x,deep/b2.jpg,dog,1,dev\n")
    options = Options(photos, None, "species", "part", None, "who")
    assert listed(sources.read(table, options)) == {
        "train": {"a1.jpg": ("cat", "007"), "a2.png": ("dog", "7"), "deep/b1.tif": ("cat", "007")},
        "val": {"deep/b2.jpg": ("dog", "x")},
    }
    table.write_text("file,label,split\na1.jpg,0,train\na2.png,1,fold 3\n")
    with pytest.raises(ValueError, match=r"row 3: the split 'fold 3' in column 'split' is none of train, val, test"):
        sources.read(table, Options(photos))
    assert list(sources.read(table, Options(photos, split_column="none")).parts) == ["train"]


def test_paths_without_extension_are_found_by_stem(photos: Path) -> None:
    table = put(photos / "t.csv", "image_id,dx\na1,x\nb1,y\ndeep/b2,y\n")
    assert listed(sources.read(table))["train"].keys() == {"a1.jpg", "deep/b1.tif", "deep/b2.jpg"}
    put(photos / "again/b1.png")
    with pytest.raises(ValueError, match=r"t\.csv row 3: 'b1' is both again/b1\.png and deep/b1\.tif: write its path"):
        sources.read(table)


def test_whole_numbers_are_class_numbers(photos: Path, tmp_path: Path) -> None:
    table = put(photos / "t.csv", "path,label\na1.jpg,1\na2.png,0.0\ndeep/b2.jpg,2\n")
    assert {k: v for k, (v, _) in listed(sources.read(table))["train"].items()} == {
        "a1.jpg": "class 1",
        "a2.png": "class 0",
        "deep/b2.jpg": "class 2",
    }
    names = put(tmp_path / "names.txt", "zebra\nape\nbee\n")
    assert listed(sources.read(table, Options(classes=names)))["train"]["a1.jpg"] == ("ape", "")
    table.write_text("path,label\na1.jpg,07\na2.png,7\n")  # not numbers: 07 is not how one writes 7
    assert sources.read(table).classes == ["07", "7"]
    table.write_text("path,label\na1.jpg,10\na2.png,20\n")
    assert sources.read(table, Options(classes=put(names, "20\n10\n"))).classes == ["20", "10"]


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ("path,label\n", {}, "t.csv: no rows"),
        ("", {}, "t.csv: Empty CSV file"),
        ("path,label\na1.jpg,x\na2.png,x\n", {}, "a single class, 'x': give a column with more, --label-column"),
        ("path,label\na1.jpg,x\n./a1.jpg,y\n", {}, "t.csv row 3 names a1.jpg again, after {t} row 2: keep one row"),
        ("path,label\na1.jpg,x\na2.png,\n,y\n", {}, "t.csv row 3 has no label in column 'label': fill it in"),
        ("path,label\na1.jpg,NaN\na2.png,\n", {}, "row 2 has no label in column 'label', nor have 1 more rows"),
        ("path,label\na1.jpg,x\n,y\n", {}, "row 3 has no path in column 'path'"),
        ("path,label\na1.jpg,0\na2.png,-1\n", {}, "row 3: the label -1: class numbers start at 0"),
        ("path,label\na1.jpg,0\na2.png,2\n", {}, "labels up to 2, but no training picture has 1: count from 0"),
        (
            "path,label\na1.jpg,0\na2.png,2\n",
            {"classes": True},
            "row 3: the label 2 is out of range: --classes names 2",
        ),
        ("path,label\na1.jpg,ape\na2.png,cow\n", {"classes": True}, "row 3: the class 'cow' is not in --classes"),
        (
            "path,label\na1.jpg,x\nno.jpg,y\nb2.jpg,y\n",
            {},
            "row 3: no picture no.jpg in {root}, and 1 more are missing",
        ),
        ("path,label\na1.jpg,x\nb2.jpg,y\n", {}, "there is deep/b2.jpg: use --root {root}/deep"),
        ("path,label\na1.jpg,x\na1,y\n", {}, "row 3 names a1.jpg again"),
        ("path,label,split\na1.jpg,x,train\na2.png,y,val\n", {}, "row 3: the class 'y' is in val, but no training"),
        ("path,label,split\na1.jpg,x,val\na2.png,y,val\n", {}, "no training pictures, only val"),
        (
            "where,label\na1.jpg,x\n",
            {},
            "which column has the pictures' paths? Say so with --image-column: where, label",
        ),
        ("path,y\na1.jpg,x\n", {}, "which column has the labels? Say so with --label-column: path, y"),
        ("path,label,target\na1.jpg,x,x\n", {}, "the labels could be in 'label' or 'target': say which with --label"),
        ("path,label\na1.jpg,x\n", {"label_column": "dx"}, "t.csv has no column 'dx', but path, label"),
        ("path,label\na1.jpg,x\n", {"group_by": "who"}, "t.csv has no column 'who', but path, label"),
        ("path,label,who\na1.jpg,x,1\na2.png,y,\n", {"group_by": "who"}, "row 3 has no group in column 'who'"),
        ("path,path,label\na1.jpg,x,y\n", {}, "two columns are called 'path'"),
        ("path,label\na1.jpg,x,y\n", {}, "t.csv: CSV parse error: Row #2: Expected 2 columns, got 3"),
        (b"path,label\na1.jpg,\xfc\n", {}, "save it as UTF-8"),
        ("path,label\na1.jpg,x\na2.png,y\n", {"root": "nowhere"}, "--root nowhere: no such folder"),
        ('path,label\na1.jpg,"x\ny"\na2.png,y\n', {}, r"a class called 'x\ny': rename it"),
        (
            "path,label,split,who\na1.jpg,x,train,p1\na2.png,y,train,p2\ndeep/b1.tif,x,val,p1\ndeep/b2.jpg,y,test,p2\n",
            {"group_by": "who"},
            "group 'p1' is in train and in val and 1 more: sort each into one split",
        ),
    ],
)
def test_tables_that_are_refused(photos: Path, rows: str | bytes, options: dict[str, str | bool], reason: str) -> None:
    table = put(photos / "t.csv", rows)
    if options.get("classes"):
        options = {"classes": str(put(photos / "names.txt", "ape\nbee\n"))}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        sources.read(table, Options(**options))  # type: ignore[arg-type]
    assert reason.format(t=table, root=photos) in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_other_files_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xlsx: not a table that can be read \(csv, tsv, jsonl, parquet\)"):
        sources.read(put(tmp_path / "a.xlsx"))
    with pytest.raises(ValueError, match=r"a\.parquet: .*Parquet"):
        sources.read(put(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 is not JSON"):
        sources.read(put(tmp_path / "a.jsonl", '{"path": "x"}\n{"path"\n'))


# ---- as `datasets` writes them --------------------------------------------------------------------


def features(names: list[str] | None) -> dict[bytes, bytes]:
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()}


def rows_table(labels: list[int], names: list[str] | None = None, first: int = 0) -> pa.Table:
    images = [{"bytes": png(first + i), "path": f"x/{first + i}.png"} for i in range(len(labels))]
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(features(names))


def test_a_data_set_as_on_the_hub(tmp_path: Path) -> None:
    names = ["no use", "dog", "cat"]
    (tmp_path / "data").mkdir()
    for name, labels in (
        ("train-00000-of-00002", [1, 2]),
        ("train-00001-of-00002", [2, 1]),
        ("validation-00000-of-00001", [1]),
        ("test-00000-of-00001", [-1, -1]),
    ):
        parquet.write_table(rows_table(labels, names), tmp_path / "data" / f"{name}.parquet")
    data = sources.read(tmp_path)
    assert data.classes == ["dog", "cat"]
    assert listed(data) == {
        "train": {
            "data/train-00000-of-00002.parquet/0/0.png": ("dog", ""),
            "data/train-00000-of-00002.parquet/1/1.png": ("cat", ""),
            "data/train-00001-of-00002.parquet/0/0.png": ("cat", ""),
            "data/train-00001-of-00002.parquet/1/1.png": ("dog", ""),
        },
        "val": {"data/validation-00000-of-00001.parquet/0/0.png": ("dog", "")},
    }
    assert "a test set without labels" in data.notes[0]
    parquet.write_table(rows_table([1, 3], names), tmp_path / "data/train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"of-00002\.parquet row 2: the label 3 is out of range: 'label' has 0 to 2"):
        sources.read(tmp_path)


def save_to_disk(folder: Path, table: pa.Table) -> None:
    """What `datasets.Dataset.save_to_disk` of 4.x writes, but for fields that nobody needs to read it."""
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one", rows_table([0, 1, 1], ["a", "b"]))
    assert {v for v, _ in listed(sources.read(tmp_path / "one"))["train"].values()} == {"a", "b"}
    save_to_disk(tmp_path / "two/train", rows_table([0, 1, 1], ["a", "b"]))
    save_to_disk(tmp_path / "two/validation", rows_table([1], ["a", "b"]))
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert {name: len(part) for name, part in listed(sources.read(tmp_path / "two")).items()} == {"train": 3, "val": 1}


def test_an_imagefolder_with_metadata(photos: Path, tmp_path: Path) -> None:
    put(photos / "metadata.csv", TABLE.replace("file,", "file_name,"))
    assert listed(sources.read(photos)) == {"train": EXPECTED}
    for name, split_ in (("a", "train"), ("b", "train"), ("a", "test")):
        put(tmp_path / "parts" / split_ / f"{name}.jpg")
    put(
        tmp_path / "parts/train/metadata.jsonl",
        '{"file_name": "a.jpg", "label": 1}\n{"file_name": "b.jpg", "label": 0}',
    )
    put(tmp_path / "parts/test/metadata.csv", "file_name,label\na.jpg,1\n")
    assert listed(sources.read(tmp_path / "parts")) == {
        "train": {"a.jpg": ("class 1", ""), "b.jpg": ("class 0", "")},
        "test": {"a.jpg": ("class 1", "")},
    }
    # Without a column file_name it is a file like others, beside class folders.
    put(tmp_path / "folders/metadata.csv", "image_id,dx\n")
    for name in ("x", "y"):
        put(tmp_path / "folders" / name / "0.jpg")
    assert sources.read(tmp_path / "folders").classes == ["x", "y"]


# ---- folders --------------------------------------------------------------------------------------


def test_from_inside_the_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(photos / "t.csv", "image_id,dx\na1,x\nb1,y\n")
    put(photos / "flat/0.jpg")
    monkeypatch.chdir(photos)
    assert listed(sources.read("t.csv"))["train"].keys() == {"a1.jpg", "deep/b1.tif"}
    assert listed(sources.read("."))["train"].keys() == {"deep/b1.tif", "deep/b2.jpg", "flat/0.jpg"}


def test_groups_from_names(tmp_path: Path) -> None:
    for name in ("train/x/patient12_1.jpg", "train/y/patient12_2.jpg", "val/x/patient3_1.jpg"):
        put(tmp_path / "photos" / name)
    read = listed(sources.read(tmp_path / "photos", Options(group_by=r"name:(patient\d+)")))
    assert read["train"] == {"x/patient12_1.jpg": ("x", "patient12"), "y/patient12_2.jpg": ("y", "patient12")}
    for group_by, reason in (
        (r"name:patient\d+", "mark the group with parentheses"),
        ("name:(", "no regular expression"),
        ("name:(case)", r"train/x/patient12_1\.jpg: --group-by name:\(case\) finds no group in this path"),
        ("patient", "without columns: --group-by takes the group from the path"),
        ("name:(patient)", "group 'patient' is in train and in val"),
    ):
        with pytest.raises(ValueError, match=reason):
            sources.read(tmp_path / "photos", Options(group_by=group_by))
    with pytest.raises(ValueError, match="not a table: it has no use for 'dx'"):
        sources.read(tmp_path / "photos", Options(label_column="dx"))


def test_links(tmp_path: Path) -> None:
    for name in ("x/0.jpg", "y/0.jpg"):
        put(tmp_path / "photos" / name)
    put(tmp_path / "more/deep/1.jpg")
    (tmp_path / "photos/y/more").symlink_to(tmp_path / "more")
    assert len(listed(sources.read(tmp_path / "photos"))["train"]) == 3
    for target in (tmp_path / "photos", tmp_path / "more", tmp_path / "photos/y"):
        (tmp_path / "more/deep/loop").symlink_to(target)
        with pytest.raises(ValueError, match=r"/loop: a link back to a folder that it lies in: remove the link"):
            sources.read(tmp_path / "photos")
        (tmp_path / "more/deep/loop").unlink()
    (tmp_path / "more/deep/2.jpg").symlink_to("nothing.jpg")
    with pytest.raises(ValueError, match=r"2\.jpg: a link to nothing\.jpg, which is not there"):
        sources.read(tmp_path / "photos")


def test_a_dead_link_among_the_class_folders(tmp_path: Path) -> None:
    for name in ("x/0.jpg", "y/0.jpg"):
        put(tmp_path / "photos" / name)
    (tmp_path / "photos/z").symlink_to("/mnt/old/z")
    with pytest.raises(ValueError, match=r"photos/z: a link to /mnt/old/z, which is not there: mend or remove it"):
        sources.read(tmp_path / "photos")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    for name in ("train/x/0.jpg", "train/y/0.jpg", "val/x/1.jpg", "valid/x/2.jpg"):
        put(tmp_path / "twice" / name)
    with pytest.raises(ValueError, match="both val/ and valid/: leave one"):
        sources.read(tmp_path / "twice")
    put(tmp_path / "flat/0.jpg")
    with pytest.raises(ValueError, match=r"flat/0\.jpg: a picture in no class folder"):
        sources.read(tmp_path / "flat")
    for name in ("a\nb/0.jpg", "c/0.jpg"):
        put(tmp_path / "lines" / name)
    with pytest.raises(ValueError, match=r"a class called 'a\\nb'"):
        sources.read(tmp_path / "lines")


# ---- held out for validation ----------------------------------------------------------------------


def pictures_of(groups: dict[str, Counter[int]]) -> list[Picture]:
    return [
        Picture(f"{group} {label} {i}".encode(), label, 1, 0, group)
        for group, counts in groups.items()
        for label, count in counts.items()
        for i in range(count)
    ]


counts_of_one_class = st.builds(lambda label, count: Counter({label: count}), st.integers(0, 4), st.integers(1, 30))
counts_of_several = st.dictionaries(st.integers(0, 4), st.integers(1, 9), min_size=1, max_size=3).map(Counter)


def assert_whole(train: list[Picture], val: list[Picture]) -> None:
    assert not {p.group for p in train} & {p.group for p in val}
    assert {p.label for p in val} <= {p.label for p in train}


@settings(max_examples=150, deadline=None)
@given(st.lists(counts_of_one_class, min_size=2, max_size=40), st.sampled_from([0.05, 0.1, 0.3, 0.5]), st.randoms())
def test_groups_of_one_class(counts: list[Counter[int]], fraction: float, rng: random.Random) -> None:
    pictures = pictures_of({f"patient {i}": c for i, c in enumerate(counts)})
    owners = Counter(label for c in counts for label in c)
    if max(owners.values()) < 2:
        with pytest.raises(ValueError, match="no class has two groups"):
            split.hold_out(pictures, fraction, True)
        return
    train, val = split.hold_out(pictures, fraction, True)
    assert_whole(train, val)
    assert sorted(train + val) == sorted(pictures)
    assert {p.label for p in val} == {label for label, n in owners.items() if n > 1}
    again = split.hold_out(rng.sample(pictures, len(pictures)), fraction, True)
    assert {p.source for p in again[1]} == {p.source for p in val}


@settings(max_examples=100, deadline=None)
@given(st.lists(counts_of_several, min_size=2, max_size=12), st.sampled_from([0.1, 0.3]))
def test_groups_of_several_classes(counts: list[Counter[int]], fraction: float) -> None:
    pictures = pictures_of({f"patient {i}": c for i, c in enumerate(counts)})
    try:
        train, val = split.hold_out(pictures, fraction, True)
    except ValueError:
        # Only where each group alone would take a whole class from training, or has no class of two groups.
        totals = Counter(p.label for p in pictures)
        owners = Counter(label for c in counts for label in c)
        assert all(any(c[k] == totals[k] for k in c) or all(owners[k] < 2 for k in c) for c in counts)
    else:
        assert_whole(train, val)


def test_shares_come_near_the_fraction() -> None:
    rng = random.Random(0)
    groups = {f"p{i}": Counter({rng.choice((0, 0, 0, 0, 1)): rng.randint(1, 12)}) for i in range(400)}
    pictures = pictures_of(groups)
    _, val = split.hold_out(pictures, 0.15, True)
    for label, count in Counter(p.label for p in pictures).items():
        assert abs(sum(p.label == label for p in val) - 0.15 * count) <= 1
    sizes = Counter(sum(groups[g].values()) for g in {p.group for p in val})
    assert len(sizes) >= 10  # small and large groups, not the largest alone


def test_a_class_that_only_a_pair_of_moves_can_cover() -> None:
    groups = {"g0": Counter({1: 6, 0: 3}), "g1": Counter({2: 4, 0: 3}), "g2": Counter({2: 9})}
    for order in itertools.permutations(groups):
        train, val = split.hold_out(pictures_of({name: groups[name] for name in order}), 0.1, True)
        assert_whole(train, val)
        assert {p.group for p in val} == {"g1"}


def test_a_pipe_named_like_a_picture_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / name / "0.png")
    os.mkfifo(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"a/1\.png: is no file but a pipe"):
        sources.read(tmp_path, Options())


@pytest.mark.parametrize("names", [("training", "Validation", "Test"), ("Train", "valid", "testing")])
def test_splits_in_any_spelling(tmp_path: Path, names: tuple[str, ...]) -> None:
    for part in names:
        for name in "ab":
            put(tmp_path / part / name / "0.png")
    found = sources.read(tmp_path, Options())
    assert (sorted(found.parts), found.classes) == (["test", "train", "val"], ["a", "b"])


def test_a_split_of_another_name_is_no_class(tmp_path: Path) -> None:
    for part in ("train", "extra"):
        for name in "ab":
            put(tmp_path / part / name / "0.png")
    with pytest.raises(ValueError, match="extra/ holds folders of the same names as train/: is it a split"):
        sources.read(tmp_path, Options())


def test_a_part_of_a_data_set_that_is_missing(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"picture", "path": None} for i in range(4)], "label": [0, 1, 0, 1]})
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data/train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet: this part of the data set is not there"):
        sources.read(tmp_path, Options())


def test_doubtful_classes_are_told(tmp_path: Path) -> None:
    for i in range(30):
        put(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{0.5 * i + 0.25}" for i in range(30)]
    (tmp_path / "value.csv").write_text("\n".join(["path,label", *rows]))
    assert any("30 classes for 30 pictures" in note for note in sources.read(tmp_path / "value.csv", Options()).notes)
    rows = [f"{i}.png,{('cat', 'Cat', 'dog')[i % 3]}" for i in range(30)]
    (tmp_path / "case.csv").write_text("\n".join(["path,label", *rows]))
    notes = sources.read(tmp_path / "case.csv", Options()).notes
    assert any("'Cat' and 'cat' differ in their spelling alone" in note for note in notes)
    (tmp_path / "list.jsonl").write_text('{"path": "0.png", "label": ["cat"]}\n{"path": "1.png", "label": ["dog"]}\n')
    with pytest.raises(ValueError, match="a list or record: a picture has one class"):
        sources.read(tmp_path / "list.jsonl", Options())
