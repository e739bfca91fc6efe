"""Expert parallelism on four processes against one process: log-probs, gradients, checkpoints.
The cases are in expert_cases.py.
"""

from pathlib import Path

import pytest
from launched import assert_held, case_names, launch

from megatron_mmr1.parity.models import build_tiny

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("expert_cases.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Path:
    """The folder with one report a case, after all of them ran in one launch."""
    import expert_cases

    folder = tmp_path_factory.mktemp("experts")
    build_tiny("qwen3_moe", folder / "model")
    expert_cases.one_process(folder / "model").save(folder / "one_process.safetensors")
    launch(SCRIPT, folder, num_ranks=4)
    return folder


@pytest.mark.parametrize("case", case_names(SCRIPT))
def test_on_four_processes(reports: Path, case: str):
    assert_held(reports, case)
