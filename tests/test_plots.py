"""Pictures: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from PIL import Image

import cflow
from cflow import plots

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


@pytest.mark.parametrize("examples", [None, 3])
def test_gif_has_one_frame_a_time(tmp_path, examples) -> None:
    true, generated = frames(0), frames(1)
    if examples:
        true, generated = (x[:, None].expand(-1, examples, -1, -1, -1, -1) for x in (true, generated))
    path = plots.traversal_gif(tmp_path / "a.gif", true, generated, NAMES, scale=4)
    with Image.open(path) as gif:
        assert gif.n_frames == 5
        assert gif.info["loop"] == 0
        pictures = []
        for t in range(5):
            gif.seek(t)
            pictures.append(np.asarray(gif.convert("RGB"), dtype=float) / 255)
    # The first image of the first row in each half, at 4 screen pixels a pixel below the two lines of labels.
    for t in range(5):
        block = pictures[t][44 : 44 + 24 : 4, 6 : 6 + 24 : 4]
        first = (true if examples is None else true[:, 0])[0, t].permute(1, 2, 0).numpy()
        assert np.abs(block - first).mean() < 0.1  # 255 colours for the whole animation
        right = 2 * 6 + 24 * (examples or 1)  # two margins and the true half
        block = pictures[t][44 : 44 + 24 : 4, right : right + 24 : 4]
        first = (generated if examples is None else generated[:, 0])[0, t].permute(1, 2, 0).numpy()
        assert np.abs(block - first).mean() < 0.1


def test_gif_labels_keep_their_colours_among_images_of_others(tmp_path) -> None:
    red = torch.zeros(2, 5, 3, 20, 20)
    red[:, :, 0] = torch.rand(2, 5, 20, 20, generator=torch.Generator().manual_seed(0))
    with Image.open(plots.traversal_gif(tmp_path / "a.gif", red, red, NAMES)) as gif:
        head = np.asarray(gif.convert("RGB"), dtype=float)[:20].reshape(-1, 3)
    for colour in (plots.TRUE_COLOUR, plots.GENERATED_COLOUR):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(head - wanted).max(axis=1).min() < 8


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


def test_gif_refuses_a_scale_below_one(tmp_path) -> None:
    with pytest.raises(cflow.ArgumentError, match="scale=0"):
        plots.traversal_gif(tmp_path / "a.gif", frames(), frames(), NAMES, scale=0)


def test_a_figure_shows_itself_in_a_notebook_without_pyplot():
    frames = torch.rand(1, 3, 1, 8, 8)
    shown = plots.traversal_grid(frames, frames, ["a"])._repr_png_()
    assert shown[:8] == b"\x89PNG\r\n\x1a\n"
    assert plots.training_curves({"loss": [1.0, 0.5]}).figure._repr_png_()
