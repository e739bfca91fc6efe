"""The kernels' cases notice every wrong variant in kernel_mutants.py."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_mutants import MUTANTS, Mutant

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
NUM_PROCESSES = 2
WRONG_COPY = 9
# Runs pytest in the process that has found out which copy of the package it imports.
CHILD = f"""
import sys, megatron_mmr1, pytest
package, *arguments = sys.argv[1:]
sys.exit(pytest.main(arguments) if list(megatron_mmr1.__path__) == [package] else {WRONG_COPY})
"""
CASES = ("sequence", "row", "head", "layout")


def run_cases(folder: Path, cases: str, mutant: Mutant | None) -> tuple[int, str]:
    """Run a file of cases against a copy of the package that a mutant changes; status, output."""
    package = folder / "megatron_mmr1"
    shutil.copytree(TESTS.parent / "megatron_mmr1", package)
    if mutant is not None:
        file = package / "kernels" / mutant.file
        text = file.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.old!r} must occur once in {mutant.file}"
        file.write_text(text.replace(mutant.old, mutant.new))
    script = TESTS / f"kernel_{cases}_cases.py"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, package, "-x", "-q", "-p", "no:cacheprovider", script],
        env=os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout[-3000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """Of each mutant by its name, and of the unchanged package by its cases' name."""
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        jobs = [(cases, cases, None) for cases in CASES]
        jobs += [(mutant.name, mutant.cases, mutant) for mutant in MUTANTS]
        yield {
            name: pool.submit(run_cases, tmp_path_factory.mktemp("copy"), cases, mutant)
            for name, cases, mutant in jobs
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cases", CASES)
def test_the_unchanged_package_passes(outcomes: dict[str, Future], cases: str):
    status, output = outcomes[cases].result()
    assert status == pytest.ExitCode.OK, output


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_a_wrong_variant_is_noticed(outcomes: dict[str, Future], name: str):
    status, output = outcomes[name].result()
    assert status == pytest.ExitCode.TESTS_FAILED, output
