"""What an evaluation takes for a setting that was not given: by benchmark, and from the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mmr1.config.schema import EvaluateConfig

# Folder names that say nothing of the model: its parent's does.
_GENERIC = ("hf", "megatron", "checkpoints", "model")


@dataclass(frozen=True, slots=True)
class Usual:
    """What one benchmark usually takes.

    Attributes:
        source: its public data set, for messages; nothing is fetched unless asked for.
        max_response_tokens: the length of a response at which it is cut off.
        data: of the embedded task alone.
    """

    source: str
    max_response_tokens: int = 4096  # as in training (paper, Table 6)
    data: str | None = None


USUAL = {
    "digits": Usual("", 32, "data/digits/heldout.parquet"),
    "mathverse": Usual("AI4Math/MathVerse:testmini"),
    "mathvista": Usual("AI4Math/MathVista:testmini"),
    "mathvision": Usual("MathLLMs/MathVision:test"),
    "logicvista": Usual("a LogicVista dataset.json beside its images"),
    "chartqa": Usual("lmms-lab/ChartQA:test"),
}


def settled(config: EvaluateConfig) -> EvaluateConfig:
    """Fill in data, response length and name where the user gave none.

    Raises:
        ValueError: an unknown benchmark, or one whose data only the user can name.
    """
    if config.benchmark not in USUAL:
        raise ValueError(f"benchmark={config.benchmark!r} is unknown; use {' or '.join(USUAL)}")
    usual = USUAL[config.benchmark]
    if config.data is None and usual.data is None:
        raise ValueError(
            f"data=None names no questions of benchmark={config.benchmark}; add data=FILE, or a "
            f"hub id as OWNER/NAME:SPLIT ({usual.source})"
        )
    length = config.rollout.max_response_tokens or usual.max_response_tokens
    return replace(
        config,
        data=config.data or usual.data,
        name=config.name or name_of(config.model),
        rollout=replace(config.rollout, max_response_tokens=length),
    )


def name_of(model: str) -> str:
    """Return a name for tables: the model folder's own, or with its parents' where it says little.

    RUN/hf is RUN, RUN/checkpoints/step_20 is RUN-step_20.
    """
    parts = [part for part in Path(model).resolve().parts if part not in _GENERIC]
    last = parts[-1]
    if last.startswith("step_") and len(parts) > 2:
        return f"{parts[-2]}-{last}"
    return last.lstrip(".") or "model"
