"""The shared cases: what the tests cross-validate, the benchmarks time and `gdn compare` runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Gates = Literal["mixed", "none", "weak", "strong", "model", "fast", "resets", "steep"]


TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 1.6e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-10,
}
"""Tolerance of outputs and gradients against the float64 definition, by dtype: for the relative RMS
error, and for elementwise comparison."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of call. `lengths` packs sequences along T (then B = 1 and T is their sum).

    gates: "none" is g = 0, "weak" about -1e-3, "strong" about -20, "mixed" a spread from 0 to -5,
        "fast" those of a new layer in transformers (`gdn.definition.initialize_gates`), about -10,
        "model" the same with Mamba's steps of 1e-3 to 0.1, about -0.2, as fla's layer begins,
        "resets" as mixed with some -inf, -1e9 and -200, "steep" (with fused only) an A_log whose
        exponential overflows while softplus is close to zero. With fused, the raw gates are normal
        numbers ("strong": 15 larger).
    per_channel: a decay for each channel of K. In "mixed" gates a third of the channels then never
        decays, and some decay at once; "model" is a freshly initialised Kimi Linear layer's.
    gate_lower_bound: that of the fused gate; with "strong" gates it is reached.
    cosine: the mean cosine between keys. key_norm: the norm of keys, if none is fused.
    beta: that of every token, instead of random ones.
    l2norm: turns the fused L2 norm on. fused: turns on the fused L2 norm, gate and beta sigmoid,
        with raw inputs.
    """

    name: str
    T: int = 0
    B: int = 1
    H: int = 2
    HV: int = 2
    K: int = 64
    V: int = 64
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    gates: Gates = "mixed"
    cosine: float = 0.0
    key_norm: float = 1.0
    beta: float | None = None
    initial_state: bool = True
    state_v_first: bool = False
    l2norm: bool = False
    fused: bool = False
    allow_neg_eigval: bool = False
    per_channel: bool = False
    gate_lower_bound: float | None = None

    @property
    def tokens(self) -> int:
        """T, or the sum of the packed lengths."""
        return self.T if self.lengths is None else sum(self.lengths)

    @property
    def needs_resets(self) -> bool:
        """Whether only a backend that claims `resets` keeps the digits."""
        return self.gates in ("resets", "steep")

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return self.B if self.lengths is None else len(self.lengths)


CASES = (
    Case("one-token", T=1),
    Case("chunk-minus-one", T=63),
    Case("chunk", T=64, initial_state=False),
    Case("chunk-plus-one", T=65, B=2),
    Case("grouped-heads", T=200, H=2, HV=4, B=2),
    Case("grouped-heads-v-first", T=130, H=1, HV=3, state_v_first=True),
    Case("head-dim-128", T=150, K=128, V=128, HV=4),
    Case("wide-keys", T=100, K=128, V=64),
    Case("narrow-keys-v-first", T=100, K=32, V=64, state_v_first=True),
    Case("odd-head-dims", T=70, K=20, V=36),
    Case("packed", lengths=(0, 70, 1, 64, 0, 129), HV=4),
    Case("packed-v-first-fused", lengths=(33, 128, 5), state_v_first=True, fused=True),
    Case("packed-nothing", lengths=(0, 0), H=1, HV=1),
    Case("wide-values", T=70, H=1, K=128, V=256),
    Case("olmo-head-dims", lengths=(33, 70), K=96, V=192, state_v_first=True, fused=True),
    Case("fused", T=130, HV=4, fused=True),
    Case("fused-negative-eigenvalues", T=100, fused=True, allow_neg_eigval=True),
    Case("model-gates", T=200, fused=True, gates="model"),
    Case("no-decay", T=130, gates="none"),
    Case("weak-decay", T=130, gates="weak"),
    Case("strong-decay", T=130, gates="strong"),
    Case("resets", T=200, HV=4, gates="resets"),
    Case("resets-packed", lengths=(70, 3, 129), gates="resets"),
    Case("steep-gates", T=130, HV=4, fused=True, gates="steep"),
    Case("correlated-keys", T=130, gates="weak", cosine=0.9),
    Case("lower-bound", T=70, HV=4, fused=True, gate_lower_bound=-5.0),
    *(
        replace(case, name=f"channels-{case.name}", per_channel=True)
        for case in (
            Case("one-token", T=1, K=20, V=36),
            Case("grouped-heads", T=65, H=1, HV=2, B=2),
            Case("v-first", T=70, K=20, V=36, state_v_first=True),
            Case("packed-fused", lengths=(33, 70, 0, 5), K=32, V=32, fused=True),
            Case("model", T=70, K=128, V=64, H=1, fused=True, gates="model"),
            Case("wide-values", T=70, H=1, HV=2, K=96, V=256, fused=True, gates="model"),
            Case("lower-bound", T=70, HV=4, K=32, V=32, fused=True, gate_lower_bound=-5.0),
            Case("bounded-128", T=70, H=1, K=128, V=128, fused=True, gate_lower_bound=-5.0),
            Case("at-lower-bound", T=70, fused=True, gates="strong", gate_lower_bound=-5.0),
            Case("no-decay", T=70, gates="none"),
            Case("weak-decay", T=70, gates="weak"),
            Case("strong-decay", T=70, gates="strong"),
            Case("resets", T=130, H=1, HV=2, K=32, V=32, gates="resets"),
            Case("correlated-keys", T=70, gates="weak", cosine=0.9),
        )
    ),
)
"""The suite's cases, small enough for Triton's interpreter."""

CLOSE_KEYS = (
    *(
        Case(
            f"cosine-{cosine:g}-beta-{beta:g}", T=100, H=1, HV=8, gates="weak", cosine=cosine,
            beta=beta,
        )
        for cosine in (0.9, 0.95, 1.0)
        for beta in (0.5, 1.0, 1.5, 2.0)
    ),
    Case(
        "long-equal-keys", T=100, H=1, HV=8, gates="weak", cosine=1.0, key_norm=2**0.5, beta=1.0
    ),
)  # fmt: skip
"""Keys close to each other, up to equal ones: a run of repeated tokens in a first layer. With
beta k.k > 1 rounding alone exceeds `TOLERANCE`, so `tests/test_close_keys.py` has another bound.
Errors of all columns of a value head depend on how its inverse is rounded, so there are eight."""
