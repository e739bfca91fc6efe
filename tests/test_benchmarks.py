"""The five benchmarks: rules worked by hand, the public files' formats, bad rows, statistics."""

import base64
import csv
import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats

from megatron_mmr1.evaluation.formats import read_hub
from megatron_mmr1.evaluation.prompts import prompt_text
from megatron_mmr1.evaluation.questions import Answered, Extracted, Question, Score, Scores
from megatron_mmr1.evaluation.records import QuestionReader
from megatron_mmr1.evaluation.scoring import extract, score, score_all
from megatron_mmr1.evaluation.scoring.shared import edit_distance, letters
from megatron_mmr1.evaluation.statistics import accuracy, accuracy_by_group, compare
from megatron_mmr1.evaluation.writers import write_lmms_samples, write_vlmevalkit_tsv

R, W, U = "correct", "wrong", "unscored"


def ask(benchmark: Any, answer: str, answer_type: Any = "text", **more: Any) -> Question:
    return Question(benchmark, "q1", "How many?", answer, answer_type, cluster="q1", **more)


def outcomes(answer: str | None, question: Question) -> tuple[str, str]:
    scores = score(Extracted(answer, answer), question)
    assert scores.strict.reason and scores.compat.reason
    return scores.strict.outcome, scores.compat.outcome


# --- Rules. Each line: the box, the gold, strict, compat. ----------------------------------------

