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
from hsat.cli.ranks import GRACE, Ranks


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
        if _another_spoke(ranks.board, failed, error):
            time.sleep(GRACE)  # torchrun ends all when the first one ends, which has to speak before
            raise SystemExit(1) from None
        raise


def _another_spoke(board: dist.Store, failed: str, error: BaseException) -> bool:
    """Whether another rank failed before this one, and so says why.

    Where the store is gone, rank 0 kept it and has ended: an error of the connection tells no more than that.
    """
    try:
        end = time.monotonic() + GRACE
        while isinstance(error, RankFailedError) and time.monotonic() < end and not board.check([failed]):
            time.sleep(0.05)
        return board.add(failed, 1) > 1
    except RuntimeError:
        if not isinstance(error, RuntimeError):
            return False
        raise SystemExit("error: rank 0 has ended or cannot be reached; its own message says why") from None
