"""Weights between this rank's parts and whole Hugging Face tensors, at every parallel layout.

Loading reads what this rank holds. Exporting moves byte-bounded buckets: from the pipeline stage
that owns a parameter to the others, then over tensor-parallel ranks, so that every rank receives
each byte of the model at most once. What there is to move is exchanged once and kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend import parallel
from megatron_mmr1.convert import AttentionShape, Rule, megatron_to_hf, required_hf_names
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.convert.rules import gather, merge, shard, split

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Piece:
    """One parameter's part on each tensor-parallel rank.

    Attributes:
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

    Attributes:
        num_bytes_received: by this rank, in its last complete export.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        rules: Sequence[Rule],
        shape: AttentionShape,
        vocab_size: int,
    ) -> None:
        self._rules, self._shape, self._vocab_size = rules, shape, vocab_size
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
        for name, parameter in self._mine.items():
            parameter.copy_(self._read(weights, name, parameter))
        for parameter in self._copies.values():
            name = "language.embedding.word_embeddings.weight"
            parameter.copy_(self._read(weights, name, parameter))

    def export(
        self, what: str = "weights", value: Callable[[Any], Tensor | None] = lambda p: p.detach()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) on every rank; all of them must iterate alike.

        Args:
            what: names the export; what there is to move is exchanged once for each name.
            value: what to export of a parameter, of its shape; None leaves it out.

        Parallelism: for each bucket one broadcast over the pipeline group and, unless its
        parameters are whole on every rank, one all-gather over the tensor-parallel group.
        """
        values = {name: value(parameter) for name, parameter in self._mine.items()}
        pieces = self._exchange_pieces(what, values)
        self.num_bytes_received = 0
        for bucket in _buckets(pieces, self._is_replicated, BUCKET_BYTES):
            shards = self._move(bucket, values)
            for piece, parts in zip(bucket, shards, strict=True):
                rule, _ = required_hf_names(self._rules, piece.name)
                whole = gather(rule.kind, parts, self._vocab_size)
                yield from megatron_to_hf(self._rules, [(piece.name, whole)], self._shape)

    def _read(self, weights: HfWeights, name: str, parameter: Tensor) -> Tensor:
        rule, hf_names = required_hf_names(self._rules, name)
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

    def _is_replicated(self, name: str) -> bool:
        return required_hf_names(self._rules, name)[0].kind == "replicated"

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
        """Return the tensor-parallel parts of each of the bucket's parameters."""
        pp_group = parallel.pp_group()
        tp_group = parallel.tp_group()
        is_mine = bucket[0].stage == pp_group.rank()
        is_replicated = self._is_replicated(bucket[0].name) or tp_group.size() == 1
        if is_mine and is_replicated and pp_group.size() == 1:
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
        if not is_replicated:
            both = flat.new_empty(tp_group.size() * len(flat))
            dist.all_gather_into_tensor(both, flat, group=tp_group)
            self.num_bytes_received += both.nbytes - flat.nbytes
            gathered = list(both.chunk(tp_group.size()))
        parts = [part.split(sizes) for part in gathered]
        return [
            [part[index].view(piece.shape) for part in parts] for index, piece in enumerate(bucket)
        ]


def _held(values: dict[str, Tensor | None], piece: _Piece) -> Tensor:
    tensor = values[piece.name]
    assert tensor is not None
    return tensor


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
    pieces: Sequence[_Piece], is_replicated: Callable[[str], bool], max_bytes: int
) -> Iterator[list[_Piece]]:
    """Cut the pieces, in order, into buckets of one stage, one dtype and one kind of sharding."""
    runs: dict[tuple[int, torch.dtype, bool], list[_Piece]] = {}
    for piece in pieces:
        key = (piece.stage, piece.dtype, is_replicated(piece.name))
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
