"""Every name, type and default of a run (Hydra structured configs).

Imports no torch, megatron or vllm. YAML under hydra_conf/ states only what an experiment
changes. A room receives its own sub-config.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """The Hugging Face folder that training starts from."""

    path: str = MISSING
    freeze_vision: bool = False
    kernels: str = "auto"  # auto | triton | torch; auto: triton on a GPU
    # Of hydra_conf/model/ (`model=NAME`): for records, and for plans before the folder is there.
    preset: str = ""


@dataclass
class PrecisionConfig:
    """What is computed in which number format. Presets are in hydra_conf/precision/
    (`precision=NAME`); here is float32.

    FP8 is for the decoder's linear layers, through Transformer Engine: on a GPU of compute
    capability 8.9 or above.
    """

    dtype: str = "float32"  # of parameters and activations: float32 | bfloat16
    fp8: str = "off"  # off | hybrid (E4M3 forward, E5M2 backward) | e4m3
    recipe: str = "tensorwise"  # how FP8 is scaled: delayed | tensorwise | blockwise
    first_last_bf16: bool = False  # the decoder's first and last layer stay in bfloat16
    fp8_params: bool = False  # layers keep their weights in FP8; the optimizer's stay in float32
    # Of rollouts: auto (as dtype) | fp8, which moves their log-probs away from the trainer's:
    # rollout.max_logprob_diff must allow it, and algorithm.tis_cap corrects for it.
    kv_cache: str = "auto"


@dataclass
class ParallelConfig:
    """Megatron's parallel sizes; data parallelism is whatever the number of processes leaves.

    `vpp_size` is the number of model chunks that each pipeline rank interleaves.
    `first_stage_layers` gives the first stage, which also holds the vision tower, fewer (or more)
    layers than the others. `recompute` trades time for activation memory: "selective" repeats core
    attention, "full" every layer and the vision tower. `recompute_vision` repeats the tower alone:
    else its activations of all images of a step are kept, about 2 MB a patch of Qwen2.5-VL's.
    """

    tp_size: int = 1
    pp_size: int = 1
    vpp_size: int = 1
    cp_size: int = 1
    ep_size: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    batch_p2p: bool = False  # pipeline sends and receives in one batched call
    recompute: str = "none"  # none | selective | full
    recompute_vision: bool = False


@dataclass
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up to `lr`, then `schedule` down to `min_lr`."""

    lr: float = MISSING
    min_lr: float = 0.0
    schedule: str = "constant"  # constant | linear | cosine
    warmup_ratio: float = 0.0  # of the optimizer's steps, rounded up
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    # Whose Adam: auto (a fused one, where there is one) | torch | transformer_engine | apex
    implementation: str = "auto"
    # auto | on | off: weights' gradients are added up in float32 by the kernel that makes them
    fused_accumulation: str = "auto"
    cpu_offload: float = 0.0  # share of the states that live, and are stepped, on the CPU


@dataclass
class LaunchConfig:
    """The machines that an experiment is made for; None = any number. Presets state theirs."""

    nodes: int | None = None
    gpus_per_node: int | None = None


@dataclass
class DataConfig:
    """A .parquet, .json or .jsonl file, or a hub id as OWNER/NAME:SPLIT, for training and held out.

    Bad rows are set aside and counted; so is a prompt longer than `max_prompt_tokens`, which is
    never cut.
    """

    train: str = MISSING
    heldout: str = MISSING
    max_prompt_tokens: int = 2048
    problem_key: str = "problem"
    answer_key: str = "answer"
    images_key: str = "images"
    system_prompt: str = ""  # put before every question, in the user's turn, as MMR1's code does
    # Of an image: smaller and larger ones are scaled before the model's own processor sees them.
    min_pixels: int = 0
    max_pixels: int = 1_048_576
    max_bad_share: float = 0.05  # of the rows of a file; above it the run stops
    cache_bytes: int = 512 << 20  # of prompts with their pixels, kept in memory by each process


