"""What gdn relies on in SGLang, as SGLang 0.5.23 has it: names and signatures, and of what they do
only what a plugin sees. `test_sglang_engine` compares the signatures with the real ones."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

LINEAR = "layers.attention.linear"


class LinearAttnKernelBackend(enum.Enum):
    TRITON = "triton"
    CUSTOM = "custom"


@dataclass(frozen=True)
class LinearAttnBackends:
    decode: LinearAttnKernelBackend
    prefill: LinearAttnKernelBackend
    verify: LinearAttnKernelBackend


class LinearAttnKernelBase:
    uses_state_checkpoints = False


class TritonGDNKernel(LinearAttnKernelBase):
    def packed_decode(
        self, mixed_qkv, a, b, *, A_log, dt_bias, scale, ssm_states, cache_indices, num_v_heads,
        head_v_dim, **kwargs,
    ): ...  # fmt: skip

    def decode(
        self, q, k, v, a, b, *, A_log, dt_bias, ssm_states, cache_indices, query_start_loc, **kwargs
    ): ...

    def extend(
        self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, inplace_update=True,
        **kwargs,
    ): ...  # fmt: skip

    def target_verify(
        self, A_log, dt_bias, q, k, v, a, b, *, ssm_states, cache_indices, query_start_loc,
        intermediate_states_buffer, intermediate_state_indices, cache_steps, retrieve_parent_token,
        **kwargs,
    ): ...  # fmt: skip


class GDNKernelDispatcher:
    def __init__(self, decode_backend, prefill_backend, verify_backend=None):
        kernel = TritonGDNKernel()
        self.decode_kernel = self.extend_kernel = self.verify_kernel = kernel
        self.tree_verify_kernel = kernel
        self.supports_packed_decode = False


class GDNAttnBackend:
    def __init__(self, model_runner):
        backends = model_runner.linear_attn_backends
        if LinearAttnKernelBackend.CUSTOM in (backends.decode, backends.prefill):
            raise ValueError("Unsupported GDN decode backend")
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.mamba_chunk_size = model_runner.mamba_chunk_size
        self.kernel_dispatcher = GDNKernelDispatcher(None, None, None)


class KDAAttnBackend:
    def __init__(self, model_runner): ...


HookType = enum.Enum("HookType", "BEFORE AFTER AROUND REPLACE")


@dataclass
class HookSource:
    plugin_name: str
    dist_name: str | None


class Fake:
    """The modules, and the flags of a server on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
        self.lines: list[str] = []
        self.overrides: dict[str, Callable[..., None]] = {}
        self.hooks: list[tuple[str, Callable[..., Any], HookType]] = []
        self.mamba = SimpleNamespace(
            linear_attn_backend="triton", linear_attn_decode_backend=None,
            linear_attn_prefill_backend=None, linear_attn_verify_backend=None,
        )  # fmt: skip
        self.features = SimpleNamespace(enable_mis=False)
        self.deterministic = SimpleNamespace(enable_deterministic_inference=False)
        for group in (self.mamba, self.features, self.deterministic):
            vars(group).update({n: x for n, x in flags.items() if n in vars(group)})
        self.modules: dict[str, dict[str, Any]] = {
            "arg_groups.choices": {"LINEAR_ATTN_KERNEL_BACKEND_CHOICES": ["triton"]},
            "arg_groups.resolution_hooks": {"register_resolution_hook": self.override},
            "plugins.hook_registry": {
                "HookRegistry": self, "HookType": HookType, "HookSource": HookSource,
            },
            "runtime_context": {"get_exec": lambda: self},
            "utils.common": {"rank0_log": self.lines.append},
            f"{LINEAR}.utils": {
                "LinearAttnKernelBackend": LinearAttnKernelBackend,
                "resolve_linear_attn_backends": self.resolve,
            },
            f"{LINEAR}.gdn_backend": {"GDNAttnBackend": GDNAttnBackend},
            f"{LINEAR}.kda_backend": {"KDAAttnBackend": KDAAttnBackend},
            f"{LINEAR}.kernels.kernel_backend": {"LinearAttnKernelBase": LinearAttnKernelBase},
        }  # fmt: skip
        named: dict[str, dict[str, Any]] = {"sglang": {"__version__": "0.5.23"}}
        named |= {f"sglang.srt.{name}": x for name, x in self.modules.items()}
        for name, attributes in named.items():
            module = types.ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)

    @property
    def choices(self) -> list[str]:
        return self.modules["arg_groups.choices"]["LINEAR_ATTN_KERNEL_BACKEND_CHOICES"]

    def override(self, name: str) -> Callable[..., Any]:
        return lambda function: self.overrides.setdefault(name, function)

    def register(self, target: str, hook: Any, hook_type: HookType, *, source: Any = None) -> None:
        self.hooks.append((target.removeprefix("sglang.srt."), hook, hook_type))

    def apply_hooks(self) -> None: ...

    def resolve(self, prefill_default: str | None = None) -> LinearAttnBackends:
        known = {"triton": LinearAttnKernelBackend.TRITON}
        given = self.mamba
        chosen = (
            given.linear_attn_decode_backend, given.linear_attn_prefill_backend,
            given.linear_attn_verify_backend,
        )  # fmt: skip
        named = (known.get(x or "triton", LinearAttnKernelBackend.CUSTOM) for x in chosen)
        return LinearAttnBackends(*named)

    def make_backend(
        self, layer: dict[str, torch.Tensor | None], chunk: int = 64, kind: type = GDNAttnBackend
    ) -> Any:
        """What the server does for a model: choose, build, and run the hooks in between."""
        pool, conv, drafts = layer["pool"], layer["conv"], layer["drafts"]
        cache = SimpleNamespace(temporal=pool, conv=[conv], intermediate_ssm=drafts)
        runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=cache)),
            mamba_chunk_size=chunk, dtype=torch.float32,
        )  # fmt: skip
        runner.linear_attn_backends = self.run("resolve_linear_attn_backends", self.resolve)
        backend = kind(runner)
        self.run("GDNAttnBackend.__init__", None, backend, runner)
        return backend

    def run(self, name: str, first: Any, *args: Any) -> Any:
        """Call what is hooked, if it is: `first` is the original, or its result."""
        for target, hook, _ in self.hooks:
            if target.endswith(name):
                return hook(first, *args)
        return first(*args) if callable(first) else first
