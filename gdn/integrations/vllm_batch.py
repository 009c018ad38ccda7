"""One batch of vLLM as gdn's calls on a layer's pool of states: speculative and plain decodes,
prefills and their checkpoints. The metadata are those of vLLM 0.33 (`GDNAttentionMetadata`), known
here by the names of their fields; vLLM is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gdn.problem import CHUNK
from gdn.serving import gated_delta_net_decode, gated_delta_net_prefill

NULL_BLOCK = 0
"""The block of vLLM's pools that belongs to no request. Rows with it are padding."""


class Tokens(NamedTuple):
    """Tokens of a batch that run together.

    qkv [T, 2 H K + HV V], before or after the short convolution; raw gate [T, HV] or [T, HV, K];
    raw beta [T, HV]; places [T], where they are in the batch, or None if they are all of it.
    """

    qkv: Tensor
    gate: Tensor
    beta: Tensor
    places: Tensor | None = None

    def take(self, places: Tensor) -> Tokens:
        """Those at these places."""
        qkv, gate, beta = (x.index_select(0, places) for x in (self.qkv, self.gate, self.beta))
        return Tokens(qkv, gate, beta, places)


class Rule(NamedTuple):
    """The rule of one layer on one rank: q/k heads, value heads, key and value size, and further
    keywords of gdn's calls. The pool is [blocks, HV, V, K]."""

    H: int
    HV: int
    K: int
    V: int
    options: dict[str, Any]

    def heads(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """q, k, v [1, T, heads, size], views of qkv, and gate and beta [1, T, ...]."""
        q, k, v = torch.split(tokens.qkv, [self.H * self.K, self.H * self.K, self.HV * self.V], -1)
        q, k, v = (
            x.view(-1, heads, size)
            for x, heads, size in (
                (q, self.H, self.K),
                (k, self.H, self.K),
                (v, self.HV, self.V),
            )
        )
        return q[None], k[None], v[None], tokens.gate[None], tokens.beta[None]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """That of a block's state."""
        return self.HV, self.V, self.K

    @property
    def keywords(self) -> dict[str, Any]:
        """What every call gets."""
        return {
            "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True, "state_v_first": True, "null_index": NULL_BLOCK,
            **self.options,
        }  # fmt: skip


def split(metadata: Any, tokens: Tokens) -> tuple[Tokens | None, Tokens | None]:
    """The tokens of speculative steps, and the others; None where there are none."""
    end = metadata.num_actual_tokens
    tokens = Tokens(tokens.qkv[:end], tokens.gate[:end], tokens.beta[:end])
    if metadata.spec_sequence_masks is None:
        return None, tokens
    if metadata.num_prefills == 0 and metadata.num_decodes == 0:
        return tokens, None
    return tokens.take(metadata.spec_token_indx), tokens.take(metadata.non_spec_token_indx)


class Convolution(Protocol):
    """A layer's short convolution of [T, channels], by the kind of the tokens."""

    def speculative(self, x: Tensor) -> Tensor: ...

    def others(self, x: Tensor) -> Tensor: ...


def run_batch(
    metadata: Any, tokens: Tokens, rule: Rule, convolution: Convolution, pool: Tensor, out: Tensor
) -> None:
    """Convolve a batch's tokens, run them on the pool, and write their o to out [T, HV, V]. Rows of
    out past the batch's tokens stay as they are."""
    speculative, others = split(metadata, tokens)
    kinds = (
        (speculative, convolution.speculative, run_speculative),
        (others, convolution.others, run_others),
    )
    for part, convolve, run in kinds:
        if part is None or not len(part.qkv):
            continue
        o = out[: len(part.qkv)] if part.places is None else torch.zeros_like(out[: len(part.qkv)])
        run(metadata, part._replace(qkv=convolve(part.qkv)), rule, pool, o)
        if part.places is not None:
            out.index_copy_(0, part.places, o)


def run_speculative(metadata: Any, tokens: Tokens, rule: Rule, pool: Tensor, out: Tensor) -> None:
    """Steps of several tokens. A row starts from the slot of its last accepted token, column
    num_accepted_tokens - 1, and writes the state after token t to column t."""
    N = metadata.num_spec_decodes
    q, k, v, gate, beta = rule.heads(tokens)
    gated_delta_net_decode(
        q, k, v, gate, beta, state=pool, out=out[None], leading_column=False,
        state_indices=metadata.spec_state_indices_tensor[:N],
        num_accepted_tokens=metadata.num_accepted_tokens[:N],
        cu_seqlens=metadata.spec_query_start_loc[: N + 1], **rule.keywords,
    )  # fmt: skip


def run_others(metadata: Any, tokens: Tokens, rule: Rule, pool: Tensor, out: Tensor) -> None:
    """Plain decodes, which come first, a token each, and prefills."""
    q, k, v, gate, beta = rule.heads(tokens)
    # without prefills, padding of a captured graph counts as decodes of the null block
    N = metadata.num_decode_tokens if metadata.num_prefills else q.shape[1]
    if N:
        rows = (x[:, :N].transpose(0, 1) for x in (q, k, v, gate, beta))
        gated_delta_net_decode(
            *rows, state=pool, out=out[:N, None],
            state_indices=metadata.non_spec_state_indices_tensor[:N], **rule.keywords,
        )  # fmt: skip
    if metadata.num_prefills:
        q, k, v, gate, beta = (x[:, N:] for x in (q, k, v, gate, beta))
        slots = metadata.prefill_state_indices
        gated_delta_net_prefill(
            q, k, v, gate, beta, state=pool, out=out[None, N:], state_indices=slots,
            cu_seqlens=metadata.prefill_query_start_loc,
            fresh=~metadata.prefill_has_initial_state,
            **checkpoints(metadata, len(slots)), **rule.keywords,
        )  # fmt: skip


def checkpoints(metadata: Any, N: int) -> dict[str, Any]:
    """The checkpoints of the last N rows, which prefill, as keywords."""
    if metadata.checkpoint is None:
        return {}
    return {
        "checkpoint_offsets": metadata.checkpoint.checkpoint_offsets[-N:],
        "checkpoint_indices": metadata.checkpoint.state_indices[-N:],
    }


class Sample(NamedTuple):
    """A call that touches no state: every row is of the null block. Its tokens by name, and its
    keywords; prefill tells the two ops apart."""

    tokens: dict[str, Any]
    keywords: dict[str, Any]
    prefill: bool


def samples(
    rule: Rule, pool: Tensor, dtype: torch.dtype, per_channel: bool, columns: int, stored: bool
) -> Iterator[Sample]:
    """A call of each kind that the engine makes: a decode, with `columns` above 1 a speculative
    step of so many tokens, a prefill, and if `stored` one with checkpoints."""

    def sample(B: int, T: int, prefill: bool, **own: Tensor | bool) -> Sample:
        q = pool.new_zeros(B, T, rule.H, rule.K, dtype=dtype)
        v = pool.new_zeros(B, T, rule.HV, rule.V, dtype=dtype)
        beta = v.new_zeros(B, T, rule.HV)
        g = v.new_zeros(B, T, rule.HV, rule.K) if per_channel else beta
        tokens = {"q": q, "k": q, "v": v, "g": g, "beta": beta}
        return Sample(tokens, {"state": pool, "out": v.clone(), **own, **rule.keywords}, prefill)

    def integers(*shape: int) -> Tensor:
        return pool.new_zeros(shape, dtype=torch.int32)

    def bounds(length: int) -> Tensor:
        return torch.arange(3, dtype=torch.int32, device=pool.device) * length

    yield sample(2, 1, False, state_indices=integers(2))
    if columns > 1:
        yield sample(
            1, 2 * columns, False, state_indices=integers(2, columns), leading_column=False,
            num_accepted_tokens=integers(2) + 1, cu_seqlens=bounds(columns),
        )  # fmt: skip
    fresh = pool.new_zeros(2, dtype=torch.bool)
    rows = {"state_indices": integers(2), "cu_seqlens": bounds(CHUNK), "fresh": fresh}
    yield sample(1, 2 * CHUNK, True, **rows)
    if stored:
        marks = {"checkpoint_offsets": integers(2), "checkpoint_indices": integers(2)}
        yield sample(1, 2 * CHUNK, True, **rows, **marks)


def run_sample(sample: Sample) -> None:
    """Run it, so that what it needs is compiled."""
    op = gated_delta_net_prefill if sample.prefill else gated_delta_net_decode
    op(**sample.tokens, **sample.keywords)
