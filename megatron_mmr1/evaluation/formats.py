"""Rows of benchmark files as people have them: parquet, JSON, JSONL, VLMEvalKit's TSV, a hub.

Owns the formats: every reader yields one mapping a row, streaming where the format allows it, and
an `Unreadable` in place of a row that can't be parsed. What the columns mean is `records.py`.
"""

from __future__ import annotations

import ast
import base64
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

MAX_FIELD_CHARACTERS = 1 << 28  # of a TSV: images in base64
# VLMEvalKit's own limit between a base64 image and the index of the row that holds the image.
_MAX_INDEX_CHARACTERS = 64


class Unreadable(NamedTuple):
    """What stands in place of a row that can't be parsed."""

    reason: str
    row_id: str = ""


Row = Mapping[str, Any] | Unreadable


def read_path(path: Path, split: str) -> Iterator[tuple[Path, Row]]:
    """Yield (file, row) for every row of a file, or of the shards of a folder in order of name.

    Args:
        path: a .parquet, .json, .jsonl or .tsv file, or a folder with files of one of these kinds.
        split: of a folder, only the files `SPLIT.*`, `SPLIT-*` and `SPLIT_*` are read.

    Raises:
        ValueError: no such files, files of several kinds, or a file that is not of its kind.
    """
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if re.match(rf"{re.escape(split)}[-_.]", f.name))
        files = [file for file in files if file.suffix in _READERS]
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(_READERS):
        raise ValueError(
            f"{path}: expected one file, or a folder with files named {split}-... of one kind, of "
            f"{', '.join(_READERS)}; found {', '.join(sorted(kinds)) or 'none'}"
        )
    for file in files:
        for row in _READERS[file.suffix](file):
            yield file, row


def read_hub(source: str, split: str, config: str | None) -> Iterator[Row]:
    """Stream the rows of a Hugging Face data set; images stay encoded.

    Args:
        source: OWNER/NAME[:SPLIT][@REVISION], SPLIT in place of `split`.
        split, config: which part of it.

    Raises:
        ValueError: the `datasets` library is missing, or it can't load the data (offline, unknown
            name, configuration or split).
    """
    name, _, revision = source.partition("@")
    name, _, own_split = name.partition(":")
    pinned: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError(
            f"reading {source!r} from a hub needs the datasets library: pip install datasets, or "
            "give the path of a local file"
        ) from error
    try:
        data: Any = datasets.load_dataset(
            name, config, split=own_split or split, streaming=True, **pinned
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"can't load {source!r} from the hub ({error}); hubs are asked only with "
            "HF_HUB_OFFLINE=0 in the environment; without a network, give the path of a local file"
        ) from error
    if data.features:  # images stay encoded, those in lists too
        data = data.decode(False)
    yield from data


def literal_list(value: Any) -> list[Any]:
    """Return a list that may be written as text ("['a', 'b']", in a TSV); other text is one item.

    Raises:
        ValueError: text that starts like a list and is none.
    """
    if value is None or value == "" or value != value:  # NaN is pandas' empty cell
        return []
    if isinstance(value, str) and value.startswith("["):
        return list(literal(value))
    return list(value) if isinstance(value, list | tuple) else [value]


def literal(text: str) -> Any:
    """Return the value of a Python literal, such as a list or a dict of strings.

    Raises:
        ValueError: it is none.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"not a literal: {text[:40]!r}") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error
    for batch in file.iter_batches(batch_size=64):
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Unreadable("not UTF-8")


def _json(path: Path) -> Iterator[Row]:
    """A list of rows, or an object of rows by id (MathVista's and LogicVista's own files)."""
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if isinstance(content, dict):
        content = _Repeated(content.items())
    if isinstance(content, _Repeated):
        for row_id, row in content:
            yield {"id": row_id, **row} if isinstance(row, dict) else _no_object(row_id)
    elif isinstance(content, list):
        yield from (row if isinstance(row, dict) else _no_object() for row in content)
    else:
        raise ValueError(f"{path} holds neither a list nor an object of rows")


class _Repeated(list[tuple[str, Any]]):
    """The items of a JSON object with repeated keys, which a dict would silently drop."""


def _object(pairs: list[tuple[str, Any]]) -> Any:
    content = dict(pairs)
    return content if len(content) == len(pairs) else _Repeated(pairs)


def _no_object(row_id: str = "") -> Unreadable:
    return Unreadable("not a JSON object with unique keys", row_id)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:  # bytes: text lines would also break at U+2028
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
            except UnicodeDecodeError:
                yield Unreadable("not UTF-8")
            except (ValueError, RecursionError) as error:
                yield Unreadable(f"not JSON: {error}")
            else:
                yield row if isinstance(row, dict) else _no_object()


def _tsv(path: Path) -> Iterator[Row]:
    """VLMEvalKit's files: images in base64, one or a list; or the index of a row that has them."""
    indices = {
        row["image"]
        for row in _tsv_rows(path)
        if not isinstance(row, Unreadable)
        and 0 < len(row.get("image", "")) <= _MAX_INDEX_CHARACTERS
    }
    images = {
        row["index"]: row["image"]
        for row in (_tsv_rows(path) if indices else ())
        if not isinstance(row, Unreadable) and row.get("index") in indices
    }
    for row in _tsv_rows(path):
        if isinstance(row, Unreadable) or not row.get("image"):
            yield row
            continue
        encoded = row["image"]
        if len(encoded) <= _MAX_INDEX_CHARACTERS:
            encoded = images.get(encoded, encoded)
        try:
            files = [base64.b64decode(item, validate=True) for item in literal_list(encoded)]
        except ValueError:
            yield Unreadable("image is not base64", row.get("index", ""))
        else:
            yield {**row, "image": files}


def _tsv_rows(path: Path) -> Iterator[dict[str, str] | Unreadable]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    # A byte that is no UTF-8 becomes a surrogate, so that it spoils only its own row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        yield from _tsv_cells(lines, path)


def _tsv_cells(lines: Iterable[list[str]], path: Path) -> Iterator[dict[str, str] | Unreadable]:
    rows = iter(lines)
    columns = next(rows, [])
    if "index" not in columns or "question" not in columns:
        raise ValueError(f"{path} has no columns 'index' and 'question'; is it VLMEvalKit's TSV?")
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Unreadable(f"not a TSV from here on: {error}")
            return
        if not cells:  # a blank line
            continue
        if len(cells) != len(columns):
            yield Unreadable(f"{len(cells)} cells for {len(columns)} columns", cells[0][:80])
        elif any(not cell.isascii() and _has_surrogates(cell) for cell in cells):
            yield Unreadable("not UTF-8", cells[columns.index("index")])
        else:
            yield dict(zip(columns, cells, strict=True))


def _has_surrogates(text: str) -> bool:
    return re.search("[\ud800-\udfff]", text) is not None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _jsonl,
    ".tsv": _tsv,
}
