"""Inspection: the checks of training, and known duplicates and benchmark questions, no others."""

import itertools
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_data_files import FOLDER
from PIL import Image, ImageDraw

from megatron_mmr1.data.dataset import Keys, PromptDataset
from megatron_mmr1.data.demonstrations import Demonstrations
from megatron_mmr1.inspection.charts import histogram
from megatron_mmr1.inspection.contamination import BenchmarkIndex
from megatron_mmr1.inspection.findings import Findings, answer_kind, inspect, numbers_of
from megatron_mmr1.inspection.fingerprints import ngrams, row_key
from megatron_mmr1.inspection.rows import Checks, Rows

CHECKS = Checks(Keys(), "", max_tokens=64)
TOOL = Path(__file__).parents[1] / "tools" / "inspect_data.py"

LONG = "In the figure the chord AB of length 8 cm is 3 cm from the centre; what is the radius?"
# Three of the thirteen 8-word runs of LONG.
CLOSE = "In the figure the chord AB of length 8 cm touches a smaller circle; what is its area?"
INSTRUCTION = "Answer the question below and give only the letter of the right option."


def diagram(seed: int, width: int = 200) -> Image.Image:
    """Shaded bars of random heights: a picture of a benchmark."""
    rng = random.Random(seed)
    image = Image.new("RGB", (width, 150), "white")
    draw = ImageDraw.Draw(image)
    for left in range(10, width - 20, 24):
        color = (rng.randrange(200), rng.randrange(200), 90)
        draw.rectangle((left, rng.randrange(10, 120), left + 15, 140), fill=color)
    return image


def saved(folder: Path, name: str, image: Image.Image, **how: Any) -> list[str]:
    (folder / "images").mkdir(exist_ok=True)
    image.save(folder / "images" / name, **how)
    return [f"images/{name}"]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen questions: a long one, a short one, a flat image, and twelve with one instruction."""
    folder = tmp_path_factory.mktemp("benchmark")
    rows = [
        {"id": "long", "question": LONG, "image": saved(folder, "0.png", diagram(0))[0]},
        {"id": "short", "question": "Find x.", "image": saved(folder, "1.png", diagram(1))[0]},
        {
            "id": "flat",
            "question": "What colour is it?",
            "image": saved(folder, "2.png", Image.new("RGB", (90, 60), "white"))[0],
        },
    ]
    for number in range(3, 15):
        image = saved(folder, f"{number}.png", diagram(number))[0]
        rows.append({"id": str(number), "question": f"{INSTRUCTION} No. {number}", "image": image})
    return write_lines(folder / "test.jsonl", [row | {"answer": "7"} for row in rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows named for what they are; those that start with "not" must not be found."""
    folder = tmp_path_factory.mktemp("data")
    half = diagram(1).resize((100, 75))
    own = saved(folder, "own.png", diagram(99))
    same, again = diagram(50), diagram(50)
    rows = [
        ("same image", "How many?", saved(folder, "a.png", diagram(0), compress_level=0)),
        ("similar image", "How tall?", saved(folder, "b.jpg", half, quality=75)),
        ("text", f"Think first. {LONG.upper().replace(';', ',')} Explain.", own),
        ("not close", CLOSE, own),
        ("not instruction", f"{INSTRUCTION} Which bar is red?", own),
        ("not short", "Find x.", own),
        ("not flat", "Which?", saved(folder, "c.png", Image.new("RGB", (80, 60), "white"))),
        ("twin 1", "Sum  of all\nbars?", saved(folder, "d.png", same)),
        ("twin 2", "Sum of all bars?", saved(folder, "e.png", again, compress_level=0)),
        ("not twin: image", "Sum of all bars?", own),
        ("not twin: text", "Sum of all bars", saved(folder, "f.png", same)),
        ("<script>alert(1)</script>", "<script>alert(2)</script>", own),
        ("not read", "Which?", ["images/none.png"]),
    ]
    answers = {"twin 1": "B", "twin 2": "12", "<script>alert(1)</script>": "<b>bold</b>"}
    return write_lines(
        folder / "rows.jsonl",
        [
            {
                "id": row_id,
                "problem": f"<image>{text}",
                "answer": answers.get(row_id, "8"),
                "images": images,
            }
            for row_id, text, images in rows
        ],
    )


