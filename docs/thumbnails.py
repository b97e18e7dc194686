"""Cut the thumbnails of the page of notebooks out of the pictures that the notebooks hold.

    python docs/thumbnails.py

A whole figure is too small to read at this size: each thumbnail is the part that says what its notebook is about.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
SIZE = (640, 360)  # twice what a column of the table shows
Box = tuple[float, float, float, float]

# notebook → which of its pictures, counted from 0, and left, top, right, bottom as parts of its width and height
PARTS: dict[str, tuple[int, Box]] = {
    "flow_factorised_digits": (4, (0.237, 0.027, 0.613, 0.179)),
    "flows_for_a_model_you_already_have": (2, (0.587, 0.484, 0.988, 0.836)),
    "more_than_a_gradient": (0, (0.272, 0.0, 0.732, 1.0)),
    "populations_in_motion": (1, (0.09, 0.075, 0.835, 0.9)),
    "potential_flow_2d": (0, (0.03, 0.22, 0.95, 0.93)),
    "solvers_and_gradients": (0, (0.552, 0.075, 0.905, 0.52)),
    "the_algebra_of_what_was_learned": (0, (0.5175, 0.281, 0.8955, 0.47)),
    "transformations_and_times": (2, (0.52, 0.377, 0.897, 0.621)),
    "without_labels": (0, (0.0, 0.065, 0.59, 0.95)),
    "your_own_model": (2, (0.56, 0.076, 0.886, 0.87)),
}


def pictures(notebook: Path) -> list[Image.Image]:
    """All PNG that a notebook has stored, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    stored = [output.get("data", {}).get("image/png") for cell in cells for output in cell.get("outputs", [])]
    return [Image.open(io.BytesIO(base64.b64decode("".join(png)))).convert("RGB") for png in stored if png]


def thumbnail(name: str) -> Image.Image:
    number, box = PARTS[name]
    picture = pictures(DOCS.parent / "examples" / f"{name}.ipynb")[number]
    left, top, right, bottom = (part * picture.size[i % 2] for i, part in enumerate(box))
    # what is missing at two sides for the shape of a thumbnail is white
    scale = min(SIZE[0] / (right - left), SIZE[1] / (bottom - top))
    size = round(scale * (right - left)), round(scale * (bottom - top))
    part = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    canvas = Image.new("RGB", SIZE, "white")
    canvas.paste(part, ((SIZE[0] - size[0]) // 2, (SIZE[1] - size[1]) // 2))
    return canvas


def main() -> None:
    for name in PARTS:
        thumbnail(name).quantize(256, dither=Image.Dither.NONE).save(DOCS / "thumbnails" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
