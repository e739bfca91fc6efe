"""Evaluations: folders, resuming, the page, comparisons; and whole ones with a real engine."""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_benchmarks import mathvista_row, picture, run, write_parquet

from megatron_mmr1.cli import load_config
from megatron_mmr1.config.benchmarks import name_of, settled
from megatron_mmr1.config.run_dir import open_evaluation_dir
from megatron_mmr1.config.schema import EvaluateConfig
from megatron_mmr1.config.validate import validate_evaluate
from megatron_mmr1.evaluation import generation
from megatron_mmr1.evaluation.comparison import Run, check_comparable, compare_runs, table_of
from megatron_mmr1.evaluation.generation import read_contents
from megatron_mmr1.evaluation.journal import Journal, Reply, Response
from megatron_mmr1.evaluation.outcome import summarize
from megatron_mmr1.evaluation.questions import Answered, Question
from megatron_mmr1.evaluation.records import QuestionReader
from megatron_mmr1.evaluation.scoring import extract, score
from megatron_mmr1.evaluation.statistics import compare
from megatron_mmr1.evaluation.thumbnails import MAX_SIDE, thumbnail
from megatron_mmr1.evaluation.writers import read_samples, write_lmms_samples
from megatron_mmr1.observability.report_evaluation import write_evaluation_report


