"""The ops of servers, on a pool of states that is updated in place: `gated_delta_net_prefill` and
`gated_delta_net_decode`. docs/serving.md shows how they are called."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn import calls, dispatch, pool_ops
from gdn.invariance import is_batch_invariant
from gdn.problem import Call, Prefill, Step
from gdn.validation import refuse_gradients


def gated_delta_net_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    state: Tensor,
    state_indices: Tensor | None = None,
    null_index: int = -1,
    fresh: Tensor | None = None,
    checkpoint_offsets: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    checkpoints: Tensor | None = None,
    out: Tensor | None = None,
    scale: float | None = None,
    gate_lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """N sequences, or the next parts of them, whose states lie in a pool: each starts from its slot
    and leaves its final state there. Not differentiable.

    Args:
        q, k, v, g, beta, scale, gate_lower_bound, the fused options, cu_seqlens, backend: as in
            `gated_delta_net`. q, k and v may be slices of one tensor.
        state: the pool [slots, HV, K, V] in float32, bfloat16 or float16 (float64 with float64
            inputs), or with state_v_first [slots, HV, V, K]; the arithmetic is in float32. Slots
            may be padded: state.stride(0) may exceed HV K V.
        state_indices: int32 or int64 [N], the slot of each sequence. None means 0, 1, ..., N - 1,
            for a pool of N slots.
        null_index: a sequence with this slot (padding of a batch), or with a slot outside the pool,
            is skipped: its o is zero, and no slot changes.
        fresh: bool [N]. A fresh sequence starts from zero, and its slot is not read.
        checkpoint_offsets: int32 or int64 [N] or [N, C]. The state after so many tokens of the
            sequence, a multiple of 64, is stored too; 0 stores none.
        checkpoint_indices: slots of the pool for these states, in the shape of checkpoint_offsets.
            One that is null_index or outside the pool is not stored.
        checkpoints: or a buffer for them, [N, HV, K, V] or [N, C, HV, K, V] (or V, K), in state's
            dtype, contiguous. Rows whose offset is 0 stay as they are.
        out: [B, T, HV, V] in v's dtype, contiguous: o is written to it instead of to a new tensor.

    Returns:
        o [B, T, HV, V] in v's dtype, or `out`. Tokens of skipped sequences are zero. Tokens past
        cu_seqlens[-1] are zero in a new o, and stay as they are in `out`. A sequence without tokens
        leaves its slot alone, or zeroes it if it is fresh. Slots that are not named do not change.

    Raises:
        ValueError, TypeError, BackendUnsupportedError, UnknownBackendError: as `gated_delta_net`.
        RuntimeError: an input requires grad while gradients are on.

    Written slots must be distinct, and none may be the start of another sequence. On the CPU this
    and the offsets are checked. On a GPU no values are checked: an offset that is no multiple of 64
    or exceeds the length is skipped, and a slot that is written twice is a race.
    """
    call = _make_call(
        q, k, v, g, beta, state, scale, gate_lower_bound, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first, cu_seqlens,
    )  # fmt: skip
    prefill = Prefill(
        call, state, state_indices, fresh, checkpoint_offsets, checkpoint_indices, checkpoints, out,
        null_index,
    )  # fmt: skip
    if torch.is_grad_enabled():
        refuse_gradients(prefill)
    return pool_ops.run(prefill, dispatch.request(backend))


def gated_delta_net_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    state: Tensor,
    state_indices: Tensor | None = None,
    null_index: int = -1,
    num_accepted_tokens: Tensor | None = None,
    out: Tensor | None = None,
    output_states: Tensor | None = None,
    output_indices: Tensor | None = None,
    leading_column: bool = True,
    scale: float | None = None,
    gate_lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One decode step: T >= 1 new tokens of each of N sequences. The states lie in a pool and are
    updated in place. Not differentiable.

    Args:
        q, k, v, g, beta, scale, gate_lower_bound, the fused options, cu_seqlens, backend: as in
            `gated_delta_net`. On a GPU q, k and v may be slices of one tensor; they are not copied.
        state, null_index, out: as in `gated_delta_net_prefill`.
        state_indices: int32 or int64. [N]: the slot that each sequence reads and writes. None means
            0, 1, ..., N - 1, for a pool of N slots; slot null_index, for example 0, is skipped then
            too. [N, 1 + T], for speculative decoding: column c is the slot of the state after c
            tokens of the step. A step reads column 0 and writes the other columns, so several
            sequences may start from one slot (branches of a prefix). With cu_seqlens there may be
            fewer columns than tokens, but at least one; states past the last column are not kept.
        num_accepted_tokens: [N], only with state_indices [N, 1 + T]: how many tokens of the
            previous step were accepted. The step reads this column instead of column 0. Columns
            must be in the order of the previous step.
        leading_column: with False state_indices is [N, T], as vLLM has it: column t takes the state
            after token t, and the step reads column num_accepted_tokens - 1 (None: column 0).
        output_states: another pool of the same layout and dtype, not overlapping: new states are
            written there, and `state` is only read. state_indices is then None or [N].
        output_indices: required with output_states, int32 or int64. [N]: the slot there that takes
            the state after a sequence's last token. [N, T]: column t takes the one after token t.

    Returns:
        o [B, T, HV, V] in v's dtype, or `out`, as in `gated_delta_net_prefill`. Slots that are not
        named do not change.

    Raises:
        ValueError, TypeError, BackendUnsupportedError, UnknownBackendError: as `gated_delta_net`.
        RuntimeError: an input requires grad while gradients are on.

    No sequence may write to a slot that another one reads or writes. On the CPU this and the values
    of all tables are checked. On a GPU a slot outside the pool counts as null_index, and a slot
    that one sequence writes and another one uses is a race.
    """
    call = _make_call(
        q, k, v, g, beta, state, scale, gate_lower_bound, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first, cu_seqlens,
    )  # fmt: skip
    step = Step(
        call, state, state_indices, num_accepted_tokens, out, output_states, output_indices,
        null_index, leading_column,
    )  # fmt: skip
    if torch.is_grad_enabled():
        refuse_gradients(step)
    return pool_ops.run(step, dispatch.request(backend))


def _make_call(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor,
    scale: float | None, gate_lower_bound: float | None, l2_norm: bool, fused_gate: bool,
    A_log: Tensor | None, dt_bias: Tensor | None, fused_sigmoid: bool, allow_neg_eigval: bool,
    state_v_first: bool, cu_seqlens: Tensor | None,
) -> Call:  # fmt: skip
    """The tokens and options, without an initial state."""
    calls.require_pool(state)
    q, k, v, scale = calls.prepare(q, k, v, beta, scale)
    g, dt_bias = calls.prepare_gate(v, g, dt_bias, fused_gate)
    return Call(
        q, k, v, g, beta, None, A_log, dt_bias, cu_seqlens, None, None, scale, gate_lower_bound,
        False, l2_norm, fused_gate, fused_sigmoid, allow_neg_eigval, state_v_first,
        is_batch_invariant(),
    )  # fmt: skip
