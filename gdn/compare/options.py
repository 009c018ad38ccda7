"""The options of the command line that name a call: reading them, and the call that they give."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdn.invariance import is_batch_invariant
from gdn.problem import Call, PoolCall, Prefill, Step
from gdn.testing import Case, make_inputs
from gdn.validation import validate, validate_pool_call

from .roofline import PASSES, least_work

SIZES = ("B", "T", "H", "HV", "K", "V")
QWEN: dict[str, Any] = {"B": 1, "H": 16, "HV": 32, "K": 128, "V": 128}
"""The linear-attention heads of Qwen3-Next and Qwen3.5, by default of their configurations."""
KIMI: dict[str, Any] = {"B": 1, "H": 32, "HV": 32, "K": 128, "V": 128}
"""The linear-attention heads of Kimi Linear, which have a decay per channel."""
LARGEST = 2**63
"""Bytes of a tensor, which PyTorch counts in int64, are fewer."""


def parse_shape(text: str) -> dict[str, int]:
    """{"T": 8192, "HV": 64} from "T=8192,HV=64"."""
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in SIZES or not value.strip().isdecimal():
            raise argparse.ArgumentTypeError(
                f"must be like T=8192,H=16,HV=64 with names of {' '.join(SIZES)}, got {text!r}"
            )
        sizes[name.strip()] = int(value)
    return sizes


def parse_lengths(text: str) -> tuple[int, ...]:
    """(100, 2000, 31) from "100,2000,31"."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be like 100,2000,31, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def parse_folder(text: str) -> Path:
    """A folder's path. An empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got an empty text")
    return Path(text)


def parse_device(text: str) -> torch.device:
    """A device's name; it need not be there."""
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be like cuda:1 or cpu, got {text!r}") from None


def parse_bound(text: str) -> float:
    """The lower bound of the fused gate: a number below zero."""
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not -math.inf < bound < 0:
        raise argparse.ArgumentTypeError(f"must be a number below 0, such as -5, got {text!r}")
    return bound


def default_device() -> torch.device:
    """The current GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_case(args: argparse.Namespace) -> Case:
    """The case that --shape, --lengths, --dtype, --gates, --lower-bound, --raw and --state-v-first
    give. ValueError if they contradict each other or PyTorch cannot count the bytes."""
    on_gpu = args.device.type == "cuda"
    if args.lower_bound is not None and not args.raw:
        raise ValueError(
            f"--lower-bound must come with --raw, since it is that of the fused gate, got "
            f"{args.lower_bound:g} with --no-raw; leave out one of the two"
        )
    heads = KIMI if args.gates == "channel" else QWEN
    sizes = heads | {"T": 8192 if on_gpu else 512} | args.shape
    if args.lengths is not None:
        both = [f"{name}={args.shape[name]}" for name in ("B", "T") if name in args.shape]
        if both:
            raise ValueError(
                f"--shape must not hold B or T beside --lengths, which give B=1 and their sum as "
                f"T={sum(args.lengths)}, got {','.join(both)}; leave out one of the two"
            )
        sizes |= {"B": 1, "T": sum(args.lengths)}
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    case = Case(
        "command-line",
        **sizes,
        lengths=args.lengths,
        dtype=getattr(torch, dtype),
        gates="model" if args.raw else "mixed",
        fused=args.raw,
        initial_state=False,
        state_v_first=args.state_v_first,
        per_channel=args.gates == "channel",
        gate_lower_bound=args.lower_bound,
    )
    _require_countable(case)
    return case


def _require_countable(case: Case) -> None:
    """PyTorch raises from within its allocator where this does not hold, even for meta tensors."""
    for name, form, shape in (
        ("q", "[B, T, H, K]", (case.B, case.T, case.H, case.K)),
        ("g", "[B, T, HV, K]", (case.B, case.T, case.HV, case.K))
        if case.per_channel
        else ("g", "[B, T, HV]", (case.B, case.T, case.HV)),
        ("v", "[B, T, HV, V]", (case.B, case.T, case.HV, case.V)),
        ("the state", "[N, HV, K, V]", (case.sequences, case.HV, case.K, case.V)),
    ):
        if math.prod(max(1, n) for n in shape) * torch.float64.itemsize >= LARGEST:
            raise ValueError(
                f"--shape and --lengths must leave {name} below 2^63 bytes in float64, got {form} "
                f"= {shape}; give smaller sizes"
            )
    if case.lengths is not None and case.T >= 2**31:
        raise ValueError(
            f"--lengths must add up to less than 2^31, since cu_seqlens are int32, got {case.T}; "
            "give shorter ones"
        )


def make_call(case: Case) -> Call:
    """The call of a case, with tensors on the meta device. ValueError if it is not well-formed."""
    small = replace(case, B=1, T=0, H=1, HV=1, K=1, V=1, lengths=None)  # drawn, and so allocated
    sizes = {"q": (case.H, case.K), "k": (case.H, case.K), "v": (case.HV, case.V)}
    if case.per_channel:
        sizes |= dict.fromkeys(("g", "dt_bias"), (case.HV, case.K))
    inputs = make_inputs(small, "meta")
    for name in ("q", "k", "v", "g", "beta"):
        shape = case.B, case.T, *sizes.get(name, (case.HV,))
        inputs[name] = inputs[name].new_empty(shape)
    for name in ("A_log", "dt_bias"):
        if name in inputs:
            inputs[name] = inputs[name].new_empty(sizes.get(name, (case.HV,)))
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.empty(case.sequences + 1, dtype=torch.int32, device="meta")
    call = Call(**inputs, batch_invariant=is_batch_invariant())
    if call.initial_state is not None:
        call = call._replace(initial_state=call.initial_state.new_empty(call.state_shape))
    validate(call)
    return call


def make_pool_call(call: Call, prefill: bool) -> PoolCall:
    """A decode step, or prefill, of a call's tokens on a pool of float32 states with a slot for
    each sequence, as servers make them."""
    call = call._replace(initial_state=None, output_final_state=False)
    kind: type[PoolCall] = Prefill if prefill else Step
    made = kind(
        call,
        state=torch.empty(call.state_shape, dtype=torch.float32, device="meta"),
        state_indices=torch.empty(call.sequences, dtype=torch.int32, device="meta"),
    )
    validate_pool_call(made)
    return made


def on_device(given: Any, device: torch.device) -> Any:
    """A call, on a pool or not, with uninitialised tensors on a device in place of its own."""
    moved = {}
    for name, x in given._asdict().items():
        if isinstance(x, Call):
            moved[name] = on_device(x, device)
        elif isinstance(x, torch.Tensor):
            moved[name] = torch.empty_like(x, device=device)
    return given._replace(**moved)


def require_device(device: torch.device) -> None:
    """ValueError unless backends can be measured on the device that --device names."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) < gpus:
        return
    if device.type == "cpu" and not device.index:
        return
    seen = ", ".join(f"cuda:{n}" for n in range(gpus)) or "no GPU"
    raise ValueError(
        f"--device must be cpu or an NVIDIA GPU that PyTorch sees, got {device}; "
        f"it sees {seen} here"
    )


def require_room(case: Case, device: torch.device) -> None:
    """ValueError if the tensors of a comparison cannot fit in the device's memory. They need at
    least twice what the passes read and write: inputs with and without gradients, and results in
    the case's dtype and in float64."""
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 2 * least_work(case, PASSES[-1]).bytes
    if needed > room:
        raise ValueError(
            f"--shape and --lengths must leave tensors that fit in the memory of {device}, "
            f"{room / 1e9:.0f} GB, got at least {needed / 1e9:.0f} GB; give smaller sizes"
        )
