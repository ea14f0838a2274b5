"""Several processes that a user hears as one."""

from __future__ import annotations

import contextlib
import io
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from hsat.distributed import RankFailedError
from ranks import Ranks

GRACE = 5.0  # seconds for a rank that failed to say why, before another one says that it did


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Only the first rank writes to standard error inside the block; of ranks that fail, one goes on with its error.

    That is the one that failed first; the others, which often fail for the same reason or because it is gone, end
    without a word.
    """
    if ranks.size == 1 or ranks.board is None:
        yield
        return
    word = [secrets.token_hex(8)]
    dist.broadcast_object_list(word, device=ranks.device)
    failed = f"hsat/failed/{word[0]}"  # of this attempt: the board outlives it
    try:
        with contextlib.nullcontext() if ranks.first else contextlib.redirect_stderr(io.StringIO()):
            yield
    except (Exception, SystemExit) as error:
        end = time.monotonic() + GRACE
        while isinstance(error, RankFailedError) and time.monotonic() < end and not ranks.board.check([failed]):
            time.sleep(0.05)
        if ranks.board.add(failed, 1) > 1:
            time.sleep(GRACE)  # torchrun ends all when the first one ends, which has to speak before
            raise SystemExit(1) from None
        raise
