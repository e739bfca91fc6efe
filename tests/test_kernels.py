"""The kernels' cases (kernel_*_cases.py), which run in a process of their own.

There Triton interprets its kernels on a CPU, as it must be told before it is first imported; here
vLLM or another test may have imported it for a GPU.
"""

import ast
import os
import subprocess
import sys
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


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[ElementTree.Element]:
    """What pytest says of every case."""
    file = tmp_path_factory.mktemp("kernels") / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
        + [str(script) for script in SCRIPTS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.DEVNULL,
    )
    return list(ElementTree.parse(file).iter("testcase"))


@pytest.mark.parametrize("case", _cases())
def test_in_the_interpreter(report: list[ElementTree.Element], case: str):
    mine = [
        entry
        for entry in report
        if f"{entry.get('classname')}.{entry.get('name')}".partition("[")[0].endswith(case)
    ]
    faults = [f"{entry.get('name')}: {fault.text}" for entry in mine for fault in entry]
    assert mine, f"{case} did not run"
    assert not faults, "\n".join(faults)
