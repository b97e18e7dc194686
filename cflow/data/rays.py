"""Rays in NumPy: where they begin, what they hit first, and which way that faces. z is the height above the floor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Hit = tuple[Floats, Floats]  # distances (N,), infinite where a ray goes past, and normals (N, 3)


class Rays(NamedTuple):
    """Where rays begin, and their directions of length 1, both (N, 3)."""

    origin: Floats
    direction: Floats

    def at(self, distance: Floats) -> Floats:
        """Points (N, 3) at distances (N,)."""
        with np.errstate(invalid="ignore"):
            return self.origin + distance[:, None] * self.direction

    def seen_from(self, *place: float) -> Rays:
        """The same rays, with another origin of the coordinates."""
        return Rays(self.origin - np.array(place, np.float32), self.direction)


class Thing(NamedTuple):
    """A thing that stands on the floor.

    Attributes:
        shape: cube, cylinder, sphere or capsule.
        scale: how large it is; a cube of 1 has edges of 1.6.
        place: its middle on the floor (x, y), and how far it is lifted above it.
    """

    shape: str
    scale: float
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)


def unit(vector: npt.ArrayLike) -> Floats:
    """A vector of the same direction and length 1."""
    long = np.array(vector, np.float64)
    return (long / np.linalg.norm(long)).astype(np.float32)


def camera(eye: npt.ArrayLike, target: npt.ArrayLike, pixels: int, half_angle: float) -> Rays:
    """One ray through the middle of every pixel, row by row.

    Arguments:
        eye: where the camera is.
        target: what it looks at.
        pixels: H and W.
        half_angle: between the middle and the edge of the picture, in degrees.
    """
    forward = unit(np.subtract(target, eye))
    right = unit(np.cross(forward, [0.0, 0.0, 1.0]))
    up = np.cross(right, forward)
    place = (((np.arange(pixels) + 0.5) / pixels * 2 - 1) * np.tan(np.deg2rad(half_angle))).astype(np.float32)
    direction = forward + place[None, :, None] * right - place[:, None, None] * up
    direction = (direction / np.linalg.norm(direction, axis=-1, keepdims=True)).reshape(-1, 3)
    return Rays(np.broadcast_to(np.array(eye, np.float32), direction.shape), direction)


def hit(rays: Rays, thing: Thing) -> Hit:
    """Where rays hit a thing first."""
    shape, scale = thing.shape, thing.scale
    rays = rays.seen_from(*thing.place)
    if shape == "cube":
        return hit_box(rays, 0.8 * scale)
    if shape == "sphere":
        return hit_ball(rays, 0.95 * scale, 0.95 * scale)
    if shape == "cylinder":
        radius, height = 0.75 * scale, 1.7 * scale
        return nearest(hit_side(rays, radius, 0, height), hit_disc(rays, radius, height))
    radius, height = 0.6 * scale, 2.1 * scale
    low, high = radius, height - radius
    ends = nearest(hit_ball(rays, radius, low), hit_ball(rays, radius, high))
    return nearest(hit_side(rays, radius, low, high), ends)


def hit_floor(rays: Rays) -> Hit:
    """Where rays hit the floor from above."""
    down = rays.direction[:, 2]
    distance = np.where(down < 0, -rays.origin[:, 2] / np.minimum(down, np.float32(-1e-6)), np.float32(np.inf))
    return distance, np.broadcast_to(np.array([0, 0, 1], np.float32), rays.origin.shape)


def hit_walls(rays: Rays, half: float) -> Hit:
    """The four upright walls of a room of this half width, from within."""
    with np.errstate(divide="ignore"):
        far = (np.sign(rays.direction) * np.float32(half) - rays.origin)[:, :2] / rays.direction[:, :2]
    axis = far.argmin(1)
    normal = np.zeros_like(rays.direction)
    rows = np.arange(len(axis))
    normal[rows, axis] = -np.sign(rays.direction[rows, axis])
    return far[rows, axis], normal


def first(*hits: Hit) -> tuple[npt.NDArray[np.intp], Floats, Floats]:
    """Which of several things rays hit first (N,), as many as there are for none; distances (N,), normals (N, 3)."""
    distances = np.stack([distance for distance, _ in hits])
    which, rows = distances.argmin(0), np.arange(distances.shape[1])
    distance = distances[which, rows]
    return np.where(np.isfinite(distance), which, len(hits)), distance, np.stack([n for _, n in hits])[which, rows]


def nearest(one: Hit, other: Hit) -> Hit:
    """Of two things that rays may hit, the one that they hit first."""
    first = one[0] <= other[0]
    return np.where(first, one[0], other[0]), np.where(first[:, None], one[1], other[1])


def hit_box(rays: Rays, half: float) -> Hit:
    """A cube that stands on the floor, by slabs."""
    centre = np.array([0, 0, half], np.float32)
    direction = np.where(np.abs(rays.direction) < 1e-6, np.float32(1e-6), rays.direction)
    before = (-np.sign(direction) * np.float32(half) + centre - rays.origin) / direction
    behind = (np.sign(direction) * np.float32(half) + centre - rays.origin) / direction
    axis, enter = before.argmax(1), before.max(1)
    distance = np.where((enter < behind.min(1)) & (enter > 0), enter, np.float32(np.inf))
    normal, rows = np.zeros_like(direction), np.arange(len(axis))
    normal[rows, axis] = -np.sign(direction[rows, axis])
    return distance, normal


def hit_ball(rays: Rays, radius: float, height: float) -> Hit:
    """A ball whose centre is at a height."""
    away = rays.origin - np.array([0, 0, height], np.float32)
    distance = first_root(np.ones(1, np.float32), (away * rays.direction).sum(1), (away**2).sum(1) - radius**2)
    with np.errstate(invalid="ignore"):
        return distance, (away + distance[:, None] * rays.direction) * np.float32(1 / radius)


def hit_side(rays: Rays, radius: float, low: float, high: float) -> Hit:
    """The side of an upright cylinder."""
    d, o = rays.direction[:, :2], rays.origin[:, :2]
    distance = first_root((d**2).sum(1) + np.float32(1e-9), (o * d).sum(1), (o**2).sum(1) - radius**2)
    with np.errstate(invalid="ignore"):
        at = rays.at(distance)
        missed = ~((at[:, 2] >= low) & (at[:, 2] <= high))
    at[:, 2] = 0
    return np.where(missed, np.float32(np.inf), distance), at * np.float32(1 / radius)


def hit_disc(rays: Rays, radius: float, height: float) -> Hit:
    """The top of an upright cylinder."""
    slope = np.where(np.abs(rays.direction[:, 2]) < 1e-6, np.float32(1e-6), rays.direction[:, 2])
    distance = np.asarray((np.float32(height) - rays.origin[:, 2]) / slope, np.float32)
    at = rays.at(distance)
    found = (distance > 0) & ((at[:, :2] ** 2).sum(1) <= radius**2)
    return np.where(found, distance, np.float32(np.inf)), np.broadcast_to(np.array([0, 0, 1], np.float32), at.shape)


def first_root(a: Floats, b: Floats, c: Floats) -> Floats:
    """The smaller root x > 0 of a x² + 2 b x + c, infinite where there is none."""
    inside = b**2 - a * c
    root = (-b - np.sqrt(inside.clip(0))) / a
    return np.where((inside > 0) & (root > 0), root, np.float32(np.inf))
