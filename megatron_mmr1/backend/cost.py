"""What a step costs in FLOPs: for the balance of ranks, and for model-FLOPs utilisation (MFU).

The only place where FLOPs are counted. Pure arithmetic on a Hugging Face config's sizes; imports
neither torch nor megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A linear layer's backward is two products of the forward's size: for its input, for its weight.
_PASSES_TRAINED = 3
_PASSES_FORWARD = 1


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs by the part of the model that they are spent in.

    Attributes:
        language: the decoder's linear layers.
        attention: the decoder's.
        head: the output layer.
        vision: the tower, its attention and merger among it.
    """

    language: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.language + self.head + self.attention + self.vision

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.language + other.language,
            self.attention + other.attention,
            self.head + other.head,
            self.vision + other.vision,
        )

    def times(self, factor: float) -> Flops:
        """Every part, so many times."""
        return Flops(
            self.language * factor,
            self.attention * factor,
            self.head * factor,
            self.vision * factor,
        )


@dataclass(frozen=True, slots=True)
class _Tower:
    """A vision tower's sizes, whatever its config calls them.

    Attributes:
        weights_a_patch: multiply-adds of its linear layers, a patch.
        num_full, num_windowed: layers.
    """

    weights_a_patch: int
    width: int
    num_full: int
    num_windowed: int
    window_patches: int

    @classmethod
    def of(cls, vision: Any) -> _Tower:
        # Everything up to the merger runs once a patch, the merger once in merge^2 patches.
        # Qwen2-VL's `hidden_size` is the decoder's, its own is `embed_dim`.
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        out = getattr(vision, "out_hidden_size", None) or vision.hidden_size
        merge = getattr(vision, "spatial_merge_size", 2)
        patch = vision.patch_size
        area = patch * patch if isinstance(patch, int) else patch[0] * patch[1]
        channels = getattr(vision, "in_channels", None) or vision.num_channels
        pixels = channels * getattr(vision, "temporal_patch_size", 1) * area
        # Only Qwen2.5-VL has windows, and a gated MLP.
        full = getattr(vision, "fullatt_block_indexes", None)
        block = 4 * width * width + (2 if full is None else 3) * width * inner
        merged = merge * merge * width
        num_mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        merger = num_mergers * merged * (merged + out) // (merge * merge)
        weights = pixels * width + depth * block + merger
        if full is None:
            return cls(weights, width, depth, 0, 1)
        # A window's side is a whole number of merged patches.
        side = vision.window_size // (merge * patch) * merge
        return cls(weights, width, len(full), depth - len(full), side * side)


@dataclass(frozen=True, slots=True)
class StepCost:
    """FLOPs that a sequence or an image adds to one training step, or to one forward pass.

    Equation, for a sequence of L tokens, R of them the response's, and images of n patches:

        sequence = text_token * L + output_token * R + text_pair * L (L + 1) / 2
        images   = sum_n  n * (patch + window_pair * min(n, window_patches) + full_pair * n)

    A product of [a, b] and [b, c] counts 2abc. Counted are the matrix products and the attention of
    the forward pass, and twice as much again for the backward pass, where there is one. Not
    counted: norms, activations, rotary embedding, softmax, an expert router, the optimizer, and
    whatever is computed twice (recomputed activations, flash attention's backward), as in the usual
    model-FLOPs utilisation. Only ratios matter to the balance.

    Attributes:
        text_token: of the decoder's linear layers, a token.
        output_token: of the output layer, a response token. Prompt tokens have no loss and no
            logits.
        text_pair: of attention, a (query, key) pair. The causal half, L (L + 1) / 2 pairs, is
            counted: what a fused kernel computes of a packed micro-batch, in which a sequence sees
            no other.
        patch: of the vision tower's linear layers (patch embedding, blocks, merger), a patch.
        window_pair: of the layers with window attention, a pair.
        full_pair: of the layers with full attention, a pair.
        window_patches: patches of a whole window.
    """

    text_token: float
    output_token: float
    text_pair: float
    patch: float
    window_pair: float
    full_pair: float
    window_patches: int

    @classmethod
    def of(cls, text_config: Any, vision_config: Any, trains_vision: bool) -> StepCost:
        """Read the sizes off a Hugging Face config.

        Args:
            text_config: of its decoder.
            vision_config: its `vision_config`; None for a text model.
            trains_vision: False if the tower is frozen: it lies before the decoder, so nothing
                needs its gradient and it costs its forward only.
        """
        vision_passes = _PASSES_TRAINED if trains_vision else _PASSES_FORWARD
        return cls._of(text_config, vision_config, _PASSES_TRAINED, vision_passes)

    @classmethod
    def of_forward(cls, text_config: Any, vision_config: Any) -> StepCost:
        """Return the cost of a pass that only computes log-probs; see `of`."""
        return cls._of(text_config, vision_config, _PASSES_FORWARD, _PASSES_FORWARD)

    @classmethod
    def _of(cls, text: Any, vision: Any, passes: int, vision_passes: int) -> StepCost:
        hidden, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or hidden // heads
        attention = 2 * hidden * heads * head + 2 * hidden * text.num_key_value_heads * head
        if getattr(text, "num_experts", None):
            mlp = text.num_experts_per_tok * text.moe_intermediate_size
        else:
            mlp = text.intermediate_size
        decoder = text.num_hidden_layers * (attention + 3 * hidden * mlp)
        tower = _Tower.of(vision) if vision is not None else _Tower(0, 0, 0, 0, 1)
        # A weight is one multiply-add a token, 2 FLOPs. A pair is two dot products (scores, values)
        # as wide as all heads together, 4 FLOPs a channel.
        return cls(
            text_token=2.0 * passes * decoder,
            output_token=2.0 * passes * hidden * text.vocab_size,
            text_pair=4.0 * passes * text.num_hidden_layers * heads * head,
            patch=2.0 * vision_passes * tower.weights_a_patch,
            window_pair=4.0 * vision_passes * tower.num_windowed * tower.width,
            full_pair=4.0 * vision_passes * tower.num_full * tower.width,
            window_patches=tower.window_patches,
        )

    def sequence(self, num_tokens: int, num_response_tokens: int) -> float:
        """FLOPs of a sequence in the decoder, its image tokens included but not their encoding.

        Args:
            num_tokens: prompt and response.
            num_response_tokens: those of the response.
        """
        return self.of_sequence(num_tokens, num_response_tokens).total

    def of_sequence(self, num_tokens: int, num_response_tokens: int) -> Flops:
        """Return `sequence` by parts."""
        return Flops(
            language=self.text_token * num_tokens,
            head=self.output_token * num_response_tokens,
            attention=self.text_pair * (num_tokens * (num_tokens + 1) / 2),
        )

    def images(self, num_patches_of_each: Sequence[int]) -> float:
        """FLOPs of encoding images once. Add it once for every time that they are encoded.

        Approximations, both upwards and together about 1% of a 7B model's tower at most: every
        window counts as whole, though those at an image's edge are smaller; and a trained patch
        embedding counts a gradient for the pixels, which nobody needs.

        Args:
            num_patches_of_each: patches (before merging) of each image; a video's frames count
                one by one, because attention stays within a frame.
        """
        return sum(
            n * (self.patch + self.window_pair * min(n, self.window_patches) + self.full_pair * n)
            for n in num_patches_of_each
        )