MATHVERSE_CHOICE = [
    ("C", "C", R, R),
    ("B", "C", W, W),
    ("(C)", "C", R, U),  # the kit compares strings, and asks its judge about others
    ("c", "C", R, W),  # one letter, another string
    ("\\text{C}", "C", R, U),
    ("C: 65^\\circ", "C", R, U),
    ("65^\\circ", "C", W, U),  # the prompt demanded a letter
    ("C and D", "C\nD", R, U),  # a public gold with two letters
    ("C", "C\nD", W, U),
    ("C", "(C)", R, U),  # a public gold in brackets
    ("False", "False", R, R),  # public golds that are values
    ("True", "False", U, U),
    ("", "C", W, W),
]
MATHVERSE_FREE = [
    ("14", "14", R, R),
    ("14.0", "14", R, U),
    ("15", "14", W, U),
    ("\\frac{\\sqrt{30}}{2}", "\\frac{\\sqrt{30}}{2}", R, R),
    ("\\sqrt{7.5}", "\\frac{\\sqrt{30}}{2}", R, U),
    ("\\sqrt{7}", "\\frac{\\sqrt{30}}{2}", W, U),
    ("113.1", "Area $=113.1 \\mathrm{~cm}^{2}$", R, U),
    ("9\\pi", "Area $=9 \\pi \\mathrm{cm}^{2}$", R, U),
    ("8\\pi", "Area $=9 \\pi \\mathrm{cm}^{2}$", W, U),
    ("2191.7", "2191.7 metres", R, U),
    ("50 cm", "0.5 m", U, U),  # equal, but only a reader says so
    ("y=5-2x", "y=-2 x+5", R, U),
    ("y=5-3x", "y=-2 x+5", U, U),  # letters left: no rule says that it is wrong
    ("315", "315^\\circ T", U, U),  # a bearing
    ("[-4,0), (-3,1]", "domain: [-4, 0) and range: (-3, 1]", U, U),
    ("", "14", W, W),
]
MATHVISTA_CHOICES = ("larger than", "equal to", "smaller than")
MATHVISTA_CHOICE = [
    ("B", "equal to", R, R),
    ("A", "equal to", W, W),
    ("(B) equal to", "equal to", R, R),
    ("B. equal to", "equal to", R, R),
    ("c", "smaller than", R, W),  # the kit: no capital, so the nearest option, the shortest
    ("equal to", "equal to", R, R),
    ("\\text{equal to}", "equal to", R, R),
    ("equal", "equal to", W, R),  # the kit: nearest by edit distance
    ("equals two", "equal to", W, R),  # ... even for another claim
    ("none", "equal to", W, R),
    ("D", "equal to", W, R),
    ("", "equal to", W, R),  # the kit: the shortest option
]
MATHVISTA_INTEGER = [
    ("7", "7", R, R),
    ("8", "7", W, W),
    ("7.0", "7", R, R),
    ("7.9", "7", W, R),  # the kit: int(float(x))
    ("-3", "-3", R, R),
    ("1,000", "1000", R, W),
    ("7 \\text{ years}", "7", R, W),
    ("5 cm", "5", R, W),
    ("\\frac{14}{2}", "7", R, W),
    ("1e3", "1000", R, R),
    ("seven", "7", W, W),
    ("inf", "7", W, W),
]
MATHVISTA_FLOAT = [
    ("1.2", "1.2", 1, R, R),
    ("1.23", "1.2", 1, R, R),
    ("1.3", "1.2", 1, W, W),
    ("1.25", "1.3", 1, R, W),  # binary and half to even: round(1.25, 1) == 1.2
    ("1.25", "1.2", 1, R, R),
    ("2.675", "2.68", 2, R, W),  # round(2.675, 2) == 2.67
    ("51.0411", "51.04", 2, R, R),
    ("131,253.5", "131253.5", 1, R, W),
    ("\\sqrt{2}", "1.41", 2, R, W),
    ("0", "0.0", 1, R, R),
    ("24\\%", "0.24", 2, R, W),
    ("47.6 m", "47.6", 1, R, W),
    ("about 1", "1.2", 1, W, W),
]
MATHVISTA_LIST = [
    ("[2014, 2016]", "[2014, 2016]", R, R),
    ("[2014,2016]", "[2014, 2016]", R, W),  # the kit: the same string
    ("2014, 2016", "[2014, 2016]", R, W),
    ("[2016, 2014]", "[2014, 2016]", W, W),
    ("[2014]", "[2014, 2016]", W, W),
]
MATHVISION_CHOICES = ("$\\frac{1}{2}$", "$\\frac{2}{3}$", "$6 \\mathrm{~m}$", "red", "all of them")
MATHVISION_CHOICE = [
    ("B", "B", R, R),
    ("A", "B", W, W),
    ("(B)", "B", R, R),
    ("b", "B", R, R),
    ("\\text{B}", "B", R, R),
    ("\\frac{2}{3}", "B", R, R),
    ("2/3", "B", R, R),
    ("0.67", "B", W, R),  # the kit: 2 decimals
    ("6 \\text{ m}", "C", R, W),
    ("Red", "D", R, R),
    ("all of them", "E", R, W),  # the kit drops the spaces of the answer, not of the option
    ("blue", "D", W, W),
    ("", "B", W, W),
]
MATHVISION_FREE = [
    ("61", "61", R, R),
    ("62", "61", W, W),
    ("0.33", "$\\frac{1}{3}$", W, R),  # the kit: 2 decimals
    ("0.34", "$\\frac{1}{3}$", W, W),
    ("2.004", "2", W, R),
    ("x=61", "61", R, R),
    ("45^\\circ", "45", R, R),
    ("12\\%", "12", R, R),
    ("5 \\text{ km}", "5", R, R),
    ("5 \\text{ cm}", "5", R, W),  # the kit knows km and m^3 only
    ("4\\pi", "$4 \\pi$", R, R),
    ("12.57", "$4 \\pi$", W, R),
    ("(3,-4)", "(3,-4)", R, R),
    ("(3.001,-4)", "(3,-4)", W, R),
    ("C", "C", R, R),  # a letter without options: two public rows
    ("\\frac{16}{7}", "$\\boxed{\\frac{16}{7}}$", R, R),  # public golds with a box
    ("2", "\x0crac{36}{13}", U, W),  # a public gold with a broken escape
]
LOGICVISTA = [
    ("C", "C", R, R),
    ("A", "C", W, W),
    ("c", "C", R, W),  # the kit: capitals only
    ("(C)", "C", R, W),
    ("C. the dot", "C", R, W),
    ("\\text{C}", "C", R, W),
    ("A, C", "A, C", R, R),
    ("C, A", "A, C", R, R),
    ("AC", "A, C", R, R),
    ("A and C", "A, C", R, W),
    ("\\{A, C\\}", "A, C", R, W),
    ("A", "A, C", W, W),
    ("A, B, C", "A, C", W, W),
    ("C, C", "C", R, W),  # the kit counts a letter named twice twice
    ("3", "3", R, W),  # the public digit gold, which the kit can't match
    ("the second figure", "B", W, W),
    ("A or C", "A, C", W, W),
]
CHARTQA = [
    ("12", "12", R, R),
    ("12.6", "12", R, R),  # 5% exactly
    ("12.61", "12", W, W),
    ("11.4", "12", R, R),
    ("11.39", "12", W, W),
    ("12\\%", "12", R, W),
    ("12%", "12", R, W),  # the kits: 0.12
    ("12%", "0.12", W, R),
    ("12", "12%", R, W),
    ("12%", "12%", R, R),
    ("0", "0", R, R),
    ("0.0", "0", R, W),  # the kits compare gold 0 as a string
    ("0.01", "0", W, W),
    ("1,234", "1234", R, W),
    ("\\$5", "5", R, W),
    ("1_000", "1000", W, R),  # Python's float
    ("-5", "-5.1", R, R),
    ("2011", "2010", R, R),  # years are numbers
    ("yes", "Yes", R, R),
    ("\\text{Yes}", "Yes", R, W),
    ("No", "Yes", W, W),
    ("nan", "12", W, W),
]
RULES = (
    [(a, ask("mathverse", g, "choice"), s, c) for a, g, s, c in MATHVERSE_CHOICE]
    + [(a, ask("mathverse", g), s, c) for a, g, s, c in MATHVERSE_FREE]
    + [
        (a, ask("mathvista", g, "choice", choices=MATHVISTA_CHOICES), s, c)
        for a, g, s, c in MATHVISTA_CHOICE
    ]
    + [(a, ask("mathvista", g, "integer"), s, c) for a, g, s, c in MATHVISTA_INTEGER]
    + [(a, ask("mathvista", g, "float", precision=p), s, c) for a, g, p, s, c in MATHVISTA_FLOAT]
    + [(a, ask("mathvista", g, "list"), s, c) for a, g, s, c in MATHVISTA_LIST]
    + [
        (a, ask("mathvision", g, "choice", choices=MATHVISION_CHOICES), s, c)
        for a, g, s, c in MATHVISION_CHOICE
    ]
    + [(a, ask("mathvision", g), s, c) for a, g, s, c in MATHVISION_FREE]
    + [(a, ask("logicvista", g, "choice"), s, c) for a, g, s, c in LOGICVISTA]
    + [(a, ask("chartqa", g), s, c) for a, g, s, c in CHARTQA]
)


