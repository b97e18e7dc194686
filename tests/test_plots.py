"""Pictures: what is drawn is what was given."""

import colorsys
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cflow
from cflow import plots
from cflow.data import PAPER, make_sequence
from cflow.data.digits import load_digits

NAMES = ["scaling", "hue_shift"]


def frames(seed: int = 0, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 5, channels, 6, 6, generator=generator)


def test_grid_shows_the_frames_given() -> None:
    true, generated = frames(0), frames(1)
    figure = plots.traversal_grid(true, generated, NAMES)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["scaling", "hue shift"]
    for row, ax in enumerate(figure.axes):
        shown = {image.get_gid(): np.asarray(image.get_array()) for image in ax.images}
        assert len(shown) == 1 + 2 * 4
        np.testing.assert_allclose(shown[f"input/{NAMES[row]}"], true[row, 0].permute(1, 2, 0))
        for t in range(1, 5):
            np.testing.assert_allclose(shown[f"true/{NAMES[row]}/{t}"], true[row, t].permute(1, 2, 0))
            np.testing.assert_allclose(shown[f"generated/{NAMES[row]}/{t}"], generated[row, t].permute(1, 2, 0))
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert labels == ["input", "t = 1", "t = 2", "t = 3", "t = 4"]


def test_grid_true_frames_stand_above_generated_ones() -> None:
    ax = plots.traversal_grid(frames(0), frames(1), NAMES).axes[0]
    bottoms = {image.get_gid(): image.get_extent()[2] for image in ax.images}
    assert bottoms["true/scaling/1"] > bottoms["generated/scaling/1"]


def test_the_input_stands_alone_where_no_truth_is_known(tmp_path) -> None:
    ax = plots.traversal_grid(frames(0)[:, :1], frames(1), NAMES).axes[0]
    assert {image.get_gid() for image in ax.images} == {
        "input/scaling",
        *(f"generated/scaling/{t}" for t in range(1, 5)),
    }
    assert [label.get_text() for label in ax.get_yticklabels()] == ["generated"]
    known = plots.traversal_grid(frames(0), frames(1), NAMES).axes[0]
    assert [label.get_text() for label in known.get_yticklabels()] == ["generated", "true"]
    still = frames(0)[:, :1].expand(-1, 5, -1, -1, -1)
    alone = pictures(plots.traversal_animation(tmp_path / "a.webp", frames(0)[:, :1], frames(1), NAMES))
    twice = pictures(plots.traversal_animation(tmp_path / "b.webp", still, frames(1), NAMES))
    assert len(alone) == 5
    for one, other in zip(alone, twice, strict=True):
        differing = (np.asarray(one).astype(int) != np.asarray(other)).any(-1).nonzero()[0]
        assert 26 <= differing.min() <= differing.max() < 52  # the heading "input", in its line


def test_grid_draws_into_given_axes_and_grey_images() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = [figure.add_subplot(2, 1, 1), figure.add_subplot(2, 1, 2)]
    assert plots.traversal_grid(frames(channels=1), frames(channels=1), NAMES, axes=axes) is figure
    assert len(axes[1].images) == 9


