"""Planned memory is the memory of a real policy, to the byte; and MMR1's presets fit their GPUs.

The counting runs in processes of its own: it pretends worlds of hundreds of ranks.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import assert_held, case_names, launch
from published import PUBLISHED

from megatron_mmr1 import cli
from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl
from megatron_mmr1.planning.published import SIZES

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("memory_cases.py")
PRESETS = [
    name
    for group in ("sft_experiment", "experiment")
    for name in cli.experiments(group)
    if name.startswith("mmr1_")
]


@pytest.fixture(scope="module", params=[1, 2])
def reports(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder with one report a case, after all of them ran in one launch."""
    folder = tmp_path_factory.mktemp("memory")
    build_tiny_qwen2_5_vl(folder / "untied")
    build_tiny_qwen2_5_vl(folder / "tied", tie_word_embeddings=True)
    launch(SCRIPT, folder, num_ranks=request.param)
    return folder


@pytest.mark.parametrize("case", case_names(SCRIPT))
def test_on_one_and_two_processes(reports: Path, case: str):
    assert_held(reports, case)


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    """What planning_cases.py planned, in one process."""
    command = [sys.executable, str(Path(__file__).with_name("planning_cases.py"))]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_there_are_18_presets():
    expected = {
        f"mmr1_{size}_{kind}_{gpus}xh100"
        for size in ("3b", "7b", "32b")
        for kind in ("sft", "vas")
        for gpus in (8, 64, 512)
    }
    assert set(PRESETS) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_gpus_and_its_states_are_shared_out(plans: dict[str, Any], name: str):
    """The states are 12 bytes of every trainable parameter of a rank, over the ranks that share
    them; exactly so but for what Megatron's alignment of parameters adds.
    """
    plan = plans[name]
    print(plan["text"])
    for rank in plan["ranks"]:
        assert rank["fits"], plan["text"]
        assert rank["weights"] == pytest.approx(2 * rank["num_parameters"], rel=1e-5)
        assert rank["gradients"] == 2 * rank["weights"]
        share = 12 * rank["num_parameters"] / plan["sharing_ranks"]
        assert rank["states"] == pytest.approx(share, rel=2e-3)


@pytest.mark.parametrize("name", ["mmr1_32b_sft_8xh100", "mmr1_32b_vas_8xh100", "without offload"])
def test_what_is_stepped_on_the_cpu_takes_a_third_more_for_its_gradients(
    plans: dict[str, Any], name: str
):
    """4 bytes beside 12; states that only step aside for the engine have no gradients there."""
    plan = plans[name]
    for rank in plan["ranks"]:
        offloaded = plan["cpu_offload"] * rank["states"]
        aside = plan["takes_turns"] * (rank["states"] - offloaded)
        assert rank["host_bytes"] == pytest.approx(offloaded / 12 * 16 + aside)
    assert (plan["cpu_offload"] > 0) == (name != "without offload")


def test_the_document_is_what_the_tool_prints(plans: dict[str, Any]):
    document = (SCRIPT.parents[1] / "docs" / "memory.md").read_text()
    printed = "\n".join(plans[name]["text"] for name in PRESETS)
    assert document.partition("```\n")[2] == f"{printed}\n```\n"


@pytest.mark.parametrize("control", ["without offload", "on too few GPUs", "tower kept"])
def test_a_layout_that_cannot_fit_is_found_out(plans: dict[str, Any], control: str):
    """Negative controls: presets with one setting undone."""
    assert not all(rank["fits"] for rank in plans[control]["ranks"])
    assert "DOES NOT FIT" in plans[control]["text"]


@pytest.mark.parametrize("name", SIZES)
def test_pipeline_stages_hold_the_published_model_together(plans: dict[str, Any], name: str):
    """Every parameter once; a tied embedding is on the first and on the last stage."""
    size = name.removeprefix("qwen2_5_vl_").upper()
    published = PUBLISHED[f"Qwen2.5-VL-{size}"]
    text = published.config["text_config"]
    twice = text["hidden_size"] * text["vocab_size"] * published.config["tie_word_embeddings"]
    assert sum(plans[name]["num_parameters"]) == published.num_parameters + twice
    assert plans[name]["has_tower"] == [True, False, False, False]
    assert len(set(plans[name]["ranks"])) == 4


def test_the_tool_plans_what_the_command_line_says():
    """And its exit status says whether everything fits."""
    tool = [sys.executable, "tools/plan.py"]
    for arguments, status, said in (
        (["sft", "experiment=mmr1_3b_sft_8xh100", "parallel=tp1"], 1, "8 x (TP 1, PP 1, CP 1)"),
        (["experiment=mmr1_3b_vas_512xh100"], 0, "512 GPUs, 256 x (TP 2, PP 1, CP 1)"),
        (["experiment=digits", "model.path=nowhere"], 2, "error: model.path='nowhere' has no con"),
    ):
        finished = subprocess.run(
            [*tool, *arguments], capture_output=True, text=True, cwd=SCRIPT.parents[1]
        )
        assert finished.returncode == status, finished.stderr[-2000:]
        assert said in (finished.stderr if status == 2 else finished.stdout)
