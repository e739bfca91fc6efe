"""What test_memory.py checks on one and on two processes: `torchrun ... memory_cases.py FOLDER`.

How cases run and report: launched.py. What is planned is counted before the process group exists.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from megatron_mmr1 import device

device.prepare_process()

import torch
from helpers import make_policy
from launched import run_cases

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.footprint import Footprint, footprint
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import read_config

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
RANK, WORLD_SIZE = (int(os.environ.get(name, "1")) for name in ("RANK", "WORLD_SIZE"))
LAYOUTS = {
    "DP": ParallelConfig(),
    "TP2 + SP": ParallelConfig(tp_size=2, sequence_parallel=True),
    "PP2": ParallelConfig(pp_size=2),
    "PP2 x VPP2": ParallelConfig(pp_size=2, vpp_size=2),
    "CP2": ParallelConfig(cp_size=2),
}
NAMES = list(LAYOUTS) if WORLD_SIZE == 2 else ["DP"]
# Step counters of AdamW, one number a parameter, and rotary frequencies, which are no parameters.
SMALL_BYTES = 4096


def planned(name: str, model: str, dtype: str, freeze_vision: bool = False) -> Footprint:
    return footprint(
        read_config(FOLDER / model),
        LAYOUTS[name],
        PrecisionConfig(dtype),
        OptimizerConfig(lr=1e-3),
        world_size=WORLD_SIZE,
        rank=RANK,
        freeze_vision=freeze_vision,
    )


def storages() -> dict[int, int]:
    """Address and bytes of every storage of a tensor that is alive in this process."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    found = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def held_for_real(name: str, model: str, dtype: str, freeze_vision: bool = False) -> int:
    """Bytes of the tensors that are there because a policy is."""
    parallel.lift_groups()
    parallel.lay_groups(LAYOUTS[name], seed=0)
    before = storages()
    policy: MegatronPolicy | None = make_policy(
        FOLDER / model, dtype=dtype, freeze_vision=freeze_vision, layout=LAYOUTS[name]
    )
    after = storages()
    assert policy is not None
    return sum(size for address, size in after.items() if address not in before)


def check(name: str, model: str, dtype: str, freeze_vision: bool = False) -> None:
    plan = PLANNED[name, model, dtype, freeze_vision]
    total = plan.weights + plan.gradients + plan.states
    found = held_for_real(name, model, dtype, freeze_vision)
    assert 0 <= found - total <= SMALL_BYTES, (name, model, dtype, found, plan)


def case_a_policy_in_bfloat16_holds_the_planned_bytes_at_any_layout() -> None:
    for name in NAMES:
        check(name, "untied", "bfloat16")


def case_a_policy_in_float32_holds_the_planned_bytes_at_any_layout() -> None:
    """The optimizer steps on the weights themselves: no second copy of them."""
    for name in NAMES:
        check(name, "untied", "float32")


def case_tied_embeddings_and_a_frozen_tower_hold_the_planned_bytes() -> None:
    for name in NAMES:
        check(name, "tied", "bfloat16")
        check(name, "untied", "bfloat16", freeze_vision=True)


def case_the_real_bytes_are_not_those_of_another_plan() -> None:
    """Negative control. (In float32 two data-parallel ranks would hold as much: 12 bytes each.)"""
    found = held_for_real("DP", "untied", "bfloat16")
    others = [("DP", "tied", "bfloat16", False), ("DP", "untied", "bfloat16", True)]
    others += [(name, "untied", "bfloat16", False) for name in NAMES if name in ("TP2 + SP", "PP2")]
    for other in others:
        plan = PLANNED[other]
        assert abs(found - plan.weights - plan.gradients - plan.states) > SMALL_BYTES, other


if __name__ == "__main__":
    PLANNED = {
        (name, model, dtype, frozen): planned(name, model, dtype, frozen)
        for name in NAMES
        for model, dtype, frozen in (
            ("untied", "bfloat16", False),
            ("untied", "float32", False),
            ("tied", "bfloat16", False),
            ("untied", "bfloat16", True),
        )
    }
    run_cases(globals(), FOLDER, only=[])