@pytest.mark.parametrize(
    ("answer", "question", "strict", "compat"),
    RULES,
    ids=[f"{q.benchmark}: {a!r} for {q.answer!r}" for a, q, _, _ in RULES],
)
def test_an_answer_scores_as_worked_by_hand(answer, question, strict, compat):
    assert outcomes(answer, question) == (strict, compat)


def test_without_a_box_both_rules_are_wrong_and_an_empty_box_is_no_crash():
    for _, question, _, _ in RULES:
        assert outcomes(None, question) == (W, W)
        assert W in outcomes("", question) or U in outcomes("", question)


def test_letters_are_read_only_where_there_is_nothing_else():
    assert letters("{B, D}") == {"B", "D"}
    assert letters("BD.") == {"B", "D"}
    for text in ("", "B or D", "both", "DAD", "2.5 B cm", "Cat"):
        assert letters(text) is None, text


def test_edit_distance_is_levenshteins():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("same", "same") == 0


@pytest.mark.parametrize(
    ("response", "strict", "compat"),
    [
        ("so \\boxed{5}.", "5", "5"),
        ("\\boxed{4}, no: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("<think>\\boxed{4}</think><answer>\\boxed{5}</answer>", "5", "5"),
        ("<think>\\boxed{4}</think><answer>5</answer>", None, "4"),  # the rule of its training
        ("<answer>\\boxed{5}</answer> or \\boxed{6}", "5", "6"),
        ("<answer>\\boxed{5}", None, "5"),  # the answer was cut
        ("<think>perhaps \\boxed{4}", None, "4"),  # the thought was cut
        ("<think>\\boxed{4}</think> so \\boxed{5}", "5", "5"),
        ("<think>\\boxed{4}</think> so 5", None, "4"),
        ("\\boxed{5", None, None),
        ("five", None, None),
        ("", None, None),
    ],
)
def test_the_box_is_looked_for_in_the_answer_or_where_no_tags_are(response, strict, compat):
    assert extract(response) == (strict, compat)


def test_an_answer_that_hangs_is_unscored_and_the_others_are_scored():
    question = ask("mathvision", "$\\frac{1}{3}$")
    tower = "9" + "^{9" * 40 + "}" * 40
    boxes = ["\\frac{2}{6}", tower, "\\frac{1}{4}"]
    scores = score_all([(Extracted(box, box), question) for box in boxes], deadline_s=2.0)
    assert [s.strict.outcome for s in scores] == [R, U, W]
    assert "deadline" in scores[1].strict.reason


# --- Prompts. ------------------------------------------------------------------------------------


def test_a_prompt_shows_the_image_the_options_and_asks_for_one_box():
    question = ask("mathvista", "b c", "choice", choices=("a", "b c"), images=(b"1", b"2"))
    text = prompt_text(replace(question, unit="years"))
    assert text.startswith("<image><image>How many? (Unit: years)\nChoices:\n(A) a\n(B) b c\n")
    assert text.count("\\boxed{}") == 1
    assert "letter" in text


def test_options_in_the_question_are_not_listed_twice():
    listed = ask("mathvision", "A", "choice", choices=("12", "13"))
    listed = replace(listed, text="How many?\nChoices:\nA: 12\nB: 13")
    assert prompt_text(listed).count("12") == 1


def test_a_tag_in_the_text_is_not_taken_for_an_image():
    question = replace(ask("chartqa", "5"), text="What does <image> mean?")
    assert "<image>" not in prompt_text(question)


def test_a_question_that_only_the_image_holds_has_a_prompt():
    question = replace(ask("mathverse", "5"), text="", images=(b"1",))
    assert prompt_text(question).startswith("<image>The question is in the image.\n")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (ask("mathvista", "7", "integer"), "an integer"),
        (ask("mathvista", "1.2", "float", precision=1), "1 decimal place,"),
        (ask("mathvista", "1.23", "float", precision=2), "2 decimal places,"),
        (ask("mathvista", "[1]", "list"), "a list"),
        (ask("logicvista", "A, C", "choice"), "letters if several"),
        (ask("chartqa", "5"), "few words"),
        (ask("mathverse", "5"), "the final answer"),
    ],
)
def test_a_prompt_names_the_kind_of_answer(question, words):
    assert words in prompt_text(question)


# --- Readers. ------------------------------------------------------------------------------------


def picture(value: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (value, 90, 30)).save(file, kind)
    return file.getvalue()


