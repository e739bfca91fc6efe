"""Megatron's distributed AdamW and learning-rate schedule, built from our OptimizerConfig."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mmr1.config.schema import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig,
    num_steps: int,
    model: list[Any],
    dtype: torch.dtype,
    fp8_recipe: str | None = None,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build AdamW over the trainable parameters and its schedule over `num_steps` optimizer steps.

    Weight decay leaves out biases and norm weights, as Megatron does by default. In bfloat16 the
    optimizer keeps fp32 master weights.
    """
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            clip_grad=config.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            fp8_recipe=fp8_recipe,
            **_offload_settings(config.cpu_offload),
        ),
        model,
    )
    _make_adam_state(optimizer)
    num_warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=num_warmup_steps,
        lr_decay_steps=max(num_steps, num_warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
    return optimizer, schedule


def _offload_settings(share: float) -> dict[str, Any]:
    """Return what keeps a share of the float32 weights and moments on the CPU, stepped there.

    Megatron's optimizer for it keeps the float32 weights itself, which it does only where it is
    told that moments may have a dtype of their own ("precision aware"); ours stay float32.
    """
    if share == 0:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": share,
        "use_precision_aware_optimizer": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def write_weights(optimizer: Any, model: list[Any]) -> None:
    """Write the optimizer's float32 weights into the model's, in its format, as a step does.

    Parallelism: each data-parallel rank has its share; they are gathered.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._copy_main_params_to_model_params()
    for chunk in model:
        chunk.start_param_sync()


def _make_adam_state(optimizer: Any) -> None:
    """Give torch's AdamW the state that its first step would make.

    The distributed optimizer takes its step count from the parameters' states: without any it could
    be neither saved nor loaded before the first step. Transformer Engine's FusedAdam keeps the
    count elsewhere.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
