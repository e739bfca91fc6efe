"""Everything that can be refused before anything heavy is imported: values, files, modules.

Owns the cross-field checks of a config; its names and types are schema.py's and the command line's.
Reads file names only and changes nothing. Each function raises at the first fault it finds.
"""

from __future__ import annotations

import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

from megatron_mmr1.config.benchmarks import settled
from megatron_mmr1.config.launch import check_launch
from megatron_mmr1.config.layout import (
    ModelSizes,
    check_layout,
    check_max_tokens,
    replica_size,
)
from megatron_mmr1.config.model_folder import check_model_folder, is_megatron_checkpoint
from megatron_mmr1.config.precision import DTYPES, check_fp8_sizes, check_offload, check_precision
from megatron_mmr1.config.run_dir import check_folder_name
from megatron_mmr1.config.schema import (
    AlgorithmConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    ParityConfig,
    RewardConfig,
    RolloutConfig,
    SamplerConfig,
    SftConfig,
)

_MODULE_REMEDIES = {
    "megatron.core": "run `make setup` (or `pip install megatron-core`)",
    "psutil": (
        "run `make setup` (or `pip install psutil`): without it a Megatron checkpoint save hangs"
    ),
    "vllm": (
        "run `make setup` (or install requirements-cpu.txt, or requirements-cuda.txt with a GPU)"
    ),
}


def validate(config: GrpoConfig, world_size: int, num_nodes: int = 1) -> None:
    """Refuse a GRPO run that cannot work.

    Args:
        config: the resolved config.
        world_size: the number of processes.
        num_nodes: the number of machines that they are on.

    Raises:
        ValueError: names the key, its value and a remedy.
    """
    name = config.experiment
    check_launch(config.launch, world_size, num_nodes, "megatron_mmr1.train", name)
    _check_resume(config.resume, config.run)
    if config.replay is not None:
        _check_replay(Path(config.replay), config.num_steps)
    _at_least("seed", config.seed, 0)
    _at_least("num_steps", config.num_steps, 1)
    _check_model(config.model)
    check_precision(config.precision, has_rollouts=True)
    check_offload(config.optimizer, config.precision, config.resume)
    _check_sampler(config.sampler)
    _at_least("max_responses", config.max_responses, 0)
    _require(
        config.replay is None or config.sampler.scoring_rollouts == 0,
        "sampler.scoring_rollouts",
        config.sampler.scoring_rollouts,
        "can't be replayed, since runs don't keep these rollouts; replay with a sampler without",
    )
    _check_training_rollout(config.rollout)
    _check_reward(config.reward)
    _check_penalties(config.reward, config.rollout.max_response_tokens)
    _check_algorithm(config.algorithm)
    steps_per_batch = config.algorithm.optimizer_steps_per_batch
    _check_optimizer(config.optimizer)
    _multiple(
        "prompts_per_step",
        config.prompts_per_step,
        steps_per_batch,
        f"algorithm.optimizer_steps_per_batch={steps_per_batch}",
    )
    _at_least("data.max_prompt_tokens", config.data.max_prompt_tokens, 1)
    _at_least("evaluation.every", config.evaluation.every, 0)
    _at_least("evaluation.samples_per_prompt", config.evaluation.samples_per_prompt, 1)
    _at_least("checkpoint.every", config.checkpoint.every, 0)
    _at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    _check_data(config.data)
    check_model_folder(config.model.path)
    sizes = ModelSizes.of(config.model.path)
    check_layout(config.parallel, sizes, world_size)
    check_fp8_sizes(config.precision, config.parallel, sizes)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    why = "data.max_prompt_tokens + rollout.max_response_tokens"
    check_max_tokens(
        config.parallel, config.max_tokens_per_microbatch, longest, why, config.precision
    )
    if config.replay is None:
        _check_engine_ranks(config.rollout.tp_size, sizes, world_size)
    engine = () if config.replay is not None else ("vllm",)
    for module in ("megatron.core", "psutil", *engine):
        check_module(module)


