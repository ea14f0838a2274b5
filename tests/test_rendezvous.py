"""Processes find those of their own attempt, whatever earlier attempts left in the store."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

SECONDS = timedelta(seconds=10)
AT_ONCE = timedelta(seconds=0.1)


def room_of(store, *, rank, size, patience=SECONDS):
    from hsat.rendezvous import meet_ranks

    return meet_ranks(store, rank=rank, size=size, patience=patience)


def meet(store, size, *, late=()):
    """The rooms of one attempt whose processes come at the same time; those in `late` come after the others."""
    order = [rank for rank in range(size) if rank not in late] + list(late)
    with ThreadPoolExecutor(size) as pool:
        found = {rank: pool.submit(room_of, store, rank=rank, size=size) for rank in order}
        return [found[rank].result() for rank in range(size)]


def write_and_read(rooms, text):
    """Every process writes under its rank and reads all others."""
    for rank, room in enumerate(rooms):
        room.set_timeout(timedelta(seconds=1))  # of a wait for what is in another room
        assert not room.check(["address"]) and not room.check([str(rank)]), "something was here before"
    for rank, room in enumerate(rooms):
        room.set(str(rank), f"{text} {rank}")
    for room in rooms:
        assert [room.get(str(rank)).decode() for rank in range(len(rooms))] == [
            f"{text} {rank}" for rank in range(len(rooms))
        ]


@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # a failure waits: no search for a smaller one
@given(
    size=st.integers(1, 4),
    died=st.lists(st.sets(st.integers(0, 3), min_size=1), max_size=3),
    late=st.permutations(range(4)),
)
def test_an_attempt_meets_in_a_room_of_its_own(size, died, late):
    """Before it, attempts in which some never came, and one in which all met and wrote their addresses."""
    store = dist.HashStore()
    for gone in died:
        for rank in {*range(size)} - gone:
            try:
                room_of(store, rank=rank, size=size, patience=timedelta(seconds=0.001))
            except TimeoutError:
                continue
    write_and_read(meet(store, size), "an earlier attempt")
    write_and_read(meet(store, size, late=[rank for rank in late if rank < size]), "this attempt")


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"rank 0 of 3 waited 0.1 s in vain for rank\(s\) 1, 2, .*--resume"):
        room_of(store, rank=0, size=3, patience=AT_ONCE)
    with pytest.raises(TimeoutError, match=r"rank 2 of 3 waited 0.1 s in vain for rank\(s\) 0, "):
        room_of(store, rank=2, size=3, patience=AT_ONCE)


@pytest.mark.parametrize(("terms", "sizes"), [(("", ""), (2, 3)), (("", ""), (3, 2)), (("cuda", "cpu"), (2, 2))])
def test_ranks_of_other_terms_are_refused_on_both_sides_at_once(terms, sizes):
    from hsat.rendezvous import meet_ranks

    store, errors = dist.HashStore(), {}

    def meet(rank):
        try:
            meet_ranks(store, rank=rank, size=sizes[rank], terms=terms[rank])
        except ValueError as error:
            errors[rank] = str(error)

    with ExitStack() as stack:
        for rank in range(2):
            thread = threading.Thread(target=meet, args=(rank,))
            thread.start()
            stack.callback(thread.join, timeout=20)
    assert errors[0] == errors[1]
    assert re.search(
        rf"rank 1 was started with WORLD_SIZE={sizes[1]}.*{terms[1]}.*rank 0 with WORLD_SIZE={sizes[0]}", errors[0]
    )
