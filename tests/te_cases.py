"""`make te-check`: Transformer Engine's real modules, built at published sizes in every layout that
we use, held against the local layers and against Hugging Face. Prints a table; exit status 1 if a
check or a negative control fails. Runs in .venv-te, without a GPU (te_machine.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import te_checks as checks
import te_controls
import te_parts
from megatron.core import parallel_state
from omegaconf import OmegaConf
from published import PUBLISHED, config_of, tensors_of_hugging_face
from te_machine import num_ranks, played_rank
from te_values import check_values

from megatron_mmr1.cli import CONF_DIR
from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig


def _presets(group: str, schema: type) -> dict[str, Any]:
    """Read every preset of hydra_conf/`group`/, so that none is changed or added without checks."""
    files = sorted((CONF_DIR / group).glob("*.yaml"))
    return {file.stem: schema(**dict(OmegaConf.load(file))) for file in files}


# Presets by their names, then what none of them has.
LAYOUTS = {
    **_presets("parallel", ParallelConfig),
    "PP2": ParallelConfig(pp_size=2),
    "PP2 VPP2": ParallelConfig(pp_size=2, vpp_size=2),
    "CP2": ParallelConfig(cp_size=2),
    "TP2 PP2 CP2 SP": ParallelConfig(tp_size=2, pp_size=2, cp_size=2, sequence_parallel=True),
}
EXPERT_LAYOUTS = {
    "tp1": LAYOUTS["tp1"],
    "EP2": ParallelConfig(ep_size=2),
    "TP2 EP2 SP": ParallelConfig(tp_size=2, ep_size=2, sequence_parallel=True),
    "PP2 EP8": ParallelConfig(pp_size=2, ep_size=8),
}
EXPERTS = "Qwen3-30B-A3B"
MODELS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen3-8B", EXPERTS)
# As far as they are FP8; te_values builds the layers in bfloat16.
PRECISIONS = [
    *(p for p in _presets("precision", PrecisionConfig).values() if p.fp8 != "off"),
    PrecisionConfig("bfloat16", "hybrid", "tensorwise", fp8_params=True),
    PrecisionConfig("bfloat16", "e4m3", "blockwise", first_last_bf16=True, fp8_params=True),
]


def main() -> None:
    """Run everything; the table's rows are printed as they are done."""
    num_faults = 0
    print("| what | layout | ranks | parameters | outcome |\n|---|---|---|---|---|")
    for model in MODELS:
        hf_config = config_of(PUBLISHED[model])
        if model == EXPERTS:
            hf_config.num_hidden_layers = 4  # of 48, of 128 experts each
        for name, layout in (EXPERT_LAYOUTS if model == EXPERTS else LAYOUTS).items():
            if hf_config.get_text_config().num_attention_heads % layout.tp_size == 0:
                case = _layout_case(hf_config, layout)
                num_faults += _row(model, name, num_ranks(layout), case)
    for name, layout in {**LAYOUTS, **EXPERT_LAYOUTS}.items():
        if layout.tp_size > 4 or layout.ep_size > 4:
            continue  # the tiny models have four heads and four experts
        kind = "qwen3_moe" if layout.ep_size > 1 else "qwen2_5_vl"
        case = lambda layout=layout, kind=kind: check_values(kind, layout)  # noqa: E731
        num_faults += _row(f"values: tiny {kind}", name, num_ranks(layout), case)
    for name, part in te_parts.PARTS.items():
        num_faults += _row(f"part: {name}", "", 1, part)
    for name, (control, words) in te_controls.CONTROLS.items():
        case = lambda control=control, words=words: _noticed(control, words)  # noqa: E731
        num_faults += _row(f"control: {name}", "", 1, case)
    print(f"\n{num_faults} faults" if num_faults else "\nall as expected")
    sys.exit(1 if num_faults else 0)


def _layout_case(hf_config: Any, layout: ParallelConfig) -> Callable[[], str]:
    """Build the model on every rank that differs, in every format."""

    def case() -> str:
        found: dict[str, tuple[int, ...]] = {}
        for rank in range(num_ranks(layout)):
            with played_rank(layout, rank):
                if 0 < parallel_state.get_tensor_model_parallel_rank() < layout.tp_size - 1:
                    continue  # as its neighbours
                if 0 < parallel_state.get_context_parallel_rank() < layout.cp_size - 1:
                    continue  # all of them hold the same
                ep_rank = parallel_state.get_expert_model_parallel_rank()
                local = checks.build(hf_config, layout, PRECISIONS[0], is_local=True)
                local_pieces = list(checks.pieces_of(local, hf_config, layout, ep_rank))
                local_keys = checks.checkpoint_keys(local)
                for precision in PRECISIONS if rank == 0 else PRECISIONS[:1]:
                    stages = checks.build(hf_config, layout, precision)
                    checks.check_config(stages, precision)
                    checks.check_classes(stages)
                    pieces = list(checks.pieces_of(stages, hf_config, layout, ep_rank))
                    checks.check_against_local(pieces, local_pieces)
                    checks.check_keys(checks.checkpoint_keys(stages), local_keys)
                for piece in pieces:
                    found |= piece.hf_shapes
        checks.check_against_hf(found, tensors_of_hugging_face(hf_config))
        return str(len(found))

    return case


def _row(what: str, layout: str, ranks: int, case: Callable[[], str]) -> int:
    start = time.perf_counter()
    try:
        detail, outcome = case(), "ok"
    except (AssertionError, ValueError, RuntimeError, AttributeError) as fault:
        detail, outcome = "", f"FAULT: {' '.join(str(fault).split())[:300]}"
    seconds = time.perf_counter() - start
    print(f"| {what} | {layout} | {ranks} | {detail} | {outcome} ({seconds:.0f} s) |", flush=True)
    return outcome != "ok"


def _noticed(control: Callable[[], None], words: str) -> str:
    """A mistake must fail its check, and say so in these words."""
    try:
        te_controls.run(control)
    except (AssertionError, ValueError) as fault:
        assert words in str(fault), f"noticed as something else: {fault}"
        return "noticed"
    raise AssertionError("not noticed")


if __name__ == "__main__":
    main()
