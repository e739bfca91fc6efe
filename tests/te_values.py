"""Values through Transformer Engine's layers, on the CPU: a Hugging Face folder into every rank's
parameters and back, byte for byte, and a checkpoint's tensors the same in local layers.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import te_checks as checks
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from te_machine import CPU, num_ranks, played_rank, reported_gpu

from megatron_mmr1.backend.weights import NamedWeights, _global_names
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import AttentionShape, family_of, read_config, required_hf_names
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.convert.rules import EXPERT_KINDS, gather, split
from megatron_mmr1.parity.models import build_tiny

_BF16 = PrecisionConfig("bfloat16")


@cache
def tiny(kind: str) -> tuple[Any, HfWeights]:
    """Return the tiny model's config and files; the folder goes when the process ends."""
    folder = build_tiny(kind, Path(tempfile.mkdtemp(prefix="te_check_")) / kind)
    return read_config(folder), HfWeights(folder)


def check_values(kind: str, layout: ParallelConfig) -> str:
    """Load the tiny model into every rank, and make its tensors of the ranks' parts again."""
    hf_config, files = tiny(kind)
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(num_ranks(layout)):
        with played_rank(layout, rank):
            te = _loaded(hf_config, files, layout, is_local=False)
            local = _loaded(hf_config, files, layout, is_local=True)
            _check_same(_in_checkpoint(te), _in_checkpoint(local))
            is_copy = parallel_state.get_data_parallel_rank(with_context_parallel=True) > 0
            first = parallel_state.get_expert_model_parallel_rank() * _num_local(hf_config, layout)
            for stage in te:
                for name, parameter in _global_names(stage):
                    is_expert = ".experts." in name
                    if getattr(parameter, "shared", False) or (is_copy and not is_expert):
                        continue
                    name = checks._EXPERT.sub(lambda m, f=first: str(int(m.group()) + f), name)
                    parts.setdefault(name, []).append(parameter.detach())
    return str(_check_files(parts, hf_config, files))


def _check_files(parts: dict[str, list[torch.Tensor]], hf_config: Any, files: HfWeights) -> int:
    """Join tensor-parallel parts, split them into Hugging Face's tensors, compare the bytes."""
    rules, text = family_of(hf_config).rules, hf_config.get_text_config()
    shape, made = AttentionShape.of(text), set()
    for name, shards in parts.items():
        rule, hf_names = required_hf_names(rules, name)
        shards = shards[:1] if rule.kind in EXPERT_KINDS else shards
        whole = gather(rule.kind, shards, text.vocab_size)
        for hf_name, tensor in zip(hf_names, split(rule.kind, whole, shape), strict=True):
            expected = files[hf_name].to(torch.bfloat16)
            assert torch.equal(tensor, expected), f"{hf_name} came back changed"
            made.add(hf_name)
    assert made == set(files.tensors), sorted(made ^ set(files.tensors))[:3]
    return len(made)


def _loaded(
    hf_config: Any, files: HfWeights, layout: ParallelConfig, *, is_local: bool
) -> list[Any]:
    stages = checks.build(hf_config, layout, _BF16, is_local=is_local, on=CPU)
    text = hf_config.get_text_config()
    NamedWeights(
        stages,
        family_of(hf_config),
        AttentionShape.of(text),
        text.vocab_size,
        getattr(text, "num_experts", None) or 0,
    ).load(files)
    return stages


def _in_checkpoint(stages: list[Any]) -> dict[Any, torch.Tensor]:
    """Return this rank's tensors by their places in a checkpoint."""
    found: dict[Any, torch.Tensor] = {}

    def add(entry: Any) -> None:
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        if isinstance(entry, ShardedTensor):
            assert entry.data is not None
            found[entry.key, entry.global_offset] = entry.data
        elif isinstance(entry, dict | list):
            for part in entry.values() if isinstance(entry, dict) else entry:
                add(part)

    with reported_gpu(CPU):
        for index, stage in enumerate(stages):
            add(list(stage.sharded_state_dict(prefix=f"{index}.").values()))
    return found


def _check_same(te: dict[Any, torch.Tensor], local: dict[Any, torch.Tensor]) -> None:
    assert te.keys() == local.keys(), sorted(te.keys() ^ local.keys())[:3]
    for place, tensor in te.items():
        assert torch.equal(tensor, local[place]), f"{place}: not what local layers hold there"


def _num_local(hf_config: Any, layout: ParallelConfig) -> int:
    return (getattr(hf_config.get_text_config(), "num_experts", None) or 0) // layout.ep_size
