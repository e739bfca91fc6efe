"""What a parallel layout asks of a model, of the number of processes and of lengths.

Owns the checks of `parallel.*`; reads sizes from a model folder's config.json and imports nothing
heavy. Each check names the key, its value and values that fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mmr1.config.schema import ParallelConfig, PrecisionConfig

_FLOAT32 = PrecisionConfig()


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What of a model a layout must divide.

    Attributes:
        num_vision_heads: 0 without a vision tower.
        num_deepstack_layers: how many of the first layers take image features of their own.
        expert_size: an expert's intermediate size. Experts stand in place of every MLP, and tensor
            parallelism doesn't cut them.
    """

    num_heads: int
    num_kv_heads: int
    num_layers: int
    intermediate_size: int
    num_vision_heads: int
    num_experts: int
    num_deepstack_layers: int = 0
    expert_size: int = 0

    @classmethod
    def of(cls, folder: str | Path, key: str = "model.path") -> ModelSizes:
        """Read config.json, with its text settings nested (transformers 5) or flat (on the hub).

        Raises:
            ValueError: a size is missing.
        """
        path = Path(folder) / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{key}={str(folder)!r}: config.json is not JSON ({error}); copy it from the model"
            ) from error
        text = config.get("text_config") or config
        names = ("num_attention_heads", "num_hidden_layers", "intermediate_size")
        for name in names:
            if not isinstance(text.get(name), int):
                raise ValueError(
                    f"{key}={str(folder)!r}: config.json has no {name}; copy it from the model"
                )
        heads, layers, intermediate = (text[name] for name in names)
        vision = config.get("vision_config")
        vision_heads = 0
        if vision is not None:  # both families' default is 16
            vision_heads = vision.get("num_heads") or vision.get("num_attention_heads") or 16
        vision = vision or {}
        return cls(
            heads,
            text.get("num_key_value_heads") or heads,
            layers,
            intermediate,
            vision_heads,
            # On the hub, and as transformers 5 writes it.
            text.get("num_experts") or text.get("num_local_experts") or 0,
            len(vision.get("deepstack_visual_indexes") or ()),
            text.get("moe_intermediate_size") or 0,
        )


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Return what a packed sequence's tokens are padded to: CP cuts it into 2 * cp_size chunks."""
    return 2 * parallel.cp_size if parallel.cp_size > 1 else 1


def total_multiple(parallel: ParallelConfig, precision: PrecisionConfig = _FLOAT32) -> int:
    """Return what a micro-batch's tokens are padded to: SP cuts a rank's tokens again.

    In FP8 the tokens that a rank holds are a multiple of `fp8_tokens`.
    """
    sequence_parts = parallel.tp_size if parallel.sequence_parallel else 1
    tokens = fp8_tokens(precision) * parallel.cp_size  # even in FP8: CP's halves fit too
    return max(sequence_multiple(parallel), tokens) * sequence_parts


def fp8_tokens(precision: PrecisionConfig) -> int:
    """Return what the tokens that a rank holds must be a multiple of; 1 without FP8.

    They are a side of a matrix in every product, and the summed one in the weights' gradients:
    16 is what the hardware asks for. Blockwise scaling has blocks of 128 tokens there. Parts of
    blocks are allowed, but with sequence parallelism Transformer Engine then gathers activations in
    bfloat16.
    """
    if precision.fp8 == "off":
        return 1
    return 128 if precision.recipe == "blockwise" else 16


def replica_size(parallel: ParallelConfig) -> int:
    """Return how many processes hold one copy of the model."""
    return parallel.tp_size * parallel.pp_size * parallel.cp_size


def check_layout(parallel: ParallelConfig, sizes: ModelSizes, world_size: int) -> None:
    """Refuse a layout that the model or the number of processes doesn't fit.

    Raises:
        ValueError: names the key, its value and values that fit.
    """
    for name in ("tp_size", "pp_size", "vpp_size", "cp_size", "ep_size"):
        value = getattr(parallel, name)
        if value < 1:
            raise ValueError(f"parallel.{name}={value} is too small; use 1 or more")
    if parallel.recompute not in ("none", "selective", "full"):
        raise ValueError(
            f"parallel.recompute={parallel.recompute!r} is unknown; use none or selective or full"
        )
    _check_tensor_parallel(parallel, sizes)
    _check_pipeline(parallel, sizes.num_layers)
    _check_deepstack(parallel, sizes)
    replica = replica_size(parallel)
    if world_size % replica:
        raise ValueError(
            f"parallel.tp_size={parallel.tp_size} * pp_size={parallel.pp_size} * "
            f"cp_size={parallel.cp_size} = {replica} processes hold one copy of the model, and "
            f"{world_size} are running; start a multiple of {replica} with "
            f"`torchrun --nproc-per-node {replica}`, or lower a size"
        )
    _check_experts(parallel, sizes, world_size)


