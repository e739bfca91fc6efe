"""The parity check itself: that it can fail, and that its command refuses what cannot be checked.

What it finds at every layout is `make parity-ci`'s, which fails when a figure is out of bounds.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mmr1.parity.bounds import LOGPROB_BOUND
from megatron_mmr1.parity.layouts import BATCH_KINDS, CONTROLS, LAYOUTS
from megatron_mmr1.parity.matrix import Cell, Compared
from megatron_mmr1.parity.models import TINY_MODELS
from megatron_mmr1.parity.outcome import Outcome, difference
from megatron_mmr1.parity.table import as_html, as_markdown, is_good, summary, tables

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_parity.py"


def outcome() -> Outcome:
    gradients = {"a.weight": torch.tensor([3.0, 4.0]), "b.bias": torch.zeros(2)}
    return Outcome(
        [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])], torch.tensor(0.5), gradients, [], []
    )


def test_an_outcome_is_no_distance_from_itself_and_survives_its_file(tmp_path: Path):
    outcome().save(tmp_path / "x.safetensors")
    found = difference(Outcome.load(tmp_path / "x.safetensors"), outcome())
    assert (found.logprob, found.loss, found.gradient) == (0, 0, 0)


def test_differences_are_those_worked_out_by_hand():
    other = outcome()
    other.logprobs[1][0] -= 0.25
    other.gradients["a.weight"][0] += 0.5
    found = difference(replace(other, loss=torch.tensor(0.75)), outcome())
    assert (found.logprob, found.loss) == (0.25, 0.25)
    assert (found.gradient, found.worst_gradient) == (0.1, "a.weight")


def test_what_is_not_finite_or_appears_from_nothing_is_infinitely_far():
    nan, appeared = outcome(), outcome()
    nan.logprobs[0][0] = torch.nan
    assert difference(nan, outcome()).logprob == float("inf")
    appeared.gradients["b.bias"][0] = 1e-30
    assert difference(appeared, outcome()).gradient == float("inf")


def test_outcomes_of_other_things_are_not_compared():
    fewer = replace(outcome(), gradients={"a.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"gradients of b\.bias"):
        difference(fewer, outcome())
    with pytest.raises(ValueError, match="different samples"):
        difference(replace(outcome(), logprobs=[torch.zeros(3)]), outcome())


def test_a_gradient_that_is_zero_in_theory_is_held_against_all_gradients():
    """Both are rounding, which no bound fits; what is wrong by more than that still stands out."""
    theirs = outcome()
    name = next(iter(theirs.gradients))
    norm = torch.stack([g.double().norm() for g in theirs.gradients.values()]).norm()
    unit = torch.ones_like(theirs.gradients[name])
    unit /= unit.norm()

    def found(ours: float, exact: float) -> float:
        pair = [
            replace(theirs, gradients={**theirs.gradients, "zero": factor * norm * unit})
            for factor in (ours, exact)
        ]
        return difference(*pair).gradient

    assert found(3e-8, -1e-8) == pytest.approx(4e-8, rel=1e-3)
    assert found(1e-3, 1e-8) == pytest.approx(1e-3, rel=1e-3)
    assert found(3e-5, 1e-5) == pytest.approx(2.0, rel=1e-3), "not zero: against its own norm"


GOOD = {"logprob": 1e-6, "loss": 1e-7, "gradient": 1e-6, "worst_gradient": "a"}


def compared(control: str = "", **values: object) -> Compared:
    cell = Cell(LAYOUTS[0], "tiny", control)
    return Compared(cell, "mixed", **{"is_bit_for_bit": True, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["logprob", "loss", "gradient"])
@pytest.mark.parametrize("value", [2e-5, float("inf"), float("nan")])
def test_a_figure_out_of_bounds_is_no_success_and_stands_out(key: str, value: float):
    bad = GOOD | {key: value}
    assert is_good(compared(hugging_face=GOOD, one_process=GOOD))
    assert not is_good(compared(hugging_face=bad))
    assert not is_good(compared(hugging_face=GOOD, one_process=bad))
    assert is_good(compared("a mistake", hugging_face=bad))
    results = [compared(hugging_face=bad), compared("a mistake", hugging_face=GOOD)]
    assert summary(results) == ("0 of 1 comparisons within bounds, 0 of 1 negative controls caught")
    text, page = as_markdown(tables(results)), as_html(tables(results), "h", "w")
    assert "out of bounds" in text and "MISSED" in text
    assert page.count('class="bad"') == 2


def test_a_users_model_has_twice_the_room_against_one_process_and_no_more():
    """Each of the two may be a bound away from Hugging Face."""
    layout = replace(LAYOUTS[0], is_own_model=True)

    def judged(gradient: float) -> bool:
        one_process = GOOD | {"gradient": gradient}
        own = Compared(Cell(layout, "own"), "mixed", True, GOOD, one_process)
        assert ("out of bounds" in as_markdown(tables([own]))) != is_good(own)
        return is_good(own)

    assert judged(1.9e-5) and not judged(2.1e-5)
    assert not is_good(compared(hugging_face=GOOD, one_process=GOOD | {"gradient": 1.9e-5}))


def test_weights_that_come_back_changed_are_no_success():
    changed = compared(hugging_face=GOOD, is_bit_for_bit=False)
    assert not is_good(changed)
    assert "DIFFERENT (out of bounds)" in as_markdown(tables([changed]))


def test_rounding_is_judged_against_hugging_faces_own():
    assert is_good(compared(error=1.4e-3, hugging_face_error=1e-3))
    assert not is_good(compared(error=1.6e-3, hugging_face_error=1e-3))
    assert not is_good(compared(error=0.0, hugging_face_error=1e-3)), "nothing was rounded"


def test_the_matrix_has_the_layouts_that_it_promises():
    names = [layout.name for layout in LAYOUTS]
    assert len(names) == len(set(names))
    for promised in ("TP2", "TP2 + SP", "PP2", "PP2 x VPP2", "CP2", "DP2", "TP2 x PP2",
                     "TP2 x CP2 + SP", "PP2 x CP2", "TP4 (2 KV heads)"):  # fmt: skip
        (layout,) = [one for one in LAYOUTS if one.name == promised]
        assert layout.all_kinds == tuple(BATCH_KINDS) and layout.in_ci, promised
    for model in set(TINY_MODELS) - {"qwen2_5_vl"}:
        tp = "TP2 + SP" if model == "qwen3_moe" else "TP2"
        for promised in ("one process", tp, "PP2", f"{tp} x PP2"):
            assert f"{model}: {promised}" in names
    assert "qwen3_moe: EP2" in names
    assert len(CONTROLS) >= 5 and LOGPROB_BOUND == 1e-5


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"COLUMNS": "200"},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tp_size=3"], "parallel.tp_size=3 does not divide"),
        (["parallel.cp_size=2", "max_tokens_per_microbatch=510"], "use a multiple of 4, as 508"),
        (["--hf"], "--hf needs a folder"),
        (["--hf", "nowhere"], "model.path='nowhere' is no folder"),
        (["--matrix", "x", "parallel.tp_size=2"], "--matrix checks its own layouts"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_anything_starts(
    arguments: list[str], message: str
):
    refused = run_tool(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.distributed
def test_a_users_own_model_is_checked_at_the_layout_asked_for(tied_model_dir: Path):
    done = run_tool("--hf", str(tied_model_dir), "parallel.pp_size=2", "parallel.vpp_size=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 comparisons within bounds" in done.stdout
    assert "| as asked | 2 |" in done.stdout
