"""Serve requests of different lengths with a small random model, and count tokens per second.

Continuous batching: new requests are packed and prefilled together, and all running requests take
each decode step together. Their states lie in one pool per layer. A request that ends frees its row
for the next one. Rows without a request get the null index, so a step's shapes never change.

Prefix reuse: the states after every 64 tokens of a prompt are checkpoints in the pool. A prompt
that begins like an earlier one starts from the longest of them.

Speculative steps: a step takes the last token and guesses what follows it (what followed the same
token before). It keeps the state after each, and the next step starts from the last right one.

    python examples/generate.py                       every backend that can run here
    python examples/generate.py --backends triton --requests 256 --slots 64 --drafts 0
    python examples/generate.py --batch-invariant     each request again alone: the same tokens
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from rich.progress import Progress
from small_model import VOCABULARY, Model, find_features
from torch import Tensor

import gdn

CHUNK = 64
"""Tokens between checkpoints."""


@dataclass
class Request:
    """A prompt, and the number of tokens to generate after it. Of the tokens of its last step,
    `right` were right: the column of its slots that holds its state."""

    prompt: list[int]
    length: int
    written: list[int] = field(default_factory=list)
    right: int = 0

    @property
    def done(self) -> bool:
        return len(self.written) >= self.length

    def guess(self, tokens: int) -> list[int]:
        """So many tokens that may follow: what followed the last token where it occurred before."""
        text = self.prompt + self.written
        found = next((i for i in range(len(text) - 2, -1, -1) if text[i] == text[-1]), len(text))
        return (text[found + 1 :] + [0] * tokens)[:tokens]


class PrefixCache:
    """Slots with the states after prefixes of prompts. The one unused for the longest time makes
    room."""

    def __init__(self, slots: Iterable[int]) -> None:
        self.free = list(slots)
        self.slots: OrderedDict[tuple[int, ...], int] = OrderedDict()

    def find(self, prompt: list[int]) -> tuple[int, int]:
        """The length and slot of the longest prefix that leaves a token; (0, -1) if none does."""
        for length in range((len(prompt) - 1) // CHUNK * CHUNK, 0, -CHUNK):
            key = tuple(prompt[:length])
            if key in self.slots:
                self.slots.move_to_end(key)
                return length, self.slots[key]
        return 0, -1

    def add(self, prefix: list[int], kept: set[int]) -> int:
        """Reserve a slot for the state after a prefix, and return it. -1 if the prefix has one
        already, or if no slot can be freed: those in `kept` stay."""
        key = tuple(prefix)
        if key in self.slots:
            return -1
        if not self.free:
            oldest = next((k for k, slot in self.slots.items() if slot not in kept), None)
            if oldest is None:
                return -1
            self.free.append(self.slots.pop(oldest))
        self.slots[key] = self.free.pop()
        return self.slots[key]


@dataclass
class Count:
    """Tokens and seconds of one kind of step."""

    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.0f} a second"


def make_requests(
    number: int, prompt: int, length: int, seed: int = 0, shared: int = 0
) -> list[Request]:
    """Requests with prompts of 1 to `prompt` tokens after `shared` ones that are the same for all,
    to generate 1 to `length` tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def upto(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    def draw(tokens: int) -> list[int]:
        drawn: list[int] = torch.randint(VOCABULARY, (tokens,), generator=generator).tolist()
        return drawn

    first = draw(shared)
    return [Request(first + draw(upto(prompt)), n) for n in [upto(length) for _ in range(number)]]


class Server:
    """Serves up to `slots` requests at a time. With `cached` slots more, prefixes are reused; with
    `drafts`, each step checks so many guesses."""

    def __init__(self, model: Model, slots: int, cached: int = 0, drafts: int = 0) -> None:
        self.model, self.drafts, self.device = model, drafts, model.embed.weight.device
        columns = 2 + drafts if drafts else 1
        self.table = torch.arange(slots * columns, dtype=torch.int32).view(slots, columns)
        states = slots * columns
        self.pools = model.make_pools(states + cached)
        self.cache = PrefixCache(range(states, states + cached)) if cached else None
        self.running: list[Request | None] = [None] * slots
        self.prefill, self.decode = Count(), Count()
        self.reused = self.guessed = 0

    def serve(self, requests: list[Request]) -> None:
        """Generate the tokens of all requests."""
        waiting = deque(requests)
        while waiting or any(self.running):
            free = [row for row, request in enumerate(self.running) if request is None]
            new = {row: waiting.popleft() for row in free if waiting}
            if new:
                self.start(new)
            self.step()
            self.running = [r if r and not r.done else None for r in self.running]

    def start(self, new: dict[int, Request]) -> None:
        """Prefill new requests, a row each, from the longest cached prefix of each prompt."""
        begins, options = [0] * len(new), {}
        slots = self.table[[*new], 0].long()
        if self.cache:
            found = [self.cache.find(request.prompt) for request in new.values()]
            begins = [length for length, _ in found]
            hits = torch.tensor([n for n, length in enumerate(begins) if length], dtype=torch.int64)
            for pool in self.pools:
                pool[slots[hits]] = pool[[found[n][1] for n in hits]]
            options = self.make_checkpoints([*new.values()], begins)
        parts = [r.prompt[begin:] for r, begin in zip(new.values(), begins, strict=True)]
        options["cu_seqlens"] = torch.tensor([0, *map(len, parts)]).cumsum(0)
        written = self.run(self.prefill, torch.tensor([list(chain(*parts))]), slots, options)
        self.prefill.tokens += sum(map(len, parts))
        self.reused += sum(begins)
        for (row, request), token in zip(new.items(), written, strict=True):
            request.written.append(token)
            self.running[row] = request

    def make_checkpoints(self, new: list[Request], begins: list[int]) -> dict[str, Tensor]:
        """The prefill's options: which sequences are fresh, and where states after whole chunks
        go. Prefixes that are cached, or have no room, are left out."""
        assert self.cache is not None
        kept: set[int] = set()
        rows: list[list[tuple[int, int]]] = []
        for request, begin in zip(new, begins, strict=True):
            ends = range(begin + CHUNK, len(request.prompt) + 1, CHUNK)
            slots = [self.cache.add(request.prompt[:end], kept) for end in ends]
            kept.update(slots)
            pairs = zip(ends, slots, strict=True)
            rows.append([(end - begin, slot) for end, slot in pairs if slot >= 0])
        columns = max(1, *map(len, rows))
        padded = torch.tensor([row + [(0, -1)] * (columns - len(row)) for row in rows])
        return {
            "fresh": torch.tensor([begin == 0 for begin in begins]),
            "checkpoint_offsets": padded[..., 0],
            "checkpoint_indices": padded[..., 1],
        }

    def step(self) -> None:
        """Take a decode step of all running requests, and keep the guesses that were right."""
        rows = [n for n, r in enumerate(self.running) if r and not r.done]
        if not rows:
            return
        tokens = torch.zeros(len(self.running), 1 + self.drafts, dtype=torch.int64)
        right = torch.zeros(len(self.running), dtype=torch.int32)
        slots = torch.full_like(self.table, -1)
        slots[rows] = self.table[rows]
        requests = {n: r for n, r in enumerate(self.running) if r and n in rows}
        for n, request in requests.items():
            tokens[n] = torch.tensor([request.written[-1], *request.guess(self.drafts)])
            right[n] = request.right
        options = {"num_accepted_tokens": right} if self.drafts else {}
        written = self.run(self.decode, tokens, slots if self.drafts else slots[:, 0], options)
        for n, request in requests.items():
            count = 1
            while count <= self.drafts and tokens[n, count] == written[n][count - 1]:
                count += 1
            request.right = count
            new = written[n][: min(count, request.length - len(request.written))]
            request.written += new
            self.decode.tokens += len(new)
            self.guessed += len(new) - 1

    def run(self, count: Count, tokens: Tensor, slots: Tensor, options: dict[str, Tensor]) -> list:
        """The tokens that follow, as lists; the time is counted."""
        begin, at = time.perf_counter(), self.device
        options = {name: x.to(at) for name, x in options.items()}
        written: list = self.model(tokens.to(at), self.pools, slots.to(at), options).tolist()
        count.seconds += time.perf_counter() - begin
        return written


def main(arguments: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", help="a list; by default every one that can run here")
    parser.add_argument("--requests", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--slots", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--prompt", type=int, default=2000 if on_gpu else 200, help="at most")
    parser.add_argument("--length", type=int, default=200 if on_gpu else 40, help="at most")
    parser.add_argument("--layers", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--shared", type=int, default=512 if on_gpu else 64, help="prompts' start")
    parser.add_argument(
        "--cached", type=int, default=64 if on_gpu else 8, help="0: none are reused"
    )
    parser.add_argument("--drafts", type=int, default=3, help="guesses a step")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="compare with requests served alone"
    )
    args = parser.parse_args(arguments)
    with gdn.batch_invariant(args.batch_invariant):
        compare(args, on_gpu)


def compare(args: argparse.Namespace, on_gpu: bool) -> None:
    """Serve the same requests on every backend, and print a line for each."""
    torch.manual_seed(0)
    heads = (16, 32, 128, 128) if on_gpu else (2, 4, 32, 32)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = Model(args.layers, 2048 if on_gpu else 128, *heads).to(device, dtype).eval()
    features = find_features(model)
    able = [name for name, found in features.items() if "steps" in found]
    names = args.backends.split(",") if args.backends else able
    first: list[list[int]] | None = None
    with Progress(transient=True) as progress:
        for name in progress.track(names, description="serving"):
            cached = args.cached if "prefixes" in features[name] else 0
            drafts = args.drafts if "drafts" in features[name] else 0
            drafts *= not args.batch_invariant  # a step of several tokens has other bits
            requests = make_requests(args.requests, args.prompt, args.length, shared=args.shared)
            with gdn.use_backend(name):
                Server(model, args.slots, cached, drafts).serve(make_requests(args.slots, 70, 3))
                server = Server(model, args.slots, cached, drafts)
                server.serve(requests)
            written = [request.written for request in requests]
            if args.batch_invariant:
                first = serve_alone(model, name, args)
            first = first or written
            same = sum(a == b for a, b in zip(written, first, strict=True))
            progress.console.print(
                f"{name:>9}: prefill {server.prefill}, {server.reused} from cached prefixes; "
                f"decode {server.decode}, {server.guessed} guessed; {same} of {len(written)} "
                f"requests as {'alone' if args.batch_invariant else f'{names[0]} wrote them'}"
            )


def serve_alone(model: Model, backend: str, args: argparse.Namespace) -> list[list[int]]:
    """What each of the same requests gets when no other is there, and no prefix is cached."""
    requests = make_requests(args.requests, args.prompt, args.length, shared=args.shared)
    with gdn.use_backend(backend):
        Server(model, 1).serve(requests)
    return [request.written for request in requests]


if __name__ == "__main__":
    main()
