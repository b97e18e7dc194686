"""Data: images, and sequences made of them by transformations. Knows nothing of models."""

from .sequences import PAPER, hue, make_sequence, rotation, scaling

__all__ = ["PAPER", "hue", "make_sequence", "rotation", "scaling"]
