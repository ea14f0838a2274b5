"""Tables from arrays of another program, and parts of tables: ids by name, refused values with their row, slices."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from hsat.eval.flags import bank_flags
from hsat.types import EmbeddingTable
from hsat.types.columns import id_of_name

Z = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.5, 0.5]])
LABELS = ["tumour", "normal", "tumour", "normal"]
PATIENTS = ["004", "004", "011", "015"]


def table(z=Z, labels=LABELS, patients=PATIENTS, slides=None, **options):
    return EmbeddingTable.from_arrays(z, labels, patients, slides, **options)


def test_rows_become_unit_rows_that_know_their_lengths():
    for z in (Z, Z.tolist(), torch.tensor(Z, requires_grad=True), torch.tensor(Z).bfloat16(), Z.astype(np.float16)):
        one = table(z)
        np.testing.assert_allclose(one.raw(), Z, atol=1e-2)
        np.testing.assert_allclose(np.linalg.norm(one.z, axis=1), 1, atol=1e-6)
    unit = table(table().z)
    assert unit.norm is None, "unit rows do not say how long they were"
    np.testing.assert_allclose(table(unit.z, norm=[2.0, 1.0, 1.0, 3.0]).norm, [2, 1, 1, 3])
    big_endian = Z.astype(">f4")
    np.testing.assert_array_equal(table(big_endian).z, table(Z.astype(np.float32)).z)


def test_a_memory_mapped_array_is_not_taken_for_unit_rows(tmp_path):
    np.save(tmp_path / "z.npy", Z.astype(np.float32))
    np.testing.assert_allclose(table(np.load(tmp_path / "z.npy", mmap_mode="r")).norm, np.linalg.norm(Z, axis=1))


def test_classes_are_sorted_or_as_they_are_given():
    assert (table().class_names, table().label.tolist()) == (("normal", "tumour"), [1, 0, 1, 0])
    other = table(class_names=("tumour", "stroma", "normal"))
    assert other.label.tolist() == [0, 2, 0, 2] and other.class_names == ("tumour", "stroma", "normal")
    numbers = table(labels=np.array([10, 2, 10, 2]))
    assert (numbers.class_names, numbers.label.tolist()) == (("2", "10"), [1, 0, 1, 0])
    indices = table(labels=torch.tensor([1, 0, 1, 0]), class_names=("normal", "tumour"))
    assert indices.label.tolist() == [1, 0, 1, 0]
    assert table(labels=[True, False, True, False], class_names=("normal", "tumour")).label.tolist() == [1, 0, 1, 0]
    assert table(labels=[2.0, 1.0, 2.0, 1.0]).class_names == ("1", "2"), "numbers that a program made decimals"
    assert table(labels=[b"a", "b", b"a", "b"]).class_names == ("a", "b")


def test_ids_are_those_of_the_names_in_every_table():
    bank, queries = table(), table(Z + 1, patients=["015", "020", "020", "007"])
    assert len(set(bank.patient.tolist())) == 3 and bank.patient[3] == queries.patient[0]
    assert bank_flags(bank, queries) == ("bank and queries share 1 patients",)
    assert bank_flags(bank, table(Z + 1, patients=["15", "20", "20", "7"])) == (), "'015' is not '15'"
    assert bank_flags(replace(bank, cohort="a"), replace(queries, cohort="b")) == ()
    numbers = table(patients=np.array([4, 4, 11, 15], dtype=np.uint16))
    assert numbers.patient.tolist() == [4, 4, 11, 15] == table(patients=["4", "4", "11", "15"]).patient.tolist()
    assert table(patients=[2**63, 2**63, 1, 2]).patient[0] == id_of_name(str(2**63)) >= 2**62


def test_slides_lie_in_patients():
    one = table(slides=["a", "b", "c", "d"])
    assert len(np.unique(one.slide)) == 4
    np.testing.assert_array_equal(table().slide, table().patient)
    with pytest.raises(
        ValueError, match=r"row 2: slide 's1' belongs to patient '011' here and to '004' in row 0.*011_s1"
    ):
        table(slides=["s1", "s2", "s1", "s3"])
    with pytest.raises(ValueError, match="row 1: slide 7 belongs to patient 5 here and to 4 in row 0"):
        table(patients=[4, 5, 6, 7], slides=[7, 7, 8, 9])


def test_missing_patients_are_said_aloud_and_no_table_shares_the_makeshift_ones():
    with pytest.warns(
        UserWarning, match="every row counts as a slide and a patient.*intervals are too narrow.*patients="
    ):
        bank = table(patients=None)
    with pytest.warns(UserWarning, match="every row counts"):
        queries = table(Z + 1, patients=None)
    assert len(np.unique(bank.patient)) == 4 and bank.cohort == ""
    assert bank_flags(bank, queries) == () == bank_flags(table(), queries)
    with pytest.warns(UserWarning, match="every row counts"):
        both = EmbeddingTable.concat([bank, table(labels=LABELS[::-1], patients=None)])
    assert len(np.unique(both.patient)) == 8, "rows of two tables are different people"
    with pytest.warns(UserWarning, match="every row counts"):
        other_encoder = table(Z[:, ::-1], patients=None)
    np.testing.assert_array_equal(bank.patient, other_encoder.patient)  # the same patches, which can be compared
    with pytest.warns(UserWarning, match="every slide counts as a patient"):
        by_slide = table(patients=None, slides=["a", "a", "b", "c"])
    np.testing.assert_array_equal(by_slide.patient, by_slide.slide)
    known = table(Z + 1, slides=["a", "a", "d", "e"])
    assert bank_flags(known, by_slide) == ("bank and queries share 1 slides",)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": Z[:3]}, ValueError, "3 embeddings but 4 labels; give one per row"),
        ({"labels": np.array(LABELS)[:3]}, ValueError, r"4 embeddings but labels have shape \(3,\)"),
        ({"labels": "tumour"}, TypeError, "labels must be one value per row, got the text 'tumour'"),
        ({"labels": ["a", None, "b", "a"]}, ValueError, "row 1: label is empty"),
        ({"labels": ["a", "NA", "b", ""]}, ValueError, "row 1: label is 'NA'.*2 cells of this column"),
        ({"labels": [1, 2, float("nan"), 1]}, ValueError, "row 2: label is 'nan'"),
        ({"labels": [1, -1, 1, 1]}, ValueError, "row 1: label is -1, which programs write where a value is missing"),
        (
            {"labels": [1, 0, 3, 1], "class_names": ("a", "b")},
            ValueError,
            r"row 2: label is 3, but there are 2 classes",
        ),
        ({"class_names": ("tumour", "stroma")}, ValueError, r"row 1: label is 'normal', which is none of class_names"),
        ({"labels": [0.5, 1, 1, 1]}, TypeError, "row 0: label must be a text or a whole number, got float 0.5"),
        ({"labels": [{}, 1, 1, 1]}, TypeError, "row 0: label must be a text or a whole number, got dict"),
        ({"patients": ["a", "b", float("nan"), "c"]}, ValueError, "row 2: patient is 'nan'"),
        ({"patients": ["a", "b", "None", "c"]}, ValueError, "row 2: patient is 'None'"),
        ({"patients": [1, 2, -1, 3]}, ValueError, "row 2: patient is -1"),
        ({"slides": ["a", " ", "b", "c"]}, ValueError, "row 1: slide is empty"),
        ({"z": np.where(Z == 2, np.nan, Z)}, ValueError, "row 1: the embedding holds NaN or infinity; embed it again"),
        ({"z": np.where(Z > 2, np.inf, Z)}, ValueError, "row 0: the embedding holds NaN or infinity"),
        ({"z": Z * [[1], [0], [1], [0]]}, ValueError, "row 1: the embedding is all zero.*2 of 4 rows"),
        ({"z": Z.astype(complex)}, TypeError, r"got complex numbers of shape \(4, 2\)"),
        ({"z": Z.astype(object)}, TypeError, "real floats.*dtype object"),
        ({"z": Z.astype(int)}, TypeError, r"dtype int64.*astype\('float32'\)"),
        ({"z": [[1.0], [1.0, 2.0]]}, ValueError, "rows of one length"),
        ({"z": Z[None]}, ValueError, r"z must be \(n, d\).*\(1, 4, 2\)"),
        ({"z": Z[:0], "labels": [], "patients": []}, ValueError, "at least one row"),
        ({"z": torch.tensor(Z).to_sparse()}, TypeError, "dense tensor"),
        ({"z": np.ma.masked_less(Z, 1.0)}, TypeError, "masked array"),
    ],
)
def test_what_cannot_be_used_is_named(change, error, message):
    with pytest.raises(error, match=message):
        table(**change)


def test_names_that_look_alike_are_warned_of():
    with pytest.warns(UserWarning, match="patient '004' and patient '4' differ only in case, spaces, leading zeros"):
        table(patients=["004", "4", "011", "015"])
    with pytest.warns(UserWarning, match="class 'Tumour' and class 'tumour' differ only in"):
        table(labels=["Tumour", "normal", "tumour", "normal"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(slides=["a1", "a2", "b1", "c1"])


def test_data_frames_give_their_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"label": LABELS, "case": PATIENTS, "n": [4, 4, 11, 15]}, index=[9, 8, 7, 6])
    one = table(labels=frame["label"].astype("category"), patients=frame["case"].astype("string"))
    np.testing.assert_array_equal(one.patient, table().patient)
    np.testing.assert_array_equal(one.label, table().label)
    assert table(patients=frame["n"]).patient.tolist() == [4, 4, 11, 15]
    frame.loc[7, "n"] = pandas.NA
    with pytest.raises(ValueError, match="row 2: patient is 'nan'"):
        table(patients=frame["n"])


def test_a_part_of_a_table_keeps_everything_else():
    whole = replace(table(slides=["a", "b", "c", "d"], split="val", encoder="UNI"), slide_label=np.array([1, 0, 1, -1]))
    for index in (
        slice(1, 3),
        [1, 2],
        np.array([False, True, True, False]),
        torch.tensor([False, True, True, False]),
        torch.tensor([1, 2]),
        [-3, -2],
    ):
        part = whole[index]
        for name in ("z", "label", "patch", "slide", "patient", "norm", "slide_label"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[1:3])
        assert (part.class_names, part.cohort, part.split, part.encoder) == (
            whole.class_names,
            whole.cohort,
            "val",
            "UNI",
        )
        assert part.patient_label is None
    assert whole[[3, 0, 3]].patch.tolist() == [3, 0, 3] and len(whole[[]]) == 0
    with pytest.raises(IndexError, match="a mask of 3 values for a table of 4 rows"):
        whole[np.array([True, False, True])]
    with pytest.raises(IndexError, match="row 4 of a table of 4 rows"):
        whole[[0, 4]]
    for index in (2, "label", 1.5, np.zeros((2, 2), dtype=int), [0.0, 1.0], None):
        with pytest.raises(TypeError, match="a table takes a slice, a mask"):
            whole[index]
    with pytest.raises(TypeError, match=r"one row is table\[i:i\+1\]"):
        whole[2]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_slice_of_a_mapped_table_stays_on_the_disk(tmp_path, dtype):
    whole = replace(table(), norm=None)
    mapped = EmbeddingTable.load(whole.save(tmp_path / "bank", dtype=dtype), memory_map=True)
    assert isinstance(mapped[1:3].z, np.memmap)
    chosen = mapped[[0, 2]]
    assert not isinstance(chosen.z, np.memmap) and chosen.z.dtype == np.float32 and chosen.norm is None
    np.testing.assert_allclose(chosen.z, whole.z[[0, 2]], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(chosen.z, axis=1), 1, atol=1e-6)


def test_rows_beside_a_zero_row_stay_bit_for_bit():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 7))
    z[3] = 0
    ids = np.arange(50)
    whole = EmbeddingTable(z, ids % 2, ids, ids, ids, ("a", "b"))
    np.testing.assert_array_equal(whole[:].z, whole.z)
    np.testing.assert_array_equal(whole[::2].norm, whole.norm[::2])


def test_tables_are_joined_by_the_names_of_their_classes():
    first = replace(table(split="train"), slide_label=np.array([1, 0, 1, -1]))
    second = replace(
        table(labels=["stroma", "tumour", "stroma", "stroma"], patients=["a", "b", "c", "015"], split="tune"),
        slide_label=np.array([0, 1, -1, 0]),
    )
    both = EmbeddingTable.concat([first, second])
    assert both.class_names == ("normal", "tumour", "stroma") and both.split == "train+tune"
    assert both.label.tolist() == [1, 0, 1, 0, 2, 1, 2, 2]
    assert both.slide_label.tolist() == [1, 0, 1, -1, 2, 1, -1, 2]
    assert both.patient[7] == both.patient[3]
    np.testing.assert_array_equal(both.raw()[4:], second.raw())
    assert EmbeddingTable.concat([first, replace(second, norm=None, slide_label=None)]).slide_label is None
    assert EmbeddingTable.concat([first[:2], first[2:]]).z.tolist() == first.z.tolist()
    with pytest.raises(ValueError, match="table 1 has width 1, and table 0 has width 2"):
        EmbeddingTable.concat([first, table(Z[:, :1] + 1)])
    with pytest.raises(ValueError, match="table 1 is of cohort 'x', and table 0 is of cohort 'named ids'"):
        EmbeddingTable.concat([first, replace(second, cohort="x")])
    with pytest.raises(ValueError, match="table 1 was embedded by 'UNI'"):
        EmbeddingTable.concat([first, replace(second, encoder="UNI")])
    with pytest.raises(ValueError, match="no table is given"):
        EmbeddingTable.concat([])
    with pytest.raises(TypeError, match="table 0 is a str"):
        EmbeddingTable.concat(["bank"])
