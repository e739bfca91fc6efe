"""What a conversion has to do, known before a single weight is read: for each Megatron parameter
its place in a checkpoint and the Hugging Face tensors that it is made of.

Megatron itself says where parameters lie: the model is built without memory (on the meta device)
and asked for its `sharded_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import (
    AttentionShape,
    Family,
    Rule,
    Spelling,
    family_of,
    read_config,
    required_hf_names,
    settle_ties,
)
from megatron_mmr1.convert.family import RECOMPUTED
from megatron_mmr1.convert.hf_config import EMBEDDING, OUTPUT_LAYER
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.convert.rules import merge, split
from megatron_mmr1.convert.safetensors_file import TensorInfo
from megatron_mmr1.convert.torch_dist import Box, TorchDistReader

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Chained: the experts' optimizer beside that of all others.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron parameter.

    Attributes:
        shape: whole, as on one process.
        box: its place in a checkpoint.
        hf_shapes: of the Hugging Face tensors that it is made of, by name.
        is_stack: the Hugging Face tensors lie in it one after the other, so that they can be read
            right into it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    rule: Rule
    hf_shapes: dict[str, tuple[int, ...]]
    is_stack: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a model.

    Attributes:
        objects: what a checkpoint holds besides tensors, by key.
        duplicates: Hugging Face names that may stand in a file a second time, and the ones that
            they repeat (a tied output layer).
    """

    parameters: list[Parameter]
    objects: dict[str, Any]
    duplicates: dict[str, str]
    attention: AttentionShape

    @property
    def hf_names(self) -> set[str]:
        """The Hugging Face names of all parameters."""
        return {name for parameter in self.parameters for name in parameter.hf_shapes}

    def read_merged(self, weights: HfWeights, parameter: Parameter) -> Tensor:
        """Make one Megatron parameter of a model folder's tensors; nothing else is in memory."""
        names = list(parameter.hf_shapes)
        if not parameter.is_stack:
            return merge(parameter.rule.kind, [weights[name] for name in names], self.attention)
        whole = torch.empty(parameter.shape, dtype=weights.info(names[0]).dtype)
        for name, part in zip(names, self.split(parameter, whole), strict=True):
            weights.read(name, part)
        return whole

    def split(self, parameter: Parameter, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors of a Megatron parameter, in the order of its names."""
        return split(parameter.rule.kind, tensor, self.attention)


def plan_of(
    folder: Path,
    file_names: Collection[str] = (),
    key: str = "--hf",
    are_equal: Callable[[str, str], bool] = lambda first, second: False,
) -> Plan:
    """Plan the conversion of the model that a folder's config describes.

    Needs Megatron's groups to be laid without tensor, pipeline or expert parallelism.

    Args:
        file_names: of the tensors in the model's files, which tell how they are spelled.
        key: the option that named the folder, for messages.
        are_equal: see convert.settle_ties; names without values come from an earlier conversion,
            which left out what is equal.

    Raises:
        ValueError: the folder is no model folder, or its model type has no conversion table.
    """
    assert parallel.tp_group().size() == parallel.pp_group().size() == 1
    hf_config = read_config(folder, key)
    settle_ties(hf_config, file_names, are_equal)
    family = family_of(hf_config)
    spelling = family.spelling_of(file_names)
    attention = AttentionShape.of(hf_config.get_text_config())
    config = transformer_config(hf_config, ParallelConfig(), PrecisionConfig())
    with device.seam(), torch.device("meta"):
        model: Any = PolicyStage(hf_config, config)
    with device.seam():
        state = model.sharded_state_dict()
    parameters = dict(model.named_parameters())
    planned, objects = [], {}
    for name, entry in state.items():
        if isinstance(entry, ShardedObject):
            objects[entry.unique_key] = [entry.data]
        else:
            parameter = parameters.pop(name)
            planned.append(_planned(name, parameter, entry, family, spelling, attention))
    assert not parameters, f"not in the sharded state dict: {sorted(parameters)}"
    duplicates = {}
    if hf_config.tie_word_embeddings:
        first, second = (
            spelling.in_files(required_hf_names(family.rules, name)[1][0])
            for name in (EMBEDDING, OUTPUT_LAYER)
        )
        duplicates = {second: first}
    names = [name for parameter in planned for name in parameter.hf_shapes]
    assert len(names) == len(set(names)), "a Hugging Face tensor goes into two parameters"
    return Plan(planned, objects, duplicates, attention)


def check_hf(plan: Plan, weights: HfWeights) -> list[str]:
    """Refuse a model folder whose tensors are not exactly those of the plan.

    Returns:
        The names of the tensors that need no conversion: tables that follow from the config, and
        duplicates of a tied embedding.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or of an unexpected dtype.
    """
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    for parameter in plan.parameters:
        for name, shape in parameter.hf_shapes.items():
            info = weights.info(name)
            if info.shape != shape:
                raise ValueError(
                    f"{weights.folder}: {name} is of shape {info.shape}, but config.json describes "
                    f"{shape}; take both from the same model"
                )
            if info.dtype not in _FLOATS:
                raise ValueError(
                    f"{weights.folder}: {name} is {info.dtype}; give a model that is not quantized"
                )
            # All layers of a kind are one tensor in a checkpoint.
            dtype, other = dtypes.setdefault(parameter.box.key, (info.dtype, name))
            if info.dtype != dtype:
                raise ValueError(
                    f"{weights.folder}: {name} is {info.dtype}, but {other} is {dtype}, and "
                    "Megatron keeps both in one tensor; save the model in one dtype"
                )
    skipped, unknown = [], []
    for name in sorted(weights.tensors.keys() - plan.hf_names):
        is_known = name in plan.duplicates or RECOMPUTED.fullmatch(name)
        (skipped if is_known else unknown).append(name)
    if unknown:
        raise ValueError(
            f"{weights.folder}: no conversion rule for {_some(unknown)}; remove them, or add a "
            "rule to the family's table"
        )
    return skipped


def check_megatron(plan: Plan, checkpoint: TorchDistReader) -> None:
    """Refuse a checkpoint whose weights are not exactly those of the plan.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or no floating-point one.
    """
    for parameter in plan.parameters:
        checkpoint.check(parameter.box)
        dtype = checkpoint.tensors[parameter.box.key].dtype
        if dtype not in _FLOATS:
            raise ValueError(f"{checkpoint.folder}: {parameter.box.key} is {dtype}; save in bf16")
    expected = {parameter.box.key for parameter in plan.parameters}
    unknown = sorted(k for k in checkpoint.tensors.keys() - expected if not _OPTIMIZER.match(k))
    if unknown:
        raise ValueError(
            f"{checkpoint.folder}: the model that config.json describes has no {_some(unknown)}; "
            "give the folder of the checkpoint's own model as --template"
        )


def hf_infos(plan: Plan, checkpoint: TorchDistReader) -> dict[str, TensorInfo]:
    """Return dtype and shape of every Hugging Face tensor that comes out of a checkpoint."""
    return {
        name: TensorInfo(checkpoint.tensors[parameter.box.key].dtype, shape)
        for parameter in plan.parameters
        for name, shape in parameter.hf_shapes.items()
    }


def _planned(
    name: str,
    parameter: Tensor,
    entry: Any,
    family: Family,
    spelling: Spelling,
    attention: AttentionShape,
) -> Parameter:
    rule, names = required_hf_names(family.rules, name)
    hf_names = [spelling.in_files(n) for n in names]
    whole = torch.empty(parameter.shape, device="meta")
    parts = split(rule.kind, whole, attention)
    is_stack = all(p.is_contiguous() and (p is whole or p._base is whole) for p in parts)
    shapes = {n: tuple(part.shape) for n, part in zip(hf_names, parts, strict=True)}
    shape = tuple(parameter.shape)
    return Parameter(name, shape, _box(name, parameter, entry), rule, shapes, is_stack)


def _box(name: str, parameter: Tensor, entry: Any) -> Box:
    """Return where a whole parameter lies: the box around the pieces that Megatron cuts it into."""
    pieces = list(_pieces(entry.build() if isinstance(entry, ShardedTensorFactory) else entry))
    first = pieces[0]
    offset = tuple(map(min, zip(*(piece.global_offset for piece in pieces), strict=True)))
    num_layers_dims = first.prepend_axis_num
    sizes = (1,) * num_layers_dims + tuple(parameter.shape)
    # Each piece lies in the parameter as it does in the global tensor.
    whole = torch.empty(sizes, device="meta")
    num_elements = 0
    for piece in pieces:
        assert (piece.key, piece.global_shape) == (first.key, first.global_shape), name
        local = (1,) * num_layers_dims + tuple(piece.local_shape)
        inside = whole[
            tuple(
                slice(a - o, a - o + n)
                for a, o, n in zip(piece.global_offset, offset, local, strict=True)
            )
        ]
        assert inside.shape == local and piece.data is not None, name
        assert inside.storage_offset() == piece.data.storage_offset(), name
        num_elements += inside.numel()
    assert num_elements == parameter.numel(), name
    return Box(first.key, offset, sizes, tuple(first.global_shape), first.allow_shape_mismatch)


def _pieces(entry: Any) -> Iterator[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        yield entry
    else:
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from _pieces(value)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
