"""The data room: the tiny model's files, the digits task, positions, rows set aside."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from megatron_mmr1.data.dataset import Keys, PromptDataset
from megatron_mmr1.data.digits import (
    PROMPT_SCHEMA,
    build_digits,
    scan_split,
)
from megatron_mmr1.data.images import decode_image, fit_pixels
from megatron_mmr1.data.loader import build_loader
from megatron_mmr1.data.mrope import mrope_positions
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> PromptProcessor:
    return PromptProcessor(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_model_dir).eval()


def png(width: int = 28, height: int = 28, mode: str = "RGB", color: Any = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), color).save(buffer, format="PNG")
    return buffer.getvalue()


def hf_positions(model: Any, token_ids: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
    is_image = (token_ids == model.config.image_token_id).int()
    return model.model.get_rope_index(token_ids[None], is_image[None], grid)[0][:, 0]


# The tiny model


def test_tiny_model_gives_finite_logprobs_for_an_image_prompt(
    model: Any, processor: PromptProcessor
) -> None:
    prompt = processor.prompt("a", "<image>Sum?", [png(84)])
    token_ids = prompt.token_ids[None]
    with torch.no_grad():
        logits = model(
            input_ids=token_ids,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(token_ids == processor.image_token_id).int(),
        ).logits
    assert logits.log_softmax(-1).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 0.9e6


def test_same_seed_gives_the_same_weights_and_tying_drops_the_output_layer(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    again = build_tiny_qwen2_5_vl(tmp_path / "again")
    name = "model.safetensors"
    assert (again / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    tied = build_tiny_qwen2_5_vl(tmp_path / "tied", tie_word_embeddings=True)
    with safe_open(tied / name, "pt") as file:
        assert not any("lm_head" in key for key in file.keys())  # noqa: SIM118


def test_tokenizer_round_trips_every_response_and_refuses_other_text(
    processor: PromptProcessor, digits_dir: Path
) -> None:
    for conversation in pq.read_table(digits_dir / "sft.parquet")["conversations"].to_pylist():
        response = conversation[1]["value"]
        token_ids = processor.response_token_ids(response)
        assert processor.tokenizer.decode(token_ids, skip_special_tokens=True) == response
        assert token_ids[-1] == processor.end_of_turn_id
    with pytest.raises(ValueError, match="no token"):
        processor.encode("Zebra?")


def test_a_folder_without_its_files_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "processor_config.json"):
        folder = tmp_path / name
        shutil.copytree(tiny_model_dir, folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=name):
            PromptProcessor(folder)


# The digits task


def test_k_digits_take_k_visual_tokens_and_are_not_resized(
    processor: PromptProcessor, digits_dir: Path
) -> None:
    prompts = PromptDataset(digits_dir / "heldout.parquet", processor)
    seen = set()
    for prompt in prompts:
        k = int(prompt.category[-1])
        seen.add(k)
        assert prompt.image_grid_thw is not None and prompt.pixel_values is not None
        assert prompt.image_grid_thw.tolist() == [[1, 2, 2 * k]]
        assert (prompt.token_ids == processor.image_token_id).sum() == k
        assert prompt.pixel_values.dtype == torch.float32
        assert decode_image(prompt.images[0]).size == (28 * k, 28)
    assert seen == {1, 2, 3, 4, 5}


def test_heldout_scans_never_occur_in_training_files(digits_dir: Path) -> None:
    def scans(name: str) -> set[int]:
        images = pq.read_table(digits_dir / f"{name}.parquet")["images"].to_pylist()
        return {int(scan) for row in images for scan in re.findall(r"\d+", row[0]["path"])}

    training, heldout = (set(part.tolist()) for part in scan_split())
    assert not training & heldout and len(training | heldout) == 1797
    assert scans("train") <= training and scans("sft") <= training
    assert scans("heldout") <= heldout


def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    digits_dir: Path, tmp_path: Path
) -> None:
    sizes = {"num_train": 200, "num_heldout": 100, "num_demonstrations": 200}
    build_digits(tmp_path / "same", **sizes)
    build_digits(tmp_path / "other", seed=1, **sizes)
    for name in ("train.parquet", "heldout.parquet", "sft.parquet"):
        original = (digits_dir / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == original
        assert (tmp_path / "other" / name).read_bytes() != original


def test_complete_files_are_kept_and_changed_settings_rewrite_only_their_file(
    tmp_path: Path,
) -> None:
    sizes = {"num_train": 10, "num_heldout": 10, "num_demonstrations": 10}
    assert len(build_digits(tmp_path, **sizes)) == 3
    assert build_digits(tmp_path, **sizes) == []
    assert build_digits(tmp_path, **sizes, sft_noise=0.1) == [tmp_path / "sft.parquet"]
    assert len(build_digits(tmp_path, **sizes, force=True)) == 3
    assert len(list(tmp_path.iterdir())) == 3


def wrong_share(folder: Path, noise: float) -> float:
    """Share of the sums whose result is wrong; working and box must agree."""
    build_digits(
        folder,
        num_train=1,
        num_heldout=1,
        num_demonstrations=1000,
        sft_mix={"sum2": 1},
        sft_noise=noise,
    )
    num_wrong = 0
    for conversation in pq.read_table(folder / "sft.parquet")["conversations"].to_pylist():
        numbers = [int(number) for number in re.findall(r"\d+", conversation[1]["value"])]
        assert numbers[2] == numbers[3]
        num_wrong += numbers[0] + numbers[1] != numbers[2]
    return num_wrong / 1000


def test_sft_noise_is_the_share_of_wrong_results(tmp_path: Path) -> None:
    assert wrong_share(tmp_path, 0.0) == 0
    assert wrong_share(tmp_path, 1.0) == 1
    # Three standard deviations of a share of 1,000 draws at 0.4: 0.047.
    assert wrong_share(tmp_path, 0.4) == pytest.approx(0.4, abs=0.047)


def test_an_unknown_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cube2"):
        build_digits(tmp_path, train_mix={"cube2": 1.0})


# Positions


@pytest.mark.parametrize("sizes", [[], [(84, 28)], [(84, 28), (56, 112)]])
def test_positions_equal_hugging_face(
    model: Any, processor: PromptProcessor, sizes: list[tuple[int, int]]
) -> None:
    question = "Sum?" + "".join("<image>Sum of squares?" for _ in sizes)
    prompt = processor.prompt("a", question, [png(*size) for size in sizes])
    expected = hf_positions(model, prompt.token_ids, prompt.image_grid_thw)
    assert torch.equal(prompt.position_ids, expected)


def test_positions_refuse_placeholders_that_do_not_match_the_images() -> None:
    with pytest.raises(ValueError, match="2 image tokens, but the images need 1"):
        mrope_positions(torch.tensor([1, 5, 5]), torch.tensor([[1, 2, 2]]), 5, 2)


# Data sets


def prompt_row(row_id: str, **changes: Any) -> dict[str, Any]:
    row = {
        "id": row_id,
        "category": "sum2",
        "problem": "<image>Sum?",
        "answer": "8",
        "images": [{"bytes": png(56), "path": None}],
    }
    return row | changes


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


BAD_ROWS = {
    "no answer": ({"answer": " "}, "empty answer"),
    "null answer": ({"answer": None}, "empty answer"),
    "tag without image": ({"images": []}, "1 <image> tags for 0 images"),
    "image without tag": ({"problem": "Sum?"}, "0 <image> tags for 1 images"),
    "broken image": ({"images": [{"bytes": png(56)[:40], "path": None}]}, "not a readable|broken"),
    "empty image": ({"images": [{"bytes": b"", "path": None}]}, "empty"),
    "no image data": ({"images": [{"bytes": None, "path": None}]}, "neither bytes nor path"),
    "path outside": ({"images": [{"bytes": None, "path": "../secret.png"}]}, "leads out"),
    "link outside": ({"images": [{"bytes": None, "path": "link.png"}]}, "leads out"),
    "missing file": ({"images": [{"bytes": None, "path": "no.png"}]}, "does not exist"),
    "long prompt": ({"problem": "<image>" + "Sum?" * 40}, "exceed max_prompt_tokens=64"),
    "vision token in text": ({"problem": "<image><|image_pad|>Sum?"}, "vision token <.image_pad.>"),
    "unknown text": ({"problem": "<image>Zebra?"}, "no token"),
}


def test_bad_rows_are_set_aside_with_their_reason(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png(56))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "fine.png").write_bytes(png(56))
    rows = [prompt_row(name, **changes) for name, (changes, _) in BAD_ROWS.items()]
    from_path = prompt_row("from path", images=[{"bytes": None, "path": "fine.png"}])
    text_only = prompt_row("text only", problem="Sum?", images=[], category=None)
    rows += [prompt_row("good"), prompt_row("good"), from_path, text_only]
    path = write_rows(tmp_path / "data" / "rows.parquet", rows, PROMPT_SCHEMA)

    prompts = PromptDataset(path, processor, max_tokens=64)

    assert prompts.prompt_ids == ["good", "from path", "text only"]
    assert prompts.categories == ["sum2", "sum2", ""]
    assert prompts[2].pixel_values is None and prompts[2].image_grid_thw is None
    reasons = {bad.row_id: bad.reason for bad in prompts.bad_rows}
    assert len(prompts.bad_rows) == len(BAD_ROWS) + 1
    assert reasons.pop("good") == "duplicate id"
    for name, reason in reasons.items():
        assert re.search(BAD_ROWS[name][1], reason), (name, reason)


def test_wrong_columns_and_a_file_of_bad_rows_are_refused(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    table = pa.Table.from_pylist([prompt_row("a", answer="")], schema=PROMPT_SCHEMA)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"no usable row \(1 x empty answer\)"):
        PromptDataset(path, processor)
    pq.write_table(table.drop_columns(["answer"]), path)
    with pytest.raises(ValueError, match=r"rows.parquet has no column 'answer'"):
        PromptDataset(path, processor)
    with pytest.raises(ValueError, match="does not exist"):
        PromptDataset(tmp_path / "none.parquet", processor)


def test_released_schema_without_id_and_category_is_read(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    table = pa.Table.from_pylist([prompt_row("a"), prompt_row("b")], schema=PROMPT_SCHEMA)
    pq.write_table(table.drop_columns(["id", "category"]), tmp_path / "rows.parquet")
    prompts = PromptDataset(tmp_path / "rows.parquet", processor)
    assert prompts.prompt_ids == ["row-0", "row-1"] and prompts.categories == ["", ""]


def test_rows_of_other_keys_and_formats_give_the_same_prompts(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    """EasyR1's keys are MMR1-RL's; any others can be named; JSON lines hold paths of images."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(56))
    table = pa.Table.from_pylist([prompt_row("a", level=1)])
    pq.write_table(table, tmp_path / "rows.parquet")
    expected = PromptDataset(tmp_path / "rows.parquet", processor)[0]
    for images in ("images/a.png", ["images/a.png"], [{"path": "images/a.png"}]):
        row = {"id": "a", "question": "<image>Sum?", "solution": 8, "picture": images}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"category": "sum2"}) + "\n")
        keys = Keys("question", "solution", "picture")
        found = PromptDataset(tmp_path / "rows.jsonl", processor, keys=keys)[0]
        for name in ("prompt_id", "answer", "category", "question", "images"):
            assert getattr(found, name) == getattr(expected, name), name
        assert torch.equal(found.pixel_values, expected.pixel_values)
        assert torch.equal(found.token_ids, expected.token_ids)


