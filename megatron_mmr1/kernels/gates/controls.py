"""Negative controls: kernels made bad on purpose, which the gates must not let through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from megatron_mmr1.kernels.gates.launches import Launch, recorded
from megatron_mmr1.kernels.gates.paths import ROW_PATHS, Path, RowPath, SequencePath, Size
from megatron_mmr1.kernels.gates.table import Gate

Launches = Mapping[Path, Sequence[Launch]]


@dataclass(frozen=True, slots=True)
class Control:
    """A launch that must fail some of the gates on machine code."""

    subject: str
    gates: tuple[str, ...]
    launch: Callable[[Launches], Launch]

    def of(self, gate: Gate) -> Gate:
        """Turn a gate's result into a control's."""
        return replace(gate, is_control=True)


@triton.jit
def barrier_kernel(logits, num_tokens, BLOCK: tl.constexpr):
    """A sum of exponentials that makes threads wait for each other at every tile."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_tokens, BLOCK):
        total += tl.exp2(tl.load(logits + start + columns).to(tl.float32))
        tl.debug_barrier()
    tl.store(logits + columns, total.to(logits.dtype.element_ty))


def _odd_stride(launches: Launches) -> Launch:
    path = RowPath(is_parallel=False, upstream="grpo", has_entropy=True)
    return launches[path][0].with_arguments(row_stride=8209)


def _large_block(launches: Launches) -> Launch:
    path = SequencePath("sequence", has_old=True, has_ref=True, has_tis=True, has_entropy=True)
    return launches[path][0].with_arguments(BLOCK=8192)


def _barrier(launches: Launches) -> Launch:
    like = launches[ROW_PATHS[0]][0]
    arguments: dict[str, Any] = {"logits": like.arguments["logits"], "num_tokens": 8192}
    return replace(like, kernel=barrier_kernel, arguments=arguments | {"BLOCK": 4096})


CODE = (
    Control("row stride no multiple of 16", ("narrowest access",), _odd_stride),
    Control(
        "sequence kernel, blocks of 8192", ("registers", "spills", "local bytes"), _large_block
    ),
    Control("barrier at every tile", ("barriers in loops",), _barrier),
)


def vocabulary_sizes() -> Gate:
    """Two numbers of tokens, one a multiple of 16: these Triton does compile apart."""
    keys = set[str]()
    for num_tokens in (997, 1008):
        with recorded() as launches:
            RowPath(is_parallel=False, upstream="given", has_entropy=False).call(
                Size(num_tokens=num_tokens)
            )
        keys |= {launch.key(90) for launch in launches}
    return Gate(
        "997 and 1008 tokens", "compilations", "2 lengths", len(keys), "==", 1, is_control=True
    )
