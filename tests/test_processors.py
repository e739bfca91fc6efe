"""Prompts of every family: tokens, positions, image counts, SentencePiece."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_data import hf_positions, png

from megatron_mmr1.config.model_folder import check_model_folder
from megatron_mmr1.data.images import decode_image
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.types import Prompt

TinyFolder = Callable[[str], Path]

QWEN_VL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
INTERNVL = ["internvl_qwen2", "internvl_llama"]
SENTENCEPIECE = ["llama_sentencepiece", "mistral_sentencepiece"]
TEXT = ["qwen2", "qwen3", "qwen3_moe", "llama", *SENTENCEPIECE]
SIZES = [(84, 28), (56, 112), (300, 100), (20, 20)]


def make_prompt(processor: PromptProcessor, sizes: list[tuple[int, int]]) -> Prompt:
    question = "Sum?" + "".join("<image>Sum of squares?" for _ in sizes)
    return processor.prompt("a", question, [png(*size) for size in sizes])


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# Vision-language models


@pytest.mark.parametrize("name", QWEN_VL)
def test_qwen_positions_equal_hugging_face(tiny_folder: TinyFolder, name: str) -> None:
    model, processor = load_model(tiny_folder(name)), PromptProcessor(tiny_folder(name))
    for count in range(len(SIZES) + 1):
        prompt = make_prompt(processor, SIZES[:count])
        expected = hf_positions(model, prompt.token_ids, prompt.image_grid_thw)
        assert torch.equal(prompt.position_ids, expected)


@pytest.mark.parametrize("name", INTERNVL)
def test_internvl_cuts_an_image_into_tiles_and_counts_positions_from_0(
    tiny_folder: TinyFolder, name: str
) -> None:
    processor = PromptProcessor(tiny_folder(name))
    prompt = make_prompt(processor, [(112, 56), (56, 56)])  # two tiles and a thumbnail; one tile
    assert prompt.pixel_values is not None and prompt.image_grid_thw is not None
    assert prompt.pixel_values.shape == (4, 3, 56, 56)
    assert prompt.pixel_values.dtype == torch.float32
    assert prompt.image_grid_thw.tolist() == [[1, 4, 4]] * 4
    assert prompt.image_grid_thw.dtype == prompt.position_ids.dtype == torch.int64
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.token_ids)).expand(3, -1))


@pytest.mark.parametrize("name", QWEN_VL + INTERNVL)
def test_counts_without_pixels_are_those_of_the_prompt(tiny_folder: TinyFolder, name: str) -> None:
    processor = PromptProcessor(tiny_folder(name))
    for size in [*SIZES, (5000, 30), (30, 900)]:
        picture = decode_image(png(*size))
        prompt = processor.prompt("a", "<image>Sum?", [png(*size)])
        assert prompt.image_grid_thw is not None
        patches = int(prompt.image_grid_thw.prod(-1).sum())
        assert processor.count_patches(picture) == patches
        assert processor.count_tokens("<image>Sum?", [picture]) == len(prompt.token_ids)
        num_image_tokens = int((prompt.token_ids == processor.image_token_id).sum())
        assert num_image_tokens == patches // processor.spatial_merge_size**2


@pytest.mark.parametrize("name", QWEN_VL + INTERNVL)
def test_the_model_takes_the_prompt_and_sees_its_pixels(tiny_folder: TinyFolder, name: str) -> None:
    model, processor = load_model(tiny_folder(name)), PromptProcessor(tiny_folder(name))
    prompt = make_prompt(processor, [(112, 56), (56, 56)])
    assert prompt.pixel_values is not None
    tokens = prompt.token_ids[None]
    extra = {}
    if name in QWEN_VL:
        is_image = (tokens == processor.image_token_id).int()
        extra = {"image_grid_thw": prompt.image_grid_thw, "mm_token_type_ids": is_image}
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=prompt.pixel_values, **extra).logits
        others = model(input_ids=tokens, pixel_values=-prompt.pixel_values, **extra).logits
    assert logits.isfinite().all()
    assert (logits - others)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("name", QWEN_VL + INTERNVL)
def test_image_tokens_in_the_text_are_refused(tiny_folder: TinyFolder, name: str) -> None:
    processor = PromptProcessor(tiny_folder(name))
    token = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    assert processor.image_token_id in processor.banned_token_ids
    with pytest.raises(ValueError, match="vision token"):
        processor.count_tokens(f"<image>Sum{token}?", [Image.new("RGB", (56, 56))])
    with pytest.raises(ValueError, match="vision token"):
        processor.prompt("a", f"Sum{token}?")
    with pytest.raises(ValueError, match="vision tokens"):
        processor.response_token_ids(token)


def test_internvl_marks_are_banned(tiny_folder: TinyFolder) -> None:
    processor = PromptProcessor(tiny_folder("internvl_qwen2"))
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.banned_token_ids)
    assert set(tokens) == {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"}


@pytest.mark.parametrize("crop", [True, False, None])
def test_internvl_tiles_are_those_of_hugging_face_whatever_the_folder_says_of_cropping(
    tiny_folder: TinyFolder, tmp_path: Path, crop: bool | None
) -> None:
    """Its processor cuts in any case; its image processor's own count does not know."""
    folder = shutil.copytree(tiny_folder("internvl_qwen2"), tmp_path / "model")

    def change(content: dict[str, Any]) -> None:
        del content["image_processor"]["crop_to_patches"]
        if crop is not None:
            content["image_processor"]["crop_to_patches"] = crop

    edit_json(folder / "processor_config.json", change)
    processor = PromptProcessor(folder)
    prompt = processor.prompt("a", "<image>Sum?", [png(112, 56)])
    assert prompt.image_grid_thw is not None and len(prompt.image_grid_thw) == 3
    picture = decode_image(png(112, 56))
    assert processor.count_tokens("<image>Sum?", [picture]) == len(prompt.token_ids)
    assert processor.count_patches(picture) == 3 * 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["image_processor"].update(size={"height": 28, "width": 28}),
            r"size=\[28, 28\], but vision_config.image_size=\[56, 56\]",
        ),
        (lambda c: c.update(image_seq_length=16), "image_seq_length=16, but .* make 4 tokens"),
    ],
)
def test_an_internvl_processor_of_another_model_is_refused(
    tiny_folder: TinyFolder,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    folder = shutil.copytree(tiny_folder("internvl_qwen2"), tmp_path / "model")
    edit_json(folder / "processor_config.json", change)
    with pytest.raises(ValueError, match=message):
        PromptProcessor(folder)


def test_unknown_images_are_refused_by_model_type(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("qwen2_vl"), tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.pop("image_token_id"))
    with pytest.raises(ValueError, match="has no image_token_id"):
        PromptProcessor(folder)
    edit_json(folder / "config.json", lambda config: config.update(model_type="llava"))
    with pytest.raises(ValueError, match=r"model_type='llava', whose images we do not know; use"):
        PromptProcessor(folder)


# Models of text alone


@pytest.mark.parametrize("name", TEXT)
def test_a_text_model_needs_no_processor_and_has_no_image_tokens(
    tiny_folder: TinyFolder, name: str
) -> None:
    check_model_folder(tiny_folder(name))
    processor = PromptProcessor(tiny_folder(name))
    assert processor.image_token_id == -1
    assert processor.spatial_merge_size == 1
    assert processor.banned_token_ids == ()
    prompt = processor.prompt("a", "Sum of squares?")
    assert prompt.pixel_values is None and prompt.image_grid_thw is None
    assert prompt.token_ids.dtype == torch.int64
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.token_ids)).expand(3, -1))
    assert processor.count_tokens("Sum of squares?", []) == len(prompt.token_ids)
    assert processor.response_token_ids("8")[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("name", TEXT)
def test_a_text_model_refuses_images_by_name(tiny_folder: TinyFolder, name: str) -> None:
    processor = PromptProcessor(tiny_folder(name))
    with pytest.raises(ValueError, match=r"model_type='\w+' takes no images"):
        processor.prompt("a", "<image>Sum?", [png()])
    with pytest.raises(ValueError, match=r"model_type='\w+' takes no images"):
        processor.count_tokens("<image>Sum?", [Image.new("RGB", (28, 28))])
    with pytest.raises(ValueError, match="1 <image> tags for 0 images"):
        processor.prompt("a", "<image>Sum?")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_the_prompt_is_what_the_chat_template_gives(tiny_folder: TinyFolder, name: str) -> None:
    processor = PromptProcessor(tiny_folder(name))
    turn = [{"role": "user", "content": "Sum of squares?"}]
    expected = processor.tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_dict=False
    )
    assert processor.prompt("a", "Sum of squares?").token_ids.tolist() == expected


