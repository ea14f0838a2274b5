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
PAUSE = 0.02


def meet_ranks(store: Store, *, rank: int, size: int, patience: timedelta = PATIENCE, terms: str = "") -> Store:
    """A part of the store for the `size` processes that call this now; no earlier process ever wrote into it.

    torchrun keeps one store for all restarts, and torch writes the addresses of an attempt under the keys of the
    attempt before it.  A process that reads before its peer has written finds the address of a dead one: "connection
    refused", or a wait without end.  A count of restarts would not tell attempts apart where there are several
    machines: each counts its own failures, and leaves out those of others and changes of membership.

    So rank 0 calls with a new word; each other rank answers under that word, with a new word of its own; and rank 0
    confirms the answer.  The call of an earlier attempt is answered, too, but nobody confirms it.

    patience: how long to wait for the others.  terms: a text that has to be the same on all ranks, beside `size`; it
    travels with the words.  Raises TimeoutError naming the ranks that did not come, ValueError naming both terms.
    """
    word, end = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    word += f" WORLD_SIZE={size}{terms and ', '}{terms}"
    room, missing = _called(store, word, size=size, end=end) if rank == 0 else _answered(store, word, rank, end=end)
    if missing:
        raise TimeoutError(
            f"rank {rank} of {size} waited {patience.total_seconds():g} s in vain for rank(s)"
            f" {', '.join(map(str, missing))}, which ended or never started, or whose number was given twice: see what"
            " they wrote, then start the same command again on all ranks; with --resume it goes on from the last"
            " checkpoint"
        )
    prefixed: Store = dist.PrefixStore(f"hsat/{room}/room", store)  # type: ignore[attr-defined]  # which torch does export
    return prefixed


def _called(store: Store, word: str, *, size: int, end: float) -> tuple[str, list[int]]:
    """Rank 0's part: the word of the room, and the ranks that did not come."""
    missing = list(range(1, size))
    store.set("hsat/call", word)
    while True:
        for rank in [rank for rank in missing if store.check([f"hsat/{word}/{rank}"])]:
            answer = store.get(f"hsat/{word}/{rank}").decode()
            store.set(f"hsat/{word}/{rank}/{answer}", "seen")
            missing.remove(rank)
            _compare_terms(rank, answer, word)
        if not missing or time.monotonic() > end:
            return word, missing
        time.sleep(PAUSE)


def _answered(store: Store, word: str, rank: int, *, end: float) -> tuple[str, list[int]]:
    """The part of another rank, in the same form; `word` is its own."""
    call = ""
    while True:
        if store.check(["hsat/call"]) and (heard := store.get("hsat/call").decode()) != call:
            call = heard
            store.set(f"hsat/{call}/{rank}", word)
        if call and store.check([f"hsat/{call}/{rank}/{word}"]):
            _compare_terms(rank, word, call)
            return call, []
        if time.monotonic() > end:
            return call, [0]
        time.sleep(PAUSE)


def _compare_terms(rank: int, word: str, call: str) -> None:
    """Raise ValueError unless a rank was started on the terms of rank 0; both follow the random part of a word."""
    terms, wanted = (text.partition(" ")[2] for text in (word, call))
    if terms != wanted:
        raise ValueError(
            f"rank {rank} was started with {terms}, and rank 0 with {wanted}; start all ranks by one torchrun command"
            " and in one environment"
        )