def validate_sft(config: SftConfig, world_size: int, num_nodes: int = 1) -> None:
    """Refuse a cold start that cannot work.

    Args:
        config: the resolved config.
        world_size: the number of processes.
        num_nodes: the number of machines that they are on.

    Raises:
        ValueError: names the key, its value and a remedy.
    """
    name = config.experiment
    check_launch(config.launch, world_size, num_nodes, "megatron_mmr1.sft", name)
    _check_resume(config.resume, config.run)
    _at_least("seed", config.seed, 0)
    _at_least("num_steps", config.num_steps, 0)
    _at_least("num_epochs", config.num_epochs, 0)
    _require(
        (config.num_steps > 0) != (config.num_epochs > 0),
        "num_steps",
        config.num_steps,
        f"and num_epochs={config.num_epochs!r}: set one of them above 0, and only one",
    )
    _at_least("global_batch_size", config.global_batch_size, 1)
    _check_model(config.model)
    check_precision(config.precision)
    check_offload(config.optimizer, config.precision, config.resume, config.validation)
    _check_optimizer(config.optimizer)
    check_source("data", config.data)
    if config.validation is not None:
        check_source("validation", config.validation)
    _check_pixels("min_pixels", config.min_pixels, "max_pixels", config.max_pixels)
    _check_share("max_bad_share", config.max_bad_share)
    _at_least("validation_every", config.validation_every, 0)
    _at_least("checkpoint.every", config.checkpoint.every, 0)
    _at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    check_model_folder(config.model.path)
    sizes = ModelSizes.of(config.model.path)
    check_layout(config.parallel, sizes, world_size)
    check_fp8_sizes(config.precision, config.parallel, sizes)
    why = "the shortest sequence"
    check_max_tokens(config.parallel, config.max_tokens_per_microbatch, 1, why, config.precision)
    for module in ("megatron.core", "psutil"):
        check_module(module)


def validate_evaluate(config: EvaluateConfig) -> None:
    """Refuse an evaluation that cannot work; unlike training it may be greedy.

    Raises:
        ValueError: names the key, its value and a remedy.
    """
    config = settled(config)
    _choice("dtype", config.dtype, DTYPES)
    check_folder_name("name", config.name or "")
    _at_least("seed", config.seed, 0)
    _at_least("samples_per_prompt", config.samples_per_prompt, 1)
    _at_least("rollout.temperature", config.rollout.temperature, 0)
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        value = getattr(config.rollout, key)
        _require(value == off, f"rollout.{key}", value, f"is not available yet; use {off}")
    _require(
        config.rollout.temperature > 0 or config.samples_per_prompt == 1,
        "samples_per_prompt",
        config.samples_per_prompt,
        "draws the same greedy response again; use 1, or rollout.temperature above 0",
    )
    _at_least("max_prompt_tokens", config.max_prompt_tokens, 1)
    _check_pixels("min_pixels", config.min_pixels, "max_pixels", config.max_pixels)
    _check_share("max_bad_share", config.max_bad_share)
    _check_engine(config.rollout)
    _check_reward(config.reward)
    keys = ("repetition_weight", "repetition_ngram", "overlong_weight", "overlong_cache_tokens")
    for key in keys:
        value = getattr(config.reward, key)
        _require(value == 0, f"reward.{key}", value, "has no effect in an evaluation; remove it")
    source = config.data or ""
    if config.benchmark == "digits" or not Path(source).is_dir():  # a benchmark may have shards
        check_source("data", source)
    if is_megatron_checkpoint(config.model):
        check_module("megatron.core")
    else:
        check_model_folder(config.model, "model")
    check_module("vllm")


def validate_parity(config: ParityConfig) -> None:
    """Refuse a parity check that cannot work.

    Raises:
        ValueError: names the key, its value and a remedy.
    """
    _check_model(config.model)
    check_precision(config.precision)
    _at_least("dp_size", config.dp_size, 1)
    check_model_folder(config.model.path)
    sizes = ModelSizes.of(config.model.path)
    check_layout(config.parallel, sizes, replica_size(config.parallel) * config.dp_size)
    check_fp8_sizes(config.precision, config.parallel, sizes)
    why = "the shortest sequence"
    check_max_tokens(config.parallel, config.max_tokens_per_microbatch, 1, why, config.precision)
    check_module("megatron.core")


def check_source(key: str, source: str) -> None:
    """Refuse a source of data that is neither a file nor the form of a hub id.

    Raises:
        ValueError: there is no such file.
    """
    _require(
        Path(source).is_file() or is_hub_id(source),
        key,
        source,
        "is no file; give a .parquet, .json or .jsonl file, or a hub id as OWNER/NAME:SPLIT "
        "(`python -m megatron_mmr1.data.digits` writes the files of the digits task)",
    )


