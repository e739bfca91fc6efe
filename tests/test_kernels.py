"""The kernels' cases (kernel_*_cases.py), which run in a process of their own.

There Triton interprets its kernels on a CPU, as it must be told before it is first imported; here
vLLM or another test may have imported it for a GPU.
"""

import ast
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPTS = sorted(Path(__file__).parent.glob("kernel_*_cases.py"))


def _cases() -> list[str]:
    """The test functions of the scripts, without importing them."""
    return [
        f"{script.stem}.{node.name}"
        for script in SCRIPTS
        for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def _run(script: Path, report: Path) -> list[ElementTree.Element]:
    """Run the cases of a script in a process of their own; what pytest says of each."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, f"--junitxml={report}", str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    return list(ElementTree.parse(report).iter("testcase"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[ElementTree.Element]:
    """Of every case, from two processes at a time."""
    folder = tmp_path_factory.mktemp("kernels")
    reports = [folder / f"{script.stem}.xml" for script in SCRIPTS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(itertools.chain.from_iterable(pool.map(_run, SCRIPTS, reports)))


@pytest.mark.parametrize("case", _cases())
def test_in_the_interpreter(outcomes: list[ElementTree.Element], case: str):
    mine = [
        outcome
        for outcome in outcomes
        if f"{outcome.get('classname')}.{outcome.get('name')}".partition("[")[0].endswith(case)
    ]
    assert mine, f"{case} did not run"
    faults = [f"{outcome.get('name')}: {fault.text}" for outcome in mine for fault in outcome]
    assert not faults, "\n".join(faults)
