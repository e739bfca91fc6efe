"""Benchmark questions that stand in the data, found by image and by text.

Owns the rules (`RULES` says them in words). Memory: the n-grams of the benchmarks' texts and 24
bytes an image; rows of the data pass by one at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_mmr1.data.images import decode_image
from megatron_mmr1.evaluation.questions import Question
from megatron_mmr1.evaluation.records import QuestionReader
from megatron_mmr1.inspection.fingerprints import NGRAM_WORDS, ImagePrint, image_print, ngrams

MIN_NGRAM_SHARE = 0.5
MAX_QUESTIONS_A_NGRAM = 10
# Of 100 drawn diagrams and charts, halved in size or saved as JPEG of quality 60, all copies are
# within 6 bits of the original; of the 4,950 pairs of different ones, none.
MAX_HAMMING = 6  # of 128 bits
MAX_ASPECT_CHANGE = 0.05
MIN_BITS = 16  # set of 128: an image with fewer is nearly flat

RULES = (
    "Same image: equal size and equal RGB values after decoding. Similar image: the two 64-bit "
    "gradient hashes (across and down a 9 x 9 grey copy) differ in at most "
    f"{MAX_HAMMING} of 128 bits, and width by height in at most {MAX_ASPECT_CHANGE:.0%}; images "
    f"with fewer than {MIN_BITS} bits set are nearly flat and compared by their pixels alone. "
    f"Text: at least {MIN_NGRAM_SHARE:.0%} of the different {NGRAM_WORDS}-word runs of the "
    "benchmark's question stand in the row's question (of a conversation: in the user's turns). "
    "Words are in lower case, without punctuation and image tags. Runs that more than "
    f"{MAX_QUESTIONS_A_NGRAM} questions of the benchmark share are its instructions and don't "
    f"count. A question of fewer than {NGRAM_WORDS} words is compared by its image alone."
)


class Match(NamedTuple):
    """A benchmark's question that a row seems to be, and how it was found."""

    benchmark: str
    question_id: str
    how: str


class BenchmarkIndex:
    """The questions of benchmarks, to be looked up.

    Attributes:
        sizes: questions read and bad rows, by benchmark.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        self._names: list[tuple[str, str]] = []  # of a question: benchmark, id
        self._of_ngram: dict[str, list[int]] = defaultdict(list)
        self._num_ngrams: list[int] = []
        self._of_pixels: dict[int, list[int]] = defaultdict(list)
        self._of_gradients: list[int] = []
        self._gradients: list[tuple[int, int]] = []
        self._aspects: list[float] = []
        self._gradients_G2 = np.empty((0, 2), np.uint64)
        self._aspects_G = np.empty(0)

    def read(
        self, name: str, reader: QuestionReader, on_question: Callable[[], None] = lambda: None
    ) -> None:
        """Add all questions of a benchmark."""
        first = len(self._names)
        for question in reader:
            self._add(name, question)
            on_question()
        self._drop_instructions(first)
        self._gradients_G2 = np.array(self._gradients, np.uint64).reshape(-1, 2)
        self._aspects_G = np.array(self._aspects)
        self.sizes[name] = (len(self._names) - first, len(reader.bad_rows))

    def matches(self, text: str, prints: Sequence[ImagePrint]) -> list[Match]:
        """Return the questions that a row seems to be, those with the same image first."""
        found: dict[int, str] = {}
        for image in prints:
            for number in self._of_pixels.get(image.pixels, ()):
                found.setdefault(number, "same image")
        for image in prints:
            for number, distance in self._similar(image):
                found.setdefault(number, f"similar image ({distance} of 128 bits differ)")
        for number, share in self._overlapping(text):
            words = f"{share:.0%} of its {NGRAM_WORDS}-word runs"
            found[number] = f"{found[number]}; {words}" if number in found else words
        return [Match(*self._names[number], how) for number, how in found.items()]

    def _add(self, name: str, question: Question) -> None:
        number = len(self._names)
        self._names.append((name, question.question_id))
        self._num_ngrams.append(0)
        for ngram in ngrams(question.text):
            self._of_ngram[ngram].append(number)
            self._num_ngrams[number] += 1
        for data in question.images:
            image = image_print(decode_image(data))
            self._of_pixels[image.pixels].append(number)
            if _has_gradients(image):
                self._of_gradients.append(number)
                self._gradients.append((image.across, image.down))
                self._aspects.append(image.width / image.height)

    def _drop_instructions(self, first: int) -> None:
        """Forget n-grams that too many of the questions from `first` on share."""
        for ngram, numbers in list(self._of_ngram.items()):
            own = [number for number in numbers if number >= first]
            if len(own) > MAX_QUESTIONS_A_NGRAM:
                for number in own:
                    self._num_ngrams[number] -= 1
                numbers[:] = [number for number in numbers if number < first]
                if not numbers:
                    del self._of_ngram[ngram]

    def _similar(self, image: ImagePrint) -> list[tuple[int, int]]:
        if not len(self._gradients_G2) or not _has_gradients(image):
            return []
        own = np.array([image.across, image.down], np.uint64)
        distances_G = np.bitwise_count(self._gradients_G2 ^ own).sum(axis=1)
        has_same_shape_G = (
            abs(self._aspects_G * image.height / image.width - 1) <= MAX_ASPECT_CHANGE
        )
        near = np.flatnonzero((distances_G <= MAX_HAMMING) & has_same_shape_G)
        return [(self._of_gradients[i], int(distances_G[i])) for i in near.tolist()]

    def _overlapping(self, text: str) -> list[tuple[int, float]]:
        if not self._of_ngram:
            return []
        counts = Counter[int]()
        for ngram in ngrams(text):
            counts.update(self._of_ngram.get(ngram, ()))
        shares = ((number, count / self._num_ngrams[number]) for number, count in counts.items())
        return [(number, share) for number, share in shares if share >= MIN_NGRAM_SHARE]


def _has_gradients(image: ImagePrint) -> bool:
    return image.across.bit_count() + image.down.bit_count() >= MIN_BITS
