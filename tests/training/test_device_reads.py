"""What would stop a GPU, found without one: on a make-believe device that computes on the CPU and counts.

`pretend_device.py` is that device.  Here stands what is allowed: an attack reads the device once, a loss never, and no
copy to the device blocks; the exceptions are written out, each with its reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
ONE_READ = "running.py"  # Run.raise_flags: were the images in range, were all gradients finite?
MORE = {  # case: (reads at most, why)
    "from the images: BIM": (2, "is any image stationary at the first step?"),
    "from the images: FGSM": (2, "the same"),
    "from the images: MIFGSM": (2, "the same"),
    "attack: raw channels": (3, "are the images what two channels can make, and in range?"),
    "attack: stains": (2, "are the images in range?"),
    "objective: objective_from": (4, "supcon_loss on bare ids looks for a pair at each of three steps"),
    "objective: soft_knn": (4, "neighbours too close for 32 bits are searched again, at each of three steps"),
    "level margin": (7, "the same, and the groups' decisions"),
    "float16 images": (4, "the scale is halved where a gradient overflows, at each of three steps"),
    "success": (9, "images stop one by one"),
    "step, parts": (2, "two parts, two attack calls"),
    "free": (3, "are the images in range, and the gradients finite before each of two moves?"),
    "worst_of": (2, "two attacks"),
    "stored patches": (2, "are the values in range? once for each of two pipelines"),
}
FREELY = {"evaluation", "warm starts", "safeguard", "universal"}  # between steps, or once per batch
COPIES = {  # case: copies that block
    "augmentation: static": (7, "white noise replayed from the CPU; a GPU draws its own"),
    "augmentation: v0": (7, "the same"),
    "evaluation": (2, "the images of the bank and the queries"),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What `pretend_cases.py` wrote; in a process of its own, for a device is registered for good."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch does not let Python register a device")
    done = subprocess.run(
        [sys.executable, str(HERE / "pretend_cases.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_everything_runs_on_a_device_and_gives_the_cpus_numbers(found):
    errors = {name: case["error"] for name, case in found.items() if "error" in case}
    assert not errors
    assert len(found) > 45
    far = {name: case["difference"] for name, case in found.items() if case["difference"] > 1e-6}
    assert not far


def test_an_attack_reads_the_device_once(found):
    plain = {name: case for name, case in found.items() if name not in MORE and name not in FREELY}
    for name, case in plain.items():
        assert len(case["reads"]) <= 1, (name, case["reads"])
    attacks = [name for name in plain if name.startswith("attack: ")]
    assert len(attacks) > 15
    for name in (*attacks, "step", "step, clean and adversarial"):
        (read,) = found[name]["reads"]
        assert ONE_READ in read or name == "attack: RandomNoise", (name, read)
    assert found["loss"]["reads"] == []


def test_the_exceptions_are_those_that_are_written_down(found):
    for name, (most, _) in MORE.items():
        assert len(found[name]["reads"]) == most, (name, found[name]["reads"])


def test_no_copy_to_the_device_blocks(found):
    for name, case in found.items():
        most, _ = COPIES.get(name, (0, ""))
        assert len(case["copies"]) <= most, (name, case["copies"])