def test_the_grid_of_axes_in_a_subfigure_is_the_figure_that_can_be_saved(tmp_path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subfigures(1, 2)[1].subplots(2, 1)
    plots.traversal_grid(frames(), frames(), NAMES, axes=list(axes)).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_grid_uses_no_pyplot_state() -> None:
    import matplotlib.pyplot as plt

    plots.traversal_grid(frames(), frames(), NAMES)
    assert plt.get_fignums() == []


def pictures(path) -> np.ndarray:
    """The frames of an animation as a viewer shows them, (T+1, H, W, 3) of 0..255."""
    with Image.open(path) as animation:
        shown = []
        for i in range(animation.n_frames):
            animation.seek(i)
            shown.append(np.asarray(animation.convert("RGB"), dtype=int))
    return np.stack(shown)


def read_back(path, row: int, side: int, examples: int, size: int, scale: int = 4) -> np.ndarray:
    """The images of a row and a half, (S, T+1, H, W, 3) of 0..255, one screen pixel for each of theirs."""
    width = scale * (examples * (size + 1) - 1)
    left, top = 8 + side * (width + 8), 78 + row * (scale * size + 26)
    half = pictures(path)[:, top : top + scale * size : scale, left : left + width : scale]
    return np.stack([half[:, :, s * (size + 1) : s * (size + 1) + size] for s in range(examples)])


@pytest.mark.parametrize("examples", [None, 3])
def test_an_animation_has_one_frame_a_time_and_in_webp_is_exact(tmp_path, examples) -> None:
    count = examples or 1
    true, generated = (torch.rand(2, count, 5, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    given = (true, generated) if examples else (true[:, 0], generated[:, 0])
    path = plots.traversal_animation(tmp_path / "a.webp", *given, NAMES)
    assert len(pictures(path)) == 5
    for row in range(2):
        for side, images in enumerate((true, generated)):
            wanted = (255 * images[row]).round().permute(0, 1, 3, 4, 2).int().numpy()
            np.testing.assert_array_equal(read_back(path, row, side, count, 6), wanted)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_an_animation_begins_anew_and_rests_on_its_ends(tmp_path, name) -> None:
    with Image.open(plots.traversal_animation(tmp_path / name, frames(0), frames(1), NAMES, duration=100)) as animation:
        assert animation.info["loop"] == 0
        durations = []
        for i in range(animation.n_frames):
            animation.seek(i)
            animation.load()
            durations.append(animation.info["duration"])
    assert durations == [400, 100, 100, 100, 400]


@pytest.mark.parametrize(("name", "tolerance"), [("a.gif", 30), ("a.webp", 0)])
def test_frames_show_their_times(tmp_path, name, tolerance) -> None:
    """Nothing else is in the first line, so that equal times look the same there and others do not."""
    still = frames(0)[:, :1].expand(-1, 3, -1, -1, -1)
    shown = pictures(plots.traversal_animation(tmp_path / name, still, still, NAMES, times=[1, 2.5, 8]))
    again = pictures(plots.traversal_animation(tmp_path / name, still, still, NAMES, times=[8, 1, 2.5]))
    heads, others = shown[:, :26], again[:, :26]
    np.testing.assert_array_equal(heads, others[[1, 2, 0]])
    assert all((heads[i] != heads[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    assert np.abs(shown[:, 26:] - again[:, 26:]).max() <= tolerance  # the edges of letters share few colours
    assert pictures(plots.traversal_animation(tmp_path / name, still, still, NAMES)).shape == shown.shape


def hue_of(pixels: np.ndarray) -> np.ndarray:
    """Degrees (…) of RGB (…, 3)."""
    flat = (colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))[0] for pixel in pixels.reshape(-1, 3))
    return 360 * np.array(list(flat)).reshape(pixels.shape[:-1])


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_digits_keep_their_hue_in_every_frame(tmp_path, name) -> None:
    """Beside generated images of all colours, which would fill a palette of their own."""
    digits = load_digits("test")[[3, 20, 40, 65]].float() / 255
    true = torch.stack([make_sequence(digits, k, torch.arange(9.0)) for k in range(3)])
    generated = torch.rand(true.shape, generator=torch.Generator().manual_seed(0))
    path = plots.traversal_animation(tmp_path / name, true, generated, list(PAPER))
    for row in range(3):
        wanted = (255 * true[row]).round().permute(0, 1, 3, 4, 2).int().numpy()
        shown = read_back(path, row, 0, 4, 28)
        assert np.abs(shown - wanted).max() <= 8
        coloured = np.ptp(wanted, axis=-1) > 60
        for t in range(9):
            there = coloured[:, t]
            assert there.sum() > 100
            off = (hue_of(shown[:, t][there]) - hue_of(wanted[:, t][there]) + 180) % 360 - 180
            assert np.abs(off).max() < 3


def test_gif_labels_keep_their_colours_among_images_of_others(tmp_path) -> None:
    red = torch.zeros(2, 5, 3, 20, 20)
    red[:, :, 0] = torch.rand(2, 5, 20, 20, generator=torch.Generator().manual_seed(0))
    head = pictures(plots.traversal_animation(tmp_path / "a.gif", red, red, NAMES))[0, 26:52].reshape(-1, 3)
    for colour in (plots.TRUE_COLOUR, plots.GENERATED_COLOUR):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(head - wanted).max(axis=1).min() < 8


def test_the_name_of_before_still_writes_an_animation(tmp_path) -> None:
    assert len(pictures(plots.traversal_gif(tmp_path / "a.gif", frames(0), frames(1), NAMES))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["one"]}, "names has 1 entries"),
        ({"generated": torch.rand(2, 4, 3, 6, 6)}, "generated has shape"),
        ({"true": torch.rand(2, 5, 2, 6, 6)}, "C = 1 or 3"),
        ({"times": [0, 1]}, "times has 2 entries"),
    ],
)
def test_grid_refuses_what_does_not_belong_together(change, message) -> None:
    arguments = {"true": frames(), "generated": frames(), "names": NAMES} | change
    with pytest.raises(cflow.ArgumentError, match=message):
        plots.traversal_grid(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.gif", {"scale": 0}, "scale=0"),
        ("a.gif", {"duration": 0}, "duration=0"),
        ("a.webp", {"times": [0, 1]}, "times has 2 entries"),
        ("a.mp4", {}, r"path: expected a name that ends in \.gif or \.webp, got '.*a\.mp4'"),
    ],
)
def test_animation_refuses_what_it_cannot_write(tmp_path, name, change, message) -> None:
    with pytest.raises(cflow.ArgumentError, match=message):
        plots.traversal_animation(tmp_path / name, frames(), frames(), NAMES, **change)
    assert not (tmp_path / name).exists()


