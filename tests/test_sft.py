"""The cold start as a whole, from ShareGPT files: what it counts, exact resumption, layouts."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import relative_difference
from processes import LIMIT_S, Finished, Process
from safetensors.torch import load_file

from megatron_mmr1.data.digits import build_digits
from megatron_mmr1.observability.metrics import read_metrics

pytestmark = pytest.mark.distributed

NUM_STEPS = 8
BATCH_SIZE = 16
NUM_GOOD = 60
BAD = [
    {"id": "no file", "images": ["none.png"], "conversations": []},
    {"id": "no turns", "images": [], "conversations": []},
]


def share_gpt(folder: Path) -> list[dict[str, Any]]:
    """The embedded task's demonstrations as records with paths of images, some of two questions."""
    build_digits(folder, num_train=8, num_heldout=8, num_demonstrations=100)
    records = []
    for number, row in enumerate(pq.read_table(folder / "sft.parquet").to_pylist()):
        paths = [f"{number}_{i}.png" for i in range(len(row["images"]))]
        for path, image in zip(paths, row["images"], strict=True):
            (folder / path).write_bytes(image["bytes"])
        records.append({"id": f"d{number}", "conversations": row["conversations"], "images": paths})
    joined = [
        {"id": f"{a['id']}+{b['id']}"} | {k: a[k] + b[k] for k in ("conversations", "images")}
        for a, b in zip(records[:20:2], records[1:20:2], strict=True)
    ]
    return joined + records[20:]


@dataclass(frozen=True)
class ColdStarts:
    folder: Path
    model: Path

    def dir(self, run: str) -> Path:
        return self.folder / "digits_sft" / run

    def start(self, run: str, *overrides: str, ranks: int = 1) -> Process:
        launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m")
        return Process(
            self.folder / run,
            *("-m", *(launcher if ranks > 1 else ()), "megatron_mmr1.sft"),
            *(f"output_dir={self.folder}", f"run={run}", f"model.path={self.model}"),
            f"data={self.folder / 'train.json'}",
            f"validation={self.folder / 'validation.jsonl'}",
            *(f"num_steps={NUM_STEPS}", f"global_batch_size={BATCH_SIZE}"),
            *("max_tokens_per_microbatch=512", "validation_every=2", "checkpoint.every=2"),
            *("checkpoint.keep_last=20", "max_bad_share=0.2"),
            *overrides,
        )


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> ColdStarts:
    folder = tmp_path_factory.mktemp("sft")
    records = share_gpt(folder)
    train, validation = records[:NUM_GOOD], records[NUM_GOOD:]
    (folder / "train.json").write_text(json.dumps([BAD[0], *train, BAD[1]]))
    lines = [json.dumps(record) + "\n" for record in (*validation, BAD[1])]
    (folder / "validation.jsonl").write_text("".join(lines))
    return ColdStarts(folder, tiny_model_dir)


@pytest.fixture(scope="module")
def whole(starts: ColdStarts) -> Path:
    """A run that nothing interrupts; and "cut", the same one, killed after its first checkpoint,
    then continued.
    """
    cut, whole = starts.start("cut"), starts.start("whole")
    deadline = time.monotonic() + LIMIT_S
    while not (starts.dir("cut") / "checkpoints" / "step_2").exists():
        assert cut.is_running() and time.monotonic() < deadline, cut.wait().succeeded()
        time.sleep(0.01)
    cut.kill()
    assert not (starts.dir("cut") / "hf").exists(), "it was killed too late"
    whole.wait().succeeded()
    starts.start("cut", "resume=auto").wait().succeeded()
    return starts.dir("whole")


@pytest.fixture(scope="module")
def hasty(starts: ColdStarts) -> tuple[Path, Finished]:
    """A run whose learning rate soon does harm, and one with more bad records than it may have."""
    strict = starts.start("strict", "max_bad_share=0.01", "checkpoint.every=0")
    starts.start("hasty", "optimizer.lr=0.3", "optimizer.schedule=constant").wait().succeeded()
    return starts.dir("hasty"), strict.wait()


