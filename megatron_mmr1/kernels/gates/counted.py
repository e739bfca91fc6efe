"""Gates on what is counted while the kernels run in Triton's interpreter: bytes, launches.

A process of its own, since the interpreter is chosen when kernels are imported: `counted_gates`
starts `python -m megatron_mmr1.kernels.gates.counted`, which prints the gates as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels.contract import SoftmaxRule, Vocabulary
from megatron_mmr1.kernels.gates.paths import RowPath, SequencePath, Size, rows_of
from megatron_mmr1.kernels.gates.table import Gate
from megatron_mmr1.kernels.head import OutputHead

_PLACE = "interpreter"
_TOKENS = Size(num_rows=4096, num_sequences=2)


@dataclass(slots=True)
class Traffic:
    """What kernels did, by their names. Bytes: all, and those of the logits."""

    launches: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    logit_bytes: Counter[str] = field(default_factory=Counter)


def counted_gates() -> list[Gate]:
    """Count in a child process, and return what it found."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    return [Gate(**gate) for gate in json.loads(child.stdout)]


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count launches, and the bytes that active lanes load and store; atomics are left out."""
    traffic, now, logits = Traffic(), [""], [range(0)]
    run = InterpretedFunction.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] = self.__name__
        traffic.launches[now[0]] += 1
        named = dict(zip(self.arg_names, args, strict=False))
        logits[0] = _addresses(named["logits"]) if "logits" in named else range(0)
        return run(self, *args, **kwargs)

    def add(pointers: Any, mask: Any) -> None:
        active = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        is_logit = (active >= logits[0].start) & (active < logits[0].stop)
        traffic.num_bytes[now[0]] += size * active.size
        traffic.logit_bytes[now[0]] += size * int(is_logit.sum())

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpretedFunction, "run", counted_run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield traffic


def _addresses(tensor: torch.Tensor) -> range:
    storage = tensor.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def _logit_gates() -> Iterator[Gate]:
    """Bytes a bf16 logit: each element of a row once a pass."""
    size = Size()
    with counting() as cut:
        RowPath(True, "grpo", has_entropy=True).call(size)
    with counting() as whole:
        RowPath(False, "grpo", has_entropy=True).call(size)
    for subject, found, num_bytes in (
        ("forward (statistics kernel)", cut.logit_bytes["statistics_kernel"], 2),
        ("backward (gradient kernel)", cut.logit_bytes["gradient_kernel"], 4),
        ("fused (gradient kernel, TP1)", whole.logit_bytes["gradient_kernel"], 6),
    ):
        a_logit = found / (size.num_rows * size.num_tokens)
        yield Gate(subject, "bytes a logit", _PLACE, a_logit, "~", num_bytes)
    yield Gate(f"{subject}, as if read once", "bytes a logit", _PLACE, a_logit, "~", 4, True)


def _token_gates() -> Iterator[Gate]:
    """Bytes a token of the sequence kernel: log-prob, entropy, rollout, d log-prob, and options."""
    for path, expected in (
        (SequencePath("token", False, False, False, False), 16),
        (SequencePath("token", True, True, True, False), 24),
        (SequencePath("token", True, True, True, True), 28),
        (SequencePath("sequence", True, True, True, True), 48),
    ):
        with counting() as traffic:
            path.call(_TOKENS)
        a_token = traffic.num_bytes["sequence_kernel"] / _TOKENS.num_rows
        yield Gate(path.name, "bytes a token", _PLACE, a_token, "~", expected)


def _launch_gates() -> Iterator[Gate]:
    """Launches of a chunk through the head; the loss's one is for all chunks."""
    size, config = Size(num_rows=8, num_tokens=100), AlgorithmConfig()
    hidden_RD = torch.ones(size.num_rows, 16, dtype=torch.bfloat16)
    weight = torch.ones(size.num_tokens, 16, dtype=torch.bfloat16)
    for name, group, limit in (("TP1", None, 2), ("TP", dist.group.WORLD, 3)):
        vocabulary = Vocabulary(SoftmaxRule(1.0, ()), 0, size.num_tokens, group)
        head = OutputHead(weight, vocabulary, kernels="triton")
        with counting() as traffic:
            head.grpo_loss(hidden_RD, rows_of(size, config, has_old=True), config)
        subject, found = f"GRPO's loss and gradient, {name}", traffic.launches.total()
        yield Gate(subject, "launches", _PLACE, found, "==", limit)
    yield Gate(f"{subject}, as if TP1", "launches", _PLACE, found, "==", 2, True)


def main() -> None:
    """Count in this process, a group of one rank in place of a tensor-parallel one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    gates = [*_logit_gates(), *_token_gates(), *_launch_gates()]
    dist.destroy_process_group()
    print(json.dumps([asdict(gate) for gate in gates]))


if __name__ == "__main__":
    main()