def png(width: int, height: int, seed: int = 0) -> bytes:
    """An image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


ROOT = Path(__file__).resolve().parents[1]


def config_of(*overrides: str) -> EvaluateConfig:
    return settled(load_config(EvaluateConfig, "evaluate", ["model=models/some", *overrides]))


# --- Settings and folders. -----------------------------------------------------------------------


def test_each_benchmark_has_its_usual_length_and_only_digits_its_data():
    digits = config_of()
    assert (digits.benchmark, digits.data) == ("digits", "data/digits/heldout.parquet")
    assert digits.rollout.max_response_tokens == 32 and digits.rollout.temperature == 0
    chart = config_of("benchmark=chartqa", "data=x.parquet")
    assert chart.rollout.max_response_tokens == 4096
    assert config_of("rollout.max_response_tokens=7").rollout.max_response_tokens == 7
    with pytest.raises(ValueError, match=r"data=None .*add data=FILE.*AI4Math/MathVista:testmini"):
        config_of("benchmark=mathvista")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/MMR1-7B", "MMR1-7B"),
        ("outputs/digits/demo/hf", "demo"),
        ("outputs/digits/demo/hf/", "demo"),
        ("outputs/digits/demo/checkpoints/step_20", "demo-step_20"),
        ("outputs/digits/demo/checkpoints/step_20/megatron", "demo-step_20"),
    ],
)
def test_a_models_name_comes_from_its_folder(model: str, name: str):
    assert name_of(model) == name


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("name=a/b", "name='a/b' is no plain folder name"),
        ("max_prompt_tokens=0", "max_prompt_tokens=0 is too small"),
        ("max_bad_share=2", "max_bad_share=2.0 is no share"),
        ("min_pixels=-1", "min_pixels=-1 is too small"),
        ("samples_per_prompt=2", "samples_per_prompt=2 draws the same greedy response"),
        ("rollout.kv_cache_bytes=-1", "rollout.kv_cache_bytes=-1 is too small"),
    ],
)
def test_a_bad_setting_gives_key_value_and_remedy(override: str, start: str):
    with pytest.raises(ValueError) as caught:
        validate_evaluate(config_of(override))
    assert str(caught.value).startswith(start)


def test_an_unfinished_folder_is_found_again_and_a_finished_one_is_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    first = open_evaluation_dir(config_of())
    assert first == Path("outputs/evaluate/digits/some")
    assert open_evaluation_dir(config_of()) == first  # interrupted, or refused: it goes on
    other = open_evaluation_dir(config_of("seed=1"))
    assert other.name == "some-2"
    (first / "summary.json").touch()
    assert open_evaluation_dir(config_of()).name == "some-3"
    assert open_evaluation_dir(config_of("seed=1")).name == "some-2"


def test_a_named_folder_goes_on_with_the_same_settings_alone(tmp_path: Path):
    folder = tmp_path / "mine"
    assert open_evaluation_dir(config_of(f"output={folder}")) == folder
    (folder / "summary.json").touch()
    assert open_evaluation_dir(config_of(f"output={folder}", "max_bad_share=0.5")) == folder
    with pytest.raises(ValueError, match=r"seed=1 here, 0 there; .*another output="):
        open_evaluation_dir(config_of(f"output={folder}", "seed=1"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match=r"no config\.yaml; use another output="):
        open_evaluation_dir(config_of(f"output={tmp_path / 'other'}"))


# --- The journal. --------------------------------------------------------------------------------


def reply(question_id: str, *texts: str, refused: str = "", digest: str = "d") -> Reply:
    return Reply(question_id, digest, tuple(Response(t, 3, False) for t in texts), refused)


def test_replies_survive_and_a_half_written_line_is_dropped(tmp_path: Path):
    journal = Journal(tmp_path, "weights")
    replies = [reply("1", "a\u2028b\n", '"'), reply("2", refused="too long")]
    for one in replies:
        journal.add(one)
    whole = (tmp_path / "responses.jsonl").read_bytes()
    with (tmp_path / "responses.jsonl").open("ab") as file:  # killed while writing
        file.write(b'{"question_id": "3", "resp')
    again = Journal(tmp_path, "weights")
    assert list(again.replies.values()) == replies
    assert (tmp_path / "responses.jsonl").read_bytes() == whole
    again.add(reply("3", "c"))
    assert list(Journal(tmp_path, "weights").replies) == ["1", "2", "3"]


def test_a_journal_of_other_weights_or_a_damaged_one_is_refused(tmp_path: Path):
    Journal(tmp_path, "weights").add(reply("1", "a"))
    with pytest.raises(ValueError, match=r"have changed since; give another output="):
        Journal(tmp_path, "others")
    path = tmp_path / "responses.jsonl"
    path.write_text(path.read_text() + '{"question_id": 5}\n')
    with pytest.raises(ValueError, match="is damaged"):
        Journal(tmp_path, "weights")


# --- From the file to the numbers. ---------------------------------------------------------------


def test_digits_are_read_as_they_are_trained_on(tmp_path: Path):
    image = {"bytes": picture(), "path": None}
    rows: list[dict[str, Any]] = [
        {"id": "a", "problem": "<image>Sum?", "answer": "8", "category": "sum2", "images": [image]},
        {"id": "b", "problem": "Sum of 1 and 1?", "answer": "2", "category": "", "images": []},
        {"id": "c", "problem": "<image>Sum?", "answer": "", "category": "", "images": [image]},
    ]
    reader = QuestionReader("digits", write_parquet(tmp_path / "a.parquet", rows))
    contents = read_contents(reader)
    assert contents.prompts == {"a": "<image>Sum?", "b": "Sum of 1 and 1?"}
    assert contents.questions[0].groups == {"category": ("sum2",)}
    assert [bad.row_id for bad in contents.bad_rows] == ["c"]
    assert list(contents.thumbnails) == ["a"]


def test_digits_have_the_rule_of_their_training():
    question = Question("digits", "a", "<image>Sum?", "8", "text", cluster="a")
    right = "<think>3+5=8</think><answer>\\boxed{8}</answer>"
    texts = (right, "\\boxed{8}", "<answer>\\boxed{7}</answer>", "<think>\\boxed{8}")
    answered = []
    for text in texts:
        box = extract(text, "digits")
        answered.append(Answered(question, "<image>Sum?", text, box, score(box, question)))
    assert [item.scores.strict.outcome for item in answered] == ["correct", *["wrong"] * 3]
    assert all(item.scores.strict == item.scores.compat for item in answered)
    summary = summarize(answered, generation.Contents([question], {}, {"a": "d"}, [], {}), 0)
    assert (summary["num_well_formed"], summary["overall"]["strict"]["value"]) == (1, 0.25)
    json.dumps(summary, allow_nan=False)  # no NaN: one cluster has no interval


def test_the_summary_says_why_answers_are_unscored():
    answered = run("rwuu")
    contents = generation.Contents([item.question for item in answered], {}, {}, [], {})
    summary = summarize(answered, contents, 0)
    assert summary["unscored_reasons"] == {"because": 2}


def test_few_small_images_stay_in_memory(tmp_path: Path):
    rows = [
        mathvista_row(str(n), decoded_image={"bytes": png(700, 500, n), "path": None})
        for n in range(8)
    ]
    reader = QuestionReader("mathvista", write_parquet(tmp_path / "a.parquet", rows))
    contents = read_contents(reader, num_thumbnails=3)
    lowest = sorted(contents.digests, key=lambda name: contents.digests[name])[:3]
    assert sorted(contents.thumbnails) == sorted(lowest)
    assert all(question.images == () for question in contents.questions)
    (small,) = contents.thumbnails[lowest[0]]
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, max(image.size)) == ("JPEG", MAX_SIDE)
    assert thumbnail(png(28, 28)).startswith(b"\x89PNG")


def test_the_digest_notices_another_image_and_another_gold(tmp_path: Path):
    digests = set()
    for number, more in enumerate([{}, {"answer": "8"}, {"decoded_image": picture(9)}]):
        if "decoded_image" in more:
            more = {"decoded_image": {"bytes": more["decoded_image"], "path": None}}
        path = write_parquet(tmp_path / f"{number}.parquet", [mathvista_row("1", **more)])
        contents = read_contents(QuestionReader("mathvista", path))
        digests.add(contents.digests["1"])
    assert len(digests) == 3


def test_samples_can_be_read_again(tmp_path: Path):
    answered = [
        replace(item, digest="d", num_tokens=4, is_cut_off=True)
        for item in run("rwu", skills=("algebra", "logic"))
    ]
    write_lmms_samples(tmp_path / "samples.jsonl", answered)
    assert read_samples(tmp_path / "samples.jsonl", "mathverse") == answered
    (tmp_path / "samples.jsonl").write_text('{"doc_id": 0}\n')
    with pytest.raises(ValueError, match="no samples file"):
        read_samples(tmp_path / "samples.jsonl", "mathverse")


# --- The page. -----------------------------------------------------------------------------------

EVIL = "<script>alert('\"&')</script>"


def write_folder(folder: Path, answered: list[Answered], **more: Any) -> Path:
    """What an evaluation leaves, without an engine."""
    folder.mkdir()
    questions = [item.question for item in answered]
    contents = generation.Contents(questions, {}, {q.question_id: "d" for q in questions}, [], {})
    summary = {"benchmark": "mathverse", "name": folder.name, "model": "m", "data": "d"}
    summary |= {"temperature": 0, "samples_per_prompt": 1, "max_response_tokens": 9}
    summary |= summarize(answered, contents, 0) | more
    (folder / "summary.json").write_text(json.dumps(summary))
    write_lmms_samples(folder / "samples.jsonl", answered)
    return folder


def test_everything_on_the_page_is_escaped(tmp_path: Path):
    answered = []
    for number, item in enumerate(run("rwu")):
        question = replace(
            item.question,
            question_id=f"{number}{EVIL}",
            text=EVIL,
            answer=EVIL,
            choices=(EVIL, "2"),
            groups={EVIL: (EVIL,)},
        )
        scores = item.scores._replace(strict=item.scores.strict._replace(reason=EVIL))
        box = item.extracted._replace(strict=EVIL)
        answered.append(replace(item, question=question, response=EVIL, extracted=box))
        answered[-1] = replace(answered[-1], scores=scores)
    evil = {key: EVIL for key in ("name", "model", "data", "benchmark")}
    folder = write_folder(tmp_path / "run", answered, **evil)
    thumbnails = {f"0{EVIL}": [thumbnail(png(28, 28))], f"1{EVIL}": [thumbnail(png(300, 200))]}
    page = write_evaluation_report(folder, thumbnails).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 20
    assert page.count('src="data:image/png') == 1 and page.count('src="data:image/jpeg') == 1
    assert "http" not in page.replace("http-equiv", "")  # self-contained


def test_the_page_shows_numbers_with_their_interval_and_a_bounded_gallery(tmp_path: Path):
    answered = run("r" * 60 + "w" * 40 + "u" * 20, version=("Text Lite",))
    folder = write_folder(tmp_path / "run", answered)
    page = write_evaluation_report(folder, {}).read_text()
    assert "60.0%" in page and "Text Lite" in page
    assert "with the unscored, anywhere from 50.0 to 66.7%" in page
    assert page.count("<summary>response</summary>") == 30


# --- Comparing. ----------------------------------------------------------------------------------


def read_folder(folder: Path) -> Run:
    from megatron_mmr1.evaluation.comparison import read_run

    return read_run(folder)


def test_a_comparison_is_paired_by_question(tmp_path: Path):
    """Negative control: with one run's answers shuffled over the questions the interval widens."""
    first, second = run("r" * 50 + "w" * 50), run("r" * 55 + "w" * 45)
    shuffled = [
        replace(one, scores=other.scores) for one, other in zip(second, second[::-1], strict=True)
    ]
    runs = [
        read_folder(write_folder(tmp_path / name, answered))
        for name, answered in (("a", first), ("b", second), ("c", shuffled))
    ]
    paired = compare_runs(runs[0], runs[1], "strict")
    control = compare_runs(runs[0], runs[2], "strict")
    assert paired.difference == control.difference == pytest.approx(0.05)
    assert paired.low > 0 > control.low
    assert (control.high - control.low) > 3 * (paired.high - paired.low)
    assert paired == compare(first, second, "strict")


