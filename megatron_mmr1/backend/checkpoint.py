"""Checkpoints: `checkpoints/step_N/`, written beside, renamed when complete, never half there.

    step_N/megatron/       weights, optimizer, schedule: Megatron's dist_checkpointing (global
                           tensors: saved at one parallel layout, loaded at any other)
    step_N/trainer.pt      what the trainer adds (sampler, best accuracy, versions): plain values
                           and tensors
    step_N/rng_RANK.pt     the rank's torch generator state; another number of ranks goes on from
                           rank 0's
    step_N/config.yaml     the resolved configuration, copied from the run folder

Layers' extra states are not kept. Transformer Engine has them for more layers than Megatron's local
ones have, so that a checkpoint of one could not be loaded with the other; and what they hold, the
scales of FP8 with recipe "delayed", is pickled. After a resume these scales start anew.

Security: every file is read with weights_only; Megatron's `.metadata`, which is a pickle, only
after an unpickler that knows an allow-list of harmless classes has gone through it
(convert/torch_dist.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_mmr1 import device
from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.convert.torch_dist import read_metadata

_BEST = "best.txt"
_EXTRA_STATE = "_extra_state"
# Whole optimizer states, gathered over data-parallel ranks: the only sharding of Megatron-Core
# 0.19.2 that loads at another tensor- or pipeline-parallel layout.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


class Checkpoints:
    """The checkpoints of one run folder: save, find, load,
    and prune all but the last K and the best.
    """

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self._run_dir = run_dir
        self._root = run_dir / "checkpoints"
        self._keep_last = keep_last

    def newest(self) -> int | None:
        """Return the newest complete checkpoint's step, or None.

        A half-written folder has another name.
        """
        return max(self._steps(), default=None)

    def best(self) -> int | None:
        """Return the best checkpoint's step, or None."""
        path = self._root / _BEST
        return int(path.read_text().strip().removeprefix("step_")) if path.exists() else None

    def save(
        self, step: int, policy: MegatronPolicy, trainer_state: dict[str, Any], is_best: bool
    ) -> None:
        """Write `step_N`; every rank calls. The folder gets its name when all of it is on disk."""
        partial, final = self._root / f"partial_step_{step}", self._root / f"step_{step}"
        if parallel.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "megatron").mkdir(parents=True)
        parallel.barrier()
        with device.seam():
            weights = _weights(policy)
            state = {
                **weights,
                "optimizer": policy.optimizer.sharded_state_dict(weights, metadata=_RESHARDABLE),
                "schedule": policy.schedule.state_dict(),
            }
            dist_checkpointing.save(state, str(partial / "megatron"))
        torch.save(_rng_state(), partial / f"rng_{dist.get_rank()}.pt")
        if parallel.is_main():
            torch.save(_with_tensors(trainer_state), partial / "trainer.pt")
            shutil.copy2(self._run_dir / "config.yaml", partial / "config.yaml")
        parallel.barrier()
        if parallel.is_main():
            if is_best:
                best = self._root / (_BEST + ".new")
                best.write_text(f"step_{step}\n")
                best.rename(self._root / _BEST)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._prune()
        parallel.barrier()

    def load(self, step: int, policy: MegatronPolicy) -> dict[str, Any]:
        """Restore policy, optimizer, schedule and generators; returns the trainer's state.

        Raises:
            ValueError: a file is not what a checkpoint of ours holds.
        """
        folder = self._root / f"step_{step}"
        read_metadata(folder / "megatron" / ".metadata")  # refuses what could run code
        with device.seam(), _weights_only():
            weights = _weights(policy)
            wanted = {
                **weights,
                "optimizer": policy.optimizer.sharded_state_dict(
                    weights, is_loading=True, metadata=_RESHARDABLE
                ),
            }
            state: Any = dist_checkpointing.load(wanted, str(folder / "megatron"))
            for name, chunk in zip(weights, policy.chunks, strict=True):
                none = {key: None for key in chunk.state_dict() if key.endswith(_EXTRA_STATE)}
                chunk.load_state_dict({**state[name], **none})
            policy.optimizer.load_state_dict(state["optimizer"])
            policy.schedule.load_state_dict(state["schedule"])
            policy.follow_optimizer()
        same_ranks = len(list(folder.glob("rng_*.pt"))) == dist.get_world_size()
        rng_file = folder / f"rng_{dist.get_rank() if same_ranks else 0}.pt"
        _restore_rng_state(torch.load(rng_file, weights_only=True))
        return _with_arrays(torch.load(folder / "trainer.pt", weights_only=True))

    def _steps(self) -> list[int]:
        folders = self._root.glob("step_*")
        return sorted(int(f.name.removeprefix("step_")) for f in folders if f.is_dir())

    def _prune(self) -> None:
        best = self._root / _BEST
        kept = {best.read_text().strip()} if best.exists() else set()
        kept |= {f"step_{step}" for step in self._steps()[-self._keep_last :]}
        for step in self._steps():
            if f"step_{step}" not in kept:
                shutil.rmtree(self._root / f"step_{step}")


def _weights(policy: MegatronPolicy) -> dict[str, Any]:
    """One entry a model chunk; a tensor's key inside is the same at every layout."""
    return {
        f"model{index}": {
            key: entry
            for key, entry in chunk.sharded_state_dict().items()
            if not key.endswith(_EXTRA_STATE)
        }
        for index, chunk in enumerate(policy.chunks)
    }


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` inside refuse to run code.

    Torch's own checkpoint reader would not: it reads the objects among the tensors, which are
    pickles, with that check off.
    """
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.has_gpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.has_gpu():
        torch.cuda.set_rng_state(state["cuda"])


def _with_tensors(value: Any) -> Any:
    """Turn arrays into tensors, which a file can hold that is read without pickle."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _with_tensors(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(part) for part in value)
    return value


def _with_arrays(value: Any) -> Any:
    """The way back."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _with_arrays(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_arrays(part) for part in value)
    return value
