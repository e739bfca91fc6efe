"""TRL's GRPO loss on given tensors: python trl_loss.py CASES RESULTS (files of torch.save).

In a process of its own: importing TRL takes 18 seconds (a third of it vLLM), changes the
environment and warns. The loss is `GRPOTrainer._compute_loss` itself, called without a trainer,
which would need a model: `_trainer` is nothing but the attributes that it reads, on one process
without gradient accumulation.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

# What TRL's own configuration has for a setting that a case doesn't name.
_DEFAULTS = {
    "loss_type": "bnpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "beta": 0.0,
    "entropy_coef": 0.0,
    "use_vllm": False,
    "max_completion_length": 256,
}


def main(cases_path: str, results_path: str) -> None:
    """Write the loss, its gradients and TRL's metrics of each case."""
    torch.save([_result(**case) for case in torch.load(cases_path)], results_path)


def _result(settings: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """`inputs` are padded [N, L]; "logprobs" and "entropies" stand for the model's output."""
    logprobs = inputs["logprobs"].requires_grad_()
    entropies = inputs["entropies"].requires_grad_()
    trainer = _trainer(logprobs, entropies, **_DEFAULTS | settings)
    tokens = torch.zeros(logprobs.shape, dtype=torch.long)
    prompts = {name: torch.zeros(len(tokens), 1) for name in ("prompt_ids", "prompt_mask")}
    loss = GRPOTrainer._compute_loss(
        trainer, trainer.model, {"completion_ids": tokens, **prompts, **inputs}
    )
    d_logprobs, d_entropies = torch.autograd.grad(
        loss, (logprobs, entropies), materialize_grads=True
    )
    return {
        "loss": loss.detach(),
        "d_logprobs": d_logprobs,
        "d_entropies": d_entropies,
        "metrics": {name: values[0] for name, values in trainer._metrics["train"].items()},
    }


def _trainer(logprobs: Tensor, entropies: Tensor, **settings: Any) -> Any:
    return SimpleNamespace(
        **settings,
        args=SimpleNamespace(delta=settings["delta"], use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=settings["entropy_coef"] != 0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            gather=lambda tensor: tensor,
            reduce=lambda tensor, reduction: tensor,
            sync_gradients=True,
        ),
        _metrics={"train": defaultdict(list)},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
