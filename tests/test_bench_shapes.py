"""The benchmarks' shapes: what their notation means, that rows with and without the L2 norm are
kept apart, and which kernels they need."""

from __future__ import annotations

import ahead
import shapes
import torch
from gdn.backends.tilelang.build import parse_job
from report import rows as results


def test_many_short_sequences() -> None:
    case = shapes.make_case("2/8:64x1-300", "fast", torch.bfloat16, "no")
    assert sorted(case.lengths) == list(dict.fromkeys(sorted(case.lengths)))  # all differ
    assert (len(case.lengths), min(case.lengths), max(case.lengths)) == (64, 1, 300)
    assert case.tokens == case.T == sum(case.lengths)
    assert (case.l2norm, case.gates, case.state_v_first) == (False, "fast", True)
    assert shapes.make_case("2/8:1x64", "model", torch.bfloat16).l2norm
    assert shapes.make_case("2/8:1x3-5", "model", torch.bfloat16).lengths == (3,)


def test_rows_without_a_norm_field_had_it_fused() -> None:
    row = {"kind": "prefill", "gates": "fast", "backend": "mine", "latency_ms": 1.0}
    (old,) = results.rows_of({"benchmarks": [{"extra_info": row, "stats": {"median": 1.0}}]})
    new = old | {"norm": "no"}
    assert old["norm"] == "fused"
    assert results.setting(old) != results.setting(new)
    assert results.conditions(old) == "fast gates"
    assert results.conditions(new) == "fast gates, no norm"


def test_kernels_of_rows_are_listed() -> None:
    """As `gdn build-kernels --kernels-in` reads them; a bound is part of per-channel kernels."""
    plain = ahead.kernels("16/32:1x8192|8x1024", "fwd,bwd", "no", "head")
    assert {"fused_forward", "reverse_scan", "gradients"} <= {parse_job(x)[0].name for x in plain}
    bounded = ahead.kernels("16/16:1x8192", "fwd", "fused", "bounded")
    assert parse_job(bounded[0])[0].name == "prepare_channels"
    assert not {*plain} & {*bounded}
