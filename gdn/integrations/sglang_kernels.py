"""SGLang's calls of a linear attention kernel in gdn's terms. SGLang itself is not needed here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gdn.problem import CHUNK
from gdn.serving import gated_delta_net_decode, gated_delta_net_prefill

RAW: dict[str, Any] = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "state_v_first": True,
}
"""Options of a step: gates and beta come as the model projects them."""
GATED: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "state_v_first": True}
"""Options of a prefill: SGLang has computed the decay and beta."""


def split_projection(mixed: Tensor, HV: int, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [..., H, K] and v [..., HV, V], as views of [..., 2 H K + HV V]."""
    widths = [(mixed.shape[-1] - HV * V) // 2] * 2 + [HV * V]
    q, k, v = (
        x.view(*x.shape[:-1], x.shape[-1] // size, size)
        for x, size in zip(torch.split(mixed, widths, -1), (K, K, V), strict=True)
    )
    return q, k, v


@functools.cache
def _kept(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    found = torch.arange(n, dtype=dtype, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it too
    return found


def count(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 to n - 1, made once. What is made while a graph is captured is not kept, since it holds
    nothing before the graph runs."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.arange(n, dtype=dtype, device=device)
    return _kept(n, dtype, device)


class Kernel:
    """The methods of SGLang's `LinearAttnKernelBase` that a Gated DeltaNet model calls.

    Their arguments are SGLang's. `ssm_states` is one layer's pool [slots, HV, V, K], updated in
    place; `cache_indices` [N] are its slots, -1 for the padding rows of a graph's batch. H, HV, K
    and V are those of one tensor parallel rank.
    """

    supports_packed_decode = True
    supports_strided_target_verify_qkv = True
    supports_track_state_snapshot = True

    def __init__(self, backend: str) -> None:
        """backend: as in `gdn.gated_delta_net`."""
        self.backend = backend

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        output: Tensor | None = None,
        track_state: Tensor | None = None,
        track_chunk_idx: Tensor | None = None,
        inplace_update: bool = True,
        **_: Any,
    ) -> tuple[Tensor, None, None]:
        """Prefill N packed sequences, or the next parts of them, from their slots.

        Args:
            q, k: [1, T, H, K]; v: [1, T, HV, V]; slices of one projection, or copies.
            g: log decay [1, T, HV]; beta: [1, T, HV].
            query_start_loc: [N + 1]; tokens past its end are padding.
            output: [1, T, HV, V], written instead of a new tensor.
            track_state: float32 [N, HV, V, K]. Row n takes the state after
                64 track_chunk_idx[n] tokens of sequence n, for the prefix cache. -1 takes none;
                0 does not occur, since SGLang tracks from 64 tokens on.

        Returns:
            o [1, T, HV, V], which is `output` if that is given, and two None: SGLang finds final
            states in the pool, and the others in track_state.

        Raises:
            NotImplementedError: inplace_update is False (multi-item scoring).
            ValueError: track_state comes without track_chunk_idx.
        """
        if not inplace_update:
            raise NotImplementedError(
                "inplace_update must be True, got False; gdn does not score several items at once"
            )
        tracked: dict[str, Any] = {}
        if track_state is not None:
            if track_chunk_idx is None:
                raise ValueError("track_chunk_idx must come with track_state, got None")
            tracked["checkpoint_offsets"] = track_chunk_idx.clamp(min=0) * CHUNK
            tracked["checkpoints"] = track_state.to(ssm_states.dtype)
        o = gated_delta_net_prefill(
            q, k, v, g, beta, state=ssm_states, state_indices=cache_indices,
            out=output, cu_seqlens=query_start_loc, backend=self.backend, **tracked, **GATED,
        )  # fmt: skip
        if track_state is not None and tracked["checkpoints"] is not track_state:
            track_state.copy_(tracked["checkpoints"])
        return o, None, None

    def packed_decode(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        scale: float,
        ssm_states: Tensor,
        cache_indices: Tensor,
        num_v_heads: int,
        head_v_dim: int,
        **_: Any,
    ) -> Tensor:
        """One token of each of N sequences; q, k and v are read where the projection left them.

        Args:
            mixed_qkv: [N, 2 H K + HV V], q, k and v of a token one after another.
            a, b: raw gate and logit of beta, [N, HV].

        Returns:
            o [1, N, HV, V].
        """
        sizes = num_v_heads, ssm_states.shape[-1], head_v_dim
        q, k, v = split_projection(mixed_qkv[:, None], *sizes)
        o = gated_delta_net_decode(
            q, k, v, a[:, None], b[:, None], scale=scale, A_log=A_log, dt_bias=dt_bias,
            state=ssm_states, state_indices=cache_indices, backend=self.backend, **RAW,
        )  # fmt: skip
        return o.transpose(0, 1)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **_: Any,
    ) -> Tensor:
        """`packed_decode` of separate q, k [1, N, H, K] and v [1, N, HV, V]; query_start_loc [N +
        1] says no more than cache_indices, since each sequence has one token."""
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        o = gated_delta_net_decode(
            q, k, v, a[:, None], b[:, None], A_log=A_log, dt_bias=dt_bias, state=ssm_states,
            state_indices=cache_indices, backend=self.backend, **RAW,
        )  # fmt: skip
        return o.transpose(0, 1)

    def target_verify(
        self,
        A_log: Tensor,
        dt_bias: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        intermediate_states_buffer: Tensor,
        intermediate_state_indices: Tensor,
        cache_steps: int,
        **_: Any,
    ) -> Tensor:
        """Up to `cache_steps` draft tokens of each of N sequences. The pool stays as it is; the
        state after each token goes to a row of its own elsewhere, from which SGLang commits one.

        Args:
            q, k: [1, T, H, K]; v: [1, T, HV, V]; a, b: [T, HV], of N packed sequences.
            query_start_loc: [N + 1].
            intermediate_states_buffer: [rows, steps, HV, V, K], contiguous. [r, t] takes the state
                after token t of the sequence whose row is r.
            intermediate_state_indices: [N] or longer, the row of each sequence.

        Returns:
            o [1, T, HV, V].
        """
        N, steps = len(query_start_loc) - 1, intermediate_states_buffer.shape[1]
        rows = intermediate_state_indices[:N, None]
        tokens = count(cache_steps, rows.dtype, rows.device)
        slots = intermediate_states_buffer.view(-1, *ssm_states.shape[1:])
        return gated_delta_net_decode(
            q, k, v, a[None], b[None], A_log=A_log, dt_bias=dt_bias, state=ssm_states,
            state_indices=cache_indices[:N], output_states=slots,
            output_indices=torch.add(tokens, rows, alpha=steps), cu_seqlens=query_start_loc,
            backend=self.backend, **RAW,
        )  # fmt: skip
