"""gdn: the gated delta rule (Gated DeltaNet, arXiv 2412.06464; Kimi Delta Attention, arXiv
2510.26692) as one op with many backends."""

from gdn import _checkout, definition, distributed, nn
from gdn.api import GDNOutput, explain, gated_delta_net, warmup
from gdn.backend import Backend, Capabilities, Plan
from gdn.context_parallel import ContextParallel
from gdn.dispatch import BackendUnsupportedError, set_default_backend, use_backend
from gdn.explanation import Explanation, Verdict
from gdn.invariance import batch_invariant, set_batch_invariant
from gdn.kimi import kimi_delta_attention, kimi_delta_attention_decode
from gdn.registry import (
    BackendInfo,
    UnknownBackendError,
    list_backends,
    register_backend,
    unregister_backend,
)
from gdn.serving import gated_delta_net_decode, gated_delta_net_prefill

_checkout.find_backends()

__version__ = "0.2.0"

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendUnsupportedError",
    "Capabilities",
    "ContextParallel",
    "Explanation",
    "GDNOutput",
    "Plan",
    "UnknownBackendError",
    "Verdict",
    "batch_invariant",
    "definition",
    "distributed",
    "explain",
    "gated_delta_net",
    "gated_delta_net_decode",
    "gated_delta_net_prefill",
    "kimi_delta_attention",
    "kimi_delta_attention_decode",
    "list_backends",
    "nn",
    "register_backend",
    "set_batch_invariant",
    "set_default_backend",
    "unregister_backend",
    "use_backend",
    "warmup",
]
