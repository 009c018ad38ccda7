"""The op in plain PyTorch from three projects: gdn, fla (naive_chunk_gated_delta_rule, and
naive_chunk_kda for a decay per channel) and transformers (torch_chunk_gated_delta_rule,
chunk_kimi_delta_attention); and the peak memory of one call, in its own process."""

from __future__ import annotations

import ctypes
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import gdn
from gdn.testing import Case, gradients, make_inputs, make_output_gradients, with_gradients

HEAD = Case("peers", H=4, HV=8, K=128, V=128, initial_state=False)
CASES = {"head": HEAD, "channel": replace(HEAD, per_channel=True, gates="weak")}
"""By what decays: a value head as a whole, or each channel of K. There the gates are weak, since
gradients of naive_chunk_kda are NaN where a channel decays by e^-88 within a chunk."""
TOKENS = ("q", "k", "v", "g", "beta")

Op = Callable[..., Any]


def load(peer: str, decay: str) -> Op:
    """The peer's op on q, k, v, g, beta with grouped heads, returning o and the final state."""
    if peer == "gdn":
        return lambda *args: gdn.gated_delta_net(*args, output_final_state=True, backend="torch")
    if peer == "transformers":
        # unwrapped, since the decorators fetch other kernels from a hub
        if decay == "channel":
            from transformers.models.kimi_linear import modeling_kimi_linear

            return _ungrouped(inspect.unwrap(modeling_kimi_linear.chunk_kimi_delta_attention))
        from transformers.models.qwen3_5 import modeling_qwen3_5

        function = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
        return lambda *args: function(*args, output_final_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that there is no GPU
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
        from fla.ops.kda.naive import naive_chunk_kda
    return _ungrouped(naive_chunk_kda if decay == "channel" else naive_chunk_gated_delta_rule)


def _ungrouped(function: Op) -> Op:
    """An op that needs as many heads of q and k as of v."""

    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        group = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
        found: tuple[Tensor, Tensor] = function(q, k, v, g, beta, output_final_state=True)
        return found

    return op


PEERS = ("gdn", "fla naive", "transformers")


def make_run(peer: str, T: int, backward: bool, decay: str = "head") -> Callable[[], Any]:
    """One call, or one call and its gradients, as a function without arguments."""
    op, case = load(peer, decay), replace(CASES[decay], T=T)
    inputs = make_inputs(case)
    if not backward:
        return lambda: op(*(inputs[name] for name in TOKENS))
    leaves = {n: x for n, x in with_gradients(inputs).items() if n in TOKENS}
    into = make_output_gradients(case)

    def run() -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        outputs = op(*leaves.values())
        return outputs, gradients(outputs, leaves, into)

    return run


def _high_water() -> int:
    """Peak memory of this process since `clear_refs` was last written, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_memory(peer: str, T: int, backward: bool, decay: str = "head") -> int:
    """Peak bytes that one call takes beyond its inputs."""
    arguments = [peer, str(T), str(int(backward)), decay]
    command = [sys.executable, str(Path(__file__)), *arguments]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def _main() -> None:
    peer, T, backward, decay = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
    make_run(peer, 64, backward, decay)()  # imports and thread pools
    run = make_run(peer, T, backward, decay)
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory in use now
    before = _high_water()
    run()
    print(_high_water() - before)


if __name__ == "__main__":
    _main()