@dataclass
class SamplerConfig:
    """Who is drawn next. Presets are in hydra_conf/sampler/ (`sampler=NAME`); here is "posterior".

    Lambda is `mixture_ratio`: the share of a batch that is drawn by score.
    """

    preset: str = "posterior"  # the preset's name; for records
    # posterior | refresh (the paper's Algorithm 1) | released_code: sampling/estimators.py
    estimator: str = "posterior"
    score: str = "mixed"  # of a posterior: vps | variance | mixed | calibrated
    thompson: bool = False  # of a pass rate drawn from the posterior
    power: float = 3.0  # of a posterior's score
    alpha: float = 0.8  # of OVS in the VPS
    beta: float = 0.2  # of TDS
    # self_bleu | distinct_n | edit_distance | padded_self_bleu (of released_code alone)
    diversity: str = "self_bleu"
    update_every: int = 4  # steps; at the end of each epoch besides
    scoring_rollouts: int = 0  # a prompt, for estimators that ask for them
    mixture_ratio: float = 0.5
    final_mixture_ratio: float | None = None  # reached at the last step, linearly
    with_replacement: bool = False  # inside the scored half of a batch
    floor: float = 0.05  # share of the scored draws that all prompts have alike
    # Whose prompts share a prior: record (source, image count, length) | category | global
    prior: str = "record"
    discount: float = 0.95  # of a response, a policy version
    prior_discount: float = 0.9  # of a group's share of its prior
    # Dynamic sampling (DAPO): groups without variance are dropped, and the batch is filled up by at
    # most so many further draws.
    max_refills: int = 0


