"""Raw gates from transformers' layers with a decay per head, for gdn's kernels to activate.

A layer's forward computes beta = sigmoid(b) and g = -exp(A_log) softplus(a + dt_bias) in PyTorch,
eight launches. Here its source becomes a second forward, which passes b, a and the layer instead.
Nor does it repeat q and k for grouped heads, as transformers 5.17 does, which is two more.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gdn.definition import log_decay, write_strength

RULE = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
"""The functions of a module that take the gates: for whole sequences, and for single tokens."""
_DECAY = r"-self\.A_log\.float\(\)\.exp\(\) \* F\.softplus\((.+)\.float\(\) \+ self\.dt_bias\)"
_GROUPED = r"self\.num_v_heads (?:// self\.num_k_heads > 1|> self\.num_k_heads)"
_REPEAT = r"(?: +expand_ratio = .+\n)?(?: +(\w+) = \1\.repeat_interleave\(.+, dim=2\)\n){2}"
_EDITS = (  # what the source has, how often, and what takes its place
    (r"beta = (.+)\.sigmoid\(\)\n", {1}, r"beta = \1\n"),
    (r"if self\.allow_neg_eigval:\n +beta = beta \* 2\.0\n", {0, 1}, "pass\n"),
    (rf"g = {_DECAY}\n", {1}, r"g = \1\n"),
    (rf"if {_GROUPED}:\n{_REPEAT}", {0, 1}, "pass\n"),
    (r"\bg=g,\n( +)beta=beta,\n", {2}, r"g=g,\n\1beta=beta, raw_gates_of=self,\n"),
    (rf"\b({'|'.join(RULE)})\(", {2}, r'gdn_rule("\1", '),
)
_USES = {r"\bbeta\b": 5, r"\bg\b": 5} | {rf"\b{name}\b": 1 for name in RULE}
"""How often the new source has each name: nothing else may be done with the gates."""


def with_raw_gates(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The forward of a layer with raw gates; None if its source is not known here, or if somebody
    has replaced or wrapped transformers' own."""
    function: Any = forward
    while _made_by(function, "transformers", "gdn"):
        if not hasattr(function, "__wrapped__"):
            return _rewrite(function)
        function = function.__wrapped__
    return None


def _made_by(function: object, *packages: str) -> bool:
    """Whether a function was defined, not only named, in one of the packages."""
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name.partition(".")[0] in packages


@functools.cache
def _rewrite(function: FunctionType) -> Callable[..., Any] | None:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    source = textwrap.dedent("".join(lines))
    for pattern, times, template in _EDITS:
        source, found = re.subn(pattern, functools.partial(_replace, template), source)
        if found not in times:
            return None
    if any(len(re.findall(name, source)) != times for name, times in _USES.items()):
        return None
    if function.__code__.co_freevars:
        return None
    name, file = function.__name__, function.__code__.co_filename
    text = "\n" * (first - 2) + "def make(gdn_rule):\n" + textwrap.indent(source, " ")
    code = compile(f"{text}\n return {name}", file, "exec", dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    forward: Callable[..., Any] = made["make"](functools.partial(_call_rule, function.__globals__))
    return forward


def _call_rule(module: dict[str, Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `RULE` with raw gates, or, if it is not gdn's any more, activated ones."""
    rule = module[name]
    if not is_patched(rule):
        args = activate_arguments(args, kwargs)
    return rule(*args, **kwargs)


def _replace(template: str, found: re.Match[str]) -> str:
    """The text for a match, with as many lines, so that errors name the right ones."""
    text = found.expand(template)
    return text + "\n" * (found[0].count("\n") - text.count("\n"))


def run_layer(
    module: ModuleType,
    raw: Callable[..., Any],
    original: Callable[..., Any],
    layer: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A layer's forward: `raw`, but not in compiled code, where Inductor fuses what activates the
    gates, nor where another function has taken the place of gdn's since."""
    if torch.compiler.is_compiling() or not all(is_patched(getattr(module, n)) for n in RULE):
        return original(layer, *args, **kwargs)
    return raw(layer, *args, **kwargs)


def is_patched(function: object) -> bool:
    """Whether a function of transformers is gdn's now; what wraps it may do anything."""
    entry = getattr(function, "gdn_patch", None)
    return entry is not None and entry.replacement is function and bool(entry.on)


def raw_options(layer: Any) -> dict[str, Any]:
    """The arguments of gdn's functions that go with the raw gates of a layer."""
    return {
        "use_gate_in_kernel": True,
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": getattr(layer, "allow_neg_eigval", False),
    }


def activate_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments for a function of transformers itself, and kwargs in place: where a
    layer hands over raw gates, activated ones, and as many heads of q and k as of v."""
    layer = kwargs.pop("raw_gates_of", None)
    if layer is None:
        return args
    kwargs["g"], kwargs["beta"] = activate(layer, kwargs["g"], kwargs["beta"])
    query, key, value, *others = args
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], 2) for x in (query, key))
    return (query, key, value, *others)


def activate(layer: Any, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """g and beta from raw ones, for a backend that does not take these."""
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    decay = log_decay(wide, layer.A_log, layer.dt_bias)
    return decay, write_strength(beta, getattr(layer, "allow_neg_eigval", False))
