"""The shapes that are timed, in the notation of `--shapes`: heads, a colon, sequences.

    16/32:1x8192       H = 16, HV = 32; one sequence of 8192 tokens (K = V = 128)
    16/32/64:8x1024    K = V = 64; a batch of eight
    2/8:1024+7168      packed sequences of these lengths
    2/8:64x1-300       64 packed sequences of 1 to 300 tokens, as a server batches them
    2/8|4/16:1x2048|1x8192    each choice of heads with each choice of sequences
    grid               the rows that kernels are tuned on

The predefined sets have the linear-attention heads of Qwen3-Next, Qwen3.5 and Qwen3.6 (H/HV 16/16,
16/32, 16/48, 16/64) under tensor parallelism over 1 to 8 GPUs.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from gdn.testing import Case, Gates
from gdn.testing.decode import StepCase

SHAPE = re.compile(r"(\d+)/(\d+)(?:/(\d+))?:(?:(\d+)x(\d+)(?:-(\d+))?|(\d+(?:\+\d+)+))")
RAGGED = "+".join(str(n) for n in (1, 4000, 37, 129, 2048, 64, 700, 1213))


Norm = Literal["fused", "no"]
"""The L2 norm of q and k: within the op, or none, with rows of length 1. A peer whose own norm is
not part of its kernels spends more time on "fused"."""


Decay = Literal["head", "channel", "bounded"]
"""Of a value head, of each channel of K, or of each channel with a lower bound of `LOWER_BOUND`."""
CONDITIONS = (("fused", "head"), ("no", "head"), ("fused", "channel"), ("fused", "bounded"))
"""What is timed of a norm and a decay: with a decay per channel all is fused."""
LOWER_BOUND = -5.0


class Selection(NamedTuple):
    """Shapes, gates and norms of prefill; batch sizes and heads of decode."""

    shapes: str
    gates: tuple[Gates, ...]
    norms: tuple[Norm, ...]
    batches: tuple[int, ...]
    decode_heads: tuple[str, ...]


GRID = (
    "2/8|4/16|8/32|16/16|16/32|16/48|16/64|32/32:1x2048|1x8192|1x32768|4x8192|8x1024|16x2048|"
    "28672+4096|64x1-300"
)
"""Heads under tensor parallelism; one and many sequences, of equal and of unequal length."""

SELECTIONS = {
    ("cuda", "quick"): Selection(
        "16/32:1x2048|1x8192", ("model",), ("fused",), (1, 64), ("16/32",)
    ),
    ("cuda", "default"): Selection(
        "16/32:1x512|1x2048|1x8192|1x32768|8x1024|1024+7168,2/8|16/64:1x2048|1x8192|1x32768",
        ("model",),
        ("fused", "no"),
        (1, 8, 64, 256),
        ("16/32",),
    ),
    ("cuda", "full"): Selection(
        f"{GRID},16/32|2/4|2/8:1x512|1x1024|1x4096|1x16384|1x65536|1x131072,4/8|8/16:1x8192,"
        f"16/32:64x512|{RAGGED},16/32/64:1x8192,16/32/256:1x8192",
        ("fast", "model", "mixed", "none"),
        ("fused", "no"),
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        ("2/8", "16/32", "16/64"),
    ),
    ("cpu", "quick"): Selection("4/8:1x512", ("model",), ("fused",), (1, 8), ("4/8",)),
    ("cpu", "default"): Selection(
        "4/8:1x512|1x2048|4x512|300+700+24", ("model",), ("fused",), (1, 8, 32), ("4/8",)
    ),
    ("cpu", "full"): Selection(
        f"4/8:1x512|1x2048|1x8192|4x512|{RAGGED},4/8/64|4/8/256:1x2048",
        ("model", "mixed", "none"),
        ("fused",),
        (1, 8, 32),
        ("4/8",),
    ),
}


MIXED = "256x1+4x2048"
"""256 requests with one token, and 4 prompts."""
POOL_SHAPES = {
    ("cuda", "prefill"): "2/8|16/32|16/64:1x8192|4x8192|8x1024|64x1-300",
    ("cuda", "checkpoints"): "16/32:1x8192|8x1024",
    ("cuda", "mixed"): f"2/8:{MIXED},16/32:{MIXED},16/64:{MIXED}",
    ("cpu", "prefill"): "4/8:1x512|300+700+24",
    ("cpu", "checkpoints"): "4/8:300+700+24",
    ("cpu", "mixed"): f"2/4:{MIXED}",
}
"""Calls on a pool (`test_pool.py`)."""


def _parse(shape: str) -> tuple[str, ...]:
    match = SHAPE.fullmatch(shape)
    if match is None:
        raise ValueError(f"a shape must be like 16/32:1x8192 or 2/8:100+28, got {shape!r}")
    return match.groups()


def expand(text: str) -> list[str]:
    """The shapes of a selection in order; "grid" is `GRID`. ValueError if one is malformed."""
    found = []
    for group in (GRID if text == "grid" else text).split(","):
        heads, colon, sequences = group.strip().partition(":")
        for pair in itertools.product(heads.split("|"), sequences.split("|")):
            found.append(colon.join(pair))
            _parse(found[-1])
    return list(dict.fromkeys(found))


def _options(decay: Decay) -> dict[str, Any]:
    bound = LOWER_BOUND if decay == "bounded" else None
    return {"per_channel": decay != "head", "gate_lower_bound": bound}


def make_case(
    shape: str, gates: Gates, dtype: torch.dtype, norm: Norm = "fused", decay: Decay = "head"
) -> Case:
    """The call of a shape, with initial and final state [V, K]. With a decay per head gates are
    finished, as every backend and peer takes them; per channel all is fused, as FlashKDA needs."""
    H, HV, K, B, T, longest, packed = _parse(shape)
    sizes: dict[str, Any] = {"H": int(H), "HV": int(HV), "K": int(K or 128), "V": int(K or 128)}
    lengths: tuple[int, ...] | None = None
    if longest:
        shortest, count = int(T), int(B)
        step = (int(longest) - shortest) / max(count - 1, 1)
        lengths = tuple(shortest + round(step * (37 * n % count)) for n in range(count))
    elif packed:
        lengths = tuple(int(n) for n in packed.split("+"))
    if lengths:
        sizes |= {"B": 1, "T": sum(lengths)}
    else:
        sizes |= {"B": int(B), "T": int(T)}
    return Case(
        shape, **sizes, lengths=lengths, dtype=dtype, gates=gates, l2norm=norm == "fused",
        state_v_first=True, fused=decay != "head", **_options(decay),
    )  # fmt: skip


def make_pool_case(shape: str, dtype: torch.dtype) -> Case:
    """The tokens of a prefill on a pool, always packed, with everything fused."""
    every = "+".join(["1"] * 256 + ["2048"] * 4)
    case = make_case(shape.replace(MIXED, every), "model", dtype)
    lengths = case.lengths or (case.T,) * case.B
    case = replace(case, B=1, T=sum(lengths), lengths=lengths, name=shape)
    return replace(case, l2norm=False, fused=True)


def make_step_case(heads: str, batch: int, dtype: torch.dtype, decay: Decay = "head") -> StepCase:
    """One token for each of `batch` requests, everything fused, states [V, K] in float32."""
    H, HV = (int(n) for n in heads.split("/"))
    return StepCase(
        f"{heads}:{batch}x1",
        B=batch,
        H=H,
        HV=HV,
        K=128,
        V=128,
        dtype=dtype,
        gates="model",
        fused=True,
        state_v_first=True,
        full=True,
        **_options(decay),
    )
