"""fla's context of context parallelism (`fla.ops.cp.build_cp_context`) as a `ContextParallel`."""

from __future__ import annotations

from typing import Any

from gdn.context_parallel import ContextParallel


def context_parallel(context: Any) -> ContextParallel:
    """The `gdn.ContextParallel` of a context that `fla.ops.cp.build_cp_context` made.

    Nothing is exchanged, and no GPU is waited for. A context knows only the sequences that its rank
    holds tokens of, and how many ranks they reach. Sequences that lie wholly on other ranks are
    merged in the result: o, the gradients and `gdn.distributed.conv_halo` are those of the global
    cu_seqlens, but rows of initial_state and final_state cannot be told apart. fla has neither.

    Args:
        context: fla's `FLACPContext`, contiguous or zigzag.

    Raises:
        ValueError: it has no process group or no cu_seqlens, or it has numbers of ranks on the
            device, for replays of a CUDA graph.
    """
    if context.group is None or context.cu_seqlens is None:
        raise ValueError("cp_context must have a group and cu_seqlens; use fla's build_cp_context")
    if context.pre_num_ranks_dev is not None or context.post_num_ranks_dev is not None:
        raise ValueError(
            "cp_context must come without pre_num_ranks_dev and post_num_ranks_dev, whose values "
            "are on the device; give the global cu_seqlens to gdn.ContextParallel"
        )
    rank, ranks = context.group.rank(), context.group.size()
    on_host = context.cu_seqlens if context.cu_seqlens_cpu is None else context.cu_seqlens_cpu
    bounds = on_host.tolist()
    if context.layout == "zigzag":
        parts = [rank, 2 * ranks - 1 - rank]
        first = context.front_num_seqs
        segments = [bounds[: first + 1], bounds[first:]]
        tokens_before = context.pre_num_conv_tokens_by_part
        parts_after = context.post_num_ranks_by_part
    else:
        parts, segments = [rank], [bounds]
        tokens_before, parts_after = [context.pre_num_conv_tokens], [context.post_num_ranks]
    length, total = bounds[-1] // len(parts), bounds[-1] * ranks
    starts = [n * length for n in parts]
    begins = [x - tokens for x, tokens in zip(starts, tokens_before, strict=True)]
    cuts = {0, total, *begins}
    known = zip(starts, segments, parts_after, [*begins[1:], total], strict=True)
    for start, inner, after, next_begin in known:
        cuts.update(start + x - inner[0] for x in inner[1:-1])
        end = start + length
        if next_begin >= end:  # else the next part goes on with the same sequence
            cuts.add(min(end + after * length, next_begin))
    return ContextParallel(context.group, sorted(cuts), context.layout, [bounds[-1]] * ranks)
