"""Weights between this rank's parts and whole Hugging Face tensors, at every parallel layout.

Loading reads what this rank holds. Exporting moves byte-bounded buckets: from the pipeline stage
that owns a parameter to the others, then over tensor-parallel ranks (experts: over expert-parallel
ones), so that every rank receives each byte of the model at most once. What there is to move is
exchanged once and kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.precision import plain, write_weight
from megatron_mmr1.convert import (
    AttentionShape,
    Family,
    Rule,
    Spelling,
    megatron_to_hf,
    required_hf_names,
)
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.convert.rules import EXPERT_KINDS, gather, merge, shard, split

BUCKET_BYTES = 256 << 20
# An expert's number in its parameters' names: local layers, and Transformer Engine's grouped ones.
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+")
_Way = Literal["none", "tensor", "expert"]  # over which ranks a parameter is cut


@dataclass(frozen=True, slots=True)
class _Piece:
    """One parameter's part on each tensor-parallel rank, or an expert on each expert-parallel one.

    Attributes:
        name: an expert's number is that of the first expert-parallel rank.
        stage: the pipeline rank that owns it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class NamedWeights:
    """The parameters of this rank's model chunks by their names in the whole model.

    Args:
        chunks: in the order of their virtual pipeline stages.
        vocab_size: of the Hugging Face model, without padding.
        num_experts: in a layer of the whole model.

    Attributes:
        num_bytes_received: by this rank, in its last complete export.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        family: Family,
        shape: AttentionShape,
        vocab_size: int,
        num_experts: int = 0,
    ) -> None:
        self._family, self._rules = family, family.rules
        self._shape, self._vocab_size = shape, vocab_size
        self._num_local_experts = num_experts // parallel.ep_group().size()
        self._mine: dict[str, torch.nn.Parameter] = {}
        self._copies: dict[str, torch.nn.Parameter] = {}
        for chunk in chunks:
            for name, parameter in _global_names(chunk):
                # The last stage's copy of a tied embedding is the first stage's to export.
                is_copy = getattr(parameter, "shared", False)
                (self._copies if is_copy else self._mine)[name] = parameter
        self._pieces: dict[str, list[_Piece]] = {}
        self.num_bytes_received = 0

    @torch.no_grad()
    def load(self, weights: HfWeights) -> None:
        """Read this rank's parts from a model folder.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        spelling = self._family.spelling_of(weights.tensors)
        for name, parameter in self._mine.items():
            name = self._numbered(name, parallel.ep_group().rank())
            write_weight(parameter, self._read(weights, spelling, name, parameter))
        for parameter in self._copies.values():
            name = "language.embedding.word_embeddings.weight"
            write_weight(parameter, self._read(weights, spelling, name, parameter))

    def export(
        self, what: str = "weights", value: Callable[[Any], Tensor | None] = lambda p: p.detach()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) on every rank; all of them must iterate alike.

        Args:
            what: names the export; what there is to move is exchanged once for each name.
            value: what to export of a parameter, of its shape; None leaves it out.

        Parallelism: for each bucket one broadcast over the pipeline group and, unless its
        parameters are whole on every rank, one all-gather over tensor- or expert-parallel ranks.
        """
        values = {name: value(parameter) for name, parameter in self._mine.items()}
        pieces = self._exchange_pieces(what, values)
        self.num_bytes_received = 0
        for bucket in _buckets(pieces, self._way, BUCKET_BYTES):
            shards = self._move(bucket, values)
            for piece, parts in zip(bucket, shards, strict=True):
                for name, whole in self._whole(piece.name, parts):
                    yield from megatron_to_hf(self._rules, [(name, whole)], self._shape)

    def _whole(self, name: str, parts: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Join tensor-parallel parts; expert-parallel ranks hold an expert each."""
        rule, _ = required_hf_names(self._rules, name)
        if rule.kind in EXPERT_KINDS:
            return [(self._numbered(name, rank), part) for rank, part in enumerate(parts)]
        return [(name, gather(rule.kind, parts, self._vocab_size))]

    def _numbered(self, name: str, ep_rank: int) -> str:
        """Number an expert's parameter by its place among all experts."""
        first = ep_rank * self._num_local_experts
        return _EXPERT.sub(lambda match: str(int(match.group()) + first), name)

    def _read(self, weights: HfWeights, spelling: Spelling, name: str, parameter: Tensor) -> Tensor:
        rule, names = required_hf_names(self._rules, name)
        hf_names = [spelling.in_files(n) for n in names]
        tensors = [weights[n] for n in hf_names]
        size, rank = parallel.tp_group().size(), parallel.tp_group().rank()
        expected = self._whole_shapes(rule, parameter, size)
        for hf_name, tensor, shape in zip(hf_names, tensors, expected, strict=True):
            if tensor.shape != shape:
                raise ValueError(
                    f"{weights.folder}: {hf_name} is of shape {tuple(tensor.shape)}, but "
                    f"config.json describes {tuple(shape)}"
                )
        return shard(rule.kind, merge(rule.kind, tensors, self._shape), rank, size)

    def _whole_shapes(self, rule: Rule, parameter: Tensor, size: int) -> list[torch.Size]:
        parts = [torch.empty(parameter.shape, device="meta")] * size
        whole = gather(rule.kind, parts, self._vocab_size)
        return [part.shape for part in split(rule.kind, whole, self._shape)]

    def _way(self, name: str) -> _Way:
        kind = required_hf_names(self._rules, name)[0].kind
        if kind in EXPERT_KINDS:
            return "expert"
        return "none" if kind == "replicated" else "tensor"

    def _exchange_pieces(self, what: str, values: dict[str, Tensor | None]) -> list[_Piece]:
        """Learn once what every stage has to give; it stays the same for the whole run."""
        if what not in self._pieces:
            group = parallel.pp_group()
            mine = [
                _Piece(name, tuple(tensor.shape), tensor.dtype, group.rank())
                for name, tensor in values.items()
                if tensor is not None
            ]
            shares: list[list[_Piece]] = [[] for _ in range(group.size())]
            dist.all_gather_object(shares, mine, group=group)
            self._pieces[what] = [piece for share in shares for piece in share]
        return self._pieces[what]

    def _move(
        self, bucket: Sequence[_Piece], values: dict[str, Tensor | None]
    ) -> list[list[Tensor]]:
        """Return the parts of each of the bucket's parameters, in the order of the ranks."""
        pp_group = parallel.pp_group()
        way = self._way(bucket[0].name)
        group = parallel.ep_group() if way == "expert" else parallel.tp_group()
        is_mine = bucket[0].stage == pp_group.rank()
        is_whole = way == "none" or group.size() == 1
        if is_mine and is_whole and pp_group.size() == 1:
            return [[_held(values, piece)] for piece in bucket]
        sizes = [torch.Size(piece.shape).numel() for piece in bucket]
        flat = torch.empty(sum(sizes), dtype=bucket[0].dtype, device=device.device())
        if is_mine:
            torch.cat([_held(values, piece).flatten() for piece in bucket], out=flat)
        if pp_group.size() > 1:
            source = dist.get_global_rank(pp_group, bucket[0].stage)
            dist.broadcast(flat, src=source, group=pp_group)
            self.num_bytes_received += 0 if is_mine else flat.nbytes
        gathered = [flat]
        if not is_whole:
            both = flat.new_empty(group.size() * len(flat))
            dist.all_gather_into_tensor(both, flat, group=group)
            self.num_bytes_received += both.nbytes - flat.nbytes
            gathered = list(both.chunk(group.size()))
        parts = [part.split(sizes) for part in gathered]
        return [
            [part[index].view(piece.shape) for part in parts] for index, piece in enumerate(bucket)
        ]


