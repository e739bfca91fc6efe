"""What one implementation computed of one batch, kept as safetensors, and how two of them differ.

Owns the measures of difference; the bounds are in bounds.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mmr1.parity.bounds import ROUNDING


@dataclass(frozen=True, slots=True)
class Outcome:
    """Log-probs of each sample [R], the loss, and every gradient by Hugging Face name.

    Attributes:
        old, ref: the frozen log-probs of each sample that the loss was given.
    """

    logprobs: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    old: list[Tensor]
    ref: list[Tensor]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"loss": self.loss}
        for name, values in (("logprobs", self.logprobs), ("old", self.old), ("ref", self.ref)):
            tensors |= {f"{name}/{index:04d}": value for index, value in enumerate(values)}
        tensors |= {f"gradient/{name}": value for name, value in self.gradients.items()}
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read what `save` wrote."""
        tensors = load_file(path)

        def listed(prefix: str) -> list[Tensor]:
            return [tensors[name] for name in sorted(tensors) if name.startswith(f"{prefix}/")]

        return cls(
            listed("logprobs"),
            tensors["loss"],
            {n.removeprefix("gradient/"): t for n, t in tensors.items() if "gradient/" in n},
            listed("old"),
            listed("ref"),
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one outcome is from another; what is not finite counts as infinitely far.

    Attributes:
        logprob: largest, in nats.
        loss: absolute.
        gradient: the worst tensor's, norm of the difference over norm.
        worst_gradient: that tensor's name.
    """

    logprob: float
    loss: float
    gradient: float
    worst_gradient: str


def difference(ours: Outcome, theirs: Outcome) -> Difference:
    """Compare two outcomes of the same samples.

    Raises:
        ValueError: they hold other samples or other gradients.
    """
    if [len(x) for x in ours.logprobs] != [len(x) for x in theirs.logprobs]:
        raise ValueError("the outcomes are of different samples")
    if ours.gradients.keys() != theirs.gradients.keys():
        missing = sorted(ours.gradients.keys() ^ theirs.gradients.keys())
        raise ValueError(f"only one of the outcomes has gradients of {', '.join(missing[:3])} ...")
    total = float(torch.stack([g.double().norm() for g in theirs.gradients.values()]).norm())
    gradients = {
        name: _relative(ours.gradients[name], theirs.gradients[name], total)
        for name in theirs.gradients
    }
    worst = max(gradients, key=lambda name: gradients[name])
    logprobs = torch.cat(ours.logprobs) - torch.cat(theirs.logprobs)
    return Difference(
        _number(logprobs.abs().max()),
        _number((ours.loss - theirs.loss).abs()),
        gradients[worst],
        worst,
    )


def mean_logprob_error(ours: Outcome, exact: Outcome) -> float:
    """Mean absolute difference of the log-probs, in nats."""
    return float((torch.cat(ours.logprobs) - torch.cat(exact.logprobs)).abs().mean())


def _relative(ours: Tensor, theirs: Tensor, total: float) -> float:
    """Norm of the difference over the norm; where there is nothing, anything is infinitely much.

    A gradient that is zero in theory is all rounding (of a bias of keys, which softmax does not
    see): it is held against the norm of all gradients, `total`.
    """
    norm = float(theirs.double().norm())
    error = (ours.double() - theirs.double()).norm()
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return _number(error / (norm if norm > ROUNDING * total else total))


def _number(value: Tensor) -> float:
    return float(value) if value.isfinite() else float("inf")
