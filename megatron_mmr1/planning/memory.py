"""Memory of a rank in every phase of a step: what is counted, what is estimated, what binds.

Weights, gradients, optimizer states and the reference copy are counted on the real Megatron model
without memory (backend/footprint.py). Activations and the engine are estimates by formula, and
nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_mmr1.backend.footprint import Footprint, footprint, stage_ranks
from megatron_mmr1.backend.model import DTYPES
from megatron_mmr1.backend.vision import CHUNK_PATCHES
from megatron_mmr1.config.layout import replica_size
from megatron_mmr1.config.schema import GrpoConfig, ParallelConfig, SftConfig
from megatron_mmr1.kernels.head import CHUNK_BYTES
from megatron_mmr1.planning.activations import (
    LayerSizes,
    decoder_bytes,
    layer_bytes_a_token,
    tower_bytes_a_patch,
)

GPU_BYTES = 80_000_000_000  # of an H100
# Assumed, not measured: the GPU's context, nccl's and the libraries' buffers, and fragmentation.
RESERVE_BYTES = 6_000_000_000
# Mean of MMR1's RL prompts (60% of 763 tokens). A visual token is 4 patches.
_VISUAL_TOKENS_A_PROMPT = 458
_PATCHES_A_TOKEN = 4
_PATCH_PIXELS = 14 * 14
# As rollout/vllm_engine.py sizes the cache of kv_cache_bytes=0.
_ENGINE_SHARE, _ENGINE_MARGIN = 0.9, 1 << 30


@dataclass(frozen=True, slots=True)
class Phase:
    """What lies on the GPU in one phase of a step, at its fullest moment.

    Attributes:
        parts: bytes by name.
        rest: of a cache that takes what the parts leave.
    """

    name: str
    parts: dict[str, float]
    rest: float = 0.0

    @property
    def total(self) -> float:
        """Bytes that are needed."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True, slots=True)
