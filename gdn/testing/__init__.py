"""Cases, inputs and the truth: for the tests, the benchmarks, and for backends of third parties."""

from .cases import CASES, TOLERANCE, Case, Gates
from .inputs import (
    DIFFERENTIABLE,
    gradients,
    make_inputs,
    make_output_gradients,
    relative_error,
    run_definition,
    with_gradients,
)

__all__ = [
    "CASES",
    "DIFFERENTIABLE",
    "TOLERANCE",
    "Case",
    "Gates",
    "gradients",
    "make_inputs",
    "make_output_gradients",
    "relative_error",
    "run_definition",
    "with_gradients",
]