@pytest.mark.parametrize("name", ["llama", *SENTENCEPIECE])
def test_a_prompt_begins_once(tiny_folder: TinyFolder, name: str) -> None:
    """The tokenizer would put BOS before the template's own."""
    processor = PromptProcessor(tiny_folder(name))
    bos = processor.tokenizer.bos_token_id
    token_ids = processor.prompt("a", "Sum?").token_ids.tolist()
    assert token_ids[0] == bos and token_ids.count(bos) == 1
    assert processor.tokenizer(processor.render("Sum?", 0))["input_ids"][:2] == [bos, bos]


def test_a_prompt_with_images_begins_only_as_its_template_says(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Also where the tokenizer, as InternLM2's, would add BOS."""
    folder = shutil.copytree(tiny_folder("internvl_llama"), tmp_path / "model")
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    adds_bos = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    edit_json(folder / "tokenizer.json", lambda content: content.update(post_processor=adds_bos))
    processor = PromptProcessor(folder)
    assert processor.tokenizer("Sum")["input_ids"][0] == 0
    prompt = processor.prompt("a", "<image>Sum?", [png(56, 56)])
    assert 0 not in prompt.token_ids.tolist()
    assert processor.count_tokens("<image>Sum?", [decode_image(png(56, 56))]) == len(
        prompt.token_ids
    )


@pytest.mark.parametrize("name", ["qwen2", "internvl_qwen2"])
def test_a_folder_without_chat_template_is_refused(
    tiny_folder: TinyFolder, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_folder(name), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; copy"):
        PromptProcessor(folder)


# SentencePiece

TEXTS = [
    "",
    " ",
    "   ",
    "Sum",
    " Sum",
    "  Sum",
    "Sum ",
    "Sum  ",
    "Sum of squares?",
    "Sum  of   squares",
    "\n",
    "\nSum",
    "Sum\n\nof\n",
    " \n Sum",
    "a\tb",
    "12345",
    "3.14 + 2 = 5",
    "naïve é",
    "e\u0301",  # not composed
    "日本語",
    "🙂 ok",
    "ﬁ ½ Ⅳ",  # what NFKC would change
    "\u00a0x\u3000y",
    "\x00\x7f",
    "▁Sum▁of",
    "<0x41>",
    "[INST] Sum of squares? [/INST]",
    "<think>2+3=5</think><answer>\\boxed{5}</answer>",
]


def library_of(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_text_is_encoded_as_the_sentencepiece_library_does(
    tiny_folder: TinyFolder, name: str
) -> None:
    processor, library = PromptProcessor(tiny_folder(name)), library_of(tiny_folder(name))
    for text in TEXTS:
        assert processor.encode(text) == library.encode(text), text
    assert any(library.is_byte(i) for i in processor.encode("日本語"))


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_special_tokens_keep_their_ids_and_the_text_between_is_the_librarys(
    tiny_folder: TinyFolder, name: str
) -> None:
    processor, library = PromptProcessor(tiny_folder(name)), library_of(tiny_folder(name))
    first, second = "[INST] Sum? [/INST] 8", " [INST] Sum of [/INST]"
    expected = [1, *library.encode(first), 2, 1, *library.encode(second)]
    assert processor.encode(f"<s>{first}</s><s>{second}") == expected
    prompt = processor.prompt("a", "Sum of squares?")
    body = library.encode("[INST] Sum of squares? [/INST]")
    assert prompt.token_ids.tolist() == [1, *body]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_the_engines_tokenizer_gives_the_same_ids_once_the_first_space_is_written(
    tiny_folder: TinyFolder, name: str
) -> None:
    """It is Hugging Face's conversion, which does not put a space before every text.

    That is why we encode with the library; the engine is given ids and only decodes.
    """
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm.tokenizers import get_tokenizer

    processor, engine = PromptProcessor(tiny_folder(name)), get_tokenizer(str(tiny_folder(name)))
    written_first = {"llama_sentencepiece": "", "mistral_sentencepiece": " "}[name]
    for text in filter(None, TEXTS):
        token_ids = processor.encode(text)
        assert engine.encode(" " + text, add_special_tokens=False) == token_ids, text
        # "▁" in a text cannot be told from a space, in any of them.
        assert engine.decode(token_ids) == written_first + text.replace("▁", " "), text


def test_a_vision_language_model_with_sentencepiece_alone_is_refused(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("internvl_llama"), tmp_path / "model")
    shutil.copy(tiny_folder("llama_sentencepiece") / "tokenizer.model", folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"copy tokenizer\.json"):
        PromptProcessor(folder)