def is_hub_id(source: str) -> bool:
    """Whether a source has the form OWNER/NAME[:SPLIT][@REVISION], and is not a path.

    A path of one folder and one name looks the same: only if it has no ending of a data file, and
    there is no such folder here, it is a hub id.
    """
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?::[\w.-]+)?(?:@[\w./-]+)?", source)
    is_file = Path(source).suffix in (".parquet", ".json", ".jsonl", ".ndjson", ".tsv")
    return bool(is_id) and not is_file and not Path(source).parent.exists()


def _check_pixels(low_key: str, low: int, high_key: str, high: int) -> None:
    _at_least(low_key, low, 0)
    _require(
        high >= max(low, 1), high_key, high, f"is below 1 or {low_key}={low}; use a larger number"
    )


def _check_share(key: str, share: float) -> None:
    _require(0 <= share <= 1, key, share, "is no share; use 0 to 1")


def check_module(module: str) -> None:
    """Refuse to start without an installed module, which is found but not imported.

    Raises:
        ValueError: the module is not installed.
    """
    # find_spec("a.b") imports a, and raises where a is missing.
    parent = module.partition(".")[0]
    if find_spec(parent) is None or find_spec(module) is None:
        remedy = _MODULE_REMEDIES.get(module, f"run `make setup` (or `pip install {module}`)")
        raise ValueError(f"the module {module} is not installed; {remedy}")


def _check_replay(run_dir: Path, num_steps: int) -> None:
    recorded = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    if not recorded:
        raise ValueError(
            f"replay={str(run_dir)!r} has no rollouts/ folder with steps; "
            "give the folder of an earlier run, as in outputs/EXPERIMENT/RUN"
        )
    last = int(recorded[-1].stem.removeprefix("step_"))
    _require(last >= num_steps, "num_steps", num_steps, f"exceeds the run to replay; use {last}")


def _check_resume(resume: str, run: str | None) -> None:
    _choice("resume", resume, ("never", "auto"))
    if run is not None:
        check_folder_name("run", run)
    elif resume == "auto":
        raise ValueError("resume='auto' needs the name of the run to continue; add run=NAME")


def _check_data(config: DataConfig) -> None:
    check_source("data.train", config.train)
    check_source("data.heldout", config.heldout)
    _check_pixels("data.min_pixels", config.min_pixels, "data.max_pixels", config.max_pixels)
    _check_share("data.max_bad_share", config.max_bad_share)
    _at_least("data.cache_bytes", config.cache_bytes, 0)
    for key in ("problem_key", "answer_key", "images_key"):
        _require(bool(getattr(config, key)), f"data.{key}", "", "names no column; give its name")


def _check_model(config: ModelConfig) -> None:
    _choice("model.kernels", config.kernels, ("auto", "triton", "torch"))


def _check_engine_ranks(tp_size: int, sizes: ModelSizes, world_size: int) -> None:
    _at_least("rollout.tp_size", tp_size, 1)
    fitting = [
        n
        for n in range(1, world_size + 1)
        if not (world_size % n or sizes.num_heads % n or sizes.num_vision_heads % n)
    ]
    _require(
        tp_size in fitting,
        "rollout.tp_size",
        tp_size,
        f"does not divide {world_size} processes, num_attention_heads={sizes.num_heads} and the "
        f"vision tower's heads ({sizes.num_vision_heads}); use {' or '.join(map(str, fitting))}",
    )


def _check_optimizer(config: OptimizerConfig) -> None:
    _require(
        0 < config.lr < math.inf, "optimizer.lr", config.lr, "is no learning rate; use one above 0"
    )
    _require(
        0 <= config.min_lr <= config.lr,
        "optimizer.min_lr",
        config.min_lr,
        f"is not between 0 and optimizer.lr={config.lr!r}; use a number in that range",
    )
    _choice("optimizer.schedule", config.schedule, ("constant", "linear", "cosine"))
    _require(
        0 <= config.warmup_ratio < 1,
        "optimizer.warmup_ratio",
        config.warmup_ratio,
        "is no share of the run that leaves some for the schedule; use 0 to below 1",
    )
    for key in ("beta1", "beta2"):
        beta = getattr(config, key)
        _require(0 <= beta < 1, f"optimizer.{key}", beta, "is not in [0, 1); use 0 to below 1")
    _at_least("optimizer.weight_decay", config.weight_decay, 0)
    _at_least("optimizer.max_grad_norm", config.max_grad_norm, 0)
    implementations = ("auto", "torch", "transformer_engine", "apex")
    _choice("optimizer.implementation", config.implementation, implementations)
    _choice("optimizer.fused_accumulation", config.fused_accumulation, ("auto", "on", "off"))
    _check_share("optimizer.cpu_offload", config.cpu_offload)


