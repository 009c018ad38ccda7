"""Decode: every backend against the definition and its own prefill; the rules of the pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import assert_close, capabilities_of, require

import gdn
from gdn.testing import Case, make_inputs
from gdn.testing.check import assert_step_agrees
from gdn.testing.decode import STEPS, StepCase, as_step, copy_pool, make_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = StepCase("short", B=4, T=2, HV=4, fused=True)


@pytest.fixture
def short(dtype: torch.dtype) -> StepCase:
    """The shortest case, in the most precise dtype that the backend claims."""
    return replace(SHORT, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_agrees_with_the_definition(
    backend: str, device: str, case: StepCase, dtype: torch.dtype
) -> None:
    """o and every named slot agree. All other slots hold NaN before and keep their bits."""
    case = replace(case, dtype=dtype)
    inputs = make_step(case, device, poison=True)
    require(backend, inputs)
    assert_step_agrees(backend, case, inputs)
    if case.slots == "one" and case.lengths is None and not case.out:
        state = make_step(case, device)
        o = gdn.gated_delta_net_decode(**state, backend=backend)
        assert not o[2::3].any()


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_step_by_step_equals_one_prefill(
    backend: str, device: str, dtype: torch.dtype, state_v_first: bool, tokens: int
) -> None:
    """The final state of a prefill serves as the pool, without a copy."""
    T = 6
    case = Case("prefill", T=70 + T, B=2, HV=4, fused=True, state_v_first=state_v_first)
    inputs = make_inputs(replace(case, dtype=dtype), device)
    cut = {n: inputs[n] for n in ("q", "k", "v", "g", "beta")}
    options = {n: x for n, x in inputs.items() if n not in cut}
    names = [info.name for info in gdn.list_backends() if info.name in (backend, "torch")]
    try:
        whole = gdn.gated_delta_net(**inputs, backend=backend)
    except gdn.BackendUnsupportedError:
        require(backend, make_step(replace(SHORT, dtype=dtype), device))
        raise
    head = {n: x[:, :-T].contiguous() for n, x in cut.items()}
    state = gdn.gated_delta_net(**head, **options, backend=backend).final_state
    assert state is not None
    assert whole.final_state is not None
    for name in ("initial_state", "output_final_state"):
        options.pop(name)
    place, outputs = state.data_ptr(), []
    for t in range(70, 70 + T, tokens):
        step = {n: x[:, t : t + tokens] for n, x in cut.items()}
        o = gdn.gated_delta_net_decode(**step, **options, state=state, backend=names[0])
        outputs.append(o)
    assert state.data_ptr() == place
    assert_close("o", torch.cat(outputs, 1), whole.o[:, 70:], dtype)
    assert_close("state", state, whole.final_state, dtype)


def test_rejected_tokens_leave_no_trace(backend: str, device: str, short: StepCase) -> None:
    """Three drafted tokens of which one is accepted, and a step after it, equal one token and the
    same step."""
    case = replace(short, T=3, slots="each")
    inputs = make_step(case, device)
    require(backend, inputs)
    inputs.pop("num_accepted_tokens")
    table = inputs["state_indices"]
    pool = inputs.pop("state")
    other = copy_pool(pool)
    gdn.gated_delta_net_decode(**inputs, state=pool, backend=backend)
    accepted = torch.ones_like(table[:, 0])
    drafted = gdn.gated_delta_net_decode(
        **inputs, state=pool, num_accepted_tokens=accepted, backend=backend
    )
    inputs["state_indices"] = table[:, 0].contiguous()
    first = inputs | {n: inputs[n][:, :1] for n in ("q", "k", "v", "g", "beta")}
    gdn.gated_delta_net_decode(**first, state=other, backend=backend)
    plain = gdn.gated_delta_net_decode(**inputs, state=other, backend=backend)
    assert_close("o", drafted, plain, case.dtype)
    live = table[:, 0] != case.null_index
    kept, expected = pool[table[live, 3].long()], other[table[live, 0].long()]
    assert_close("state", kept, expected, torch.float32)


def test_branches_of_a_prefix_start_from_one_slot(
    backend: str, device: str, short: StepCase
) -> None:
    """The slot is read and not written; a start in the own row may be written."""
    inputs = make_step(replace(short, slots="each", T=1), device)
    require(backend, inputs)
    table = torch.tensor([[0, 1], [0, 2], [0, 3], [5, 5]], dtype=torch.int32, device=device)
    inputs |= {"state_indices": table, "num_accepted_tokens": None}
    before = copy_pool(inputs["state"])
    o = gdn.gated_delta_net_decode(**inputs, backend=backend)
    assert torch.equal(inputs["state"][0], before[0])
    starts = before[table[:, 0].long()].clone()
    alone = inputs | {"state_indices": None, "state": starts}
    assert_close("o", o, gdn.gated_delta_net_decode(**alone, backend=backend), short.dtype)
    assert_close("state", inputs["state"][table[:, 1].long()], starts, torch.float32)


def test_slices_of_one_tensor_give_the_same(backend: str, device: str, short: StepCase) -> None:
    inputs, again = make_step(short, device), make_step(short, device)
    require(backend, inputs)
    B, T = inputs["q"].shape[:2]
    parts = [inputs[name].reshape(B, T, -1) for name in ("q", "k", "v")]
    mixed = torch.cat(parts, -1).split([x.shape[-1] for x in parts], -1)
    again |= {n: x.view(inputs[n].shape) for n, x in zip(("q", "k", "v"), mixed, strict=True)}
    again["g"] = torch.stack([inputs["g"]] * 2, -1)[..., 1]
    expected = gdn.gated_delta_net_decode(**inputs, backend=backend)
    copies = {n: again[n].clone() for n in ("q", "k", "v", "g", "beta", "state_indices")}
    assert torch.equal(gdn.gated_delta_net_decode(**again, backend=backend), expected)
    assert torch.equal(again["state"], inputs["state"])
    assert all(torch.equal(again[n], x) for n, x in copies.items())  # only the pool is written to


@pytest.mark.parametrize(
    "changes", [{"B": 0}, {"T": 0}, {"B": 1, "lengths": (0, 0)}, {"B": 1, "lengths": ()}]
)
def test_nothing_to_do(backend: str, device: str, short: StepCase, changes: Any) -> None:
    case = replace(short, **changes)
    inputs = make_step(case, device)
    before = inputs["state"].clone()
    require(backend, inputs)
    o = gdn.gated_delta_net_decode(**inputs, backend=backend)
    assert o.shape == inputs["v"].shape
    assert torch.equal(inputs["state"], before)


@pytest.mark.parametrize("case", [SHORT, replace(SHORT, slots="each")], ids=lambda c: c.slots)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, case: StepCase) -> None:
    inputs = make_step(replace(case, dtype=dtype), device)
    require(backend, inputs)
    step = as_step(inputs)
    arguments = (*step.call, *step[1:], backend)
    torch.library.opcheck(torch.ops.gdn.decode.default, arguments)


def test_compiles_into_one_node(backend: str, device: str, short: StepCase) -> None:
    inputs = make_step(short, device)
    require(backend, inputs)
    again = inputs | {"state": copy_pool(inputs["state"])}

    def step(inputs: dict[str, Any]) -> torch.Tensor:
        return gdn.gated_delta_net_decode(**inputs, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), step(again))
    assert torch.equal(inputs["state"], again["state"])


def test_in_place_update_is_seen_by_autograd(device: str) -> None:
    inputs = make_step(SHORT, device)
    weights = torch.ones((), device=device, requires_grad=True)
    product = (weights * inputs["state"]).sum()
    gdn.gated_delta_net_decode(**inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_gradients_are_refused(device: str) -> None:
    inputs = make_step(SHORT, device)
    inputs["A_log"].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable, and A_log requires grad"):
        gdn.gated_delta_net_decode(**inputs)
    with torch.no_grad():
        gdn.gated_delta_net_decode(**inputs)


@pytest.mark.gpu
def test_graph_replays_with_other_slots(backend: str, short: StepCase) -> None:
    inputs = make_step(short, "cuda")
    require(backend, inputs)
    if not capabilities_of(backend).cuda_graph:
        pytest.skip("does not claim CUDA graphs")
    gdn.gated_delta_net_decode(**inputs, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gdn.gated_delta_net_decode(**inputs, backend=backend)
    for seed in (5, 6):
        fresh = make_step(short, "cuda", seed=seed)
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor):
                x.copy_(fresh[name])
        graph.replay()
        expected = gdn.gated_delta_net_decode(**fresh, backend=backend)
        assert torch.equal(o, expected)
        assert torch.equal(inputs["state"], fresh["state"])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "tilelang"])
def test_after_warmup_no_step_compiles(backend: str) -> None:
    """Other numbers of sequences, tokens and columns, and rows that are not aligned."""
    case = StepCase(
        "warm", B=3, T=2, HV=4, K=128, V=128, dtype=torch.bfloat16, slots="each", fused=True
    )
    require(backend, make_step(case, "cuda"))
    gdn.warmup(**make_step(case, "cuda"), backend=backend)
    if backend == "triton":
        from gdn.backends.triton.decode import decode_kernel

        def compiled() -> int:
            return len(decode_kernel.device_caches[torch.cuda.current_device()][0])
    else:
        from gdn.backends.tilelang.decode.kernel import decode_kernel

        def compiled() -> int:
            return decode_kernel.cache_info().misses

    before = compiled()
    for B, T, shift in ((1, 1, 0), (16, 2, 0), (300, 3, 0), (3, 16, 1), (64, 5, 1)):
        inputs = make_step(replace(case, B=B, T=T), "cuda")
        for name in ("q", "k", "v"):
            x = inputs[name]
            wide = x.new_zeros(x.numel() + 8)
            inputs[name] = wide[shift : shift + x.numel()].view(x.shape).copy_(x)
        assert_step_agrees(backend, replace(case, B=B, T=T), inputs)
    assert compiled() == before
