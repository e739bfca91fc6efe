"""What the forward pass keeps for the backward pass: estimates, not measured on a GPU.

Symbols: D hidden, F intermediate size, Q and K the widths of all query and of all key (or value)
heads; T tokens of a context-parallel rank, t tensor-parallel ranks, s = t with sequence
parallelism, else 1; b bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mmr1.config.schema import ParallelConfig


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Widths of one decoder layer, in elements."""

    hidden: int
    intermediate: int
    query: int
    key: int

    @classmethod
    def of(cls, text: Any) -> LayerSizes:
        """Read them off a dense decoder's Hugging Face config."""
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.hidden_size,
            text.intermediate_size,
            head * text.num_attention_heads,
            head * text.num_key_value_heads,
        )


def layer_bytes_a_token(sizes: LayerSizes, layout: ParallelConfig, element_bytes: int) -> float:
    """Return what one decoder layer keeps of a token, with fused attention and norms.

    Equation: b * ((2 D + 2 D) / s + (3 Q + 3 K + 5 F) / t): inputs and outputs of both norms;
    queries and keys after the rotary embedding, the projection of both and of values, of which the
    values are a view, attention's output; the MLP's gate and up projection (2), the gate's
    activation, the up projection again (Megatron adds an offset of 0 to it) and the product.
    """
    parts = layout.tp_size if layout.sequence_parallel else 1
    norms = 4 * sizes.hidden / parts
    cut = 3 * sizes.query + 3 * sizes.key + 5 * sizes.intermediate
    return element_bytes * (norms + cut / layout.tp_size)


def decoder_bytes(
    sizes: LayerSizes,
    layout: ParallelConfig,
    num_layers: int,
    max_tokens: int,
    stage: int,
    element_bytes: int,
) -> float:
    """Return what a stage's decoder layers keep at their fullest.

    Equation: micro-batches in flight times layers times a layer's; with full recomputation times a
    layer's input (b T D / s), and one layer whole. The stage has pp_size - stage micro-batches in
    flight; interleaved, more by the factor 1 + (pp_size - 1) / (pp_size vpp_size).

    Args:
        num_layers: of this stage.
        max_tokens: of a micro-batch, padding included.
        stage: from 0.
    """
    tokens = max_tokens / layout.cp_size
    layer = layer_bytes_a_token(sizes, layout, element_bytes) * tokens
    in_flight = float(layout.pp_size - stage)
    if layout.vpp_size > 1:
        in_flight *= 1 + (layout.pp_size - 1) / (layout.pp_size * layout.vpp_size)
    if layout.recompute == "full":
        parts = layout.tp_size if layout.sequence_parallel else 1
        return in_flight * num_layers * element_bytes * tokens * sizes.hidden / parts + layer
    return in_flight * num_layers * layer


def tower_bytes_a_patch(vision: Any, element_bytes: int) -> float:
    """Return what Qwen2.5-VL's vision tower keeps of a patch, all layers.

    Equation: depth * (b (9 D + 4 F) + 4 * 3 D), D and F the tower's own: so many tensors of these
    widths, the last three in float32. Counted, not derived: tests/test_activations.py holds it to
    what autograd keeps of a real layer on a CPU.
    """
    kept = element_bytes * (9 * vision.hidden_size + 4 * vision.intermediate_size)
    return vision.depth * (kept + 4 * 3 * vision.hidden_size)
