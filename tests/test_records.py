"""Records by number: what is found, what is refused, and that memory stays bounded."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mmr1.data import records
from megatron_mmr1.data.records import BadRecord, open_records, scan


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


VALUES = [
    {"a": 1},
    {"a": 'quote " and \\ and ] } ,', "b": [1, {"c": "]}"}]},
    {"a": "line\u2028 \u0085 é 数", "n": None},
    {},
    {"nested": [[[]], {"x": [{}]}]},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_every_record_of_an_array_is_found(tmp_path, monkeypatch, indent, ascii_only, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)  # records that span chunks
    path = tmp_path / "x.json"
    path.write_text(json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only), "utf-8")
    found = open_records(str(path))
    assert [found[i] for i in range(len(found))] == VALUES


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\r\n \n"])
def test_every_record_of_json_lines_is_found(tmp_path, monkeypatch, chunk, end):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    path = tmp_path / "x.jsonl"
    text = "\r\n\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + end.encode())
    found = open_records(str(path))
    assert [found[i] for i in range(len(found))] == VALUES


def test_random_json_is_cut_where_pythons_parser_cuts_it(monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", 11)
    rng = np.random.default_rng(0)

    def value(depth: int):
        kind = rng.integers(6 if depth < 4 else 3)
        if kind == 0:
            return int(rng.integers(-99, 99))
        if kind in (1, 2):
            return "".join(rng.choice(list('[]{},:"\\ \n\té')) for _ in range(rng.integers(6)))
        if kind == 3:
            return [value(depth + 1) for _ in range(rng.integers(4))]
        return {str(i): value(depth + 1) for i in range(rng.integers(4))}

    for _ in range(200):
        items = [value(0) for _ in range(rng.integers(5))]
        data = np.frombuffer(json.dumps(items, indent=rng.choice([None, 1])).encode(), np.uint8)
        cut = [json.loads(data[a:b].tobytes()) for a, b in scan(data, "x")]
        assert cut == items


def test_bad_records_have_a_reason_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    deep = b"[" * 100_000 + b"]" * 100_000
    lines = [b'{"a": 1}', b'{"a": "\xff"}', b'{"a": ', b"[1]", b'{"a": ' + deep + b"}"]
    lines += [b'{"a": ' + b"9" * 10_000 + b"}", b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    found = open_records(str(path))
    assert len(found) == 7 and found[0] == {"a": 1} and found[6] == {"a": 2}
    for number, reason in enumerate(("Unicode", "JSON", "list", "Recursion", "ValueError"), 1):
        with pytest.raises(BadRecord, match=reason):
            found[number]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '[{"a": 1}, {"a"', "cut off"),
        ("x.json", '[{"a": 1}] {"b": 2}', "goes on after the end"),
        ("x.json", "", "is empty"),
        ("x.parquet", "PAR1 not", "not a readable parquet file"),
        ("x.csv", "a,b", "neither .parquet nor"),
        (None, "", "does not exist"),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_refused_by_name(tmp_path, name, text, message):
    path = tmp_path / (name or "missing.json")
    if name:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_records(str(path))
    assert path.name in str(caught.value)


def test_an_index_is_made_once_and_anew_when_the_file_changes(tmp_path, own_cache):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}]')
    told: list[tuple[int, int]] = []
    open_records(str(path), lambda *progress: told.append(progress))
    assert told == [(10, 10)] and len(list((own_cache / "megatron_mmr1").iterdir())) == 1
    assert open_records(str(path), lambda *progress: told.append(progress))[0] == {"a": 1}
    assert len(told) == 1
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert len(open_records(str(path), lambda *progress: told.append(progress))) == 2
    assert len(told) == 2


def test_parquet_rows_are_raw_whatever_features_the_file_claims(tmp_path):
    from datasets import Features, Image, Sequence, Value

    path = tmp_path / "x.parquet"
    image = {"bytes": b"not an image", "path": "a.png"}
    table = pa.table({"problem": ["<image>?"], "images": [[image]]})
    features = Features({"problem": Value("string"), "images": Sequence(Image())})
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), path)
    found = open_records(str(path))
    assert found.columns == ("problem", "images")
    assert found[0] == {"problem": "<image>?", "images": [image]}


SCRIPT = """
import os, sys
from pathlib import Path
import datasets
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
from megatron_mmr1.data.records import open_records

def anonymous_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) / 1024

records = open_records(sys.argv[1])
records[0]
before, total = anonymous_mb(), 0
for i in range(len(records)):
    total += len(records[i]["text"])
print(total, anonymous_mb() - before)
"""


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_reading_a_large_file_takes_no_memory_in_proportion(tmp_path, own_cache, kind):
    path = tmp_path / f"x.{kind}"
    texts = [str(i % 10) * 100_000 for i in range(1500)]
    if kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        pq.write_table(pa.table({"text": texts}), path)
    command = [sys.executable, "-c", SCRIPT, str(path), str(own_cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, growth_mb = done.stdout.split()
    assert int(total) == 150_000_000
    assert float(growth_mb) < 20, "the file has 150 MB"
