"""fla's arguments in gdn's terms, and what of them gdn does not take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from gdn.context_parallel import ContextParallel
from gdn.integrations.fla_context import context_parallel

TOKENS = ("q", "k", "v", "g", "beta")
FLAGS = (
    "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval", "state_v_first",
)  # fmt: skip
LENGTHS = ("cu_seqlens", "cu_seqlens_cpu")
GATE = ("A_log", "dt_bias", "lower_bound")
WITHOUT_EFFECT = ("chunk_size", "chunk_indices", "safe_gate", "disable_recompute", "max_num_seqs")
"""fla's choices among its kernels, on which results do not depend."""
_KNOWN = frozenset(
    (*TOKENS, *FLAGS, *LENGTHS, *GATE, *WITHOUT_EFFECT, "scale", "initial_state",
     "output_final_state", "cp_context")
)  # fmt: skip


class Entry(NamedTuple):
    """One of fla's functions: the names of its positional arguments, and which op it is."""

    names: tuple[str, ...]
    per_channel: bool
    step: bool


def describe_entry(function: Callable[..., Any], per_channel: bool, step: bool) -> Entry:
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return Entry(names, per_channel, step)


class Arguments(NamedTuple):
    """A call of fla's in gdn's terms."""

    tokens: dict[str, Any]
    options: dict[str, Any]
    initial_state: Tensor | None
    output_final_state: bool
    cp: ContextParallel | None


def read(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """fla's arguments as gdn takes them; ValueError with the reason if gdn cannot take the call."""
    if len(args) > len(entry.names):
        raise ValueError(f"{len(args)} positional arguments")
    given = dict(zip(entry.names, args, strict=False)) | kwargs
    unknown = [n for n, x in given.items() if n not in _KNOWN and x is not None and x is not False]
    if unknown:
        raise ValueError(f"gdn does not know {', '.join(unknown)}")
    tokens = {name: given[name] for name in TOKENS}
    if entry.per_channel != (tokens["g"] is not None and tokens["g"].dim() == 4):
        raise ValueError("g has another number of dimensions")
    if tokens["beta"].dim() != 3:
        raise ValueError("beta has another number of dimensions")
    if entry.step and not entry.per_channel:  # it has no flag of its own for the gate
        given["use_gate_in_kernel"] = given.get("A_log") is not None
    options: dict[str, Any] = {name: bool(given.get(name, False)) for name in FLAGS}
    cp = _read_context(entry, given)
    if cp is None:
        options |= {name: given[name] for name in LENGTHS if given.get(name) is not None}
    options["scale"] = given.get("scale")
    if options["use_gate_in_kernel"]:
        A_log, dt_bias, bound = map(given.get, GATE)
        if given.get("safe_gate") and bound is None:
            raise ValueError("safe_gate needs a lower_bound")
        options |= {"A_log": A_log, "dt_bias": dt_bias, "gate_lower_bound": bound}
    output = bool(given.get("output_final_state", False))
    return Arguments(tokens, options, given.get("initial_state"), output, cp)


def _read_context(entry: Entry, given: dict[str, Any]) -> ContextParallel | None:
    """The `cp` of a call. Its lengths take the place of the call's own, as in fla."""
    context = given.get("cp_context")
    if context is None:
        return None
    if entry.step:
        raise ValueError("cp_context is for the chunked functions only")
    for name in ("initial_state", "output_final_state"):
        if given.get(name) is not None and given[name] is not False:
            raise ValueError(f"{name} must come without cp_context, as in fla")
    return context_parallel(context)
