"""What test_convert.py checks on two processes: `torchrun ... conversion_cases.py FOLDER [CASE]`.

How cases run and report: launched.py. FOLDER has the models `untied` and `tied`, and what one
process made of them: `untied_megatron`, `tied_megatron`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_mmr1 import device

device.prepare_process()

import torch
from launched import run_cases
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.conversion import convert_hf_to_megatron, convert_megatron_to_hf, verify
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_mmr1.convert.torch_dist import TorchDistReader

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
LAYOUTS = {
    "TP2": ParallelConfig(tp_size=2),
    "PP2": ParallelConfig(pp_size=2),
    "PP2 x VPP2": ParallelConfig(pp_size=2, vpp_size=2),
    "DP2": ParallelConfig(),
}
EXPERT_LAYOUTS = {
    "EP2": ParallelConfig(ep_size=2),
    "EP2 x TP2 + SP": ParallelConfig(ep_size=2, tp_size=2, sequence_parallel=True),
    "PP2": ParallelConfig(pp_size=2),
}
# Each model, and its layouts.
MODELS = {"untied": LAYOUTS, "tied": LAYOUTS, "experts": EXPERT_LAYOUTS}


def lay(name: str) -> ParallelConfig:
    layout = (LAYOUTS | EXPERT_LAYOUTS)[name]
    parallel.lift_groups()
    parallel.lay_groups(layout, seed=0)
    return layout


def make_policy(layout: ParallelConfig, model: str) -> MegatronPolicy:
    optimizer = OptimizerConfig(lr=1e-3, schedule="linear")
    return MegatronPolicy(ModelConfig(str(FOLDER / model)), layout, optimizer, num_steps=10)


def scramble(policy: MegatronPolicy) -> None:
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(-1.0)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def case_megatron_loads_a_converted_model_at_other_layouts() -> None:
    for model, layouts in MODELS.items():
        expected = load_file(FOLDER / model / "model.safetensors")
        for name in layouts:
            policy = make_policy(lay(name), model)
            scramble(policy)
            with device.seam():
                wanted = {f"model{i}": c.sharded_state_dict() for i, c in enumerate(policy.chunks)}
                state = dist_checkpointing.load(wanted, str(FOLDER / f"{model}_megatron"))
                for key, chunk in zip(wanted, policy.chunks, strict=True):
                    chunk.load_state_dict(state[key])
            assert_same(dict(policy.named_tensors()), expected)


def case_two_processes_convert_to_what_one_does() -> None:
    lay("DP2")
    ours, alone = FOLDER / "by_two", FOLDER / "untied_megatron"
    convert_hf_to_megatron(FOLDER / "untied", ours)
    assert {path.name for path in ours.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    sizes = [path.stat().st_size for path in ours.glob("*.distcp")]
    assert max(sizes) < 2 * min(sizes)
    assert verify(FOLDER / "untied", ours).differing == ()
    readers = [TorchDistReader(folder) for folder in (ours, alone)]
    assert readers[0].tensors == readers[1].tensors
    convert_megatron_to_hf(ours, FOLDER / "hf_by_two")
    for path in (FOLDER / "untied").iterdir():
        assert (FOLDER / "hf_by_two" / path.name).read_bytes() == path.read_bytes(), path.name


def case_a_training_checkpoint_converts_to_the_policys_weights() -> None:
    """Saved at any layout, optimizer beside the weights; converted by two processes."""
    cases = [("untied", "TP2"), ("untied", "PP2 x VPP2"), ("tied", "PP2"), ("untied", "DP2")]
    cases += [("experts", name) for name in EXPERT_LAYOUTS]
    for model, name in cases:
        folder = FOLDER / f"run {model} {name}"
        policy = make_policy(lay(name), model)
        with torch.no_grad():
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.25)
        expected = {n: t.clone() for n, t in policy.named_tensors()}
        if parallel.is_main():
            folder.mkdir()
            text = f"model:\n  path: {FOLDER / model}\n"
            (folder / "config.yaml").write_text(text)
        parallel.barrier()
        Checkpoints(folder, keep_last=1).save(3, policy, {}, is_best=False)
        lay("DP2")
        convert_megatron_to_hf(folder / "checkpoints" / "step_3", folder / "hf")
        assert_same(load_file(folder / "hf" / "model.safetensors"), expected)


def case_a_fault_on_one_rank_is_raised_on_all() -> None:
    """Rank 1 finds its part of the checkpoint damaged; nothing stays behind and nobody waits."""
    lay("DP2")
    folder = FOLDER / "damaged"
    if parallel.is_main():
        folder.mkdir()
        source = FOLDER / "untied_megatron"
        for path in source.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        data = folder / "__0_0.distcp"
        content = bytearray(data.read_bytes())
        content[-400_000:] = bytes(400_000)
        data.write_bytes(content)
    parallel.barrier()
    try:
        convert_megatron_to_hf(folder, FOLDER / "hf_damaged", FOLDER / "untied")
    except ValueError as error:
        fault = str(error)
    else:
        fault = "none"
    assert "__0_0.distcp" in fault and "damaged" in fault, fault
    parallel.barrier()
    assert not list(FOLDER.glob("hf_damaged*"))


if __name__ == "__main__":
    run_cases(globals(), FOLDER, sys.argv[2:])
