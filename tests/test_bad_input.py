"""Malformed arguments: a ValueError with the argument, the requirement, the value and a remedy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdn
from gdn.testing import Case, make_inputs
from gdn.testing.decode import StepCase, make_step

DENSE = Case("bad", T=5, B=2, HV=4, K=8, V=16)
PACKED = Case("bad-packed", lengths=(2, 3), HV=4, K=8, V=16)
FUSED = Case("bad-fused", T=5, HV=4, K=8, V=16, fused=True)


def refuse(case: Case, *words: str, **changes: Any) -> None:
    """Assert that the call raises a ValueError with all these words, and `explain` the same one."""
    inputs = make_inputs(case) | changes
    texts = []
    for function in (gdn.gated_delta_net, gdn.explain):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the words are the match
            function(**inputs)
        texts.append(str(error.value))
    for word in (*words, "got"):
        assert word in texts[0]
    assert texts[0] == texts[1]


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **options)


BAD = {
    "q-rank": (DENSE, {"q": ones(5, 2, 8)}, "q must be [B, T, H, K]", "(5, 2, 8)"),
    "k-shape": (DENSE, {"k": ones(2, 5, 2, 7)}, "k must be [B, T, H, K] = (2, 5, 2, 8)", "q's"),
    "v-time": (DENSE, {"v": ones(2, 6, 4, 16)}, "v must be [B, T, HV, V] = (2, 5, 4, 16)"),
    "v-heads": (DENSE, {"v": ones(2, 5, 3, 16)}, "HV must be a multiple of H", "HV = 3"),
    "no-head-dim": (DENSE, {"v": ones(2, 5, 4, 0)}, "at least 1", "V = 0"),
    "g-shape": (DENSE, {"g": ones(2, 5, 2)}, "g must be [B, T, HV] = (2, 5, 4)", "(2, 5, 2)"),
    "beta-shape": (DENSE, {"beta": ones(2, 4, 5)}, "beta must be [B, T, HV] = (2, 5, 4)"),
    "q-int": (DENSE, {"q": ones(2, 5, 2, 8).long()}, "q must be float16", "torch.int64", ".to("),
    "g-int": (DENSE, {"g": ones(2, 5, 4).int()}, "g must be a floating-point", ".float()"),
    "device-mix": (DENSE, {"g": ones(2, 5, 4, device="meta")}, "g must be on q's device", ".to("),
    "state-rank": (DENSE, {"initial_state": ones(2, 4, 8)}, "[N, HV, K, V] = (2, 4, 8, 16)"),
    "state-number": (DENSE, {"initial_state": ones(1, 4, 8, 16)}, "initial_state", "(2, 4, 8, 16)"),
    "state-flipped": (DENSE, {"initial_state": ones(2, 4, 16, 8)}, "pass state_v_first=True"),
    "state-flipped-back": (
        DENSE, {"state_v_first": True}, "[N, HV, V, K] = (2, 4, 16, 8)", "pass state_v_first=False",
    ),
    "state-int": (DENSE, {"initial_state": ones(2, 4, 8, 16).int()}, "initial_state", "int32"),
    "scale-nan": (DENSE, {"scale": float("nan")}, "scale must be finite", "nan", "K^-0.5"),
    "scale-inf": (DENSE, {"scale": float("inf")}, "scale must be finite", "inf"),
    "gate-unasked": (DENSE, {"A_log": ones(4)}, "A_log must come with use_gate_in_kernel=True"),
    "gate-missing": (DENSE, {"use_gate_in_kernel": True}, "A_log must be given", "None"),
    "gate-shape": (FUSED, {"A_log": ones(2)}, "A_log must be [HV] = (4,)", "(2,)"),
    "bias-shape": (FUSED, {"dt_bias": ones(4, 1)}, "dt_bias must be [HV] = (4,)", "(4, 1)"),
    "negative": (DENSE, {"allow_neg_eigval": True}, "allow_neg_eigval", "multiply it by 2"),
    "lengths-batch": (DENSE, {"cu_seqlens": torch.tensor([0, 5])}, "B = 1 with cu_seqlens"),
    "lengths-float": (PACKED, {"cu_seqlens": ones(3)}, "cu_seqlens must be int32 or int64"),
    "lengths-rank": (PACKED, {"cu_seqlens": torch.zeros(1, 3, dtype=torch.int32)}, "[N + 1]"),
    "lengths-none": (PACKED, {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "[N + 1]"),
    "lengths-start": (PACKED, {"cu_seqlens": torch.tensor([1, 2, 5])}, "must start at 0", "got 1"),
    "lengths-fall": (PACKED, {"cu_seqlens": torch.tensor([0, 6, 5])}, "not descend", "6 then 5"),
    "lengths-end": (PACKED, {"cu_seqlens": torch.tensor([0, 2, 6])}, "end at T = 5", "got 6"),
    "host-lengths-alone": (DENSE, {"cu_seqlens_cpu": torch.tensor([0, 5])}, "come with cu_seqlens"),
    "host-lengths-other": (
        PACKED, {"cu_seqlens_cpu": torch.tensor([0, 1, 5])}, "hold what cu_seqlens", "[0, 1, 5]",
    ),
    "host-lengths-shape": (PACKED, {"cu_seqlens_cpu": torch.tensor([0, 5])}, "= (3,)"),
    "indices-alone": (DENSE, {"chunk_indices": torch.zeros(1, 2, dtype=torch.int32)}, "dense"),
    "indices-shape": (PACKED, {"chunk_indices": torch.zeros(2, dtype=torch.int32)}, "[chunks, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_is_refused_with_argument_requirement_got_and_remedy(name: str) -> None:
    case, changes, *words = BAD[name]
    refuse(case, *words, **changes)


STEP = StepCase("bad-step", B=2, T=2, HV=4, K=8, V=16)
EACH = StepCase("bad-each", B=2, T=2, HV=4, K=8, V=16, slots="each")
OWN = StepCase("bad-own", B=2, T=2, HV=4, K=8, V=16, slots="own")


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_STEPS = {
    "q-shape": (STEP, {"q": ones(2, 2, 2, 7)}, "k must be [B, T, H, K] = (2, 2, 2, 7)"),
    "rank": (STEP, {"state": ones(4, 8, 16)}, "state must be [slots, HV, K, V]", "(4, 8, 16)"),
    "flipped": (STEP, {"state": ones(6, 4, 16, 8)}, "pass state_v_first=True"),
    "dtype": (STEP, {"state": ones(6, 4, 8, 16).int()}, "bfloat16 or torch.float16", "int32"),
    "transposed": (STEP, {"state": ones(6, 4, 16, 8).mT}, "contiguous slots", "strides"),
    "overlap": (STEP, {"state": ones(1, 4, 8, 16).expand(6, 4, 8, 16)}, "do not overlap"),
    "device": (STEP, {"state": ones(6, 4, 8, 16, device="meta")}, "state must be on q's device"),
    "slots": (OWN, {"state": ones(3, 4, 8, 16)}, "(2, 4, 8, 16)", "give state_indices"),
    "indices-float": (STEP, {"state_indices": ones(2)}, "state_indices must be int32 or int64"),
    "indices-number": (STEP, {"state_indices": ints(1, 2, 3)}, "[N] or [N, 1 + T] = (2,)"),
    "indices-columns": (STEP, {"state_indices": ints([1, 2], [3, 4])}, "= (2, 3), got (2, 2)"),
    "indices-high": (STEP, {"state_indices": ints(0, 6)}, "lie in 0..5", "got 6", "6 slots"),
    "indices-low": (STEP, {"state_indices": ints(0, -2)}, "null_index = -1", "got -2"),
    "indices-twice": (STEP, {"state_indices": ints(3, 3)}, "written once", "got 3 twice"),
    "columns-twice": (EACH, {"state_indices": ints([0, 1, 2], [3, 4, 1])}, "got 1 twice"),
    "column-twice": (EACH, {"state_indices": ints([0, 1, 1], [3, 4, 5])}, "got 1 twice"),
    "start-written": (
        EACH,
        {"state_indices": ints([0, 1, 2], [2, 4, 5]), "num_accepted_tokens": None},
        "another",
    ),
    "accepted-alone": (STEP, {"num_accepted_tokens": ints(0, 0)}, "[N, 1 + T], got (2,)"),
    "accepted-shape": (EACH, {"num_accepted_tokens": ints(0)}, "[N] = (2,), got (1,)"),
    "accepted-high": (EACH, {"num_accepted_tokens": ints(0, 3)}, "lie in 0..T = 2, got 3"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_refused_in_the_same_way(name: str) -> None:
    case, changes, *words = BAD_STEPS[name]
    inputs = make_step(case) | changes
    texts = []
    for function in (gdn.gated_delta_net_decode, gdn.explain):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the words are the match
            function(**inputs)
        texts.append(str(error.value))
    assert all(word in texts[0] for word in (*words, "got")), texts[0]
    assert texts[0] == texts[1]


@given(
    name=st.sampled_from(["q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"]),
    dim=st.integers(0, 3),
    size=st.integers(0, 20),
)
def test_any_wrong_size_is_refused(name: str, dim: int, size: int) -> None:
    """With one size of one tensor changed, the call is still well-formed or raises ValueError."""
    inputs = make_inputs(FUSED)
    shape = list(inputs[name].shape)
    if dim >= len(shape):
        return
    right = shape[dim] == size or (name == "v" and dim == 3 and size == 16)
    shape[dim] = size
    inputs[name] = torch.zeros(shape)
    if right:
        gdn.gated_delta_net(**inputs)
        return
    with pytest.raises(ValueError, match=r"must .*, got"):
        gdn.gated_delta_net(**inputs)


@given(bounds=st.lists(st.integers(-3, 8), min_size=1, max_size=5))
def test_any_lengths_are_taken_or_refused(bounds: list[int]) -> None:
    inputs = make_inputs(Case("bounds", lengths=(5,), K=4, V=4, initial_state=False))
    inputs["cu_seqlens"] = torch.tensor(bounds)
    if bounds[0] == 0 and bounds[-1] <= 5 and bounds == sorted(bounds):
        assert gdn.gated_delta_net(**inputs).final_state.shape[0] == len(bounds) - 1
        return
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gdn.gated_delta_net(**inputs)


@pytest.mark.parametrize("name", ["v", "initial_state", "A_log", "cu_seqlens"])
def test_an_argument_that_is_not_a_tensor_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got list"):
        gdn.gated_delta_net(**make_inputs(FUSED) | {name: [1.0]})


@pytest.mark.parametrize("name", ["beta", "state", "state_indices", "dt_bias"])
def test_a_step_argument_that_is_not_a_tensor_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got float"):
        gdn.gated_delta_net_decode(**make_step(STEP) | {name: 1.0})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("backend", ["torch"], "backend must be a str, got list.*write several backends as"),
        ("scale", "x", "scale must be a number, got str 'x'; leave it out"),
        ("scale", 1j, "scale must be a number, got complex 1j"),
        ("scale", torch.ones(2), "scale must be a number, got Tensor"),
        (
            "output_final_state",
            "yes",
            "output_final_state must be a bool, got str 'yes'; pass True",
        ),
        ("use_qk_l2norm_in_kernel", [1], r"use_qk_l2norm_in_kernel must be a bool, got list \[1\]"),
    ],
)
def test_other_arguments_of_a_wrong_type_are_type_errors(name: str, value: Any, words: str) -> None:
    for function in (gdn.gated_delta_net, gdn.explain, gdn.warmup):
        with pytest.raises(TypeError, match=words):
            function(**make_inputs(DENSE) | {name: value})


@pytest.mark.parametrize("value", ["0", 1.5, None])
def test_a_null_index_that_is_not_an_int_is_a_type_error(value: Any) -> None:
    for function in (gdn.gated_delta_net_decode, gdn.explain):
        with pytest.raises(TypeError, match="null_index must be an int, got"):
            function(**make_step(STEP) | {"null_index": value})


@pytest.mark.parametrize("scale", [1, True, np.float32(1), torch.tensor(1.0)])
def test_what_converts_to_a_number_is_taken(scale: Any) -> None:
    inputs = make_inputs(DENSE) | {"output_final_state": np.bool_(True)}
    expected = gdn.gated_delta_net(**inputs, scale=1.0)
    got = gdn.gated_delta_net(**inputs, scale=scale)
    assert torch.equal(got.o, expected.o)
    assert got.final_state is not None


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["q", "v"])
def test_autocast_leaves_other_dtypes_to_the_ordinary_error(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(DENSE)
    inputs[name] = inputs[name].to(dtype)
    with (
        torch.autocast("cpu"),
        pytest.raises(ValueError, match=rf"{name} must be float16.*{dtype}"),
    ):
        gdn.gated_delta_net(**inputs)


def test_options_come_by_keyword() -> None:
    inputs = make_inputs(DENSE)
    with pytest.raises(TypeError):
        gdn.gated_delta_net(*(inputs[n] for n in ("q", "k", "v", "g", "beta")), 1.0)


def test_keywords_of_fla_keep_their_meaning() -> None:
    inputs = make_inputs(PACKED)
    plain = gdn.gated_delta_net(**inputs)
    extra = {
        "cu_seqlens_cpu": inputs["cu_seqlens"].cpu(),
        "chunk_indices": torch.tensor([[0, 0], [1, 0]]),
    }
    assert torch.equal(gdn.gated_delta_net(**inputs, **extra).o, plain.o)
    state = inputs["initial_state"].mT.contiguous()
    with pytest.warns(DeprecationWarning, match="state_v_first") as caught:
        turned = gdn.gated_delta_net(
            **inputs | {"initial_state": state, "state_v_first": False}, transpose_state_layout=True
        )
    assert caught[0].filename == __file__
    assert torch.equal(turned.o, plain.o)
    assert torch.equal(turned.final_state, plain.final_state.mT)
    with pytest.raises(ValueError, match="got both"):
        gdn.gated_delta_net(**inputs | {"state_v_first": True}, transpose_state_layout=True)
    with pytest.raises(TypeError, match="head_first"):
        gdn.gated_delta_net(**inputs, head_first=True)


def test_a_wrong_call_is_refused_again_after_a_right_one() -> None:
    """The values are checked even if the choice of a backend is remembered."""
    inputs = make_inputs(PACKED)
    gdn.gated_delta_net(**inputs)
    refuse(PACKED, "must end at T", cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
    inputs["cu_seqlens"][-1] = 6
    with pytest.raises(ValueError, match="must end at T"):
        gdn.gated_delta_net(**inputs)


ON_GPU = """
import torch, gdn
from gdn.testing import Case, make_inputs
from gdn.testing.decode import StepCase, make_step
inputs = make_inputs(Case("gpu", lengths=(2, 3)), "cuda")
torch.cuda.set_sync_debug_mode("error")  # the check itself must not wait for the device
inputs["cu_seqlens"].{change}
from gdn.problem import Call
from gdn.validation import check_cu_seqlens
check_cu_seqlens(Call(**inputs))
torch.cuda.set_sync_debug_mode("default")
torch.cuda.synchronize()
print("no error")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["add_(0)", "add_(1)", "neg_()"])
def test_lengths_on_a_gpu_are_checked_without_waiting(change: str) -> None:
    """In a process of its own: a device-side assertion ends the CUDA context."""
    command = [sys.executable, "-c", ON_GPU.format(change=change)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if change == "add_(0)":
        assert ran.returncode == 0, ran.stderr
        assert "no error" in ran.stdout
    else:
        assert ran.returncode != 0
        assert "no error" not in ran.stdout
        assert "device-side assert" in ran.stderr
