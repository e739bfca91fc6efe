#!/bin/sh
# MMR1's whole pipeline on small files of its own forms: cold start, GRPO with VAS, benchmarks.
# Usage: examples/pipeline/run.sh [FOLDER]   (default: outputs/pipeline; some minutes on two cores)
# SFT_STEPS, RL_STEPS, DEMONSTRATIONS and PROMPTS make it shorter.
set -eu
folder=${1:-outputs/pipeline}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

$python examples/pipeline/make_files.py "$folder/data" \
    --demonstrations "${DEMONSTRATIONS:-2000}" --prompts "${PROMPTS:-400}"
$python -m megatron_mmr1.data.digits --out "$folder/digits" --model "$folder/tiny"

$python tools/inspect_data.py "$folder/data/rl.parquet" --model "$folder/tiny" \
    --benchmark mathvista="$folder/data/mathvista.parquet" --output "$folder/inspection"

$python -m megatron_mmr1.sft output_dir="$folder" run=sft model.path="$folder/tiny" \
    data="$folder/data/sft.json" validation="$folder/data/sft_held_out.jsonl" \
    num_steps="${SFT_STEPS:-300}" validation_every=50

$python -m megatron_mmr1.train output_dir="$folder" run=rl model.path="$folder/digits_sft/sft/hf" \
    data.train="$folder/data/rl.parquet" data.heldout="$folder/data/held_out.jsonl" \
    num_steps="${RL_STEPS:-20}"

for stage in digits_sft/sft digits/rl; do
    for benchmark in mathvista chartqa; do
        $python -m megatron_mmr1.evaluate benchmark=$benchmark data="$folder/data/$benchmark.parquet" \
            model="$folder/$stage/hf" output="$folder/evaluation/$benchmark/${stage##*/}" \
            rollout.max_response_tokens=64
    done
done
$python tools/compare_evaluations.py --out "$folder/evaluation/comparison" --table \
    "$folder"/evaluation/*/sft "$folder"/evaluation/*/rl
