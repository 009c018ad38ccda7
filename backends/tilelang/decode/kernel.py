"""Decode: the recurrence for the few tokens of a step, with the state in registers.

For every token:

    S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T (scale q)

With a decay per channel e^g scales the rows of S. The L2 norm, the gate and the sigmoid are fused.
The kernel reads the step's tensors by their strides, and the state of every live request once; it
writes o and that state.

A thread block has one request, one value head and `width` columns of V; a thread has a slice of
the state in the pool's own layout (`state_slice.py`). No tensor cores: a step has too few tokens.
"""

from typing import Any

import tilelang.language as T

from gdn.definition import L2_EPS

from ..compile import kernel
from ..tile.gate_math import fused_log_decay
from ..tile.indexing import Fields, token_bound
from ..tile.pool import is_pool_slot
from ..tile.runs import load_run
from ..tile.thread_shape import ThreadShape
from .state_slice import StateSlice, reduce_over_keys, store_slice


@kernel(own_barriers=True)
def decode_kernel(
    *, dtype: str, pool: str, K: int, V: int, shape: ThreadShape, wide: bool, v_first: bool,
    speculative: bool, l2: bool, gate: bool, beta_scale: float, g: str, beta: str,
    state_indices: str, num_accepted_tokens: str, output_indices: str, A_log: str, dt_bias: str,
    cu_seqlens: str, table: bool, leading: bool, clear: bool, channels: bool,
    lower_bound: float | None, single: bool = False, starts: bool = False,
) -> Any:  # fmt: skip
    """Build the kernel. g to cu_seqlens: dtypes, "" where the tensor is None; beta_scale: the
    factor of the fused sigmoid, 0 if it is not fused; wide: q, k, v, the pool and channels of g and
    dt_bias can be read 16 bytes at a time; speculative: a slot for each token is written; table:
    state_indices has columns; leading: its first one takes no token's state; clear: tokens past the
    last request get zeros; channels: g and dt_bias have the channels of K; lower_bound: that of the
    fused gate; single: only sequences of one token are computed (cu_seqlens); starts: there is
    `fresh`."""
    B, L, H, HV, N, columns, bounds, slots, slot_stride = (
        T.dynamic(name, "int64")
        for name in ("B", "L", "H", "HV", "N", "columns", "bounds", "slots", "slot_stride")
    )
    into_slots, into_stride, into_columns = (
        T.dynamic(name, "int64") for name in ("into_slots", "into_stride", "into_columns")
    )
    s = [T.dynamic(f"s{i}", "int64") for i in range(23)]  # the other strides
    channel = ((K,), (1,)) if channels else ((), ())  # more dimensions of g and dt_bias
    vec = (4 if pool == "float32" else 8) if wide else 1
    part = StateSlice(shape, K, vec, v_first)
    keys, values, key_run, blocks = part.keys, part.values, part.key_run, V // part.width
    # the sums over K of a token: S^T k and S^T q, a number a value each; q.k, q.q and k.k
    SK, SQ, QK, QQ, KK = 0, values, 2 * values, 2 * values + 1, 2 * values + 2
    count = KK + 1 if l2 else QK + 1
    elsewhere = bool(output_indices)
    read = ((N, columns), (s[15], s[16])) if table else ((N,), (s[15],))
    places = ((N, into_columns), (s[21], s[22])) if speculative else ((N,), (s[21],))
    inner = (V, K) if v_first else (K, V)
    first_column = int(leading and not elsewhere)
    varlen, has_indices = bool(cu_seqlens), bool(state_indices)
    has_accepted, has_bias, sigmoid = bool(num_accepted_tokens), bool(dt_bias), beta_scale > 0
    gate_dtype, bias_dtype = g, dt_bias or "float32"
    gate_run, bias_run = (min(part.key_run, 128 // int(x[-2:])) for x in (gate_dtype, bias_dtype))

    def A_log_of(A, head):
        return T.cast(A[head], "float32") if A_log else T.float32(0)

    @T.macro
    def clear_token(o, batch, token, head, part, thread):
        for j in T.serial(T.ceildiv(part.width, shape.threads)):
            offset = j * shape.threads + thread
            if offset < part.width:
                o[batch, token, head, part.v_start + offset] = 0

    @T.prim_func
    def decode(
        q: T.StridedTensor((B, L, H, K), (*s[0:3], 1), dtype),
        k: T.StridedTensor((B, L, H, K), (*s[3:6], 1), dtype),
        v: T.StridedTensor((B, L, HV, V), (*s[6:9], 1), dtype),
        g_: T.StridedTensor((B, L, HV, *channel[0]), (*s[9:12], *channel[1]), g),
        beta_: T.StridedTensor((B, L, HV), s[12:15], beta),
        state: T.StridedTensor((slots, HV, *inner), (slot_stride, K * V, inner[1], 1), pool),
        indices: T.StridedTensor(*read, state_indices or "int32"),
        accepted: T.StridedTensor((N,), (s[17],), num_accepted_tokens or "int32"),
        A: T.StridedTensor((HV,), (s[18],), A_log or "float32"),
        bias: T.StridedTensor((HV, *channel[0]), (s[19], *channel[1]), bias_dtype),
        cu: T.StridedTensor((bounds,), (s[20],), cu_seqlens or "int32"),
        into: T.StridedTensor((into_slots, HV, *inner), (into_stride, K * V, inner[1], 1), pool),
        output: T.StridedTensor(*places, output_indices or "int32"),
        fresh: T.Tensor((N,), "bool"),
        o: T.Tensor((B, L, HV, V), dtype),
        scale: T.float32,
        null_index: T.int64,
        group: T.int32,
    ):
        requests = bounds - 1 if varlen else B
        # in the order in which a slot's states lie in memory: large batches take 4 % less
        with T.Kernel(requests * HV * blocks, threads=shape.threads) as cta:
            T.annotate_min_blocks_per_sm(shape.resident)
            thread = T.get_thread_binding()
            heads = T.cast(HV, "int32")
            task = Fields("request", "head")
            task["request"] = cta // blocks // heads
            task["head"] = cta // blocks % heads
            n, head = task.request, task.head
            part.place_thread(thread, cta % blocks * part.width)
            S = T.alloc_local((keys * values,), "float32")
            raw_S = T.alloc_local((keys * values,), pool)
            raw_k, raw_q = (T.alloc_local((keys,), dtype) for _ in range(2))
            raw_v, raw_o = (T.alloc_local((values,), dtype) for _ in range(2))
            if channels:
                raw_g = T.alloc_local((keys,), gate_dtype)
                raw_bias = T.alloc_local((bias_run,), bias_dtype)
            sums, u = T.alloc_local((count,), "float32"), T.alloc_local((values,), "float32")
            tiles = shape.threads // (part.lanes * part.k_parts)
            partial_smem = T.alloc_shared((2, tiles, part.warps, count, part.lanes), "float32")

            # === the request's tokens and its slot ===
            batch = 0 if varlen else n
            span = Fields("start", "tokens")
            if varlen:
                span["start"] = token_bound(cu, n, L)
                span["tokens"] = token_bound(cu, n + 1, L) - span.start
                if single:
                    span["tokens"] = T.if_then_else(span.tokens == 1, 1, 0)
            start = span.start if varlen else 0
            tokens = span.tokens if varlen else L
            start_column = T.cast(accepted[n], "int64") if has_accepted else T.int64(0)
            if has_accepted and not leading:
                start_column = start_column - 1
            in_table = T.And(start_column >= 0, start_column < columns) if has_accepted else True
            if table:
                column = T.if_then_else(in_table, start_column, 0) if has_accepted else 0
                slot = T.cast(indices[n, column], "int64")
            else:
                slot = T.cast(indices[n] if has_indices else n, "int64")
            key_head = T.truncdiv(T.cast(head, "int32"), group)
            if T.And(T.And(in_table, is_pool_slot(slot, null_index, slots)), tokens > 0):
                for m in T.unroll(keys * values // vec):
                    index = (slot, head, *part.pool_index(m * vec))
                    load_run(raw_S, m * vec, state, index, vec, wide)
                for m in T.unroll(keys * values):
                    S[m] = T.cast(raw_S[m], "float32")
                    if starts:
                        S[m] = T.if_then_else(fresh[n], 0.0, S[m])
                for t in T.serial(tokens):
                    # === loads ===
                    token = start + t
                    for i in T.unroll(keys // key_run):
                        row = (batch, token, key_head, part.key(i * key_run))
                        load_run(raw_k, i * key_run, k, row, key_run, wide)
                        load_run(raw_q, i * key_run, q, row, key_run, wide)
                    if v_first:
                        for j in T.unroll(values):
                            raw_v[j] = v[batch, token, head, part.value(j)]
                    else:
                        load_run(raw_v, 0, v, (batch, token, head, part.value(0)), values, wide)
                    if channels:
                        for i in T.unroll(keys // gate_run):
                            row = (batch, token, head, part.key(i * gate_run))
                            load_run(raw_g, i * gate_run, g_, row, gate_run, wide)
                    else:
                        g_t = T.cast(g_[batch, token, head], "float32")
                    beta_t = T.cast(beta_[batch, token, head], "float32")

                    # === the gate and beta ===
                    if channels:
                        decay = T.float32(1)  # S decays here
                        for i in T.unroll(keys):
                            g_i = T.cast(raw_g[i], "float32")
                            if has_bias:  # a few numbers at a time: all would not fit in registers
                                if i % bias_run == 0:
                                    load_run(raw_bias, 0, bias, (head, part.key(i)), bias_run, wide)
                                g_i = g_i + T.cast(raw_bias[i % bias_run], "float32")
                            if gate:
                                g_i = fused_log_decay(g_i, A_log_of(A, head), lower_bound)
                            decay_i = T.exp(g_i)
                            for j in T.unroll(values):
                                S[part.register(i, j)] *= decay_i
                    else:
                        if has_bias:
                            g_t = g_t + T.cast(bias[head], "float32")
                        if gate:
                            g_t = fused_log_decay(g_t, A_log_of(A, head), lower_bound)
                        decay = T.exp(g_t)
                    if sigmoid:
                        beta_t = beta_scale / (1 + T.exp(-beta_t))

                    # === the sums over K ===
                    for m in T.unroll(count):
                        sums[m] = 0.0
                    for i in T.unroll(keys):
                        kk, qq = T.cast(raw_k[i], "float32"), T.cast(raw_q[i], "float32")
                        for j in T.unroll(values):
                            sums[SK + j] += S[part.register(i, j)] * kk
                            sums[SQ + j] += S[part.register(i, j)] * qq
                        sums[QK] += qq * kk
                        if l2:
                            sums[QQ] += qq * qq
                            sums[KK] += kk * kk
                    reduce_over_keys(sums, count, partial_smem, thread, t, part)

                    # === u, o and the state ===
                    rq = T.rsqrt(sums[QQ] + L2_EPS) if l2 else T.float32(1)
                    rk = T.rsqrt(sums[KK] + L2_EPS) if l2 else T.float32(1)
                    for j in T.unroll(values):
                        error = T.cast(raw_v[j], "float32") - decay * rk * sums[SK + j]
                        u[j] = beta_t * rk * error
                        # (S + k u^T)^T q, from the state before, so that no sum waits for another
                        read = decay * sums[SQ + j] + u[j] * sums[QK]
                        raw_o[j] = T.cast(scale * rq * read, dtype)
                    for i in T.unroll(keys):
                        for j in T.unroll(values):
                            m = part.register(i, j)
                            S[m] = decay * S[m] + T.cast(raw_k[i], "float32") * u[j]

                    # === stores ===
                    if v_first:
                        for j in T.unroll(values):
                            if part.lane == j % part.lanes:
                                o[batch, token, head, part.value(j)] = raw_o[j]
                    elif part.k_part == 0:
                        for j in T.vectorized(values):
                            o[batch, token, head, part.value(j)] = raw_o[j]
                    if speculative and elsewhere:
                        to = T.cast(output[n, T.min(t, into_columns - 1)], "int64")
                        if T.And(is_pool_slot(to, null_index, into_slots), t < into_columns):
                            store_slice(into, to, head, S, raw_S, part, wide)
                    elif speculative:
                        to = T.cast(indices[n, T.min(t + first_column, columns - 1)], "int64")
                        if T.And(is_pool_slot(to, null_index, slots), t + first_column < columns):
                            store_slice(state, to, head, S, raw_S, part, wide)
                if not speculative and elsewhere:
                    to = T.cast(output[n], "int64")
                    if is_pool_slot(to, null_index, into_slots):
                        store_slice(into, to, head, S, raw_S, part, wide)
                elif not speculative:
                    store_slice(state, slot, head, S, raw_S, part, wide)
            else:
                # === no state: o is zero ===
                for t in T.serial(tokens):
                    clear_token(o, batch, start + t, head, part, thread)
            if clear:
                # === past the last request: each one a share of the tokens ===
                end = token_bound(cu, requests, L)
                for t in T.serial(T.ceildiv(T.max(L - end - n, 0), requests)):
                    clear_token(o, batch, end + n + t * requests, head, part, thread)

    return decode
