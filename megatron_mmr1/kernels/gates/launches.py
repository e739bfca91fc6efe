"""What a call would launch, as Triton's just-in-time compiler sees it; recorded and not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from megatron_mmr1.kernels import triton_form

_KERNELS = (
    triton_form.gradient_kernel,
    triton_form.statistics_kernel,
    triton_form.sequence_kernel,
)
WARP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what it was called with."""

    kernel: Any
    arguments: dict[str, Any]  # by name
    options: dict[str, Any]  # of the launch, such as num_warps

    def with_arguments(self, **changes: Any) -> Launch:
        """Return the launch with other values of some arguments."""
        return replace(self, arguments={**self.arguments, **changes})

    def key(self, arch: int) -> str:
        """Return what Triton tells one compiled form of the kernel from another by."""
        _, _, specialization, options = self._bound(arch)
        return f"{self.kernel.fn.__qualname__} sm_{arch} {specialization} {options}"

    def compile(self, arch: int) -> CompiledKernel:
        """Compile for an architecture (90 = sm_90), as the launch would."""
        backend, bound, specialization, options = self._bound(arch)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=_target(arch), options=parsed.__dict__)

    def _bound(self, arch: int) -> tuple[Any, Any, Any, Any]:
        backend = make_backend(_target(arch))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        return backend, *bind(**self.arguments, **self.options)


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, WARP_SIZE)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches of the package's kernels in place of running them.

    Raises:
        ValueError: the kernels were imported for Triton's interpreter, which compiles nothing.
    """
    if not all(isinstance(kernel, JITFunction) for kernel in _KERNELS):
        raise ValueError("TRITON_INTERPRET=1 leaves no kernel to compile; unset it")
    launches: list[Launch] = []

    def recorder(kernel: Any) -> Any:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            arguments = dict(zip(kernel.arg_names, args, strict=False))
            arguments |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
            kwargs |= {
                "debug": False,
                "instrumentation_mode": knobs.compilation.instrumentation_mode,
            }
            launches.append(Launch(kernel, arguments, kwargs))

        return run

    for kernel in _KERNELS:
        kernel.run = recorder(kernel)
    try:
        yield launches
    finally:
        for kernel in _KERNELS:
            del kernel.run


@contextmanager
def pretended_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of a world whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
