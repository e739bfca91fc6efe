"""The kinds of batches, the layouts and the negative controls of the matrix, by name."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmr1.config.layout import replica_size
from megatron_mmr1.config.schema import ParallelConfig

# For each kind of batch, the (width, height) of the images of each prompt.
BATCH_KINDS: dict[str, list[list[tuple[int, int]]]] = {
    "text": [[], [], []],
    "one image": [[(56, 56)], [(140, 28)], [(28, 84)]],
    "several images": [[(84, 56), (28, 112)], [(56, 56), (56, 28), (28, 28)], [(112, 28)]],
    "mixed": [[(56, 56)], [], [(84, 56), (28, 112)], [], [(140, 28)]],
}
# Tokens of a micro-batch: small, so that every step has several, packed.
PACKED, WHOLE_STEP = 64, 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """One row of the table.

    Attributes:
        kinds: which batches (BATCH_KINDS); all of them when empty.
        model: the tiny model (parity/models.py).
        is_tied: with the model whose output layer is its embedding.
        in_ci: part of `make parity-ci`.
        is_own_model: a user's model, with weights that we know nothing of (see bounds.APART).
    """

    name: str
    parallel: ParallelConfig
    dp_size: int = 1
    max_tokens: int = PACKED
    kinds: tuple[str, ...] = ()
    dtype: str = "float32"
    model: str = "qwen2_5_vl"
    is_tied: bool = False
    freeze_vision: bool = False
    in_ci: bool = True
    is_own_model: bool = False

    @property
    def all_kinds(self) -> tuple[str, ...]:
        """The kinds of batches that it is checked with."""
        return self.kinds or tuple(BATCH_KINDS)

    @property
    def num_ranks(self) -> int:
        """Processes that it takes."""
        return replica_size(self.parallel) * self.dp_size


def _p(**sizes: object) -> ParallelConfig:
    return ParallelConfig(**sizes)  # type: ignore[arg-type]


_MIXED = ("mixed",)
_SP = {"tp_size": 2, "sequence_parallel": True}
_VPP = {"pp_size": 2, "vpp_size": 2}
LAYOUTS: tuple[Layout, ...] = (
    Layout("one process", _p()),
    Layout("one process, one micro-batch", _p(), max_tokens=WHOLE_STEP),
    Layout("one process, tied", _p(), kinds=_MIXED, is_tied=True),
    Layout("one process, frozen vision", _p(), kinds=_MIXED, freeze_vision=True),
    Layout("one process, full recompute", _p(recompute="full"), kinds=_MIXED),
    Layout("one process, selective recompute", _p(recompute="selective"), kinds=_MIXED),
    Layout("one process, bf16", _p(), kinds=_MIXED, dtype="bfloat16"),
    Layout("TP2", _p(tp_size=2)),
    Layout("TP2 + SP", _p(**_SP)),
    Layout("TP2 + SP, one micro-batch", _p(**_SP), max_tokens=WHOLE_STEP, in_ci=False),
    Layout("TP2 + SP, full recompute", _p(**_SP, recompute="full"), kinds=_MIXED),
    Layout("TP2 + SP, tied", _p(**_SP), kinds=_MIXED, is_tied=True),
    Layout("TP2 + SP, bf16", _p(**_SP), kinds=_MIXED, dtype="bfloat16"),
    Layout("PP2", _p(pp_size=2)),
    Layout("PP2, batched p2p", _p(pp_size=2, batch_p2p=True), kinds=_MIXED, in_ci=False),
    Layout("PP2, 1 + 3 layers", _p(pp_size=2, first_stage_layers=1), kinds=_MIXED),
    Layout("PP2, tied", _p(pp_size=2), kinds=_MIXED, is_tied=True),
    Layout("PP2, frozen vision", _p(pp_size=2), kinds=_MIXED, freeze_vision=True),
    Layout("PP2 x VPP2", _p(**_VPP)),
    Layout("PP2 x VPP2, tied", _p(**_VPP), kinds=_MIXED, is_tied=True),
    Layout("PP2 x VPP2, bf16", _p(**_VPP), kinds=_MIXED, dtype="bfloat16"),
    Layout("CP2", _p(cp_size=2)),
    Layout("CP2, one micro-batch", _p(cp_size=2), max_tokens=WHOLE_STEP, in_ci=False),
    Layout("CP2, selective recompute", _p(cp_size=2, recompute="selective"), kinds=_MIXED),
    Layout("CP2, bf16", _p(cp_size=2), kinds=_MIXED, dtype="bfloat16"),
    Layout("DP2", _p(), dp_size=2),
    Layout("DP2, tied", _p(), dp_size=2, kinds=_MIXED, is_tied=True, in_ci=False),
    Layout("TP2 x PP2", _p(tp_size=2, pp_size=2)),
    Layout("TP2 x PP2, one micro-batch", _p(tp_size=2, pp_size=2), max_tokens=WHOLE_STEP),
    Layout("TP2 x PP2, tied", _p(tp_size=2, pp_size=2), kinds=_MIXED, is_tied=True, in_ci=False),
    Layout("TP2 x CP2 + SP", _p(**_SP, cp_size=2)),
    Layout("TP2 x CP2 + SP, tied", _p(**_SP, cp_size=2), kinds=_MIXED, is_tied=True),
    Layout("TP2 x PP2 x VPP2 + SP", _p(**_SP, **_VPP), kinds=_MIXED),
    Layout("PP2 x CP2", _p(pp_size=2, cp_size=2)),
    Layout("PP2 x VPP2 x CP2", _p(**_VPP, cp_size=2), kinds=_MIXED, in_ci=False),
    Layout("PP2 x DP2", _p(pp_size=2), dp_size=2, kinds=_MIXED),
    Layout("CP2 x DP2", _p(cp_size=2), dp_size=2, kinds=_MIXED),
    Layout("TP2 x DP2 + SP", _p(**_SP), dp_size=2, kinds=_MIXED),
    Layout("TP4 (2 KV heads)", _p(tp_size=4)),
    Layout("TP4 (2 KV heads) + SP, tied", _p(tp_size=4, sequence_parallel=True), kinds=_MIXED,
           is_tied=True, in_ci=False),
    Layout("PP4", _p(pp_size=4), kinds=_MIXED, in_ci=False),
    Layout("CP4", _p(cp_size=4), kinds=_MIXED, in_ci=False),
    Layout("TP2 x PP2 x CP2 + SP", _p(**_SP, pp_size=2, cp_size=2), in_ci=False),
    Layout("TP2 x PP2 x DP2", _p(tp_size=2, pp_size=2), dp_size=2, kinds=_MIXED, in_ci=False),
)  # fmt: skip


_TEXT = ("text",)
# The other families: kinds of batches, and layouts beyond the four that each has.
_OTHERS: dict[str, tuple[tuple[str, ...], dict[str, ParallelConfig]]] = {
    "qwen2_vl": (_MIXED, {}),
    "qwen3_vl": (
        (*_TEXT, *_MIXED),
        {
            "TP2 + SP, full recompute": _p(**_SP, recompute="full"),
            "CP2": _p(cp_size=2),
            "TP4 (2 KV heads)": _p(tp_size=4),
        },
    ),
    "internvl_qwen2": (_MIXED, {"TP2 x CP2 + SP": _p(**_SP, cp_size=2)}),
    "internvl_llama": (_MIXED, {}),
    "qwen2": (_TEXT, {}),
    "qwen3": (_TEXT, {"TP4 (2 KV heads)": _p(tp_size=4)}),
    "qwen3_moe": (
        _TEXT,
        {
            "EP2": _p(ep_size=2),
            "EP2 x PP2": _p(ep_size=2, pp_size=2),
            "EP2 x TP2 + SP": _p(**_SP, ep_size=2),
        },
    ),
    "llama": (_TEXT, {}),
    "llama_sentencepiece": (_TEXT, {}),
    "mistral_sentencepiece": (_TEXT, {}),
}


def _other_families() -> tuple[Layout, ...]:
    """Each at one process, TP2, PP2 and TP2 x PP2, and at what its parts may get wrong.

    Tensor parallelism of experts needs sequence parallelism.
    """
    found = []
    for model, (kinds, more) in _OTHERS.items():
        tp = _SP if model == "qwen3_moe" else {"tp_size": 2}
        name = "TP2 + SP" if model == "qwen3_moe" else "TP2"
        layouts = {
            "one process": _p(),
            name: _p(**tp),
            "PP2": _p(pp_size=2),
            f"{name} x PP2": _p(**tp, pp_size=2),
            **more,
        }
        for layout_name, parallel in layouts.items():
            dp_size = 2 if parallel.ep_size > 1 and not parallel.sequence_parallel else 1
            in_ci = layout_name in ("one process", f"{name} x PP2") or layout_name in more
            found.append(
                Layout(
                    f"{model}: {layout_name}",
                    parallel,
                    dp_size,
                    kinds=kinds,
                    model=model,
                    in_ci=in_ci,
                )
            )
    return tuple(found)


LAYOUTS += _other_families()


@dataclass(frozen=True, slots=True)
class Control:
    """A deliberately wrong variant that the comparison must catch (see controls.py)."""

    name: str
    layout: Layout


CONTROLS: tuple[Control, ...] = (
    Control("text-only positions", Layout("one process", _p(), kinds=_MIXED)),
    Control("wrong QKV order", Layout("one process", _p(), kinds=_MIXED)),
    Control("unsliced rotary under CP", Layout("CP2", _p(cp_size=2), kinds=_MIXED)),
    Control(
        "batched p2p between two stages",
        Layout("PP2 x VPP2", _p(**_VPP, batch_p2p=True), kinds=_MIXED),
    ),
    Control("a dropped vision bucket", Layout("DP2", _p(), dp_size=2, kinds=_MIXED)),
    Control("a per-rank loss denominator", Layout("DP2", _p(), dp_size=2, kinds=_MIXED)),
    Control(
        "rotary axes in sections",
        Layout("qwen3_vl: one process", _p(), kinds=_MIXED, model="qwen3_vl"),
    ),
    Control(
        "no features after the first layers",
        Layout("qwen3_vl: one process", _p(), kinds=_MIXED, model="qwen3_vl"),
    ),
    Control(
        "another expert's weights",
        Layout("qwen3_moe: EP2", _p(ep_size=2), 2, kinds=_TEXT, model="qwen3_moe"),
    ),
)
