"""Columns that are matched beyond doubt, and the call to write for others."""

from __future__ import annotations

import pytest

from hsat.data.found_tables import FoundTable, find_tables


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
    assert [found.path.name for found in find_tables(tmp_path)] == ["one.csv", "three.csv"]
    assert FoundTable.read(tmp_path / "gone.csv").header == ()
