"""A model family: its table of rules, and the spellings of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mmr1.convert.rules import Rule

# Tables that older versions of transformers saved; they follow from config.json.
RECOMPUTED = re.compile(r"(.*\.)?rotary_(pos_)?emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Spelling:
    """Another way in which files name a family's tensors, as pairs of prefixes.

    Attributes:
        prefixes: (in the rules, in the files); the first that matches counts.
    """

    prefixes: tuple[tuple[str, str], ...] = ()

    def in_files(self, name: str) -> str:
        """Spell a rule's name as the files do."""
        return _replaced(name, self.prefixes)

    def in_rules(self, name: str) -> str:
        """Spell a file's name as the rules do; the inverse of `in_files`."""
        return _replaced(name, [(theirs, ours) for ours, theirs in self.prefixes])


@dataclass(frozen=True, slots=True)
class Family:
    """What conversion and the model need to know of a family beyond its sizes.

    Attributes:
        rules: cover every parameter.
        spellings: of its files, beside the rules' own. Model folders were written by different
            versions of transformers.
        interleaved_positions: rotary frequencies take time, height and width in turn, not in
            three sections (Qwen3-VL).
    """

    rules: tuple[Rule, ...]
    spellings: tuple[Spelling, ...] = ()
    interleaved_positions: bool = False

    def spelling_of(self, file_names: Iterable[str]) -> Spelling:
        """Return the spelling of a folder: the one in which most of its names are the rules'."""
        names = list(file_names)
        prefixes = {name.split("*")[0] for rule in self.rules for name in rule.hf}

        def num_known(spelling: Spelling) -> int:
            return sum(spelling.in_rules(n).startswith(tuple(prefixes)) for n in names)

        return max((Spelling(), *self.spellings), key=num_known)

    @property
    def has_qkv_bias(self) -> bool:
        """Say whether the attention's input projections have biases."""
        return self._has("self_attention.linear_qkv.bias")

    @property
    def has_qk_norm(self) -> bool:
        """Say whether queries and keys are normalised."""
        return self._has("self_attention.q_layernorm.weight")

    @property
    def vision_prefixes(self) -> tuple[str, ...]:
        """What the names of the vision tower's tensors start with."""
        tower = [rule for rule in self.rules if rule.megatron.startswith("vision.")]
        return tuple(name.split("*")[0] for rule in tower for name in rule.hf)

    def _has(self, ending: str) -> bool:
        return any(rule.megatron.endswith(ending) for rule in self.rules)


def _replaced(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for before, after in prefixes:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
