"""The command line: `gdn info`, `explain`, `warmup`, `build-kernels` and `compare`."""

from __future__ import annotations

import argparse
import importlib
import sys
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
    make_pool_call,
    on_device,
    parse_bound,
    parse_device,
    parse_folder,
    parse_lengths,
    parse_shape,
    require_device,
    require_room,
)
from gdn.problem import (
    Call,
    PoolCall,
    Problem,
    compute_capability,
    describe,
    describe_pool_call,
)
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
        verdicts = [
            explanation.verdict(backend.name, _describe(call, device.type, grad, sm), call)
            for call, grad in ((qwen, False), (qwen, True), (kimi, True))
        ]
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


def _describe(given: Call | PoolCall, device: str, needs_grad: bool, sm: int | None) -> Problem:
    """Describe a call as one on this device."""
    on_meta = describe(given, needs_grad) if isinstance(given, Call) else describe_pool_call(given)
    return replace(on_meta, device=device, sm=sm)


def _given(args: argparse.Namespace) -> Call | PoolCall:
    """The call that the options give."""
    call = make_call(make_case(args))
    return make_pool_call(call, args.prefill) if args.decode or args.prefill else call


def explain(args: argparse.Namespace) -> int:
    """Show which backend would run a call or a decode step, and why the others would not."""
    sm = args.sm
    if sm is None and args.device.type == "cuda" and torch.cuda.is_available():
        require_device(args.device)
        sm = compute_capability(args.device)
    given = _given(args)
    problem = _describe(given, args.device.type, args.gradients, sm)
    found = explanation.explain(*dispatch.request_in_force(args.backend), problem, given)
    print(found)
    return 0 if found.chosen else 1


def run_warmup(args: argparse.Namespace) -> int:
    """Compile the kernels of calls of the given shape before the first call. Needs no GPU for
    TileLang's."""
    sm = args.sm or compute_capability(default_device()) or 90  # 90: Hopper, for TileLang
    given = _given(args)
    if torch.cuda.is_available():  # else tensors stay on the meta device
        given = on_device(given, default_device())
    request, _ = dispatch.request_in_force(args.backend)
    with console.progress(1) as step:
        passes = "forward and backward" if args.gradients else "forward"
        step("decode" if args.decode else "prefill" if args.prefill else passes)
        start = time.perf_counter()
        problem = _describe(given, "cuda", args.gradients, sm)
        name, compiled = dispatch.precompile(request, given, problem)
    if compiled:
        print(f"{name} is ready after {time.perf_counter() - start:.1f} s")
    else:
        print(f"{name} compiles at its first call, nothing ahead of it")
    return 0


def build_kernels(args: argparse.Namespace) -> int:
    """Compile TileLang's kernels into a folder for machines without a compiler, or check or prune
    one. Needs no GPU. A kernel that the folder has already is not built again."""
    build, catalogue, upkeep = (
        importlib.import_module(f"gdn.backends.tilelang.{name}")
        for name in ("build", "catalogue", "upkeep")
    )
    if args.prune is not None:
        count, freed = upkeep.prune(args.prune or None)
        print(f"{count} leftovers of other versions are removed, {freed / 1e6:.1f} MB")
        return 0
    if args.check is not None:
        count, wrong = upkeep.check(args.check)
        for text in wrong:
            print(text, file=sys.stderr)
        print(f"{args.check}: {count} kernels, {len(wrong)} cannot be used")
        return 1 if wrong or not count else 0
    names = list(args.kernel or ())
    if args.kernels_in is not None:
        names += args.kernels_in.read_text().splitlines()
        if not names:
            raise SystemExit(f"{args.kernels_in} names no kernel")
    jobs = [build.parse_job(name) for name in names] or catalogue.wanted_jobs(
        args.only, args.dtype, args.head_dim
    )
    if args.list:
        print(*map(build.write_job, jobs), sep="\n")
        return 0
    try:
        with console.progress(len(jobs)) as step:
            build.build(jobs, args.out, args.jobs, done=step)
    except build.BuildError as error:
        print(f"gdn: {error}", file=sys.stderr)
        return 1
    size = upkeep.size([args.out]) / 1e6
    print(f"{args.out}: {len(jobs)} kernels are built, {size:.1f} MB in all")
    if old := upkeep.leftovers(args.out):
        print(
            f"{len(old)} files of it, {upkeep.size(old) / 1e6:.1f} MB, are of other versions: "
            f"`gdn build-kernels --prune {args.out}` removes them"
        )
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
    kind = request.add_mutually_exclusive_group()
    kind.add_argument("--decode", action="store_true", help="a decode step, from float32 states")
    kind.add_argument("--prefill", action="store_true", help="prefill on a pool of float32 states")
    request.add_argument("--sm", type=int, help="compute capability times ten; default: this GPU's")

    command = commands.add_parser("explain", help=explain.__doc__, parents=[problem, here, request])
    command.set_defaults(run=explain)

    command = commands.add_parser("warmup", help=run_warmup.__doc__, parents=[problem, request])
    # kernels for a GPU compile without one
    command.set_defaults(run=run_warmup, device=torch.device("cuda"))

    command = commands.add_parser("build-kernels", help=build_kernels.__doc__)
    command.add_argument("--out", type=parse_folder, metavar="DIR", help="where kernels go")
    command.add_argument("--check", type=parse_folder, metavar="DIR", help="load every kernel")
    command.add_argument(
        "--prune", type=parse_folder, nargs="?", const=False, metavar="DIR",
        help="remove what other versions of gdn and TileLang left in a folder, or in the cache",
    )  # fmt: skip
    command.add_argument("--list", action="store_true", help="print the kernels, build nothing")
    uses = ("forward", "training", "decode", "prefill")
    command.add_argument("--only", nargs="+", choices=uses, default=uses, help="default: all")
    command.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16"), default=("bfloat16", "float16")
    )
    command.add_argument("--head-dim", nargs="+", type=int, choices=(128, 64), default=(128, 64))
    command.add_argument(
        "--kernel", action="append", metavar="NAME(OPTIONS)",
        help="build this one alone, as an error names it; may be given several times",
    )  # fmt: skip
    command.add_argument(
        "--kernels-in", type=Path, metavar="FILE", help="the same, one a line, as --list prints"
    )
    command.add_argument("--jobs", type=int, default=0, help="processes; default: one a core")
    command.set_defaults(run=build_kernels)

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
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.run is build_kernels:
        given = [args.out, args.check, args.prune, args.list or None]
        if given.count(None) != 3:
            parser.error("build-kernels takes one of --out DIR, --check DIR, --prune [DIR], --list")
    return console.run_command("gdn", lambda: int(args.run(args)))
