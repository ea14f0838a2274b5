"""Files of somebody else: they say what they are, and decide nothing that is fetched, opened or allocated."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hsat.fingerprints import fingerprint_weights
from hsat.models import build_encoder, checkpoint_hash, load_checkpoint, load_encoder, save_encoder

NAME = "test_resnet"
GOOD = {
    "name": NAME,
    "embedding_dim": 8,
    "head": "linear",
    "head_hidden": [],
    "input_size": None,
    "mean": None,
    "std": None,
    "dual_norm": False,
}
TRAINING = {"kind": "srh", "image_size": 300, "patients": ["00ff00ff", "a" * 64]}


@pytest.fixture(scope="module")
def source():
    return build_encoder(NAME, embedding_dim=8, norm="none", seed=1)


@pytest.fixture(scope="module")
def state(source):
    return {key: value.clone() for key, value in source.state_dict().items()}


@pytest.fixture(scope="module")
def written(state, tmp_path_factory):
    """Writes a file whose metadata is this text, over the one before."""
    path = tmp_path_factory.mktemp("any") / "e.safetensors"
    return lambda text: write(path, state, text)


@pytest.fixture(autouse=True)
def no_socket(monkeypatch):
    def refuse(*_args, **_options):
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


def write(path: Path, state, text: str) -> Path:
    save_file(state, path, metadata={"hsat": text})
    return path


def with_encoder(path: Path, state, **changes) -> Path:
    return write(path, state, json.dumps({"step": 3, "encoder": {**GOOD, **changes}}))


def test_files_of_earlier_versions_load(source, state, tmp_path):
    path = with_encoder(tmp_path / "e.safetensors", state)
    encoder = load_encoder(path)
    assert encoder.mean is None
    assert fingerprint_weights(encoder) == fingerprint_weights(source)
    normalised = load_encoder(
        with_encoder(tmp_path / "n.safetensors", state, mean=[0.5], std=[0.25], input_size=[40, 48])
    )
    assert (normalised.mean, normalised.std, normalised.input_size) == ((0.5,), (0.25,), (40, 48))


def test_a_name_with_a_tag_of_timm_loads(tmp_path):
    encoder = build_encoder("test_resnet.r160_in1k", embedding_dim=8, seed=1)
    again = load_encoder(save_encoder(encoder, tmp_path / "e.safetensors"))
    assert fingerprint_weights(again) == fingerprint_weights(encoder)


def test_what_it_was_trained_on_is_read(source, tmp_path):
    path = save_encoder(source, tmp_path / "e.safetensors", metadata={"training": TRAINING, "epoch": 2})
    assert load_encoder(path).weights_report.metadata["training"] == TRAINING


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", "/etc/passwd"),
        ("pretrained", True),
        ("seed", 3),
        ("checkpoint_path", "/dev/zero"),
        ("name", "hf-hub:timm/resnet18.a1_in1k"),
        ("name", "HF-HUB:timm/resnet18.a1_in1k"),
        ("name", "hf_hub:timm/resnet18"),
        ("name", "local-dir:/etc"),
        ("name", "https://example.org/model"),
        ("name", "timm/resnet18"),
        ("name", "../test_resnet"),
        ("name", "test_resnet.hf-hub:timm/resnet18"),
        ("name", "test_resnet.no_such_tag"),
        ("name", "test_resnet\n"),
        ("name", "no_such_model"),
        ("name", "*"),
        ("name", ""),
        ("name", "a" * 10**6),
        ("name", None),
        ("name", ["test_resnet"]),
        ("embedding_dim", 0),
        ("embedding_dim", -1),
        ("embedding_dim", True),
        ("embedding_dim", 8.0),
        ("embedding_dim", "8"),
        ("embedding_dim", 10**9),
        ("head", "cube"),
        ("head", ["mlp"]),
        ("head", 8),
        ("head_hidden", [10**9]),
        ("head_hidden", [8] * 9),
        ("head_hidden", None),
        ("head_hidden", [True]),
        ("head_hidden", "88"),
        ("input_size", 0),
        ("input_size", 10**6),
        ("input_size", [32]),
        ("input_size", [32, 32, 32]),
        ("input_size", [32, 10**6]),
        ("input_size", {"0": 32, "1": 32}),
        ("mean", 0.5),
        ("mean", [100.0]),
        ("mean", []),
        ("mean", [0.0] * 65),
        ("mean", [True]),
        ("mean", ["0.5"]),
        ("std", [0.0]),
        ("std", [-1.0]),
        ("std", [1e300]),
        ("std", [0.5]),  # without mean
        ("dual_norm", 1),
        ("dual_norm", None),
    ],
)
def test_a_key_that_is_unknown_or_out_of_limits_is_named(state, tmp_path, key, value):
    path = with_encoder(tmp_path / "e.safetensors", state, **{key: value})
    for name in (None, NAME):
        with pytest.raises(ValueError, match=rf"encoder\.{key}\b") as caught:
            load_encoder(path, name)
    assert "load_checkpoint(build_encoder(" in str(caught.value)
    assert len(str(caught.value)) < 1000
    target = build_encoder(NAME, embedding_dim=8, norm="none", seed=2)  # and what the error advises works
    assert load_checkpoint(target, path).loaded == len(state)


@pytest.mark.parametrize("key", list(GOOD))
def test_a_key_that_is_missing_is_named(state, tmp_path, key):
    about = {name: value for name, value in GOOD.items() if name != key}
    path = write(tmp_path / "e.safetensors", state, json.dumps({"encoder": about}))
    with pytest.raises(ValueError, match=rf"encoder\.{key} must be given"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({**TRAINING, "weights": "x"}, "training.weights"),
        ({**TRAINING, "kind": 3}, "training.kind"),
        ({**TRAINING, "kind": "a" * 99}, "training.kind"),
        ({**TRAINING, "image_size": 0}, "training.image_size"),
        ({**TRAINING, "image_size": True}, "training.image_size"),
        ({**TRAINING, "patients": "abc"}, "training.patients"),
        ({**TRAINING, "patients": ["Smith, John"]}, "training.patients"),
        ({**TRAINING, "patients": ["00ff00ff"] * 50_001}, "training.patients"),
        ({"kind": "srh"}, "training.image_size"),
        ([], "training"),
    ],
)
def test_training_that_is_not_as_it_must_be_is_named(source, state, tmp_path, training, named):
    path = write(tmp_path / "e.safetensors", state, json.dumps({"encoder": GOOD, "training": training}))
    for read in (load_encoder, lambda path: load_checkpoint(source, path)):
        with pytest.raises(ValueError, match=named.replace(".", r"\.")):
            read(path)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        save_encoder(source, tmp_path / "new.safetensors", metadata={"training": training})
    assert not (tmp_path / "new.safetensors").exists()


def test_the_rebuilding_part_is_not_overwritten(source, tmp_path):
    with pytest.raises(ValueError, match="'encoder'"):
        save_encoder(source, tmp_path / "e.safetensors", metadata={"encoder": {"name": "mine"}})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"encoder": ' + json.dumps(GOOD) + ', "encoder": null}', "'encoder' comes twice"),
        ('{"encoder": {"name": "a", "name": "test_resnet"}}', "'name' comes twice"),
        ('{"epoch": NaN}', "NaN"),
        ('{"epoch": -Infinity}', "Infinity"),
        ('{"epoch": 1e999}', "too large"),
        ('{"epoch": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "inside each other"),
        ('{"x": ' + "[" * 100_000, "inside each other"),
        ('{"x": [' + "[]," * 20_000 + "1]}", "10000 objects and lists"),
        ('{"x": "' + "y" * (5 << 20) + '"}', "characters"),
        ('{"x": "secret', "not JSON"),
        ("[]", "JSON object"),
        ("3", "JSON object"),
        ("", "not JSON"),
        ('{"encoder": 3}', "encoder must be an object"),
        ('{"encoder": [1, 2]}', "encoder must be an object"),
    ],
)
def test_json_is_read_strictly(source, state, tmp_path, text, named):
    path = write(tmp_path / "e.safetensors", state, text)
    for read in (load_encoder, lambda path: load_checkpoint(source, path)):
        with pytest.raises(ValueError, match=named) as caught:
            read(path)
        assert "secret" not in str(caught.value)
        assert len(str(caught.value)) < 1000


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([NAME, "mlp"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@settings(max_examples=80, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from([*GOOD, "weights", "pretrained"]) | st.text(max_size=5), VALUES, max_size=3
    ),
    lost=st.sets(st.sampled_from(list(GOOD)), max_size=1),
)
def test_any_metadata_loads_or_is_refused_by_key(written, changes, lost):
    about = {key: value for key, value in {**GOOD, **changes}.items() if key not in lost}
    path = written(json.dumps({"encoder": about}))
    try:
        load_encoder(path)
    except ValueError as error:
        named = ("encoder.", "does not fit", "NaN", "Infinity", "digits")  # the second: within limits, of other shapes
        assert str(path) in str(error) and any(word in str(error) for word in named)
        return
    assert about.keys() == GOOD.keys()


@settings(max_examples=40, deadline=None)
@given(content=VALUES)
def test_any_json_is_a_value_error(written, content):
    path = written(json.dumps(content))
    with pytest.raises(ValueError, match=r"e\.safetensors"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_hidden": [4]}, "head='linear' has no hidden"),
        ({"head": None}, "embedding_dim=8"),
        ({"head": "mlp"}, "fit"),
    ],
)
def test_values_that_do_not_go_together_are_named_with_their_file(state, tmp_path, changes, named):
    path = with_encoder(tmp_path / "e.safetensors", state, **changes)
    with pytest.raises(ValueError, match=r"e\.safetensors") as caught:
        load_encoder(path)
    assert named in str(caught.value)


def test_null_mean_of_a_backbone_that_normalises_is_no_guess(tmp_path):
    encoder = build_encoder("resnet50_at", head=None, seed=1)
    about = {**encoder.spec, "mean": None, "std": None}
    path = write(tmp_path / "e.safetensors", dict(encoder.state_dict()), json.dumps({"encoder": about}))
    with pytest.raises(ValueError, match=r"encoder\.mean is null"):
        load_encoder(path)


@pytest.mark.parametrize("changes", [{"per_image": 1}, {"per_image": True, "mean": [0.5] * 3, "std": [0.5] * 3}])
def test_standardised_images_are_true_or_false_and_without_a_mean(state, tmp_path, changes):
    path = with_encoder(tmp_path / "e.safetensors", state, **changes)
    with pytest.raises(ValueError, match=r"encoder\.per_image"):
        load_encoder(path)


@pytest.mark.parametrize("changes", [{"weights": "/etc/passwd"}, {"name": "hf-hub:a/b"}, {"embedding_dim": 10**9}])
@pytest.mark.parametrize("inside", ["encoder", "extra"])
def test_training_checkpoints_are_read_as_strictly(state, tmp_path, changes, inside):
    about = {**GOOD, **changes}
    content = {"format": "hsat training 1", "model": state, "epoch": 1}
    content |= {"encoder": about} if inside == "encoder" else {"extra": {"encoder": about}}
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"encoder\.{next(iter(changes))}\b"):
        load_encoder(tmp_path / "last.pt")


def test_settings_of_another_program_are_no_statement(source, state, tmp_path):
    torch.save({"state_dict": state, "encoder": {"arch": "resnet", "pretrained": True}}, tmp_path / "other.pt")
    assert fingerprint_weights(load_encoder(tmp_path / "other.pt", NAME, norm="none")) == fingerprint_weights(source)
    with pytest.raises(ValueError, match="does not say how to build"):
        load_encoder(tmp_path / "other.pt")


# ---- the file itself


def header(entries, values=b"", *, length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def tensor(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (header({}, length=2**63), "header ends behind its end"),
        (header({"a": tensor(0, 4, [1])}, length=10**6), "header ends behind its end"),
        (header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)), "b begins at byte 4"),
        (header({"a": tensor(4, 8, [1])}, bytes(8)), "a begins at byte 4"),
        (header({"a": tensor(0, 4, [1])}, bytes(400)), "take 4 bytes"),
        (header({"a": tensor(0, 4 * 10**12, [10**12])}, bytes(4)), "take 4000000000000 bytes"),
        (header({"a": tensor(0, 4, [10**9])}, bytes(4)), "a has 4 bytes"),
        (header({"a": tensor(0, 4, [-1])}, bytes(4)), "a has shape"),
        (header({"a": tensor(0, 4, [True])}, bytes(4)), "a has shape"),
        (header({"a": tensor(8, 4, [1])}, bytes(8)), "a has -4 bytes"),
        (header({"a": tensor(0, 4, [1], "F31")}, bytes(4)), "dtype 'F31'"),
        (header({"a": tensor(0, 4, [1]) | {"path": "/etc/passwd"}}, bytes(4)), "a must have dtype"),
        (header({"a": 3}), "a must have dtype"),
        (header(b'{"a": {}, "a": {}}'), "'a' comes twice"),
        (header(b"[" * 50_000), "inside each other"),
        (header(b'{"\xff\xfe": 1}'), "not UTF-8"),
        (header({"__metadata__": {"hsat": 3}}), "__metadata__ must hold texts"),
        (header({"a" * 300: tensor(0, 4, [1])}, bytes(4)), "300 characters"),
        (header({"." * 100: tensor(0, 4, [1])}, bytes(4)), "names of tensors are shorter"),
        (header({f"{i}": tensor(0, 0, [0]) for i in range(20_001)}), "20001 tensors"),
        (b"\x01", "header ends behind its end"),
    ],
)
def test_a_safetensors_header_must_agree_with_its_file(tmp_path, content, named):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors") as caught:
        load_checkpoint(torch.nn.Linear(1, 1), tmp_path / "w.safetensors")
    assert named in str(caught.value)


@pytest.fixture(params=["fifo", "socket", "device", "folder", "loop", "absent link"])
def irregular(request, tmp_path):
    path = tmp_path / "w.safetensors"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        os.mknod(path, 0o600 | 0o140000)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to(tmp_path / "gone")
    words = {"fifo": "named pipe", "loop": "link", "absent link": "link to a file that is absent"}
    return path, words.get(request.param, request.param)


@pytest.mark.parametrize(
    "read",
    [
        load_encoder,
        checkpoint_hash,
        lambda path: load_encoder(path, NAME, norm="none"),
        lambda path: load_checkpoint(torch.nn.Linear(1, 1), path),
        lambda path: build_encoder(NAME, norm="none", weights=path),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(irregular, read):
    path, word = irregular
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        read(path)


def test_a_sparse_file_larger_than_any_encoder_is_refused(tmp_path):
    with (tmp_path / "w.pt").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"w\.pt has 1099511627776 bytes"):
        load_checkpoint(torch.nn.Linear(1, 1), tmp_path / "w.pt")


def test_no_error_shows_what_is_in_another_file(tmp_path):
    for name in ("w.pt", "w.safetensors", "w"):
        for content in (b"secret", b"secret" * 99, b'secret: {"secret": 1}', b"\x80\x02secret.", b"PK\x03\x04secret"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=name) as caught:
                load_checkpoint(torch.nn.Linear(1, 1), tmp_path / name)
            assert "secret" not in str(caught.value)


def test_a_compressed_archive_is_refused(state, tmp_path):
    torch.save({"model": state}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "w.pt", "w") as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(torch.nn.Linear(1, 1), tmp_path / "w.pt")


def test_tensors_that_are_larger_than_what_is_stored_are_named(source, state, tmp_path):
    key = "head.layers.0.weight"
    wide = state | {key: torch.zeros(1, 1).expand(10**5, 10**6)}
    sparse = state | {key: torch.zeros(8, 96).to_sparse()}
    for wrong in (wide, sparse, state | {key: torch.zeros(8, 96, device="meta")}):
        torch.save({"model": wrong}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"head\.layers\.0\.weight"):
            load_checkpoint(source, tmp_path / "w.pt")


def test_values_that_refer_to_themselves_are_left_out(source, state, tmp_path):
    circle: list[object] = []
    circle.append(circle)
    many: list[object] = []
    for _ in range(40):
        many = [many, many]
    torch.save({"model": state, "epoch": 2, "circle": circle, "many": many}, tmp_path / "w.pt")
    assert load_checkpoint(source, tmp_path / "w.pt").metadata == {"epoch": 2}


def test_sound_tensors_of_other_kinds_still_load(source, state, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": half}, tmp_path / "half.pt")
    target = build_encoder(NAME, embedding_dim=8, norm="none", seed=2)
    load_checkpoint(target, tmp_path / "half.pt")
    assert torch.equal(target.head.layers[0].weight, half["head.layers.0.weight"].float())
    torch.save({"model": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_checkpoint(target, tmp_path / "old.pt")
    assert fingerprint_weights(target) == fingerprint_weights(source)


WATCHED = """
    import json, resource, sys
    import torch, timm, safetensors.torch
    from hsat.models import load_encoder

    def load(path):
        try:
            load_encoder(path)
        except ValueError as error:
            return str(error)
        return ""

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])
        elif event.startswith(("socket.", "urllib", "subprocess", "os.system", "os.posix_spawn")):
            opened.append(event)

    opened, results = [], []
    load(sys.argv[1])  # imports what is used on the way
    sys.addaudithook(watch)
    for path in sys.argv[1:]:
        opened.clear()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = load(path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        results.append({"path": path, "said": said, "grown": grown, "opened": list(opened)})
    print(json.dumps(results))
"""
ASKING = [
    ({}, ""),
    ({"name": "hf-hub:timm/resnet18.a1_in1k", "pretrained": True}, "encoder.pretrained"),
    ({"name": "hf-hub:timm/resnet18.a1_in1k"}, "encoder.name"),
    ({"weights": "/etc/passwd"}, "encoder.weights"),
    ({"name": "vit_giant_patch14_224", "head": None, "embedding_dim": None}, "does not fit"),  # 4 GB of weights
    ({"embedding_dim": 65_536, "head": "mlp", "head_hidden": [65_536] * 8}, "does not fit"),  # 137 GB
]


def test_nothing_else_is_opened_and_memory_stays_small(state, tmp_path):
    paths = [with_encoder(tmp_path / f"{i}.safetensors", state, **changes) for i, (changes, _) in enumerate(ASKING)]
    code = [sys.executable, "-c", textwrap.dedent(WATCHED)]
    done = subprocess.run([*code, *map(str, paths)], capture_output=True, text=True, check=True, timeout=300)
    results = json.loads(done.stdout)
    for (_, named), seen in zip(ASKING, results, strict=True):
        assert named in seen["said"] and bool(named) == bool(seen["said"])
        assert [name for name in seen["opened"] if name != seen["path"] and not name.endswith((".py", ".pyc"))] == []
        assert seen["path"] in seen["opened"]
        assert seen["grown"] < 200_000  # KiB
