"""The command line, the checks of a config, and the run folder. Nothing here imports torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from published import PUBLISHED

from megatron_mmr1 import cli
from megatron_mmr1.config.layout import (
    ModelSizes,
    check_layout,
)
from megatron_mmr1.config.model_folder import check_model_folder
from megatron_mmr1.config.run_dir import new_run_name, open_run_dir
from megatron_mmr1.config.schema import EvaluateConfig, GrpoConfig, ParallelConfig, SftConfig
from megatron_mmr1.config.validate import (
    check_module,
    is_hub_id,
    validate,
    validate_evaluate,
    validate_sft,
)

TEXT_CONFIG = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty files of the right names: a model folder and a data set. Read only: it is shared."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        (folder / "model" / name).touch()
    (folder / "model" / "config.json").write_text(json.dumps({"text_config": TEXT_CONFIG}))
    (folder / "data.parquet").touch()
    return folder


def grpo(files: Path, *overrides: str) -> GrpoConfig:
    data, model = files / "data.parquet", files / "model"
    paths = [f"data.train={data}", f"data.heldout={data}", f"model.path={model}"]
    return cli.load_config(GrpoConfig, "experiment", [*paths, *overrides])


@pytest.fixture(scope="module")
def digits(files: Path) -> GrpoConfig:
    """The valid digits experiment, composed once: composing takes a while."""
    return grpo(files)


def sft(files: Path, *overrides: str) -> SftConfig:
    paths = [f"data={files / 'data.parquet'}", f"model.path={files / 'model'}"]
    return cli.load_config(SftConfig, "sft_experiment", [*paths, *overrides])


def evaluation(files: Path, *overrides: str) -> EvaluateConfig:
    paths = [f"data={files / 'data.parquet'}", f"model={files / 'model'}"]
    return cli.load_config(EvaluateConfig, "evaluate", [*paths, *overrides])


def message_of(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    return str(caught.value)


def model_of(experiment: str, files: Path) -> tuple[Path, int, int]:
    """The folder of the model that an experiment is for, by its published sizes; ranks; nodes."""
    size = re.fullmatch(r"mmr1_(\d+b)_\w+_(\d+)xh100", experiment)
    if size is None:
        return files / "model", 1, 1
    folder = files / size[1]
    if not folder.exists():
        shutil.copytree(files / "model", folder)
        config = PUBLISHED[f"Qwen2.5-VL-{size[1].upper()}"].config
        (folder / "config.json").write_text(json.dumps(config))
    return folder, int(size[2]), int(size[2]) // 8


@pytest.mark.parametrize("name", cli.experiments("experiment"))
def test_every_grpo_experiment_composes_and_is_valid(files: Path, name: str):
    model, world_size, num_nodes = model_of(name, files)
    config = grpo(files, f"experiment={name}", f"model.path={model}")
    assert config.experiment == name
    validate(config, world_size, num_nodes)


@pytest.mark.parametrize("name", cli.experiments("sft_experiment"))
def test_every_cold_start_composes_and_is_valid(files: Path, name: str):
    model, world_size, num_nodes = model_of(name, files)
    config = sft(files, f"experiment={name}", f"model.path={model}")
    assert config.experiment == name
    validate_sft(config, world_size, num_nodes)


@pytest.mark.parametrize("size", ["3b", "7b", "32b"])
@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_mmr1s_experiments_have_the_papers_values(files: Path, size: str, gpus: int):
    """Tables 5 and 6, on any number of GPUs; and the other two sources of the sampler's
    settings.
    """
    cold = sft(files, f"experiment=mmr1_{size}_sft_{gpus}xh100")
    assert (cold.num_epochs, cold.global_batch_size) == (3, 32)
    assert cold.max_tokens_per_microbatch == 16384
    optimizer = cold.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio) == (1e-5, "cosine", 0.1)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0, 1)
    name = f"experiment=mmr1_{size}_vas_{gpus}xh100"
    config = grpo(files, name)
    rollout, data, algorithm = config.rollout, config.data, config.algorithm
    assert (config.prompts_per_step, rollout.group_size, rollout.temperature) == (512, 8, 0.6)
    assert (data.max_prompt_tokens, rollout.max_response_tokens) == (2048, 4096)
    assert (data.min_pixels, data.max_pixels) == (7056, 1048576)
    assert (algorithm.kl_coefficient, algorithm.clip_low, algorithm.clip_high) == (0.01, 0.2, 0.2)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.01)
    assert (config.reward.format_weight, config.reward.accuracy_weight) == (1, 1)
    assert (config.precision.dtype, cold.precision.dtype) == ("bfloat16", "bfloat16")
    found = {
        (s.preset, s.scoring_rollouts, s.update_every, s.alpha, s.beta, s.mixture_ratio)
        for s in (
            config.sampler,
            grpo(files, name, "sampler=paper_section_6_1").sampler,
            grpo(files, name, "sampler=released_code").sampler,
        )
    }
    assert found == {
        ("paper_table_6", 16, 56, 0.8, 0.2, 0.5),
        ("paper_section_6_1", 32, 35, 0.8, 0.2, 0.5),
        ("released_code", 8, 4, 1.0, 0.0, 0.5),
    }


def test_the_evaluation_composes_and_is_valid_greedily_too(files: Path):
    validate_evaluate(evaluation(files))
    validate_evaluate(evaluation(files, "rollout.temperature=0"))


def test_an_experiment_states_only_its_difference_and_the_command_line_wins(files: Path):
    vas, uniform = grpo(files), grpo(files, "experiment=digits_uniform", "optimizer.lr=1")
    assert (vas.sampler.preset, uniform.sampler.preset) == ("posterior", "uniform")
    assert uniform.optimizer.lr == 1.0
    assert type(uniform.optimizer.lr) is float
    same = replace(uniform, experiment="digits", sampler=vas.sampler, optimizer=vas.optimizer)
    assert same == vas


# Arguments, then what the message must hold: key with value, and remedy.
COMMAND_LINE_FAULTS = [
    (["experiment=nope"], "experiment='nope'", "digits, digits_uniform"),
    (["rollout.group_sise=4"], "rollout.group_sise=4", "did you mean rollout.group_size"),
    (["group_size=4"], "group_size=4", "did you mean rollout.group_size"),
    (["rolout.group_size=4"], "rolout.group_size=4", "did you mean rollout.group_size"),
    (["sft_experiment=digits"], "sft_experiment=digits", "did you mean experiment"),
    (["zzz=4"], "zzz=4", "--help"),
    (["rollout={zzz:4}"], "rollout.zzz", "--help"),
    (["num_steps=many"], "num_steps='many'", "int"),
    (["num_steps=1.5"], "num_steps=1.5", "int"),
    (["num_steps=null"], "num_steps=null", "int"),
    (["optimizer.lr=fast"], "optimizer.lr='fast'", "float"),
    (["optimizer=5"], "optimizer=5", "optimizer.lr=VALUE"),
    (["model=DIR"], "model='DIR'", "model.path=VALUE"),
    (["parallel=tp3"], "parallel='tp3'", "tp2_sp"),
    (["optimizer.lr=???"], "optimizer.lr=???", "add optimizer.lr=VALUE"),
    (["optimizer.lr=${nope}"], "optimizer.lr", "give a plain value"),
    (["+new=1"], "'+new=1'", "key=value"),
    (["~seed"], "'~seed'", "key=value"),
    (["--multirun"], "'--multirun'", "--help"),
    (["seed"], "'seed'", "key=value"),
    (["seed=1,2"], "seed=1,2", "quote"),
    (["run=a=b"], "run=a=b", "quote"),
    (["run=[a"], "run=[a", "quote"),
    (["hydra.run.dir=x"], "'hydra.run.dir=x'", "remove"),
]


@pytest.mark.parametrize(("arguments", "key_and_value", "remedy"), COMMAND_LINE_FAULTS)
def test_a_bad_command_line_gives_key_value_and_remedy(
    arguments: list[str], key_and_value: str, remedy: str
):
    message = message_of(cli.load_config, GrpoConfig, "experiment", arguments)
    assert key_and_value in message
    assert remedy in message


def test_a_required_key_without_value_is_named():
    message = message_of(cli.load_config, EvaluateConfig, "evaluate", [])
    assert message == "model=???: required and not set; add model=VALUE"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout: {group_sise: 3}", "rollout.group_sise is unknown (in experiment/own.yaml)"),
        ("seed: abc", "seed='abc' is of the wrong type (in experiment/own.yaml)"),
        ("seed: [1", "own.yaml"),
        ("defaults: [nope, _self_]", "nope"),
    ],
)
def test_a_fault_in_an_experiment_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    monkeypatch.setattr(cli, "CONF_DIR", tmp_path)
    assert expected in message_of(cli.load_config, GrpoConfig, "experiment", ["experiment=own"])


# One override of the valid digits experiment, the message's start, and its remedy.
GRPO_FAULTS = [
    ("rollout.group_size=1", "rollout.group_size=1 ", "use 2 or more"),
    ("prompts_per_step=0", "prompts_per_step=0 ", "use a multiple of 1"),
    ("max_tokens_per_microbatch=0", "max_tokens_per_microbatch=0 ", "use a multiple of 1, as 96"),
    ("max_tokens_per_microbatch=95", "max_tokens_per_microbatch=95 ", "use 96 or more"),
    ("parallel.tp_size=0", "parallel.tp_size=0 ", "use 1 or more"),
    ("parallel.tp_size=3", "parallel.tp_size=3 ", "use 1, 2, 4 or 8"),
    ("parallel.tp_size=2", "parallel.tp_size=2 ", "1 are running; start a multiple of 2"),
    ("parallel.sequence_parallel=true", "parallel.sequence_parallel=True ", "tp_size=2 or more"),
    ("parallel.pp_size=3", "parallel.pp_size=3 ", "use 1, 2 or 4, or set"),
    ("parallel.vpp_size=2", "parallel.vpp_size=2 ", "pp_size=2 or more"),
    ("parallel={pp_size: 2, vpp_size: 3}", "parallel.pp_size=2 ", "lower parallel.vpp_size"),
    (
        "parallel={pp_size: 2, vpp_size: 2, batch_p2p: true}",
        "parallel.batch_p2p=True with pp_size=2 ",
        "use batch_p2p=false",
    ),
    (
        "parallel={pp_size: 2, first_stage_layers: 4}",
        "parallel.first_stage_layers=4 ",
        "use 1, 2 or 3",
    ),
    ("parallel.ep_size=2", "parallel.ep_size=2 ", "use 1"),
    ("parallel.recompute=some", "parallel.recompute='some' ", "none or selective or full"),
    ("optimizer.cpu_offload=1.5", "optimizer.cpu_offload=1.5 ", "use 0 to 1"),
    (
        "optimizer.implementation=adamw",
        "optimizer.implementation='adamw' ",
        "auto or torch or transformer_engine or apex",
    ),
    ("optimizer.fused_accumulation=yes", "optimizer.fused_accumulation='", "auto or on or off"),
    ("rollout.tp_size=2", "rollout.tp_size=2 ", "use 1"),
    ("rollout.tp_size=0", "rollout.tp_size=0 ", "use 1 or more"),
    ("rollout.kv_cache_bytes=-1", "rollout.kv_cache_bytes=-1 ", "use 0 or more"),
    (
        "rollout={kv_cache_bytes: 0, takes_turns: false}",
        "rollout.kv_cache_bytes=0 ",
        "takes_turns=true",
    ),
    ("rollout.top_p=0.9", "rollout.top_p=0.9 ", "use 1.0"),
    ("rollout.top_k=5", "rollout.top_k=5 ", "use 0"),
    ("rollout.temperature=0", "rollout.temperature=0.0 ", "use a larger"),
    ("rollout.temperature=nan", "rollout.temperature=nan ", "use a larger"),
    ("rollout.max_response_tokens=0", "rollout.max_response_tokens=0 ", "use 1 or more"),
    ("algorithm.clip_low=0", "algorithm.clip_low=0.0 ", "below 1"),
    ("algorithm.clip_low=1", "algorithm.clip_low=1.0 ", "below 1"),
    ("algorithm.clip_high=0", "algorithm.clip_high=0.0 ", "use a larger"),
    ("algorithm.kl_coefficient=-1", "algorithm.kl_coefficient=-1.0 ", "use 0 or more"),
    ("algorithm.aggregation=sum", "algorithm.aggregation='sum' ", "fixed_length"),
    ("algorithm.advantage_scale=mad", "algorithm.advantage_scale='mad' ", "std or none"),
    ("algorithm.ratio=prompt", "algorithm.ratio='prompt' ", "token or sequence"),
    ("algorithm.dual_clip=1.1", "algorithm.dual_clip=1.1 ", "1 + algorithm.clip_high"),
    ("algorithm.tis_cap=-1", "algorithm.tis_cap=-1.0 ", "use 0 or more"),
    ("algorithm.entropy_coefficient=-1", "algorithm.entropy_coefficient=-1.0 ", "use 0 or more"),
    ("model.kernels=cuda", "model.kernels='cuda' ", "auto or triton or torch"),
    ("algorithm.optimizer_steps_per_batch=0", "algorithm.optimizer_steps_per_batch=0 ", "use 1"),
    ("algorithm.optimizer_steps_per_batch=3", "prompts_per_step=32 ", "use a multiple of 3"),
    ("sampler.estimator=vas", "sampler.estimator='vas' ", "posterior or refresh or released_code"),
    ("sampler.score=ovs", "sampler.score='ovs' ", "vps or variance or mixed or calibrated"),
    ("sampler.prior=source", "sampler.prior='source' ", "record or category or global"),
    ("sampler.diversity=bleu", "sampler.diversity='bleu' ", "self_bleu or distinct_n or edit_dist"),
    (
        "sampler.diversity=padded_self_bleu",
        "sampler.diversity='padded_self_bleu' ",
        "use self_bleu",
    ),
    ("sampler.mixture_ratio=1.5", "sampler.mixture_ratio=1.5 ", "use 0 to 1"),
    ("sampler.mixture_ratio=nan", "sampler.mixture_ratio=nan ", "use 0 to 1"),
    ("sampler.final_mixture_ratio=-1", "sampler.final_mixture_ratio=-1.0 ", "use 0 to 1"),
    ("sampler.floor=1.1", "sampler.floor=1.1 ", "use 0 to 1"),
    ("sampler.discount=0", "sampler.discount=0.0 ", "use 0.95"),
    ("sampler.discount=1.01", "sampler.discount=1.01 ", "use 0.95"),
    ("sampler.prior_discount=0", "sampler.prior_discount=0.0 ", "at most 1"),
    ("sampler.power=0", "sampler.power=0.0 ", "use a larger"),
    ("sampler.max_refills=-1", "sampler.max_refills=-1 ", "use 0 or more"),
    ("sampler.scoring_rollouts=8", "sampler.scoring_rollouts=8 ", "use 0"),
    ("sampler.estimator=refresh", "sampler.scoring_rollouts=0 ", "use 2 or more"),
    (
        "sampler={estimator: released_code, scoring_rollouts: 1}",
        "sampler.scoring_rollouts=1 ",
        "use 2 or more",
    ),
    (
        "sampler={thompson: true, score: calibrated}",
        "sampler.thompson=True ",
        "use vps, variance or mixed",
    ),
    ("sampler.alpha=-1", "sampler.alpha=-1.0 ", "use 0 or more"),
    ("sampler.alpha=.inf", "sampler.alpha=inf ", "smaller"),
    ("sampler.power=.inf", "sampler.power=inf ", "smaller"),
    (
        "sampler={estimator: released_code, scoring_rollouts: 8}",
        "sampler.with_replacement=False ",
        "use true",
    ),
    ("sampler={estimator: refresh, scoring_rollouts: 8}", "sampler.score='mixed' ", "use vps"),
    (
        "sampler={estimator: refresh, scoring_rollouts: 8, score: vps, power: 1, discount: 0.5}",
        "sampler.discount=0.5 ",
        "use 0.95",
    ),
    ("sampler={alpha: 0, beta: 0}", "sampler.alpha=0.0 and sampler.beta=0.0 ", "raise one"),
    ("sampler.update_every=0", "sampler.update_every=0 ", "use 1 or more"),
    ("precision.dtype=float16", "precision.dtype='float16' ", "float32 or bfloat16"),
    ("model.path=nowhere", "model.path='nowhere' ", "megatron_mmr1.sft"),
    ("optimizer.schedule=step", "optimizer.schedule='step' ", "constant or linear or cosine"),
    ("optimizer.lr=0", "optimizer.lr=0.0 ", "above 0"),
    ("optimizer.min_lr=1", "optimizer.min_lr=1.0 ", "range"),
    ("optimizer.warmup_ratio=-1", "optimizer.warmup_ratio=-1.0 ", "use 0 to below 1"),
    ("optimizer.warmup_ratio=1", "optimizer.warmup_ratio=1.0 ", "use 0 to below 1"),
    ("data.min_pixels=-1", "data.min_pixels=-1 ", "use 0 or more"),
    ("data={min_pixels: 100, max_pixels: 99}", "data.max_pixels=99 ", "larger"),
    ("data.max_bad_share=2", "data.max_bad_share=2.0 ", "use 0 to 1"),
    ("data.problem_key=''", "data.problem_key='' ", "names no column"),
    ("optimizer.beta2=1", "optimizer.beta2=1.0 ", "below 1"),
    ("num_steps=0", "num_steps=0 ", "use 1 or more"),
    ("seed=-1", "seed=-1 ", "use 0 or more"),
    ("replay=nowhere", "replay='nowhere' ", "outputs/EXPERIMENT/RUN"),
    ("resume=always", "resume='always' ", "never or auto"),
    ("resume=auto", "resume='auto' ", "add run=NAME"),
    ("run=../x", "run='../x' ", "without slashes"),
    ("run=.x", "run='.x' ", "without slashes"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0 ", "use 1 or more"),
    ("evaluation.every=-1", "evaluation.every=-1 ", "use 0 or more"),
    ("reward.deadline_s=0", "reward.deadline_s=0.0 ", "use a larger"),
    ("reward.num_workers=0", "reward.num_workers=0 ", "use 1 or more"),
    ("reward.format_weight=-1", "reward.format_weight=-1.0 ", "use 0 or more"),
    ("reward={format_weight: 0, accuracy_weight: 0}", "reward.format_weight=0.0 and ", "raise one"),
    ("reward.repetition_weight=-1", "reward.repetition_weight=-1.0 ", "use 0 or more"),
    ("reward.repetition_weight=1", "reward.repetition_ngram=0 ", "set it"),
    ("reward.repetition_ngram=3", "reward.repetition_ngram=3 ", "raise that or remove this"),
    ("reward.overlong_weight=1", "reward.overlong_cache_tokens=0 ", "set it"),
    (
        "reward={overlong_weight: 1, overlong_cache_tokens: 999999}",
        "reward.overlong_cache_tokens=999999 ",
        "from 1 to rollout.max_response_tokens",
    ),
    ("reward.overlong_cache_tokens=9", "reward.overlong_cache_tokens=9 ", "remove this"),
    ("reward.judge_model=m", "reward.judge_model='m' ", "remove this"),
    ("reward.judge_key_env=NO_SUCH", "reward.judge_key_env='NO_SUCH' ", "remove this"),
    ("reward.judge_url=ftp://x", "reward.judge_url='ftp://x' ", "use one like"),
    ("reward.judge_url=http://x/v1", "reward.judge_model='' ", "give the name"),
    (
        "reward={judge_url: 'http://x/v1', judge_model: m, judge_key_env: NO_SUCH_KEY}",
        "reward.judge_key_env='NO_SUCH_KEY' ",
        "export it",
    ),
    ("reward.judge_timeout_s=0", "reward.judge_timeout_s=0.0 ", "use a larger"),
    ("data.train=nowhere", "data.train='nowhere' ", "megatron_mmr1.data.digits"),
    ("data.heldout=nowhere", "data.heldout='nowhere' ", "megatron_mmr1.data.digits"),
]


@pytest.mark.parametrize(("override", "start", "remedy"), GRPO_FAULTS)
def test_a_bad_grpo_setting_gives_key_value_and_remedy(
    digits: GrpoConfig, override: str, start: str, remedy: str
):
    config = OmegaConf.merge(OmegaConf.structured(digits), OmegaConf.from_dotlist([override]))
    message = message_of(validate, OmegaConf.to_object(config), 1)
    assert message.startswith(start)
    assert remedy in message


@pytest.mark.parametrize("name", [path.stem for path in (cli.CONF_DIR / "sampler").iterdir()])
def test_every_sampler_preset_composes_and_is_valid(files: Path, name: str):
    config = grpo(files, f"sampler={name}")
    assert config.sampler.preset == name
    validate(config, world_size=1)


def test_a_layout_must_fit_the_processes_and_the_lengths(files: Path):
    layout = ["parallel.tp_size=2", "parallel.sequence_parallel=true", "parallel.cp_size=2"]
    message = message_of(validate, grpo(files, *layout), 6)
    assert "= 4 processes hold one copy of the model, and 6 are running" in message
    validate(grpo(files, *layout), 8)
    uneven = grpo(files, *layout, "max_tokens_per_microbatch=1001")
    assert message_of(validate, uneven, 8).startswith("max_tokens_per_microbatch=1001 does not")
    assert message_of(validate, uneven, 8).endswith("use a multiple of 8, as 1000")
    validate(grpo(files, "prompts_per_step=7"), 3)  # nothing has to divide over ranks
    uneven = sft(files, *layout, "max_tokens_per_microbatch=1001")
    assert message_of(validate_sft, uneven, 4).endswith("use a multiple of 8, as 1000")
    validate(grpo(files, "rollout.tp_size=4"), 8)
    assert message_of(validate, grpo(files, "rollout.tp_size=3"), 3).endswith("use 1")


EXPERTS = ModelSizes(8, 2, 8, 256, 8, num_experts=4)
DEEPSTACK = ModelSizes(8, 2, 8, 256, 8, 0, num_deepstack_layers=3)


@pytest.mark.parametrize(
    ("sizes", "layout", "world_size", "start", "remedy"),
    [
        (EXPERTS, {"ep_size": 3}, 6, "parallel.ep_size=3 ", "use 1 or 2"),
        (EXPERTS, {"ep_size": 4, "pp_size": 2}, 4, "parallel.ep_size=4 ", "use 1 or 2"),
        (EXPERTS, {"tp_size": 2}, 2, "parallel.tp_size=2 ", "use sequence_parallel=true"),
        (DEEPSTACK, {"pp_size": 4}, 4, "parallel.pp_size=4 ", "first_stage_layers=3 or more"),
        (
            DEEPSTACK,
            {"pp_size": 2, "vpp_size": 2},
            2,
            "parallel.pp_size=2 with vpp_size=2",
            "first_stage_layers=6 or more",
        ),
    ],
)
def test_a_layout_must_fit_experts_and_deepstack(
    sizes: ModelSizes, layout: dict[str, int], world_size: int, start: str, remedy: str
):
    message = message_of(check_layout, ParallelConfig(**layout), sizes, world_size)  # type: ignore[arg-type]
    assert message.startswith(start)
    assert remedy in message


def test_layouts_that_fit_experts_and_deepstack():
    check_layout(ParallelConfig(ep_size=4), EXPERTS, 8)
    check_layout(ParallelConfig(tp_size=2, sequence_parallel=True, ep_size=2), EXPERTS, 2)
    check_layout(ParallelConfig(pp_size=2), DEEPSTACK, 2)
    check_layout(ParallelConfig(pp_size=4, first_stage_layers=5), DEEPSTACK, 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "is not JSON"), ("{}", "has no num_attention_heads")],
)
def test_a_model_whose_sizes_cannot_be_read_is_refused(
    files: Path, tmp_path: Path, text: str, reason: str
):
    shutil.copytree(files / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    config = grpo(files, f"model.path={tmp_path / 'model'}")
    assert reason in message_of(validate, config, 1)


@pytest.mark.parametrize(
    ("override", "start", "remedy"),
    [
        ("benchmark=nope", "benchmark='nope' ", "use digits"),
        ("dtype=float16", "dtype='float16' ", "float32 or bfloat16"),
        ("samples_per_prompt=0", "samples_per_prompt=0 ", "use 1 or more"),
        ("rollout.temperature=-1", "rollout.temperature=-1.0 ", "use 0 or more"),
        ("rollout.kv_cache_bytes=-1", "rollout.kv_cache_bytes=-1 ", "use 0 or more"),
        ("rollout.top_p=0.9", "rollout.top_p=0.9 ", "use 1.0"),
        ("rollout.top_k=5", "rollout.top_k=5 ", "use 0"),
        ("data=nowhere", "data='nowhere' ", "megatron_mmr1.data.digits"),
        ("model=nowhere", "model='nowhere' ", "give a local Hugging Face folder"),
    ],
)
def test_a_bad_evaluation_setting_gives_key_value_and_remedy(
    files: Path, override: str, start: str, remedy: str
):
    message = message_of(validate_evaluate, evaluation(files, override))
    assert message.startswith(start)
    assert remedy in message


def test_an_incomplete_model_folder_names_what_it_lacks(tmp_path: Path):
    for name, content, lacking in [
        ("config.json", '{"vision_config": {}}', "config.json"),
        ("tokenizer.json", "", "tokenizer.json or vocab.json"),
        ("preprocessor_config.json", "", "preprocessor_config.json"),
        ("model.safetensors", "", "neither model.safetensors"),
    ]:
        assert lacking in message_of(check_model_folder, tmp_path)
        (tmp_path / name).write_text(content)
    check_model_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert "has no processor" in message_of(check_model_folder, tmp_path)
    (tmp_path / "config.json").write_text("{}")  # a model of text alone needs none
    check_model_folder(tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors" in message_of(check_model_folder, tmp_path)


@pytest.mark.parametrize("module", ["no_such_module", "no_such_parent.core", "json.no_such"])
def test_a_module_that_is_not_installed_is_named(module: str):
    message = message_of(check_module, module)
    assert module in message
    assert "make setup" in message


def test_a_run_folder_records_the_config_and_is_taken_once(files: Path, tmp_path: Path):
    config = grpo(files, f"output_dir={tmp_path}", "optimizer.lr=1e-5")
    run_dir = open_run_dir(config, "first")
    assert run_dir == tmp_path / "digits" / "first"
    assert "lr: 1.0e-05" in (run_dir / "config.yaml").read_text()
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    assert open_run_dir(config, "first") == run_dir  # refused before its first record: once more
    other = replace(config, seed=7)
    assert "is another run's and differs: seed=7 here" in message_of(open_run_dir, other, "first")
    (run_dir / "metrics.jsonl").touch()
    message = message_of(open_run_dir, config, "first")
    assert message.startswith("run='first'")
    assert "resume=auto" in message
    offloading = replace(config, optimizer=replace(config.optimizer, cpu_offload=1.0))
    message = message_of(open_run_dir, offloading, "first")
    assert "resume=auto" not in message and "convert the weights" in message
    assert open_run_dir(config, "second") == tmp_path / "digits" / "second"
    cold = sft(files, f"output_dir={tmp_path}")
    cold_dir = open_run_dir(cold, "first")
    assert cold_dir == tmp_path / "digits_sft" / "first"
    (cold_dir / "metrics.jsonl").touch()
    assert "resume=auto" in message_of(open_run_dir, cold, "first")


@pytest.mark.parametrize(
    "name", [name for name in cli.experiments("experiment") if "_vas_" in name]
)
def test_mmr1s_rl_starts_from_what_its_cold_start_writes(files: Path, name: str, tmp_path: Path):
    cold_name = name.replace("_vas_", "_sft_")
    cold = replace(sft(files, f"experiment={cold_name}"), output_dir=str(tmp_path))
    path = f"data.heldout={files / 'data.parquet'}"
    config = cli.load_config(GrpoConfig, "experiment", [f"experiment={name}", path])
    written = open_run_dir(cold, "main") / "hf"
    assert Path(config.model.path) == Path("outputs") / written.relative_to(tmp_path)


def test_more_bad_rows_may_be_allowed_on_resuming_but_not_another_filter(
    files: Path, tmp_path: Path
):
    """A cold start sets aside what is longer than a micro-batch: another length, other draws."""
    first = replace(sft(files), output_dir=str(tmp_path))
    open_run_dir(first, "a")
    again = replace(first, resume="auto", run="a", max_bad_share=0.2)
    assert open_run_dir(again, "a") == tmp_path / "digits_sft" / "a"
    other = replace(again, max_tokens_per_microbatch=first.max_tokens_per_microbatch + 8)
    assert "max_tokens_per_microbatch" in message_of(open_run_dir, other, "a")


def test_hub_ids_may_hold_dots():
    assert is_hub_id("MMR1/MMR1-RL:train@v1.0") and is_hub_id("org/llava-1.5-data:train")
    assert not is_hub_id("data/train.parquet") and not is_hub_id("nowhere/train.jsonl")


def test_resuming_needs_the_saved_config(files: Path, tmp_path: Path):
    # An output folder spelled differently, and resume itself, are no difference.
    first = grpo(files, f"output_dir={tmp_path}", "optimizer.lr=1e-5")
    run_dir = open_run_dir(first, "20260131")  # made from the time: config.run was None
    again = replace(first, output_dir=f"{tmp_path}/.", resume="auto", run="20260131")
    assert open_run_dir(again, "20260131") == run_dir
    laid_anew = replace(again, parallel=ParallelConfig(tp_size=2), max_tokens_per_microbatch=128)
    assert open_run_dir(laid_anew, "20260131") == run_dir
    smaller = replace(again.rollout, kv_cache_bytes=1 << 20, takes_turns=False)
    assert open_run_dir(replace(again, rollout=smaller), "20260131") == run_dir
    other = replace(again, seed=7, sampler=replace(again.sampler, score="vps"))
    message = message_of(open_run_dir, other, "20260131")
    assert "differs: sampler.score=vps here, mixed there; seed=7 here, 0 there;" in message
    assert "another run=" in message
    (run_dir / "config.yaml").rename(run_dir / "config.txt")
    assert "has no config.yaml" in message_of(open_run_dir, again, "20260131")


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "/a", "a\\b", "a\nb"])
def test_only_plain_folder_names_are_taken(files: Path, tmp_path: Path, name: str):
    config = grpo(files, f"output_dir={tmp_path}")
    assert message_of(open_run_dir, config, name).startswith("run=")
    renamed = replace(config, experiment=name)
    assert message_of(open_run_dir, renamed, "x").startswith("experiment=")
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_name_is_a_time_that_the_command_line_takes_back(files: Path):
    name = new_run_name()
    assert re.fullmatch(r"\d{8}-\d{6}", name)
    assert grpo(files, f"run={name}").run == name


PROGRAM = """
import sys
from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.config.validate import validate

