"""Score a model on a benchmark:
`python -m megatron_mmr1.evaluate benchmark=mathvista data=FILE_OR_HUB_ID model=DIR`.

One process. Checks first, then reads all questions, then starts the engine; responses are appended
to the output folder as they come, and the same command into the same folder goes on after an
interruption. See docs/evaluation.md for the files that it writes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.benchmarks import settled
from megatron_mmr1.config.model_folder import check_model_folder, is_megatron_checkpoint
from megatron_mmr1.config.run_dir import open_evaluation_dir
from megatron_mmr1.config.schema import EvaluateConfig
from megatron_mmr1.config.validate import validate_evaluate

if TYPE_CHECKING:
    from megatron_mmr1.evaluation.generation import Contents
    from megatron_mmr1.evaluation.journal import Journal
    from megatron_mmr1.evaluation.models import Model
    from megatron_mmr1.evaluation.questions import Answered

CONVERTER = Path(__file__).resolve().parents[1] / "tools" / "convert_megatron_to_hf.py"
BAD_ROWS = "bad_rows.jsonl"
CONVERTED = "converted_model"  # removed at the end


def main() -> None:
    """Evaluate as the command line says."""
    run(sys.argv[1:])


def run(argv: list[str], model: Model | None = None) -> Path:
    """Check, read, generate, score, write, print; return the output folder.

    Args:
        model: answers in place of the engine that `model=` would start, which several evaluations
            in one process can share.
    """
    config = load_config(EvaluateConfig, "evaluate", argv)
    validate_evaluate(config)
    config = settled(config)
    folder = open_evaluation_dir(config)
    print(f"output folder: {folder}", flush=True)

    from megatron_mmr1 import device

    device.prepare_process()
    _evaluate(config, folder, model)
    return folder


def _evaluate(config: EvaluateConfig, folder: Path, model: Model | None) -> None:
    """Evaluate a settled config into a folder that `open_evaluation_dir` made.

    Raises:
        ValueError: too many rows are bad, or the folder's responses are of other data or weights.
    """
    from megatron_mmr1.evaluation import generation
    from megatron_mmr1.evaluation.journal import Journal
    from megatron_mmr1.evaluation.models import identity_of
    from megatron_mmr1.evaluation.outcome import score_replies
    from megatron_mmr1.evaluation.records import QuestionReader

    assert config.data is not None
    reader: Any = QuestionReader(config.benchmark, config.data)  # pyright: ignore[reportArgumentType]
    contents = generation.read_contents(reader)
    _write_bad_rows(folder, config, contents, None)
    generation.check_bad_share(contents, [], config.max_bad_share)
    journal = Journal(folder, identity_of(Path(config.model)))
    generation.check_replies(journal, contents)
    num_done, total = len(journal.replies), len(contents.questions)
    print(f"{total} questions, {len(contents.bad_rows)} bad rows, {num_done} answered before")
    if num_done < total:
        _generate(config, folder, reader, journal, contents, model)
    journal.close()
    refused = generation.refused_rows(contents, journal)
    _write_bad_rows(folder, config, contents, journal)
    generation.check_bad_share(contents, refused, config.max_bad_share)
    answered = score_replies(contents, journal, config.reward)
    _write_results(config, folder, contents, answered, len(refused))
    shutil.rmtree(folder / CONVERTED, ignore_errors=True)


def _generate(
    config: EvaluateConfig,
    folder: Path,
    reader: Any,
    journal: Journal,
    contents: Contents,
    model: Model | None,
) -> None:
    """Start the engine, unless there is one, and answer what is not answered yet."""
    from megatron_mmr1.evaluation import generation
    from megatron_mmr1.evaluation.models import open_model
    from megatron_mmr1.observability.progress import Progress
    from megatron_mmr1.rollout.engine import Sampling

    sampling = Sampling(
        config.samples_per_prompt,
        config.rollout.temperature,
        config.rollout.max_response_tokens,
        config.seed,
        step=0,
    )
    answering = model or open_model(_as_hf_folder(config, folder), config)

    def check() -> None:
        refused = generation.refused_rows(contents, journal)
        _write_bad_rows(folder, config, contents, journal)
        generation.check_bad_share(contents, refused, config.max_bad_share)

    total, done = len(contents.questions), len(journal.replies)
    is_brief = not sys.stdout.isatty()
    with Progress(total, done, config.benchmark, fields={}, is_brief=is_brief) as bar:
        generation.generate(
            reader, answering, journal, sampling, lambda n: bar.update(n, {}), check
        )


def _as_hf_folder(config: EvaluateConfig, folder: Path) -> Path:
    """Return the model as a Hugging Face folder: itself, or converted in a process of its own.

    (The converter works without a GPU, and takes care of that for its whole process.)
    """
    if not is_megatron_checkpoint(config.model):
        return Path(config.model)
    converted = folder / CONVERTED
    if not converted.exists():  # it appears whole or not at all
        print(f"converting {config.model} to {converted}", flush=True)
        command = [sys.executable, str(CONVERTER), "--megatron", config.model, "--hf"]
        done = subprocess.run([*command, str(converted)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise ValueError(
                f"model={config.model!r} can't be converted ({why.removeprefix('error: ')}); "
                "convert it with tools/convert_megatron_to_hf.py, and give that folder"
            )
    check_model_folder(converted, "model")
    return converted


def _write_results(
    config: EvaluateConfig,
    folder: Path,
    contents: Contents,
    answered: list[Answered],
    num_refused: int,
) -> None:
    from megatron_mmr1.evaluation.outcome import summarize
    from megatron_mmr1.evaluation.writers import write_lmms_samples, write_vlmevalkit_tsv
    from megatron_mmr1.observability.files import replacing
    from megatron_mmr1.observability.report_evaluation import write_evaluation_report
    from megatron_mmr1.observability.summary import print_evaluation

    summary = {
        "benchmark": config.benchmark,
        "name": config.name,
        "model": config.model,
        "data": config.data,
        "temperature": config.rollout.temperature,
        "samples_per_prompt": config.samples_per_prompt,
        "max_response_tokens": config.rollout.max_response_tokens,
        **summarize(answered, contents, num_refused),
    }
    for name, write in (
        ("samples.jsonl", write_lmms_samples),
        ("predictions.tsv", write_vlmevalkit_tsv),
    ):
        with replacing(folder / name) as temporary:
            write(temporary, answered)
    with replacing(folder / "summary.json") as temporary:
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
    print_evaluation(summary, write_evaluation_report(folder, contents.thumbnails))


def _write_bad_rows(
    folder: Path, config: EvaluateConfig, contents: Contents, journal: Journal | None
) -> None:
    """List what was set aside, if anything was: rows that can't be read, questions not taken."""
    from megatron_mmr1.evaluation.generation import refused_rows
    from megatron_mmr1.observability.files import replacing

    rows = [("row", bad) for bad in contents.bad_rows]
    if journal is not None:
        rows += [("question", bad) for bad in refused_rows(contents, journal)]
    if rows:
        with replacing(folder / BAD_ROWS) as temporary:
            lines = [
                json.dumps(
                    {"source": config.data, kind: bad.row, "id": bad.row_id, "reason": bad.reason}
                )
                for kind, bad in rows
            ]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
