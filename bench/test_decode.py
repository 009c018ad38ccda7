"""Decode: one token for each of many requests, states updated in place. Bandwidth sets the time."""

from __future__ import annotations

from typing import Any

from shapes import make_step_case
from suite import DTYPE

from gdn.compare.decode import DECODE
from gdn.compare.roofline import least_step_work


def test_decode(record_pass: Any, heads: str, batch: int, decay: Any, backend: str) -> None:
    case = make_step_case(heads, batch, DTYPE, decay)
    least = least_step_work(case)
    record_pass(case, backend, (DECODE,), DECODE, least, decay, kind="decode", batch=batch)
