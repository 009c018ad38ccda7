"""Compiles without Z3's theory of integers, which proves next to nothing here and takes half of the
time of TileLang's passes.

Passes ask whether index expressions are equal or in range. What TVM's own rules do not decide goes
to Z3: 3764 questions for `prepare`, of which it proves none, and 6562 for `gradients`, of which it
proves four. Without the theory it answers at once that it does not know. A pass then keeps what it
would keep without a proof, so the code is right either way, and tests compare the code of both.

The setting is one of the process. Other compiles of TileLang in it, which may count threads by Z3,
wait meanwhile; while one of them runs, kernels here compile with the theory.
"""

from __future__ import annotations

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
                _others -= 1
                _changed.notify_all()


register_pass_instrumentation_tool("gdn", _OtherCompile)


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
    _here.quick = quick
    try:
        yield
    finally:
        _here.quick = False
        if quick:
            with _changed:
                _quick -= 1
                if not _quick:
                    z3.set_param(SETTING, _before)
                _changed.notify_all()
