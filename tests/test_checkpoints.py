"""Checkpoints of the policy: exact continuation, pruning, and files that somebody tampered with.

At other layouts: layout_cases.py.
"""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    make_policy,
    make_step,
    weights,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mmr1.backend import batching, losses
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.convert.torch_dist import read_metadata
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule

pytestmark = pytest.mark.usefixtures("process_group")

WHOLE_SOFTMAX = SoftmaxRule(1.0, ())

Samples = list[batching.Sample]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("run: test\n")
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    samples: Samples,
    run_dir: Path,
    dtype: str,
):
    loss = losses.supervised()
    policy = make_policy(tiny_model_dir, dtype=dtype)
    step = make_step(policy, tiny_processor, samples)
    checkpoints = Checkpoints(run_dir, keep_last=2)
    for _ in range(2):
        policy.train_step(step, loss, WHOLE_SOFTMAX)
    state = {"step": 2, "best": 0.5, "sampler": {"draws": [1, 2]}}
    checkpoints.save(2, policy, state, is_best=True)
    random_numbers = torch.rand(3)
    metrics = [policy.train_step(step, loss, WHOLE_SOFTMAX) for _ in range(2)]

    fresh = make_policy(tiny_model_dir, dtype=dtype)
    assert checkpoints.newest() == 2
    assert checkpoints.load(2, fresh) == state
    assert torch.equal(torch.rand(3), random_numbers)
    assert [fresh.train_step(step, loss, WHOLE_SOFTMAX) for _ in range(2)] == metrics
    expected = weights(policy)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.named_tensors())


def test_a_checkpoint_holds_weights_and_no_extra_states(tiny_model_dir: Path, run_dir: Path):
    """Transformer Engine has extra states where local layers have none: neither is to be asked for
    the other's.
    """
    policy, checkpoints = make_policy(tiny_model_dir), Checkpoints(run_dir, keep_last=2)
    found = [key for key in policy.chunks[0].sharded_state_dict() if "_extra_state" in key]
    assert found, "the layers have some"
    checkpoints.save(1, policy, {}, is_best=False)
    folder = run_dir / "checkpoints" / "step_1" / "megatron"
    names = read_metadata(folder / ".metadata").state_dict_metadata
    assert not [name for name in names if "_extra_state" in name]
    assert [name for name in names if "linear_qkv.weight" in name]


def test_pruning_keeps_the_last_ones_and_the_best(tiny_model_dir: Path, run_dir: Path):
    policy, checkpoints = make_policy(tiny_model_dir), Checkpoints(run_dir, keep_last=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, policy, {}, is_best=step == 2)
    folders = {path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()}
    assert folders == {"step_2", "step_3", "step_4"}
    assert (run_dir / "checkpoints" / "step_4" / "config.yaml").read_text() == "run: test\n"


def test_a_half_written_checkpoint_is_never_the_newest(tiny_model_dir: Path, run_dir: Path):
    checkpoints = Checkpoints(run_dir, keep_last=2)
    assert checkpoints.newest() is None
    (run_dir / "checkpoints" / "partial_step_9" / "megatron").mkdir(parents=True)
    assert checkpoints.newest() is None
    checkpoints.save(4, make_policy(tiny_model_dir), {}, is_best=False)
    assert checkpoints.newest() == 4


class RunsACommand:
    """Unpickling it runs a command, as in a checkpoint that somebody tampered with."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_checkpoint_metadata_that_would_run_code_is_refused_before_it_runs(
    tiny_model_dir: Path, run_dir: Path
):
    policy, checkpoints = make_policy(tiny_model_dir), Checkpoints(run_dir, keep_last=2)
    checkpoints.save(1, policy, {}, is_best=False)
    folder, proof = run_dir / "checkpoints" / "step_1" / "megatron", run_dir / "it_ran"
    read_metadata(folder / ".metadata")  # an honest one passes
    evil = pickle.dumps(RunsACommand(f"touch '{proof}'"))
    (folder / ".metadata").write_bytes(evil)
    with pytest.raises(ValueError, match="system"):
        checkpoints.load(1, policy)
    assert not proof.exists()
    pickle.loads(evil)
    assert proof.exists(), "the control: this pickle does run its command"


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1})[:-3]])
def test_checkpoint_metadata_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="not the metadata of a Megatron checkpoint"):
        read_metadata(tmp_path / ".metadata")


def plant_in_file(folder: Path, name: str, evil: RunsACommand) -> None:
    torch.save({"model": evil}, folder / name)


def plant_in_shard(folder: Path, name: str, evil: RunsACommand) -> None:
    """Append a pickle to the tensors' file, and have the honest metadata point an object at it."""
    data, buffer = folder / "megatron" / "__0_0.distcp", io.BytesIO()
    torch.save(evil, buffer)
    metadata = pickle.loads((folder / "megatron" / ".metadata").read_bytes())
    start = data.stat().st_size
    with data.open("ab") as file:
        file.write(buffer.getvalue())
    places = [place for index, place in metadata.storage_data.items() if name in index.fqn]
    assert places
    for place in places:
        place.offset, place.length = start, len(buffer.getvalue())
    (folder / "megatron" / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (plant_in_file, "trainer.pt"),
        (plant_in_file, "rng_0.pt"),
        (plant_in_file, "megatron/common.pt"),  # of older Megatrons: read when it is there
        (plant_in_shard, "common_state"),
    ],
)
def test_no_other_file_of_a_checkpoint_can_run_code(
    tiny_model_dir: Path,
    tiny_processor: PromptProcessor,
    samples: Samples,
    run_dir: Path,
    plant: Callable[[Path, str, RunsACommand], None],
    name: str,
):
    policy, checkpoints = make_policy(tiny_model_dir), Checkpoints(run_dir, keep_last=2)
    policy.train_step(
        make_step(policy, tiny_processor, samples), losses.supervised(), WHOLE_SOFTMAX
    )
    checkpoints.save(1, policy, {}, is_best=False)
    proof = run_dir / "it_ran"
    plant(run_dir / "checkpoints" / "step_1", name, RunsACommand(f"touch '{proof}'"))
    with pytest.raises((pickle.UnpicklingError, CheckpointException)):
        checkpoints.load(1, policy)
    assert not proof.exists()