def test_it_learns_and_its_records_say_so(whole: Path):
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    losses = {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert list(losses) == [2, 4, 6, 8] and losses[8] < losses[2]
    assert rows[0]["tokens_per_s"] > 0 and rows[0]["time/data_s"] > 0
    report = (whole / "report.html").read_text()
    assert "validation" in report.lower()


def test_bad_records_are_recorded_once_and_the_rest_is_used(starts: ColdStarts, whole: Path):
    lines = (whole / "bad_rows.jsonl").read_text().splitlines()
    found = {(Path(row["source"]).name, row["row_id"]) for row in map(json.loads, lines)}
    assert len(lines) == 3
    assert found == {
        ("train.json", "no file"),
        ("train.json", "no turns"),
        ("validation.jsonl", "no turns"),
    }
    assert read_metrics(whole)[-1]["data/bad_records"] == 2


def test_a_killed_cold_start_continues_as_if_nothing_had_happened(starts, whole: Path):
    def lasting(run_dir: Path) -> list[dict[str, Any]]:
        rows = read_metrics(run_dir)
        return [
            {k: v for k, v in r.items() if not k.startswith(("time/", "tokens_per_s"))}
            for r in rows
        ]

    cut = starts.dir("cut")
    assert lasting(cut) == lasting(whole)
    model = Path("hf") / "model.safetensors"
    assert (cut / model).read_bytes() == (whole / model).read_bytes()
    ours, theirs = (sorted((d / "bad_rows.jsonl").read_text().splitlines()) for d in (cut, whole))
    assert ours == theirs


@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("parallel.tp_size=2", "parallel.sequence_parallel=true"),
        ("parallel.pp_size=2",),
        ("parallel.cp_size=2",),
    ],
    ids=["dp2", "tp2", "pp2", "cp2"],
)
def test_two_ranks_learn_what_one_learns(starts: ColdStarts, whole: Path, layout, request):
    name = request.node.callspec.id
    starts.start(name, *layout, "checkpoint.every=0", ranks=2).wait().succeeded()
    ours, theirs = read_metrics(starts.dir(name)), read_metrics(whole)
    for two, one in zip(ours, theirs, strict=True):
        # Of the time, rank 0 has its own pipeline stage's parts.
        names, expected = ({k for k in row if "time/" not in k} for row in (two, one))
        assert names == expected
        for key in one.keys() & {"loss", "validation/loss", "grad_norm"}:
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
        assert two["data/bad_records"] == one["data/bad_records"]
    two, one = (load_file(d / "hf" / "model.safetensors") for d in (starts.dir(name), whole))
    assert max(relative_difference(two[key], one[key]) for key in one) <= 2e-4


def test_the_validation_loss_is_hugging_faces_over_the_assistants_turns(
    starts: ColdStarts, whole: Path, tiny_processor
):
    """Over whole conversations in one pass each, with the loss on the assistant's turns."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(whole / "hf", dtype=torch.float32)
    total, num_tokens, without_turns = 0.0, 0, 0.0
    lines = (starts.folder / "validation.jsonl").read_text().splitlines()
    for record in map(json.loads, lines[:-1]):
        *history, last = record["conversations"]
        files = [(starts.folder / path).read_bytes() for path in record["images"]]
        assert len(history) == 1
        prompt = tiny_processor.prompt("p", history[0]["value"], files)
        response = tiny_processor.response_token_ids(last["value"])
        token_ids = torch.cat([prompt.token_ids, response])[None]
        labels = token_ids.clone()
        labels[0, : len(prompt.token_ids)] = -100
        inputs = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "mm_token_type_ids": (token_ids == tiny_processor.image_token_id).int(),
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
        }
        with torch.no_grad():
            total += float(model(**inputs, labels=labels).loss) * len(response)
            without_turns += float(model(**inputs, labels=token_ids).loss) * len(response)
        num_tokens += len(response)
    ours = read_metrics(whole)[-1]["validation/loss"]
    assert ours == pytest.approx(total / num_tokens, rel=1e-4)
    assert ours != pytest.approx(without_turns / num_tokens, rel=1e-2), "the prompts count too"


def test_the_weights_of_the_lowest_validation_loss_are_written(hasty):
    run_dir, _ = hasty
    losses = {r["step"]: r["validation/loss"] for r in read_metrics(run_dir) if r["step"] % 2 == 0}
    best = min(losses, key=losses.__getitem__)
    assert best != NUM_STEPS, "the learning rate did no harm"
    assert (run_dir / "checkpoints" / "best.txt").read_text().strip().endswith(str(best))


def test_too_many_bad_records_stop_it_with_a_summary(hasty):
    _, stopped = hasty
    assert stopped.returncode == 2
    assert "max_bad_share=0.01: " in stopped.stderr and "mend them or raise" in stopped.stderr
    assert "Traceback" not in stopped.stderr
