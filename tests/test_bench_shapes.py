"""The benchmarks' shapes: what their notation means, and that rows with and without the L2 norm are
kept apart."""

from __future__ import annotations

import shapes
import torch
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
