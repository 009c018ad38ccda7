"""What runs the parts of a layer beside the op: a kernel where one is installed and takes the
tensors, else PyTorch."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.explanation import Explanation
from gdn.validation.values import has_values


class Choice(NamedTuple):
    """The engine of a part, and why each faster one does not run it."""

    engine: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.engine} ({'; '.join(self.reasons)})" if self.reasons else self.engine


class LayerExplanation(NamedTuple):
    """What `GatedDeltaNet.explain` returns: what runs each part of a call. PyTorch runs the
    projections."""

    convolution: Choice
    rule: Explanation
    norm: Choice

    def __str__(self) -> str:
        rule = str(self.rule).replace("\n", "\n    ")
        return (
            f"projections  torch\nconvolution  {self.convolution}\n"
            f"delta rule   {self.rule.chosen}\n    {rule}\ngated norm   {self.norm}"
        )


def refuse_kernels(x: Tensor) -> str | None:
    """Why PyTorch runs a part on x, whatever is installed; None if kernels may. Compiled code stays
    PyTorch's, which Inductor fuses, so that no kernel breaks the graph."""
    if torch.compiler.is_compiling():
        return "compiled, and fused by Inductor"
    if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
        return f"kernels take plain tensors, got {type(x).__name__}"
    if not x.is_cuda:
        return f"kernels need a GPU, the tensors are on {x.device.type}"
    if not has_values(x):
        return "tensors without data"
    if x.dtype == torch.float64:
        return "kernels have no float64"
    return None


@functools.cache
def load(name: str) -> ModuleType | None:
    """An optional module; None if it is not installed or cannot be imported here."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
