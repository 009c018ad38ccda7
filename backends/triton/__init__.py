"""The Triton backend.

Forward (`plan.py` launches the kernels in this order):
    prepare.py          per chunk: gates, norms, and the matrices that need no state;
    channel_prepare.py  in its place with a decay per channel: also rows of q and k with decays
    channel_sums.py, channel_forward.py
                        in place of both with a decay per channel in bfloat16: sums of gates, then
                        matrices, then rows
    scan.py             per sequence or piece: the state, chunk by chunk, and o
    combine_pieces.py   per sequence: the state before each piece, where sequences are cut

Backward:
    scan.py             again, for the state before every chunk
    reverse_scan.py     per sequence or piece: the gradient of the state, last chunk first
    query_gradients.py  per chunk: the gradient of q
    key_gradients.py    per chunk: the gradients of k, v, g and beta

    With a decay per channel, in place of the last two:
    matrix_gradients.py     per chunk: the gradients of v and of the matrices
    channel_gradients.py    per chunk and tile of channels: the gradients of g, q and k
    norm_gradients.py       per chunk: the gradient of beta; those of q and k through their norms

Decode: decode.py.

Prefill on a pool of states: `pool_plan.py` launches forward's kernels, which read and write slots
by `pool.py`.

The gated norm of layers, which is not part of the op: `gated_norm.py`.

Shared: `launch.py` chooses configurations and launches, `piece_length.py` decides when to cut,
`indexing.py` finds chunks and pieces, `strides.py` says where tokens lie, `chunk_buffers.py` is
what stages hand to each other and `buffer_shapes.py` its shapes, `first_stages.py` has the stages
before forward's scans, `channel_decay.py` the decays between tokens per channel,
`channel_pairs.py`, `channel_blocks.py` and `channel_pair_gradients.py` the products with them,
`gate_buffers.py` and `grad_matrices.py` what backward's stages keep for these, `tiles.py` loads,
stores and products, `activation.py` the fused options, `inverse.py` and, in memory,
`channel_inverse.py` the inverse of a triangular matrix.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gdn.backend import Backend, Capabilities, Plan
from gdn.problem import FLAGS, Call, PoolCall, Prefill, Problem, Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    """Runs on NVIDIA GPUs from Ampere on.

    If TRITON_INTERPRET=1 is set before Triton is imported, the same kernels run on a CPU, slowly.
    This serves tests and learning. "auto" then does not choose this backend.
    """

    name = "triton"
    summary = "our Triton kernels"
    capabilities = Capabilities(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        packages=("triton",),
        devices=("cpu",) if INTERPRETED else ("cuda",),
        min_sm=None if INTERPRETED else 80,
        max_k=256,
        max_v=256,
        gva=True,
        varlen=True,
        initial_state=True,
        backward=True,
        deterministic=True,
        cuda_graph=not INTERPRETED,
        resets=True,
        flags=frozenset(FLAGS),
        decode=(torch.float32, torch.bfloat16, torch.float16),
        speculative=True,
        output_states=True,
        prefill=(torch.float32, torch.bfloat16, torch.float16),
        checkpoints=True,
        per_channel=True,
        gate_lower_bound=True,
        context_parallel=True,
        batch_invariant=True,
    )
    priority = None if INTERPRETED else 300

    def path(self, problem: Problem) -> str:
        return "interpreter" if INTERPRETED else "Triton"

    def saved_like(self, call: Call) -> list[Tensor]:
        from .buffer_shapes import saved_shapes

        return [call.q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(call)]

    def exchanges(self, call: Call) -> bool:
        from .piece_length import piece_length

        return piece_length(call._replace(context_parallel=True)) is not None

    def plan(self, call: Call | PoolCall) -> Plan:
        if isinstance(call, Step):
            from .decode import DecodePlan

            return DecodePlan(call)
        if isinstance(call, Prefill):
            from .ahead import SlotPlan

            return SlotPlan(call)
        from .ahead import SequencePlan

        return SequencePlan(call)


BACKEND = TritonBackend()
