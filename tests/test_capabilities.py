"""Capabilities: each one that a backend does not declare is a reason against a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdn.backend import Capabilities, reasons_against
from gdn.problem import FLAGS, Problem


def problem(**changes: Any) -> Problem:
    values = {
        "B": 1, "T": 8, "H": 2, "HV": 2, "K": 64, "V": 64, "N": 1, "dtype": torch.float32,
        "device": "cuda", "sm": 90, "varlen": False, "initial_state": False, "needs_grad": False,
        "flags": frozenset(),
    }  # fmt: skip
    return Problem(**values | changes)


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        ({"dtypes": (torch.float16,)}, {}, "dtype must be one of float16, got float32"),
        ({"devices": ("cpu", "mps")}, {}, "tensors must be on cpu or mps, got cuda"),
        ({"min_sm": 100}, {}, "needs sm_100 or newer, got sm_90"),
        ({"max_sm": 80}, {}, "needs sm_80 or older, got sm_90"),
        ({"min_sm": 80}, {"sm": None, "device": "cpu"}, "needs an NVIDIA GPU"),
        ({"head_dims": (128, 256)}, {"V": 128}, "K must be one of 128, 256, got 64"),
        ({"max_v": 32}, {}, "V must be at most 32, got 64"),
        ({}, {"HV": 4}, "no grouped value heads"),
        ({}, {"varlen": True}, "cu_seqlens is not supported"),
        ({}, {"initial_state": True}, "initial_state is not supported"),
        ({}, {"needs_grad": True}, "backward is not supported"),
        ({}, {"pool": torch.float32}, "decode is not supported"),
        ({"decode": (torch.bfloat16,)}, {"pool": torch.float32}, "state must be one of bfloat16"),
        ({}, {"speculative": True}, "a slot for each token (state_indices [N, 1 + T]) is not"),
        ({}, {"output_states": True}, "output_states are not supported"),
        ({}, {"pool": torch.float32, "prefill": True}, "prefill on a pool is not supported"),
        ({"prefill": (torch.float16,)}, {"pool": torch.float32, "prefill": True}, "one of float16"),
        ({}, {"checkpoints": True}, "checkpoints are not supported"),
        ({}, {"per_channel": True}, "a decay per channel (g [B, T, HV, K]) is not supported"),
        ({}, {"gate_lower_bound": -5.0}, "gate_lower_bound is not supported"),
        ({}, {"context_parallel": True}, "context parallelism (cp=, gdn.distributed)"),
        ({}, {"batch_invariant": True}, "batch invariance (gdn.batch_invariant) is not supported"),
        *(({}, {"flags": frozenset([flag])}, f"{flag} is not supported") for flag in FLAGS),
    ],
)
def test_each_capability_is_a_reason(
    capability: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    """Without the capability there is one reason; capabilities default to no."""
    every = {
        "dtypes": (torch.float32,), "gva": True, "varlen": True, "initial_state": True,
        "backward": True, "decode": (torch.float32,), "speculative": True,
        "output_states": True, "prefill": (torch.float32,), "checkpoints": True,
        "per_channel": True, "gate_lower_bound": True, "context_parallel": True,
        "batch_invariant": True, "flags": frozenset(FLAGS),
    }  # fmt: skip
    assert reasons_against(Capabilities(**every), problem(**changes)) == []
    every = {"dtypes": (torch.float32,)}
    (found,) = reasons_against(Capabilities(**every | capability), problem(**changes))
    assert reason in found


@given(
    st.builds(
        Capabilities,
        dtypes=st.sets(st.sampled_from([torch.float32, torch.bfloat16])).map(tuple),
        gva=st.booleans(),
        varlen=st.booleans(),
        backward=st.booleans(),
        max_k=st.none() | st.integers(1, 256),
        min_sm=st.none() | st.sampled_from([80, 90, 100]),
        flags=st.frozensets(st.sampled_from(FLAGS)),
    ),
    st.builds(
        problem,
        K=st.integers(1, 256),
        HV=st.sampled_from([2, 4]),
        varlen=st.booleans(),
        needs_grad=st.booleans(),
        sm=st.none() | st.sampled_from([80, 90]),
        flags=st.frozensets(st.sampled_from(FLAGS)),
    ),
)
def test_more_capable_never_means_more_reasons(capabilities: Capabilities, p: Problem) -> None:
    everything = Capabilities(
        dtypes=(torch.float32,), gva=True, varlen=True, backward=True, flags=frozenset(FLAGS)
    )
    assert reasons_against(everything, p) == []
    reasons = reasons_against(capabilities, p)
    wrong = [
        p.dtype not in capabilities.dtypes,
        p.HV != p.H and not capabilities.gva,
        p.varlen and not capabilities.varlen,
        p.needs_grad and not capabilities.backward,
        capabilities.max_k is not None and capabilities.max_k < p.K,
        capabilities.min_sm is not None and (p.sm is None or p.sm < capabilities.min_sm),
        *(flag not in capabilities.flags for flag in p.flags),
    ]
    assert len(reasons) == sum(wrong)
