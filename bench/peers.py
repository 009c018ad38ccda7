"""The op in plain PyTorch from three projects: gdn, fla (naive_chunk_gated_delta_rule) and
transformers (torch_chunk_gated_delta_rule); and the peak memory of one call, in its own process."""

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

CASE = Case("peers", H=4, HV=8, K=128, V=128, initial_state=False)
TOKENS = ("q", "k", "v", "g", "beta")

Op = Callable[..., Any]


def load(peer: str) -> Op:
    """The peer's op on q, k, v, g, beta with grouped heads, returning o and the final state."""
    if peer == "gdn":
        return lambda *args: gdn.gated_delta_net(*args, output_final_state=True, backend="torch")
    if peer == "transformers":
        from transformers.models.qwen3_5 import modeling_qwen3_5

        # unwrapped, since its decorator fetches another kernel from a hub
        function = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
        return lambda *args: function(*args, output_final_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that there is no GPU
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        group = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
        found: tuple[Tensor, Tensor]
        found = naive_chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
        return found

    return naive


PEERS = ("gdn", "fla naive", "transformers")


def make_run(peer: str, T: int, backward: bool) -> Callable[[], Any]:
    """One call, or one call and its gradients, as a function without arguments."""
    op, case = load(peer), replace(CASE, T=T)
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


def peak_memory(peer: str, T: int, backward: bool) -> int:
    """Peak bytes that one call takes beyond its inputs."""
    arguments = [peer, str(T), str(int(backward))]
    command = [sys.executable, str(Path(__file__)), *arguments]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def _main() -> None:
    peer, T, backward = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    make_run(peer, 64, backward)()  # imports and thread pools
    run = make_run(peer, T, backward)
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory in use now
    before = _high_water()
    run()
    print(_high_water() - before)


if __name__ == "__main__":
    _main()