def test_runs_that_are_not_comparable_are_refused(tmp_path: Path):
    base = read_folder(write_folder(tmp_path / "base", run("rrww")))
    other = read_folder(write_folder(tmp_path / "other", run("rrww"), benchmark="chartqa"))
    with pytest.raises(ValueError, match=r"benchmark=mathverse.*benchmark=chartqa; give two runs"):
        check_comparable(base, other)
    fewer = read_folder(write_folder(tmp_path / "fewer", run("rrw")))
    with pytest.raises(ValueError, match=r"fewer lacks 1 questions .* '3'; evaluate both on"):
        check_comparable(base, fewer)
    # A question that a model could not be asked, by name, is no fault.
    check_comparable(base, replace(fewer, set_aside=frozenset({"3"})))
    changed = [replace(item, digest="x") for item in run("rrww")]
    with pytest.raises(ValueError, match=r"question '0' .* are not the same"):
        check_comparable(base, read_folder(write_folder(tmp_path / "changed", changed)))
    short = read_folder(write_folder(tmp_path / "short", run("rrww"), max_response_tokens=5))
    with pytest.raises(ValueError, match=r"max_response_tokens=9, .*max_response_tokens=5"):
        check_comparable(base, short)
    with pytest.raises(ValueError, match=r"no summary\.json; give the output folder"):
        read_folder(tmp_path)


