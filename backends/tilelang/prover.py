"""Compiles without Z3's theory of integers, which proves next to nothing here and takes half of the
time of TileLang's passes.

Passes ask whether index expressions are equal or in range. What TVM's own rules do not decide goes
to Z3: 3764 questions for `prepare`, of which it proves none, and 6562 for `gradients`, of which it
proves four. Without the theory it answers at once that it does not know. A pass then keeps what it
would keep without a proof, so the code is right either way, and tests compare the code of both.

The setting is one of the process. Other compiles of TileLang wait meanwhile: they may place
barriers, and then Z3 finds how many threads arrive at each. While one of them runs, kernels here
compile with the theory. Meanwhile z3 answers "unknown" to questions about integers from any code of
the process. A fork starts with the usual setting.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import z3
from tilelang.instrumentation import PassInstrumentationTool, register_pass_instrumentation_tool

SETTING = "smt.arith.solver"
WITHOUT = "0"

_here = threading.local()
_before = ""
_changed = threading.Condition()
_quick = 0
_others = 0


class _OtherCompile(PassInstrumentationTool):
    """Stands for a compile that must have all of Z3, from its begin to its end."""

    def __init__(self) -> None:
        global _others
        self.counted = not getattr(_here, "quick", False)
        if self.counted:
            with _changed:
                _changed.wait_for(lambda: not _quick)
                _others += 1

    def finish(self, error: BaseException | None) -> None:
        global _others
        if self.counted:
            with _changed:
                _others = max(0, _others - 1)  # of a fork in between, it is 0 already
                _changed.notify_all()


def _begin_anew() -> None:
    """In a forked process: the threads that compiled, or held the lock, are not there."""
    global _changed, _quick, _others
    if _quick:
        z3.set_param(SETTING, _before)
    _changed, _quick, _others = threading.Condition(), 0, 0
    _here.quick = False


register_pass_instrumentation_tool("gdn", _OtherCompile)
os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def without_integers() -> Iterator[None]:
    """Compile in this thread without Z3's theory of integers, unless another compile needs it."""
    global _before, _quick
    with _changed:
        quick = not _others
        if quick:
            if not _quick:
                _before = z3.get_param(SETTING)
                z3.set_param(SETTING, WITHOUT)
            _quick += 1
    before, _here.quick = getattr(_here, "quick", False), quick
    try:
        yield
    finally:
        _here.quick = before
        if quick:
            with _changed:
                _quick = max(0, _quick - 1)
                if not _quick:
                    z3.set_param(SETTING, _before)
                _changed.notify_all()