def mathverse_row(number: int, version: str, **more: Any) -> dict[str, Any]:
    row = {
        "sample_index": str(number),
        "problem_index": str((number - 1) // 5 + 1),
        "problem_version": version,
        "question": "" if version == "Vision Only" else "Find L.\nChoices:\nA:1\nB:2",
        "image": {"bytes": picture(number), "path": f"images/{number}.png"},
        "answer": "B",
        "question_type": "multi-choice",
        "metadata": {"split": "testmini", "subject": "Solid Geometry", "subfield": "Length"},
        "query_wo": "Please ...",
        "query_cot": "Please ...",
        "question_for_eval": "Find L.\nChoices:\nA:1\nB:2",
    }
    return row | more


def mathvista_row(pid: str, **more: Any) -> dict[str, Any]:
    row = {
        "pid": pid,
        "question": "How many years?",
        "image": f"images/{pid}.jpg",
        "decoded_image": {"bytes": picture(), "path": None},
        "choices": None,
        "unit": "years",
        "precision": None,
        "answer": "7",
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"task": "figure question answering", "skills": ["algebra", "statistics"]},
        "query": "Hint: ...",
    }
    return row | more


def mathvision_row(number: str, **more: Any) -> dict[str, Any]:
    row = {
        "id": number,
        "question": "Which?\n<image1>",
        "options": ["A", "B", "C"],
        "image": f"images/{number}.jpg",
        "answer": "B",
        "solution": None,
        "level": 3,
        "subject": "logic",
    }
    return row | more


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[Mapping[str, Any] | bytes]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    pandas = pytest.importorskip("pandas")  # the kit writes its files with it
    pandas.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def encoded(value: int = 0) -> str:
    return base64.b64encode(picture(value)).decode()


def read(benchmark: Any, path: Path | str) -> tuple[list[Question], dict[str, str]]:
    reader = QuestionReader(benchmark, path)
    questions = list(reader)
    return questions, {bad.row_id: bad.reason for bad in reader.bad_rows}


def test_mathverse_parquet_keeps_version_problem_and_the_empty_question(tmp_path):
    rows = [mathverse_row(4, "Vision Dominant"), mathverse_row(5, "Vision Only")]
    rows.append(mathverse_row(6, "Text Lite", question_type="free-form", answer="14"))
    (first, second, third), bad = read("mathverse", write_parquet(tmp_path / "a.parquet", rows))
    assert not bad
    assert (first.question_id, first.cluster, first.answer_type) == ("4", "1", "choice")
    assert (second.cluster, second.text) == ("1", "")
    assert (third.cluster, third.answer_type) == ("2", "text")
    assert first.groups == {
        "version": ("Vision Dominant",),
        "subject": ("Solid Geometry",),
        "subfield": ("Length",),
    }
    assert first.images == (picture(4),)


def test_mathverse_json_and_tsv_read_alike(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(picture(1))
    row = mathverse_row(1, "Text Lite", image="images/1.png")
    only_text = mathverse_row(2, "Text Only", image="")
    (tmp_path / "testmini.json").write_text(json.dumps([row, only_text]))
    from_json, bad = read("mathverse", tmp_path / "testmini.json")
    assert not bad and from_json[1].images == ()
    table = row | {"index": 0, "image": encoded(1), "metadata": str(row["metadata"])}
    from_tsv, bad = read("mathverse", write_tsv(tmp_path / "a.tsv", [table]))
    assert not bad
    assert from_tsv == from_json[:1]


def test_mathvista_in_its_three_formats(tmp_path):
    choice = {"question_type": "multi_choice", "answer_type": "text", "unit": None}
    rows = [
        mathvista_row("1"),
        mathvista_row("2", choices=["Yes", "No"], answer="No", **choice),
        mathvista_row("3", answer_type="float", precision=2.0, answer="0.73"),
    ]
    from_parquet, bad = read("mathvista", write_parquet(tmp_path / "a.parquet", rows))
    assert not bad
    assert [q.answer_type for q in from_parquet] == ["integer", "choice", "float"]
    assert from_parquet[0].unit == "years" and from_parquet[2].precision == 2
    assert from_parquet[1].choices == ("Yes", "No")
    assert from_parquet[0].groups["skills"] == ("algebra", "statistics")

    (tmp_path / "images").mkdir()
    by_pid = {}
    for row in rows:
        (tmp_path / row["image"]).write_bytes(picture())
        by_pid[row["pid"]] = {k: v for k, v in row.items() if k not in ("decoded_image", "pid")}
    (tmp_path / "testmini.json").write_text(json.dumps(by_pid))
    assert read("mathvista", tmp_path / "testmini.json") == (from_parquet, {})

    table = [
        {
            "index": row["pid"],
            "image": encoded(),
            **{k: row[k] for k in ("question", "answer", "question_type", "answer_type", "unit")},
            "choices": str(row["choices"] or []),
            "task": row["metadata"]["task"],
            "skills": str(row["metadata"]["skills"]),
        }
        for row in rows
    ]
    # Without a column for it, a float's precision is that of its gold.
    assert read("mathvista", write_tsv(tmp_path / "a.tsv", table)) == (from_parquet, {})


def test_mathvision_in_its_three_formats(tmp_path):
    rows = [mathvision_row("4"), mathvision_row("5", options=[], answer="1\u20282")]
    encoded_rows = [row | {"decoded_image": {"bytes": picture(), "path": None}} for row in rows]
    from_parquet, bad = read("mathvision", write_parquet(tmp_path / "a.parquet", encoded_rows))
    assert not bad
    assert (from_parquet[0].choices, from_parquet[0].answer) == (("A", "B", "C"), "B")
    assert from_parquet[0].groups == {"subject": ("logic",), "level": ("3",)}
    assert from_parquet[1].answer_type == "text"

    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / row["image"]).write_bytes(picture())
    raw = [json.dumps(row, ensure_ascii=False).encode() for row in rows]  # U+2028 as it is
    assert read("mathvision", write_jsonl(tmp_path / "test.jsonl", raw)) == (from_parquet, {})

    table = [
        {
            "index": row["id"],
            "image": encoded(),
            "question": row["question"],
            "answer": row["answer"],
            "choices": str(row["options"]),
            "category": row["subject"],
            "level": row["level"],
        }
        for row in rows
    ]
    assert read("mathvision", write_tsv(tmp_path / "a.tsv", table)) == (from_parquet, {})