@pytest.fixture(scope="module")
def output(data: Path, benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool writes."""
    folder = tmp_path_factory.mktemp("output")
    arguments = [str(data), "--benchmark", f"mathvision={benchmark}", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["inspect_data.py", *arguments, "--samples", "20"])
        runpy.run_path(str(TOOL))["main"]()
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def inspected(path: Path, **limits: int) -> Findings:
    rows = Rows(str(path), None, CHECKS)
    return inspect(
        rows, BenchmarkIndex(), numbers_of(len(rows), **({"limit": 0, "seed": 0} | limits))
    )


def test_a_benchmarks_questions_are_found_and_near_misses_are_not(output):
    found = {
        (pair["row_id"], pair["question_id"]): pair["how"]
        for pair in lines(output / "contamination.jsonl")
    }
    assert set(found) == {("same image", "long"), ("similar image", "short"), ("text", "long")}
    assert found["same image", "long"] == "same image"
    assert found["similar image", "short"].startswith("similar image")
    assert found["text", "long"] == "100% of its 8-word runs"


def test_exact_duplicates_are_found_and_near_ones_are_not(data, output):
    (same,) = lines(output / "duplicates.jsonl")
    assert same["row_ids"] == ["twin 1", "twin 2"] and same["rows"] == [7, 8]
    assert inspected(data).conflicts == 1  # B and 12


def test_bad_rows_are_listed_and_nothing_else_is(output):
    (bad,) = lines(output / "bad_rows.jsonl")
    assert bad["row_id"] == "not read" and "does not exist" in bad["reason"]


def test_the_page_escapes_what_comes_from_the_data_and_needs_no_other_file(output):
    html = (output / "index.html").read_text()
    assert "<script" not in html and "<b>bold" not in html
    assert "&lt;script&gt;alert(1)" in html and "&lt;script&gt;alert(2)" in html
    assert "8-word runs" in html and "data:image/png;base64," in html  # the rule, and thumbnails
    assert "http" not in html and len(html) < 600_000


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl")), ids=lambda path: path.stem)
def test_what_is_bad_is_what_training_sets_aside(path, tiny_processor):
    kind = "rl" if path.stem.startswith("rl") else "sft"
    rows = Rows(str(path), kind, CHECKS, tiny_processor)
    found = inspect(rows, BenchmarkIndex(), numbers_of(len(rows), 0, 0))
    if kind == "rl":
        expected = PromptDataset(path, tiny_processor, max_tokens=64).bad_rows
        assert found.bad_rows == expected
        return
    data = Demonstrations(path, tiny_processor, max_tokens=64)
    for bad in found.bad_rows:
        with pytest.raises(ValueError) as error:
            data.sizes(bad.row)
        assert str(error.value) == bad.reason and bad.row_id == data.row_id(bad.row)
    assert found.num_usable == len(data) - len(found.bad_rows)
    for number in set(range(len(data))) - {bad.row for bad in found.bad_rows}:
        data.sizes(number)


def test_tokens_are_those_of_training(tiny_processor):
    for name, data in (
        ("rl_rendered", PromptDataset(FOLDER / "rl_rendered.jsonl", tiny_processor)),
        ("sft_rendered", None),
    ):
        rows = Rows(str(FOLDER / f"{name}.jsonl"), None, CHECKS, tiny_processor)
        tokens = inspect(rows, BenchmarkIndex(), numbers_of(len(rows), 0, 0)).sizes["tokens"]
        if data is not None:
            assert tokens.tolist() == [size.num_prompt_tokens for size in data.sizes]
        else:
            (demonstration,) = Demonstrations(FOLDER / f"{name}.jsonl", tiny_processor, 64).load(0)
            length = len(demonstration.prompt.token_ids) + len(demonstration.response_token_ids)
            assert tokens[0] == length


def test_the_kind_is_found_out_and_asked_for_where_it_cannot_be(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho ho"}]
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": turns, "id": 1}])
    found = inspected(path)
    assert found.kind == "sft" and found.sizes["answer characters"].tolist() == [5]
    path = write_lines(tmp_path / "b.jsonl", [{"question": "Hi", "answer": "8"}])
    with pytest.raises(ValueError, match=r"no conversations, messages or problem.*--problem-key"):
        Rows(str(path), None, CHECKS)
    assert Rows(str(path), None, CHECKS._replace(keys=Keys("question"))).kind == "rl"


def test_a_limit_draws_the_same_rows_each_time(data):
    assert numbers_of(100, 10, seed=3).tolist() == numbers_of(100, 10, seed=3).tolist()
    assert numbers_of(100, 10, seed=3).tolist() != numbers_of(100, 10, seed=4).tolist()
    assert numbers_of(5, 10, seed=0).tolist() == [0, 1, 2, 3, 4]
    found = inspected(data, limit=4)
    assert (found.num_rows, found.num_inspected) == (13, 4)


def test_ngrams_and_keys_of_texts():
    words = [f"w{i}" for i in range(9)]
    assert ngrams("<image>" + ", ".join(words).upper()) == {
        " ".join(words[:8]),
        " ".join(words[1:]),
    }
    assert ngrams("one two three") == set()
    assert row_key("a  b\n", []) == row_key("a b", []) != row_key("a B", [])
    assert row_key("x + 1", []) != row_key("x - 1", [])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        *((letter, "option letter") for letter in ("A", "(B)", "C.", "$D$")),
        *((number, "number") for number in ("8", "-1.5", "1,204", "3/4", ".5", "$\\frac{1}{2}$")),
        *((number, "number") for number in ("12%", "12\\%")),
        *((other, "other") for other in ("Yes", "x^2", "5 cm", "a", "-", "1,2", "AB")),
    ],
)
def test_kinds_of_answers(answer, kind):
    assert answer_kind(answer) == kind


def test_a_histogram_counts_every_value_once_and_its_last_bar_holds_the_longest():
    values = np.array([0, 0, 1, 5, 7, 100_000], np.uint32)
    svg = histogram(values, "tokens")
    counts = [int(part.split(" rows")[0].replace(",", "")) for part in svg.split(": ")[1:]]
    assert sum(counts) == len(values)
    assert "100,000: 1 rows" in svg


def test_a_file_without_a_usable_row_still_has_a_page(tmp_path):
    from megatron_mmr1.inspection.page import html

    path = write_lines(tmp_path / "a.jsonl", [{"problem": "Sum?", "answer": ""}])
    page = html(inspected(path), {}, [])
    assert "No usable row." in page and "empty answer" in page


def test_reasons_are_counted_without_their_names_and_numbers(tmp_path):
    rows = [{"problem": "a", "answer": "8", "images": [f"{i}.png"]} for i in range(3)]
    found = inspected(write_lines(tmp_path / "a.jsonl", rows))
    ((reason, bad),) = found.reasons()
    assert reason == "image file '...' does not exist" and len(bad) == 3


def test_images_of_one_bar_more_are_not_similar():
    """The negative control of the threshold: 60 pairs of pictures of one kind."""
    from megatron_mmr1.inspection.contamination import MAX_HAMMING
    from megatron_mmr1.inspection.fingerprints import image_print

    prints = [image_print(diagram(seed)) for seed in range(60)]
    for one, other in itertools.pairwise(prints):
        bits = (one.across ^ other.across).bit_count() + (one.down ^ other.down).bit_count()
        assert bits > MAX_HAMMING
