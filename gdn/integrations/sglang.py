"""gdn as SGLang's kernels of Gated DeltaNet layers: the plugin that SGLang 0.5.23, against whose
code it was written, loads by itself (entry point group `sglang.srt.plugins`).

It adds the choice "gdn" to --linear-attn-decode-backend and --linear-attn-prefill-backend. Where
that is asked for, SGLang first builds its own Triton kernels, and gdn's then take their places, a
phase each. Verification of draft tokens follows decode, unless --linear-attn-verify-backend is
given; trees of drafts stay with SGLang. What gdn refuses runs on SGLang's Triton kernels. One line
of the log says which backend of gdn runs what, and why not the rest.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

from gdn.integrations.sglang_kernels import Kernel
from gdn.integrations.sglang_warmup import find_backend, find_layer
from gdn.invariance import is_batch_invariant, set_batch_invariant
from gdn.problem import CHUNK

NAME, VERSION = "gdn", "0.5.23"
PLACES = {"decode": "decode_kernel", "prefill": "extend_kernel", "verify": "verify_kernel"}
"""SGLang's names of a phase in its choice of backends, and of that phase's kernel."""
_LINEAR = "sglang.srt.layers.attention.linear"
_logger = logging.getLogger(__name__)


def register() -> None:
    """Add the choice to SGLang's lists, and the two hooks that act on it. SGLang calls this once a
    process; without the choice on the command line nothing else happens."""
    try:
        choices = _find("sglang.srt.arg_groups.choices", "LINEAR_ATTN_KERNEL_BACKEND_CHOICES")
        on_resolution = _find("sglang.srt.arg_groups.resolution_hooks", "register_resolution_hook")
        hooks = _find("sglang.srt.plugins.hook_registry", "HookRegistry", "HookType")
        _find(f"{_LINEAR}.utils", "resolve_linear_attn_backends", "LinearAttnKernelBackend")
    except (ImportError, AttributeError) as error:
        _logger.warning("gdn is no choice in SGLang %s: %s", _version(), error)
        return
    if NAME in choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES:
        return
    choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES.append(NAME)
    on_resolution.register_resolution_hook("handle_linear_attn_backend")(refuse_base_flag)
    hooks.HookRegistry.register(
        f"{_LINEAR}.utils.resolve_linear_attn_backends", resolve, hooks.HookType.AROUND
    )


def _find(module: str, *names: str) -> Any:
    """A module of SGLang. ImportError or AttributeError unless it has these names."""
    found = importlib.import_module(module)
    for name in names:
        getattr(found, name)
    return found


def _version() -> str:
    return str(getattr(importlib.import_module("sglang"), "__version__", "of unknown version"))


def _settings() -> Any:
    """SGLang's settings of how this process computes."""
    return importlib.import_module("sglang.srt.runtime_context").get_exec()