def main():
    config = load_config(GrpoConfig, "experiment", sys.argv[1:])
    if config.run == "library":
        import json
        json.loads("{")
    validate(config, world_size=1)

try:
    run_main(main)
finally:
    heavy = {"torch", "megatron", "vllm", "transformers", "numpy"} & set(sys.modules)
    assert not heavy, heavy
"""


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(cli.CONF_DIR.parent)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_users_fault_is_one_line_and_exit_status_2(tmp_path: Path):
    faults = [
        ("experiment=nope", "error: experiment='nope' is unknown; use one of: digits"),
        ("num_stepz=3", "error: num_stepz=3 is unknown; did you mean num_steps"),
        (
            "num_steps=many",
            "error: num_steps='many' is of the wrong type; give a value of type int",
        ),
        ("num_steps=0", "error: num_steps=0 is too small; use 1 or more"),
    ]
    processes = [start(tmp_path, argument) for argument, _ in faults]
    for process, (_, expected) in zip(processes, faults, strict=True):
        output, errors = process.communicate()
        assert process.returncode == 2
        assert errors.startswith(expected)
        assert errors.count("\n") == 1
        assert output == ""
    assert list(tmp_path.iterdir()) == []  # hydra wrote nothing


def test_a_valueerror_of_a_library_keeps_its_traceback(tmp_path: Path):
    process = start(tmp_path, "run=library")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith("Traceback")


def test_rank_0_speaks_first_and_a_rank_alone_with_its_fault_speaks_too(tmp_path: Path):
    rank_0 = start(tmp_path, "num_steps=0", RANK="0")
    rank_1 = start(tmp_path, "num_steps=0", RANK="1")
    assert rank_0.communicate()[1].count("\n") == 1
    assert rank_1.poll() is None  # torchrun would end it now, before it has said anything
    assert rank_1.communicate()[1].startswith("error on rank 1: num_steps=0")
    assert (rank_0.returncode, rank_1.returncode) == (2, 2)


def test_help_shows_the_experiments_and_every_default(tmp_path: Path):
    process = start(tmp_path, "--help", "experiment=digits_uniform")
    on_rank_1 = start(tmp_path, "--help", RANK="1")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "experiments: digits, digits_uniform, mmr1_" in output and "(default: digits)" in output
    assert "experiment: digits_uniform\n" in output
    assert "  preset: uniform\n" in output
    assert on_rank_1.communicate() == ("", "")
