"""What a record says of the strongest attack beyond its number."""

from __future__ import annotations

import dataclasses

from hsat.eval.engine.strongest import Casualties
from hsat.eval.records import Record
from hsat.eval.statistics.binomial import binomial_tail

TOLERATED = 0.05
"""Share of the images that withstood every gradient which a search without them may fell by luck."""

FALSE_ALARM = 0.01

POOLED = (
    "pooled at each patch's worst case: a patch that has fallen is not pushed further, so that an attack on the pool"
    " may do more"
)


def ensemble_record(record: Record, found: Casualties, k: int) -> Record:
    """The record with members, counts and who felled whom.  k: the neighbours of the vote that decided.

    Flags: black-box members that beat the white-box ones; records of another k; pooled levels, where the number is that
    of an attack on patches and so a bound from above only.
    """
    flags = record.flags + black_box_flag(found)
    if record.k != k:
        flags += (f"images fell by the vote of {k} neighbours, not of {record.k}",)
    if record.level != "patch":
        flags += (POOLED,)
    counts = ("seen", "felled", "forwards", "backwards")
    members = {each.name: {name: getattr(each, name) for name in counts} for each in found.members}
    settings = record.settings | {
        "attacked_k": k,
        "members": members,
        "member_attacks": {each.name: each.attack for each in found.members if each.attack},
        "withstood": int(found.robust.sum()),
    }
    return dataclasses.replace(record, flags=flags, settings=settings)


def black_box_flag(found: Casualties) -> tuple[str, ...]:
    """A flag if searches without gradients felled more of what every gradient left than luck explains.

    By an exact one-sided binomial test against a tolerated share of 5 %, at level 1 %: gradients are then masked, or
    the white-box members too weak.
    """
    outside = [each for each in found.members if each.black_box]
    reached, felled = max((each.seen for each in outside), default=0), sum(each.felled for each in outside)
    if not felled or felled / reached <= TOLERATED or binomial_tail(felled, reached, TOLERATED) >= FALSE_ALARM:
        return ()
    return (
        f"black box beats white box: searches without gradients felled {felled} of {reached} images that withstood"
        f" every gradient ({TOLERATED:.0%} would be tolerated)",
    )
