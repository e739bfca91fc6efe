"""Bad inputs seen in the wild, a file each in tests/data/bad: the bad row goes, the others stay.

bad_data_files.py writes the files. Every case is read as JSON lines and as an array.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_data_files import FOLDER, RL, SFT

from megatron_mmr1.data.dataset import BadRow, PromptDataset
from megatron_mmr1.data.demonstrations import Demonstrations
from megatron_mmr1.data.images import decode_image

JSON = "not readable as JSON"
# By case: the bad rows' number, id and reason (a pattern). The first row is 0, and good.
BOTH = {
    "bomb": [(1, "bad", "too large: 13000 x 13000")],
    "truncated_jpeg": [(1, "bad", "broken image")],
    "narrow": [(1, "bad", "too narrow: 20000 x 1")],
    "zero_bytes": [(1, "bad", "file is empty")],
    "no_image_inside": [(1, "bad", "not a readable PNG or JPEG")],
    "missing": [(1, "bad", "does not exist"), (2, "folder", "does not exist")],
    "long_path": [(1, "bad", r"'iVBORw0KGgo.*\.\.\.' can't be read: File name too long")],
    "traversal": [(1, "bad", "leads out"), (2, "absolute", "leads out")],
    "symlink": [(1, "bad", "leads out")],
    "tag_without_image": [(1, "bad", "1 <image> tags for 0"), (2, "null", "1 <image> tags for 0")],
    "image_without_tag": [(1, "bad", "0 <image> tags for 1 images")],
    "image_counts": [
        (1, "two for one", "1 <image> tags for 2 images"),
        (2, "one for two", "2 <image> tags for 1 images"),
    ],
    "long_prompt": [(1, "bad", "tokens exceed max_.*=64")],
    "vision_token": [(1, "image", "vision token <.image_pad"), (2, "video", "token <.video_pad")],
    "not_utf8": [(1, "row-1", f"{JSON} .UnicodeDecodeError")],
    "huge_integer": [(1, "row-1", f"{JSON} .ValueError: Exceeds the limit")],
    "deep_nesting": [(1, "row-1", f"{JSON} .RecursionError")],
    "half_surrogate": [(1, "row-1", f"{JSON} .UnicodeEncodeError")],
    "cut_off": [(1, "row-1", f"{JSON} .JSONDecodeError")],
    "no_object": [(i, f"row-{i}", "a JSON (list|str|NoneType), not an object") for i in (1, 2, 3)],
    "separators": [],
    "nan": [(1, "bad", "is float"), (2, "row-2", "neither bytes nor path")],
    "wrong_types": [
        (1, "list", "is list"),
        (2, "number", "is int"),
        (3, "images", "neither bytes nor path"),
        (4, "image", "neither bytes nor path"),
    ],
    "rendered": [],
}
BAD_RL = BOTH | {
    "duplicate_ids": [(1, "good-1", "duplicate id"), (3, "twice", "duplicate id")],
    "empty_answer": [
        (i + 1, name, "empty answer") for i, name in enumerate(("blank", "null", "nan"))
    ],
    "answer_types": [
        (1, "list", "answer is list, not text or a number"),
        (2, "object", "answer is dict"),
        (3, "bool", "answer is bool"),
    ],
    "empty_problem": [(1, "bad", "empty problem")],
}
BAD_SFT = BOTH | {
    "empty_response": [(1, "blank", "empty response"), (2, "null", "a turn's text is NoneType")],
    "response_tags": [(1, "tag", "response holds <image>"), (2, "token", "vision token")],
    "turns": [
        (1, "alone", "not user and assistant by turns"),
        (2, "none", "no conversation"),
        (3, "speaker", r"a turn is from \['human'\]"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files with what Git does not hold: links, and a file outside of the root."""
    folder = tmp_path_factory.mktemp("bad") / "data"
    shutil.copytree(FOLDER, folder)
    shutil.copy(folder / "images" / "good.png", folder.parent / "outside.png")
    (folder / "images" / "link_out.png").symlink_to(folder.parent / "outside.png")
    (folder / "images" / "link_in.png").symlink_to("good.png")
    for path in [*folder.glob("*.jsonl")]:
        lines = path.read_bytes().split(b"\n")[:-1]
        path.with_suffix(".json").write_bytes(b"[" + b",\n".join(lines) + b"]")
    return folder