def test_logicvista_reads_its_own_file_and_sets_its_empty_row_aside(tmp_path):
    (tmp_path / "images").mkdir()
    rows = {}
    for name, answer in (("v1_0", "C"), ("v1_1", "A, C"), ("v1_20", "3"), ("v1_382", "")):
        (tmp_path / f"images/{name}.png").write_bytes(picture())
        question = "Which?" if answer else ""
        rows[name] = {"imagename": f"{name}.png", "question": question, "answer": answer}
        rows[name] |= {"skill": ["inductive"], "broad_capability": ["diagram"]}
    (tmp_path / "dataset.json").write_text(json.dumps(rows))
    questions, bad = read("logicvista", tmp_path / "dataset.json")
    assert [q.answer for q in questions] == ["C", "A, C", "3"]
    assert questions[0].groups == {"skill": ("inductive",)}
    assert bad == {"v1_382": "empty answer"}
    table = [{"index": "v1_0", "image": encoded(), "question": "Which?", "answer": "C"}]
    table[0]["skill"] = "['inductive']"
    assert read("logicvista", write_tsv(tmp_path / "a.tsv", table)) == (questions[:1], {})


def test_chartqa_reads_the_names_of_three_publishers_and_both_halves(tmp_path):
    image = {"bytes": picture(), "path": None}
    rows = [
        {"image": image, "query": "How many?", "label": ["14"], "human_or_machine": 0},
        {"image": image, "query": "How much?", "label": ["0.5"], "human_or_machine": 1},
    ]
    questions, bad = read("chartqa", write_parquet(tmp_path / "a.parquet", rows))
    assert not bad and [q.question_id for q in questions] == ["row-0", "row-1"]
    assert [(q.text, q.answer) for q in questions] == [("How many?", "14"), ("How much?", "0.5")]
    assert [q.groups["split"] for q in questions] == [("human",), ("augmented",)]

    rows = [{"image": image, "question": "How many?", "answer": "14", "type": "human_test"}]
    assert read("chartqa", write_parquet(tmp_path / "b.parquet", rows)) == (questions[:1], {})

    own = tmp_path / "ChartQA Dataset" / "test"
    (own / "png").mkdir(parents=True)
    (own / "png/x.png").write_bytes(picture())
    row = {"imgname": "x.png", "query": "How many?", "label": "14"}
    (own / "test_human.json").write_text(json.dumps([row]))
    row |= {"query": "How much?", "label": "0.5"}
    (own / "test_augmented.json").write_text(json.dumps([row]))
    (own / "val_human.json").write_text("[]")
    from_folder, bad = read("chartqa", own)
    assert not bad
    assert [q.groups["split"] for q in from_folder] == [("augmented",), ("human",)]

    table = [{"index": 7, "image": encoded(), "question": "How many?", "answer": 14}]
    table[0]["split"] = "test_human"
    (from_tsv,), bad = read("chartqa", write_tsv(tmp_path / "a.tsv", table))
    assert not bad
    assert replace(from_tsv, question_id="row-0", cluster="row-0") == questions[0]


def test_shards_of_a_folder_are_read_in_order_and_other_splits_are_not(tmp_path):
    for number in (1, 0):
        rows = [mathvision_row(str(number), image={"bytes": picture(), "path": None})]
        write_parquet(tmp_path / f"test-0000{number}-of-00002.parquet", rows)
    rows = [mathvision_row("9", image={"bytes": picture(), "path": None})]
    write_parquet(tmp_path / "testmini-00000-of-00001.parquet", rows)
    questions, _ = read("mathvision", tmp_path)
    assert [q.question_id for q in questions] == ["0", "1"]


def test_a_tsv_row_may_point_to_the_row_that_holds_its_image_or_hold_several(tmp_path):
    rows = [
        {"index": 1, "image": "2", "question": "Which?", "answer": "C", "skill": "inductive"},
        {"index": 2, "image": encoded(9), "question": "Which?", "answer": "B", "skill": ""},
        {"index": 3, "image": str([encoded(7), encoded(8)]), "question": "?", "answer": "A"},
        {"index": 4, "image": "99", "question": "Which?", "answer": "A", "skill": ""},
    ]
    (first, second, third), bad = read("logicvista", write_tsv(tmp_path / "a.tsv", rows))
    assert first.images == second.images == (picture(9),)
    assert third.images == (picture(7), picture(8))
    assert set(bad) == {"4"}


# --- Bad rows. -----------------------------------------------------------------------------------

