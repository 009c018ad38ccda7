"""DTensor inputs of the op on the ranks of a mesh: what each process of `test_context_parallel.py`
runs besides its cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from context_parallel_ranks import TOKENS, run_cases
from data_parallel_ranks import check_data_parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import gdn
from gdn.testing import Case, make_inputs
from gdn.testing.inputs import gradients, make_output_gradients, with_gradients

DIMENSIONS = dict.fromkeys(TOKENS, 2) | {"initial_state": 1, "A_log": 0, "dt_bias": 0}
CASE = Case("sharded", T=21, H=2, HV=4, K=8, V=12, dtype=torch.float64, fused=True)


def run_all(rank: int, *args: Any) -> None:
    """`run_cases`, then `check_heads` and `check_data_parallel`."""
    run_cases(rank, *args)
    check_heads(rank)
    check_data_parallel()


def check_heads(rank: int) -> None:
    """Heads sharded over one dimension of a mesh of 2 x 2; the other one replicates, or splits
    tokens. Outputs and gradients against those of one rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    exact = with_gradients(make_inputs(CASE))
    do, dS = make_output_gradients(CASE)
    want = gdn.gated_delta_net(**exact, backend="torch")
    expected = gradients(want, exact, (do, dS), again=True)

    def shard(x: torch.Tensor, dim: int, on: Any = mesh) -> Any:
        placements = [Replicate(), Shard(dim)][-on.ndim :]
        return distribute_tensor(x.detach(), on, placements).requires_grad_()

    sharded = {n: shard(x, DIMENSIONS[n]) if n in DIMENSIONS else x for n, x in exact.items()}
    got: Any = gdn.gated_delta_net(**sharded, backend="torch")
    assert got.o.placements == (Replicate(), Shard(2))
    close(got.o.full_tensor(), want.o)
    close(got.final_state.full_tensor(), want.final_state)
    (got.o * shard(do, 2)).sum().backward(retain_graph=True)
    (got.final_state * shard(dS, 1)).sum().backward()
    for name, x in expected.items():
        close(sharded[name].grad.full_tensor(), x)

    plain = {n: exact[n] for n in ("q", "k", "v", "beta")}
    want_plain = gdn.gated_delta_net(**plain, g=None, backend="torch").o
    plain = {n: sharded[n] for n in plain}
    o: Any = gdn.gated_delta_net(**plain, g=None, backend="torch").o
    close(o.full_tensor(), want_plain)

    part = slice(0, 9) if rank < 2 else slice(9, 21)
    own = {n: exact[n][:, part] if n in TOKENS else exact[n] for n in DIMENSIONS}
    split = {n: x for n, x in exact.items() if n not in DIMENSIONS}
    split |= {n: shard(x, DIMENSIONS[n], mesh["tp"]) for n, x in own.items()}
    both: Any = gdn.gated_delta_net(**split, cp=gdn.ContextParallel(mesh["cp"]), backend="torch")
    close(both.o.full_tensor(), want.o[:, part])
    close(both.final_state.full_tensor(), want.final_state)
    both.o.backward(shard(do[:, part], 2, mesh["tp"]))
    without_states = gradients(want[:1], exact, (do,))
    for name in TOKENS:
        close(split[name].grad.full_tensor(), without_states[name][:, part])

    for name, bad in (("q", Shard(1)), ("k", Replicate()), ("initial_state", Shard(2))):
        wrong = sharded | {name: distribute_tensor(exact[name].detach(), mesh, [Replicate(), bad])}
        with pytest.raises(ValueError, match=f"^{name} must be .*(Shard|Replicate)"):
            gdn.gated_delta_net(**wrong, backend="torch")
    with pytest.raises(ValueError, match="beta must be a DTensor on q's mesh"):
        gdn.gated_delta_net(**sharded | {"beta": exact["beta"]}, backend="torch")
    odd = make_inputs(Case("odd", T=3, H=1, HV=4, K=8, V=8))
    odd = {name: shard(odd[name], 2) for name in TOKENS}
    with pytest.raises(ValueError, match="H and HV must be multiples of the 2 shards"):
        gdn.gated_delta_net(**odd, backend="torch")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-11, atol=1e-11)