def refuse_base_flag(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around SGLang's check of its linear attention flags: ValueError if the flag for all phases is
    gdn, since with anything but triton there SGLang gives up its extra buffers for radix caching,
    and with them its overlapped schedule."""
    if server_args.linear_attn_backend == NAME:
        raise ValueError(
            "--linear-attn-backend must not be gdn, got gdn, with which SGLang turns off its radix "
            "buffers and overlap; pass --linear-attn-prefill-backend gdn "
            "--linear-attn-decode-backend gdn"
        )
    previous(server_args)


def asked_phases() -> list[str]:
    """The phases for which the flags of this process name gdn."""
    flags = _settings().mamba
    asked = {
        "decode": flags.linear_attn_decode_backend,
        "prefill": flags.linear_attn_prefill_backend,
        "verify": flags.linear_attn_verify_backend or flags.linear_attn_decode_backend,
    }
    return [phase for phase in PLACES if asked[phase] == NAME]


def resolve(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's `resolve_linear_attn_backends`: Triton where gdn is asked for, and hooks on
    the backends that are built next, which put gdn's kernels in."""
    chosen = original(*args, **kwargs)
    phases = asked_phases()
    if not phases:
        return chosen
    _hook_backends()
    triton = importlib.import_module(f"{_LINEAR}.utils").LinearAttnKernelBackend.TRITON
    own = {phase: triton if phase in phases else getattr(chosen, phase) for phase in PLACES}
    return type(chosen)(**own)


@functools.cache
def _hook_backends() -> None:
    """Register and apply the hooks on SGLang's backends. Not in `register`, since that would import
    SGLang's models in all its processes."""
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    source = hooks.HookSource(plugin_name=NAME, dist_name=NAME)
    for target, hook in (
        ("gdn_backend.GDNAttnBackend.__init__", install),
        ("kda_backend.KDAAttnBackend.__init__", leave_channels),
    ):
        hooks.HookRegistry.register(
            f"{_LINEAR}.{target}", hook, hooks.HookType.AFTER, source=source
        )
    hooks.HookRegistry.apply_hooks()


def leave_channels(_: object, backend: Any, model_runner: Any) -> None:
    """After SGLang's backend of Kimi Delta Attention is built: only say so."""
    _log({}, dict.fromkeys(asked_phases(), "gdn serves no Kimi Delta Attention there"))


def install(_: object, backend: Any, model_runner: Any) -> None:
    """After SGLang's `GDNAttnBackend` is built: put gdn's kernels into its dispatcher, warmed up,
    for each phase that is asked for and that gdn can run. With SGLang's deterministic inference
    the whole process is `gdn.batch_invariant`."""
    if _settings().deterministic.enable_deterministic_inference:
        set_batch_invariant(True)
    dispatcher, layer = backend.kernel_dispatcher, find_layer(backend, model_runner)
    if layer is None:  # a drafting model, or a pipeline's stage, without such layers
        return
    base = importlib.import_module(f"{_LINEAR}.kernels.kernel_backend").LinearAttnKernelBase
    kernel_class = type("GdnKernel", (Kernel, base), {})
    changed = signature_faults(type(dispatcher.tree_verify_kernel))
    runs, refused = {}, {}
    for phase in asked_phases():
        if phase == "verify" and layer.drafts is None:
            continue
        name, reasons = "", [*changed, *mode_faults(phase, backend)]
        if not reasons:
            name, reasons = find_backend(phase, layer)
        if name:
            runs[phase] = name
            setattr(dispatcher, PLACES[phase], kernel_class(name))
        else:
            refused[phase] = "; ".join(reasons)
    if "decode" in runs:
        dispatcher.supports_packed_decode = True
    _log(runs, refused)


def _log(runs: dict[str, str], refused: dict[str, str]) -> None:
    """The one line: which backend of gdn runs what, and why SGLang's own kernels run the rest."""
    version = _version()
    notes = "" if version == VERSION else f" (gdn knows {VERSION})"
    notes += ", batch-invariant" if runs and is_batch_invariant() else ""
    parts = [f"{phase} by {name}" for phase, name in runs.items()]
    for reason in dict.fromkeys(refused.values()):
        phases = [phase for phase in refused if refused[phase] == reason]
        parts.append(f"{' and '.join(phases)} left to SGLang: {reason}")
    say = importlib.import_module("sglang.srt.utils.common").rank0_log
    say(f"gdn in SGLang {version}{notes}: {', '.join(parts)}")


def signature_faults(own: type) -> list[str]:
    """What SGLang's own kernel does not take and gdn's needs: then SGLang's calls have changed."""
    faults = []
    for name in ("extend", "packed_decode", "decode", "target_verify"):
        if not hasattr(own, name):
            faults.append(f"SGLang's kernel has no {name}")
            continue
        theirs = inspect.signature(getattr(own, name)).parameters
        needed = [
            p.name
            for p in inspect.signature(getattr(Kernel, name)).parameters.values()
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        ]
        if missing := [x for x in needed if x not in theirs]:
            faults.append(f"SGLang's {name} has no {', '.join(missing)}")
    return faults


def mode_faults(phase: str, backend: Any) -> list[str]:
    """Modes of SGLang that gdn does not serve."""
    faults = []
    kind = type(backend).__name__
    if kind != "GDNAttnBackend":
        faults.append(f"{kind} is no GDNAttnBackend")
    if phase == "prefill":
        if _settings().features.enable_mis:
            faults.append("gdn does not score several items at once (--enable-mis)")
        if backend.mamba_chunk_size != CHUNK:
            faults.append(
                f"checkpoints must be {CHUNK} tokens apart, got {backend.mamba_chunk_size}"
            )
    return faults