class RankMemory:
    """One pipeline stage's rank.

    Attributes:
        rank: among all; the others of its stage hold as much.
        counted: on the model without memory.
        phases: in the order of a step.
        kv_cache_tokens: of an engine, on all its ranks together; 0 without one.
        longest_tokens: of a sequence that the engine must have room for.
        host_bytes: of this rank's states in host memory, and of gradients beside them there.
    """

    rank: int
    stage: int
    counted: Footprint
    phases: list[Phase]
    host_bytes: float
    kv_cache_tokens: int = 0
    longest_tokens: int = 0

    @property
    def binding(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase leaves the reserve free, and the engine can hold a sequence."""
        has_room = self.binding.total <= GPU_BYTES - RESERVE_BYTES
        return has_room and self.kv_cache_tokens >= self.longest_tokens


def num_gpus(config: GrpoConfig | SftConfig) -> int:
    """Return how many GPUs an experiment states; one replica where it states none."""
    launch = config.launch
    if launch.nodes is None or launch.gpus_per_node is None:
        return replica_size(config.parallel)
    return launch.nodes * launch.gpus_per_node


def plan_memory(config: GrpoConfig | SftConfig, hf_config: Any) -> list[RankMemory]:
    """Plan the memory of one rank of each pipeline stage.

    Raises:
        ValueError: activations of this kind of model have no formula here.
    """
    if hf_config.model_type != "qwen2_5_vl":
        raise ValueError(
            f"model_type={hf_config.model_type!r}: activations are only known of qwen2_5_vl; "
            "plan a model of that kind"
        )
    world_size = num_gpus(config)
    plans = []
    for stage, rank in enumerate(stage_ranks(config.parallel, world_size)):
        counted = footprint(
            hf_config,
            config.parallel,
            config.precision,
            config.optimizer,
            world_size=world_size,
            rank=rank,
            freeze_vision=config.model.freeze_vision,
        )
        plans.append(_Rank(config, hf_config, world_size, stage, rank, counted).plan())
    return plans


@dataclass(frozen=True, slots=True)
class _Rank:
    """A rank of a stage, and what its plan is made from."""

    config: GrpoConfig | SftConfig
    hf_config: Any
    world_size: int
    stage: int
    rank: int
    counted: Footprint

    def plan(self) -> RankMemory:
        config, counted = self.config, self.counted
        offloaded = config.optimizer.cpu_offload * counted.states
        # Megatron's HybridDeviceOptimizer keeps a float32 gradient of what it steps on the CPU,
        # beside 12 bytes of float32 weights and moments (8 and the weights, where all is float32).
        on_host = offloaded * (16 / 12 if self._element < 4 else 16 / 8)
        held = {
            "weights": float(counted.weights),
            "gradients": float(counted.gradients),
            "optimizer": counted.states - offloaded,
        }
        if isinstance(config, SftConfig):
            phases = [Phase("train", held | self._training())]
            return RankMemory(self.rank, self.stage, counted, phases, on_host)
        if config.algorithm.kl_coefficient > 0:
            held["reference"] = float(counted.weights)
        takes_turns = config.rollout.takes_turns
        away = ("gradients", "optimizer") if takes_turns else ()
        generate = {name: size for name, size in held.items() if name not in away}
        generate["engine"] = self._engine_weights(config)
        cache, rest = float(config.rollout.kv_cache_bytes), 0.0
        if cache == 0:
            free = GPU_BYTES - RESERVE_BYTES - sum(generate.values()) + generate["engine"]
            rest = max(0.0, _ENGINE_SHARE * free - _ENGINE_MARGIN - generate["engine"])
        generate["KV cache"] = cache
        if not takes_turns:
            held |= {name: generate[name] for name in ("engine", "KV cache")}
        phases = [Phase("generate", generate, rest), Phase("train", held | self._training())]
        if config.algorithm.kl_coefficient > 0:
            phases.insert(1, Phase("reference", held | self._reference()))
        room = (cache + rest) * config.rollout.tp_size
        return RankMemory(
            self.rank,
            self.stage,
            counted,
            phases,
            host_bytes=on_host + (counted.states - offloaded) * takes_turns,
            kv_cache_tokens=int(room / self._cache_bytes_a_token(config)),
            longest_tokens=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        )

    def _training(self) -> dict[str, float]:
        """The fuller one of two moments: the decoder's backward pass, and then the tower's."""
        layout, text = self.config.parallel, self.hf_config.get_text_config()
        sizes = LayerSizes.of(text)
        decoder = decoder_bytes(
            sizes, layout, self.counted.num_layers, self._max_tokens, self.stage, self._element
        )
        decoder += self._head()
        tower, kept = self._tower()
        return {
            "activations": kept + max(decoder, tower),
            "image features": self._features(2),
            "a gradient": float(self.counted.largest_parameter),
        }

    def _reference(self) -> dict[str, float]:
        """Reference weights in place of the policy's, which are copied; a forward pass."""
        layer = layer_bytes_a_token(
            LayerSizes.of(self.hf_config.get_text_config()), self.config.parallel, self._element
        )
        return {
            "weights' copy": float(self.counted.weights),
            "activations": layer * self._max_tokens / self.config.parallel.cp_size + self._head(),
            "image features": self._features(1),
        }

    def _head(self) -> float:
        """A chunk of logits, and on the last stage whole hidden states with their gradients."""
        is_last = self.stage == self.config.parallel.pp_size - 1
        hidden = self.hf_config.get_text_config().hidden_size
        tokens = self._max_tokens / self.config.parallel.cp_size
        return is_last * (CHUNK_BYTES["cuda"] + 2 * self._element * tokens * hidden)

    def _tower(self) -> tuple[float, float]:
        """What the tower keeps in its own backward pass alone, and in the decoder's too."""
        if not self.counted.has_tower or self.config.model.freeze_vision:
            return 0.0, 0.0
        a_patch = tower_bytes_a_patch(self.hf_config.vision_config, self._element)
        layout = self.config.parallel
        if layout.recompute == "full" or layout.recompute_vision:
            return a_patch * max(CHUNK_PATCHES, self._longest_patches()), 0.0
        return 0.0, a_patch * self._visual_tokens() * _PATCHES_A_TOKEN

    def _longest_patches(self) -> int:
        """Patches of one prompt, which are encoded together: a cold start's are taken for one
        image's.
        """
        config = self.config
        if isinstance(config, SftConfig):
            return config.max_pixels // _PATCH_PIXELS
        images = config.rollout.max_images_per_prompt
        by_pixels = images * (config.data.max_pixels // _PATCH_PIXELS)
        return min(by_pixels, _PATCHES_A_TOKEN * config.data.max_prompt_tokens)

    def _visual_tokens(self) -> float:
        """Of one replica's prompts of one optimizer step, at their mean."""
        config = self.config
        if isinstance(config, SftConfig):
            prompts = config.global_batch_size
        else:
            prompts = config.prompts_per_step / config.algorithm.optimizer_steps_per_batch
        replicas = self.world_size / replica_size(config.parallel)
        return math.ceil(prompts / replicas) * _VISUAL_TOKENS_A_PROMPT

    def _features(self, copies: int) -> float:
        hidden = self.hf_config.get_text_config().hidden_size
        return self.counted.has_tower * copies * self._element * self._visual_tokens() * hidden

    def _engine_weights(self, config: GrpoConfig) -> float:
        """The whole model, cut over the ranks of an engine."""
        whole = footprint(
            self.hf_config,
            ParallelConfig(),
            config.precision,
            config.optimizer,
            world_size=1,
            rank=0,
        )
        return whole.num_parameters * self._element / config.rollout.tp_size

    def _cache_bytes_a_token(self, config: GrpoConfig) -> int:
        """Keys and values of all layers, on all ranks of an engine together."""
        text = self.hf_config.get_text_config()
        width = LayerSizes.of(text).key
        copies = max(1, config.rollout.tp_size // text.num_key_value_heads)
        element = 1 if config.precision.kv_cache == "fp8" else self._element
        return 2 * text.num_hidden_layers * width * copies * element

    @property
    def _max_tokens(self) -> int:
        return self.config.max_tokens_per_microbatch

    @property
    def _element(self) -> int:
        return DTYPES[self.config.precision.dtype].itemsize
