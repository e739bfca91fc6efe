"""Expert parallelism on four processes against one process: log-probs, gradients, checkpoints.
The cases are in expert_cases.py.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("expert_cases.py")
CASES = [
    node.name.removeprefix("case_")
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]
LIMIT_S = 600


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Path:
    """The folder with one report a case, after all of them ran in one launch."""
    import expert_cases

    folder = tmp_path_factory.mktemp("experts")
    build_tiny_qwen2_5_vl(folder / "model")
    expert_cases.one_process(folder / "model").save(folder / "one_process.safetensors")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        )
    return folder


@pytest.mark.parametrize("case", CASES)
def test_on_four_processes(reports: Path, case: str):
    report = reports / f"{case}.txt"
    assert report.exists(), (reports / "log").read_text()[-3000:]
    assert report.read_text() == ""
