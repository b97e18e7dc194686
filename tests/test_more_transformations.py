"""Translation, shear, perspective, contrast and blur against exact answers."""

import math

import pytest
import torch

import cflow
from cflow.data import TRANSFORMATIONS, blur, contrast, make_sequence, perspective, shear, translation

pytestmark = pytest.mark.usefixtures("float64")

MORE = {name: f for name, f in TRANSFORMATIONS.items() if name not in cflow.data.PAPER}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_each_is_the_identity_at_0_and_takes_any_batch_and_precision(name) -> None:
    f, x = TRANSFORMATIONS[name], torch.rand(3, 3, 9, 12)
    torch.testing.assert_close(f(x, torch.zeros(3)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(f(x.float(), torch.zeros(3)), x.float(), rtol=0, atol=1e-5)
    assert f(x[:0], torch.zeros(0)).shape == (0, 3, 9, 12)
    each = torch.stack([f(x[i : i + 1], torch.tensor([t]))[0] for i, t in enumerate((0.5, 2.0, 7.0))])
    torch.testing.assert_close(f(x, torch.tensor([0.5, 2.0, 7.0])), each)
    assert f(x.bfloat16(), 2.0).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(f(x.float(), 2.0), f(x.float(), torch.full((3,), 2.0)))


@pytest.mark.parametrize("name", MORE)
def test_each_is_differentiable_in_the_image_and_the_time(name) -> None:
    x, t = torch.rand(2, 1, 5, 6, requires_grad=True), torch.tensor([1.3, 0.4], requires_grad=True)
    assert torch.autograd.gradcheck(MORE[name], (x, t))
    (at_0,) = torch.autograd.grad(MORE[name](x, start := torch.zeros(2, requires_grad=True)).sum(), start)
    assert at_0.isfinite().all()


@pytest.mark.parametrize("name", MORE)
def test_each_leaves_zeros_and_stays_in_range(name) -> None:
    x = torch.rand(4, 3, 8, 8)
    for t in (0.5, 3.0, 8.0):
        made = MORE[name](x, torch.full((4,), t))
        assert made.min() >= -1e-12
        assert made.max() <= 1 + 1e-12
    assert not make_sequence(torch.zeros(2, 3, 8, 8), 0, [0.0, 5.0], {name: MORE[name]}).any()


@pytest.mark.parametrize("t", [-3, 1, 5])
def test_translation_by_whole_pixels_is_a_shift(t) -> None:
    x = torch.rand(2, 3, 7, 9)
    wanted = x.roll(t, -1)
    wanted[..., slice(0, t) if t > 0 else slice(t, None)] = 0
    torch.testing.assert_close(translation(x, torch.full((2,), float(t))), wanted, rtol=0, atol=1e-13)
    half = translation(x, torch.full((2,), 0.5))[..., 1:]
    torch.testing.assert_close(half, (x[..., 1:] + x[..., :-1]) / 2, rtol=0, atol=1e-13)


def test_shear_moves_rows_by_their_height_and_is_undone() -> None:
    x = torch.zeros(1, 2, 7, 21)
    x[..., 6:15] = torch.rand(1, 2, 7, 9)
    slanted = shear(x, torch.tensor([10.0]))
    rows = torch.stack([x[..., row, :].roll(3 - row, -1) for row in range(7)], -2)
    torch.testing.assert_close(slanted, rows, rtol=0, atol=1e-13)
    torch.testing.assert_close(shear(slanted, torch.tensor([-10.0])), x, rtol=0, atol=1e-13)
    smooth = torch.linspace(0, 1, 41)[None, None, None].expand(1, 1, 5, 41)  # a bilinear sample of it is exact
    back = shear(shear(smooth, torch.tensor([3.7])), torch.tensor([-3.7]))
    torch.testing.assert_close(back[..., 3:-3], smooth[..., 3:-3], rtol=0, atol=1e-13)


@pytest.mark.parametrize("t", [2.0, 6.0, 12.0])
def test_perspective_maps_corners_where_they_are_seen(t) -> None:
    angle, size = math.radians(5 * t), 400
    place = torch.linspace(-1, 1, 2 * size + 1)[1::2]
    x = torch.stack([place.expand(size, size), place[:, None].expand(size, size), torch.ones(size, size)]) / 4 + 0.5
    made = perspective(x[None], torch.tensor([t]))[0]
    seen = made[2] > 0.7
    for corner_x in (-0.98, 0.98):
        for corner_y in (-0.98, 0.98):
            near = 3 / (3 + corner_x * math.sin(angle))  # of a plane that is turned about its vertical axis
            column = round((corner_x * math.cos(angle) * near + 1) / 2 * size - 0.5)
            row = round((corner_y * near + 1) / 2 * size - 0.5)
            if 0 <= column < size and 0 <= row < size:
                found = (made[:2, row, column] - 0.5) * 4
                torch.testing.assert_close(found, torch.tensor([corner_x, corner_y]), rtol=0, atol=0.03)
    right = math.cos(angle) * 3 / (3 + math.sin(angle))
    assert place[seen.any(0)].max().item() == pytest.approx(right, abs=0.01)
    torch.testing.assert_close(perspective(x[None], torch.tensor([72.0]))[0], x, rtol=0, atol=1e-10)
    assert cflow.data.PERIODS[perspective] == 72


def test_contrast_is_affine_about_the_mean() -> None:
    x, t = torch.rand(3, 3, 5, 4), torch.tensor([1.0, 2.0, 5.5])
    mean = x.flatten(1).mean(1)[:, None, None, None]
    part = (0.9**t)[:, None, None, None]
    torch.testing.assert_close(contrast(x, t), mean + part * (x - mean))
    torch.testing.assert_close(contrast(contrast(x, t), 2 * t), contrast(x, 3 * t))


@pytest.mark.parametrize("t", [1.0, 4.0, 8.0])
def test_the_blur_of_an_impulse_is_a_gaussian(t) -> None:
    x = torch.zeros(1, 1, 41, 51)
    x[..., 20, 25] = 1
    down, across = torch.arange(41) - 20.0, torch.arange(51) - 25.0
    bell = torch.exp(-(down[:, None] ** 2 + across**2) / t)  # the variance is t/2
    made = blur(x, torch.tensor([t]))[0, 0]
    torch.testing.assert_close(made, bell / bell.sum(), rtol=0, atol=1e-10)
    assert (made * across**2).sum() == pytest.approx(t / 2, rel=1e-2)
    torch.testing.assert_close(blur(torch.full_like(x, 0.3), torch.tensor([t])), torch.full_like(x, 0.3))
    assert torch.equal(blur(x, torch.tensor([-t])), x)