HUGE = b'{"id": "huge", "question": "?", "options": [], "answer": ' + b"9" * 5000 + b"}"
DEEP = b'{"id": ' + b"[" * 100_000
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "missing image": (mathvision_row("m", image="images/none.jpg"), "does not exist"),
    "no image": (mathvision_row("n", image=""), "no image"),
    "truncated": (mathvision_row("t", image="cut.jpg"), "broken image"),
    "zero bytes": (mathvision_row("z", image="zero.png"), "is empty"),
    "traversal": (mathvision_row("p", image="../secret.png"), "leads out"),
    "absolute": (mathvision_row("a", image="/etc/hostname"), "leads out"),
    "link outside": (mathvision_row("l", image="link.png"), "leads out"),
    "link to itself": (mathvision_row("s", image="loop.png"), "does not exist"),
    "long name": (mathvision_row("o", image="x" * 5000), "too long"),
    "no picture": (mathvision_row("k", image="notes.png"), "not a readable"),
    "duplicate": (mathvision_row("good", image="good.png"), "duplicate id"),
    "no answer": (mathvision_row("e", image="good.png", answer=" "), "no letter of"),
    "empty answer": (mathvision_row("f", image="good.png", options=[], answer=None), "empty"),
    "wrong letter": (mathvision_row("w", image="good.png", answer="D"), "no letter of the 3"),
    "image of a number": (mathvision_row("i", image=5), "neither bytes nor path"),
    "surrogate": (mathvision_row("u", image="good.png", question="\ud800"), "surrogates"),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "not UTF-8"),
    "not JSON": (b'{"id": "half', "not JSON"),
    "no object": (b"[1, 2]", "not a JSON object"),
    "repeated key": (b'{"id": "1", "id": "2"}', "unique keys"),
    "huge integer": (HUGE, "not JSON"),
    "deep": (DEEP, "not JSON"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "loop.png").symlink_to(data / "loop.png")
    (data / "good.png").write_bytes(picture())
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    (data / "cut.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (data / "zero.png").write_bytes(b"")
    (data / "notes.png").write_bytes(b"no picture")
    return data


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_set_aside_with_its_reason_and_the_rest_is_read(folder, fault):
    row, reason = BAD_ROWS[fault]
    rows = [mathvision_row("good", image="good.png"), row, mathvision_row("b", image="good.png")]
    reader = QuestionReader("mathvision", write_jsonl(folder / "test.jsonl", rows))
    assert [q.question_id for q in reader] == ["good", "b"]
    (bad,) = reader.bad_rows
    assert bad.row == 1 and bad.row_id
    assert reason in bad.reason
    assert len(list(reader)) == 2 and len(reader.bad_rows) == 1  # reading again starts again


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"question_type": "multi_choice", "choices": None}, "without choices"),
        ({"question_type": "multi_choice", "choices": ["1", "2"]}, "not among the choices"),
        ({"answer": "7.5"}, "not an integer"),
        ({"answer_type": "float", "answer": "nan"}, "not a decimal number"),
        ({"answer_type": "float", "answer": "1.5", "precision": math.inf}, "decimals"),
        ({"answer_type": "poem"}, "unknown answer_type"),
        ({"metadata": "{'task': "}, "not a literal"),
        ({"metadata": "__import__('os')"}, "not a literal"),
        ({"metadata": [1]}, "no mapping"),
        ({"decoded_image": {"bytes": None, "path": None}}, "neither bytes nor path"),
    ],
)
def test_a_mathvista_row_that_could_not_be_scored_is_set_aside(tmp_path, more, reason):
    only_path: dict[str, Any] = {"decoded_image": None}
    rows = [mathvista_row("1", **only_path), mathvista_row("2", **(only_path | more))]
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / row["image"]).write_bytes(picture())
    questions, bad = read("mathvista", write_jsonl(tmp_path / "a.jsonl", rows))
    assert [q.question_id for q in questions] == ["1"]
    assert reason in bad["2"]


def test_bad_cells_of_a_tsv_spoil_only_their_rows(tmp_path):
    head = "index\timage\tquestion\tanswer\tskill\n"
    good = f"{{}}\t{encoded()}\tWhich?\tC\tinductive\n"
    text = head + good.format(1) + "2\t!!notbase64" + "!" * 80 + "\tWhich?\tC\tinductive\n"
    data = text.encode() + good.format(3).replace("Which?", "W?").encode()
    data = data.replace(b"W?", b"\xff?") + b"4\tshort row\n\n" + good.format(5).encode()
    (tmp_path / "a.tsv").write_bytes(data)
    questions, bad = read("logicvista", tmp_path / "a.tsv")
    assert [q.question_id for q in questions] == ["1", "5"]
    assert bad["2"] == "image is not base64"
    assert bad["3"] == "not UTF-8"
    assert "2 cells for 5 columns" in bad["4"]


def test_a_repeated_id_of_a_json_object_is_not_dropped_silently(tmp_path):
    row = json.dumps({"imagename": "x.png", "question": "Which?", "answer": "C"})
    (tmp_path / "x.png").write_bytes(picture())
    (tmp_path / "dataset.json").write_text(f'{{"v1": {row}, "v1": {row}, "v2": 5}}')
    questions, bad = read("logicvista", tmp_path / "dataset.json")
    assert len(questions) == 1
    assert bad == {"v1": "duplicate id", "v2": "not a JSON object with unique keys"}


