"""The import directions of the design, by an AST walk over the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = "megatron_mmr1"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

EVERYTHING = {"*"}
BASE = {"types", "config"}
# A room, or a module beside the rooms, and what it may import besides itself.
ARROWS = {
    "types": set(),
    "config": set(),
    "device": set(),
    "launch": BASE,
    "kernels": BASE,
    "algorithms": BASE,
    "data": BASE,
    "sampling": BASE,
    "rewards": BASE,
    "convert": BASE,
    "rollout": BASE | {"data"},
    # backend makes its process group of the processes that launch/rendezvous.py has met.
    "backend": BASE | {"algorithms", "convert", "device", "kernels", "launch"},
    "weight_sync": {"types"},
    "evaluation": BASE | {"data", "rollout", "rewards"},
    "observability": BASE,
    "inspection": BASE | {"data", "evaluation", "observability"},
    "planning": BASE | {"backend", "kernels"},  # counts on the real model, and its chunk sizes
    "parity": BASE | {"algorithms", "backend", "convert", "data", "device", "kernels"},
    "trainers": EVERYTHING,
    "bakeoff": EVERYTHING,
    "throughput": EVERYTHING,  # measures whole steps
    "cli": {"config"},
    "train": EVERYTHING,
    "sft": EVERYTHING,
    "evaluate": EVERYTHING,
    "report": {"observability"},
}
# A library and the only room that may import it.
OWNERS = {"megatron": "backend", "vllm": "rollout", "triton": "kernels", "hydra": "cli"}


def imported_names(source: str, module: str) -> list[str]:
    """Dotted names that `module` imports, anywhere in it; `from a import b` gives a and a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def violations(source: str, module: str) -> list[str]:
    """Every import of `module` (as "megatron_mmr1.data.loader") that breaks a direction."""
    room = module.partition(".")[2].partition(".")[0]
    if room and room not in ARROWS:
        return [f"{module}: the room {room!r} is not in ARROWS; say what it may import"]
    allowed = ARROWS.get(room, set())
    found = []
    for name in imported_names(source, module):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top in OWNERS and room != OWNERS[top]:
            found.append(f"{module} imports {name}; only {OWNERS[top]} may")
        if name == "megatron.training" or name.startswith("megatron.training."):
            found.append(f"{module} imports {name}; nothing may")
        if room == "config" and top == "torch":
            found.append(f"{module} imports {name}; config may not")
        is_other_room = top == PACKAGE and target in ARROWS and target != room
        if is_other_room and allowed != EVERYTHING and target not in allowed:
            found.append(f"{module} imports {name}; {room or 'the package'} may not")
    return sorted(set(found))


def all_modules() -> dict[str, Path]:
    """Every module of the package; a package goes by its __init__, so relative imports resolve."""
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path
        for path in ROOT.rglob("*.py")
    }


def test_every_import_follows_the_arrows():
    modules = all_modules()
    assert f"{PACKAGE}.backend.policy" in modules  # the walk saw the package
    found = []
    for module, path in modules.items():
        name = PACKAGE if module == f"{PACKAGE}.__init__" else module
        found += violations(path.read_text(encoding="utf-8"), name)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.loader", "import vllm"),
        ("data.loader", "def f():\n    from megatron.core import parallel_state"),
        ("backend.model", "from megatron import training"),
        ("backend.model", "import megatron.training.arguments"),
        ("backend.model", "from megatron_mmr1.rollout.engine import Sampling"),
        ("algorithms.grpo_loss", "import triton.language as tl"),
        ("trainers.grpo", "from hydra import compose"),
        ("config.schema", "import torch"),
        ("sampling.vas", "from megatron_mmr1 import data"),
        ("sampling.vas", "from ..data import loader"),
        ("weight_sync.sync", "import megatron_mmr1.backend.policy"),
        ("newroom.thing", "x = 1"),
    ],
)
def test_a_forbidden_import_is_reported(module: str, source: str):
    assert violations(source, f"{PACKAGE}.{module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "backend.model",
            "from megatron.core import parallel_state\nfrom megatron_mmr1 import device",
        ),
        ("sampling.vas", "from . import base\nfrom megatron_mmr1 import __version__"),
        ("trainers.grpo", "from megatron_mmr1.rollout import engine"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str):
    assert violations(source, f"{PACKAGE}.{module}") == []
