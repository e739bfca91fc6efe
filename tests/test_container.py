"""The Dockerfile without a container engine: its lint, and what its two stages must be.

examples/container/rehearse.py runs the demo stage's steps in a clean root; not here, it takes
minutes and needs root.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def rehearse() -> Any:
    """The script of the rehearsal, as a module."""
    path = REPOSITORY / "examples" / "container" / "rehearse.py"
    spec = importlib.util.spec_from_file_location("rehearse", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rehearse"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def arguments_of(steps: list[Any], instruction: str) -> list[str]:
    return [step.argument for step in steps if step.instruction == instruction]


@pytest.mark.parametrize("stage", ["cuda", "demo"])
def test_a_stage_runs_as_a_numbered_user_and_leaves_nothing_to_root(rehearse: Any, stage: str):
    """A pod with runAsNonRoot starts only with a number. What comes after it is the user's."""
    steps = rehearse.stage_steps(DOCKERFILE, stage)
    (user,) = arguments_of(steps, "USER")
    assert int(user) > 0
    assert f"--uid {user} trainer" in " ".join(arguments_of(steps, "RUN"))
    after = steps[[step.instruction for step in steps].index("USER") :]
    assert all("apt-get" not in run for run in arguments_of(after, "RUN"))
    assert all(copy.startswith("--chown=trainer ") for copy in arguments_of(steps, "COPY"))


def test_what_the_stages_name_is_pinned_and_exists(rehearse: Any):
    steps = rehearse.stage_steps(DOCKERFILE, "cuda")
    arguments = dict(argument.split("=") for argument in arguments_of(steps, "ARG"))
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"UV_VERSION := {arguments['UV_VERSION']}\n" in makefile
    assert re.fullmatch(r"[0-9a-f]{40}", arguments["APEX_COMMIT"])
    demo = rehearse.stage_steps(DOCKERFILE, "demo")
    assert arguments_of(demo, "RUN")[-1] == "make setup"
    assert arguments_of(demo, "CMD") == ['["make", "demo"]']
    assert all(re.search(rf"^{goal}:", makefile, re.M) for goal in ("setup", "demo"))


def missing_requirements(steps: list[Any]) -> set[str]:
    """What an install reads (`-r`, `-c`, and `-r` lines in there) and no COPY brought before."""
    there: set[str] = set()
    missing: set[str] = set()
    for step in steps:
        if step.instruction == "COPY":
            there |= set(step.argument.split()[:-1])
        elif step.instruction == "RUN":
            read = re.findall(r" -[rc] (\S+)", step.argument)
            for name in read:  # grows on the way
                text = (REPOSITORY / name).read_text()
                read += re.findall(r"^-[rc] (\S+)", text, re.M)
            missing |= set(read) - there
    return missing


def test_every_file_of_requirements_is_copied_before_it_is_read(rehearse: Any):
    assert missing_requirements(rehearse.stage_steps(DOCKERFILE, "cuda")) == set()
    without = rehearse.stage_steps(DOCKERFILE.replace(" requirements-te.txt", ""), "cuda")
    assert missing_requirements(without) == {"requirements-te.txt"}


def test_transformer_engine_is_built_with_pinned_tools_and_without_isolation(rehearse: Any):
    """torch and the tools are there first, at the versions of requirements-te-build.txt."""
    (run,) = [
        run
        for run in arguments_of(rehearse.stage_steps(DOCKERFILE, "cuda"), "RUN")
        if "requirements-cuda.txt" in run
    ]
    first, second = [part for part in run.split("&&") if "pip install --python" in part]
    constraint = "-c requirements-te-build.txt"
    assert "-r requirements.txt" in first and constraint in first
    pins = (REPOSITORY / "requirements-te-build.txt").read_text()
    tools = first.partition(constraint)[2].split()
    assert tools and all(re.search(rf"^{tool}==", pins, re.M) for tool in tools if tool != "\\")
    assert "--no-build-isolation -r requirements-cuda.txt" in second


def test_hadolint_has_nothing_to_say_and_would_say_it():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    if linter is None:
        pytest.skip("hadolint is not installed: `make setup` (requirements-dev.txt) brings it")

    def complaints(dockerfile: str) -> str:
        return subprocess.run(
            [linter, "-"], input=dockerfile, capture_output=True, text=True
        ).stdout

    assert complaints(DOCKERFILE) == ""
    assert "DL3002" in complaints(DOCKERFILE.replace("USER 10001", "USER root"))


def test_the_rehearsals_steps_are_the_stages_own(rehearse: Any):
    first = "FROM a AS x\nRUN one \\\n  # why\n  && two\n"
    text = f"{first}FROM b AS y\nARG V=1\nENV A=${{V}}/b\nRUN z\n"
    steps = rehearse.stage_steps(text, "x")
    assert [(s.line, s.instruction, s.argument.split()) for s in steps] == [
        (2, "RUN", ["one", "&&", "two"])
    ]
    assert [s.instruction for s in rehearse.stage_steps(text, "y")] == ["ARG", "ENV", "RUN"]
    rehearsal = rehearse.Rehearsal(Path("/nowhere"))
    for step in rehearse.stage_steps(text, "y")[:2]:
        rehearsal.run(step, runs_cmd=False)
    assert rehearsal.environment["A"] == "1/b"


@pytest.mark.parametrize(
    ("dockerfile", "stage", "reason"),
    [
        ("FROM a AS x\nRUN --mount=type=cache,target=/c y\n", "x", "--mount"),
        ("FROM a AS x\nCOPY --from=y /a /b\n", "x", "--from"),
        ("FROM a AS x\nRUN y\n", "z", "no stage"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    rehearse: Any, dockerfile: str, stage: str, reason: str
):
    with pytest.raises(ValueError, match=reason):
        rehearse.stage_steps(dockerfile, stage)


def test_the_build_context_is_what_git_tracks_less_dockerignore(rehearse: Any):
    names = rehearse._context()
    assert {"Makefile", "requirements-cpu.txt", "megatron_mmr1/data/digits.py"} <= set(names)
    assert not [name for name in names if name.startswith((".git/", ".ci/", ".venv"))]
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for environment in (".venv", ".venv-te"):
        assert any(rehearse.is_ignored(f"{environment}/bin/python", line) for line in ignored)
    assert rehearse.is_ignored("data/digits/train.parquet", "data")  # at the top alone
    assert rehearse.is_ignored("a/b/__pycache__/c.pyc", "**/*.pyc")
    assert not rehearse.is_ignored("megatron_mmr1/data/digits.py", "data")