def _held(values: dict[str, Tensor | None], piece: _Piece) -> Tensor:
    """Return what this rank has of a piece; of a weight in FP8, the values that it stands for."""
    tensor = values[piece.name]
    assert tensor is not None
    return plain(tensor)


def _global_names(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Name a chunk's parameters with the layers' numbers in the whole model."""
    language: Any = chunk.language
    layers = language.decoder.layers
    first = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in chunk.named_parameters():
        yield (
            (
                re.sub(r"(?<=\.layers\.)\d+", lambda m: str(int(m.group()) + first), name)
                if name.startswith("language.")
                else name
            ),
            parameter,
        )


def _buckets(
    pieces: Sequence[_Piece], way: Callable[[str], _Way], max_bytes: int
) -> Iterator[list[_Piece]]:
    """Cut the pieces, in order, into buckets of one stage, one dtype and one way of sharding."""
    runs: dict[tuple[int, torch.dtype, _Way], list[_Piece]] = {}
    for piece in pieces:
        key = (piece.stage, piece.dtype, way(piece.name))
        runs.setdefault(key, []).append(piece)
    for run in runs.values():
        bucket: list[_Piece] = []
        num_bytes = 0
        for piece in run:
            if bucket and num_bytes + piece.num_bytes > max_bytes:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(piece)
            num_bytes += piece.num_bytes
        yield bucket
