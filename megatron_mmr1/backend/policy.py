"""The policy: a Megatron model that computes log-probs, takes training steps,
and exports its weights.

Owns the model chunks of this rank, the optimizer and the reference weights. Knows no engine, no
sampler and no files but the Hugging Face folder that it starts from. Every Megatron call happens
inside `device.seam()`.

Parallelism: tensor, sequence, pipeline (also interleaved), context, expert and data parallel with
the distributed optimizer. A step's micro-batches are the same on all ranks of a replica; gradients
are plain sums over data- and context-parallel ranks (see backend.model).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mmr1 import device
from megatron_mmr1.backend import adam, losses, parallel
from megatron_mmr1.backend.clock import StepClock
from megatron_mmr1.backend.cost import StepCost
from megatron_mmr1.backend.layout import LocalView, local_view
from megatron_mmr1.backend.model import PolicyStage, transformer_config
from megatron_mmr1.backend.optimizer import build_optimizer, write_weights
from megatron_mmr1.backend.parking import ParkedState
from megatron_mmr1.backend.precision import check_machine
from megatron_mmr1.backend.rotary import max_positions
from megatron_mmr1.backend.vision import StepFeatures
from megatron_mmr1.backend.weights import NamedWeights
from megatron_mmr1.config.schema import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
)
from megatron_mmr1.convert import AttentionShape, family_of, read_config, settle_ties
from megatron_mmr1.convert.hf_files import HfWeights
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.kernels.head import form_of
from megatron_mmr1.types import PackedBatch, StepBatch

_FLOAT32 = PrecisionConfig()
_OnHidden = Callable[[Tensor, LocalView], tuple[Tensor, Tensor, Any]]


class MegatronPolicy:
    """A model under Megatron's data-parallel wrapper, schedule and optimizer.

    Args:
        num_steps: optimizer steps of the whole run, for the learning-rate schedule.
        keep_reference: keep a frozen copy of the starting weights for the KL term.
        steps_per_batch: optimizer steps whose log-probs are frozen before the first of them: of so
            many, a frozen tower's features are kept.

    Attributes:
        adam: whose optimizer it is.
        chunks: this rank's model chunks (one without interleaving), unwrapped.
        cost: what samples cost in FLOPs, to balance them.
        clock: how long the parts of the train steps and log-prob passes took.

    Raises:
        ValueError: the folder's model type has no conversion table, or a tensor is missing;
            model.kernels asks for Triton without a GPU, or precision.fp8 for what this machine
            does not compute.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel_config: ParallelConfig,
        optimizer: OptimizerConfig,
        num_steps: int,
        keep_reference: bool = False,
        steps_per_batch: int = 1,
        precision: PrecisionConfig = _FLOAT32,
    ) -> None:
        hf_config, files = read_config(model.path), HfWeights(model.path)
        settle_ties(hf_config, files.tensors, files.are_equal)
        family = family_of(hf_config)
        text = hf_config.get_text_config()
        vision = getattr(hf_config, "vision_config", None)
        self.cost = StepCost.of(text, vision, not model.freeze_vision)
        self.clock = StepClock()
        full = parallel_config.recompute == "full"
        self._recomputes_vision = full or parallel_config.recompute_vision
        self._kernels = model.kernels
        self._keeps_fp8 = precision.fp8_params
        form_of(model.kernels, device.device())
        self._max_positions = max_positions(text)
        is_interleaved = parallel_config.vpp_size > 1
        check_machine(precision)
        self.adam = adam.find(optimizer)
        if self.adam.fuses_accumulation:
            adam.let_output_layer_be_built()
        with device.seam():
            config = transformer_config(
                hf_config, parallel_config, precision, self.adam.fuses_accumulation
            )
            # Autograd hooks that the garbage collector can't see keep the config. It must hold the
            # policy weakly: else each policy, and its process groups' threads, lives as long as the
            # process.
            finalize: Any = weakref.WeakMethod(self._finalize_gradients)
            config.finalize_model_grads_func = lambda *args, **kwargs: finalize()(*args, **kwargs)
            config.timers = self.clock.of_schedule
            stages = range(parallel_config.vpp_size) if is_interleaved else [None]
            self.chunks = [PolicyStage(hf_config, config, stage) for stage in stages]
            for chunk in self.chunks:
                chunk.to(device.device())
            self._weights = NamedWeights(
                self.chunks,
                family,
                AttentionShape.of(text),
                text.vocab_size,
                getattr(text, "num_experts", None) or 0,
            )
            self._weights.load(files)
            self._tower: Any = getattr(self.chunks[0], "vision", None)
            self._trains_vision = not model.freeze_vision
            if self._tower is not None:
                self._tower.requires_grad_(self._trains_vision)
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                fp8_param_gather=precision.fp8_params,
            )
            self.model: list[Any] = [
                DistributedDataParallel(config, ddp_config, chunk) for chunk in self.chunks
            ]
            self.optimizer, self.schedule = build_optimizer(
                optimizer,
                num_steps,
                self.model,
                config.params_dtype,
                None if precision.fp8 == "off" else precision.recipe,
            )
        self._state = ParkedState(self.model, self.optimizer)
        self._features: StepFeatures | None = None
        self._steps_per_batch = steps_per_batch
        self._frozen_features: list[tuple[object, StepFeatures]] = []
        self._reference = (
            [p.detach().clone() for p in self._parameters()] if keep_reference else None
        )

    @torch.no_grad()
    def logprobs(self, step: StepBatch, rule: SoftmaxRule) -> list[Tensor]:
        """Return the response tokens' log-probs, fp32 [R] a micro-batch, on every rank alike."""
        parts: list[Tensor] = []

        def read(hidden_RD: Tensor, view: LocalView) -> tuple[Tensor, Tensor, Any]:
            # Forward passes run in the order of the micro-batches on the last stage.
            batch = step.micro_batches[len(parts)]
            whole_R = torch.zeros(len(batch.predicts_R), device=hidden_RD.device)
            head = self.chunks[-1].output_head(rule, self._kernels)
            whole_R[view.row_index_R] = head.logprobs(hidden_RD, view.rows.target_ids_R)[0]
            parts.append(whole_R)
            return hidden_RD.new_zeros(()), _no_tokens(hidden_RD), {}

        with device.seam(), self.clock.part("logprobs", is_whole=True):
            self._features = self._encode(step, trains=False)
            self._run(step, read, forward_only=True)
        sizes = [len(batch.predicts_R) for batch in step.micro_batches]
        whole = torch.cat(parts) if parts else torch.zeros(sum(sizes), device=device.device())
        return list(parallel.from_context_and_last_stage(whole).split(sizes))

    def reference_logprobs(self, step: StepBatch, rule: SoftmaxRule) -> list[Tensor]:
        """Return log-probs under the reference weights (the ones that the run started from)."""
        with self._reference_weights():
            return self.logprobs(step, rule)

    def train_step(
        self, step: StepBatch, loss_function: losses.LossFunction, rule: SoftmaxRule
    ) -> dict[str, float]:
        """Take one optimizer step on the sum of the micro-batches' losses over all ranks.

        Returns:
            The loss function's metrics (summed, or the largest, over micro-batches and ranks),
            `grad_norm` before clipping, and `lr`; the same on every rank.
        """
        assert not self._state.is_parked, "stepped aside: come_back comes first"
        results: list[losses.LossResult] = []

        def learn(hidden_RD: Tensor, view: LocalView) -> tuple[Tensor, Tensor, Any]:
            with self.clock.part("head"):
                head = self.chunks[-1].output_head(rule, self._kernels)
                result = loss_function(hidden_RD, head, view)
            results.append(result)
            return result.loss, _no_tokens(hidden_RD), {}

        with device.seam():
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            self._features = self._encode(step, trains=True)
            self._run(step, learn, forward_only=False)
            lr = self.optimizer.param_groups[0]["lr"]
            with self.clock.part("optimizer"):
                outcome: Any = self.optimizer.step()
            _, grad_norm, _ = outcome
            self.schedule.step(1)
        metrics = parallel.reduce_metrics(*losses.total(results))
        metrics |= {"grad_norm": float(grad_norm), "lr": float(lr)}
        self.clock.settle()
        return metrics

    def step_aside(self) -> int:
        """Make room for an engine: gradients are freed, optimizer states go to host memory.

        Weights stay: they can be exported. Nothing else is possible before `come_back`.

        Returns:
            Bytes of the training device that are free now.
        """
        self._frozen_features = None
        return self._state.park()

    def come_back(self) -> None:
        """Undo `step_aside`; nothing was lost."""
        self._state.unpark()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every whole weight under its Hugging Face name, on every rank.

        Collective over the replica: all its ranks must iterate to the end.
        """
        return self._weights.export()

    @property
    def num_bytes_received(self) -> int:
        """What this rank received from others in its last complete export of weights."""
        return self._weights.num_bytes_received

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the last train step's gradients, float32, as `named_tensors` yields weights.

        Each rank of the distributed optimizer keeps its share of the summed gradients: gathered
        here, for tests and for the parity check.
        """
        with device.seam():
            for chunk in self.model:
                for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                    for bucket in buffer.buckets:
                        shares = bucket.grad_data.chunk(buffer.data_parallel_group.size())
                        mine = shares[buffer.data_parallel_group.rank()].clone()
                        dist.all_gather_into_tensor(
                            bucket.grad_data, mine, group=buffer.data_parallel_group
                        )
        return self._weights.export("gradients", lambda p: p.main_grad if p.requires_grad else None)

    def _run(self, step: StepBatch, on_hidden: _OnHidden, *, forward_only: bool) -> None:
        """Send the step's micro-batches through Megatron's schedule for this layout."""

        def forward(iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple:
            view = local_view(next(iterator))
            features = self._features.features_MD if self._features else None
            return model(view, features), lambda hidden_RD: on_hidden(hidden_RD, view)

        batches = step.micro_batches
        if self._max_positions is not None:
            _check_positions(batches, self._max_positions)
        iterators = [iter(batches) for _ in self.model]
        with self.clock.part("pipeline"):
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.model,
                num_microbatches=len(batches),
                seq_length=len(batches[0].token_ids_T),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        self._features = None

    def _encode(self, step: StepBatch, *, trains: bool) -> StepFeatures | None:
        """Encode the step's images, on the first stage; a frozen tower once for all passes."""
        if self._tower is None:
            return None
        with self.clock.part("vision"):
            if self._trains_vision:
                return StepFeatures(
                    self._tower, step.images, trains=trains, recomputes=self._recomputes_vision
                )
            for images, features in self._frozen_features:
                if images is step.images:
                    return features
            features = StepFeatures(self._tower, step.images, trains=False, recomputes=False)
            self._frozen_features.append((step.images, features))
            del self._frozen_features[: -self._steps_per_batch]
            return features

    def _finalize_gradients(
        self, model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Send the image features' gradients through the tower, then add up over ranks.

        Plain sums: the losses already carry the one global denominator.
        """
        if self._features is not None:
            with self.clock.part("vision"):
                self._features.backward()
        with self.clock.part("gradient_sync"):
            finalize_model_grads(model, None, **kwargs)

    def follow_optimizer(self) -> None:
        """Make weights that are kept in FP8 of the optimizer's float32 ones, as its step does.

        Those of a checkpoint have been rounded, and so have those that were put aside and back:
        rounded once more, they might be others. In other formats nothing is rounded twice.

        Parallelism: gathers the weights over data-parallel ranks.
        """
        if self._keeps_fp8:
            with device.seam():
                write_weights(self.optimizer, self.model)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        assert self._reference is not None, "built without keep_reference"
        current = [p.detach().clone() for p in self._parameters()]
        self._copy_in(self._reference)
        try:
            yield
        finally:
            self._copy_in(current)
            self.follow_optimizer()

    @torch.no_grad()
    def _copy_in(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters(), tensors, strict=True):
            parameter.copy_(tensor)


def _check_positions(batches: Sequence[PackedBatch], limit: int) -> None:
    found = max(int(batch.position_ids_3T.max()) for batch in batches) + 1
    if found > limit:
        raise ValueError(
            f"a sequence of {found} positions: beyond max_position_embeddings={limit} the model's "
            "rotary wavelengths (rope_type='dynamic') depend on the length, which is not "
            "supported; leave out longer prompts"
        )


def _no_tokens(like: Tensor) -> Tensor:
    """The token count that Megatron asks for; nothing divides by it."""
    return torch.ones((), dtype=torch.int, device=like.device)
