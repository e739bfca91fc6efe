"""The output layer and the loss in one, chunk by chunk: hidden states in, gradients out.

The logits of one chunk of response rows exist at a time, and become their own gradient in place;
the gradients by hidden states and weight follow at once. Three products a row (logits, d hidden, d
weight) where recomputing logits in the backward pass takes four. With ratio "sequence" a row's
gradient depends on log-probs of other chunks: there the logits are made twice.

R response tokens (rows), V vocabulary, D hidden; `local_` is a tensor-parallel rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import closed_form, contract
from megatron_mmr1.kernels.contract import Form, Given, TokenGrpo, Vocabulary
from megatron_mmr1.types import ResponseRows

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # of a chunk's logits


def form_of(kernels: str, device: torch.device) -> Form:
    """Return the form of the kernels that a setting and a device ask for.

    Args:
        kernels: "auto" (Triton on a GPU, else torch), "triton" or "torch".

    Raises:
        ValueError: "triton" where Triton cannot run, or an unknown name.
    """
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f"model.kernels={kernels!r} is unknown; use auto, triton or torch")
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return closed_form
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"model.kernels='triton' needs a GPU, and tensors are on {device}; use auto or torch"
        )
    from megatron_mmr1.kernels import triton_form

    return triton_form


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The output layer of a rank, and how its vocabulary is sampled from.

    Attributes:
        local_weight: [V / tp_size, D]; its gradient is added to `main_grad` where it has one
            (Megatron's data-parallel buffers), else returned to autograd.
        vocabulary: the columns of this rank.
        kernels: see `form_of`.
    """

    local_weight: Tensor
    vocabulary: Vocabulary
    kernels: str = "auto"

    @torch.no_grad()
    def logprobs(
        self, hidden_RD: Tensor, targets_R: Tensor, needs_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs and entropies [R] of the targets, in nats; no gradient.

        Parallelism: the same on every tensor-parallel rank; one small all-gather a chunk.
        """
        form = form_of(self.kernels, hidden_RD.device)
        parts = [
            form.logprobs_(logits, targets_R[part], self.vocabulary, needs_entropy)
            for part, logits in self._chunks(hidden_RD)
        ]
        return _joined(parts, hidden_RD, needs_entropy)

    def grpo_loss(
        self, hidden_RD: Tensor, rows: ResponseRows, config: AlgorithmConfig
    ) -> tuple[Tensor, Tensor]:
        """Return GRPO's loss with gradient, and the metrics `contract.SUMS`, float32.

        Ratio "token" only; for "sequence" see `logprobs` and `given_loss`.

        Parallelism: hidden states and rows are the same on every tensor-parallel rank, and so are
        the results. One small all-gather a chunk, and one all-reduce of d hidden.
        """
        form = form_of(self.kernels, hidden_RD.device)
        upstream = TokenGrpo(rows, rows.sequence_R, config)
        found = self._with_gradients(hidden_RD, rows.target_ids_R, upstream)
        assert found.entropy_R is not None
        sums = form.sequence_loss(found.logprobs_R, found.entropy_R, rows, config).sums
        return _attach(hidden_RD, self.local_weight, sums[0], found), sums

    def given_loss(
        self, hidden_RD: Tensor, targets_R: Tensor, loss: Tensor | None, upstream: Given
    ) -> tuple[Tensor, Tensor]:
        """Return a loss whose gradients by log-probs and entropies are given; and log-probs [R].

        Args:
            loss: its value; None = sum(d_logprobs * logprobs), right for a loss linear in them.
        """
        found = self._with_gradients(hidden_RD, targets_R, upstream)
        if loss is None:
            used_R = upstream.d_logprobs_R != 0
            loss = torch.where(used_R, upstream.d_logprobs_R * found.logprobs_R, 0.0).sum()
        return _attach(hidden_RD, self.local_weight, loss, found), found.logprobs_R

    @torch.no_grad()
    def _with_gradients(
        self, hidden_RD: Tensor, targets_R: Tensor, upstream: Given | TokenGrpo
    ) -> _Found:
        form, weight = form_of(self.kernels, hidden_RD.device), self.local_weight
        d_hidden_RD = torch.empty_like(hidden_RD)
        main_grad = getattr(weight, "main_grad", None) if weight.requires_grad else None
        d_weight = main_grad
        if weight.requires_grad and main_grad is None:
            d_weight = torch.zeros_like(weight)
        parts = []
        for part, logits in self._chunks(hidden_RD):
            parts.append(
                form.loss_gradient_(logits, targets_R[part], self.vocabulary, upstream.take(part))
            )
            torch.mm(logits, weight, out=d_hidden_RD[part])
            if d_weight is not None:
                _add_product_(d_weight, logits.t(), hidden_RD[part])
        if self.vocabulary.tp_group is not None:
            dist.all_reduce(d_hidden_RD, group=self.vocabulary.tp_group)
        needs_entropy = isinstance(upstream, TokenGrpo) or upstream.d_entropy_R is not None
        logprobs_R, entropy_R = _joined(parts, hidden_RD, needs_entropy)
        is_returned = main_grad is None
        return _Found(logprobs_R, entropy_R, d_hidden_RD, d_weight if is_returned else None)

    def _chunks(self, hidden_RD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of rows and their local logits, each in the same memory."""
        num_rows, num_columns = len(hidden_RD), len(self.local_weight)
        if not num_rows:
            return
        row_bytes = num_columns * hidden_RD.element_size()
        budget = CHUNK_BYTES["cuda" if hidden_RD.is_cuda else "cpu"]
        chunk = min(num_rows, max(16, budget // row_bytes // 16 * 16))
        buffer = contract.padded_logits(chunk, num_columns, hidden_RD)
        for start in range(0, num_rows, chunk):
            part = slice(start, min(start + chunk, num_rows))
            logits = buffer[: part.stop - start]
            torch.mm(hidden_RD[part], self.local_weight.t(), out=logits)
            yield part, logits


@dataclass(frozen=True, slots=True)
class _Found:
    """What one pass over the chunks leaves; `d_weight` None when it went to `main_grad`."""

    logprobs_R: Tensor
    entropy_R: Tensor | None
    d_hidden_RD: Tensor
    d_weight: Tensor | None


def _joined(
    parts: list[tuple[Tensor, Tensor | None]], like: Tensor, has_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Put the chunks' vectors end to end; there may be no chunk."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    empty = like.new_empty(0, dtype=dtype)
    logprobs = [empty, *(logprobs_R for logprobs_R, _ in parts)]
    entropies = [empty, *(entropy_R for _, entropy_R in parts if entropy_R is not None)]
    return torch.cat(logprobs), torch.cat(entropies) if has_entropy else None


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _attach(hidden_RD: Tensor, weight: Tensor, loss: Tensor, found: _Found) -> Tensor:
    """Return the loss as a node of autograd's graph whose gradients are already known."""
    is_in_main_grad = weight.requires_grad and found.d_weight is None
    if found.d_weight is None:
        weight = weight.detach()
    return _KnownGradients.apply(
        hidden_RD, weight, loss, found.d_hidden_RD, found.d_weight, is_in_main_grad
    )


class _KnownGradients(torch.autograd.Function):
    """Gradients that were made with the loss, times the gradient that comes back to it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight: Tensor,
        loss: Tensor,
        d_hidden_RD: Tensor,
        d_weight: Tensor | None,
        is_in_main_grad: bool,
    ) -> Tensor:
        ctx.known = d_hidden_RD, d_weight, is_in_main_grad
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        d_hidden_RD, d_weight, is_in_main_grad = ctx.known
        ctx.known = None
        if is_in_main_grad:
            torch._assert_async(gradient == 1)  # for the weight, only a factor of 1 can be right
        if d_weight is not None:
            d_weight.mul_(gradient)
        return d_hidden_RD.mul_(gradient), d_weight, None, None, None, None
