"""One pass over the rows: sizes, answers, bad rows, duplicates, benchmark questions.

Memory: about 40 bytes a usable row, 8 more an image; and each finding.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import batched
from typing import NamedTuple

import numpy as np

from megatron_mmr1.data.dataset import BadRow
from megatron_mmr1.inspection.contamination import BenchmarkIndex, Match
from megatron_mmr1.inspection.fingerprints import digest, row_key
from megatron_mmr1.inspection.rows import Row, Rows

_ROWS_AT_ONCE = 64  # in memory
_LETTER = re.compile(r"\(?[A-J]\)?[.:]?")
_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:/[0-9]+)?"
    r"|\\[dt]?frac\{[0-9]+\}\{[0-9]+\})(?:\\?%)?"
)


class Pair(NamedTuple):
    """A row and the benchmark question that it seems to be."""

    number: int
    row_id: str
    match: Match


@dataclass(slots=True)
class Findings:
    """What was found.

    Attributes:
        num_rows: in the file.
        num_inspected: of these; fewer with a limit.
        sizes: values by what they measure, of usable rows; where there are none, an empty array.
        answers: usable rows by kind of answer.
        duplicates: numbers of the rows that are the same, a list for each such set.
        conflicts: how many of these sets disagree about the answer.
        pairs: rows and benchmark questions.
        benchmarks: questions read and bad rows, by name.
    """

    source: str
    kind: str
    has_model: bool
    num_rows: int
    num_inspected: int
    benchmarks: dict[str, tuple[int, int]]
    bad_rows: list[BadRow] = field(default_factory=list)
    sizes: dict[str, np.ndarray] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    duplicates: list[list[int]] = field(default_factory=list)
    conflicts: int = 0
    pairs: list[Pair] = field(default_factory=list)

    @property
    def num_usable(self) -> int:
        """Rows that training would use."""
        return self.num_inspected - len(self.bad_rows)

    @property
    def num_same(self) -> int:
        """Rows that repeat an earlier one."""
        return sum(len(numbers) - 1 for numbers in self.duplicates)

    @property
    def num_contaminated(self) -> int:
        """Rows that seem to be a benchmark's question."""
        return len({pair.number for pair in self.pairs})

    def reasons(self) -> list[tuple[str, list[BadRow]]]:
        """Return bad rows by reason, the most frequent first; numbers and names don't count."""
        groups = defaultdict[str, list[BadRow]](list)
        for bad in self.bad_rows:
            plain = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", bad.reason)
            groups[re.sub(r"[0-9]+", "#", plain)].append(bad)
        return sorted(groups.items(), key=lambda item: -len(item[1]))


def numbers_of(num_rows: int, limit: int, seed: int) -> np.ndarray:
    """Return which rows to look at, ascending: all, or `limit` of them drawn with `seed`."""
    if not 0 < limit < num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, limit, replace=False))


def inspect(
    rows: Rows,
    index: BenchmarkIndex,
    numbers: np.ndarray,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Read the rows of these numbers once, in threads, and count."""
    found = Findings(
        rows.source, rows.kind, rows.has_model, len(rows), len(numbers), dict(index.sizes)
    )
    counter = _Counter(found, index)
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for some in batched(numbers.tolist(), _ROWS_AT_ONCE):
            for row in threads.map(rows.read, some):
                counter.add(row)
            done += len(some)
            on_progress(done, len(numbers))
    counter.finish()
    return found


def answer_kind(answer: str) -> str:
    """Name the kind of a gold answer: "option letter", "number" or "other"."""
    plain = answer.strip().strip("$").strip()
    if _LETTER.fullmatch(plain):
        return "option letter"
    is_number = _NUMBER.fullmatch(plain) and any(c.isdigit() for c in plain)
    return "number" if is_number else "other"


class _Counter:
    """Adds rows to findings, in the order of their numbers."""

    def __init__(self, found: Findings, index: BenchmarkIndex) -> None:
        self._found, self._index = found, index
        self._seen_ids = set[int]()
        self._numbers, self._keys, self._answers = array("Q"), array("Q"), array("Q")
        self._sizes = {
            name: array("I")
            for name in (
                "question characters",
                "answer characters",
                "tokens",
                "images a row",
                "image width",
                "image height",
            )
        }

    def add(self, row: Row) -> None:
        """Count a row."""
        reason = row.reason or self._repeated_id(row.row_id)
        if reason:
            self._found.bad_rows.append(BadRow(row.number, row.row_id, reason))
            return
        self._numbers.append(row.number)
        self._keys.append(row_key(row.text, row.prints))
        self._answers.append(digest(row.answer.encode()))
        sizes = self._sizes
        sizes["question characters"].append(len(row.question))
        sizes["answer characters"].append(len(row.answer))
        sizes["images a row"].append(len(row.prints))
        sizes["tokens"].append(row.num_tokens)
        sizes["image width"].extend(image.width for image in row.prints)
        sizes["image height"].extend(image.height for image in row.prints)
        if self._found.kind == "rl":
            self._found.answers[answer_kind(row.answer)] += 1
        for match in self._index.matches(row.question, row.prints):
            self._found.pairs.append(Pair(row.number, row.row_id, match))

    def finish(self) -> None:
        """Find duplicates, and hand over the sizes."""
        if not self._found.has_model:
            del self._sizes["tokens"]
        self._found.sizes = {
            name: np.array(values, np.uint32) for name, values in self._sizes.items()
        }
        keys_N = np.array(self._keys, np.uint64)
        order_N = np.argsort(keys_N, kind="stable")
        is_new_N = np.diff(keys_N[order_N], prepend=keys_N[order_N][:1]) != 0
        for places in _split(order_N, np.flatnonzero(is_new_N)):
            if len(places) > 1:
                self._found.duplicates.append([self._numbers[i] for i in places])
                self._found.conflicts += len({self._answers[i] for i in places}) > 1
        self._found.duplicates.sort()

    def _repeated_id(self, row_id: str) -> str:
        """As training: of questions, the first row of an id counts. Ids of conversations repeat."""
        if self._found.kind != "rl":
            return ""
        key = digest(row_id.encode())
        if key in self._seen_ids:
            return "duplicate id"
        self._seen_ids.add(key)
        return ""


def _split(order_N: np.ndarray, starts: np.ndarray) -> Sequence[list[int]]:
    """Cut an array where new values start; arrays of one are left out, for speed."""
    edges = np.concatenate([[0], starts, [len(order_N)]])
    long = np.flatnonzero(np.diff(edges) > 1)
    return [order_N[edges[i] : edges[i + 1]].tolist() for i in long]
