"""Parallel layouts on four processes: exports, resharded checkpoints, log-probs over a cut
vocabulary. The cases are in layout_cases.py; log-probs and gradients are `make parity-ci`'s.
"""

from pathlib import Path

import pytest
from launched import assert_held, case_names, launch

from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("layout_cases.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one report a case, after all of them ran in one launch."""
    folder = tmp_path_factory.mktemp("layouts")
    build_tiny_qwen2_5_vl(folder / "untied")
    build_tiny_qwen2_5_vl(folder / "tied", tie_word_embeddings=True)
    launch(SCRIPT, folder, num_ranks=4)
    return folder


@pytest.mark.parametrize("case", case_names(SCRIPT))
def test_on_four_processes(reports: Path, case: str):
    assert_held(reports, case)