def test_more_images_than_the_engine_takes_are_set_aside(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    two = {"problem": "<image>Sum<image>?", "images": prompt_row("b")["images"] * 2}
    rows = [prompt_row("a"), prompt_row("b") | two]
    path = write_rows(tmp_path / "rows.parquet", rows, PROMPT_SCHEMA)
    prompts = PromptDataset(path, processor, max_images=1)
    assert prompts.prompt_ids == ["a"]
    assert prompts.bad_rows[0].reason == "2 images exceed rollout.max_images_per_prompt=1"
    assert PromptDataset(path, processor, max_images=2).prompt_ids == ["a", "b"]


def test_image_files_that_are_mended_count_at_the_next_start(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    rows = [{"id": n, "problem": "<image>Sum?", "answer": "8", "images": [n]} for n in ("a", "b")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a").write_bytes(png(56))
    assert PromptDataset(tmp_path / "rows.jsonl", processor).prompt_ids == ["a"]
    (tmp_path / "b").write_bytes(png(56))
    assert PromptDataset(tmp_path / "rows.jsonl", processor).prompt_ids == ["a", "b"]
    (tmp_path / "a").unlink()
    assert PromptDataset(tmp_path / "rows.jsonl", processor).prompt_ids == ["b"]


def test_a_table_of_text_alone_needs_no_images(processor: PromptProcessor, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"problem": "Sum?", "answer": "8"}])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert len(PromptDataset(tmp_path / "rows.parquet", processor)) == 1


def test_an_instruction_comes_before_the_question(
    processor: PromptProcessor, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.parquet", [prompt_row("a")], PROMPT_SCHEMA)
    prompts = PromptDataset(path, processor, instruction="Largest digit?")
    assert prompts[0].question == "Largest digit?\n<image>Sum?"
    assert prompts.sizes[0].num_prompt_tokens == len(prompts[0].token_ids)


def test_rows_are_checked_once_and_anew_when_anything_changes(
    processor: PromptProcessor, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [prompt_row("a"), prompt_row("b", answer="")]
    path = write_rows(tmp_path / "rows.parquet", rows, PROMPT_SCHEMA)
    told: list[tuple[int, int]] = []

    def look(**settings: Any) -> int:
        told.clear()
        found = PromptDataset(
            path,
            settings.pop("processor", processor),
            on_progress=lambda *p: told.append(p),
            **settings,
        )
        assert [bad.reason for bad in found.bad_rows][:1] == ["empty answer"]
        assert found.prompt_ids == ["a"] and found.sizes[0].patches == (8,)
        return len(told)

    assert (look(), look()) == (1, 0)
    assert look(max_tokens=60) == 1
    assert look(instruction="Sum?") == 1
    assert look(processor=PromptProcessor(tiny_model_dir, max_pixels=10**7)) == 1
    write_rows(path, [*rows, prompt_row("c", answer="")], PROMPT_SCHEMA)
    assert look() == 1


def test_pixels_are_kept_within_their_limits(tiny_model_dir: Path) -> None:
    """Released MMR1: sides times the root of limit / area, cut to integers."""
    image = Image.new("RGB", (300, 100))
    assert fit_pixels(image, 0, 30_000) is image
    assert fit_pixels(image, 0, 7_500).size == (150, 50)
    assert fit_pixels(image, 120_000, 10**6).size == (600, 200)
    assert fit_pixels(Image.new("RGB", (1000, 1)), 0, 100).size == (316, 1)
    small = PromptProcessor(tiny_model_dir, max_pixels=28 * 56)
    prompt = small.prompt("a", "<image>Sum?", [png(280, 560)])
    assert prompt.image_grid_thw is not None
    assert prompt.image_grid_thw.tolist() == [[1, 4, 2]]


def test_the_length_checked_at_load_is_the_length_of_the_prompt(
    processor: PromptProcessor,
) -> None:
    # 300 x 100 is resized by the image processor; 5,000 x 30 is beyond its limit of pixels.
    for size in [(56, 28), (300, 100), (5000, 30), (20, 20)]:
        data = png(*size)
        counted = processor.count_tokens("<image>Sum?", [decode_image(data)])
        assert counted == len(processor.prompt("a", "<image>Sum?", [data]).token_ids)


def test_the_cache_keeps_prompts_within_its_bytes(
    processor: PromptProcessor, digits_dir: Path
) -> None:
    prompts = PromptDataset(digits_dir / "heldout.parquet", processor, cache_bytes=300_000)
    assert prompts[0] is prompts[0]
    all_prompts = [prompts[i] for i in range(len(prompts))]
    assert 0 < prompts._cached_bytes <= 300_000
    assert prompts[len(prompts) - 1] is all_prompts[-1]
    assert prompts[0] is not all_prompts[0]


def test_the_loader_draws_no_batch_ahead_and_leaves_the_global_generator_alone(
    processor: PromptProcessor, digits_dir: Path
) -> None:
    prompts = PromptDataset(digits_dir / "heldout.parquet", processor)
    drawn = []

    def draws():
        for batch in ([(3, 0), (1, 0)], [(1, 1), (3, 0), (1, 2)]):
            drawn.append(batch)
            yield batch

    state = torch.get_rng_state()
    loader = iter(build_loader(prompts, draws()))
    view = next(loader)
    assert view.keys == [(prompts.prompt_ids[i], 0) for i in (3, 1)] and view.indices == [3, 1]
    first = list(view)
    assert drawn == [[(3, 0), (1, 0)]]
    assert [prompt.prompt_id for prompt in first] == [prompts.prompt_ids[i] for i in (3, 1)]
    again, same, third = next(loader)
    assert same is first[0]
    # drawn once more for the same step: the same prompt, and another group
    assert [prompt.occurrence for prompt in (*first, again, third)] == [0, 0, 1, 2]
    assert len({prompt.key for prompt in (*first, again, third)}) == 4
    assert again.prompt_id == third.prompt_id == first[1].prompt_id
    assert again.token_ids is first[1].token_ids
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("key", "name"),
    [("merge_size", "spatial_merge_size"), ("patch_size", "patch_size")],
)
def test_an_image_processor_of_another_model_is_refused(
    tiny_model_dir: Path, tmp_path: Path, key: str, name: str
) -> None:
    """Its image tokens would not match their grid: found before any engine starts."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"][key] = 7
    (folder / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{key}=7, but vision_config\.{name}="):
        PromptProcessor(folder)
