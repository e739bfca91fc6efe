"""TRL's side: `python -m megatron_mmr1.throughput.trl.theirs CASE FOLDER BATCH_SIZE GENERATION`.

TRL's own GRPOTrainer, its loop and its optimizer. GENERATION is "recorded": replaced by the batch's
responses, through the hook that TRL has for that (`rollout_func`); "vllm": its own, colocated;
"vllm_mended": the same with another way of updating the engine's weights (`_mend_update`);
"transformers": its own without an engine. TRL's defaults stand but for what makes the two sides
alike: float32, no gradient checkpointing, AdamW's rate, one thread; and no response may hold vision
tokens, with which its trainer fails.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_mmr1.throughput.trl import turn
from megatron_mmr1.throughput.trl.cases import CASES, GROUP_SIZE, Case

MAX_STEPS = 10_000


def main(name: str, folder: str, batch_size: str, generation: str) -> None:
    """Train as long as steps are asked for."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from transformers import AutoProcessor, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    case = CASES[name](Path(folder))
    has_images = any(case.images)
    processor: Any = (AutoProcessor if has_images else AutoTokenizer).from_pretrained(
        case.model, local_files_only=True, padding_side="left"
    )
    num_sequences = len(case.questions) * GROUP_SIZE

    class Trainer(GRPOTrainer):
        """Knows how long making the batch took: in a real run, generation is there."""

        batch_s = batch_cpu_s = 0.0
        num_tokens = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start, start_cpu = time.perf_counter(), time.process_time()
            made = super()._generate_and_score_completions(inputs)
            self.batch_s += time.perf_counter() - start
            self.batch_cpu_s += time.process_time() - start_cpu
            masks = [made[name] for name in ("prompt_mask", "completion_mask")]
            self.num_tokens += sum(int(mask.sum()) for mask in masks)
            self.num_positions = sum(mask.numel() for mask in masks)
            return made

    class Turns(TrainerCallback):
        """Waits for its turn before every step."""

        def __init__(self) -> None:
            self.start = self.start_cpu = 0.0
            self.measured: dict[str, float] = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not turn.wait():
                os._exit(0)
            trainer.batch_s, trainer.batch_cpu_s, trainer.num_tokens = 0.0, 0.0, 0
            self.start, self.start_cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            cpu_s = time.process_time() - self.start_cpu
            self.measured = {
                "step_s": seconds,
                "step_cpu_s": cpu_s,
                "train_s": seconds - trainer.batch_s,
                "train_cpu_s": cpu_s - trainer.batch_cpu_s,
                "tokens": trainer.num_tokens,
                "positions": trainer.num_positions,
            }

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "grad_norm" in logs:
                found = {key: float(logs[key]) for key in ("loss", "grad_norm")}
                turn.report(self.measured | found)

    own: dict[str, Any] = {}
    if generation.startswith("vllm"):
        own = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": 256,
            "generation_kwargs": {"logit_bias": dict.fromkeys(_vision_token_ids(), -100.0)},
        }
    elif generation == "transformers":
        own = {"generation_kwargs": {"suppress_tokens": _vision_token_ids()}}
    trainer = Trainer(
        model=str(case.model),
        reward_funcs=_reward_of(case),
        args=GRPOConfig(
            output_dir=str(Path(folder) / "trl"),
            per_device_train_batch_size=int(batch_size),
            gradient_accumulation_steps=num_sequences // int(batch_size),
            num_generations=GROUP_SIZE,
            max_completion_length=max(len(r) for group in case.responses for r in group),
            shuffle_dataset=False,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=MAX_STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            **own,
        ),
        train_dataset=_dataset(case),
        processing_class=processor,
        rollout_func=_Recorded(case, processor) if generation == "recorded" else None,
        callbacks=[Turns()],
    )
    if generation == "vllm_mended":
        _mend_update(trainer)
    trainer.train()


def _vision_token_ids() -> list[int]:
    """Of the tiny model."""
    from megatron_mmr1.data.tiny_model import SPECIAL_TOKENS, token_id

    names = [t for t in SPECIAL_TOKENS if any(w in t for w in ("vision", "image", "video"))]
    return [token_id(name) for name in names]


def _mend_update(trainer: Any) -> None:
    """Update weights by vLLM's `reload_weights`, and drop the caches, as rollout/vllm_engine.py.

    TRL calls the model's `load_weights`, which fails on a CPU: vLLM has prepacked the weights of
    linear layers there, and the parameters that it finds have no `weight_loader`.
    """
    generation = trainer.vllm_generation

    def sync_weights() -> None:
        named = generation._iter_named_params()
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
        generation.llm.reset_prefix_cache()
        generation.llm.llm_engine.reset_encoder_cache()
        generation.llm.reset_mm_cache()

    generation.sync_weights = sync_weights


def _dataset(case: Case) -> Any:
    """One row a prompt: text, or a conversation with its images."""
    from datasets import Dataset
    from PIL import Image

    if not any(case.images):
        return Dataset.from_list([{"prompt": question} for question in case.questions])
    rows = [
        {
            "prompt": [{"role": "user", "content": question.replace("<image>", "")}],
            "images": [Image.open(io.BytesIO(file)) for file in images],
        }
        for question, images in zip(case.questions, case.images, strict=True)
    ]
    return Dataset.from_list(rows)


class _Recorded:
    """What TRL calls in place of generating: the batch's responses, in the order of its prompts."""

    def __init__(self, case: Case, processor: Any) -> None:
        self._case, self._processor = case, processor

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Return the token ids; the prompts come group by group, in the data set's order."""
        numbers = [index // GROUP_SIZE for index in range(len(prompts))]
        responses = [response for group in self._case.responses for response in group]
        return {
            "prompt_ids": [self._prompt_ids(number, prompts) for number in numbers],
            "completion_ids": responses,
            "logprobs": None,
        }

    def _prompt_ids(self, number: int, prompts: list[Any]) -> list[int]:
        if self._case.token_ids is not None:
            return self._case.token_ids[number]
        inputs = self._processor.apply_chat_template(
            prompts[number * GROUP_SIZE],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs["input_ids"][0].tolist()


def _reward_of(case: Case) -> Any:
    rewards = [reward for group in case.rewards for reward in group]

    def recorded_reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return rewards

    return recorded_reward


if __name__ == "__main__":
    main(*sys.argv[1:])
