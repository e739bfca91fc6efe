"""A run's responses in the files of the public kits, so that results can be checked with them.

Owns the two formats. Columns that a kit does not know (extraction, both scores) stand beside its
own; both kits ignore them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_mmr1.evaluation.questions import (
    Answered,
    Benchmark,
    Extracted,
    Question,
    Score,
    Scores,
)

# A question's group and VLMEvalKit's name for it, where they differ.
_KIT_NAMES = {"version": "problem_version", "subject": "category"}


def write_lmms_samples(path: Path, answered: Sequence[Answered]) -> None:
    """Write lmms-eval's samples: a JSON object a line.

    Its own keys: `doc_id` (the row's number here), `input`, `target`, `resps` (a list of one) and
    `filtered_resps` (the compat box; "" without one). Ours: `question_id`, `question`, `extracted`,
    `strict`, `compat` (outcome and reason) and `compat_score`: 1, 0, or null where unscored, which
    the kit's comparison with a baseline reads; and what else an `Answered` holds.
    """
    with path.open("w", encoding="utf-8") as file:
        for number, item in enumerate(answered):
            question = item.question
            sample = {
                "doc_id": number,
                "input": item.prompt,
                "target": question.answer,
                "resps": [item.response],
                "filtered_resps": item.extracted.compat or "",
                "question_id": question.question_id,
                "question": question.text,
                "extracted": item.extracted.strict,
                "strict": item.scores.strict._asdict(),
                "compat": item.scores.compat._asdict(),
                "compat_score": _as_number(item.scores.compat),
                "choices": question.choices,
                "answer_type": question.answer_type,
                "groups": {name: list(values) for name, values in question.groups.items()},
                "cluster": question.cluster,
                "digest": item.digest,
                "sample_index": item.sample_index,
                "num_tokens": item.num_tokens,
                "is_cut_off": item.is_cut_off,
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def read_samples(path: Path, benchmark: Benchmark) -> list[Answered]:
    """Read what `write_lmms_samples` wrote; precision and unit are not kept.

    Raises:
        ValueError: the file is damaged, or another program's.
    """
    answered = []
    try:
        with path.open("rb") as file:
            for line in file:
                sample = json.loads(line)
                question = Question(
                    benchmark,
                    sample["question_id"],
                    sample["question"],
                    sample["target"],
                    sample["answer_type"],
                    sample["cluster"],
                    tuple(sample["choices"]),
                    groups={name: tuple(values) for name, values in sample["groups"].items()},
                )
                boxes = Extracted(sample["extracted"], sample["filtered_resps"] or None)
                scores = Scores(Score(**sample["strict"]), Score(**sample["compat"]))
                answered.append(
                    Answered(
                        question,
                        sample["input"],
                        sample["resps"][0],
                        boxes,
                        scores,
                        sample["digest"],
                        sample["sample_index"],
                        sample["num_tokens"],
                        sample["is_cut_off"],
                    )
                )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} is no samples file of an evaluation ({error!r}); evaluate again"
        ) from error
    return answered


def write_vlmevalkit_tsv(path: Path, answered: Sequence[Answered]) -> None:
    """Write VLMEvalKit's prediction table, tab-separated, without images.

    Its own columns: `index`, `question`, `prediction` (the whole response), `answer`,
    `question_type`, `answer_type`, `choices`, `answer_option`, and the groups by the kit's names.
    Ours: `extracted`, `strict` and `compat` (correct, wrong, unscored). Not there: MathVerse's
    `metadata` and `question_for_eval`, which the kit's judge wants; join them by `index`.
    """
    groups = sorted({name for item in answered for name in item.question.groups})
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(
            ["index", "question", "prediction", "extracted", "answer", "strict", "compat"]
            + ["question_type", "answer_type", "choices", "answer_option"]
            + [_KIT_NAMES.get(name, name) for name in groups]
        )
        for item in answered:
            question, scores = item.question, item.scores
            table.writerow(
                [question.question_id, question.text, item.response]
                + [item.extracted.strict or "", question.answer]
                + [scores.strict.outcome, scores.compat.outcome]
                + ["multi_choice" if question.answer_type == "choice" else "free_form"]
                + ["text" if question.answer_type == "choice" else question.answer_type]
                + [repr(list(question.choices)), _option(question)]
                + [_cell(name, question.groups.get(name, ())) for name in groups]
            )


def _option(question: Question) -> str:
    """The gold option's letter, or "" for a free answer."""
    if question.answer_type != "choice":
        return ""
    if question.answer in question.choices and question.benchmark == "mathvista":
        return chr(ord("A") + question.choices.index(question.answer))
    return question.answer


def _cell(name: str, values: tuple[str, ...]) -> str:
    return repr(list(values)) if name in ("skill", "skills") else ", ".join(values)


def _as_number(score: Score) -> int | None:
    return None if score.outcome == "unscored" else int(score.outcome == "correct")
