"""Signals during a training of the library: it stops after a whole step, saved, and the handlers are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hsat.distributed import World
from hsat.training.config import TrainConfig
from hsat.training.interrupts import TrainingInterrupted, stop_on_signals

pytestmark = pytest.mark.usefixtures("hear_ctrl_c")

CONFIG = TrainConfig(
    steps=4, batch_patients=2, save_every=9, eval_every=9, views={"image_size": 32}, attack={"name": "none"}
)


WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_fit_after_a_saved_step(number, make_trainer, tmp_path):
    make_trainer("whole", CONFIG).fit()
    trainer = make_trainer("run", CONFIG)
    honest, before = trainer.step, [signal.getsignal(one) for one in WATCHED]

    def step(batch):
        if trainer.done == 1:
            os.kill(os.getpid(), number)
        return honest(batch)

    trainer.step = step
    with pytest.raises(TrainingInterrupted, match="stopped after step 2 of 4, which is saved") as stop:
        trainer.fit()
    assert (stop.value.step, stop.value.total, stop.value.signal) == (2, 4, number)
    assert [signal.getsignal(one) for one in WATCHED] == before
    resumed = make_trainer("run", CONFIG, resume=True)
    assert resumed.done == 2
    resumed.fit()
    for name in ("final.safetensors", "best.safetensors", "train.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_signal_in_the_last_step_changes_nothing(make_trainer, tmp_path):
    trainer = make_trainer("run", CONFIG)
    honest = trainer.step

    def step(batch):
        if trainer.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(batch)

    trainer.step = step
    assert trainer.fit() == tmp_path / "run" / "best.safetensors"


def test_the_second_ctrl_c_is_not_held_back():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT and request.agreed(World())
        os.kill(os.getpid(), signal.SIGINT)


def test_without_a_signal_nothing_is_asked():
    with stop_on_signals() as request:
        assert not request.agreed(World())


def test_other_threads_train_without_handlers():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_on_signals() as request:
            seen.append((request.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def test_signals_that_the_process_ignores_stay_ignored():
    """As Ctrl-C is where a command was started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.signal == 0
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGTERM and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