def test_a_table_has_models_as_rows_and_an_average_of_whole_rows(tmp_path: Path):
    def one(name: str, benchmark: str, outcomes: str) -> Run:
        folder = tmp_path / f"{name}-{benchmark}"
        return read_folder(write_folder(folder, run(outcomes), name=name, benchmark=benchmark))

    runs = [one("A", "chartqa", "rw"), one("A", "mathverse", "rrrw"), one("B", "chartqa", "rr")]
    table = table_of(runs, "strict")
    assert (table.models, table.benchmarks) == (["A", "B"], ["mathverse", "chartqa"])
    assert table.average("A") == pytest.approx((0.75 + 0.5) / 2)
    assert str(table.average("B")) == "nan"  # no MathVerse run
    assert list(table.differences) == [("B", "chartqa")]
    assert table.differences["B", "chartqa"].difference == 0.5
    with pytest.raises(ValueError, match="are both A on chartqa"):
        table_of([*runs, replace(runs[0])], "strict")


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "compare_evaluations.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_tool_writes_both_files_and_refuses_in_one_line(tmp_path: Path):
    first = write_folder(tmp_path / "a", run("rrww", version=("Text Lite",)))
    second = write_folder(tmp_path / "b", run("rrrw", version=("Text Lite",)), name="<b>|x")
    done = tool(first, second, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in done.stdout
    assert "&lt;b&gt;\\|x against a on mathverse" in text and "| +25.0 |" in text
    assert "Text Lite" in text
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<b>|x" not in page and "&lt;b&gt;|x" in page
    other = write_folder(tmp_path / "c", run("rrww"), benchmark="chartqa")
    refused = tool(first, other)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "benchmark=chartqa; give two runs of one benchmark" in refused.stderr
    done = tool(first, second, other, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Against a, paired by question" in done.stdout


# --- With a real engine: one for all of these, in a process of its own. ---------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """What evaluation_cases.py leaves."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    folder = tmp_path_factory.mktemp("evaluations")
    script = Path(__file__).with_name("evaluation_cases.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(folder), str(tiny_model_dir)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[-4000:]
    return folder


def found(done: Path) -> dict[str, Any]:
    return json.loads((done / "found.json").read_text())


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").open()]


@pytest.mark.vllm
def test_an_evaluation_leaves_its_files(done: Path):
    first, second = (done / name for name in found(done)["default"])
    assert str(first).endswith("outputs/evaluate/mathvista/tiny_qwen2_5_vl")
    assert second.name == "tiny_qwen2_5_vl-2"  # the first one was finished
    names = ["bad_rows.jsonl", "config.yaml", "predictions.tsv", "report.html"]
    names += ["responses.jsonl", "samples.jsonl", "summary.json"]
    for folder in (first, second):
        assert sorted(path.name for path in folder.iterdir()) == names
    rows = samples(first)
    assert [row["question_id"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows == samples(second)  # greedy
    assert rows[0]["input"].startswith("<image>How many years?")
    assert rows[3]["choices"] == ["<b>1</b>", "2"]
    with (first / "predictions.tsv").open(newline="") as file:
        assert [row["index"] for row in csv.DictReader(file, delimiter="\t")] == list("12345")
    summary = json.loads((first / "summary.json").read_text())
    assert (summary["num_questions"], summary["num_bad_rows"]) == (6, 1)
    assert summary["overall"]["num_responses"] == 5
    assert set(summary["groups"]["skills"]) == {"algebra", "statistics"}
    page = (first / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>1</b>" not in page and page.count("data:image/png;base64") == 5


@pytest.mark.vllm
def test_a_prompt_that_is_too_long_is_set_aside_and_never_cut(done: Path):
    (bad,) = map(json.loads, (done / found(done)["default"][0] / "bad_rows.jsonl").open())
    assert bad["id"] == "long" and "tokens exceed max_prompt_tokens=200" in bad["reason"]
    assert "max_bad_share=0.1: 1 of 6 rows" in found(done)["too many bad rows"]


@pytest.mark.vllm
def test_an_interrupted_evaluation_goes_on_to_the_same_responses(done: Path):
    asked = found(done)["asked after the interruption"]
    # 2 of the 5 replies had been kept; sampled, so the seeds must not depend on what came before.
    assert len(asked) == 3 and found(done)["asked when complete"] == []
    texts = [[row["resps"] for row in samples(done / name)] for name in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert texts[0] != [row["resps"] for row in samples(done / found(done)["default"][0])]


@pytest.mark.vllm
def test_another_seed_model_or_data_does_not_go_on(done: Path):
    assert "seed=4 here, 3 there" in found(done)["other seed"]
    assert "have changed since" in found(done)["other weights"]
    assert "has changed in data= since" in found(done)["other data"]


@pytest.mark.vllm
def test_bad_rows_are_listed_and_the_rest_is_answered(done: Path):
    bad = {row["id"]: row for row in map(json.loads, (done / "logicvista/bad_rows.jsonl").open())}
    assert set(bad) == {"no answer", "broken image"}
    assert bad["no answer"]["reason"] == "empty answer" and bad["no answer"]["row"] == 1
    assert [row["question_id"] for row in samples(done / "logicvista")] == ["v1", "v2", "v3"]
    summary = json.loads((done / "logicvista/summary.json").read_text())
    assert set(summary["groups"]["skill"]) == {"inductive", "spatial"}


@pytest.mark.vllm
def test_mathverse_is_answered_with_its_groups(done: Path):
    summary = json.loads((done / "mathverse/summary.json").read_text())
    assert summary["groups"]["version"]["Text Lite"]["num_responses"] == 2
    assert [row["cluster"] for row in samples(done / "mathverse")] == ["1", "1", "2"]


@pytest.mark.vllm
def test_digits_can_be_sampled_several_times(done: Path):
    rows = samples(done / "digits_run")
    assert len(rows) == 60 and {row["sample_index"] for row in rows} == {0, 1, 2}
    assert len({row["resps"][0] for row in rows[:3]}) > 1
    summary = json.loads((done / "digits_run/summary.json").read_text())
    assert summary["overall"]["strict"] == summary["overall"]["compat"]
    assert rows[0]["strict"]["outcome"] in ("correct", "wrong")


def evaluate_cli(folder: Path, model: Path, output: str, *more: str) -> list[dict[str, Any]]:
    """The command as anybody would give it."""
    arguments = ["benchmark=mathvista", "data=a.parquet", f"model={model}", f"output={output}"]
    arguments += ["rollout.max_response_tokens=12", *more]
    finished = subprocess.run(
        [sys.executable, "-m", "megatron_mmr1.evaluate", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[-4000:]
    assert "overall" in finished.stdout and "report.html" in finished.stdout
    return samples(folder / output)


def write_rows(folder: Path) -> None:
    rows = [
        mathvista_row(str(n), decoded_image={"bytes": png(112, 84, n), "path": None})
        for n in range(6)
    ]
    write_parquet(folder / "a.parquet", rows)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_megatron_checkpoint_answers_as_its_hugging_face_folder(
    tmp_path: Path, tiny_model_dir: Path
):
    write_rows(tmp_path)
    converter = ROOT / "tools" / "convert_hf_to_megatron.py"
    subprocess.run(
        [sys.executable, str(converter), "--hf", str(tiny_model_dir), "--megatron", "converted"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    # Sampled with the same seeds: greedily, a random model says one thing to every question.
    sampled = "rollout.temperature=1.0"
    ours = evaluate_cli(tmp_path, tmp_path / "converted", "from_megatron", sampled)
    theirs = evaluate_cli(tmp_path, tiny_model_dir, "from_hf", sampled)
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]
    assert len({row["resps"][0] for row in ours}) > 1
    assert not (tmp_path / "from_megatron" / "converted_model").exists()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl_qwen2"])
def test_other_families_are_evaluated(name: str, tmp_path: Path, tiny_folder: Any):
    write_rows(tmp_path)
    assert len(evaluate_cli(tmp_path, tiny_folder(name), "out")) == 6
