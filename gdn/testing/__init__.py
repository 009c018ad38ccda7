"""Cases, inputs and reference results, for the tests, the benchmarks and third-party backends."""

from .cases import CASES, CLOSE_KEYS, TOLERANCE, Case, Gates
from .check import Checked, check_backend
from .inputs import (
    gradients,
    make_inputs,
    make_output_gradients,
    relative_error,
    run_definition,
    with_gradients,
)

__all__ = [
    "CASES",
    "CLOSE_KEYS",
    "TOLERANCE",
    "Case",
    "Checked",
    "Gates",
    "check_backend",
    "gradients",
    "make_inputs",
    "make_output_gradients",
    "relative_error",
    "run_definition",
    "with_gradients",
]
