"""A plan of memory, for people. GB = 10^9 bytes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mmr1.config.layout import replica_size
from megatron_mmr1.config.schema import GrpoConfig, SftConfig
from megatron_mmr1.planning.memory import (
    GPU_BYTES,
    RESERVE_BYTES,
    Phase,
    RankMemory,
    num_gpus,
)


def as_text(config: GrpoConfig | SftConfig, plans: list[RankMemory]) -> str:
    """Write one experiment's plan."""
    return "\n".join(_lines(config, plans))


def _lines(config: GrpoConfig | SftConfig, plans: list[RankMemory]) -> Iterator[str]:
    layout, gpus = config.parallel, num_gpus(config)
    yield (
        f"{config.experiment}: {gpus} GPUs, {gpus // replica_size(layout)} x (TP {layout.tp_size}, "
        f"PP {layout.pp_size}, CP {layout.cp_size})"
    )
    for plan in plans:
        counted = plan.counted
        yield (
            f"  stage {plan.stage}, as rank {plan.rank}: {counted.num_parameters:,} parameters; "
            f"weights {counted.weights:,}, gradients {counted.gradients:,}, optimizer "
            f"{counted.states:,} bytes"
        )
        yield from (f"    {_phase(phase)}" for phase in plan.phases)
        if plan.longest_tokens:
            yield (
                f"    KV cache: {plan.kv_cache_tokens:,} tokens an engine; the longest sequence "
                f"has {plan.longest_tokens:,}"
            )
        if plan.host_bytes:
            yield f"    host memory for optimizer states: {plan.host_bytes / 1e9:.1f} GB a rank"
        yield (
            f"    {'fits' if plan.fits else 'DOES NOT FIT'} into {GPU_BYTES / 1e9:.0f} GB less "
            f"{RESERVE_BYTES / 1e9:.0f} in reserve; most is needed to {plan.binding.name}, and of "
            f"that for {plan.binding.largest}"
        )


def _phase(phase: Phase) -> str:
    parts = [f"{name} {size / 1e9:.1f}" for name, size in phase.parts.items() if size >= 5e7]
    rest = f"; KV cache takes {phase.rest / 1e9:.1f} of the rest" if phase.rest else ""
    return f"{phase.name:8} {phase.total / 1e9:5.1f} GB: {', '.join(parts)}{rest}"
