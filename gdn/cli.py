"""The command line: `gdn info`, `explain`, `warmup` and `compare`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import gdn
from gdn import dispatch
from gdn.compare import comparison, console, tables
from gdn.compare.environment import environment
from gdn.problem import Call, Problem, compute_capability, describe
from gdn.testing import Case, make_inputs
from gdn.validation import validate

SIZES = ("B", "T", "H", "HV", "K", "V")
QWEN: dict[str, Any] = {"B": 1, "H": 16, "HV": 32, "K": 128, "V": 128}
"""The linear-attention heads of Qwen3-Next and Qwen3.5, by default of their configurations."""


def _shape(text: str) -> dict[str, int]:
    """{"T": 8192, "HV": 64} from "T=8192,HV=64"."""
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in SIZES or not value.strip().isdigit():
            raise argparse.ArgumentTypeError(
                f"must be like T=8192,H=16,HV=64 with names of {' '.join(SIZES)}, got {text!r}"
            )
        sizes[name.strip()] = int(value)
    return sizes


def _lengths(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be like 100,2000,31, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be like cuda:1 or cpu, got {text!r}") from None


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _make_case(args: argparse.Namespace) -> Case:
    on_gpu = args.device.type == "cuda"
    sizes = QWEN | {"T": 8192 if on_gpu else 512} | args.shape
    if args.lengths is not None:
        sizes |= {"B": 1, "T": sum(args.lengths)}
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    return Case(
        "command-line",
        **sizes,
        lengths=args.lengths,
        dtype=getattr(torch, dtype),
        gates="model" if args.raw else "mixed",
        fused=args.raw,
        initial_state=False,
        state_v_first=args.state_v_first,
    )


def info(args: argparse.Namespace) -> int:
    """Show versions, the device, and for each backend whether it can run here and why not."""
    backends = gdn.list_backends()
    if args.markdown:
        print(tables.markdown(tables.CAPABILITIES, tables.capability_rows(backends)))
        return 0
    device = _default_device()
    about, sm = environment(device), compute_capability(device)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"device    {about['device']}" + (f" (sm_{sm})" if sm else ""))
    print(f"versions  python {about['python']}, {versions}")
    request, source = dispatch.request_in_force()
    print(f"request   {request} ({source})")
    rows = []
    for backend in backends:
        case = Case("info", T=8192, dtype=torch.bfloat16, **QWEN)
        problems = [_describe(_call(case), device.type, grad, sm) for grad in (False, True)]
        verdicts = [dispatch.verdict(backend.name, problem) for problem in problems]
        cells = ["no: " + "; ".join(v.reasons) if v.reasons else f"yes: {v.path}" for v in verdicts]
        rows.append([backend.name, backend.summary, *cells])
    console.print_table(("backend", "what it is", "Qwen3.5 forward here", "and backward"), rows)
    return 0


def _call(case: Case) -> Call:
    """The call of a case, with tensors on the meta device."""
    inputs = make_inputs(replace(case, T=0, lengths=None), "meta")
    for name in ("q", "k", "v", "g", "beta"):
        x = inputs[name]
        inputs[name] = x.new_empty((case.B, case.tokens, *x.shape[2:]))
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.empty(case.sequences + 1, dtype=torch.int32, device="meta")
    return Call(**inputs)


def _describe(call: Call, device: str, needs_grad: bool, sm: int | None) -> Problem:
    """Validate a call and describe it as a call on this device."""
    validate(call)
    return replace(describe(call, needs_grad), device=device, sm=sm)


def explain(args: argparse.Namespace) -> int:
    """Show which backend would run a call or a decode step, and why the others would not."""
    sm = args.sm or (compute_capability(args.device) if torch.cuda.is_available() else None)
    problem = _describe(_call(_make_case(args)), args.device.type, args.gradients, sm)
    if args.decode:
        flags = problem.flags - {"output_final_state"}
        problem = replace(problem, needs_grad=False, flags=flags, pool=torch.float32)
    found = dispatch.explain(*dispatch.request_in_force(args.backend), problem)
    print(found)
    return 0 if found.chosen else 1


def run_warmup(args: argparse.Namespace) -> int:
    """Compile the kernels of calls of the given shape before the first call. Needs no GPU."""
    sm = args.sm or compute_capability(_default_device()) or 90  # 90: Hopper, for TileLang
    call, request = _call(_make_case(args)), dispatch.request_in_force(args.backend)[0]
    with console.progress(1) as step:
        step("forward and backward" if args.gradients else "forward")
        start = time.perf_counter()
        problem = _describe(call, "cuda", args.gradients, sm)
        name, compiled = dispatch.precompile(request, call, problem)
    if compiled:
        print(f"{name} is ready after {time.perf_counter() - start:.1f} s")
    else:
        print(f"{name} compiles at its first call, nothing ahead of it")
    return 0


def _need_matplotlib(what: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f'{what} needs matplotlib, which is not installed; pip install "gdn[plot]"'
        )


def run_compare(args: argparse.Namespace) -> int:
    """Check every backend that can run here against float64, and time those that agree."""
    if args.plot is not None:
        _need_matplotlib("--plot")
    case = _make_case(args)
    if not case.B * case.tokens:
        raise ValueError("--shape and --lengths must leave a token to compare")
    names = dispatch.parse_request(args.backends) if args.backends else None
    total = comparison.steps(len(names or gdn.list_backends()))
    with console.progress(total) as step:
        report = comparison.compare(case, args.device, names, step)
    rows = tables.comparison_rows(report)
    title, notes = tables.comparison_title(report), tables.comparison_notes(report)
    if args.markdown:
        print(tables.markdown(tables.COMPARISON, rows), *notes, *title.splitlines(), sep="\n\n")
    else:
        print(title)
        console.print_table(tables.COMPARISON, rows)
        print(*notes, sep="\n", end="\n" if notes else "")
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    if args.plot is not None:
        tables.plot(report, args.plot)
    return 0 if report.ok else 1


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command's function is its `run`."""
    parser = argparse.ArgumentParser(prog="gdn", description=gdn.__doc__)
    parser.add_argument("--version", action="version", version=f"gdn {gdn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    problem = argparse.ArgumentParser(add_help=False)
    problem.add_argument(
        "--shape", type=_shape, default={}, metavar="T=8192,H=16,HV=32",
        help="sizes, any of B T H HV K V; by default Qwen3.5's heads and T=512 (on a GPU T=8192)",
    )  # fmt: skip
    problem.add_argument(
        "--lengths", type=_lengths, metavar="N,N,...", help="lengths of packed sequences"
    )
    problem.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"))
    problem.add_argument("--state-v-first", action="store_true", help="states [N, HV, V, K]")
    problem.add_argument(
        "--raw", action=argparse.BooleanOptionalAction, default=True,
        help="pass raw q, k, g and beta; the op computes the L2 norm, gate and sigmoid",
    )  # fmt: skip

    command = commands.add_parser("info", help=info.__doc__)
    command.add_argument(
        "--markdown", action="store_true", help="print the capability table of docs/backends.md"
    )
    command.set_defaults(run=info)

    here = argparse.ArgumentParser(add_help=False)
    here.add_argument("--device", type=_device, default=_default_device())
    request = argparse.ArgumentParser(add_help=False)
    request.add_argument("--gradients", action=argparse.BooleanOptionalAction, default=True)
    request.add_argument("--backend", help="a name, a list, or auto")
    request.add_argument("--sm", type=int, help="compute capability times ten; default: this GPU's")

    command = commands.add_parser("explain", help=explain.__doc__, parents=[problem, here, request])
    command.add_argument("--decode", action="store_true", help="a decode step, from float32 states")
    command.set_defaults(run=explain)

    command = commands.add_parser("warmup", help=run_warmup.__doc__, parents=[problem, request])
    # kernels for a GPU compile without one
    command.set_defaults(run=run_warmup, device=torch.device("cuda"))

    command = commands.add_parser("compare", help=run_compare.__doc__, parents=[problem, here])
    command.add_argument("--backends", help="a list, such as tilelang,fla; all by default")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="plot times and errors")
    command.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    command.set_defaults(run=run_compare)

    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 on success, 1 if a backend failed or none can run, 2 on bad
    options."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError, dispatch.BackendUnsupportedError) as error:
        print(f"gdn: {error}", file=sys.stderr)  # no traceback: the message is complete
        return 1 if isinstance(error, RuntimeError) else 2