def _check_sampler(config: SamplerConfig) -> None:
    _choice("sampler.estimator", config.estimator, ("posterior", "refresh", "released_code"))
    _choice("sampler.score", config.score, ("vps", "variance", "mixed", "calibrated"))
    measures = ("self_bleu", "distinct_n", "edit_distance", "padded_self_bleu")
    _choice("sampler.diversity", config.diversity, measures)
    _require(
        config.diversity != "padded_self_bleu" or config.estimator == "released_code",
        "sampler.diversity",
        config.diversity,
        "is a similarity, for sampler.estimator=released_code alone; use self_bleu",
    )
    _choice("sampler.prior", config.prior, ("record", "category", "global"))
    for key in ("mixture_ratio", "final_mixture_ratio", "floor"):
        value = getattr(config, key)
        _require(
            value is None or 0 <= value <= 1, f"sampler.{key}", value, "is no share; use 0 to 1"
        )
    for key in ("discount", "prior_discount"):
        value = getattr(config, key)
        _require(0 < value <= 1, f"sampler.{key}", value, "is not above 0 and at most 1; use 0.95")
    _not_both_zero("sampler.alpha", config.alpha, "sampler.beta", config.beta)
    _positive("sampler.power", config.power)
    _at_least("sampler.update_every", config.update_every, 1)
    _at_least("sampler.max_refills", config.max_refills, 0)
    if config.estimator == "posterior":
        _require(
            config.scoring_rollouts == 0,
            "sampler.scoring_rollouts",
            config.scoring_rollouts,
            "is for sampler.estimator=refresh; a posterior learns from training rollouts: use 0",
        )
        _require(
            not (config.thompson and config.score == "calibrated"),
            "sampler.thompson",
            config.thompson,
            "has no pass rate to draw with sampler.score=calibrated; use vps, variance or mixed",
        )
        return
    _at_least("sampler.scoring_rollouts", config.scoring_rollouts, 2)
    _require(
        config.with_replacement or config.estimator != "released_code",
        "sampler.with_replacement",
        config.with_replacement,
        "is not what the released code does; use true, or sampler.estimator=refresh",
    )
    usual = SamplerConfig()
    for key, only in {
        **{"score": "vps", "power": 1.0, "thompson": False},
        **{key: getattr(usual, key) for key in ("prior", "discount", "prior_discount")},
    }.items():
        _require(
            getattr(config, key) == only,
            f"sampler.{key}",
            getattr(config, key),
            f"is of a posterior, and sampler.estimator={config.estimator}; use {only}",
        )


def _check_training_rollout(config: RolloutConfig) -> None:
    _require(
        config.group_size >= 2,
        "rollout.group_size",
        config.group_size,
        "leaves nothing to compare a response with; use 2 or more",
    )
    _positive("rollout.temperature", config.temperature)
    why = "would sample from a cut distribution, for which the trainer's softmax has no counterpart"
    _require(config.top_p == 1, "rollout.top_p", config.top_p, f"{why}; use 1.0")
    _require(config.top_k == 0, "rollout.top_k", config.top_k, f"{why}; use 0 (off)")
    _positive("rollout.max_logprob_diff", config.max_logprob_diff)
    _require(
        config.kv_cache_bytes > 0 or config.takes_turns,
        "rollout.kv_cache_bytes",
        0,
        "is what a GPU has free while the trainer is away, and rollout.takes_turns=false; give a "
        "number of bytes, or use takes_turns=true",
    )
    _check_engine(config)


def _check_engine(config: EngineConfig) -> None:
    _at_least("rollout.max_response_tokens", config.max_response_tokens, 1)
    _at_least("rollout.max_images_per_prompt", config.max_images_per_prompt, 0)
    _at_least("rollout.kv_cache_bytes", config.kv_cache_bytes, 0)
    _at_least("rollout.pixel_bytes", config.pixel_bytes, 1)


