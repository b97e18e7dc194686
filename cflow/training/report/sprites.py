"""Many small images as one, inside a page."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from einops import rearrange
from torch import Tensor

from ...plots.frames import as_frames
from ...plots.style import require

LEVELS = 31  # steps of a colour channel beside 0: a lossless file of them is a third of one of 255, and looks the same
WIDEST = 4096  # pixels; browsers take larger ones, not all of them on a phone


def sprite(images: Tensor) -> dict[str, Any]:
    """Images (N, C, H, W) in [0, 1] as one lossless WebP, row by row.

    Returns:
        src: the picture as a data URI; width, height: of an image, in pixels; columns: images a row. Image i is in
        column i % columns of row i // columns.

    Example:
        >>> import torch
        >>> found = sprite(torch.rand(5, 3, 8, 6))
        >>> found["width"], found["height"], found["columns"], found["src"][:22]
        (6, 8, 3, 'data:image/webp;base64')
    """
    require("PIL")
    from PIL import Image

    frames = as_frames(images, "images", 4)
    count, height, width = frames.shape[:3]
    columns = max(min(math.ceil(math.sqrt(count)), WIDEST // width), 1)
    coarse = np.rint(np.rint(frames * LEVELS) * (255 / LEVELS)).astype(np.uint8)
    whole = np.pad(coarse, [(0, -count % columns), (0, 0), (0, 0), (0, 0)])
    sheet = rearrange(whole, "(r c) h w d -> (r h) (c w) d", c=columns)
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, format="webp", lossless=True, quality=25, method=2)
    source = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"src": source, "width": width, "height": height, "columns": columns}