@dataclass
class EngineConfig:
    """The engine, and how it samples.

    Top-p and top-k must stay off: the trainer's softmax has no counterpart.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    max_response_tokens: int = MISSING
    max_images_per_prompt: int = 1
    kv_cache_bytes: int = 256 << 20  # 0, on a GPU: what there is room for
    pixel_bytes: int = 2 << 30  # of prompts in the engine; more wait without theirs


@dataclass
class RolloutConfig(EngineConfig):
    """Rollouts for training: groups, and how far engine and trainer may differ."""

    group_size: int = 8
    tp_size: int = 1  # consecutive processes that share one engine
    # Engine and trainer take turns on the GPU: the engine sleeps while the policy trains, and
    # gradients and optimizer states are away while responses are generated.
    takes_turns: bool = True
    ignore_end: bool = False  # responses go on to max_response_tokens: for benchmarks
    max_logprob_diff: float = (
        0.01  # mean |trainer - rollout| above which the run stops; about 0.1 in bfloat16
    )


@dataclass
class RewardConfig:
    """reward = format_weight * well formed + accuracy_weight * correct - penalties.

    The paper, Table 6: both weights 1. Penalties (rewards/penalties.py) are off at 0.
    """

    format_weight: float = 1.0
    accuracy_weight: float = 1.0
    deadline_s: float = 10.0
    num_workers: int = 1
    repetition_weight: float = 0.0  # times the share of n-grams that a response had before
    repetition_ngram: int = 0
    overlong_weight: float = 0.0  # times DAPO's soft overlong penalty
    overlong_cache_tokens: int = 0  # the last ones before rollout.max_response_tokens
    # A second judge, for what the rules can't judge (rewards/judge.py): the base of an
    # OpenAI-compatible endpoint, such as http://host:8000/v1; "" = off.
    judge_url: str = ""
    judge_model: str = ""
    judge_key_env: str = ""  # the environment variable that holds its key; "" = no key
    judge_timeout_s: float = 30.0  # of one try


@dataclass
class AlgorithmConfig:
    """GRPO; every option's equation is in algorithms/grpo_loss.py. 0 leaves an option out.

    With `kl_coefficient` 0 there is no reference model and no reference pass.
    """

    advantage_scale: str = "std"  # std | none (Dr.GRPO)
    ratio: str = "token"  # token | sequence (GSPO)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # above 1 + clip_high
    tis_cap: float = 0.0  # on the ratio of the trainer's to the engine's probability
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0  # a bonus
    # token_mean | sequence_mean | fixed_length (Dr.GRPO: of rollout.max_response_tokens)
    aggregation: str = "token_mean"
    optimizer_steps_per_batch: int = 1


@dataclass
class EvaluationConfig:
    """Held-out evaluation during training; `every` 0 leaves only the first and the last."""

    every: int = 10
    samples_per_prompt: int = 1


@dataclass
class CheckpointConfig:
    """`every` 0 leaves only the last checkpoint.

    `keep_last` counts complete checkpoints; the best one is kept besides.
    """

    every: int = 10
    keep_last: int = 2


@dataclass
class GrpoConfig:
    """One GRPO run: `python -m megatron_mmr1.train`."""

    experiment: str = MISSING
    output_dir: str = "outputs"
    run: str | None = None  # the run folder's name; rank 0 makes one from the time when it is None
    resume: str = "never"  # never | auto
    replay: str | None = None  # a run folder whose rollouts/ are used in place of the engine
    seed: int = 0
    num_steps: int = MISSING
    # End rather than generate more responses, those for scoring and those discarded among them;
    # 0 = no budget.
    max_responses: int = 0
    prompts_per_step: int = MISSING
    max_tokens_per_microbatch: int = MISSING  # packed tokens of a forward pass, padding included
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class SftConfig:
    """One supervised cold start: `python -m megatron_mmr1.sft`. Writes a Hugging Face folder."""

    experiment: str = MISSING
    output_dir: str = "outputs"
    run: str | None = None
    seed: int = 0
    resume: str = "never"  # never | auto
    num_steps: int = 0  # this or num_epochs
    num_epochs: float = 0.0
    global_batch_size: int = MISSING  # conversations
    # Packed tokens of a forward pass, padding included. A demonstration that has more is set aside
    # and counted, not cut.
    max_tokens_per_microbatch: int = MISSING
    # ShareGPT records in a .json, .jsonl or .parquet file, or a hub id as OWNER/NAME:SPLIT.
    data: str = MISSING
    validation: str | None = None  # likewise; its lowest loss decides which weights are written
    validation_every: int = 50  # steps, and after the last one
    min_pixels: int = 0
    max_pixels: int = 1_048_576
    max_bad_share: float = 0.05  # of the records seen; above it the run stops
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=0))
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class EvaluateConfig:
    """Score a model on a benchmark: `python -m megatron_mmr1.evaluate`.

    Bad rows are set aside and counted; so is a prompt longer than `max_prompt_tokens`, or than the
    model's positions leave room for, which is never cut. What is None, and a response length of 0,
    depends on the benchmark (config/benchmarks.py); `rollout.kv_cache_bytes` 0 has room for eight
    of the longest sequences.
    """

    benchmark: str = "digits"  # digits | mathverse | mathvista | mathvision | logicvista | chartqa
    model: str = MISSING  # a Hugging Face folder or a Megatron checkpoint
    name: str | None = None  # what tables call the model; None: from `model`
    dtype: str = "float32"  # float32 | bfloat16
    data: str | None = None  # a file, a folder of shards, or a hub id as OWNER/NAME:SPLIT
    output: str | None = None  # a folder; None: outputs/evaluate/BENCHMARK/NAME
    seed: int = 0
    samples_per_prompt: int = 1
    max_prompt_tokens: int = 8192
    # Of an image: smaller and larger ones are scaled before the model's own processor sees them.
    min_pixels: int = 0
    max_pixels: int = 1_048_576
    max_bad_share: float = 0.05  # of the rows; above it the run stops
    rollout: EngineConfig = field(
        default_factory=lambda: EngineConfig(
            temperature=0.0, max_response_tokens=0, kv_cache_bytes=0
        )
    )
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class ParityConfig:
    """One model and layout against Hugging Face: `python tools/check_parity.py --hf DIR`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dp_size: int = 1
    max_tokens_per_microbatch: int = 512
