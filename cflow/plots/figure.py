"""A matplotlib Figure that shows itself in a notebook. Imported where a picture is drawn: it loads matplotlib."""

import io

from matplotlib.figure import Figure

SHARPNESS = 2  # pixels stored for each that is shown, for screens that have them


class ShownFigure(Figure):
    """A Figure made without pyplot, which a notebook would otherwise print as ``<Figure size …>``."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight", dpi=SHARPNESS * self.dpi)
        png = buffer.getvalue()
        # the header of a PNG has its width and height at these bytes
        width, height = (int.from_bytes(png[at : at + 4], "big") // SHARPNESS for at in (16, 20))
        return png, {"width": width, "height": height}
