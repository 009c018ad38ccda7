"""Whether calls are batch-invariant: a sequence gets the same bits whatever is computed beside it.

Precedence: batch_invariant context > set_batch_invariant > GDN_BATCH_INVARIANT (read at call time)
    > off. docs/serving.md says what is promised, and what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gdn.environment import Variable

_default: bool | None = None
_context: ContextVar[bool | None] = ContextVar("gdn_batch_invariant", default=None)
_variable = Variable("GDN_BATCH_INVARIANT")


def is_batch_invariant() -> bool:
    """Whether a call that is made now is batch-invariant. torch.compile treats it as a constant,
    with its value while tracing."""
    from_context = _context.get()
    if from_context is not None:
        return from_context
    if _default is not None:
        return _default
    value = _variable.read()
    if value not in (None, "0", "1"):
        raise ValueError(f"GDN_BATCH_INVARIANT must be 0 or 1, got {value!r}")
    return value == "1"


# the mark that torch.compiler.assume_constant_result sets; the decorator imports Dynamo and Triton
is_batch_invariant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Within the block (and this thread or task), calls of gdn's ops are batch-invariant, or with
    enabled=False are not.

    A sequence then gets the same bits alone, in any batch, packed among others, and prefilled in
    parts that end at multiples of 64 tokens (from float32 states); a decode step the same among any
    others. Gradients of a sequence's own inputs are the same too; those of A_log and dt_bias are
    sums over the batch. Not the same: prefill and decode, and other backends, devices and versions.
    Backends that cannot promise it refuse (BackendUnsupportedError); with cp= the call raises.

    torch.compile fixes the mode when it traces a call: put the block around the compiled function's
    first call. Activation checkpointing runs forward again in backward, in other threads too: use
    `set_batch_invariant` there.
    """
    token = _context.set(_checked(enabled))
    try:
        yield
    finally:
        _context.reset(token)


def set_batch_invariant(enabled: bool | None) -> None:
    """Make calls in the whole process batch-invariant, or not; None: as GDN_BATCH_INVARIANT says.
    `batch_invariant` says what that means."""
    global _default
    _default = None if enabled is None else _checked(enabled)


def _checked(enabled: object) -> bool:
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    return enabled
