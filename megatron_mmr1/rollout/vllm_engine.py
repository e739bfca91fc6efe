"""vLLM inside the trainer's process: multimodal prompts in, finished groups out,
weights updated in place.

The engine gets each prompt as the trainer's own record (token ids, pixels, grid), already
processed: no image processor runs a second time, so both sides see the same pixels. It reports
`processed_logprobs`: after temperature and bans, from the very distribution that the tokens were
drawn from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# The second model runner, which vLLM 0.32 takes on GPUs, refuses logits processors like ours.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from transformers import AutoConfig, BatchFeature
from vllm import LLM, SamplingParams
from vllm.config.cache import CacheDType
from vllm.config.model import ModelDType
from vllm.inputs.engine import MultiModalInput, TokensInput, mm_input, tokens_input
from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.triton_utils import dispatcher
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from megatron_mmr1.config.schema import EngineConfig
from megatron_mmr1.rollout.engine import Sampling, request_seed
from megatron_mmr1.types import FinishReason, Prompt, Rollout, RolloutGroup

_BLOCK_SIZE = (
    32  # vLLM's CPU attention takes multiples of 32; its default of 128 never caches a short prompt
)

_MAX_BATCHED_TOKENS = 8192  # a scheduling step's prompt tokens, unless one prompt is longer


class VllmEngine:
    """An in-process vLLM engine: on this rank alone, or one of several ranks.

    Takes prompts with their pixels, as Qwen-VL has them, and prompts of text; a prompt in another
    form is for a subclass (vllm_chat.py).

    Args:
        model: a Hugging Face folder.
        banned_token_ids: never sampled (vision tokens: the trainer would take them for images).
        max_prompt_tokens: the longest prompt that will come.
        kv_cache: auto (as dtype) | fp8 (E4M3, without a scale): half the bytes of bfloat16, and
            log-probs that are off by as much as the rounding makes them; see precision.kv_cache.
        tp_size: so many consecutive ranks of torchrun form one engine, whatever layout the policy
            has. All of them must make the same calls, read `generate` to its end, and get the same
            results.
        sleeps: `sleep` will be called. On a GPU, weights and caches then lie where they can be
            given back; on a CPU nothing is, and the states are gone through all the same.

    Raises:
        ValueError: the model is of a kind whose images we can't give; kv_cache_bytes=0 without a
            GPU, or without `sleeps`.
    """

    _takes_pixels = True

    def __init__(
        self,
        model: str,
        dtype: str,
        config: EngineConfig,
        banned_token_ids: Sequence[int],
        max_prompt_tokens: int,
        tp_size: int = 1,
        sleeps: bool = False,
        kv_cache: str = "auto",
    ) -> None:
        hf_config = AutoConfig.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
        vision = getattr(hf_config, "vision_config", None)
        if self._takes_pixels and vision is not None and not hasattr(vision, "spatial_merge_size"):
            raise ValueError(
                f"model.path={model!r}: rollouts of {hf_config.model_type!r} with images are not "
                "supported; use a Qwen-VL or a text model"
            )
        self._image_token_id: int = getattr(hf_config, "image_token_id", -1)
        self._mm_fields = _create_qwen2vl_field_factory(getattr(vision, "spatial_merge_size", 1))
        max_model_len = max_prompt_tokens + config.max_response_tokens
        on_gpu = torch.cuda.is_available()
        room = _cache_room(config, sleeps)
        self._mixes_up_experts = bool(getattr(hf_config, "num_experts", None)) and not on_gpu
        with _process_left_as_found(), _strange_objects_are_passed_over():
            self._llm = LLM(
                model,
                dtype=cast(ModelDType, dtype),  # validate has checked it
                tensor_parallel_size=tp_size,
                # The ranks exist already: vLLM lays its groups over them.
                distributed_executor_backend=_RankOfEngine if _num_ranks() > 1 else None,
                enforce_eager=not on_gpu,
                # A seeded request whose prompt is cut in two crashes vLLM 0.32 on a CPU: it rewinds
                # the generator, and CPU generators have no offset.
                enable_chunked_prefill=on_gpu,
                max_num_batched_tokens=max(_MAX_BATCHED_TOKENS, max_model_len),
                enable_sleep_mode=sleeps and on_gpu,
                kv_cache_dtype=cast(CacheDType, kv_cache),
                block_size=_BLOCK_SIZE,
                max_model_len=max_model_len,
                limit_mm_per_prompt={"image": config.max_images_per_prompt, "video": 0},
                # Our pixels are normalised; True would do it twice, silently.
                mm_device_do_normalize=False,
                logprobs_mode="processed_logprobs",
                logits_processors=[_ban_tokens(tuple(banned_token_ids))],
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **room,
            )
        self._num_requests = 0
        self._pixel_bytes = config.pixel_bytes
        self._max_prompt_tokens = max_prompt_tokens
        self.weight_version = 0
        self.is_asleep = False

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[RolloutGroup]:
        """Yield one finished group a prompt, as they finish; see RolloutEngine.

        The prefix cache starts empty, so that the result depends on the arguments and the weights
        alone.
        """
        assert not self.is_asleep, "asleep: update_weights comes first"
        self._llm.reset_prefix_cache()
        upcoming = iter(prompts)
        waiting: dict[str, tuple[Prompt, int]] = {}
        held_bytes, is_more = 0, True
        while waiting or is_more:
            while is_more and held_bytes < self._pixel_bytes:
                prompt = next(upcoming, None)
                if prompt is None:
                    is_more = False
                    break
                request_id = self._add(prompt, sampling)
                waiting[request_id] = prompt.without_images(), prompt.pixel_bytes
                held_bytes += prompt.pixel_bytes
            for output in self._llm.llm_engine.step() if waiting else ():
                assert isinstance(output, RequestOutput) and output.finished
                prompt, num_bytes = waiting.pop(output.request_id)
                held_bytes -= num_bytes
                yield self._group(prompt, output)

    def _add(self, prompt: Prompt, sampling: Sampling) -> str:
        self._num_requests += 1
        request_id = str(self._num_requests)
        self._llm.llm_engine.add_request(
            request_id, self._engine_input(prompt), _sampling_params(sampling, prompt)
        )
        return request_id

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load weights under their Hugging Face names and drop the prefix,
        encoder and processor caches.

        Raises:
            ValueError: the model has experts and runs on a CPU.
        """
        if self._mixes_up_experts:
            raise ValueError(
                "vLLM 0.32 on a CPU samples from wrong experts once weights are loaded again, even "
                "the same ones; train a model with experts on a GPU, or one without"
            )
        if self.is_asleep:  # the cache last: it has no room while weights are exchanged
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._llm.reset_mm_cache()
        if self.is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self.is_asleep = False
        self.weight_version = version

    def sleep(self) -> None:
        """Give back weights and caches; see RolloutEngine. vLLM's level 2: nothing is kept."""
        if not self.is_asleep:
            self._llm.sleep(level=2)
            self.is_asleep = True

    def _group(self, prompt: Prompt, output: RequestOutput) -> RolloutGroup:
        rollouts = []
        for completion in sorted(output.outputs, key=lambda c: c.index):
            token_ids = tuple(completion.token_ids)
            assert isinstance(completion.logprobs, list)
            logprobs = tuple(
                float(at[token].logprob)
                for at, token in zip(completion.logprobs, token_ids, strict=True)
            )
            finish: FinishReason = "stop" if completion.finish_reason == "stop" else "length"
            rollouts.append(Rollout(completion.index, token_ids, logprobs, finish, completion.text))
        return RolloutGroup(prompt, tuple(rollouts), self.weight_version)

    def _engine_input(self, prompt: Prompt) -> MultiModalInput | TokensInput:
        token_ids = prompt.token_ids.tolist()
        if prompt.pixel_values is None or prompt.image_grid_thw is None:
            return tokens_input(token_ids)
        pixels = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(pixels), self._mm_fields(pixels))
        places = _runs(token_ids, self._image_token_id)
        assert len(places) == len(items["image"])
        pixel_hash = hashlib.blake2b(prompt.pixel_values.numpy().tobytes(), digest_size=16)
        pixel_hash.update(prompt.image_grid_thw.numpy().tobytes())
        hashes = [f"{pixel_hash.hexdigest()}-{index}" for index in range(len(places))]
        return mm_input(token_ids, items, {"image": hashes}, {"image": places})


