"""gdn as a local repository of the kernels library, so that a `KernelConfig` of transformers picks
gdn by configuration."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gdn.integrations.transformers_functions import run
from gdn.integrations.transformers_models import MODELS, import_models, version

NAME = "delta-rule-by-gdn"
"""Of the repository. The library imports it as a module of this name, so it must not be gdn."""


class Sequences(nn.Module):
    """transformers' function for whole sequences. The library binds `forward` to a module of its
    own, and wants the parameters of the function that it replaces."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, heads, size] each, g and beta [B, T, heads] (g also [B, T, heads, size]): o, and
        the final state or None."""
        return run(
            False, None, query, key, value, g, beta, initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
        )  # fmt: skip


class Tokens(nn.Module):
    """transformers' function for single tokens; see `Sequences`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Sequences.forward`."""
        return run(
            True, None, query, key, value, g, beta, initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
        )  # fmt: skip


def write_repository(folder: str | Path) -> Path:
    """Write the repository, two small files, into a folder, which is made if need be. Returns the
    folder's absolute path."""
    folder = Path(folder).absolute()
    variant = folder / "build" / "torch-universal"
    variant.mkdir(parents=True, exist_ok=True)
    (variant / "__init__.py").write_text(
        '"""The layers of gdn.integrations.kernels."""\n\n'
        "from gdn.integrations import kernels as layers\n"
    )
    metadata = {
        "id": NAME.replace("-", "_"),
        "name": NAME,
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def kernel_config(model: str, folder: str | Path) -> Any:
    """A `transformers.KernelConfig` that picks gdn, for `model.set_use_kernels(True, config)`. gdn
    chooses a backend at each call, as in `gdn.gated_delta_net`.

    `from_pretrained(kernel_config=...)` of transformers 5.24 fails with any local repository.

    Args:
        model: the name of one of `gdn.integrations.transformers.MODELS`, such as "qwen3_next".
        folder: where `write_repository` writes the repository.

    Raises:
        ValueError: gdn does not know the model.
        RuntimeError: transformers is missing or too old.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    module = import_models().get(model)
    if not hasattr(module, "use_kernel_func_from_hub_with_fallback"):
        raise RuntimeError(
            f"transformers must have {model} with functions that kernels may replace, got "
            f"{version()}; upgrade it"
        )
    path = write_repository(folder)
    rule = "kda" if MODELS[model].per_channel else "gated_delta_rule"
    mapping = {f"chunk_{rule}": f"{path}:Sequences", f"fused_recurrent_{rule}": f"{path}:Tokens"}
    config = importlib.import_module("transformers").KernelConfig
    return config(mapping, use_local_kernel=True)
