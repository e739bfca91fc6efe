"""The negative controls: each makes one well-known mistake, by name.

They patch our own modules for the time of one comparison; nothing else here may.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

from megatron_mmr1.backend import layout, parallel, policy
from megatron_mmr1.backend.model import AddFeatures
from megatron_mmr1.backend.vision import StepFeatures
from megatron_mmr1.backend.weights import NamedWeights
from megatron_mmr1.convert import AttentionShape, Family, megatron_to_hf
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.types import PackedBatch, ResponseRows, StepBatch


def change_step(name: str, step: StepBatch) -> StepBatch:
    """Make the mistakes that lie in the data: positions, and the loss's denominator."""
    if name == "text-only positions":
        return _each(step, _count_positions)
    if name == "a per-rank loss denominator":
        # What a mean over this rank's tokens, averaged over ranks, would come to.
        mine = sum(float(b.rows.token_weights_R.sum()) for b in step.micro_batches)
        factor = 1 / (mine * parallel.dp_size()) if mine else 0.0
        return _each(
            step,
            lambda b: replace(b, rows=scaled(b.rows, factor)),
        )
    return step


def change_policy(
    name: str,
    trained: policy.MegatronPolicy,
    folder: str,
    family: Family,
    shape: AttentionShape,
) -> None:
    """Make the mistakes that lie in the weights, and in what is made once with them."""
    if name == "rotary axes in sections":
        for chunk in trained.chunks:
            axes = chunk.language.rotary_pos_emb.axis_E2
            axes.copy_(axes.sort().values)
    if name == "another expert's weights":
        with patch.object(NamedWeights, "_numbered", lambda weights, name, rank: name):
            trained._weights.load(HfWeights(folder))
    if name == "wrong QKV order":
        _order_by_kind(trained, family, shape)


def _order_by_kind(trained: policy.MegatronPolicy, family: Family, shape: AttentionShape) -> None:
    """All queries, then keys, then values."""
    for chunk in trained.chunks:
        for parameter_name, parameter in chunk.named_parameters():
            if "linear_qkv" in parameter_name:
                whole = [(parameter_name, parameter.detach().clone())]
                parts = megatron_to_hf(family.rules, whole, shape)
                with torch.no_grad():
                    parameter.copy_(torch.cat([tensor for _, tensor in parts]))


@contextmanager
def change_code(name: str) -> Iterator[None]:
    """Make the mistakes that lie in the code: positions, and what goes to and from the tower."""
    if name == "unsliced rotary under CP":
        right = layout.local_view

        def local_view(batch: PackedBatch) -> layout.LocalView:
            view = right(batch)
            num_tokens = len(view.token_ids_T)
            return replace(view, position_ids_3T=batch.position_ids_3T[:, :num_tokens])

        with patch.object(policy, "local_view", local_view):
            yield
    elif name == "a dropped vision bucket":

        def backward(features: StepFeatures) -> None:
            if parallel.dp_rank() == 0:
                send_back(features)

        send_back = StepFeatures.backward
        with patch.object(StepFeatures, "backward", backward):
            yield
    elif name == "no features after the first layers":
        with patch.object(AddFeatures, "__call__", lambda self, layer, args, kwargs, out: out):
            yield
    else:
        yield


def scaled(rows: ResponseRows, factor: float) -> ResponseRows:
    """Multiply the rows' shares of the loss."""
    sequences = replace(rows.sequences, weight_S=rows.sequences.weight_S * factor)
    return replace(rows, sequences=sequences)


def _count_positions(batch: PackedBatch) -> PackedBatch:
    """Number the tokens of each sequence, as if all of them were text."""
    starts = torch.tensor(batch.boundaries)
    lengths = starts[1:] - starts[:-1]
    number_T = torch.arange(batch.boundaries[-1]) - starts[:-1].repeat_interleave(lengths)
    return replace(batch, position_ids_3T=number_T.expand(3, -1).to(batch.position_ids_3T.device))


def _each(step: StepBatch, change: object) -> StepBatch:
    assert callable(change)
    return replace(step, micro_batches=tuple(change(batch) for batch in step.micro_batches))