class _RankOfEngine(ExecutorWithExternalLauncher):
    """One of torchrun's ranks, which hold an engine together or have one each.

    vLLM's own class names the CPU collectives' shared memory alike in every run, so that two runs
    on one machine collide, as does any run after one that was killed. Each rank giving another name
    makes vLLM use gloo. The name is all that the method is used for: the process group exists.

    Used with one rank an engine, too: vLLM's default would put the engines of all ranks on the
    first GPU.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        method, rank, local_rank = super()._distributed_args()
        return f"{method}:{rank}", rank, local_rank


def memory_share(free_bytes: int, total_bytes: int) -> float:
    """Return vLLM's `gpu_memory_utilization`: the share of a GPU that others have left free.

    A tenth of what is free, and a GiB, stay free: collectives, bucketed weights and the GPU's own
    context grow after the engine has started.

    Raises:
        ValueError: nothing is left.
    """
    usable_bytes = 0.9 * free_bytes - (1 << 30)
    if usable_bytes <= 0:
        raise ValueError(
            f"the policy leaves {free_bytes / 1e9:.1f} GB of a GPU's {total_bytes / 1e9:.1f} free: "
            "no room for an engine; see `python tools/plan.py`, and raise parallel.tp_size or use "
            "rollout.takes_turns=true"
        )
    return usable_bytes / total_bytes


def _cache_room(config: EngineConfig, sleeps: bool) -> dict[str, Any]:
    """Say how large the KV cache is, in vLLM's arguments.

    On a GPU vLLM asks for its share of the memory to be free also where the cache's bytes are
    given.
    """
    on_gpu, num_bytes = torch.cuda.is_available(), config.kv_cache_bytes
    if num_bytes == 0 and not (sleeps and on_gpu):
        raise ValueError(
            "rollout.kv_cache_bytes=0 takes what is free on a GPU, with rollout.takes_turns=true; "
            f"here is {'takes_turns=false' if on_gpu else 'none'}: give a number of bytes, as "
            "rollout.kv_cache_bytes=268435456"
        )
    room: dict[str, Any] = {"kv_cache_memory_bytes": num_bytes} if num_bytes > 0 else {}
    if on_gpu:
        torch.cuda.empty_cache()
        room["gpu_memory_utilization"] = memory_share(*torch.cuda.mem_get_info())
    return room


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sampling_params(sampling: Sampling, prompt: Prompt) -> SamplingParams:
    return SamplingParams(
        n=sampling.group_size,
        temperature=sampling.temperature,
        max_tokens=sampling.max_response_tokens,
        ignore_eos=sampling.ignores_end,
        seed=request_seed(sampling, prompt.key),
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _runs(token_ids: Sequence[int], wanted: int) -> list[PlaceholderRange]:
    """Find each maximal run of `wanted`: one image's placeholders
    (Qwen puts other tokens in between).
    """
    runs: list[PlaceholderRange] = []
    start = None
    for position, token in enumerate([*token_ids, None]):
        if token == wanted and start is None:
            start = position
        elif token != wanted and start is not None:
            runs.append(PlaceholderRange(offset=start, length=position - start))
            start = None
    return runs


def _ban_tokens(token_ids: tuple[int, ...]) -> type[LogitsProcessor]:
    """Return a logits processor class that makes `token_ids` impossible in every request."""

    class BannedTokens(LogitsProcessor):
        def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:
            self._ids = torch.tensor(token_ids, dtype=torch.long, device=device)

        def apply(self, logits: Tensor) -> Tensor:
            return logits.index_fill_(-1, self._ids, -torch.inf)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            return None

    return BannedTokens


@contextmanager
def _strange_objects_are_passed_over() -> Iterator[None]:
    """Let vLLM 0.32 start on a CPU beside numba.

    It looks for Triton kernels in every object of every module, and takes the attributes of each
    for a dict. llvmlite's wrappers of C functions answer any name, `__dict__` too, with a function.
    """

    def attributes(value: object) -> Mapping[str, object]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = attributes  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del dispatcher.vars  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _process_left_as_found() -> Iterator[None]:
    """Undo what building a vLLM engine does to its host process: thread count and environment."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
