"""The checks of arguments, and their error messages."""

from .metadata import validate, validate_step
from .types import (
    DEFINITION,
    check_types,
    no_tensor,
    refuse_gradients,
    refuse_tangents,
    refuse_transforms,
)
from .values import check_cu_seqlens, check_slots

__all__ = [
    "DEFINITION",
    "check_cu_seqlens",
    "check_slots",
    "check_types",
    "no_tensor",
    "refuse_gradients",
    "refuse_tangents",
    "refuse_transforms",
    "validate",
    "validate_step",
]
