"""Columns that are matched beyond doubt, and the call to write for others."""

from __future__ import annotations

import os

import pytest

from hsat.data.found_tables import FoundTable, find_tables, read_manifest


@pytest.fixture
def table(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"x")

    def table(text, name="t.csv"):
        (tmp_path / name).write_text(text)
        return FoundTable.read(tmp_path / name)

    return table


@pytest.mark.parametrize(
    ("header", "row", "matched"),
    [
        ("File,Label,x", "{},a,0", {"path": "File", "class": "Label"}),
        ("path,class,Patient ID", "{},a,p", {"path": "path", "class": "class", "patient": "Patient ID"}),
        ("file,path,label", "{},{},a", None),
        ("file,label,class", "{},a,b", None),
        ("file,label,patient,case_id", "{},a,p,q", None),
        ("file,tumor", "{},1", None),
        ("file,label,split", "{},a,testing", {"path": "file", "class": "label", "split": "split"}),
        ("file,label,split", "{},a,3", {"path": "file", "class": "label"}),
    ],
)  # fmt: skip
def test_columns_with_plain_names(table, header, row, matched):
    found = table(f"{header}\n" + "\n".join(row.replace("{}", name) for name in ("1.png", "2.png")) + "\n")
    assert found.match() == matched


def test_a_path_that_leads_nowhere_is_a_doubt(table):
    assert table("file,label\n1.png,a\n3.png,b\n").match() is None
    assert table("file,label\n").match() is None


def test_calls_have_blanks_where_nobody_can_know(table, tmp_path):
    found = table("id,wsi,tumor\n7,w1,1\n8,w2,0\n")
    root = repr(str(tmp_path))
    columns = "columns={'class': 'tumor', 'slide': 'wsi'}"
    assert found.call("img/w1/7.png") == f"read_csv({root}, 't.csv', {columns}, path_template='img/{{wsi}}/{{id}}.png')"
    assert found.call("img/w1/9.png") == f"read_csv({root}, 't.csv', {columns}, path_template='img/{{wsi}}/*.png')"
    assert found.call("img/a.png") == f"read_csv({root}, 't.csv', {columns}, path_template='img/...{{COLUMN}}....png')"
    assert "'class': 'COLUMN'" in table("a,b\n1,2\n").call()
    assert found.describe() == "the table t.csv with the columns id, wsi, tumor"


def test_a_column_of_slides_lists_each_once(table):
    found = table("id,label\ns1,a\ns2,b\n")
    assert found.lists(["s1", "s2"]) == "id" and found.lists(["s1"]) is None
    assert table("id,label\ns1,a\ns2,b\ns1,b\n").lists(["s1", "s2"]) is None


def test_tables_of_a_folder(table, tmp_path):
    table("a,b\n1,2\n", "one.csv")
    table("list\nx\n", "two.csv")
    (tmp_path / "three.csv").write_text("a,b\n1,2\n", encoding="utf-16")
    found, notes = find_tables(tmp_path)
    assert [one.path.name for one in found] == ["one.csv", "three.csv"] and notes == []
    with pytest.raises(FileNotFoundError, match=r"no table at .*gone\.csv"):
        FoundTable.read(tmp_path / "gone.csv")


def test_what_nobody_named_is_passed_over_where_it_is_no_table_of_the_folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(root / "a.csv")
    (root / "b.csv").symlink_to("/dev/zero")
    (tmp_path / "outside.csv").write_text("secret,other\n1,2\n")
    (root / "c.csv").symlink_to("../outside.csv")
    with (root / "d.csv").open("wb") as file:
        file.truncate(65 << 20)
    (root / "e.csv").write_text('a,b\n"1,2\n' + "#" * 140_000)
    (root / "f.csv").write_text("a" * (1 << 20) + ",b\n1,2\n")
    found, notes = find_tables(root)
    assert found == [] and "secret" not in "".join(notes)
    said = ["named pipe", "leads out of", "leads out of", "65 MiB", "before it may be without", "more than 1048576"]
    assert all(f"{name}.csv" in note and text in note for name, text, note in zip("abcdef", said, notes, strict=True))
    found, notes = find_tables(root, allow_links=True)
    assert [one.path.name for one in found] == ["c.csv"] and "a device" in notes[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "names fewer than two columns"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
        (b'"path,class,patient,slide\n1.png,a,p,s\n', "cannot be read as a table: unexpected end of data"),
        (b'path,class,patient,slide\n"1.png,a,p,s\n' + b"#" * 140_000, "cannot be read as a table: field larger"),
    ],
)
def test_a_manifest_that_is_no_table_is_an_error(content, said, tmp_path):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_manifest(tmp_path)
    assert str(tmp_path / "manifest.csv") in str(error.value)


def test_a_manifest_is_a_file_of_the_folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    assert read_manifest(root) is None
    (tmp_path / "m.csv").write_text("path,class\n")
    (root / "manifest.csv").symlink_to("../m.csv")
    with pytest.raises(ValueError, match=r"'manifest\.csv' leads out of"):
        read_manifest(root)
    assert read_manifest(root, allow_links=True).header == ("path", "class")
    (tmp_path / "m.csv").write_text("id,md5\n")
    assert read_manifest(root, allow_links=True) is None
    (root / "manifest.csv").unlink()
    os.mkfifo(root / "manifest.csv")
    with pytest.raises(ValueError, match="named pipe"):
        read_manifest(root)