def test_a_figure_shows_itself_in_a_notebook_without_pyplot_twice_as_sharp():
    png, size = plots.training_curves({"loss": [1.0, 0.5]}).figure._repr_png_()
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert tuple(stored // 2 for stored in picture.size) == (size["width"], size["height"])
    assert 450 < size["width"] < 600  # as shown
    frames = torch.rand(1, 3, 1, 8, 8)
    assert plots.traversal_grid(frames, frames, ["a"])._repr_png_()[0][:4] == b"\x89PNG"


# --- without the packages that draw ----------------------------------------------------------------------------

PICTURES = {
    "density": "plots.density(torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)), num=3)",
    "potential_surface": "plots.potential_surface(flow, num=3)",
    "velocity_field": "plots.velocity_field(flow, num=3)",
    "trajectories": "plots.trajectories(torch.zeros(3, 1, 2))",
    "training_curves": "plots.training_curves({'loss': [1.0]})",
    "work_precision": "plots.work_precision([{'method': 'rk4', 'nfe': 1, 'error': 0.1}])",
    "traversal_grid": "plots.traversal_grid(frames, frames, ['a'])",
    "traversal_animation": "plots.traversal_animation('a.gif', frames, frames, ['a'])",
    "population_landscape": "plots.population_landscape(flow, snapshots)",
    "population_marginals": "plots.population_marginals(flow, snapshots)",
    "population_animation": "plots.population_animation('a.gif', flow, snapshots)",
}


@pytest.mark.ci
def test_without_matplotlib_or_pillow_every_picture_says_what_to_install(tmp_path):
    assert set(PICTURES) == set(plots.__all__)
    code = "\n".join(
        [
            "import json, sys",
            "sys.modules.update({'matplotlib': None, 'mpl_toolkits': None, 'PIL': None})  # cannot be imported",
            "import torch, cflow",
            "from cflow import plots",
            "flow = cflow.PotentialFlow(cflow.MLPPotential(2))",
            "frames = torch.rand(1, 2, 1, 4, 4)",
            "snapshots = cflow.populations.Snapshots([torch.rand(3, 2)] * 2, [0.0, 1.0])",
            "said = {}",
            f"for name, call in {PICTURES!r}.items():",
            "    try:",
            "        eval(call)",
            "    except Exception as error:",
            "        bases = isinstance(error, cflow.CflowError) and isinstance(error, ImportError)",
            "        said[name] = [type(error).__name__, str(error), bases]",
            "print(json.dumps(said))",
        ]
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    said = json.loads(run.stdout)
    assert set(said) == set(PICTURES)
    for name, (kind, message, both) in said.items():
        assert (kind, both) == ("DependencyError", True)
        package = "pillow" if name == "traversal_animation" else "matplotlib"
        assert f"needs {package}, which is not installed; pip install {package}" in message
        assert "\n" not in message


def test_a_matplotlib_that_is_there_and_broken_speaks_for_itself(tmp_path):
    (tmp_path / "matplotlib.py").write_text("import a_module_that_is_missing\n", encoding="utf-8")
    code = "from cflow import plots; plots.training_curves({'loss': [1.0]})"
    paths = os.pathsep.join([str(tmp_path), str(Path(cflow.__file__).parents[1])])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": paths})
    assert run.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'a_module_that_is_missing'"
