"""What lies in a folder."""

from __future__ import annotations

import pytest

from hsat.data.survey import holds_images, layout_hint, list_folders, list_images, survey_folder


@pytest.fixture
def fill(tmp_path):
    def fill(*names):
        for name in names:
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return tmp_path / "root"

    return fill


def test_images_by_depth_and_other_files(fill):
    root = fill("a/1.png", "a/p/2.JPG", "a/p/3.txt", ".hidden/4.png", "__MACOSX/5.png", "6.h5")
    assert survey_folder(root) == ({1: 1, 2: 1}, {".txt": 1, ".h5": 1})
    assert list_folders(root) == ["a"] and list_images(root) == ["a/1.png", "a/p/2.JPG"]
    assert list_images(root, most=1) == [] or len(list_images(root, most=1)) == 1
    assert holds_images(root) and not holds_images(fill("b/c/6.txt") / "b")


def test_links_are_followed_only_when_asked(fill, tmp_path):
    root = fill("a/1.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/2.png").write_bytes(b"x")
    (root / "b").symlink_to(tmp_path / "other")
    assert survey_folder(root)[0] == {1: 1} and survey_folder(root, follow_links=True)[0] == {1: 2}


@pytest.mark.parametrize(
    ("names", "asked", "words", "never"),
    [
        (["1.gif", "a/2.gif"], (), "a format that is not read, 2 ending in '.gif'", "embeddings"),
        (["1.h5"], (), "hsat.EmbeddingTable.from_h5", "format"),
        (["train/a/i/1.png", "test/a/i/1.png"], ("split", "class"), "read_class_folders with patient", "read_folders"),
        (["x/a/i/1.png"], ("split", "class"), "read_folders (layout='folders') without split_folders", "fits all"),
        (["a/1.png"], ("class",), "there are 1 images 1 folders deep; if", "no layout fits"),
        (["a/1.png", "a/b/1.png"], (), "so that no layout of folders fits all", "call read_folders"),
    ],
)
def test_hints(fill, names, asked, words, never):
    hint = layout_hint(fill(*names), asked)
    assert words in hint and never not in hint
