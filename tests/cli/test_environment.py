"""What the environment says about ranks: join_ranks, refused with what to type, or nobody there."""

from __future__ import annotations

import os
import socket
import threading
from importlib import import_module

import pytest
import torch.distributed as dist

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
TWO = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}


def place(**environment):
    from hsat.cli.environment import place_of

    return place_of(environment)


def test_places():
    assert place() is None and place(**MASTER) is None
    assert place(RANK="0", WORLD_SIZE="1") is None, "one rank of one needs no partner"
    assert place(**TWO) == (1, 2, None, "127.0.0.1", 29517)
    assert place(**TWO, LOCAL_RANK="3").local == 3
    assert place(**{**TWO, "RANK": "0", "WORLD_SIZE": "1"}, TORCHELASTIC_RUN_ID="x") == (0, 1, None, "127.0.0.1", 29517)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["no MASTER_ADDR and no MASTER_PORT", "unset RANK WORLD_SIZE"]),
        ({**TWO, "MASTER_PORT": ""}, ["RANK=1, WORLD_SIZE=2 but no MASTER_PORT"]),
        ({"RANK": "0"}, ["RANK=0 but no WORLD_SIZE", "unset RANK"]),
        ({"WORLD_SIZE": "2", **MASTER}, ["WORLD_SIZE=2 but no RANK", "unset WORLD_SIZE"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 but no RANK and no WORLD_SIZE", "unset LOCAL_RANK"]),
        ({"TORCHELASTIC_RUN_ID": "x"}, ["no RANK and no WORLD_SIZE", "unset TORCHELASTIC_RUN_ID"]),
        ({**TWO, "RANK": "5"}, ["RANK=5", "WORLD_SIZE=2", "0 to 1"]),
        ({**TWO, "RANK": "-1"}, ["RANK=-1"]),
        ({**TWO, "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        ({**TWO, "RANK": "one"}, ["RANK", "'one'", "no integer"]),
        ({**TWO, "WORLD_SIZE": "2.0"}, ["WORLD_SIZE", "'2.0'"]),
        ({**TWO, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
        ({**TWO, "LOCAL_RANK": "-1"}, ["LOCAL_RANK=-1"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_incomplete_and_senseless_variables_are_refused(environment, words):
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=N") as error:
        place(**environment)
    for word in words:
        assert word in str(error.value)


def test_tasks_that_nobody_connects_are_refused():
    for environment, command in (
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "srun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
    ):
        with pytest.raises(ValueError, match=f"{command} started 4 processes .*torchrun .*{command} -n 1"):
            place(**environment)
        assert place(**environment, **TWO) == (1, 2, None, "127.0.0.1", 29517), "who sets RANK connects them"
    assert place(SLURM_PROCID="0", SLURM_NTASKS="4") is None, "a batch script, which runs once"
    assert place(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1") is None
    assert place(SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="4") is None, "SLURM_PROCID was unset on purpose"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def environment(monkeypatch):
    """environment(name=value): these of the launchers' variables and no others."""

    def put(**values):
        for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC_"))]:
            monkeypatch.delenv(name)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return put


@pytest.mark.parametrize("command", ["train", "evaluate", "transfer"])
def test_no_command_runs_by_itself_where_it_should_have_a_partner(command, environment, root, tmp_path, stops):
    main, out = import_module(f"hsat.cli.{command}").main, tmp_path / "out"
    options = ["--data.root", str(root), "--out", str(out), "--device", "cpu", "--rank_timeout", "0.3"]
    if command != "train":
        options += ["--checkpoint", "a=nowhere.safetensors"]
    environment(RANK=0, WORLD_SIZE=2)
    assert "MASTER_ADDR" in stops(main, options)
    environment(SLURM_PROCID=1, SLURM_NTASKS=2)
    assert "srun" in stops(main, options)
    environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    message = stops(main, options)
    assert "rank 0 of 2 waited 0.3 s in vain for rank(s) 1" in message
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=(port := free_port()))
    message = stops(main, options)
    assert "rank 1 of 2 waited 0.3 s in vain for rank 0" in message and f"127.0.0.1:{port}" in message
    assert not out.exists() and not dist.is_initialized()


def test_a_second_rank_0_is_told_about_the_port(environment, root, tmp_path, stops):
    from hsat.cli.train import main

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        message = stops(main, ["--data.root", str(root), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert f"rank 0 cannot listen at 127.0.0.1:{port}" in message and "--master_port" in message


def test_rank_0_that_ends_while_others_wait_is_named(environment):
    """It had met rank 1 and waited for rank 2 in vain; what rank 1 then reads from is gone."""
    from hsat.cli.ranks import join_ranks

    kept = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    environment(RANK=1, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=kept.port)
    errors = []

    def wait():
        try:
            with join_ranks("cpu"):
                pass
        except OSError as error:
            errors.append(str(error))

    kept.set("hsat/token", "a token that nobody confirms")
    thread = threading.Thread(target=wait)
    thread.start()
    kept.get("hsat/a token that nobody confirms/1")  # waits until rank 1 is there
    del kept
    thread.join(timeout=20)
    assert len(errors) == 1 and "rank 1 of 3 lost the store at 127.0.0.1" in errors[0]
