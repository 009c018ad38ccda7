"""Sequences that are cut into pieces: how long these are, and the launches that scan them.

    first_chunks     where the transfer scan may start (training, and a rank's part)
    scan             the transfer scan
    combine_pieces   the states between pieces
    scan             the final scan

A rank exchanges states with others (`gdn.exchange`) before `combine_pieces`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn.exchange import Exchange, PieceMaps
from gdn.problem import CHUNK, Call

from ...common.chunking import piece_length, piece_slots
from ..arguments import search_job
from ..kernels import Job, combine_pieces, scan
from ..piece_lengths import saved_length
from ..tile.layout import ROWS
from ..tile.pool_kind import slot_tables

MIN_HALF_PIECE_CHUNKS = 32
"""Pieces are halved only if the halves have at least this many chunks."""


def choose_pieces(call: Call, save: bool) -> tuple[int | None, int]:
    """Tokens of a piece (None: sequences are not cut), and consumer warpgroups of the final scan.

    Long pieces are halved: as many thread blocks, with twice the columns of V each, read q, k, P
    and A_v half as often. With save they stay whole, since backward's thread blocks have 64
    columns, or are those of one kernel (`piece_lengths.py`): backward uses the same pieces.
    """
    length = saved_length(call) if save else piece_length(call, ROWS)
    half = -(-(length or 0) // (2 * CHUNK)) * CHUNK
    if save or call.v.shape[3] == ROWS or half < MIN_HALF_PIECE_CHUNKS * CHUNK:
        return length, 1
    return half, 2


def piece_shapes(call: Call, save: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """If sequences are cut: the transfer matrices of all pieces, and the state that each starts
    from (`combine_pieces.py`)."""
    length, _ = choose_pieces(call, save)
    if length is None:
        return []
    pieces, (HV, V), K = piece_slots(call, length), call.v.shape[2:], call.q.shape[3]
    return [((pieces, HV, rows, K), torch.float32) for rows in (V + K, V)]


def piece_jobs(call: Call, options: dict[str, Any], warpgroups: int, save: bool) -> list[Job]:
    """The kernels of `scan_pieces`, in their order, with their static options. options: of `scan`,
    for the call; warpgroups: of the final scan."""
    part = call.context_parallel
    # The search takes time, which calls that save nothing would not get back where nothing decays;
    # where their pieces are long, they are those of one kernel (`fused_plan.py`).
    forgetting = save or part
    options = options | {"warpgroups": 1, "cut": True}
    transfer = options | {"final": True, "transfer": True, "forgetting": forgetting}
    if part:  # its states come after the transfer scan
        transfer |= {"initial": False}
    combine = {
        name: options[name]
        for name in ("offsets", "K", "V", "varlen", "initial", "v_first", "pool")
    } | {"final": False, "reverse": False, "forgetting": False, "late": part}
    return [
        *([search_job(call, reverse=False)] if forgetting else []),
        (scan, transfer), (combine_pieces, combine),
        (scan, options | {"initial": True, "warpgroups": warpgroups}),
    ]  # fmt: skip


def scan_pieces(
    launch: list[Callable[..., None]], inputs: tuple[Any, ...], searched: tuple[Any, ...],
    initial: Tensor | None, cu_seqlens: Tensor | None, buffers: list[Tensor], o: Tensor,
    final: Tensor | None, tables: tuple[Any, ...], sizes: tuple[int, int, int], save: bool,
    exchange: Exchange | None,
) -> None:  # fmt: skip
    """Launch them. searched: what the search reads; buffers: those of `piece_shapes`; sizes:
    sequences, tokens of each or of all, tokens of a piece."""
    (transfer, starts), (N, T, length) = buffers, sizes
    pieces, first, ends = transfer.shape[0], None, int(save)
    *launch_search, launch_transfer, launch_combine, launch_final = launch
    for search in launch_search:
        first = transfer.new_empty(transfer.shape[:2], dtype=torch.int32)
        search(*searched, first, N, length)
    if exchange:
        ends = 2
    grid = (N, pieces, length)
    launch_transfer(*inputs, initial, cu_seqlens, o, transfer, first, *tables, *grid, ends, 0)
    if exchange:
        initial = exchange(PieceMaps(transfer, None, length))()
    launch_combine(
        transfer, None, None, starts, initial, None, cu_seqlens, *slot_tables(tables), N, T, length
    )
    launch_final(*inputs, starts, cu_seqlens, o, final, None, *tables, *grid, 0, 0)
