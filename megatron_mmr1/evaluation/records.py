"""Rows of the benchmarks to `Question`s; a bad row is set aside with its id and the reason.

Owns the columns, as the public files name them: the benchmarks' own JSON, their Hugging Face
parquet, VLMEvalKit's TSV; and those of the embedded task, which are MMR1-RL's. Every image is
decoded once, to find broken ones before a model waits for them; the question keeps the encoded
file. Does not own the formats (formats.py) or the limits of images (data/images.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mmr1.config.validate import is_hub_id
from megatron_mmr1.data.dataset import BadRow
from megatron_mmr1.data.image_files import read_below
from megatron_mmr1.data.images import decode_image
from megatron_mmr1.evaluation.formats import (
    Unreadable,
    literal,
    literal_list,
    read_hub,
    read_path,
)
from megatron_mmr1.evaluation.questions import AnswerType, Benchmark, Question
from megatron_mmr1.evaluation.scoring.shared import letters

Row = Mapping[str, Any]

# Decoded before merely referenced: MathVista's and MathVision's parquet have both.
_IMAGE_COLUMNS = ("decoded_image", "images", "image", "image_path", "imagename", "imgname")
_IMAGE_FOLDERS = (".", "images", "png")  # beside the file: LogicVista, ChartQA


@dataclass(frozen=True, slots=True)
class _Source:
    """How one benchmark's rows are read.

    Attributes:
        split: that the paper reports.
        id_columns: the first that a row has names it.
        parse: a row and its id to a question without images.
        hub_config: of its Hugging Face data set.
    """

    split: str
    id_columns: tuple[str, ...]
    parse: Callable[[Row, str], Question]
    hub_config: str | None = None


class QuestionReader:
    """The questions of one benchmark, streamed; iterating again reads again.

    Attributes:
        bad_rows: what the last iteration set aside so far, and why.
    """

    def __init__(self, benchmark: Benchmark, source: str | Path) -> None:
        """Find the source; rows are read when iterated.

        Args:
            benchmark: one of `SOURCES`.
            source: a file or a folder of shards (.parquet, .json, .jsonl, .tsv), whose image paths
                are relative to it and stay below it; or a Hugging Face id, "owner/name" or
                "owner/name:split".

        Raises:
            ValueError: an unknown benchmark, or no such source.
        """
        if benchmark not in SOURCES:
            raise ValueError(f"no benchmark {benchmark!r}; use one of {', '.join(SOURCES)}")
        self._benchmark = SOURCES[benchmark]
        self._source = str(source)
        self.bad_rows: list[BadRow] = []
        if not Path(source).exists() and not is_hub_id(self._source):
            raise ValueError(f"{source} does not exist; give a file, a folder or a hub id")

    def __iter__(self) -> Iterator[Question]:
        """Yield the usable questions in the order of the source.

        Raises:
            ValueError: the source can't be read, or has no usable row.
        """
        self.bad_rows = []
        seen: set[str] = set()
        for number, (file, row) in enumerate(self._rows()):
            row_id = self._row_id(row, number)
            try:
                if isinstance(row, Unreadable):
                    raise ValueError(row.reason)
                if row_id in seen:
                    raise ValueError("duplicate id")
                question = self._question(row, row_id, file)
            except (ValueError, OSError) as error:  # OSError: an image file that can't be opened
                self.bad_rows.append(BadRow(number, row_id, str(error)))
                continue
            seen.add(row_id)
            yield question
        if not seen:
            reasons = Counter(bad.reason for bad in self.bad_rows).most_common(3)
            counted = "; ".join(f"{count} x {reason}" for reason, count in reasons)
            raise ValueError(f"{self._source} has no usable row ({counted or 'it is empty'})")

    def _rows(self) -> Iterator[tuple[Path | None, Row | Unreadable]]:
        if Path(self._source).exists():
            yield from read_path(Path(self._source), self._benchmark.split)
            return
        config = self._benchmark.hub_config
        for row in read_hub(self._source, self._benchmark.split, config):
            yield None, row

    def _row_id(self, row: Row | Unreadable, number: int) -> str:
        if isinstance(row, Unreadable):
            return row.row_id or f"row-{number}"
        names = (_text(row, column) for column in self._benchmark.id_columns)
        return next((name for name in names if name), f"row-{number}")

    def _question(self, row: Row, row_id: str, file: Path | None) -> Question:
        question = self._benchmark.parse(row, row_id)
        if not question.answer:
            raise ValueError("empty answer")
        if question.benchmark == "chartqa" and not question.groups and file is not None:
            is_human = "human" in file.stem
            question = replace(question, groups={"split": ("human" if is_human else "augmented",)})
        images = tuple(_images(row, file.parent if file else None))
        for data in images:
            decode_image(data)
        may_lack_image = question.benchmark == "digits" or (
            question.groups.get("version") == ("Text Only",)
        )
        if not images and not may_lack_image:
            raise ValueError("no image")
        if not question.text and not images:
            raise ValueError("neither question nor image")
        return replace(question, images=images)


def _mathverse(row: Row, row_id: str) -> Question:
    """`question` is empty in Vision Only; options stand in it, or in the image."""
    answer = _text(row, "answer")
    metadata = _metadata(row)
    names: dict[str, AnswerType] = {"multi-choice": "choice", "free-form": "text"}
    kind = _text(row, "question_type")
    if not kind:  # a TSV without the column
        answer_type: AnswerType = "choice" if letters(answer) else "text"
    elif kind in names:
        answer_type = names[kind]
    else:
        raise ValueError(f"unknown question_type {kind!r}")
    return Question(
        "mathverse",
        row_id,
        _text(row, "question"),
        answer,
        answer_type,
        cluster=_text(row, "problem_index") or row_id,
        groups=_groups(
            version=[_text(row, "problem_version")],
            subject=[_text(metadata, "subject")],
            subfield=[_text(metadata, "subfield")],
        ),
    )


def _mathvista(row: Row, row_id: str) -> Question:
    """The gold of a multiple choice is an option's text; a float's precision may be implied."""
    answer, answer_type = _text(row, "answer"), _text(row, "answer_type")
    choices = tuple(str(choice) for choice in literal_list(row.get("choices")))
    precision: int | None = None
    if _text(row, "question_type") == "multi_choice":
        answer_type = "choice"
        if not choices:
            raise ValueError("multiple choice without choices")
        if answer not in [choice.strip() for choice in choices]:
            raise ValueError("the answer is not among the choices")
        choices = tuple(choice.strip() for choice in choices)
    elif answer_type == "integer":
        _check(answer, r"[+-]?[0-9]+", "an integer")
    elif answer_type == "float":
        _check(answer, r"[+-]?[0-9]*\.?[0-9]+", "a decimal number")
        given = _text(row, "precision") or str(len(answer.partition(".")[2]))
        _check(given, r"[0-9]{1,2}(\.0)?", "a number of decimals")
        precision = int(float(given))
    elif answer_type not in ("list", "text"):
        raise ValueError(f"unknown answer_type {answer_type!r}")
    metadata = _metadata(row)
    return Question(
        "mathvista",
        row_id,
        _text(row, "question"),
        answer,
        answer_type,  # pyright: ignore[reportArgumentType]
        cluster=row_id,
        choices=choices if answer_type == "choice" else (),
        precision=precision,
        unit=_text(row, "unit"),
        groups=_groups(
            task=[_text(metadata, "task")],
            skills=[str(skill) for skill in literal_list(metadata.get("skills"))],
        ),
    )


def _mathvision(row: Row, row_id: str) -> Question:
    """`options` is empty for a free answer, also where the gold is a letter (two rows)."""
    answer = _text(row, "answer")
    choices = tuple(
        str(choice).strip() for choice in literal_list(row.get("options", row.get("choices")))
    )
    if choices and not (len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(choices)):
        raise ValueError(f"answer {answer!r} is no letter of the {len(choices)} options")
    return Question(
        "mathvision",
        row_id,
        _text(row, "question"),
        answer,
        "choice" if choices else "text",
        cluster=row_id,
        choices=choices,
        groups=_groups(
            subject=[_text(row, "subject") or _text(row, "category")],
            level=[_text(row, "level")],
        ),
    )


def _logicvista(row: Row, row_id: str) -> Question:
    """Options stand in the image; the public file has one row without question and answer."""
    answer = _text(row, "answer")
    if answer and not letters(answer):
        raise ValueError(f"answer {answer!r} is not letters")
    skills = [str(skill) for skill in literal_list(row.get("skill"))]
    return Question(
        "logicvista",
        row_id,
        _text(row, "question"),
        answer,
        "choice",
        cluster=row_id,
        groups=_groups(skill=skills),
    )


def _chartqa(row: Row, row_id: str) -> Question:
    """Names of three publishers: `query`/`label`, `question`/`answer`, and three for the half."""
    answers = literal_list(row.get("label", row.get("answer")))
    if len(answers) > 1:
        raise ValueError(f"{len(answers)} answers, expected one")
    half = _text(row, "type") or _text(row, "split")  # human_test, test_human
    if not half and _text(row, "human_or_machine"):
        half = "human" if _text(row, "human_or_machine") == "0" else "machine"
    return Question(
        "chartqa",
        row_id,
        _text(row, "query") or _text(row, "question"),
        _text({"answer": answers[0] if answers else ""}, "answer"),
        "text",
        cluster=row_id,
        groups=_groups(split=[("human" if "human" in half else "augmented") if half else ""]),
    )


def _digits(row: Row, row_id: str) -> Question:
    """The question is the whole prompt, with its `<image>` tags."""
    return Question(
        "digits",
        row_id,
        "" if not _text(row, "problem") else str(row["problem"]),
        _text(row, "answer"),
        "text",
        cluster=row_id,
        groups=_groups(category=[_text(row, "category")]),
    )


def _check(text: str, pattern: str, what: str) -> None:
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{text!r} is not {what}")


def _metadata(row: Row) -> Row:
    """What MathVerse and MathVista nest; in a TSV it is a dict as text, or columns of the row."""
    metadata = row.get("metadata") or row
    if isinstance(metadata, str):
        metadata = literal(metadata)
    if not isinstance(metadata, Mapping):
        raise ValueError("metadata is no mapping")
    return metadata


def _groups(**groups: list[str]) -> dict[str, tuple[str, ...]]:
    """Leave out what a row does not say."""
    named = {name: tuple(value for value in values if value) for name, values in groups.items()}
    return {name: values for name, values in named.items() if values}


def _text(row: Row, column: str) -> str:
    """A cell as stripped text; None and NaN (pandas' empty cell) are ""."""
    value = row.get(column)
    if value is None or value != value:
        return ""
    text = str(value).strip()
    if not text.isascii():
        text.encode("utf-8")  # a lone surrogate, from JSON's escapes, is a UnicodeEncodeError
    return text


def _images(row: Row, folder: Path | None) -> Iterator[bytes]:
    """The encoded images of the first image column that has any."""
    for column in _IMAGE_COLUMNS:
        value = row.get(column)
        values = value if isinstance(value, list) else [value]
        if column == "image_path":  # of a TSV, perhaps a list as text
            values = literal_list(value)
        values = [item for item in values if item is not None and item != ""]
        if values:
            yield from (_encoded(item, folder) for item in values)
            return


def _encoded(image: Any, folder: Path | None) -> bytes:
    """Bytes, a file below `folder`, or datasets' {bytes, path}, which may be either."""
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise ValueError("an image has neither bytes nor path")
    if folder is None:
        raise ValueError(f"the hub's row has only the path {image!r} of its image")
    names = [f"{parent}/{image}" for parent in _IMAGE_FOLDERS]
    found = next((name for name in names if (folder / name).is_file()), image)
    return read_below(folder, found)


SOURCES: dict[str, _Source] = {
    "mathverse": _Source("testmini", ("sample_index", "index"), _mathverse, hub_config="testmini"),
    "mathvista": _Source("testmini", ("pid", "index", "id"), _mathvista),
    "mathvision": _Source("test", ("id", "index"), _mathvision),
    "logicvista": _Source("test", ("id", "index"), _logicvista),
    "chartqa": _Source("test", ("id", "index"), _chartqa),
    "digits": _Source("heldout", ("id",), _digits),
}
