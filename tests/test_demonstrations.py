"""Conversations in ShareGPT's form: turns, images, what is bad."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import png

from megatron_mmr1.data.demonstrations import Demonstrations
from megatron_mmr1.data.processor import PromptProcessor, Turn

HUMAN = ("human", "<image>Sum?")


def record(*turns: tuple[str, str], images: Any = (), **more: Any) -> dict[str, Any]:
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    return {"conversations": conversations, "images": list(images)} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(56, 28 * (number + 1), number))
    return tmp_path


def opened(folder: Path, processor: PromptProcessor, *records: Any, max_tokens: int = 128):
    path = folder / "sft.json"
    path.write_text(json.dumps(list(records)))
    return Demonstrations(path, processor, max_tokens)


def test_one_turn_is_its_prompt_and_its_response(folder, tiny_processor):
    data = opened(folder, tiny_processor, record(HUMAN, ("gpt", "8"), images=["0.png"], id="x"))
    (demonstration,), (size,) = data.load(0), data.sizes(0)
    expected = tiny_processor.prompt("0/1", "<image>Sum?", [png(56, 28, 0)])
    assert demonstration.prompt.prompt_id == "0/1" and data.row_id(0) == "x"
    assert torch.equal(demonstration.prompt.token_ids, expected.token_ids)
    assert torch.equal(demonstration.prompt.pixel_values, expected.pixel_values)
    response = demonstration.response_token_ids
    assert tiny_processor.tokenizer.decode(response) == "8<|im_end|>"
    assert (size.num_prompt_tokens, size.num_response_tokens) == (
        len(expected.token_ids),
        len(response),
    )
    assert size.patches == (8,)


def test_each_turn_of_the_assistant_has_what_comes_before_as_its_prompt(folder, tiny_processor):
    """The sequences cut the whole conversation, as the template renders it, at the turns."""
    turns = [HUMAN, ("gpt", "8"), ("human", "Sum<image>?"), ("gpt", "9")]
    data = opened(folder, tiny_processor, record(*turns, images=["0.png", "1.png"], system="Read."))
    (first, second), (_, size) = data.load(0), data.sizes(0)
    decode = tiny_processor.tokenizer.decode
    texts = [decode([*d.prompt.token_ids, *d.response_token_ids]) for d in (first, second)]
    assert texts[1].startswith(texts[0]) and "Read." in texts[0]
    assert decode(second.response_token_ids) == "9<|im_end|>"
    history = [Turn("system", "Read."), Turn("user", "<image>Sum?"), Turn("assistant", "8")]
    files = [png(56, 28, 0), png(56, 56, 1)]
    expected = tiny_processor.prompt("a", "Sum<image>?", files, history=history)
    assert torch.equal(second.prompt.token_ids, expected.token_ids)
    assert torch.equal(second.prompt.pixel_values, expected.pixel_values)
    assert size.patches == (8, 16) and len(first.prompt.images) == 1


def test_other_spellings_give_the_same(folder, tiny_processor):
    plain = record(HUMAN, ("gpt", "8"), images=["0.png"])
    messages = [
        {"role": "user", "content": "<image>Sum?"},
        {"role": "assistant", "content": "8"},
    ]
    others = [
        {"messages": messages, "image": "0.png"},
        {"messages": messages, "images": [{"bytes": None, "path": "0.png"}]},
    ]
    data = opened(folder, tiny_processor, plain, *others)
    table = pa.Table.from_pylist([plain | {"images": [{"bytes": png(56, 28, 0), "path": None}]}])
    pq.write_table(table, folder / "sft.parquet")
    loaded = [data.load(i)[0] for i in range(3)]
    loaded.append(Demonstrations(folder / "sft.parquet", tiny_processor, 128).load(0)[0])
    for demonstration in loaded[1:]:
        assert torch.equal(demonstration.prompt.token_ids, loaded[0].prompt.token_ids)
        assert torch.equal(demonstration.prompt.pixel_values, loaded[0].prompt.pixel_values)
        assert torch.equal(demonstration.response_token_ids, loaded[0].response_token_ids)


# Others are in tests/data/bad.
def test_a_null_column_is_no_images(folder, tiny_processor):
    plain = record(HUMAN, ("gpt", "8"), images=["0.png"])
    other = plain | {"image": "0.png", "images": None, "messages": None}
    data = opened(folder, tiny_processor, plain, other)
    assert data.sizes(0) == data.sizes(1)


def test_turns_that_the_template_refuses_are_bad(folder, tiny_processor, monkeypatch):
    """Such as a system turn: of one record, and not the end of the run."""
    refusal = "{{ raise_exception('no system turn') }}"
    monkeypatch.setattr(tiny_processor._processor, "chat_template", refusal)
    data = opened(folder, tiny_processor, record(HUMAN, ("gpt", "8"), images=["0.png"]))
    with pytest.raises(ValueError, match="the chat template refuses it: no system turn"):
        data.sizes(0)


BAD = {
    "answer first": (record(("gpt", "8"), ("human", "?")), "by turns"),
    "twice": (record(("human", "a"), ("human", "b"), ("gpt", "8")), "by turns"),
    "no key": ({"text": "a"}, "no conversation"),
    "text turns": ({"conversations": ["a", "b"]}, "a turn is str"),
    "strange speaker": (record(("bot", "a"), ("gpt", "b")), "a turn is from 'bot'"),
    "number": ({"conversations": [{"from": "human", "value": 1}]}, "text is int"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_has_a_reason(folder, tiny_processor, name):
    bad, reason = BAD[name]
    data = opened(folder, tiny_processor, bad, max_tokens=64)
    with pytest.raises(ValueError, match=reason):
        data.sizes(0)
    assert data.row_id(0) == "row-0"
