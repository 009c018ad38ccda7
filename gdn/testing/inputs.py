"""Inputs of a case, its gradients, and its results by the definition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.definition import gated_delta_rule, initialize_gates, log_decay
from gdn.problem import DIFFERENTIABLE, Call

from .cases import Case


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _keys(case: Case, B: int, T: int, generator: torch.Generator) -> Tensor:
    """Keys of the case's norm whose pairwise cosine is `case.cosine` on average."""
    own = F.normalize(_normal(generator, B, T, case.H, case.K), dim=-1)
    common = F.normalize(_normal(generator, 1, 1, case.H, case.K), dim=-1)
    keys = F.normalize(case.cosine**0.5 * common + (1 - case.cosine) ** 0.5 * own, dim=-1)
    return case.key_norm * keys


def _log_decay(case: Case, B: int, T: int, generator: torch.Generator) -> Tensor:
    shape = (B, T, *_gate_shape(case))
    if case.gates in ("model", "fast"):
        A_log, dt_bias = _gate_parameters(case, generator)
        return log_decay(_normal(generator, *shape), A_log, dt_bias)
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    if case.gates == "none":
        return torch.zeros_like(uniform)
    if case.gates == "weak":
        return -2e-3 * uniform
    if case.gates == "strong":
        return -10 - 20 * uniform
    g = -5 * uniform**4
    if case.per_channel and case.gates == "mixed":
        g[..., ::3] = 0
        g[..., 1::5] = -25
    if case.gates == "resets":
        places = torch.rand(shape, generator=generator, device=generator.device)
        for n, value in enumerate((-torch.inf, -1e9, -200.0)):
            g = g.masked_fill((places > 0.04 * n) & (places < 0.04 * (n + 1)), value)
    return g


def _gate_shape(case: Case) -> tuple[int, ...]:
    """Of g at a token, and of dt_bias: HV, or HV and K."""
    return (case.HV, case.K) if case.per_channel else (case.HV,)


def _gate_parameters(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A_log, dt_bias: for "fast" and "model" those of a new layer ("model": A in (0, 16), per
    channel in (1, 16); step in (1e-3, 0.1)), else normal numbers."""
    shape = _gate_shape(case)
    if case.gates == "steep":
        noise = 0.5 * _normal(generator, *shape)
        return noise.new_full((case.HV,), 100.0), noise - 101
    if case.gates == "fast":
        A_log, dt_bias = (torch.empty(n, device=generator.device) for n in (case.HV, shape))
        initialize_gates(A_log, dt_bias, generator)
        return A_log, dt_bias
    if case.gates != "model":
        return 0.5 * _normal(generator, case.HV), 0.5 * _normal(generator, *shape)
    empty = torch.empty(shape, device=generator.device)
    least, span = (1.0, 15.0) if case.per_channel else (1e-2, 16.0)
    A = least + span * torch.rand(case.HV, generator=generator, device=generator.device)
    step = empty.uniform_(-6.9, -2.3, generator=generator).exp()
    return A.log(), step + torch.log(-torch.expm1(-step))


def make_inputs(
    case: Case,
    device: torch.device | str = "cpu",
    seed: int = 0,
    draw: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments of `gdn.gated_delta_net` for a case, without gradients. They are drawn on
    the CPU, so that values are the same on every device; `draw` names another device, which is
    faster for large cases.

    g and beta are float32, q, k, v the case's dtype, states and gate parameters float32 (float64 in
    float64).
    """
    generator = torch.Generator(draw).manual_seed(seed)
    B, T, state = case.B, case.tokens, (case.K, case.V)
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    q = F.normalize(_normal(generator, B, T, case.H, case.K), dim=-1)
    k = _keys(case, B, T, generator)
    v = _normal(generator, B, T, case.HV, case.V)
    beta = _normal(generator, B, T, case.HV)
    if case.l2norm or case.fused:
        q, k = 3 * q, 2 * k
    if case.fused:
        g = _normal(generator, B, T, *_gate_shape(case))
        g = g + 15 if case.gates == "strong" else g
    else:
        beta = beta.sigmoid()
        g = _log_decay(case, B, T, generator)
    if case.beta is not None:
        beta = torch.full_like(beta, case.beta)
    options: dict[str, Any] = {"output_final_state": True, "state_v_first": case.state_v_first}
    if case.initial_state:
        S = _normal(generator, case.sequences, case.HV, *state)
        S = S.mT.contiguous() if case.state_v_first else S
        options["initial_state"] = S.to(device, exact)
    if case.l2norm or case.fused:
        options["use_qk_l2norm_in_kernel"] = True
    if case.fused:
        A_log, dt_bias = _gate_parameters(case, generator)
        options |= {"A_log": A_log.to(device, exact), "dt_bias": dt_bias.to(device, exact)}
        options["allow_neg_eigval"] = case.allow_neg_eigval
        options["gate_lower_bound"] = case.gate_lower_bound
        options |= {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    if case.lengths is not None:
        bounds = [0, *torch.tensor(case.lengths).cumsum(0).tolist()]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    qkv = {"q": q, "k": k, "v": v}
    tensors = {name: x.to(device, case.dtype) for name, x in qkv.items()}
    return tensors | {"g": g.to(device, exact), "beta": beta.to(device, exact)} | options


def with_gradients(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The inputs with fresh leaves that require grad, cast to `dtype` if given."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()

    return {
        name: leaf(x) if name in DIFFERENTIABLE and x is not None else x
        for name, x in inputs.items()
    }


def make_output_gradients(
    case: Case, device: torch.device | str = "cpu", draw: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random gradients of o (the case's dtype) and of the final state, for one case, drawn as in
    `make_inputs`.

    They are scaled so that the gradients of the suite's cases have elements of order 1 or less: the
    absolute tolerance then suits them as well as the relative one.
    """
    generator = torch.Generator(draw).manual_seed(1)
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    state = (case.V, case.K) if case.state_v_first else (case.K, case.V)
    do = _normal(generator, case.B, case.tokens, case.HV, case.V) / 32
    dS = _normal(generator, case.sequences, case.HV, *state) / 32
    return do.to(device, case.dtype), dS.to(device, exact)


def gradients(
    outputs: tuple[Tensor, ...],
    inputs: dict[str, Any],
    output_gradients: tuple[Tensor, ...],
    again: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the differentiable inputs, by name, given those of o and of the final state.
    With `again` the graph is kept for another backward."""
    names = [name for name in DIFFERENTIABLE if inputs.get(name) is not None]
    into = [gradient.to(x) for gradient, x in zip(output_gradients, outputs, strict=True)]
    found = torch.autograd.grad(
        outputs,
        [inputs[name] for name in names],
        into,
        retain_graph=again,
        materialize_grads=True,
    )
    return dict(zip(names, found, strict=True))


def run_definition(
    inputs: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """o and the final state by the definition, from the keyword arguments of
    `gdn.gated_delta_net`."""
    options = dict(inputs)
    options.setdefault("scale", inputs["q"].shape[-1] ** -0.5)
    return gated_delta_rule(Call(**options), dtype)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth|| (the norm of got if truth is zero); NaN never passes a
    comparison."""
    got, truth = got.double(), truth.double().to(got.device)
    scale = truth.norm().item()
    return float((got - truth).norm().item() / (scale if scale > 0 else 1.0))
