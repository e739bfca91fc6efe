"""The GPU benchmark at tiny sizes on a CPU: python benchmark_cases.py OUT, with TRITON_INTERPRET=1.

The routine is the real one, checks included; the timer calls a way twice and says 1 ms.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import benchmark_kernels as benchmark

# V / TP not a multiple of a kernel's block; a TP size with the group's collective, and one without.
SIZES = benchmark.Sizes(tokens=32, vocab=96, hidden=16, tp_sizes=(1, 2))
CPU = torch.device("cpu")


def main(out: Path) -> None:
    check_controls()
    benchmark.run(SIZES, CPU, _called_twice, out)


def _called_twice(restore: Callable[[], Any], compute: Callable[[], Any]) -> float:
    for _ in range(2):
        restore()
        compute()
    return 1.0


def check_controls() -> None:
    """Every check takes torch's result and refuses it when it is 5% off, or of other inputs."""
    case, other = (benchmark.make_case(SIZES, 1, CPU, seed) for seed in (0, 1))
    for make in (
        benchmark.logprobs_task,
        benchmark.gradient_task,
        benchmark.sequence_loss_task,
        benchmark.head_task,
    ):
        task, ways = make(case)
        found = _result(ways)
        task.check(found)
        for wrong in (_scaled(found, 1.05), _result(make(other)[1])):
            try:
                task.check(wrong)
            except AssertionError:
                continue
            raise RuntimeError(f"{task.name}: a wrong result passed")


def _result(ways: dict[str, benchmark.Way]) -> Any:
    restore, compute = ways["torch"]
    restore()
    return compute()


def _scaled(found: Any, factor: float) -> Any:
    return found * factor if isinstance(found, Tensor) else tuple(x * factor for x in found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    assert not dist.is_initialized()
