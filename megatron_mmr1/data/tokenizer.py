"""Text to token ids, as the model folder's tokenizer does it.

Owns how text is split into special tokens and the rest, where Hugging Face's conversion of a
tokenizer cannot be trusted. Does not own the chat template or images (processor.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SENTENCEPIECE = "tokenizer.model"


def has_sentencepiece_alone(folder: Path) -> bool:
    """Whether the folder's tokenizer is `tokenizer.model` and no other file."""
    others = ("tokenizer.json", "vocab.json")
    return (folder / _SENTENCEPIECE).is_file() and not any((folder / x).is_file() for x in others)


def text_encoder(folder: Path, tokenizer: Any) -> Callable[[str], list[int]]:
    """Return what turns text into ids as it stands, nothing added.

    A folder with `tokenizer.model` alone is encoded by the sentencepiece library. Hugging Face's
    conversion of it differs: transformers 5.19 adds no space before a text that starts with one,
    and for Mistral none at all, so that " Sum" or "Sum" becomes other ids than in pre-training.

    Args:
        folder: the model folder.
        tokenizer: the Hugging Face tokenizer of that folder.
    """
    if has_sentencepiece_alone(folder):
        return SentencePieceEncoder(folder / _SENTENCEPIECE, tokenizer)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


class SentencePieceEncoder:
    """The sentencepiece library, between special tokens.

    Special tokens (`<s>` in a chat template) become their id, which the library would spell out.
    Each text between them is encoded on its own, with the space before it that the model asks for,
    as the Llama 2 and Mistral reference code does.
    """

    def __init__(self, file: Path, tokenizer: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        self._library: Any = SentencePieceProcessor(model_file=str(file))
        self._special_ids = {
            str(token): index for index, token in tokenizer.added_tokens_decoder.items()
        }
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __call__(self, text: str) -> list[int]:
        """Token ids of text as it stands."""
        token_ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special_ids:
                token_ids.append(self._special_ids[part])
            elif part:
                token_ids += self._library.encode(part)
        return token_ids
