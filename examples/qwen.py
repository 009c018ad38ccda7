"""Generate with Qwen3.5 of transformers, unpatched and on gdn, and count tokens per second.

    python examples/qwen.py                                a small random model
    python examples/qwen.py --model DIR --text "Why?"      a local checkpoint
    python examples/qwen.py --stack 24 --prompt 8192 32768 Qwen3.5-4B's linear layers alone
    python examples/qwen.py --stack 24 --compile           decode as one compiled graph, too

The table is Markdown. Times are wall times of eager calls, as a user of `model.generate` sees them.
With --compile, tokens after the first also come from a graph that torch.compile makes of a step
with a static cache; a model that breaks the graph gets no row but the reason.
Needs transformers 5.2 or newer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.progress import Progress

from gdn.integrations.transformers import patch

SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
QWEN_4B = {
    "vocab_size": 512,  # small, so that the head takes little time beside the layers
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 1,  # one small attention layer: transformers' caches need one
    "num_key_value_heads": 1,
    "head_dim": 64,
}


class Clock:
    """A streamer for `model.generate` that records the time of the prompt and of each token."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.times: list[float] = []
        self.advance = lambda: progress.advance(task)

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.advance()

    def end(self) -> None:
        """Part of the interface; there is nothing to do."""


def make_model(args: argparse.Namespace, device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    if args.model:
        loaded = AutoModelForCausalLM.from_pretrained(
            args.model, dtype="auto", local_files_only=True
        )
        return loaded.to(device).eval()
    sizes: dict[str, Any] = SMALL
    if args.stack:
        layers = [*["linear_attention"] * args.stack, "full_attention"]
        sizes = {**QWEN_4B, "layer_types": layers, "num_hidden_layers": len(layers)}
    dtype = torch.bfloat16 if args.stack or device == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**sizes), dtype=dtype).eval()


def generate(
    model: Any, ids: torch.Tensor, length: int, clock: Clock, options: dict[str, Any]
) -> list[int]:
    """Generate `length` tokens after each prompt, greedily. Returns those of the first prompt."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length,
        do_sample=False, pad_token_id=0, streamer=clock, **options,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def compile_options(device: torch.device) -> dict[str, Any]:
    """Options of `model.generate` for a step as one graph, on a GPU captured in a CUDA graph."""
    from transformers import CompileConfig

    gpu = device.type == "cuda"
    config = CompileConfig(
        fullgraph=True, mode="reduce-overhead" if gpu else None,
        backend="inductor" if gpu else "aot_eager",
    )  # fmt: skip
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def compare(model: Any, ids: torch.Tensor, args: argparse.Namespace, progress: Progress) -> Any:
    """Tokens, and medians of prefill and decode seconds, by engine; and why an engine has none.

    Unpatched and patched take turns, after one untimed round. The compiled ones come after them,
    each alone, since a patch that ends and begins again would have the step compiled again.
    """
    seconds, tokens, refused = defaultdict(list), {}, {}
    names = ["unpatched", "gdn"]
    rounds = 1 + args.repeats
    total = len(names) * (1 + args.compile) * rounds * (1 + args.length)
    task = progress.add_task(f"{ids.shape[1]} tokens and {args.length} more", total=total)

    def run(name: str, options: dict[str, Any]) -> None:
        clock = Clock(progress, task)
        tokens[name] = generate(model, ids, args.length, clock, options)
        start, first, *_, last = clock.times
        seconds[name].append((first - start, last - first))

    def patched(name: str) -> AbstractContextManager[Any]:
        return patch(model, args.backend) if name.startswith("gdn") else nullcontext()

    for name in names * rounds:
        with patched(name):
            run(name, {})
    for name in names if args.compile else ():
        try:
            with patched(name):
                for _ in range(rounds):
                    run(f"{name}, compiled", compile_options(ids.device))
        except torch._dynamo.exc.Unsupported as error:
            refused[f"{name}, compiled"] = str(error).splitlines()[0]
    median = {
        n: [*map(statistics.median, zip(*x[1:], strict=True))]
        for n, x in seconds.items()
        if n not in refused
    }
    return tokens, median, refused


def describe(device: str) -> str:
    """The device and the versions of the packages."""
    found = [
        torch.cuda.get_device_name() if device == "cuda" else "CPU",
        f"torch {torch.__version__}",
    ]
    for package in ("transformers", "gdn", "triton", "fla-core", "causal-conv1d"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def main(arguments: list[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="a checkpoint on this machine")
    parser.add_argument("--stack", type=int, metavar="N", help="N layers of Qwen3.5-4B's, random")
    parser.add_argument("--text", help="the prompt (with --model); by default random tokens")
    parser.add_argument("--prompt", type=int, nargs="+", default=[512], help="lengths of prompts")
    parser.add_argument("--length", type=int, default=16, help="tokens to generate, at least 2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also decode as a compiled graph")
    parser.add_argument("--backend", help="of gdn; by default the best that can run here")
    args = parser.parse_args(arguments)
    if args.text and not args.model:
        parser.error("--text must come with --model, got none: random models know no words")
    torch.manual_seed(0)
    model = make_model(args, device)
    words = model.config.get_text_config().vocab_size
    prompts = [torch.randint(words, (args.batch, n)) for n in args.prompt]
    if args.text:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        prompts = [tokenizer(args.text, return_tensors="pt").input_ids.repeat(args.batch, 1)]
    print(describe(device), end="\n\n")
    print("| prompt | generated | engine | prefill tokens/s | decode tokens/s | same tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    written = []
    with Progress(transient=True) as progress:
        for ids in prompts:
            tokens, seconds, refused = compare(model, ids.to(device), args, progress)
            for name, (prefill, decode) in seconds.items():
                same = sum(map(int.__eq__, tokens[name], tokens["unpatched"]))
                speeds = ids.numel() / prefill, args.batch * (args.length - 1) / decode
                row = (f"{args.batch} x {ids.shape[1]}", args.length, name)
                row += (*(f"{speed:.1f}" for speed in speeds), f"{same} of {args.length}")
                progress.console.print("| " + " | ".join(map(str, row)) + " |", soft_wrap=True)
            for name, why in refused.items():
                progress.console.print(f"| {args.batch} x {ids.shape[1]} | | {name} | {why} |")
            written.append(tokens["gdn"])
    print("", *(tokenizer.decode(x) if args.text else x for x in written), sep="\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]  # else transformers runs its kernels
    main()
