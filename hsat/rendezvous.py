"""How the ranks of one attempt find each other in a store that remembers the attempts before it."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Store = Any
"""torch.distributed.Store, which torch exports without saying so to type checkers."""

PATIENCE = timedelta(minutes=5)
_PAUSE = 0.02  # seconds between two looks into the store


def meet_ranks(store: Store, *, rank: int, size: int, patience: timedelta = PATIENCE, terms: str = "") -> Store:
    """A part of the store for the `size` processes that call this now; no earlier process ever wrote into it.

    This mends a fault of torch 2.8 to 2.14 at least.  torchrun's agent serves one store for all restarts
    (TORCHELASTIC_USE_AGENT_STORE), and `init_process_group("env://")` uses it without a prefix for each attempt, so
    gloo writes the addresses of an attempt under the keys of the attempt before it.  A process that reads before its
    peer has written finds the address of a dead one: "connection refused", or a wait without end.  The number of
    restarts (TORCHELASTIC_RESTART_COUNT) would not tell attempts apart on several machines: each agent counts its own
    failures, and leaves out those of other agents and changes of membership.

    benchmarks/rendezvous_trial.py kills ranks of small trainings at random moments (torch 2.14.1, two ranks over gloo,
    five plans of kills).  With this function 5 of 5 runs under one torchrun, and 5 of 5 under two, ended with the bytes
    of a run that nobody killed.  With a prefix by TORCHELASTIC_RESTART_COUNT 5 of 5 and 1 of 5 did; the other four
    hung.  With "env://" alone 3 of 4 did; one used up its restarts on refused connections.

    Rank 0 publishes a random token.  Each other rank answers under that token, with a token of its own, and rank 0
    confirms the answer.  A token of an earlier attempt is answered, too, but nobody confirms it.

    Args:
        store: A store that all ranks see.
        rank: Number of this process.
        size: Number of processes.
        patience: How long to wait for the others.
        terms: A text that has to be the same on all ranks, beside `size`.

    Returns:
        The store under a prefix of this attempt, for `init_process_group(store=...)`.

    Raises:
        TimeoutError: Naming the ranks that did not come.
        ValueError: If a rank was started with another size or other terms; names both.
    """
    token, end = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    token += f" WORLD_SIZE={size}{terms and ', '}{terms}"
    if rank == 0:
        agreed, missing = _publish(store, token, size=size, end=end)
    else:
        agreed, missing = _answer(store, token, rank, end=end)
    if missing:
        raise TimeoutError(
            f"rank {rank} of {size} waited {patience.total_seconds():g} s in vain for rank(s)"
            f" {', '.join(map(str, missing))}, which ended or never started, or whose number was given twice: see what"
            " they wrote, then start the same command again on all ranks; with --resume it goes on from the last"
            " checkpoint"
        )
    prefixed: Store = dist.PrefixStore(f"hsat/{agreed}/attempt", store)  # type: ignore[attr-defined]  # torch exports it
    return prefixed


def _publish(store: Store, token: str, *, size: int, end: float) -> tuple[str, list[int]]:
    """Rank 0's part: the token of the attempt, and the ranks that did not come."""
    missing = list(range(1, size))
    store.set("hsat/token", token)
    while True:
        for rank in [rank for rank in missing if store.check([f"hsat/{token}/{rank}"])]:
            answer = store.get(f"hsat/{token}/{rank}").decode()
            store.set(f"hsat/{token}/{rank}/{answer}", "confirmed")
            missing.remove(rank)
            _compare_terms(rank, answer, token)
        if not missing or time.monotonic() > end:
            return token, missing
        time.sleep(_PAUSE)


def _answer(store: Store, own: str, rank: int, *, end: float) -> tuple[str, list[int]]:
    """The part of another rank, in the same form; `own` is its token."""
    token = ""
    while True:
        if store.check(["hsat/token"]) and (latest := store.get("hsat/token").decode()) != token:
            token = latest
            store.set(f"hsat/{token}/{rank}", own)
        if token and store.check([f"hsat/{token}/{rank}/{own}"]):
            _compare_terms(rank, own, token)
            return token, []
        if time.monotonic() > end:
            return token, [0]
        time.sleep(_PAUSE)


def _compare_terms(rank: int, own: str, token: str) -> None:
    """Raise ValueError unless a rank was started on the terms of rank 0; both follow the random part of a token."""
    terms, expected = (text.partition(" ")[2] for text in (own, token))
    if terms != expected:
        raise ValueError(
            f"rank {rank} was started with {terms}, and rank 0 with {expected}; start all ranks by one torchrun command"
            " and in one environment"
        )
