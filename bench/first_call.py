"""Prints the seconds of the first forward in a new process: `first_call.py BACKEND DEVICE`."""

from __future__ import annotations

import sys
import time

import adapters
import torch
from shapes import make_case

import gdn
from gdn.testing import make_inputs


def main(backend: str, device: str) -> None:
    adapters.register()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make_inputs(make_case("16/32:1x2048", "model", dtype), device)
    start = time.perf_counter()
    gdn.gated_delta_net(**inputs, backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
