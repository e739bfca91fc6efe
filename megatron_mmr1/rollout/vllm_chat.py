"""vLLM for models whose images data/processor.py does not know: text and pictures in, text out.

The model's own processor, which vLLM calls, expands the placeholders of images and makes pixels.
For evaluation alone: a trainer would not see what the engine saw, so nothing here returns tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from megatron_mmr1.rollout.engine import Sampling, request_seed
from megatron_mmr1.rollout.vllm_engine import VllmEngine
from megatron_mmr1.types import FinishReason


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat-templated text in which each picture is still one placeholder."""

    prompt_id: str
    text: str
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """The responses to one prompt: (text, number of tokens, finish reason) each.

    Attributes:
        refused: why the engine did not take the prompt; then there are no responses.
    """

    prompt_id: str
    responses: tuple[tuple[str, int, FinishReason], ...]
    refused: str = ""


class VllmChatEngine(VllmEngine):
    """An in-process engine of any vision-language model that vLLM serves; arguments as its base."""

    _takes_pixels = False

    def chat(self, prompts: Sequence[ChatPrompt], sampling: Sampling) -> Iterator[ChatAnswer]:
        """Yield one answer a prompt, as they finish."""
        self._llm.reset_prefix_cache()
        waiting: dict[str, str] = {}
        for prompt in prompts:
            self._num_requests += 1
            request_id = str(self._num_requests)
            try:
                self._llm.llm_engine.add_request(
                    request_id,
                    # The template has the beginning-of-text token, where a model has one.
                    {"prompt": prompt.text, "multi_modal_data": {"image": [*prompt.pictures]}},
                    _sampling_params(sampling, prompt),
                    tokenization_kwargs={"add_special_tokens": False},
                )
            except (VLLMValidationError, ValueError) as error:  # of this prompt alone
                yield ChatAnswer(prompt.prompt_id, (), str(error))
                continue
            waiting[request_id] = prompt.prompt_id
        while waiting:
            for output in self._llm.llm_engine.step():
                assert isinstance(output, RequestOutput) and output.finished
                yield self._answer(waiting.pop(output.request_id), output)

    def _answer(self, prompt_id: str, output: RequestOutput) -> ChatAnswer:
        length = len(output.prompt_token_ids or ())
        if length > self._max_prompt_tokens:
            # vLLM took it, and had less room for the response than was asked for.
            return ChatAnswer(
                prompt_id, (), f"{length} tokens exceed max_prompt_tokens={self._max_prompt_tokens}"
            )
        responses = []
        for completion in sorted(output.outputs, key=lambda c: c.index):
            finish: FinishReason = "stop" if completion.finish_reason == "stop" else "length"
            responses.append((completion.text, len(completion.token_ids), finish))
        return ChatAnswer(prompt_id, tuple(responses))


def _sampling_params(sampling: Sampling, prompt: ChatPrompt) -> SamplingParams:
    return SamplingParams(
        n=sampling.group_size,
        temperature=sampling.temperature,
        max_tokens=sampling.max_response_tokens,
        seed=request_seed(sampling, (prompt.prompt_id, 0)),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
