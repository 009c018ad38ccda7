"""Decode: a few threads take their part of a state through the step's tokens in registers.

    S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T (scale q)      for every token

L2 norm, gate and sigmoid are fused. The state is walked in the pool's own layout, 16 bytes a thread
at a time (`part.py`); q, k, v, g and beta are read by their strides.

Reads the step's tensors and, once, the state of every live sequence; writes o and that state.
"""

from collections.abc import Iterable
from typing import Any

import tilelang.language as T
from torch import Tensor

from gdn.backend import Plan
from gdn.definition import L2_EPS
from gdn.problem import Call, Step

from ...common.allocation import allocator
from ..arguments import dtype_name
from ..compile import kernel, launchers
from ..tile.gate_math import log_decay
from .state_slice import Part, Shape, keep, load, meet

_OWN = ("g", "beta", "A_log", "dt_bias", "cu_seqlens")
_POOL = ("state_indices", "num_accepted_tokens")


def shape_for(walks: int, K: int, V: int, vec: int, v_first: bool) -> Shape:
    """The shape for `walks` states at once, `vec` elements a load; K, V powers of two. Measured on
    an H200 (bench/LOG.md): whole rows of V where there are enough states, small blocks of V where
    there are few."""
    few = walks < 128
    if v_first:
        lanes = min(8 if few else 16, K // vec)
        rows = min(1 if few else 8, 64 * lanes // K, V * lanes // 32)
        threads = min(32 if few else 128, V // rows * lanes)
        return Shape(threads, lanes, rows, 1 if few else 4)
    if walks < 32:
        lanes, rows, resident = 2, 8, 1
    elif walks < 2048:
        lanes, rows, resident = 8, 8, 4
    else:
        lanes, rows, resident = 32, 64 // vec, 2
    lanes = min(lanes, V // vec)
    rows = min(rows, K * lanes // 32)
    return Shape(lanes * K // rows, lanes, rows, resident)


def named(slot: Any, null_index: Any, slots: Any) -> Any:
    """Whether a slot is one of the pool's."""
    return T.And(slot != null_index, T.And(slot >= 0, slot < slots))


@kernel(own_barriers=True)
def decode_kernel(
    *, dtype: str, pool: str, K: int, V: int, shape: Shape, wide: bool, v_first: bool,
    speculative: bool, l2: bool, gate: bool, beta_scale: float, g: str, beta: str,
    state_indices: str, num_accepted_tokens: str, A_log: str, dt_bias: str, cu_seqlens: str,
) -> Any:  # fmt: skip
    """See the module. g to cu_seqlens: dtypes, "" where the tensor is None; beta_scale: 0 for a
    finished beta; wide: q, k, v and the pool can be read 16 bytes at a time."""
    B, L, H, HV, N, columns, bounds, slots, slot_stride = (
        T.dynamic(name, "int64")
        for name in ("B", "L", "H", "HV", "N", "columns", "bounds", "slots", "slot_stride")
    )
    s = [T.dynamic(f"s{i}", "int64") for i in range(21)]  # the other strides
    vec = (4 if pool == "float32" else 8) if wide else 1
    part = Part(shape, K, vec, v_first)
    keys, values, run, blocks = part.keys, part.values, part.run, V // part.width
    count = 2 * values + (3 if l2 else 1)  # sums: S^T k, S^T q, q.k, q.q, k.k
    table = ((N, columns), (s[15], s[16])) if speculative else ((N,), (s[15],))
    inner = (V, K) if v_first else (K, V)
    varlen, listed, drafted = bool(cu_seqlens), bool(state_indices), bool(num_accepted_tokens)
    biased, squashed = bool(dt_bias), beta_scale > 0

    @T.prim_func
    def decode(
        q: T.StridedTensor((B, L, H, K), (*s[0:3], 1), dtype),
        k: T.StridedTensor((B, L, H, K), (*s[3:6], 1), dtype),
        v: T.StridedTensor((B, L, HV, V), (*s[6:9], 1), dtype),
        g_: T.StridedTensor((B, L, HV), s[9:12], g),
        beta_: T.StridedTensor((B, L, HV), s[12:15], beta),
        state: T.StridedTensor((slots, HV, *inner), (slot_stride, K * V, inner[1], 1), pool),
        indices: T.StridedTensor(*table, state_indices or "int32"),
        accepted: T.StridedTensor((N,), (s[17],), num_accepted_tokens or "int32"),
        A: T.StridedTensor((HV,), (s[18],), A_log or "float32"),
        bias: T.StridedTensor((HV,), (s[19],), dt_bias or "float32"),
        cu: T.StridedTensor((bounds,), (s[20],), cu_seqlens or "int32"),
        o: T.Tensor((B, L, HV, V), dtype),
        scale: T.float32,
        null_index: T.int64,
        group: T.int32,
    ):
        sequences = bounds - 1 if varlen else B
        # in the order in which a slot's states lie in memory: large batches take 4 % less
        with T.Kernel(sequences * HV * blocks, threads=shape.threads) as x:
            T.annotate_min_blocks_per_sm(shape.resident)
            thread = T.get_thread_binding()
            heads = T.cast(HV, "int32")
            place = T.alloc_local((2,), "int32")  # kept, so that no access divides again
            place[0] = x // blocks // heads
            place[1] = x // blocks % heads
            n, head = place[0], place[1]
            part.stand(thread, x % blocks * part.width)
            S = T.alloc_local((keys * values,), "float32")
            raw = T.alloc_local((keys * values,), pool)
            raw_k, raw_q = (T.alloc_local((keys,), dtype) for _ in range(2))
            raw_v, out = (T.alloc_local((values,), dtype) for _ in range(2))
            sums, u = T.alloc_local((count,), "float32"), T.alloc_local((values,), "float32")
            tiles = shape.threads // (part.lanes * part.parts)
            between = T.alloc_shared((2, tiles, part.warps, count, part.lanes), "float32")
            batch = 0 if varlen else n
            start = T.cast(cu[n], "int64") if varlen else 0
            tokens = T.cast(cu[n + 1], "int64") - start if varlen else L
            start_column = T.cast(accepted[n], "int64") if drafted else T.int64(0)
            known = T.And(start_column >= 0, start_column < columns) if drafted else True
            if speculative:
                column = T.if_then_else(known, start_column, 0) if drafted else 0
                slot = T.cast(indices[n, column], "int64")
            else:
                slot = T.cast(indices[n] if listed else n, "int64")
            shared = T.truncdiv(T.cast(head, "int32"), group)  # the head of q and k
            if T.And(T.And(known, named(slot, null_index, slots)), tokens > 0):
                for m in T.unroll(keys * values // vec):
                    load(raw, m * vec, state, (slot, head, *part.place(m * vec)), vec, wide)
                for m in T.unroll(keys * values):
                    S[m] = T.cast(raw[m], "float32")
                for t in T.serial(tokens):
                    at = start + t
                    for i in T.unroll(keys // run):
                        row = (batch, at, shared, part.key(i * run))
                        load(raw_k, i * run, k, row, run, wide)
                        load(raw_q, i * run, q, row, run, wide)
                    if v_first:
                        for j in T.unroll(values):
                            raw_v[j] = v[batch, at, head, part.value(j)]
                    else:
                        load(raw_v, 0, v, (batch, at, head, part.value(0)), values, wide)
                    x_g = T.cast(g_[batch, at, head], "float32")
                    x_b = T.cast(beta_[batch, at, head], "float32")
                    if biased:
                        x_g = x_g + T.cast(bias[head], "float32")
                    if gate:
                        x_g = log_decay(x_g, T.exp(-T.abs(x_g)), T.cast(A[head], "float32"))
                    if squashed:
                        x_b = beta_scale / (1 + T.exp(-x_b))
                    decay = T.exp(x_g)
                    for m in T.unroll(count):
                        sums[m] = 0.0
                    for i in T.unroll(keys):
                        kk, qq = T.cast(raw_k[i], "float32"), T.cast(raw_q[i], "float32")
                        for j in T.unroll(values):
                            sums[j] += S[part.at(i, j)] * kk
                            sums[values + j] += S[part.at(i, j)] * qq
                        sums[2 * values] += qq * kk
                        if l2:
                            sums[2 * values + 1] += qq * qq
                            sums[2 * values + 2] += kk * kk
                    meet(sums, count, between, thread, t, part)
                    rq = T.rsqrt(sums[2 * values + 1] + L2_EPS) if l2 else T.float32(1)
                    rk = T.rsqrt(sums[2 * values + 2] + L2_EPS) if l2 else T.float32(1)
                    for j in T.unroll(values):
                        error = T.cast(raw_v[j], "float32") - decay * rk * sums[j]
                        u[j] = x_b * rk * error
                        # (S + k u^T)^T q, from the state before, so that no sum waits for another
                        read = decay * sums[values + j] + u[j] * sums[2 * values]
                        out[j] = T.cast(scale * rq * read, dtype)
                    for i in T.unroll(keys):
                        for j in T.unroll(values):
                            m = part.at(i, j)
                            S[m] = decay * S[m] + T.cast(raw_k[i], "float32") * u[j]
                    if v_first:
                        for j in T.unroll(values):
                            if part.lane == j % part.lanes:
                                o[batch, at, head, part.value(j)] = out[j]
                    elif part.part == 0:
                        for j in T.vectorized(values):
                            o[batch, at, head, part.value(j)] = out[j]
                    if speculative:
                        to = T.cast(indices[n, T.min(t + 1, columns - 1)], "int64")
                        if T.And(named(to, null_index, slots), t + 1 < columns):
                            keep(state, to, head, S, raw, part, wide)
                if not speculative:
                    keep(state, slot, head, S, raw, part, wide)
            else:
                for t in T.serial(tokens):
                    for j in T.serial(T.ceildiv(part.width, shape.threads)):
                        place = j * shape.threads + thread
                        if place < part.width:
                            o[batch, start + t, head, part.first + place] = 0

    return decode


class DecodePlan(Plan):
    """All that steps of one kind (shapes, strides, dtypes, device, options) have in common."""

    def __init__(self, step: Step) -> None:
        call = step.call
        (B, _, HV, V), (H, K) = call.v.shape, call.q.shape[2:]
        walks = (B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1) * HV
        vec = 16 // step.state.element_size()
        self.statics: dict[str, Any] = {
            "dtype": dtype_name(call.q), "pool": dtype_name(step.state), "K": K, "V": V,
            "v_first": call.state_v_first, "speculative": step.speculative,
            "l2": call.use_qk_l2norm_in_kernel, "gate": call.use_gate_in_kernel,
            "beta_scale": call.use_beta_sigmoid_in_kernel * (1.0 + call.allow_neg_eigval),
        }  # fmt: skip
        self.statics |= {name: dtype_name(getattr(call, name)) for name in _OWN}
        self.statics |= {name: dtype_name(getattr(step, name)) for name in _POOL}
        self.shapes = {
            wide: shape_for(walks, K, V, vec if wide else 1, call.state_v_first)
            for wide in (True, False)
        }
        self.rest = (step.null_index, HV // H)
        tokens = (call.q, call.k, call.v)
        self.copies = any(x.stride(3) != 1 for x in tokens)
        self.wide = _in_sixteens(step.state, [0])
        self.wide &= all(_in_sixteens(_rows(x), range(3)) for x in tokens)
        self.new_o = allocator(call.v.shape, call.v.dtype, call.v.device)
        self.runs: dict[bool, Any] = {}

    def run(self, wide: bool) -> Any:
        """What launches the kernel, compiled."""
        if wide not in self.runs:
            compiled = decode_kernel(**self.statics, shape=self.shapes[wide], wide=wide)
            (self.runs[wide],) = launchers([compiled])
        return self.runs[wide]

    def precompile(self, call: Call | Step, backward: bool) -> bool:
        """See `gdn.backend.Plan.precompile`."""
        self.run(self.wide)
        return True

    def decode(self, step: Step) -> Tensor:
        """See `gdn.backend.Plan.decode`."""
        call, state = step.call, step.state
        q, k, v = call.q, call.k, call.v
        if self.copies:
            q, k, v = _rows(q), _rows(k), _rows(v)
        o = self.new_o()
        places = q.data_ptr() | k.data_ptr() | v.data_ptr() | state.data_ptr()
        run = self.run(self.wide and not places % 16)
        run(
            q, k, v, call.g, call.beta, state, step.state_indices, step.num_accepted_tokens,
            call.A_log, call.dt_bias, call.cu_seqlens, o, call.scale, *self.rest,
        )  # fmt: skip
        return o


def _rows(x: Tensor) -> Tensor:
    """x, or a copy in which the elements of a head lie side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _in_sixteens(x: Tensor, dims: Iterable[int]) -> bool:
    """Whether steps along `dims` are multiples of 16 bytes."""
    size = x.element_size()
    return all(x.shape[i] == 1 or x.stride(i) * size % 16 == 0 for i in dims)
