"""How long pieces of sequences are where one kernel scans them (`forward/fused.py`), and where
backward follows. `common/chunking.py` has the length for all other kernels."""

from __future__ import annotations

from gdn.problem import CHUNK, Call

from ..common.chunking import piece_length, sm_count
from .tile.layout import ROWS

MIN_PIECES, MIN_PIECE_CHUNKS = 8, 32
"""One kernel cuts sequences into at least so many pieces, of at least so many chunks: else
`prepare` and `scan` take much less time where nothing forgets."""
MAX_SAVED_PIECES = 8
"""Where backward follows, one kernel cuts sequences into at most so many pieces, so exactly as
many: with twice as many backward takes more time than forward gains where nothing forgets."""


def one_kernel_computes(call: Call) -> bool:
    """Whether one kernel can compute the call. It is chosen by the batch, so a batch-invariant call
    takes others; so does a part of a rank, whose first scan leaves what `prepare` has made to the
    second one; and a decay per channel."""
    alone = not (call.batch_invariant or call.context_parallel or call.per_channel)
    return alone and call.v.shape[3] == 2 * ROWS and call.sequences > 0


def one_kernel_length(call: Call) -> int | None:
    """Tokens of a piece that one kernel scans; None if it does not cut sequences.

    There are as many pieces as keep all SMs busy. The lengths of packed sequences are not known
    here, and one may have nearly all tokens: they are cut as if one did.
    """
    T, HV, sms = call.q.shape[1], call.v.shape[2], sm_count(call.q.device)
    packed = call.cu_seqlens is not None
    pieces = sms // max(HV * (1 if packed else call.sequences), 1)  # of the longest sequence
    chunks = -(-T // (CHUNK * max(pieces, 1)))
    few = 2 * call.sequences * HV <= sms
    return chunks * CHUNK if few and pieces >= MIN_PIECES and chunks >= MIN_PIECE_CHUNKS else None


def saved_length(call: Call) -> int | None:
    """Tokens of a piece where backward follows, which scans the same pieces as forward. None if
    sequences are not cut.

    Packed calls take `prepare` and `scan`: one kernel leaves no M of a sequence without tokens.
    """
    length, shorter = piece_length(call, ROWS), one_kernel_length(call)
    if length is None or shorter is None:
        return length
    dense = call.cu_seqlens is None and one_kernel_computes(call)
    return shorter if dense and call.q.shape[1] <= MAX_SAVED_PIECES * shorter else length
