"""How many threads share a state in decode, and how: chosen from shapes alone."""

from __future__ import annotations

from typing import NamedTuple


class ThreadShape(NamedTuple):
    """How the threads of a thread block share a state: `lanes` threads along its contiguous
    dimension, `rows` rows a thread along the other one; at least `resident` thread blocks an SM."""

    threads: int
    lanes: int
    rows: int
    resident: int = 1


def choose_shape(states: int, K: int, V: int, vec: int, v_first: bool) -> ThreadShape:
    """The thread shape for so many states at once, with `vec` elements a load. K, V: multiples of
    32.

    Measured on an H200 (docs/log/tilelang-decode.md): whole rows of V where there are enough
    states, few columns of V a thread block where there are few.
    """
    few = states < 128
    if v_first:
        lanes = _power_of_2_in(K // vec, 8 if few else 16)
        rows = _power_of_2_in(V, min(1 if few else 8, 64 * lanes // K, V * lanes // 32))
        threads = lanes * _power_of_2_in(V // rows, (32 if few else 128) // lanes)
        return ThreadShape(threads, lanes, rows, 1 if few else 4)
    if states < 32:
        lanes, rows, resident = 2, 8, 1
    elif states < 2048:
        lanes, rows, resident = 8, 8, 4
    else:
        lanes, rows, resident = 32, 64 // vec, 2
    lanes = _power_of_2_in(V // vec, lanes)
    rows = _power_of_2_in(K, min(rows, K * lanes // 32))
    while K // rows * lanes % 32:  # whole warps share a sum
        rows //= 2
    return ThreadShape(lanes * K // rows, lanes, rows, resident)


def _power_of_2_in(n: int, limit: int) -> int:
    """The largest power of 2 that divides n and is at most `limit`."""
    power = n & -n
    while power > limit:
        power //= 2
    return power