def test_a_parquet_string_that_is_no_text_spoils_only_its_row(tmp_path):
    rows = [mathvision_row(n, image={"bytes": picture(), "path": None}) for n in "123"]
    table = pa.Table.from_pylist(rows)
    broken = pa.array([b"fine", b"\xff\xfe", b"fine"]).view(pa.string())
    position = table.column_names.index("question")
    pq.write_table(table.set_column(position, "question", broken), tmp_path / "a.parquet")
    questions, bad = read("mathvision", tmp_path / "a.parquet")
    assert [q.question_id for q in questions] == ["1", "3"]
    assert bad == {"row-1": "not UTF-8"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"", "not a parquet file"),
        ("a.json", b"{", "not a JSON file"),
        ("a.json", b"5", "neither a list nor an object"),
        ("a.json", b"\xff", "not a JSON file"),
        ("a.json", b"[]", "it is empty"),
        ("a.json", b'[{"question": "?"}]', "1 x empty answer"),
        ("a.tsv", b"a\tb\n", "no columns 'index'"),
        ("a.csv", b"", "expected one file"),
    ],
)
def test_a_file_that_can_not_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(QuestionReader("chartqa", tmp_path / name))


def test_what_does_not_exist_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        QuestionReader("chartqa", tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no benchmark 'chart'"):
        QuestionReader("chart", tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected one file, or a folder"):
        list(QuestionReader("chartqa", tmp_path))


# --- Hubs. ---------------------------------------------------------------------------------------


def test_a_hub_without_the_library_or_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(QuestionReader("chartqa", "lmms-lab/ChartQA"))

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(ValueError, match="give the path of a local file"):
        list(QuestionReader("chartqa", "lmms-lab/ChartQA"))


def test_a_hub_is_streamed_with_its_split_and_configuration(monkeypatch):
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return Streamed([mathverse_row(1, "Text Lite")])

    class Streamed(list[dict[str, Any]]):
        features = None

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    for source in ("AI4Math/MathVerse", "me/mine:part"):
        (question,), bad = read("mathverse", source)
        assert question.images == (picture(1),) and not bad
    assert asked == [
        (("AI4Math/MathVerse", "testmini"), {"split": "testmini", "streaming": True}),
        (("me/mine", "testmini"), {"split": "part", "streaming": True}),
    ]


# --- Statistics. ---------------------------------------------------------------------------------


def run(outcomes_of: str, per_cluster: int = 1, **groups: Any) -> list[Answered]:
    """Answered questions: "r", "w" or "u" each; `per_cluster` successive ones share a cluster."""
    names = {"r": R, "w": W, "u": U}
    answered = []
    for number, letter in enumerate(outcomes_of):
        one: Any = Score(names[letter], "because")
        question = replace(
            ask("mathverse", "5"),
            question_id=str(number),
            cluster=str(number // per_cluster),
            groups=groups,
        )
        extracted = Extracted("4", "5")
        answered.append(
            Answered(question, "<image>?", "so \\boxed{4}", extracted, Scores(one, one))
        )
    return answered


def test_images_in_lists_stay_encoded_when_streamed_from_a_hub(tmp_path, monkeypatch):
    import datasets

    content = [
        {"problem": "<image>?", "answer": "1", "images": [{"bytes": picture(), "path": None}]}
    ]
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "rows.parquet")
    features = datasets.Features(
        problem=datasets.Value("string"),
        answer=datasets.Value("string"),
        images=datasets.List(datasets.Image()),
    )

    def streamed(name, config, **settings):
        files = str(tmp_path / "rows.parquet")
        data: Any = load("parquet", data_files=files, split="train", streaming=True)
        return data.cast(features)

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", streamed)
    (row,) = read_hub("owner/name:train", "train", None)
    assert row["images"][0]["bytes"] == picture()  # pyright: ignore


def test_unscored_responses_are_in_no_denominator_and_bound_the_accuracy():
    result = accuracy(run("rrwu"), "strict")
    assert result.value == pytest.approx(2 / 3)
    assert (result.num_correct, result.num_wrong, result.num_unscored) == (2, 1, 1)
    assert (result.lowest, result.highest) == (0.5, 0.75)


def test_without_a_scored_response_there_is_no_accuracy():
    result = accuracy(run("uu"), "strict")
    assert math.isnan(result.value) and math.isnan(result.low)
    assert (result.lowest, result.highest) == (0.0, 1.0)
    assert math.isnan(accuracy([], "strict").lowest)


def test_the_interval_of_two_questions_is_that_of_all_four_draws():
    # Draws of two from {right, wrong}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4.
    result = accuracy(run("rw"), "strict")
    assert (result.low, result.high) == (0.0, 1.0)


def test_the_interval_of_independent_questions_is_binomial():
    result = accuracy(run("r" * 60 + "w" * 40), "strict")
    low, high = stats.binom(100, 0.6).ppf([0.025, 0.975]) / 100
    # A quantile of 9,999 draws of a step function of 0.01 may miss by a step.
    assert result.low == pytest.approx(low, abs=0.011)
    assert result.high == pytest.approx(high, abs=0.011)


def test_an_interval_of_equal_answers_has_a_width():
    none, all_right = accuracy(run("w" * 80), "strict"), accuracy(run("r" * 80), "strict")
    bound = 1 - 0.025 ** (1 / 80)  # P(80 wrong) = 2.5%
    assert (none.low, none.high) == (0.0, pytest.approx(bound))
    assert (all_right.low, all_right.high) == (pytest.approx(1 - bound), 1.0)


def test_versions_of_one_problem_count_as_one_draw():
    singly = accuracy(run("r" * 60 + "w" * 40), "strict")
    together = accuracy(run("rrrrr" * 60 + "wwwww" * 40, per_cluster=5), "strict")
    apart = accuracy(run("rrrrr" * 60 + "wwwww" * 40), "strict")
    assert (together.low, together.high) == (singly.low, singly.high)
    # Negative control: as 500 independent questions the interval is narrower by the root of 5.
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.15)


def test_a_seed_repeats_an_interval():
    answered = run("r" * 30 + "w" * 33)
    assert accuracy(answered, "strict", seed=1) == accuracy(answered, "strict", seed=1)


def test_accuracy_is_broken_down_by_every_value_of_every_group():
    answered = run("rw", skills=("algebra", "logic")) + run("r", skills=("logic",))
    table = accuracy_by_group(answered, "compat")
    assert table["skills"]["algebra"].value == 0.5
    assert table["skills"]["logic"].value == pytest.approx(2 / 3)


def test_two_runs_are_compared_on_what_both_scored():
    first, second = run("rrwwu" + "r" * 5), run("rwrrr" + "r" * 4 + "u")
    result = compare(first, second, "strict")
    assert result.difference == pytest.approx(1 / 8)
    assert (result.num_questions, result.num_clusters, result.num_left_out) == (8, 8, 2)
    # McNemar's exact test: two gained, one lost.
    assert result.p_value == pytest.approx(stats.binomtest(2, 3).pvalue)
    assert result.low <= result.difference <= result.high


def test_equal_runs_do_not_differ_and_a_gain_everywhere_is_significant():
    same = compare(run("rw" * 20), run("rw" * 20), "strict")
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    better = compare(run("rw" * 20), run("rr" * 20), "strict")
    assert better.low > 0 and better.p_value == pytest.approx(2 * 0.5**20)
    worse = compare(run("rr" * 20), run("rw" * 20), "strict")
    assert (worse.low, worse.high) == (-better.high, -better.low)


def test_a_paired_interval_is_narrower_than_two_runs_apart_would_give():
    first, second = run("r" * 50 + "w" * 50), run("r" * 52 + "w" * 48)
    result = compare(first, second, "strict")
    unpaired = math.sqrt(0.5 * 0.5 / 100 + 0.52 * 0.48 / 100) * 1.96 * 2
    assert result.high - result.low < unpaired / 2


def test_clusters_weaken_a_comparison():
    # One problem's five versions are gained: by question five gains, by problem a single one.
    first, second = run("w" * 5 + "r" * 45, 5), run("r" * 50, 5)
    assert compare(first, second, "strict").p_value == 1.0
    apart = compare(run("w" * 5 + "r" * 45), run("r" * 50), "strict")
    assert apart.p_value == pytest.approx(2 * 0.5**5)


def test_runs_without_a_common_question_are_refused():
    with pytest.raises(ValueError, match="scored in both"):
        compare(run("r"), run("u"), "strict")
    with pytest.raises(ValueError, match="answered twice"):
        compare(run("r"), run("r") + run("w"), "strict")


# --- Writers. ------------------------------------------------------------------------------------


def test_lmms_eval_samples_hold_one_response_a_line(tmp_path):
    write_lmms_samples(tmp_path / "samples.jsonl", run("rwu"))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert [s["doc_id"] for s in samples] == [0, 1, 2]
    assert samples[0]["target"] == "5" and samples[0]["filtered_resps"] == "5"
    assert samples[0]["resps"] == ["so \\boxed{4}"] and samples[0]["extracted"] == "4"
    assert [s["compat_score"] for s in samples] == [1, 0, None]
    assert samples[2]["strict"] == {"outcome": U, "reason": "because"}


def test_a_vlmevalkit_table_survives_tabs_quotes_and_line_breaks(tmp_path):
    pandas = pytest.importorskip("pandas")
    (item,) = run("r", skills=("algebra",), version=("Text Lite",))
    response = 'a\tb\n"c"\r\nd \u2028 \\boxed{5}'
    choices = replace(
        item.question, answer_type="choice", choices=("4", "5"), benchmark="mathvista"
    )
    answered = [item, replace(item, response=response, question=choices)]
    write_vlmevalkit_tsv(tmp_path / "a.tsv", answered)
    table = pandas.read_csv(tmp_path / "a.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert list(table["prediction"]) == ["so \\boxed{4}", response]
    assert list(table["answer_option"]) == ["", "B"]
    assert table["choices"][1] == "['4', '5']" and table["skills"][0] == "['algebra']"
    assert table["problem_version"][0] == "Text Lite"
    assert list(table["strict"]) == [R, R] and list(table["index"]) == ["0", "0"]
    with (tmp_path / "a.tsv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file, delimiter="\t"))) == 3
