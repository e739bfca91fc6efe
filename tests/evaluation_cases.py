"""`python evaluation_cases.py FOLDER MODEL`: evaluations of a tiny model that share one engine.

What test_evaluate.py looks at: data files and outputs in FOLDER, and `found.json`.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_mmr1 import device

device.prepare_process()

from test_benchmarks import mathverse_row, mathvista_row, picture, write_parquet

from megatron_mmr1 import evaluate
from megatron_mmr1.cli import load_config
from megatron_mmr1.config.benchmarks import settled
from megatron_mmr1.config.schema import EvaluateConfig
from megatron_mmr1.data.digits import build_digits
from megatron_mmr1.evaluation.journal import Reply
from megatron_mmr1.evaluation.models import Model, Prepared, open_model
from megatron_mmr1.rollout.engine import Sampling

SETTINGS = ["rollout.max_response_tokens=12", "max_prompt_tokens=200", "max_bad_share=0.5"]
SETTINGS += ["reward.deadline_s=300"]  # of a busy machine, too
SAMPLED = ["rollout.temperature=1.0", "seed=3"]


class Counting:
    """Counts what the engine is asked, and ends the process' work after so many replies."""

    def __init__(self, model: Model, last: int = -1) -> None:
        self._model, self._last = model, last
        self.asked: list[str] = []

    def prepare(self, question: Any) -> Prepared:
        return self._model.prepare(question)

    def answer(self, prepared: Sequence[Prepared], sampling: Sampling) -> Iterator[Reply]:
        self.asked += [item.question_id for item in prepared]
        # The engine comes to an end, as others share it.
        for number, reply in enumerate(list(self._model.answer(prepared, sampling))):
            if number == self._last:
                raise KeyboardInterrupt
            yield reply


def write_data(folder: Path) -> None:
    """Six MathVista rows, LogicVista with three bad rows of five, MathVerse's two kinds."""
    image = {"bytes": picture(1), "path": None}
    choice = {"question_type": "multi_choice", "answer_type": "text", "unit": None}
    rows = [mathvista_row(str(n), decoded_image=image) for n in range(1, 4)]
    rows.append(mathvista_row("4", decoded_image=image, choices=["<b>1</b>", "2"], answer="2"))
    rows[-1] |= choice
    rows.append(mathvista_row("5", decoded_image=image, question="<script>alert(1)</script>"))
    rows.append(mathvista_row("long", decoded_image=image, question="Largest digit? " * 150))
    write_parquet(folder / "mathvista.parquet", rows)
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(picture(2))
    (folder / "images" / "broken.png").write_bytes(picture(2)[:60])
    row = {"imagename": "a.png", "question": "Which?", "answer": "C", "skill": ["inductive"]}
    logic = {
        "v1": row,
        "no answer": row | {"answer": ""},
        "v2": row | {"answer": "A, C", "skill": ["spatial"]},
        "broken image": row | {"imagename": "broken.png"},
        "v3": row,
    }
    (folder / "logicvista.json").write_text(json.dumps(logic))
    verse = [
        mathverse_row(1, "Text Lite", image=image),
        mathverse_row(2, "Vision Only", image=image),
        mathverse_row(6, "Text Lite", image=image, question_type="free-form", answer="a word"),
    ]
    write_parquet(folder / "mathverse.parquet", verse)
    build_digits(folder / "digits", num_train=4, num_heldout=20, num_demonstrations=4)


def main(folder: Path, model_folder: Path) -> None:
    write_data(folder)
    os.chdir(folder)  # for outputs/
    base = ["benchmark=mathvista", "data=mathvista.parquet", f"model={model_folder}", *SETTINGS]
    config = settled(load_config(EvaluateConfig, "evaluate", base))
    model = open_model(model_folder, config)
    found: dict[str, Any] = {}

    def run(*arguments: str, by: Model = model) -> str:
        return str(evaluate.run([*base, *arguments], by))

    def refusal(*arguments: str) -> str:
        try:
            run(*arguments)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{arguments} was not refused")

    found["default"] = [run(), run()]
    run("output=whole", *SAMPLED)
    try:
        run("output=cut", *SAMPLED, by=Counting(model, last=2))
        raise AssertionError("it was not interrupted")
    except KeyboardInterrupt:
        pass
    shutil.copytree("cut", "interrupted")
    with Path("cut/responses.jsonl").open("a") as file:
        file.write('{"question_id": "4", "dig')  # the line that was being written
    second = Counting(model)
    run("output=cut", *SAMPLED, by=second)
    found["asked after the interruption"] = second.asked
    idle = Counting(model)
    run("output=cut", *SAMPLED, by=idle)
    found["asked when complete"] = idle.asked
    found["other seed"] = refusal("output=cut", "rollout.temperature=1.0", "seed=4")
    shutil.copytree("interrupted", "other_model")
    copy = shutil.copytree(model_folder, folder / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    saved = Path("other_model/config.yaml").read_text().replace(str(model_folder), str(copy))
    Path("other_model/config.yaml").write_text(saved)
    found["other weights"] = refusal("output=other_model", *SAMPLED, f"model={copy}")
    found["too many bad rows"] = refusal("output=strict_share", "max_bad_share=0.1")
    for name in ("logicvista.json", "mathverse.parquet"):
        benchmark = name.partition(".")[0]
        run(f"benchmark={benchmark}", f"data={name}", f"output={benchmark}")
    several = ["rollout.temperature=1.0", "samples_per_prompt=3"]
    digits = ["benchmark=digits", "data=digits/heldout.parquet"]
    run(*digits, *several, "output=digits_run")
    # Last: it changes the data.
    path = Path("logicvista.json")
    path.write_text(path.read_text().replace("Which?", "What?"))
    logic = ["benchmark=logicvista", "data=logicvista.json", "output=logicvista"]
    found["other data"] = refusal(*logic)
    Path("found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
