"""The command line: `gdn info`, `explain`, `warmup` and `compare`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import gdn
from gdn import dispatch, explanation
from gdn.compare import comparison, console, files, tables
from gdn.compare.environment import environment
from gdn.compare.options import (
    KIMI,
    QWEN,
    default_device,
    make_call,
    make_case,
    parse_bound,
    parse_device,
    parse_lengths,
    parse_shape,
    require_device,
    require_room,
)
from gdn.problem import Call, Problem, compute_capability, describe
from gdn.testing import Case


def info(args: argparse.Namespace) -> int:
    """Show versions, the device, and for each backend whether it can run here and why not."""
    backends = gdn.list_backends()
    if args.markdown:
        print(tables.markdown(tables.CAPABILITIES, tables.capability_rows(backends)))
        return 0
    device = default_device()
    about, sm = environment(device), compute_capability(device)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"device    {about['device']}" + (f" (sm_{sm})" if sm else ""))
    print(f"versions  python {about['python']}, {versions}")
    request, source = dispatch.request_in_force()
    print(f"request   {request} ({source})")
    rows = []
    qwen = make_call(Case("info", T=8192, dtype=torch.bfloat16, **QWEN))
    kimi = make_call(Case("info", T=8192, dtype=torch.bfloat16, per_channel=True, **KIMI))
    for backend in backends:
        problems = [
            _describe(call, device.type, grad, sm)
            for call, grad in ((qwen, False), (qwen, True), (kimi, True))
        ]
        verdicts = [explanation.verdict(backend.name, problem) for problem in problems]
        cells = ["no: " + "; ".join(v.reasons) if v.reasons else f"yes: {v.path}" for v in verdicts]
        rows.append([backend.name, backend.summary, *cells])
    headers = (
        "backend",
        "what it is",
        "Qwen3.5 forward here",
        "and backward",
        "Kimi Linear forward and backward",
    )
    console.print_table(headers, rows)
    return 0


def _describe(call: Call, device: str, needs_grad: bool, sm: int | None) -> Problem:
    """Describe a call as one on this device."""
    return replace(describe(call, needs_grad), device=device, sm=sm)


def explain(args: argparse.Namespace) -> int:
    """Show which backend would run a call or a decode step, and why the others would not."""
    sm = args.sm
    if sm is None and args.device.type == "cuda" and torch.cuda.is_available():
        require_device(args.device)
        sm = compute_capability(args.device)
    problem = _describe(make_call(make_case(args)), args.device.type, args.gradients, sm)
    if args.decode:
        flags = problem.flags - {"output_final_state"}
        problem = replace(problem, needs_grad=False, flags=flags, pool=torch.float32)
    found = explanation.explain(*dispatch.request_in_force(args.backend), problem)
    print(found)
    return 0 if found.chosen else 1


def run_warmup(args: argparse.Namespace) -> int:
    """Compile the kernels of calls of the given shape before the first call. Needs no GPU."""
    sm = args.sm or compute_capability(default_device()) or 90  # 90: Hopper, for TileLang
    call = make_call(make_case(args))
    request, _ = dispatch.request_in_force(args.backend)
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


def run_compare(args: argparse.Namespace) -> int:
    """Check every backend that can run here against float64, and time those that agree."""
    if args.json is not None:
        files.require_writable("--json", args.json)
    if args.plot is not None:
        files.require_picture("--plot", args.plot)
    require_device(args.device)
    case = make_case(args)
    if not case.B * case.tokens:
        raise ValueError("--shape and --lengths must leave a token to compare")
    make_call(case)  # a case that is not well-formed is refused before any measurement
    require_room(case, args.device)
    names = dispatch.parse_request(args.backends) if args.backends else None
    total = comparison.steps(len(names or gdn.list_backends()))
    with console.progress(total) as step:
        report = comparison.compare(case, args.device, names, step)
    rows = tables.comparison_rows(report)
    title, notes = tables.comparison_title(report), tables.comparison_notes(report)
    if args.markdown:
        print(tables.markdown(tables.COMPARISON, rows), *notes, *title.splitlines(), sep="\n\n")
    else:
        console.print_lines(title.splitlines())
        console.print_table(tables.COMPARISON, rows, keys=2)
        console.print_lines(notes)
    if args.json is not None:
        files.write_json(args.json, report.as_dict())
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
        "--shape", type=parse_shape, default={}, metavar="T=8192,H=16,HV=32",
        help="sizes, any of B T H HV K V; by default the heads of Qwen3.5, with --gates channel "
        "those of Kimi Linear, and T=512 (on a GPU T=8192)",
    )  # fmt: skip
    problem.add_argument(
        "--gates", choices=("head", "channel"), default="head",
        help="a decay per value head, or per channel of K (Kimi Delta Attention)",
    )  # fmt: skip
    problem.add_argument(
        "--lower-bound", type=parse_bound, metavar="-5", help="the lower bound of the fused gate"
    )
    problem.add_argument(
        "--lengths",
        type=parse_lengths,
        metavar="N,N,...",
        help="lengths of packed sequences",
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
    here.add_argument("--device", type=parse_device, default=default_device())
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
    options, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    return console.run_command("gdn", lambda: int(args.run(args)))