def _check_reward(config: RewardConfig) -> None:
    _not_both_zero(
        "reward.format_weight",
        config.format_weight,
        "reward.accuracy_weight",
        config.accuracy_weight,
    )
    _positive("reward.deadline_s", config.deadline_s)
    _at_least("reward.num_workers", config.num_workers, 1)
    _check_judge(config)


def _check_penalties(config: RewardConfig, max_response_tokens: int) -> None:
    for name, size in (("repetition", "ngram"), ("overlong", "cache_tokens")):
        weight_key, size_key = f"reward.{name}_weight", f"reward.{name}_{size}"
        weight, value = getattr(config, f"{name}_weight"), getattr(config, f"{name}_{size}")
        _at_least(weight_key, weight, 0)
        _require(weight < math.inf, weight_key, weight, "is not finite; use a smaller number")
        _at_least(size_key, value, 0)
        why = f"has no effect with {weight_key}=0; raise that or remove this"
        _require(weight > 0 or value == 0, size_key, value, why)
        why = (
            f"is not from 1 to rollout.max_response_tokens={max_response_tokens}, which "
            f"{weight_key}={weight!r} needs; set it"
        )
        _require(weight == 0 or 1 <= value <= max_response_tokens, size_key, value, why)


def _check_judge(config: RewardConfig) -> None:
    _positive("reward.judge_timeout_s", config.judge_timeout_s)
    if not config.judge_url:
        for key in ("judge_model", "judge_key_env"):
            value = getattr(config, key)
            why = "has no effect without reward.judge_url; set that or remove this"
            _require(value == "", f"reward.{key}", value, why)
        return
    is_url = re.match(r"https?://[^/\s]+", config.judge_url) is not None
    why = "is no address; use one like http://host:8000/v1"
    _require(is_url, "reward.judge_url", config.judge_url, why)
    why = "names no model for reward.judge_url; give the name that the endpoint serves it under"
    _require(config.judge_model != "", "reward.judge_model", config.judge_model, why)
    key = config.judge_key_env
    why = "is no environment variable here; export it, with the key as its value"
    _require(key == "" or key in os.environ, "reward.judge_key_env", key, why)


def _check_algorithm(config: AlgorithmConfig) -> None:
    _require(
        0 < config.clip_low < 1,
        "algorithm.clip_low",
        config.clip_low,
        "does not keep 1 - clip_low between 0 and 1; use a number above 0 and below 1",
    )
    _positive("algorithm.clip_high", config.clip_high)
    _choice("algorithm.advantage_scale", config.advantage_scale, ("std", "none"))
    _choice("algorithm.ratio", config.ratio, ("token", "sequence"))
    _require(
        config.dual_clip == 0 or config.dual_clip > 1 + config.clip_high,
        "algorithm.dual_clip",
        config.dual_clip,
        "is not above 1 + algorithm.clip_high; use 0 to leave it out, or a larger number",
    )
    _at_least("algorithm.tis_cap", config.tis_cap, 0)
    _at_least("algorithm.kl_coefficient", config.kl_coefficient, 0)
    _at_least("algorithm.entropy_coefficient", config.entropy_coefficient, 0)
    _choice(
        "algorithm.aggregation", config.aggregation, ("token_mean", "sequence_mean", "fixed_length")
    )
    _at_least("algorithm.optimizer_steps_per_batch", config.optimizer_steps_per_batch, 1)


def _require(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r} {remedy}")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, f"is unknown; use {' or '.join(choices)}")


def _at_least(key: str, value: float, least: int) -> None:
    _require(value >= least, key, value, f"is too small; use {least} or more")


def _positive(key: str, value: float) -> None:
    _require(value > 0, key, value, "is not above 0; use a larger number")
    _require(value < math.inf, key, value, "is not finite; use a smaller number")


def _not_both_zero(key: str, value: float, other_key: str, other: float) -> None:
    """Two weights: neither below 0, and one above it."""
    _at_least(key, value, 0)
    _at_least(other_key, other, 0)
    for of, weight in ((key, value), (other_key, other)):
        _require(weight < math.inf, of, weight, "is not finite; use a smaller number")
    _require(value + other > 0, key, value, f"and {other_key}={other!r} weigh nothing; raise one")


def _multiple(key: str, value: int, unit: int, why: str) -> None:
    holds = value >= 1 and value % unit == 0
    _require(holds, key, value, f"does not divide over {why}; use a multiple of {unit}")
