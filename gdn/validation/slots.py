"""Checks of the values of slot tables, on the CPU alone. On a GPU they change with every call, and
even an assertion would take longer than a step; there a slot outside the pool counts as null_index,
and two writers of a slot are a race."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from gdn.problem import CHUNK, PoolCall, Prefill, Step, is_live

from .values import has_values


def check_slots(given: PoolCall) -> None:
    """ValueError if two sequences write one slot, or one starts from a slot that another one
    writes; of a `Step` also if a slot is outside the pool or a count of accepted tokens outside the
    table; of a `Prefill` if a checkpoint's offset is not a multiple of 64 within the sequence.

    Several sequences of a step may start from one slot that none writes, as the branches of a
    prefix do.
    """
    if given.call.q.is_cpu and has_values(given.call.q):
        if isinstance(given, Step):
            _check_step(given)
        else:
            _check_prefill(given)


def _rows(table: Tensor) -> list[list[int]]:
    """The rows of a table [N] or [N, columns]."""
    return table.view(-1, 1).tolist() if table.dim() == 1 else table.tolist()


def _lengths(given: PoolCall) -> list[int]:
    """The number of tokens of each sequence."""
    call = given.call
    if call.cu_seqlens is None:
        return [call.q.shape[1]] * call.sequences
    return call.cu_seqlens.diff().tolist()


def _check_range(name: str, table: Tensor, slots: int, null: int) -> None:
    for slot in table.flatten().tolist():
        if slot != null and not 0 <= slot < slots:
            raise ValueError(
                f"{name} must lie in 0..{slots - 1}, or be null_index = {null}, "
                f"got {slot}; the pool has {slots} slots"
            )


def _find_writers(name: str, written: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The sequence that writes each slot, from pairs of a sequence and a slot."""
    writers: dict[int, int] = {}
    for n, slot in written:
        if slot in writers:
            raise ValueError(
                f"{name} must name each slot that is written once, got {slot} twice; "
                "two states would be written to one slot"
            )
        writers[slot] = n
    return writers


def _check_step(step: Step) -> None:
    indices, null = step.state_indices, step.null_index
    slots = list(range(step.call.sequences))
    if indices is not None:
        _check_range("state_indices", indices, step.state.shape[0], null)
        rows = zip(_rows(indices), _columns(step), strict=True)
        slots = [row[column] if row else null for row, column in rows]  # T = 0: perhaps no column
    starts = [None if slot == null else slot for slot in slots]  # None: skipped
    table, states = step.written_table, step.output_states
    if table is None:
        return
    name = "state_indices" if states is None else "output_indices"
    if states is not None:
        _check_range(name, table, states.shape[0], null)
    written = []
    for n, (row, tokens) in enumerate(zip(_rows(table), _lengths(step), strict=True)):
        if starts[n] is not None:
            first = step.first_column if step.speculative else 0
            into = row[first : first + tokens] if step.speculative else row
            written += [(n, slot) for slot in into if slot != null]
    writers = _find_writers(name, written)
    for n, slot in enumerate(starts):
        if states is None and slot is not None and writers.get(slot, n) != n:
            raise ValueError(
                "state_indices must not start a sequence from a slot that another one writes, got "
                f"{slot}; copy that state to a free slot first"
            )


def _columns(step: Step) -> list[int]:
    """The column of state_indices that each sequence starts from."""
    accepted, indices = step.num_accepted_tokens, step.state_indices
    if accepted is None or indices is None:
        return [0] * step.call.sequences
    counts: list[int] = accepted.tolist()
    lowest = int(not step.leading_column)
    highest = indices.shape[1] - 1 + lowest
    limit = f"T = {highest}" if step.call.cu_seqlens is None else f"{highest}"
    for count in counts:
        if not lowest <= count <= highest:
            raise ValueError(
                f"num_accepted_tokens must lie in {lowest}..{limit}, got {count}; "
                "it picks a column of state_indices"
            )
    return [count - lowest for count in counts]


def _check_prefill(prefill: Prefill) -> None:
    lengths, indices, fresh = _lengths(prefill), prefill.state_indices, prefill.fresh
    slots = list(range(len(lengths))) if indices is None else indices.tolist()
    zeroed = [False] * len(lengths) if fresh is None else fresh.tolist()
    pool, null = prefill.state, prefill.null_index
    live = [n for n, slot in enumerate(slots) if is_live(slot, pool, null)]
    written = [(n, slots[n]) for n in live if lengths[n] or zeroed[n]]
    offsets, table = prefill.checkpoint_offsets, prefill.checkpoint_indices
    if offsets is not None:
        rows = _rows(offsets)
        for n in live:
            for offset in rows[n]:
                if not 0 <= offset <= lengths[n] or offset % CHUNK:
                    raise ValueError(
                        f"checkpoint_offsets must be multiples of {CHUNK} up to the sequence's "
                        f"length {lengths[n]}, or 0 for none, got {offset}; round it down"
                    )
        if table is not None:
            pairs = zip(rows, _rows(table), strict=True)
            wanted = [[slot for at, slot in zip(*row, strict=True) if at] for row in pairs]
            stored = ((n, slot) for n in live for slot in wanted[n])
            written += [(n, slot) for n, slot in stored if is_live(slot, pool, null)]
    _find_writers("state_indices and checkpoint_indices", written)
