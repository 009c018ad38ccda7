"""The pieces of context parallelism in one process: summaries of parts, the split of tokens over
ranks, and the errors of `gdn.ContextParallel` and `cp=`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from context_parallel_ranks import Parallel
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOKENS, assert_close, capabilities_of, require, truth

import gdn
from gdn.testing import Case, make_inputs, run_definition
from gdn.testing.inputs import make_output_gradients, with_gradients
from gdn.token_split import part_of, split

GATES = (
    "gate_lower_bound", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "A_log", "dt_bias",
    "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "cu_seqlens",
)  # fmt: skip
SUMMARIES = [
    Case("dense", T=70, H=1, HV=1, K=16, V=12, initial_state=True),
    Case("packed", lengths=(9, 0, 8), H=1, HV=2, K=16, V=24, initial_state=True, fused=True),
    Case("half", lengths=(70, 0, 9), H=1, HV=1, dtype=torch.bfloat16, l2norm=True),
]


def gate_options(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in GATES if name in inputs}


@pytest.mark.parametrize("case", SUMMARIES, ids=lambda case: case.name)
def test_a_summary_gives_the_final_state_from_any_state(
    case: Case, backend: str, device: str
) -> None:
    if not capabilities_of(backend).context_parallel:
        pytest.skip("does not claim context parallelism")
    inputs = make_inputs(case, device)
    require(backend, inputs)
    tensors = [inputs[name] for name in TOKENS[1:]]
    N, M = gdn.distributed.summarize(*tensors, **gate_options(inputs), backend=backend).split(
        [case.V, case.K], -1
    )
    assert M.dtype == torch.float32
    _, expected = run_definition(make_inputs(case))
    assert_close("final_state", M @ inputs["initial_state"] + N, expected, case.dtype)


@pytest.mark.parametrize("case", SUMMARIES, ids=lambda case: case.name)
def test_a_summary_of_gradients_gives_that_of_the_initial_state(
    case: Case, backend: str, device: str
) -> None:
    if not capabilities_of(backend).context_parallel:
        pytest.skip("does not claim context parallelism")
    inputs = make_inputs(case, device)
    require(backend, inputs)
    do, dS = make_output_gradients(case, device)
    expected = truth(case)["initial_state"]
    tensors = [inputs[name] for name in ("q", "k", "g", "beta")]
    known: dict[str, Any] = gate_options(inputs) | {"backend": backend}
    own = gdn.distributed.summarize_gradient(*tensors, do, **known)
    assert own.dtype == torch.float32
    keys = [inputs[name] for name in TOKENS[1:]]
    M = gdn.distributed.summarize(*keys, **known)[..., case.V :]
    assert_close("d_initial_state", M.mT @ dS + own, expected, case.dtype)
    known["grad_final_state"] = dS
    whole = gdn.distributed.summarize_gradient(*tensors, do, **known)
    assert_close("d_initial_state", whole, expected, case.dtype)


def test_summaries_of_parts_compose() -> None:
    inputs = make_inputs(Case("whole", T=100, H=1, HV=2, K=16, V=12, dtype=torch.float64))
    _, *tensors = [inputs[name] for name in TOKENS]
    whole = gdn.distributed.summarize(*tensors, backend="torch")
    edges = [0, 30, 30, 90, 100]
    parts = [
        gdn.distributed.summarize(*(x[:, a:b] for x in tensors), backend="torch")
        for a, b in itertools.pairwise(edges)
    ]
    left = parts[0]
    for part in parts[1:]:
        left = gdn.distributed.compose(left, part)
    right = gdn.distributed.compose(parts[2], parts[3])
    right = gdn.distributed.compose(gdn.distributed.compose(parts[0], parts[1]), right)
    for found in (left, right):
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="both come from summarize"):
        gdn.distributed.compose(left, whole[..., 1:])


def test_a_backend_that_does_not_claim_it_refuses() -> None:
    inputs = make_inputs(Case("plain", T=4, dtype=torch.bfloat16))
    tensors = [inputs[name] for name in TOKENS[1:]]
    with pytest.raises(gdn.BackendUnsupportedError, match="context parallelism"):
        gdn.distributed.summarize(*tensors, backend="fla")


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@given(lengths, st.randoms(use_true_random=False), st.sampled_from(["contiguous", "zigzag"]))
@settings(deadline=None)
def test_every_token_and_state_has_one_place(
    tokens_of: list[int], random: Any, layout: Any
) -> None:
    total = sum(tokens_of)
    inner = sorted(random.randint(0, total) for _ in range(random.randint(0, 5)))
    bounds = [0, *inner, total]
    sequences = tuple(b - a for a, b in itertools.pairwise(bounds))
    case = Parallel("drawn", tuple(tokens_of), sequences, layout)
    found = [split(rank, tokens_of, bounds, layout) for rank in range(len(tokens_of))]
    for rank, (own, ranges) in enumerate(zip(found, case.ranges(), strict=True)):
        mine = [token for part in ranges for token in part]
        assert own.bounds[-1] == len(mine)
        for segment in own.segments:
            covered = mine[segment.start : segment.end]
            first, last = bounds[segment.sequence], bounds[segment.sequence + 1] - 1
            assert first <= covered[0] <= covered[-1] <= last
            assert (segment.begins, segment.ends) == (covered[0] == first, covered[-1] == last)
        for sequence in (*own.first.values(), *own.empty):
            assert case.owner(sequence) == rank
    for pick in (lambda x: (*x.first.values(), *x.empty), lambda x: (*x.last.values(), *x.empty)):
        assert sorted(n for own in found for n in pick(own)) == [*range(len(sequences))]
    for own in found:
        for part in own.parts:
            for number, step in [(n, -1) for n in part.before] + [(n, 1) for n in part.after]:
                rank, slot = part_of(number, len(tokens_of), layout)
                other = found[rank].parts[slot]
                assert other.number == number
                assert (number - part.number) * step > 0
                assert part.number in (other.after if step < 0 else other.before)
            for number, tokens in zip(part.before, part.tokens, strict=True):
                rank, slot = part_of(number, len(tokens_of), layout)
                last = found[rank].segments[found[rank].parts[slot].segments[-1]]
                assert tokens == last.end - last.start


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_rank_is_the_whole(group: Any) -> None:
    """Also through a mesh, and in Kimi Delta Attention's op; bit-equal, since nothing is cut."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    case = Case("whole", lengths=(20, 0, 13), H=1, HV=2, per_channel=True, initial_state=True)
    inputs = make_inputs(case)
    bounds = inputs.pop("cu_seqlens")
    want = gdn.kimi_delta_attention(**inputs, cu_seqlens=bounds, backend="torch")
    cp = gdn.ContextParallel(mesh, bounds)
    got = gdn.kimi_delta_attention(**inputs, cp=cp, backend="torch")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compiles_for_parts_of_any_length(group: Any) -> None:
    """From the second length on sizes are symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(gdn.gated_delta_net, fullgraph=True, backend="aot_eager")
    for T in (70, 130, 90):
        inputs = make_inputs(Case("part", T=T, H=1, HV=1, K=8, V=8))
        options = {"cp": gdn.ContextParallel(group, lengths=(T,)), "backend": "torch"}
        got, want = (op(**inputs, **options) for op in (compiled, gdn.gated_delta_net))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_errors_name_the_argument_and_the_remedy(group: Any) -> None:
    def call(cp: Any, **options: Any) -> None:
        inputs = make_inputs(Case("call", T=8)) | {"cp": cp, "backend": "torch"} | options
        gdn.gated_delta_net(**inputs)

    cp = gdn.ContextParallel(group)
    call(cp)
    with pytest.raises(TypeError, match="group_or_mesh must be a torch"):
        gdn.ContextParallel("cp")
    with pytest.raises(ValueError, match="layout must be 'contiguous' or 'zigzag'"):
        gdn.ContextParallel(group, layout="striped")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must start at 0 and never descend"):
        gdn.ContextParallel(group, torch.tensor([0, 5, 3]))
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        gdn.ContextParallel(group, torch.zeros(2))
    with pytest.raises(ValueError, match="lengths must hold the tokens of each of 1 ranks"):
        gdn.ContextParallel(group, lengths=[4, 4])
    with pytest.raises(ValueError, match="must end at the tokens of all ranks, 8, got 7"):
        gdn.ContextParallel(group, [0, 7], lengths=[8])
    with pytest.raises(ValueError, match="must end at the tokens of all ranks, 8, got 9"):
        call(gdn.ContextParallel(group, [0, 9]))
    with pytest.raises(ValueError, match="T_local = 7 tokens on rank 0"):
        call(gdn.ContextParallel(group, lengths=[7]))
    with pytest.raises(ValueError, match="cu_seqlens must come without cp"):
        call(cp, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="B = 1 with cp, got B = 2"):
        call(cp, **make_inputs(Case("rows", B=2, T=8)))
    with pytest.raises(ValueError, match=r"initial_state must be \[N, HV, K, V\] = \(2, "):
        call(gdn.ContextParallel(group, [0, 3, 8]))
    with pytest.raises(TypeError, match="ContextParallel, got ProcessGroup"):
        call(group)
    with pytest.raises(gdn.BackendUnsupportedError, match="context parallelism"):
        call(cp, backend="fla")
    layer = gdn.nn.GatedDeltaNet(8, num_k_heads=1, num_v_heads=1, head_k_dim=8, head_v_dim=8)
    with pytest.raises(ValueError, match="cp must come without cache and cu_seqlens"):
        layer(torch.zeros(1, 8, 8), cp=cp, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"x must be \[1, T_local, D\], got \(2, 8, 8\)"):
        gdn.distributed.conv_halo(torch.zeros(2, 8, 8), 4, cp)
    with pytest.raises(ValueError, match="taps must be at least 1"):
        gdn.distributed.conv_halo(torch.zeros(1, 8, 8), 0, cp)
    told = gdn.explain(**make_inputs(Case("told", T=8)), cp=cp)
    assert told.problem.context_parallel
    assert told.chosen == "torch"


def test_a_second_backward_is_refused(group: Any) -> None:
    inputs = with_gradients(make_inputs(Case("twice", T=8)))
    o = gdn.gated_delta_net(**inputs, cp=gdn.ContextParallel(group), backend="torch").o
    (dq,) = torch.autograd.grad(o.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dq.sum().backward()
