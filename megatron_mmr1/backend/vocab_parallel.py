"""Log-probabilities over a vocabulary that is cut over tensor-parallel ranks.

Equals `algorithms.grpo_loss.selective_logprobs` on the whole vocabulary, forward and backward
(tests/test_vocab_parallel.py). Four small all-reduces in place of gathering the logits.

R response tokens, V vocabulary; `local_` is this rank's part of V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_mmr1.backend import parallel


def selective_logprobs(
    local_logits_RV: Tensor,
    target_ids_R: Tensor,
    temperature: float,
    banned_token_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy, in nats; both carry gradients.

    Args:
        local_logits_RV: the columns of this tensor-parallel rank, equally many on each, in order;
            a column that stands for no token holds -inf. float64 is kept, else float32 results.
        target_ids_R: int64, global token ids.
        temperature: > 0.
        banned_token_ids: global ids that leave the softmax.

    Parallelism: results are the same on every tensor-parallel rank. A gradient of the result must
    be, too; each rank then gets its own columns' gradient.
    """
    tp_group = parallel.tp_group()
    num_local = local_logits_RV.shape[-1]
    first = tp_group.rank() * num_local
    dtype = torch.float64 if local_logits_RV.dtype == torch.float64 else torch.float32
    scaled_RV = local_logits_RV.to(dtype) / temperature
    banned = [i - first for i in banned_token_ids if first <= i < first + num_local]
    if banned:
        index = torch.tensor(banned, device=scaled_RV.device)
        scaled_RV = scaled_RV.index_fill(-1, index, -torch.inf)

    highest_R = scaled_RV.detach().amax(dim=-1)
    dist.all_reduce(highest_R, dist.ReduceOp.MAX, group=tp_group)
    total_R = (scaled_RV - highest_R.unsqueeze(-1)).exp().sum(dim=-1)
    log_total_R = reduce_from_tensor_model_parallel_region(total_R).log() + highest_R

    local_ids_R = target_ids_R - first
    is_here_R = (local_ids_R >= 0) & (local_ids_R < num_local)
    column_R1 = torch.where(is_here_R, local_ids_R, 0).unsqueeze(-1)
    target_R = torch.where(is_here_R, scaled_RV.gather(-1, column_R1).squeeze(-1), 0.0)
    logprobs_R = reduce_from_tensor_model_parallel_region(target_R) - log_total_R

    # Every rank's part of the sum depends on the same total: its gradients must be added up.
    all_logprobs_RV = scaled_RV - copy_to_tensor_model_parallel_region(log_total_R).unsqueeze(-1)
    finite_RV = all_logprobs_RV.masked_fill(scaled_RV == -torch.inf, 0.0)
    plogp_R = (all_logprobs_RV.exp() * finite_RV).sum(dim=-1)
    entropy_R = -reduce_from_tensor_model_parallel_region(plogp_R)
    return logprobs_R, entropy_R
