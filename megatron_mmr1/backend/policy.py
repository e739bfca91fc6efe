"""The policy: a Megatron model that computes log-probs, takes training steps,
and exports its weights.

Owns the model, the optimizer and the reference weights. Knows no engine, no sampler and no files
but the Hugging Face folder that it starts from. Every Megatron call happens inside `device.seam()`.

Parallelism: data parallel. One all-reduce of the gradient buffer a step (a plain sum: see
backend.model).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import AutoConfig

from megatron_mmr1 import device
from megatron_mmr1.backend import losses, parallel
from megatron_mmr1.backend.model import Qwen25VL, transformer_config
from megatron_mmr1.backend.optimizer import build_optimizer
from megatron_mmr1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_mmr1.convert import FAMILIES, AttentionShape, megatron_to_hf, required_hf_names
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.convert.rules import merge, split
from megatron_mmr1.types import MicroBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MegatronPolicy:
    """Qwen2.5-VL under Megatron's data-parallel wrapper, schedule and optimizer.

    Args:
        num_steps: optimizer steps of the whole run, for the learning-rate schedule.
        keep_reference: keep a frozen copy of the starting weights for the KL term.

    Raises:
        ValueError: the folder's model type has no conversion table, or a tensor is missing.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel_config: ParallelConfig,
        optimizer: OptimizerConfig,
        num_steps: int,
        keep_reference: bool = False,
    ) -> None:
        hf_config: Any = AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
        if hf_config.model_type not in FAMILIES:
            raise ValueError(
                f"model.path={model.path!r} is a {hf_config.model_type!r} model; "
                f"known families: {', '.join(sorted(FAMILIES))}"
            )
        self._rules = FAMILIES[hf_config.model_type]
        text = hf_config.text_config
        self._shape = AttentionShape(
            text.num_attention_heads,
            text.num_key_value_heads,
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        )
        dtype = DTYPES[model.dtype]
        with device.seam():
            self.module = Qwen25VL(hf_config, transformer_config(hf_config, parallel_config, dtype))
            self.module.to(device.device())
            self._load_hf_weights(model.path)
            self.module.vision.requires_grad_(not model.freeze_vision)
            self.model = DistributedDataParallel(
                self.module.config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True),
                self.module,
            )
            self.optimizer, self.schedule = build_optimizer(optimizer, num_steps, self.model, dtype)
        self.module.config.no_sync_func = self.model.no_sync
        self.module.config.finalize_model_grads_func = _sum_gradients_over_ranks
        self._reference = (
            [p.detach().clone() for p in self.module.parameters()] if keep_reference else None
        )

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch], rule: losses.SoftmaxRule) -> list[Tensor]:
        """Return the response tokens' log-probs, fp32 [N, S] a micro-batch, without gradients."""
        with device.seam():
            return [
                losses.response_logprobs(self.module(batch), batch, rule)[0] for batch in batches
            ]

    def reference_logprobs(
        self, batches: Sequence[MicroBatch], rule: losses.SoftmaxRule
    ) -> list[Tensor]:
        """Return log-probs under the reference weights (the ones that the run started from)."""
        with self._reference_weights():
            return self.logprobs(batches, rule)

    def train_step(
        self, batches: Sequence[MicroBatch], loss_function: losses.LossFunction
    ) -> dict[str, float]:
        """Take one optimizer step on the sum of the micro-batches' losses over all ranks.

        Returns:
            The loss function's metrics (summed, or the largest, over micro-batches and ranks),
            `grad_norm` before clipping, and `lr`.
        """
        results: list[losses.LossResult] = []

        def forward(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple:
            batch = next(iterator)
            return model(batch), partial(apply_loss, batch=batch)

        def apply_loss(logits_RV: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict]:
            result = loss_function(logits_RV, batch)
            results.append(result)
            return result.loss, torch.ones((), dtype=torch.int, device=logits_RV.device), {}

        with device.seam():
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(batches),
                model=[self.model],
                num_microbatches=len(batches),
                seq_length=batches[0].token_ids_NS.shape[1],
                micro_batch_size=batches[0].token_ids_NS.shape[0],
            )
            lr = self.optimizer.param_groups[0]["lr"]
            outcome: Any = self.optimizer.step()
            _, grad_norm, _ = outcome
            self.schedule.step(1)
        mine = losses.total(results)
        metrics = parallel.sum_over_dp(mine.sums)
        metrics |= {name: parallel.max_over_dp(value) for name, value in mine.maxima.items()}
        return metrics | {"grad_norm": float(grad_norm), "lr": float(lr)}

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight under its Hugging Face name; the tensors share the model's memory."""
        named = ((name, p.detach()) for name, p in self.module.named_parameters())
        return megatron_to_hf(self._rules, named, self._shape)

    def _load_hf_weights(self, folder: str) -> None:
        weights = HfWeights(folder)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                rule, hf_names = required_hf_names(self._rules, name)
                tensors = [weights[n] for n in hf_names]
                for hf_name, tensor, ours in zip(
                    hf_names, tensors, split(rule.kind, parameter, self._shape), strict=True
                ):
                    if tensor.shape != ours.shape:
                        raise ValueError(
                            f"{folder}: {hf_name} is of shape {tuple(tensor.shape)}, but "
                            f"config.json describes {tuple(ours.shape)}"
                        )
                parameter.copy_(merge(rule.kind, tensors, self._shape))

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        assert self._reference is not None, "built without keep_reference"
        current = [p.detach().clone() for p in self.module.parameters()]
        self._copy_in(self._reference)
        try:
            yield
        finally:
            self._copy_in(current)

    @torch.no_grad()
    def _copy_in(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self.module.parameters(), tensors, strict=True):
            parameter.copy_(tensor)


def _sum_gradients_over_ranks(
    model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    """Reduce gradients as plain sums: the losses already carry the one global denominator."""
    finalize_model_grads(model, None, **kwargs)
