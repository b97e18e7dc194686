"""A matplotlib Figure that shows itself in a notebook. Imported where a picture is drawn: it loads matplotlib."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A Figure made without pyplot, which a notebook would otherwise print as ``<Figure size …>``."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()
