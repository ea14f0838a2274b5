"""Messages of the library as a command prints them."""

from __future__ import annotations

import time

import pytest

from hsat.cli.failures import as_typed, explain_failure
from hsat.data import BadPatch


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("pass mixed='drop_minority'", "pass --data.mixed drop_minority"),
        ("call read_folders (layout='folders')", "give --data.layout folders"),
        (
            "call read_class_folders with split_folders=True (layout='classes') or stop",
            "give --data.layout classes with --data.split_folders true or stop",
        ),
        ("(layout='classes') without split_folders", "(layout='classes') without --data.split_folders"),
        (
            "call read_class_folders('/a (b)', patient='^[^/]+/([^/]+)/') and give the Cohort that it returns; else",
            "give --data.layout classes --data.patient '^[^/]+/([^/]+)/'; else",
        ),
        (
            "call read_csv('d', 't.csv', columns={'class': 'y', 'slide': 'w'}, path_template='{w}/*.png').",
            "give --data.layout csv --data.manifest t.csv --data.columns class=y,slide=w"
            " --data.path_template '{w}/*.png'.",
        ),
        ("say columns={'path': 'file'}", "say --data.columns path=file"),
        (
            "or read_csv with columns={...} (layout='csv')",
            "or give --data.layout csv with --data.columns class=COLUMN,patient=COLUMN",
        ),
        ("rename_splits(cohort, {'train': 'A'})", "--data.splits train=A"),
        ("pass input_size=224 to resize inside", "give --model.input_size 224 to resize inside"),
        ("build_encoder(..., image_size=...)", "--model.image_size SIZE"),
        ("read_csv(root, and nothing closes it", "read_csv(root, and nothing closes it"),
    ],
)  # fmt: skip
def test_calls_become_options(said, typed):
    assert as_typed(said) == typed


@pytest.mark.parametrize(
    "name",
    [
        "read_csv(" + 2900 * "-" + "1)",
        "read_csv(" + 2900 * ")",
        "columns={" + 2900 * "-" + "1}",
        "read_csv(1, columns=0x" + 2900 * "f" + ")",
        "read_" * 590,
        "read_" * 100_000,
    ],
)
def test_names_in_a_message_do_no_harm(name):
    begun = time.process_time()
    assert as_typed(f"patient {name} is refused").startswith("patient ")
    assert time.process_time() - begun < 1


def test_bad_files_are_listed_by_check():
    message = explain_failure(BadPatch("a.png", "the file is empty"))
    assert message == "cannot read patch 'a.png': the file is empty; hsat check DATA lists all bad files"
    assert explain_failure(ValueError("pass kind='rgb'")) == "pass --data.kind rgb"
    assert explain_failure(KeyError("x")) is None
