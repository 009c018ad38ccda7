"""Sequences over several GPUs: `gdn.ContextParallel` and the pieces that it is made of."""

from gdn.context_parallel import ContextParallel

from .summary import compose, summarize, summarize_gradient

__all__ = ["ContextParallel", "compose", "summarize", "summarize_gradient"]
