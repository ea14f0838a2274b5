"""What would make a GPU wait, found without one: reads by the host, counted on CPU tensors (`host_reads.py`).

An attack reads once per call, a loss never, a training step what its attack reads.  Everything else is written out,
each with its reason: reads that a GPU has, too (MORE, beside the cases); reads that the library makes for CPU tensors
only; reads of values that lie on the CPU on any machine.  What only a GPU can show is in tests/gpu/test_gpu.py.
"""

from __future__ import annotations

import ast
import linecache

import pytest
import torch
from device_cases import FREELY, MORE, Place, cases
from host_reads import PACKAGE, HostRead, HostReads

ONE_READ = "raise_flags"  # were the images in range, were all gradients finite?
CPU_ONLY = [  # (file, part of the line, why a GPU does without it); the line, or one of two above, asks for the CPU
    ("attacks/loop.py", "bool(start.isnan().any())", "the gradient at a start that holds NaN is NaN, and raises"),
    ("attacks/loop.py", "check_finite(bad)", "the same; the CPU raises at the step where it happens"),
    ("attacks/margins.py", "int(labels.min())", "a label out of range ends in an assertion of the device"),
    ("attacks/projections.py", "bool((new == t).all())", "a GPU goes 24 rounds, the CPU as many as change something"),
    ("attacks/square.py", "bool(bad.any())", "the same"),
    ("attacks/threat.py", 'x.device.type == "cpu" and bool(refused)', "the flag is read at the end of the call"),
]
ON_THE_HOST = [  # (file, part of the line, why the value lies on the CPU on any machine)
    ("attacks/projections.py", "float(next_float(rounded", "the pixel range is two numbers of Python's"),
    ("attacks/threat.py", "eps.double().aminmax()", "an eps of many values is kept and checked on the CPU"),
    (
        "attacks/stain_space.py",
        "stain_basis(self.vectors)",
        "the stains' vectors are numbers of Python's, inverted on the CPU",
    ),
    (
        "attacks/initialization.py",
        "ids.tolist()",
        "each image's noise has a CPU generator, seeded by its id; ids stay there",
    ),
    ("data/augment_batch.py", "torch.rand(", "what an augmentation draws comes from torch's CPU generator, as numbers"),
    ("data/augment_batch.py", "get_params(", "the same"),
    ("data/augment_batch.py", "order.tolist()", "the same"),
]
OTHER_PATHS = {  # file: what is done otherwise for a GPU, and so not seen here, besides CPU_ONLY
    "attacks/initialization.py": "noise of a CPU generator, radii, masks and small tensors are page-locked and copied"
    " without a wait",
    "attacks/library_attack.py": "random states of the devices are kept and put back around another library",
    "attacks/other_libraries.py": "what another library is told about the device",
    "data/augment_batch.py": "128 images at once, and white noise drawn on the device",
    "data/image_operations.py": "parameters of augmentations are page-locked and copied without a wait",
    "training/accumulation.py": "the state of the GPU's generator is kept for the second pass",
    "distributed.py": "synchronised BatchNorm is refused on the CPU",
    "training/optimization.py": "noise is drawn on the GPU; precision, fused AdamW and compiler of the device",
    "training/stored_state.py": "a checkpoint's tensors are on the CPU when they are checked",
    "training/trainer.py": "batches are page-locked",
    "training/validation.py": "batches are page-locked",
    "training/resources.py": "memory is what torch allocated on the GPU",
}


def excused(read: HostRead) -> tuple[str, str] | None:
    """The entry of CPU_ONLY or ON_THE_HOST that the read falls under, by its innermost two lines of the package."""
    for line in read.lines[:2]:
        for file, part, _ in (*CPU_ONLY, *ON_THE_HOST):
            if line.file == file and part in line.text:
                return file, part
    return None


@pytest.fixture(scope="module")
def every_read() -> dict[str, HostReads]:
    """All reads of every case."""
    reads_of = {}
    for name, case in cases().items():
        reads = reads_of[name] = HostReads()
        place = Place(torch.device("cpu"), forget=reads.clear)
        with reads:
            case(place)
    return reads_of


@pytest.fixture(scope="module")
def reads_of(every_read) -> dict[str, list[HostRead]]:
    """The reads of every case that a GPU would wait for."""
    return {name: [read for read in reads if excused(read) is None] for name, reads in every_read.items()}


def test_an_attack_reads_the_device_once(reads_of):
    assert len(reads_of) > 45
    plain = {name: reads for name, reads in reads_of.items() if name not in MORE and name not in FREELY}
    for name, reads in plain.items():
        assert len(reads) <= 1, (name, reads)
    attacks = [name for name in plain if name.startswith(("attack: ", "objective: "))]
    assert len(attacks) > 22
    for name in (*attacks, "ids", "start", "step", "step, clean and adversarial"):
        (read,) = reads_of[name]
        assert read.lines[0].function == ONE_READ or name == "attack: RandomNoise", (name, read)


def test_a_loss_reads_nothing(reads_of):
    assert reads_of["loss"] == []


def test_a_step_reads_what_its_attacks_read(reads_of):
    assert [read.lines[0].function for read in reads_of["step, parts"]] == [ONE_READ, ONE_READ]


def test_the_exceptions_are_those_that_are_written_down(reads_of):
    for name, (most, _) in MORE.items():
        assert len(reads_of[name]) == most, (name, reads_of[name])


def test_every_excuse_is_needed(every_read):
    used = {excused(read) for reads in every_read.values() for read in reads} - {None}
    assert used == {(file, part) for file, part, _ in (*CPU_ONLY, *ON_THE_HOST)}


def test_what_is_read_for_cpu_tensors_only_stands_behind_a_question_for_the_device(every_read):
    lines = {line for reads in every_read.values() for read in reads for line in read.lines[:2]}
    asked = [line for line in lines if any(line.file == file and part in line.text for file, part, _ in CPU_ONLY)]
    assert {line.file for line in asked} == {file for file, _, _ in CPU_ONLY}
    for line in asked:
        path = str(PACKAGE / line.file)
        before = [linecache.getline(path, number) for number in range(line.number - 2, line.number + 1)]
        assert any('device.type == "cpu"' in text for text in before), line


def asks_for_the_device(node: ast.AST) -> bool:
    """`x.is_cuda`, or `device.type == "cpu"` and the like."""
    if isinstance(node, ast.Attribute):
        return node.attr == "is_cuda"
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides) and any(
        isinstance(side, ast.Constant) and side.value in ("cpu", "cuda", "mps") for side in sides
    )


def test_code_that_goes_other_ways_on_a_gpu_is_written_down():
    """In the rooms that a step runs through; what it does there has to be looked at on a GPU."""
    files = [path for room in ("attacks", "data", "losses", "training") for path in (PACKAGE / room).rglob("*.py")]
    files.append(PACKAGE / "distributed.py")
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in files
        if any(map(asks_for_the_device, ast.walk(ast.parse(path.read_text()))))
    }
    assert asking == set(OTHER_PATHS) | {file for file, _, _ in CPU_ONLY}
