"""Multimodal rotary positions (time, height, width) of Qwen-VL (arXiv:2502.13923, 2.1.2).

A pure function of the tokens and the image sizes, computed once a prompt and shipped with it.
Images only: no video. S is the sequence length, I the number of images.
"""

from __future__ import annotations

import torch


def mrope_positions(
    token_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    image_token_id: int,
    spatial_merge_size: int,
) -> torch.Tensor:
    """Positions of text and image tokens, equal to Hugging Face's `get_rope_index`.

    Text tokens count up by one, alike on all three axes. An image's tokens share one start; on each
    axis they add their index in the merged grid. What follows starts at the image's start plus the
    larger of its merged height and width. Text that is appended to the sequence later (a response)
    continues from the last position plus one.

    Args:
        token_ids: int64 [S], image placeholders expanded to one token for each merged patch.
        image_grid_thw: int64 [I, 3], patches along (time, height, width), or None without images.
        image_token_id: the placeholder's id.
        spatial_merge_size: patches merged into a token along height, and along width.

    Returns:
        int64 [3, S].

    Raises:
        ValueError: the placeholders are not exactly those of the images.
    """
    placeholders = (token_ids == image_token_id).nonzero().flatten().tolist()
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    sizes = [(t, h // spatial_merge_size, w // spatial_merge_size) for t, h, w in grids]
    num_expected = sum(t * h * w for t, h, w in sizes)
    if len(placeholders) != num_expected:
        raise ValueError(
            f"{len(placeholders)} image tokens, but the images need {num_expected}; expand each "
            "image's placeholder to one token for each merged patch"
        )
    segments, end, start_position, used = [], 0, 0, 0
    for t, h, w in sizes:
        begin = placeholders[used]
        segments.append(_text_positions(start_position, begin - end))
        start_position += begin - end
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        segments.append(torch.stack(axes).reshape(3, -1) + start_position)
        start_position += max(h, w)
        used += t * h * w
        end = begin + t * h * w
        if placeholders[used - 1] != end - 1:
            raise ValueError(f"the {t * h * w} tokens of an image are not contiguous")
    segments.append(_text_positions(start_position, len(token_ids) - end))
    return torch.cat(segments, dim=1)


def _text_positions(start: int, length: int) -> torch.Tensor:
    return torch.arange(start, start + length).expand(3, length)