def check_max_tokens(
    parallel: ParallelConfig,
    max_tokens: int,
    longest: int,
    why: str,
    precision: PrecisionConfig = _FLOAT32,
) -> None:
    """Refuse a `max_tokens_per_microbatch` that doesn't divide or that a sample doesn't fit.

    Args:
        longest: tokens of the longest sample that may come.
        why: what makes it so long, for the message.

    Raises:
        ValueError: names the value and one that fits.
    """
    unit = total_multiple(parallel, precision)
    fits = -(-longest // unit) * unit
    if max_tokens < 1 or max_tokens % unit:
        nearest = max(max_tokens // unit * unit, fits)
        raise ValueError(
            f"max_tokens_per_microbatch={max_tokens} does not divide over parallel.cp_size="
            f"{parallel.cp_size} (in 2 * cp_size chunks) and tp_size={parallel.tp_size} (with "
            f"sequence_parallel={parallel.sequence_parallel}), precision.fp8={precision.fp8} with "
            f"recipe={precision.recipe}; use a multiple of {unit}, as {nearest}"
        )
    if max_tokens < fits:
        raise ValueError(
            f"max_tokens_per_microbatch={max_tokens} has no room for {longest} tokens ({why}); "
            f"use {fits} or more"
        )


def _check_tensor_parallel(parallel: ParallelConfig, sizes: ModelSizes) -> None:
    tp_size = parallel.tp_size
    fitting = [size for size in range(1, sizes.num_heads + 1) if _fits_tensor_parallel(size, sizes)]
    if tp_size not in fitting:
        raise ValueError(
            f"parallel.tp_size={tp_size} does not divide the model (num_attention_heads="
            f"{sizes.num_heads}, num_key_value_heads={sizes.num_kv_heads}, intermediate_size="
            f"{sizes.intermediate_size}); use {_listed(fitting)}"
        )
    if parallel.sequence_parallel and tp_size == 1:
        raise ValueError(
            "parallel.sequence_parallel=True cuts tokens over tensor-parallel ranks, and "
            "parallel.tp_size=1; use sequence_parallel=false, or tp_size=2 or more"
        )


def _fits_tensor_parallel(tp_size: int, sizes: ModelSizes) -> bool:
    """Megatron gives a rank several key/value heads, or several ranks one."""
    kv_heads = sizes.num_kv_heads
    return (
        sizes.num_heads % tp_size == 0
        and (sizes.num_experts > 0 or sizes.intermediate_size % tp_size == 0)
        and (kv_heads % tp_size == 0 or tp_size % kv_heads == 0)
    )


def _check_experts(parallel: ParallelConfig, sizes: ModelSizes, world_size: int) -> None:
    ep_size, experts = parallel.ep_size, sizes.num_experts
    if experts == 0:
        if ep_size > 1:
            raise ValueError(
                f"parallel.ep_size={ep_size} shares out experts, and this model has none; use 1"
            )
        return
    if parallel.tp_size > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.tp_size={parallel.tp_size} with sequence_parallel=False: tensor-parallel "
            "ranks would send the same tokens to the experts; use sequence_parallel=true"
        )
    ranks = world_size // parallel.pp_size
    fitting = [n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0]
    if ep_size not in fitting:
        raise ValueError(
            f"parallel.ep_size={ep_size} does not divide num_experts={experts} and the {ranks} "
            f"processes of a pipeline stage; use {_listed(fitting)}"
        )


def _check_deepstack(parallel: ParallelConfig, sizes: ModelSizes) -> None:
    chunks = parallel.pp_size * parallel.vpp_size
    first = parallel.first_stage_layers
    held = sizes.num_layers // chunks if first is None else first // parallel.vpp_size
    if chunks > 1 and held < sizes.num_deepstack_layers:
        raise ValueError(
            f"parallel.pp_size={parallel.pp_size} with vpp_size={parallel.vpp_size}: the first "
            f"stage holds {held} layers, and the first {sizes.num_deepstack_layers} take image "
            "features, which are there only; lower pp_size or vpp_size, or set "
            f"parallel.first_stage_layers={sizes.num_deepstack_layers * parallel.vpp_size} or more"
        )


def _check_pipeline(parallel: ParallelConfig, num_layers: int) -> None:
    pp_size, vpp_size, first = parallel.pp_size, parallel.vpp_size, parallel.first_stage_layers
    if pp_size == 1:
        for name, value, off in (("vpp_size", vpp_size, 1), ("first_stage_layers", first, None)):
            if value != off:
                raise ValueError(
                    f"parallel.{name}={value} needs a pipeline, and parallel.pp_size=1; use "
                    f"{'null' if off is None else off}, or pp_size=2 or more"
                )
        return
    if pp_size == 2 and vpp_size > 1 and parallel.batch_p2p:
        raise ValueError(
            f"parallel.batch_p2p=True with pp_size=2 and vpp_size={vpp_size}: each stage is the "
            "other's both neighbours, and batched messages of the two directions are taken for one "
            "another (gradients are then silently wrong); use batch_p2p=false"
        )
    if first is None:
        if num_layers % (pp_size * vpp_size):
            fitting = [n for n in range(1, num_layers + 1) if num_layers % (n * vpp_size) == 0]
            remedy = f"use {_listed(fitting)}" if fitting else "lower parallel.vpp_size"
            if vpp_size == 1:
                remedy += ", or set parallel.first_stage_layers"
            raise ValueError(
                f"parallel.pp_size={pp_size} with vpp_size={vpp_size} does not divide "
                f"num_hidden_layers={num_layers}; {remedy}"
            )
        return
    fitting = [
        n
        for n in range(1, num_layers - pp_size + 2)
        if n % vpp_size == 0 and (num_layers - n) % ((pp_size - 1) * vpp_size) == 0
    ]
    if first not in fitting:
        use = f"use {_listed(fitting)}" if fitting else "use another parallel.pp_size"
        raise ValueError(
            f"parallel.first_stage_layers={first} leaves {num_layers - first} of num_hidden_layers="
            f"{num_layers} for {pp_size - 1} other stages with vpp_size={vpp_size}; {use}"
        )


def _listed(values: list[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
