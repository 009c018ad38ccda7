"""Plans of peers that take other tensors than the op does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn.backend import Plan
from gdn.problem import Call


class ConvertingPlan(Plan):
    """The plan of every call. It keeps what it converted until a tensor of the call changes, so
    that timed calls leave the conversions out; the benchmarks report their time apart."""

    def __init__(self) -> None:
        self._kept: tuple[list[tuple[Tensor, int]], dict[str, Any]] | None = None

    def convert(self, call: Call) -> dict[str, Any]:
        """The call's tensors as the peer takes them, "initial_state" among them."""
        raise NotImplementedError

    def restore(self, call: Call, state: Tensor) -> Tensor:
        """The peer's final state as the op returns it."""
        return state

    def converted(self, call: Call) -> dict[str, Any]:
        """`convert`, or what it returned last, if the tensors are the same and unchanged."""
        given = [(x, x._version) for x in call if isinstance(x, Tensor)]
        if self._kept is not None:
            last, found = self._kept
            if len(last) == len(given) and all(
                x is y and n == m for (x, n), (y, m) in zip(last, given, strict=True)
            ):
                return found
        self._kept = given, self.convert(call)
        return self._kept[1]
