"""The vocabulary of a conversion table: how one Megatron parameter is
made of Hugging Face tensors, and back.

A rule is pure data; its kind names two pairs of pure functions that need no process group and no
Megatron: merge and split, between Hugging Face's tensors and Megatron's whole one, and shard and
gather, between the whole one and tensor-parallel parts. A family's table is a tuple of rules; the
first pattern that matches wins.

H query heads, K key/value heads, E head size, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["replicated", "row", "vocab", "qkv", "gated", "expert", "expert_gated"]


EXPERT_KINDS = ("expert", "expert_gated")
_WHOLE = ("replicated", *EXPERT_KINDS)  # not cut by tensor parallelism


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the qkv layout depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, text_config: Any) -> AttentionShape:
        """Read a Hugging Face text config."""
        heads = text_config.num_attention_heads
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        return cls(heads, text_config.num_key_value_heads, head_dim)


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter pattern and the Hugging Face names that it is made of.

    Attributes:
        megatron: name with `*` for the number of a layer, then of an expert, or, at the end, `**`
            for any suffix.
        kind: the layout. replicated, row and vocab hold one tensor as it is and say which dim
            tensor parallelism cuts (none, 1, 0; vocab is first padded to equal parts); qkv
            interleaves q, k and v by key/value head and is then cut in dim 0, so that there may be
            more parts than key/value heads; gated stacks gate over up, each cut in dim 0. expert
            and expert_gated are one expert's, whole on the rank that holds it: tensor parallelism
            does not cut them.
        hf: names in the order that the kind expects, with the same `*` or `**` in the same order.
    """

    megatron: str
    kind: Kind
    hf: tuple[str, ...]


def required_hf_names(rules: Sequence[Rule], megatron_name: str) -> tuple[Rule, tuple[str, ...]]:
    """Return the rule of a Megatron parameter and the Hugging Face names that it needs.

    Raises:
        ValueError: no rule knows the name.
    """
    for rule in rules:
        match = re.fullmatch(_as_regex(rule.megatron), megatron_name)
        if match:
            return rule, tuple(_filled(name, match.groups()) for name in rule.hf)
    raise ValueError(
        f"no conversion rule for the Megatron parameter {megatron_name!r}; "
        "add one to the family's table"
    )


def megatron_to_hf(
    rules: Sequence[Rule], named_parameters: Iterable[tuple[str, Tensor]], shape: AttentionShape
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for whole Megatron parameters;
    views where the layout allows.
    """
    for name, parameter in named_parameters:
        rule, hf_names = required_hf_names(rules, name)
        yield from zip(hf_names, split(rule.kind, parameter, shape), strict=True)


def merge(kind: Kind, tensors: Sequence[Tensor], shape: AttentionShape) -> Tensor:
    """Make the Megatron tensor of the Hugging Face ones."""
    return _MERGE[kind](tensors, shape) if kind in _MERGE else tensors[0]


def split(kind: Kind, tensor: Tensor, shape: AttentionShape) -> tuple[Tensor, ...]:
    """Make the Hugging Face tensors of the Megatron one; the inverse of `merge`."""
    return _SPLIT[kind](tensor, shape) if kind in _SPLIT else (tensor,)


def shard(kind: Kind, tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Return one tensor-parallel rank's part of a whole Megatron tensor.

    A vocabulary that does not divide is padded with zero rows at its end.
    """
    if kind in _WHOLE or tp_size == 1:
        return tensor
    if kind == "row":
        return tensor.chunk(tp_size, dim=1)[tp_rank]
    if kind == "gated":
        return torch.cat([half.chunk(tp_size)[tp_rank] for half in tensor.chunk(2)])
    if kind == "vocab":
        missing = -len(tensor) % tp_size
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.chunk(tp_size)[tp_rank]


def gather(kind: Kind, shards: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Make the whole Megatron tensor of all ranks' parts; the inverse of `shard`."""
    if kind in _WHOLE or len(shards) == 1:
        return shards[0]
    if kind == "row":
        return torch.cat(list(shards), dim=1)
    if kind == "gated":
        halves = zip(*(part.chunk(2) for part in shards), strict=True)
        return torch.cat([part for half in halves for part in half])
    whole = torch.cat(list(shards))
    return whole[:vocab_size] if kind == "vocab" else whole


def _merge_qkv(tensors: Sequence[Tensor], shape: AttentionShape) -> Tensor:
    """Put each key/value head's query heads, key and value side by side: K x (H/K + 2) x E rows."""
    grouped = [t.reshape(shape.num_kv_heads, -1, *t.shape[1:]) for t in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(tensor: Tensor, shape: AttentionShape) -> tuple[Tensor, ...]:
    queries_per_kv = shape.num_heads // shape.num_kv_heads
    grouped = tensor.reshape(shape.num_kv_heads, -1, *tensor.shape[1:])
    sizes = [queries_per_kv * shape.head_dim, shape.head_dim, shape.head_dim]
    return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))


def _merge_gated(tensors: Sequence[Tensor], shape: AttentionShape) -> Tensor:
    return torch.cat(list(tensors))


def _split_gated(tensor: Tensor, shape: AttentionShape) -> tuple[Tensor, ...]:
    return tuple(tensor.chunk(2))


_MERGE: dict[Kind, Callable[[Sequence[Tensor], AttentionShape], Tensor]] = {
    "qkv": _merge_qkv,
    "gated": _merge_gated,
    "expert_gated": _merge_gated,
}
_SPLIT: dict[Kind, Callable[[Tensor, AttentionShape], tuple[Tensor, ...]]] = {
    "qkv": _split_qkv,
    "gated": _split_gated,
    "expert_gated": _split_gated,
}


def _filled(pattern: str, wildcards: Sequence[str]) -> str:
    parts = re.split(r"\*+", pattern)
    return "".join(map("".join, zip(parts, (*wildcards, ""), strict=True)))


def _as_regex(pattern: str) -> str:
    escaped = re.escape(pattern)
    return escaped.replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")
