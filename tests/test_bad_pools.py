"""Malformed prefills on a pool, and decode steps with its newer options: the error names the
argument, the requirement and what it got, and `explain` raises the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bad_input import ints

import gdn
from gdn.testing.decode import StepCase, make_step
from gdn.testing.prefill import PrefillCase, make_prefill

ones = torch.ones
PLAIN = PrefillCase("plain", B=2, T=130, HV=4, K=8, V=16, pool=torch.float32)
STORED = PrefillCase("stored", B=2, T=130, HV=4, K=8, V=16, checkpoints="pool")
MANY = PrefillCase("many", B=2, T=130, HV=4, K=8, V=16, checkpoints="pool", columns=2)
BUFFER = PrefillCase("buffer", B=2, T=130, HV=4, K=8, V=16, checkpoints="buffer")
BAD_PREFILLS: dict[str, tuple[Any, ...]] = {
    "state-none": (PLAIN, {"state": None}, "state must be a torch.Tensor"),
    "state-dtype": (
        PLAIN,
        {"state": ones(6, 4, 8, 16).double()},
        "float32 or",
        "got torch.float64",
    ),
    "state-flipped": (PLAIN, {"state": ones(6, 4, 16, 8)}, "pass state_v_first=True"),
    "indices-table": (PLAIN, {"state_indices": ints([1], [2])}, "[N] = (2,), got (2, 1)"),
    "indices-twice": (PLAIN, {"state_indices": ints(3, 3)}, "written once", "got 3 twice"),
    "fresh-ints": (PLAIN, {"fresh": ints(0, 1)}, "fresh must be bool", ".bool()"),
    "fresh-shape": (PLAIN, {"fresh": ones(3).bool()}, "fresh must be [N] = (2,)"),
    "offsets-alone": (PLAIN, {"checkpoint_offsets": ints(0, 64)}, "either", "neither"),
    "indices-alone": (PLAIN, {"checkpoint_indices": ints(1, 2)}, "with checkpoint_offsets"),
    "both": (STORED, {"checkpoints": ones(2, 4, 8, 16)}, "checkpoint_indices and checkpoints"),
    "offsets-float": (STORED, {"checkpoint_offsets": ones(2)}, "int32 or int64"),
    "offsets-rank": (STORED, {"checkpoint_offsets": ints([[0]], [[0]])}, "[N] or [N, C]"),
    "offsets-shape": (MANY, {"checkpoint_offsets": ints([0, 0])}, "[N, C] = (2, 2)"),
    "offsets-odd": (STORED, {"checkpoint_offsets": ints(0, 65)}, "multiples of 64", "got 65"),
    "offsets-long": (STORED, {"checkpoint_offsets": ints(192, 0)}, "length 130", "got 192"),
    "offsets-low": (STORED, {"checkpoint_offsets": ints(-64, 0)}, "multiples of 64", "got -64"),
    "slots-shape": (MANY, {"checkpoint_indices": ints(1, 2)}, "checkpoint_offsets' shape = (2, 2)"),
    "slot-twice": (MANY, {"checkpoint_indices": ints([1, 2], [3, 1])}, "got 1 twice"),
    "buffer-shape": (BUFFER, {"checkpoints": ones(2, 4, 16, 8)}, "(2, 4, 8, 16)"),
    "buffer-dtype": (BUFFER, {"checkpoints": ones(2, 4, 8, 16).half()}, "state's dtype"),
    "buffer-strides": (BUFFER, {"checkpoints": ones(2, 4, 16, 8).mT}, "checkpoints must be contig"),
    "out-shape": (PLAIN, {"out": ones(2, 130, 4, 8)}, "out must be v's shape = (2, 130, 4, 16)"),
    "out-dtype": (PLAIN, {"out": ones(2, 130, 4, 16).half()}, "out must have v's dtype"),
    "out-strides": (PLAIN, {"out": ones(2, 4, 130, 16).transpose(1, 2)}, "out must be contiguous"),
    "out-device": (PLAIN, {"out": ones(2, 130, 4, 16, device="meta")}, "on q's device"),
}
STEP = StepCase("step", B=2, T=2, HV=4, K=8, V=16)
EACH = StepCase("each", B=2, T=2, HV=4, K=8, V=16, slots="each", leading=False)
ELSEWHERE = StepCase("elsewhere", B=2, T=2, HV=4, K=8, V=16, output="each")
BAD_STEPS: dict[str, tuple[Any, ...]] = {
    "columns": (EACH, {"state_indices": ints([0, 1, 2], [3, 4, 5])}, "[N, T] = (2, 2)"),
    "accepted-low": (EACH, {"num_accepted_tokens": ints(1, 0)}, "lie in 1..T = 2, got 0"),
    "accepted-high": (EACH, {"num_accepted_tokens": ints(3, 1)}, "lie in 1..T = 2, got 3"),
    "states-alone": (STEP, {"output_states": ones(4, 4, 8, 16)}, "together", "only output_states"),
    "indices-alone": (STEP, {"output_indices": ints(0, 1)}, "together", "only output_indices"),
    "table": (
        ELSEWHERE, {"state_indices": ints([0, 1, 2], [3, 4, 5])}, "[N] with output_states",
    ),
    "states-dtype": (ELSEWHERE, {"output_states": ones(4, 4, 8, 16).half()}, "state's dtype"),
    "states-flipped": (ELSEWHERE, {"output_states": ones(4, 4, 16, 8)}, "pass state_v_first"),
    "output-columns": (ELSEWHERE, {"output_indices": ints([0], [1])}, "[N, T] = (2, 2)"),
    "output-high": (ELSEWHERE, {"output_indices": ints([0, 1], [2, 4])}, "0..3", "got 4"),
    "output-twice": (ELSEWHERE, {"output_indices": ints([0, 1], [2, 1])}, "got 1 twice"),
    "out-shape": (STEP, {"out": ones(2, 2, 4, 8)}, "out must be v's shape = (2, 2, 4, 16)"),
}  # fmt: skip


PACKED = StepCase("packed", lengths=(1, 1), HV=4, K=8, V=16, slots="each", leading=False)
BAD_STEPS |= {
    "no-columns": (
        PACKED, {"state_indices": ints([], []), "num_accepted_tokens": None}, "column or more",
    ),
    "no-output-columns": (
        StepCase("packed-elsewhere", lengths=(1, 1), HV=4, K=8, V=16, output="each"),
        {"output_indices": ints([], [])}, "output_indices must have a column or more",
    ),
    "accepted-packed": (PACKED, {"num_accepted_tokens": ints(1, 2)}, "lie in 1..1, got 2"),
    "accepted-alone": (
        STEP, {"num_accepted_tokens": ints(1, 1), "leading_column": False}, "[N, T], got (2,)",
    ),
    "leading-none": (STEP, {"leading_column": None}, "leading_column must be a bool, got NoneType"),
    "out-negated": (STEP, {"out": torch._neg_view(ones(2, 2, 4, 16))}, "out must not", "negates"),
    "states-negated": (
        ELSEWHERE, {"output_states": torch._neg_view(ones(4, 4, 8, 16))}, "output_states.resolve",
    ),
}  # fmt: skip
BAD_PREFILLS |= {
    "buffer-negated": (
        BUFFER, {"checkpoints": torch._neg_view(ones(2, 4, 8, 16))}, "checkpoints.resolve_neg()",
    ),
}  # fmt: skip


def check(op: Any, inputs: dict[str, Any], words: list[str], **kind: Any) -> None:
    texts = []
    for function in (lambda: op(**inputs), lambda: gdn.explain(**inputs, **kind)):
        with pytest.raises((ValueError, TypeError)) as error:
            function()
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert all(word in texts[0] for word in words), texts[0]


@pytest.mark.parametrize("name", BAD_PREFILLS)
def test_bad_prefills(name: str) -> None:
    case, changes, *words = BAD_PREFILLS[name]
    check(gdn.gated_delta_net_prefill, make_prefill(case) | changes, words, prefill=True)


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps(name: str) -> None:
    case, changes, *words = BAD_STEPS[name]
    check(gdn.gated_delta_net_decode, make_step(case) | changes, words)


def test_a_skipped_row_may_hold_anything() -> None:
    """Its offsets and slots are not checked."""
    inputs = make_prefill(STORED)
    inputs["state_indices"] = ints(0, 10**6)
    inputs["checkpoint_offsets"] = ints(64, 77)
    inputs["checkpoint_indices"] = ints(1, 0)
    o = gdn.gated_delta_net_prefill(**inputs)
    assert not o[1].any()


def test_states_and_outputs_must_not_share_memory() -> None:
    memory = torch.zeros(4096)
    pool = memory[:3072].view(6, 4, 8, 16)
    own = {"state": pool, "state_indices": ints(0, 1)}
    step, prefill = make_step(ELSEWHERE) | own, make_prefill(BUFFER) | own
    decode, whole = gdn.gated_delta_net_decode, gdn.gated_delta_net_prefill
    check(decode, step | {"output_states": pool[2:]}, ["output_states must not share", "state,"])
    out = memory[3000:3256].view(2, 2, 4, 16)
    check(decode, step | {"out": out}, ["out must not share memory with state"])
    buffer = prefill | {"checkpoints": pool[4:]}
    check(whole, buffer, ["checkpoints must not share memory with state"], prefill=True)


def test_slots_of_two_pools_may_alternate_in_one_buffer() -> None:
    inputs = make_step(ELSEWHERE)
    expected = gdn.gated_delta_net_decode(**inputs)
    slots = max(len(inputs["state"]), len(inputs["output_states"]))
    both = torch.zeros(slots, 2, 4, 8, 16)
    both[: len(inputs["state"]), 0] = inputs["state"]
    pools = {"state": both[:, 0], "output_states": both[:, 1]}
    assert torch.equal(gdn.gated_delta_net_decode(**inputs | pools), expected)
    shifted = both.view(slots, -1)[:, 256:768].view(slots, 4, 8, 16)
    pools["output_states"] = shifted
    check(gdn.gated_delta_net_decode, inputs | pools, ["output_states must not share memory"])


def test_a_step_without_tokens_takes_a_table_without_columns() -> None:
    inputs = make_step(EACH)
    inputs |= {name: inputs[name][:, :0] for name in ("q", "k", "v", "g", "beta")}
    inputs |= {"state_indices": ints([], []), "num_accepted_tokens": None}
    assert gdn.gated_delta_net_decode(**inputs).shape == (2, 0, 4, 16)


def test_a_skipped_row_without_state_indices_writes_nothing() -> None:
    inputs = make_step(StepCase("own", B=2, HV=4, K=8, V=16, slots="own", output="last"))
    inputs |= {"null_index": 1, "output_indices": ints(0, 0)}
    o = gdn.gated_delta_net_decode(**inputs)
    assert o[0].any()
    assert not o[1].any()


@pytest.mark.parametrize("function", [gdn.explain, gdn.warmup])
def test_an_option_of_another_kind_of_call_names_what_is_missing(function: Any) -> None:
    prefill, step = make_prefill(PLAIN), make_step(EACH)
    with pytest.raises(ValueError, match="fresh must come with prefill=True, got False"):
        function(**prefill | {"fresh": ones(2).bool()})
    with pytest.raises(ValueError, match="num_accepted_tokens must come with prefill=False"):
        function(**make_prefill(PLAIN) | {"num_accepted_tokens": ints(1, 1)}, prefill=True)
    del step["state"]
    with pytest.raises(ValueError, match="must come with state, got None"):
        function(**step)
