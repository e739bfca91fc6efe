"""All layouts that take as many processes as there are, one after another in the same processes:
importing Megatron-Core costs more than comparing. Rank 0 writes a line of JSON for each comparison.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mmr1.backend import parallel
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_mmr1.convert import AttentionShape, Family, family_of, read_config, settle_ties
from megatron_mmr1.convert.family import RECOMPUTED
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.parity import controls, ours
from megatron_mmr1.parity.cases import make_samples
from megatron_mmr1.parity.outcome import Outcome, difference, mean_logprob_error
from megatron_mmr1.parity.reference import file_for, write_references


def run(job: dict[str, Any]) -> None:
    """Compare every cell of the job.

    Args:
        job: `references` (the folder of Hugging Face's outcomes), `write_references` (models, and
            what to compute of them first), `results` (the file to write), and `cells`. A cell has
            `folder`, `parallel`, `max_tokens`, `kinds`, `dtype`, `freeze_vision`, `control` (or
            "") and `keep`: whether ours is the outcome of one process that others are held against.
    """
    references, results = Path(job["references"]), Path(job["results"])
    parallel.initialize(ParallelConfig(), seed=0)
    for asked in job["write_references"]:
        write_references(references, asked["folder"], asked["kinds"], asked["dtypes"])
    with results.open("w", encoding="utf-8") as file:
        for number, cell in enumerate(job["cells"]):
            for line in _compare(cell, references):
                if parallel.is_main():
                    file.write(json.dumps(line | {"cell": number}) + "\n")
                    file.flush()
    parallel.finalize()


def _compare(cell: dict[str, Any], references: Path) -> list[dict[str, Any]]:
    layout = ParallelConfig(**cell["parallel"])
    parallel.lift_groups()
    parallel.lay_groups(layout, seed=0)
    folder, control = cell["folder"], cell["control"]
    processor = PromptProcessor(folder)
    model = ModelConfig(folder, freeze_vision=cell["freeze_vision"])
    policy = ours.build_policy(model, layout, PrecisionConfig(cell["dtype"]))
    hf_config = read_config(folder)
    family = family_of(hf_config)
    is_bit_for_bit = _exports_its_file(policy, folder, hf_config)
    shape = AttentionShape.of(hf_config.get_text_config())
    controls.change_policy(control, policy, folder, family, shape)
    lines = []
    for kind in cell["kinds"]:
        exact = Outcome.load(file_for(references, folder, kind, "float32"))
        with controls.change_code(control):
            found = ours.our_outcome(
                policy,
                make_samples(kind, processor),
                Packing.at(layout, cell["max_tokens"]),
                processor,
                (exact.old, exact.ref),
                lambda step: controls.change_step(control, step),
            )
        line: dict[str, Any] = {"kind": kind, "is_bit_for_bit": is_bit_for_bit}
        if cell["dtype"] == "float32":
            expected = _trained_only(exact, found, family)
            line["hugging_face"] = asdict(difference(found, expected))
            alone = file_for(references, folder, kind, "one process")
            if cell["keep"] and parallel.is_main():
                found.save(alone)
            elif not cell["keep"] and alone.exists():
                one = _trained_only(Outcome.load(alone), found, family)
                line["one_process"] = asdict(difference(found, one))
        else:
            theirs = Outcome.load(file_for(references, folder, kind, cell["dtype"]))
            line["error"] = mean_logprob_error(found, exact)
            line["hugging_face_error"] = mean_logprob_error(theirs, exact)
        lines.append(line)
    return lines


def _exports_its_file(policy: MegatronPolicy, folder: str, hf_config: Any) -> bool:
    """Hugging Face -> Megatron -> Hugging Face: every tensor of the files once, bit for bit.

    A policy in another dtype than its files rounds them once, as Hugging Face does. Left out is
    what follows from config.json: rotary tables, and the output layer of a tied model.
    """
    weights = HfWeights(folder)
    spelling = family_of(hf_config).spelling_of(weights.tensors)
    names = set()
    for name, tensor in policy.named_tensors():
        in_files = spelling.in_files(name)
        if in_files in names or not torch.equal(tensor.cpu(), weights[in_files].to(tensor.dtype)):
            return False
        names.add(in_files)
    others = [name for name in weights.tensors.keys() - names if not RECOMPUTED.fullmatch(name)]
    settle_ties(hf_config, weights.tensors, weights.are_equal)
    return all(hf_config.tie_word_embeddings and "lm_head." in name for name in others)


def _trained_only(theirs: Outcome, found: Outcome, family: Family) -> Outcome:
    """Leave out the gradients of a frozen vision tower, and of nothing else."""
    absent = theirs.gradients.keys() - found.gradients.keys()
    if all(name.startswith(family.vision_prefixes) for name in absent):
        kept = {name: g for name, g in theirs.gradients.items() if name not in absent}
        return replace(theirs, gradients=kept)
    return theirs
