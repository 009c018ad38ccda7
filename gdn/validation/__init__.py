"""The checks of arguments, and their error messages."""

from .metadata import validate
from .pools import check_memory, refuse_negated, validate_pool_call
from .slots import check_slots
from .types import (
    DEFINITION,
    check_types,
    no_tensor,
    refuse_gradients,
    refuse_tangents,
    refuse_transforms,
)
from .values import check_bounds, check_cu_seqlens

__all__ = [
    "DEFINITION",
    "check_bounds",
    "check_cu_seqlens",
    "check_memory",
    "check_slots",
    "check_types",
    "no_tensor",
    "refuse_gradients",
    "refuse_negated",
    "refuse_tangents",
    "refuse_transforms",
    "validate",
    "validate_pool_call",
]
