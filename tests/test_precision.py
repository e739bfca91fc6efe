"""`precision.*`: what is refused, the presets, and the padding that FP8 asks for."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib.util import find_spec

import pytest

from megatron_mmr1 import cli
from megatron_mmr1.backend.cost import StepCost
from megatron_mmr1.backend.plan import Packing, SampleSize, padded_lengths, plan_step
from megatron_mmr1.config import precision as checks
from megatron_mmr1.config.layout import ModelSizes, check_max_tokens, total_multiple
from megatron_mmr1.config.schema import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    SftConfig,
)

FP8 = PrecisionConfig("bfloat16", "hybrid")
PRESETS = sorted(path.stem for path in (cli.CONF_DIR / "precision").iterdir())
SIZES_72B = ModelSizes(64, 8, 80, 29568, 16, 0)
COST = StepCost(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1)
SEQUENCES = ParallelConfig(tp_size=2, cp_size=2, sequence_parallel=True)


@pytest.fixture
def has_transformer_engine(monkeypatch: pytest.MonkeyPatch):
    """The checks look for the module, and import nothing."""
    monkeypatch.setattr(checks, "find_spec", lambda name: object())


def refusal(config: PrecisionConfig, has_rollouts: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        checks.check_precision(config, has_rollouts)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "start", "remedy"),
    [
        (PrecisionConfig("float16"), "precision.dtype='float16' ", "float32 or bfloat16"),
        (PrecisionConfig(fp8="bogus"), "precision.fp8='bogus' ", "off or hybrid or e4m3"),
        (replace(FP8, recipe="mxfp8"), "precision.recipe='mxfp8' ", "delayed or tensorwise"),
        (PrecisionConfig(kv_cache="int8"), "precision.kv_cache='int8' ", "auto or fp8"),
        (PrecisionConfig(fp8="hybrid"), "precision.fp8='hybrid' needs ", "dtype=bfloat16"),
        (PrecisionConfig(first_last_bf16=True), "precision.first_last_bf16=True ", "use false"),
        (PrecisionConfig(fp8_params=True), "precision.fp8_params=True ", "use false"),
        (
            replace(FP8, recipe="delayed", first_last_bf16=True),
            "precision.first_last_bf16=True with precision.recipe='delayed'",
            "recipe=tensorwise",
        ),
        (
            replace(FP8, recipe="delayed", fp8_params=True),
            "precision.fp8_params=True with precision.recipe='delayed'",
            "recipe=tensorwise",
        ),
    ],
)
def test_what_contradicts_itself_gives_key_value_and_remedy(
    has_transformer_engine, config: PrecisionConfig, start: str, remedy: str
):
    message = refusal(config)
    assert message.startswith(start)
    assert remedy in message


def test_what_fits_together_is_accepted(has_transformer_engine):
    for config in (
        FP8,
        replace(FP8, first_last_bf16=True, fp8_params=True),
        replace(FP8, recipe="delayed"),
        replace(FP8, fp8="e4m3", recipe="blockwise", fp8_params=True),
        PrecisionConfig(kv_cache="fp8"),
    ):
        checks.check_precision(config, has_rollouts=True)


def test_a_cache_of_rollouts_is_refused_where_there_are_none():
    assert "there are none; use auto" in refusal(PrecisionConfig(kv_cache="fp8"), False)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed here")
def test_fp8_without_transformer_engine_is_refused():
    message = refusal(FP8)
    assert message.startswith("precision.fp8='hybrid' needs the module transformer_engine")
    assert "requirements-cuda.txt" in message


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_states_every_key(has_transformer_engine, name: str):
    other = "fp8" if name == "fp8_blockwise" else "fp8_blockwise"
    once = cli.load_config(SftConfig, "sft_experiment", [f"precision={name}"]).precision
    twice = ["precision=" + other, "precision=" + name]
    assert cli.load_config(SftConfig, "sft_experiment", twice).precision == once
    checks.check_precision(once)
    text = (cli.CONF_DIR / "precision" / f"{name}.yaml").read_text()
    assert {f"{field.name}:" for field in fields(PrecisionConfig)} <= set(text.split())


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="precision='fp9' is unknown; use one of: bf16, float32"):
        cli.load_config(SftConfig, "sft_experiment", ["precision=fp9"])


@pytest.mark.parametrize(
    ("precision", "multiple"),
    [
        (PrecisionConfig(), 8),
        (PrecisionConfig("bfloat16"), 8),
        (FP8, 16 * 2 * 2),
        (replace(FP8, recipe="delayed"), 16 * 2 * 2),
        (replace(FP8, recipe="blockwise"), 128 * 2 * 2),
    ],
)
def test_tokens_of_a_micro_batch_divide_into_what_each_rank_needs(precision, multiple: int):
    """2 context-parallel ranks, whose tokens 2 tensor-parallel ranks share."""
    assert total_multiple(SEQUENCES, precision) == multiple
    assert total_multiple(replace(SEQUENCES, sequence_parallel=False), precision) == multiple // 2
    with pytest.raises(ValueError, match=f"use a multiple of {multiple}, as "):
        check_max_tokens(SEQUENCES, 8 * multiple + 4, 1, "why", precision)
    check_max_tokens(SEQUENCES, 8 * multiple, 1, "why", precision)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(),
        ParallelConfig(tp_size=4, sequence_parallel=True),
        ParallelConfig(cp_size=4),
        ParallelConfig(pp_size=2, vpp_size=2),
        ParallelConfig(tp_size=2, pp_size=2, cp_size=2, sequence_parallel=True),
    ],
)
def test_every_rank_holds_a_multiple_of_fp8s_tokens_in_every_micro_batch(layout, recipe: str):
    """Of real plans: unequal samples, some micro-batches without any."""
    precision, tokens = replace(FP8, recipe=recipe), 128 if recipe == "blockwise" else 16
    packing = Packing.at(layout, 4096, precision)
    samples = [
        SampleSize((str(index), 0), 11 + 97 * index, 1 + 13 * (index % 5), ()) for index in range(9)
    ]
    plan = plan_step(samples, packing, COST, dp_size=4)
    parts = layout.cp_size * (layout.tp_size if layout.sequence_parallel else 1)
    lengths = [n for rank in plan.micro_batches for n in padded_lengths(rank, samples, packing)]
    assert len(lengths) >= 4
    assert all(length % (tokens * parts) == 0 for length in lengths), lengths
    # The same samples without FP8 come out otherwise: the padding is FP8's.
    plain = Packing.at(layout, 4096)
    plan = plan_step(samples, plain, COST, dp_size=4)
    lengths = [n for rank in plan.micro_batches for n in padded_lengths(rank, samples, plain)]
    assert not all(length % (tokens * parts) == 0 for length in lengths), lengths


def test_fp8_asks_for_sizes_in_sixteens():
    """Transformer Engine refuses other sides of a matrix: found before it is loaded."""
    checks.check_fp8_sizes(FP8, ParallelConfig(tp_size=8), SIZES_72B)
    sixteen = ParallelConfig(tp_size=16)
    checks.check_fp8_sizes(PrecisionConfig(), sixteen, SIZES_72B)
    with pytest.raises(ValueError, match=r"29568 over parallel\.tp_size=16 is 1848; use"):
        checks.check_fp8_sizes(FP8, sixteen, SIZES_72B)
    experts = ModelSizes(32, 4, 48, 6144, 0, 128, expert_size=776)
    with pytest.raises(ValueError, match="moe_intermediate_size is 776; use off"):
        checks.check_fp8_sizes(FP8, ParallelConfig(), experts)


@pytest.mark.parametrize(
    ("precision", "resume", "validation", "words"),
    [
        (replace(FP8, fp8_params=True), "never", None, "use fp8_params=false, or cpu_offload=0"),
        (PrecisionConfig("bfloat16"), "auto", None, "or resume=never"),
        (PrecisionConfig("bfloat16"), "never", "held_out.json", "use validation=null"),
    ],
)
def test_states_on_the_cpu_are_refused_with_what_they_cannot_do(
    precision, resume: str, validation: str | None, words: str
):
    optimizer = OptimizerConfig(lr=1e-3, cpu_offload=0.5)
    with pytest.raises(ValueError, match=r"^optimizer\.cpu_offload=0\.5 with ") as caught:
        checks.check_offload(optimizer, precision, resume, validation)
    assert words in str(caught.value)
    checks.check_offload(optimizer, PrecisionConfig("bfloat16"), "never")
    checks.check_offload(replace(optimizer, cpu_offload=0.0), precision, resume, validation)
