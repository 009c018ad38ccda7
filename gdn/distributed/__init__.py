"""Sequences over several GPUs: `gdn.ContextParallel` and the pieces that it is made of."""

from gdn.context_parallel import ContextParallel

from .halo import conv_halo
from .summary import compose, summarize, summarize_gradient

__all__ = ["ContextParallel", "compose", "conv_halo", "summarize", "summarize_gradient"]
