"""What kernels of backward read and write, as `plan.py` hands it over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Tensors [B, T, ...] of a round. If `gradients` runs, dv is the stored R until it is done."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    do: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor
    beta: Tensor


class Chunks(NamedTuple):
    """Tensors [slots, ...] of a round; dA_log and ddt_bias as partial sums."""

    G_beta: Tensor | None
    norms: Tensor | None
    A: Tensor  # with a decay per channel P and A
    dA_log: Tensor | None
    ddt_bias: Tensor | None


class States(NamedTuple):
    """States [sequences, ...] of a round, in the layout of the call. None: zero, or not wanted."""

    begin: Tensor | None  # before the round's first chunks
    d_end: Tensor | None  # gradient of the state after its last chunks
    d_begin: Tensor | None  # gradient of `begin`


class Scratch(NamedTuple):
    """What the scans of a round write for its `gradients`. dS and rowsum_RV are None where
    `reverse_gradients` keeps them on the SMs."""

    S: Tensor  # S^T before every chunk [slots, HV, V, K]
    dS: Tensor | None  # dS^T after every chunk [slots, HV, V, K]
    U: Tensor  # U^T [slots, HV, V, C]
    rowsum_RV: Tensor | None  # float32 [slots, HV, V / 64, C]
    row_scales: Tensor  # of S^T and U^T, float32 [slots, HV, V / 64, 64]; float16 only, else empty
    decayed_rows: Tensor | None  # with a decay per channel: see `prepare_channels`
    factors: Tensor | None


class Common(NamedTuple):
    """Arguments of the call that all rounds share."""

    A_log: Tensor | None
    dt_bias: Tensor | None
    cu_seqlens: Tensor | None
    chunk_spans: Tensor | None
    scale: float
