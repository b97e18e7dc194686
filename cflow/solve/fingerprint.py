"""What a compiled program has in it of a field beside the tensors that it is given, so that it is used for no other."""

from __future__ import annotations

import functools
import types
from argparse import Namespace
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..potentials.field import VelocityField

MOST = 20_000  # things that are looked at, a solve
STORES = "_parameters", "_buffers", "_modules"


class TooMuch(Exception):
    """A field holds more than can be looked at in every solve."""


class Fingerprint:
    """Of objects, as something hashable: alike where a program of one computes what a program of the other does.

    Modules, containers, dataclasses, namespaces, functions and methods count by what they hold; numbers and strings by
    value. Tensors that a program is given count by their place among these; all others by identity and version, given
    ones too where something else than a module and its lists holds them, such as a function that has captured them:
    `twin` puts nothing in place of those. Anything else counts by identity: what it holds may change unseen, as
    contents of arrays and globals may.

    Attributes:
        kept: what counts by identity. Whoever keeps the fingerprint keeps these too, lest others take their places.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.places = {id(x): place for place, x in enumerate(given)}
        self.seen: dict[tuple[int, bool], tuple[int, object]] = {}
        self.count = 0
        self.kept: list[object] = []

    def of(self, x: Any, *, derived: bool = False, captured: bool = False) -> Hashable:
        """The fingerprint of x. Tensors that are `derived` from given ones count by shape; `captured` ones by identity.

        Raises:
            TooMuch: there is more than is looked at.
        """
        self.count += 1
        if self.count > MOST:
            raise TooMuch(f"it holds more than {MOST:,} things")
        if isinstance(x, float):
            return x.hex()  # 0.0 is not -0.0, and nan is nan
        if x is None or isinstance(x, int | str | torch.dtype | torch.device | type):
            return type(x), x
        if isinstance(x, Tensor):
            return self._of_tensor(x, derived, captured)
        if not isinstance(x, tuple):
            if (id(x), captured) in self.seen:  # it holds itself, or there are two ways to it
                return "seen", self.seen[id(x), captured][0]
            self.seen[id(x), captured] = len(self.seen), x
        return type(x), self._held(x, derived, captured)

    def _of_tensor(self, x: Tensor, derived: bool, captured: bool) -> Hashable:
        if id(x) in self.places and not captured:
            return "given", self.places[id(x)]
        if derived:
            return tuple(x.shape)
        self.kept.append(x)
        return id(x), 0 if x.is_inference() else x._version

    def _held(self, x: Any, derived: bool, captured: bool) -> Hashable:
        if isinstance(x, VelocityField):
            own = ((name, value) for name, value in vars(x).items() if name != "tensors")
            return tuple((name, self.of(value, derived=True)) for name, value in own)
        if isinstance(x, nn.Module):
            return tuple(self._of_attributes(x, captured))
        if isinstance(x, list | tuple):
            return tuple(self.of(item, derived=derived, captured=captured) for item in x)
        if isinstance(x, dict):
            return tuple((self.of(key), self.of(value, derived=derived, captured=captured)) for key, value in x.items())
        if isinstance(x, set | frozenset):
            return frozenset(self.of(item, captured=captured) for item in x)
        if isinstance(x, types.MethodType):
            return self.of(x.__func__, captured=captured), self.of(x.__self__, captured=captured)
        if isinstance(x, types.FunctionType):
            cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
            return self._itself(x.__code__), self.of([cells, x.__defaults__, x.__kwdefaults__], captured=True)
        if isinstance(x, functools.partial):
            return self.of([x.func, x.args, x.keywords], captured=True)
        if is_dataclass(x):
            return tuple((name, self.of(getattr(x, name), captured=True)) for name in x.__dataclass_fields__)
        if isinstance(x, types.SimpleNamespace | Namespace):
            return self.of(vars(x), captured=True)
        return self._itself(x)

    def _of_attributes(self, net: nn.Module, captured: bool) -> Iterator[Hashable]:
        """Of a module. In its stores and lists others are put in place of tensors that are given."""
        for name, value in vars(net).items():
            if isinstance(value, list):
                items = (self.of(item, captured=captured or not isinstance(item, Tensor)) for item in value)
                yield name, tuple(items)
            elif not isinstance(value, dict) or value:  # of hooks there are none mostly
                within = name in STORES or isinstance(value, types.MethodType)
                yield name, self.of(value, captured=captured or not within)

    def _itself(self, x: object) -> int:
        self.kept.append(x)
        return id(x)
