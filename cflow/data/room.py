"""A renderer of scenes as in 3D Shapes: an object in a room, by one ray for each point of every pixel, in NumPy.

Colours are linear in what a ray hits: the picture of one geometry (scale, shape, orientation) is made once, as how
bright the floor, the walls and the object are in every pixel, and then painted in all hues.
"""

from __future__ import annotations

import colorsys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SHAPES = ("cube", "cylinder", "sphere", "capsule")
ROOM, WALL = 5.0, 4.2  # half the width of the room, and the height of its walls
LIGHT = np.array([0.35, -0.5, 0.8], np.float32) / np.float32(np.sqrt(0.35**2 + 0.5**2 + 0.8**2))
SKY = (0.75, 0.85, 0.92)


class Camera(NamedTuple):
    """Where rays begin, and their directions of length 1, both (N, 3)."""

    origin: Floats
    direction: Floats


def paint(geometry: Floats, hues: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """One geometry in many hues.

    Arguments:
        geometry: what `room` has made, (4, H, W).
        hues: of the floor, the walls and the object, (N, 3), in turns.

    Returns:
        Images (N, H, W, 3), uint8.
    """
    colours = np.array([[colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in row] for row in hues], np.float32)
    size = geometry.shape[1:]
    lit = np.matmul(geometry[:3].reshape(3, -1).T, colours).reshape(len(hues), *size, 3)
    lit += geometry[3, ..., None]
    images: npt.NDArray[np.uint8] = (255 * lit.clip(0, 1) + 0.5).astype(np.uint8)
    return images


def room(scale: float, shape: str, orientation: float, pixels: int = 64, points: int = 3) -> Floats:
    """How bright the floor, the walls and the object are in every pixel, and what is white or grey, (4, H, W).

    Arguments:
        scale: size of the object.
        shape: one of `SHAPES`.
        orientation: of the camera about the object, in degrees.
        pixels: H and W.
        points: rays a pixel, along either side.
    """
    rays = look(orientation, pixels * points)
    near = np.full(len(rays.direction), np.inf, np.float32)
    bright = np.zeros((4, len(near)), np.float32)
    bright[3] = np.mean(SKY)
    distance, normal = hit_walls(rays)
    at = rays.origin + distance[:, None] * rays.direction
    wall = at[:, 2] < WALL
    bright[:, wall] = 0
    bright[1, wall] = (0.35 + 0.9 * np.abs(normal @ LIGHT))[wall]
    near[wall] = distance[wall]
    down = -rays.origin[:, 2] / np.minimum(rays.direction[:, 2], -1e-6)
    floor = (down > 0) & (down < near) & (rays.direction[:, 2] < 0)
    spot = rays.origin[floor] + down[floor, None] * rays.direction[floor]
    dark = np.isfinite(hit(Camera(spot + 1e-3 * LIGHT, np.broadcast_to(LIGHT, spot.shape)), shape, scale)[0])
    bright[:, floor] = 0
    bright[0, floor] = np.where(dark, 0.5, 0.85)
    near[floor] = down[floor]
    distance, normal = hit(rays, shape, scale)
    seen = distance < near
    diffuse = (normal[seen] @ LIGHT).clip(0)
    half = LIGHT - rays.direction[seen]
    shine = ((normal[seen] * half).sum(1) / np.linalg.norm(half, axis=1)).clip(0) ** 40
    bright[:, seen] = 0
    bright[2, seen] = 0.35 + 0.6 * diffuse
    bright[3, seen] = 0.3 * shine
    averaged: Floats = bright.reshape(4, pixels, points, pixels, points).mean((2, 4))
    return averaged


def look(orientation: float, size: int) -> Camera:
    """The rays of a camera that looks at the object from a corner of the room, row by row."""
    angle = np.deg2rad(orientation + 45)
    eye = np.array([4.4 * np.cos(angle), -4.4 * np.sin(angle), 2.7])
    forward = np.array([0.0, 0.0, 1.05]) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    place = ((np.arange(size) + 0.5) / size * 2 - 1) * np.tan(np.deg2rad(23))
    direction = forward + place[None, :, None] * right - place[:, None, None] * up
    direction = (direction / np.linalg.norm(direction, axis=-1, keepdims=True)).reshape(-1, 3).astype(np.float32)
    return Camera(np.broadcast_to(eye.astype(np.float32), direction.shape), direction)


def hit_walls(rays: Camera) -> tuple[Floats, Floats]:
    """Distances (N,) to the walls from within the room, and their normals (N, 3), which point inwards."""
    with np.errstate(divide="ignore"):
        far = (np.sign(rays.direction) * np.float32(ROOM) - rays.origin)[:, :2] / rays.direction[:, :2]
    axis = far.argmin(1)
    normal = np.zeros_like(rays.direction)
    rows = np.arange(len(axis))
    normal[rows, axis] = -np.sign(rays.direction[rows, axis])
    return far[rows, axis], normal


def hit(rays: Camera, shape: str, scale: float) -> tuple[Floats, Floats]:
    """Distances (N,) to an object that stands in the middle of the floor, infinite past it, and its normals (N, 3)."""
    if shape == "cube":
        return hit_box(rays, 0.8 * scale)
    if shape == "sphere":
        return hit_ball(rays, 0.95 * scale, 0.95 * scale)
    radius, height = (0.75 * scale, 1.7 * scale) if shape == "cylinder" else (0.6 * scale, 2.1 * scale)
    if shape == "cylinder":
        return nearest(hit_side(rays, radius, 0, height), hit_disc(rays, radius, height))
    low, high = radius, height - radius
    ends = nearest(hit_ball(rays, radius, low), hit_ball(rays, radius, high))
    return nearest(hit_side(rays, radius, low, high), ends)


def nearest(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Of two things that rays may hit, the one that they hit first."""
    first = one[0] <= other[0]
    return np.where(first, one[0], other[0]), np.where(first[:, None], one[1], other[1])


def hit_box(rays: Camera, half: float) -> tuple[Floats, Floats]:
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


def hit_ball(rays: Camera, radius: float, height: float) -> tuple[Floats, Floats]:
    """A ball whose centre is at a height."""
    away = rays.origin - np.array([0, 0, height], np.float32)
    distance = first_root(np.ones(1, np.float32), (away * rays.direction).sum(1), (away**2).sum(1) - radius**2)
    with np.errstate(invalid="ignore"):
        return distance, (away + distance[:, None] * rays.direction) * np.float32(1 / radius)


def hit_side(rays: Camera, radius: float, low: float, high: float) -> tuple[Floats, Floats]:
    """The side of an upright cylinder."""
    d, o = rays.direction[:, :2], rays.origin[:, :2]
    distance = first_root((d**2).sum(1) + np.float32(1e-9), (o * d).sum(1), (o**2).sum(1) - radius**2)
    with np.errstate(invalid="ignore"):
        at = rays.origin + distance[:, None] * rays.direction
        missed = ~((at[:, 2] >= low) & (at[:, 2] <= high))
    at[:, 2] = 0
    return np.where(missed, np.float32(np.inf), distance), at * np.float32(1 / radius)


def hit_disc(rays: Camera, radius: float, height: float) -> tuple[Floats, Floats]:
    """The top of an upright cylinder."""
    slope = np.where(np.abs(rays.direction[:, 2]) < 1e-6, np.float32(1e-6), rays.direction[:, 2])
    distance = (np.float32(height) - rays.origin[:, 2]) / slope
    at = rays.origin + distance[:, None] * rays.direction
    found = (distance > 0) & ((at[:, :2] ** 2).sum(1) <= radius**2)
    return np.where(found, distance, np.float32(np.inf)), np.broadcast_to(np.array([0, 0, 1], np.float32), at.shape)


def first_root(a: Floats, b: Floats, c: Floats) -> Floats:
    """The smaller root x > 0 of a x² + 2 b x + c, infinite where there is none."""
    inside = b**2 - a * c
    root = (-b - np.sqrt(inside.clip(0))) / a
    return np.where((inside > 0) & (root > 0), root, np.float32(np.inf))
