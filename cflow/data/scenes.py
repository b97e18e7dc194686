"""Scenes like those of the published factor grids, drawn by rays in NumPy.

A picture is linear in the colours and the light. So rays are followed once for everything that moves, and what they hit
is then lit and painted in all ways.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .rays import Floats, Rays, Thing, camera, first, hit, hit_floor, hit_side, hit_walls, unit
from .stored import Bytes

Values = npt.NDArray[np.float64]

SHAPES = ("cube", "cylinder", "sphere", "capsule")
LIGHT = unit([0.35, -0.5, 0.8])
ROOM, WALL = 5.0, 4.2  # half the width of a room, and the height of its walls
SKY = 0.84
HALL = (
    (Thing("cube", 0.8, (0.95, 1.4, 0.0)), (0.75, 0.25, 0.2)),
    (Thing("sphere", 0.8, (-0.95, -0.8, 0.0)), (0.25, 0.45, 0.8)),
    (Thing("cylinder", 0.8, (-0.7, 1.5, 0.0)), (0.35, 0.65, 0.3)),
    (Thing("capsule", 0.6, (0.5, -0.35, 0.0)), (0.8, 0.7, 0.3)),
)
HALL_COLOURS = np.array([(0.6, 0.5, 0.4), (0.8, 0.8, 0.75), *(colour for _, colour in HALL)], np.float32)


def room(scale: float, shape: str, orientation: float, pixels: int = 64) -> Floats:
    """3D Shapes: how bright the floor, the walls and the object are in every pixel, and what is white, (4, H, W).

    Arguments:
        scale: size of the object.
        shape: one of `SHAPES`.
        orientation: of the camera about the object, in degrees.
        pixels: H and W.
    """
    angle, thing = np.deg2rad(orientation + 45), Thing(shape, scale)
    rays = camera((4.4 * np.cos(angle), -4.4 * np.sin(angle), 2.7), (0.0, 0.0, 1.05), 3 * pixels, 23)
    walls = hit_walls(rays, ROOM)
    high = rays.at(walls[0])[:, 2] > WALL
    which, distance, normal = first(
        hit_floor(rays), (np.where(high, np.float32(np.inf), walls[0]), walls[1]), hit(rays, thing)
    )
    floor, wall, own, sky = (which == number for number in range(4))
    bright = np.zeros((4, len(which)), np.float32)
    spot = Rays(rays.at(distance)[floor] + 1e-3 * LIGHT, np.broadcast_to(LIGHT, (int(floor.sum()), 3)))
    bright[0, floor] = np.where(np.isfinite(hit(spot, thing)[0]), 0.5, 0.85)  # in the thing's shadow, or not
    bright[1, wall] = 0.35 + 0.9 * np.abs(normal[wall] @ LIGHT)
    bright[2, own] = 0.35 + 0.6 * (normal[own] @ LIGHT).clip(0)
    half = LIGHT - rays.direction[own]
    bright[3, own] = 0.3 * ((normal[own] * half).sum(1) / np.linalg.norm(half, axis=1)).clip(0) ** 40
    bright[3, sky] = SKY
    return averaged(bright, pixels)


def paint(bright: Floats, hues: Values) -> Bytes:
    """A `room` (4, H, W) in many hues: images (N, H, W, 3).

    Arguments:
        bright: what `room` gives.
        hues: of the floor, the walls and the object, (N, 3), in turns.
    """
    colours = np.array([[colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in row] for row in hues], np.float32)
    return as_bytes(np.einsum("shw,nsc->nhwc", bright[:3], colours) + bright[3, ..., None])


def hall(place: Sequence[float], lights: Values, pixels: int = 128) -> Bytes:
    """Falcor3D: a room with four things, from one place and under many lights, (N, H, W, 3).

    Arguments:
        place: of the camera, three numbers from 0 to 1.
        lights: how strong each light is and where it comes from, (N, 4), all from 0 to 1.
        pixels: H and W.
    """
    eye = np.array([3.2, -4.0, 1.6]) + np.array([1.4, -0.9, 1.6]) * (np.array(place) - 0.5)
    rays = camera(eye, (0.0, 0.3, 0.9), 2 * pixels, 30)
    which, _, normal = first(hit_floor(rays), hit_walls(rays, ROOM), *(hit(rays, thing) for thing, _ in HALL))
    colours = HALL_COLOURS[which]
    images = []
    for strength, *direction in lights:
        light = unit(np.array(direction) * [1.2, -1.2, 1.2] + [0.2, -0.3, 0.3])
        images.append(lit(colours, normal, light, 0.25, 0.25 + 0.75 * strength, pixels))
    return np.stack(images)


def kitchen(shape: int, pose: Sequence[float], lights: Values, pixels: int = 128) -> Bytes:
    """Isaac3D: an arm that holds a thing before a wall, under many lights and in many colours, (N, H, W, 3).

    Arguments:
        shape: of the thing, 0, 1 or 2.
        pose: where the arm holds it, across and along, the camera's height, and how large the thing is; all 0 to 1.
        lights: how strong the light is, where it comes from, and the hues of thing and wall, (N, 4), all from 0 to 1.
        pixels: H and W.
    """
    across, along, height, scale = pose
    x, y = 2.6 * across - 1.3, 1.6 * along - 0.8
    held = Thing(SHAPES[shape], 0.45 + 0.35 * scale, (x, y, 0.5))
    top = 0.5 + (1.6, 1.7, 1.9)[shape] * held.scale
    rays = camera((0.0, -5.2, 1.4 + 1.6 * height), (0.0, 0.0, 1.3), 2 * pixels, 25)
    arm = hit_side(rays.seen_from(x, y, 0.0), 0.1, top, 9.0)
    which, _, normal = first(hit_floor(rays), hit_walls(rays, 3.0), hit(rays, held), arm)
    images = []
    for strength, side, hue, wall in lights:
        wall_colour, colour = colorsys.hsv_to_rgb(0.9 * wall, 0.5, 0.9), colorsys.hsv_to_rgb(hue, 0.85, 1.0)
        colours = np.array([(0.55, 0.5, 0.45), wall_colour, colour, (0.7, 0.7, 0.7)], np.float32)
        light = unit((2 * side - 1, -1.0, 0.8))
        images.append(lit(colours[which], normal, light, 0.3, 0.2 + 0.6 * strength, pixels))
    return np.stack(images)


def sprite(shape: str, scale: float, orientation: float, places: Values, pixels: int = 64) -> Bytes:
    """dSprites: a white square, ellipse or heart at many places, (N, H, W), of 0 and 1.

    Arguments:
        shape: square, ellipse or heart.
        scale: 1 is a square of a quarter of the picture.
        orientation: in radians.
        places: of the middle, (N, 2), x and y from 0 to 1.
        pixels: H and W.
    """
    centre = (0.2 + 0.6 * places)[:, :, None, None] * pixels
    down, across = np.indices((pixels, pixels)) + 0.5
    x, y = across - centre[:, 0], down - centre[:, 1]
    cos, sin = np.cos(orientation), np.sin(orientation)
    half = scale * pixels / 8
    u, v = (cos * x + sin * y) / half, (cos * y - sin * x) / half
    if shape == "square":
        inside = np.maximum(np.abs(u), np.abs(v)) < 1
    elif shape == "ellipse":
        inside = (u / 1.35) ** 2 + (v / 0.75) ** 2 < 1
    else:
        inside = (u**2 + v**2 - 1) ** 3 < -(u**2) * v**3
    return np.asarray(inside, np.uint8)


def lit(colours: Floats, normal: Floats, light: Floats, base: float, strength: float, pixels: int) -> Bytes:
    """An image (H, W, 3) of matt colours (N, 3) under a light from afar, and a base that comes from everywhere."""
    facing = np.einsum("nd,d->n", normal, light).clip(0)
    shown = averaged((colours * (base + strength * facing[:, None]).astype(np.float32)).T, pixels)
    return as_bytes(np.moveaxis(shown, 0, -1))


def averaged(bright: Floats, pixels: int) -> Floats:
    """Pixels (C, H, W) of what several rays in each of them see, (C, N)."""
    points = round((bright.shape[1] / pixels**2) ** 0.5)
    mean: Floats = bright.reshape(-1, pixels, points, pixels, points).mean((2, 4))
    return mean


def as_bytes(image: Floats) -> Bytes:
    """Values in [0, 1] as bytes, what is brighter at 255."""
    return np.asarray(255 * image.clip(0, 1) + 0.5, np.float32).astype(np.uint8)