def read_rl(path: Path, processor: Any) -> tuple[list[str], list[BadRow]]:
    prompts = PromptDataset(path, processor, max_tokens=64)
    return [prompt.prompt_id for prompt in prompts], prompts.bad_rows


def read_sft(path: Path, processor: Any) -> tuple[list[str], list[BadRow]]:
    """As trainers/sft.py reads: only a ValueError is a bad row."""
    demonstrations = Demonstrations(path, processor, max_tokens=64)
    good, bad = [], []
    for number in range(len(demonstrations)):
        row_id = demonstrations.row_id(number)
        try:
            sizes = demonstrations.sizes(number)
            good.append(row_id)
        except ValueError as error:
            bad.append(BadRow(number, row_id, str(error)))
            continue
        loaded = demonstrations.load(number)
        assert [s.num_prompt_tokens for s in sizes] == [len(d.prompt.token_ids) for d in loaded]
        assert [s.num_response_tokens for s in sizes] == [len(d.response_token_ids) for d in loaded]
    return good, bad


def check(path: Path, expected: list[tuple[int, str, str]], read: Any, processor: Any) -> None:
    good, bad = read(path, processor)
    assert [(row.row, row.row_id) for row in bad] == [row[:2] for row in expected]
    for row, (_, _, reason) in zip(bad, expected, strict=True):
        assert re.search(reason, row.reason), row
    num_rows = len((FOLDER / f"{path.stem}.jsonl").read_bytes().split(b"\n")) - 1
    assert len(good) == num_rows - len(expected)
    assert good[0] == "good-1" and good[-1] == "good-2"


# What isn't JSON ends an array, not a record of it.
FORMATS = ("jsonl", "json")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", RL)
def test_a_bad_question_is_set_aside_and_its_neighbours_stay(folder, tiny_processor, name, suffix):
    if (name, suffix) == ("cut_off", "json"):
        with pytest.raises(ValueError, match=r"rl_cut_off\.json ends in the midst of record"):
            PromptDataset(folder / "rl_cut_off.json", tiny_processor)
        return
    check(folder / f"rl_{name}.{suffix}", BAD_RL[name], read_rl, tiny_processor)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", SFT)
def test_a_bad_conversation_is_named_and_its_neighbours_load(folder, tiny_processor, name, suffix):
    if (name, suffix) == ("cut_off", "json"):
        with pytest.raises(ValueError, match=r"sft_cut_off\.json ends in the midst of record"):
            Demonstrations(folder / "sft_cut_off.json", tiny_processor, 64)
        return
    check(folder / f"sft_{name}.{suffix}", BAD_SFT[name], read_sft, tiny_processor)


def test_every_file_has_a_case_and_the_folder_stays_small():
    named = {f"rl_{name}" for name in BAD_RL} | {f"sft_{name}" for name in BAD_SFT}
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == named
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 300_000


def test_other_line_separators_stay_in_their_text(folder, tiny_processor):
    prompts = PromptDataset(folder / "rl_separators.jsonl", tiny_processor)
    assert prompts.prompt_ids == ["good-1", "line\u2028end", "next\u0085line", "good-2"]
    assert prompts.sources[1] == "a\u2028b\u0085c\u2029d"


def test_transparent_is_white_and_16_bit_grey_keeps_its_brightness(folder):
    """Pillow's own conversion gives red, the colour under the transparency, and white."""

    def pixel(name: str) -> Any:
        return decode_image((folder / "images" / name).read_bytes()).getpixel((0, 0))

    assert pixel("transparent.png") == (255,) * 3
    assert pixel("opaque.png") == (9, 8, 7)
    assert pixel("grey16.png") == (0x80,) * 3


PEAK = r"""
import re, sys, warnings
from pathlib import Path
from megatron_mmr1.data.images import decode_image
warnings.simplefilter("ignore")
data = Path(sys.argv[1]).read_bytes()
def peak_kb():  # of this program; getrusage would tell its parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak_kb()
try:
    decode_image(data, int(sys.argv[2]))
except ValueError:
    pass
print((peak_kb() - before) / 1024)
"""


