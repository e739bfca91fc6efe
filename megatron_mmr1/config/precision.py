"""What can be refused of `precision.*` before anything heavy is imported.

What only the machine knows, its GPU and a Transformer Engine that can be imported, is checked in
backend/precision.py, before a model is built. Together they make sure that FP8, where it is asked
for, is computed: Megatron-Core itself would train in full precision without a word.
"""

from __future__ import annotations

from importlib.util import find_spec

from megatron_mmr1.config.layout import ModelSizes
from megatron_mmr1.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig

DTYPES = ("float32", "bfloat16")
FP8 = ("off", "hybrid", "e4m3")
RECIPES = ("delayed", "tensorwise", "blockwise")
_FP8_SIDE = 16  # of a side of a matrix in FP8 products, in elements


def check_precision(config: PrecisionConfig, has_rollouts: bool = False) -> None:
    """Refuse values that are unknown, that contradict one another, or that need what is missing.

    Args:
        has_rollouts: False: `kv_cache` would have no effect.

    Raises:
        ValueError: names the key, its value and a remedy.
    """
    kv_caches = ("auto", "fp8")
    for key, known in (
        ("dtype", DTYPES), ("fp8", FP8), ("recipe", RECIPES), ("kv_cache", kv_caches)
    ):  # fmt: skip
        value = getattr(config, key)
        if value not in known:
            raise ValueError(f"precision.{key}={value!r} is unknown; use {' or '.join(known)}")
    if config.kv_cache != "auto" and not has_rollouts:
        raise ValueError(
            f"precision.kv_cache={config.kv_cache!r} is for rollouts, and there are none; use auto"
        )
    if config.fp8 == "off":
        for key in ("first_last_bf16", "fp8_params"):
            if getattr(config, key):
                raise ValueError(
                    f"precision.{key}=True has no effect with precision.fp8='off'; use false, or "
                    "precision.fp8=hybrid"
                )
        return
    if config.dtype != "bfloat16":
        raise ValueError(f"precision.fp8={config.fp8!r} needs precision.dtype=bfloat16")
    if config.first_last_bf16 and config.recipe == "delayed":
        raise ValueError(
            "precision.first_last_bf16=True with precision.recipe='delayed': delayed scaling takes "
            "all layers together; use recipe=tensorwise or recipe=blockwise, or "
            "first_last_bf16=false"
        )
    if config.fp8_params and config.recipe == "delayed":
        raise ValueError(
            "precision.fp8_params=True with precision.recipe='delayed': weights that are read in "
            "have no earlier products to be scaled by, and lose most of their bits; use "
            "recipe=tensorwise or recipe=blockwise, or fp8_params=false"
        )
    if find_spec("transformer_engine") is None:
        raise ValueError(
            f"precision.fp8={config.fp8!r} needs the module transformer_engine, which is not "
            "installed; use off, or install requirements-cuda.txt on a machine with a GPU"
        )


def check_fp8_sizes(config: PrecisionConfig, parallel: ParallelConfig, sizes: ModelSizes) -> None:
    """Refuse FP8 where a rank's part of the MLP is no multiple of 16 (Transformer Engine would).

    Raises:
        ValueError: names the sizes.
    """
    if config.fp8 == "off":
        return
    if sizes.num_experts:
        if sizes.expert_size % _FP8_SIDE:
            raise ValueError(
                f"precision.fp8={config.fp8!r} needs parts of {_FP8_SIDE}, and "
                f"moe_intermediate_size is {sizes.expert_size}; use off"
            )
        return
    part = sizes.intermediate_size // parallel.tp_size
    if part % _FP8_SIDE:
        raise ValueError(
            f"precision.fp8={config.fp8!r} needs parts of {_FP8_SIDE}, and intermediate_size="
            f"{sizes.intermediate_size} over parallel.tp_size={parallel.tp_size} is {part}; use "
            "off, or lower parallel.tp_size"
        )


def check_offload(
    optimizer: OptimizerConfig,
    precision: PrecisionConfig,
    resume: str,
    validation: str | None = None,
) -> None:
    """Refuse optimizer states on the CPU together with what Megatron's optimizer for it can't do.

    Args:
        validation: of a cold start, which then may have to go back to an earlier checkpoint.

    Raises:
        ValueError: names the keys, their values and a remedy.
    """
    if optimizer.cpu_offload == 0:
        return
    asked = f"optimizer.cpu_offload={optimizer.cpu_offload!r}"
    if precision.fp8_params:
        raise ValueError(
            f"{asked} with precision.fp8_params=True: the optimizer that steps on the CPU takes no "
            "weights in FP8; use fp8_params=false, or cpu_offload=0"
        )
    if resume == "auto":
        raise ValueError(
            f"{asked} with resume='auto': loading its states has not been shown to be exact; use "
            "cpu_offload=0 to go on from a checkpoint, or resume=never"
        )
    if validation is not None:
        raise ValueError(
            f"{asked} with validation={validation!r}: the best weights come from a checkpoint, and "
            "loading these states has not been shown to be exact; use validation=null, or "
            "cpu_offload=0"
        )