def peak_mb(max_pixels: int) -> float:
    """How far the peak of resident memory rises when the bomb is opened."""
    command = [sys.executable, "-c", PEAK, str(FOLDER / "images" / "bomb.png"), str(max_pixels)]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_an_image_bomb_is_refused_by_its_header_before_any_pixel_is_decoded():
    """Decoded it takes 169 MB, a byte a pixel, and 507 MB as RGB; the control shows it."""
    assert (FOLDER / "images" / "bomb.png").stat().st_size < 25_000
    assert peak_mb(1 << 26) < 30
    assert peak_mb(1 << 30) > 150


def test_too_many_bad_questions_end_the_run_with_a_summary(
    folder, tiny_processor, tmp_path, process_group
):
    from megatron_mmr1.trainers.reporting import BAD_ROWS_FILE, report_bad_rows

    prompts = PromptDataset(folder / "rl_empty_answer.jsonl", tiny_processor, max_tokens=64)
    report_bad_rows(tmp_path, [prompts], max_bad_share=0.6)  # 3 of 5 are not more than that
    message = r"max_bad_share=0.59: 3 of 5 rows of .*rl_empty_answer.* are bad \(3 x empty answer\)"
    with pytest.raises(ValueError, match=message):
        report_bad_rows(tmp_path, [prompts], max_bad_share=0.59)
    lines = (tmp_path / BAD_ROWS_FILE).read_text().splitlines()
    assert [json.loads(line)["row_id"] for line in lines] == ["blank", "null", "nan"]


def test_too_many_bad_conversations_end_the_run_with_a_summary(
    folder, tiny_processor, tmp_path, process_group
):
    from megatron_mmr1.trainers.demonstration_batches import BadRecords, Draws
    from megatron_mmr1.trainers.reporting import BAD_ROWS_FILE

    data = Demonstrations(folder / "sft_turns.jsonl", tiny_processor, max_tokens=64)
    builder: Any = None  # not reached
    message = r"max_bad_share=0.59: 3 of 5 records of .*sft_turns.* are bad \(.*no conversation"
    with pytest.raises(ValueError, match=message):
        Draws(data, 0, 0.59, BadRecords(tmp_path)).next_step(5, builder)
    lines = (tmp_path / BAD_ROWS_FILE).read_text().splitlines()
    assert sorted(json.loads(line)["row_id"] for line in lines) == ["alone", "none", "speaker"]


def test_the_share_of_bad_conversations_is_judged_beyond_doubt_or_exactly(tmp_path, process_group):
    """5% of 100 seen leave room for chance; of all records they don't."""
    from megatron_mmr1.trainers.demonstration_batches import BadRecords, Draws

    class Records(list):
        path = "a.json"

    def stops(num_bad: int, num_seen: int, num_records: int) -> bool:
        bad = BadRecords(tmp_path)
        bad.add("a.json", [BadRow(number, "", "bad") for number in range(num_bad)])
        draws = Draws(Records(range(num_records)), 0, 0.05, bad)  # pyright: ignore[reportArgumentType]
        draws.load_state_dict(draws.state_dict() | {"num_seen": num_seen})
        try:
            draws._stop_if_too_many()
        except ValueError:
            return True
        return False

    assert not stops(8, 100, 1000) and stops(13, 100, 1000)
    assert not stops(5, 100, 100) and stops(6, 100, 100)
    assert not stops(60, 99, 1000)  # too few to say


def test_a_rank_reads_the_good_conversations_beside_the_bad_ones(
    folder, tiny_processor, process_group
):
    from megatron_mmr1.trainers.demonstration_batches import read_records

    for path in sorted(folder.glob("sft_*.jsonl")):
        data = Demonstrations(path, tiny_processor, max_tokens=64)
        read = read_records(data, range(len(data)))
        assert [r.number for r in read] == list(range(len(data)))
        good = {r.number for r in read if not r.reason}
        assert {0, len(data) - 1} <= good and all(bool(r.sizes) == (r.number in good) for r in read)
