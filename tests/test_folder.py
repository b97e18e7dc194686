"""Sequences and stills of one's own: every kind of file, labels, times, missing frames, and all that does not fit."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cflow
from cflow.data import ImageFolder, SequenceFolder, frame_files, frame_times

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.training import cli, runs
from cflow.training.batches import Drawn, Whole, draw_own_frames
from cflow.training.datamodule import SequenceDataModule
from cflow.training.measures import over_frames

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "2", "--data.batch_size", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "4"),
]


def square(place, *, height=8, width=12):
    """A white square in a black image (H, W, 3)."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[2:5, place : place + 3] = 255
    return frame


def moving(number, step, frames=4):
    return np.stack([square(4 + number % 2 + step * t) for t in range(frames)])


def write_png(path, frames):
    path.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame_{t}.png")


def write_jpeg(path, frames):
    path.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{t}.JPG", quality=100, subsampling=0)


def write_animation(path, frames, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, **settings)


def write_npz(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, frames=frames)


def write_npy(path, frames):
    path.mkdir(parents=True)
    for t, frame in enumerate(frames):
        np.save(path / f"{t}.npy", (frame / 255).astype(np.float32).transpose(2, 0, 1))


def write_film(path, frames):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264rgb", rate=10, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


KINDS = {
    "png": (write_png, ""),
    "jpeg": (write_jpeg, ""),
    "npy": (write_npy, ""),
    "npz": (write_npz, ".npz"),
    "gif": (write_animation, ".gif"),
    "apng": (write_animation, ".png"),
    "webp": (lambda path, frames: write_animation(path, frames, lossless=True), ".webp"),
    "mp4": (write_film, ".mp4"),
}
STEPS = {"left": -1, "right": 1}


def write(root, kind="png", count=5, labels=STEPS):
    make, suffix = KINDS[kind]
    for label in labels:
        for i in range(count):
            make(root / label / f"{i}{suffix}", moving(i, STEPS[label]))
    return root


def whole(part):
    index = torch.arange(len(part))
    t, there = part.frame_times(index)
    return part.sequences(index, part.labels, t), t, there


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read(kind, tmp_path) -> None:
    folder = SequenceFolder(write(tmp_path / "all", kind))
    assert (folder.names, folder.image_shape, folder.num_frames) == (("left", "right"), (3, 8, 12), 4)
    assert [len(folder.split(name)) for name in ("train", "val", "test")] == [6, 2, 2]
    found = []
    for name in ("train", "val", "test"):
        part = folder.split(name)
        x, t, there = whole(part)
        assert torch.equal(t, torch.arange(4.0))
        assert there is None
        assert part.read(torch.tensor([0]), part.labels[:1], t).dtype == torch.uint8
        found += [(int(k), *frames) for k, frames in zip(part.labels, (255 * x).round().byte().numpy(), strict=True)]
    wanted = [(k, *moving(i, step).transpose(0, 3, 1, 2)) for k, step in enumerate(STEPS.values()) for i in range(5)]
    most = 12 if kind == "jpeg" else 0  # a GIF, a PNG and the others hold the same bytes
    for k, *frames in found:
        gaps = [np.abs(np.subtract(frames, true, dtype=int)).max() for label, *true in wanted if label == k]
        assert min(gaps) <= most
    assert torch.equal(whole(SequenceFolder(tmp_path / "all").split("val"))[0], whole(folder.split("val"))[0])


@pytest.mark.parametrize("kind", ["png", *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("gif", "npz"))])
def test_a_folder_trains_at_the_first_try(kind, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine", kind)
    assert cli.main(["fit", "--config", "folder", "--data.root", "mine", *TINY]) == 0
    assert "training left, right of 6 SequenceFolder" in capsys.readouterr().out
    run = tmp_path / "runs/folder/version_0"
    metrics = json.loads((run / "metrics.json").read_text())
    # a square of three columns that moves by one: 2 · 3 pixels of 3 channels a step until nothing is left to share
    assert metrics["copy_input/right"] == pytest.approx((6 + 12 + 18) * 3)
    assert metrics["copy_input/left"] == pytest.approx((6 + 12 + 18) * 3)
    assert metrics["samples"] == 2
    assert (run / "traversals.png").is_file()
    assert cflow.load(run).flow.num_flows == 2
    assert cli.main(["test", "--ckpt_path", "last", "--trainer.accelerator", "cpu", "--out_dir", "again"]) == 0
    assert json.loads(Path("again/metrics.json").read_text()) == metrics
    shutil.move(tmp_path / "mine/right", tmp_path / "mine/up")
    assert cli.main(["test", "--ckpt_path", "last", "--trainer.accelerator", "cpu"]) == 2
    assert "the checkpoint knows left, right, but the data are of left, up" in capsys.readouterr().err


def test_times_lengths_and_missing_frames_reach_the_loss(tmp_path, monkeypatch) -> None:
    root = write(tmp_path / "mine", "png", count=4)
    (root / "left/1/frame_3.png").unlink()  # shorter
    (root / "right/2/frame_1.png").unlink()  # its number is left out
    (root / "left/3/times.csv").write_text(
        "frame,time\nframe_0.png,7\nframe_1.png, 7.5\n,8\nframe_2.png,9\nframe_3.png,9.25"
    )
    (root / "times.csv").write_text(
        "sequence,time,frame\nright/0,0,frame_0.png\nright/0,1.5,frame_1.png\n"
        "right/0,2,frame_2.png\nright/0,4,frame_3.png\n"
    )
    folder = SequenceFolder(root)
    assert folder.num_frames == 5
    t, there = folder.frame_times(torch.arange(8))
    by_name = {recording.path.relative_to(root).as_posix(): i for i, recording in enumerate(folder._recordings)}
    wanted = {
        "left/0": ([0, 1, 2, 3, 3], [1, 1, 1, 1, 0]),
        "left/1": ([0, 1, 2, 2, 2], [1, 1, 1, 0, 0]),
        "left/3": ([0, 0.5, 1, 2, 2.25], [1, 1, 0, 1, 1]),
        "right/0": ([0, 1.5, 2, 4, 4], [1, 1, 1, 1, 0]),
        "right/2": ([0, 1, 2, 3, 3], [1, 0, 1, 1, 0]),
    }
    for name, (times, seen) in wanted.items():
        assert t[by_name[name]].tolist() == times, name
        assert there[by_name[name]].tolist() == [bool(x) for x in seen], name
    one = torch.tensor([by_name["right/2"]])
    frames = folder.read(one, one, torch.tensor([3.0, 1.0, 0.0]))[0]
    truth = torch.from_numpy(moving(2, 1)).permute(0, 3, 1, 2)
    assert torch.equal(frames, torch.stack([truth[3], torch.zeros_like(truth[0]), truth[0]]))
    # a training step sees frames that are there only, at their own times
    for whole_ in (False, True):
        batch = Drawn(folder, 2, 5, whole=whole_).__getitems__([(3, i) for i in range(8)])
        assert batch.k.tolist() == folder.labels.tolist()
        if whole_:
            assert torch.equal(batch.mask, there)
            continue
        assert torch.equal(batch.mask.sum(1), there.sum(1).float())
        for row in range(8):
            own = set(t[row][there[row]].tolist())
            assert set(batch.t[row][batch.mask[row] > 0].tolist()) <= own
    monkeypatch.chdir(tmp_path)
    for number, more in enumerate(([], ["--model.supervision", "weak"])):
        assert cli.main(["fit", "--config", "folder", "--data.root", "mine", *TINY, *more]) == 0
        metrics = json.loads(Path(f"runs/folder/version_{number}/metrics.json").read_text())
        assert all(np.isfinite(value) for value in metrics.values())


def test_frames_of_own_times_are_an_unbiased_sum_over_all() -> None:
    times = torch.tensor([[0.0, 0.5, 2.0, 3.0, 3.0], [0.0, 1.0, 2.0, 3.0, 7.0]]).repeat(3_000, 1)
    there = torch.tensor([[True, True, True, True, False], [True, False, True, True, True]]).repeat(3_000, 1)
    draws = torch.Generator().manual_seed(0)
    for mask in (there, None):
        t, weights = draw_own_frames(times, mask, 2, draws)
        assert (t.diff(dim=1) >= 0).all()
        counted = there if mask is not None else torch.ones_like(there)
        for row in range(2):
            value = (t.square() * weights).sum(1)[row::2]
            truth = (times[row].square() * counted[row]).sum()
            assert value.mean() == pytest.approx(truth.item(), abs=4 * value.std().item() / 3_000**0.5)
    weighted, weights = draw_own_frames(times, None, 2, draws, whole=True)
    assert weighted is times
    assert weights.shape == (6_000, 5)
    assert draw_own_frames(times, there, 5)[1] is there


def test_errors_over_frames_leave_out_what_is_missing(tmp_path) -> None:
    errors = torch.rand(4, 3)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True, False, True, True, True]])
    wanted = torch.stack([errors[:, 0].sum(), 4 * errors[0, 1], errors[1:, 2].sum() * 4 / 3])
    torch.testing.assert_close(over_frames(errors, mask), wanted)
    torch.testing.assert_close(over_frames(errors), errors.sum(0))
    # the likelihood of what is missing is not asked for
    vae = cflow.nets.build_vae(image_shape=(1, 4, 4), latent_dim=4, width=16, num_flows=1).eval()
    x, t = torch.rand(3, 5, 1, 4, 4), torch.arange(5.0)
    torch.manual_seed(0)
    found = cflow.metrics.log_likelihood(vae, x, 0, t, num_samples=3, mask=mask)
    torch.manual_seed(0)
    other = cflow.metrics.log_likelihood(
        vae, torch.where(mask[..., None, None, None], x, 0.3), 0, t, num_samples=3, mask=mask
    )
    torch.testing.assert_close(found, other)
    torch.manual_seed(0)
    assert not torch.allclose(found[1:], cflow.metrics.log_likelihood(vae, x, 0, t, num_samples=3)[1:])


def test_the_first_things_of_a_part_have_all_labels(tmp_path) -> None:
    root = write(tmp_path, "npz", count=12)
    test = SequenceFolder(root).split("train")
    assert test.labels[:6].tolist() == [0, 1] * 3
    batch = Whole(test, 1)
    assert len(batch) == 2
    assert batch.__getitems__([0, 1]).k.tolist() == [0, 1]
    assert Whole(test, 100).__len__() == 20


def test_sequences_without_labels_are_weakly_supervised(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "png", labels=["left"])
    words = ["fit", "--config", "folder", "--data.root", "left", *TINY]
    weak = ["--model.supervision", "weak"]
    for more in ([], ["--model.num_flows", "2"], weak, [*weak, "--model.num_flows", "2", "--data.labelled", "0.5"]):
        assert cli.main([*words, *more]) == 2
        assert "have flows inferred and say how many: --model.supervision weak" in capsys.readouterr().err
    assert cli.main([*words, *weak, "--model.num_flows", "2", "--run_name", "weak"]) == 0
    assert "training sequences of 3 SequenceFolder" in capsys.readouterr().out
    metrics = json.loads(Path("runs/weak/version_0/metrics.json").read_text())
    assert metrics["copy_input/sequences"] == pytest.approx(108)
    assert "flow_accuracy" not in metrics
    traverse = [
        "traverse",
        "--ckpt_path",
        "runs/weak",
        "--trainer.accelerator",
        "cpu",
        "--schedule",
        "0:flow_0,2:flow_1",
    ]
    assert cli.main(traverse) == 0
    assert Path("runs/weak/version_0/composition.png").is_file()


@pytest.mark.ci
def test_pictures_show_what_is_known(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", "folder", "--data.root", str(write(tmp_path / "mine")), *TINY]) == 0
    words = ["traverse", "--ckpt_path", "last", "--trainer.accelerator", "cpu"]
    for more in (["--times", "3,1,0"], ["--times", "0,0.5"], ["--weights", "1,1"], ["--schedule", "0:left,2:right"]):
        assert cli.main([*words, *more]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--times", "0.5,2"]) == 2  # there is no frame to begin with
    assert "begin with its first frame, at 0" in capsys.readouterr().err


def small_film(path):
    path.write_bytes(b"no film")


def broken(path):
    path.write_bytes(b"\x89PNG but not really")


def pickled(path):
    np.save(path, np.array([{"a": 1}, print], dtype=object), allow_pickle=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def zipped(path, **arrays):
    path.unlink()
    np.savez(path, **arrays)


FRAME, SEQUENCE = "left/2/frame_1.png", "left/2.npz"
UNFIT = {
    "a PNG that is none": ("png", lambda r: broken(r / FRAME), r"frame_1\.png: cannot be read as frames"),
    "the first of them": ("png", lambda r: broken(r / "left/0/frame_0.png"), r"frame_0\.png: cannot be read as frames"),
    "another size": (
        "png",
        lambda r: Image.fromarray(square(1, width=13)).save(r / FRAME),
        r"frame_1\.png: is 8×13, but frame_0\.png 8×12 .*--data\.resize '\[8,12\]'",
    ),
    "other channels": (
        "png",
        lambda r: Image.fromarray(square(1)[..., 0]).save(r / FRAME),
        r"has 1 channels, .* 3; make all",
    ),
    "an empty folder": ("png", lambda r: (r / "left/9").mkdir(), r"left/9: holds no frames \(.*\) and no sequences"),
    "an empty label": ("png", lambda r: (r / "up").mkdir(), r"up: holds no frames \(.*\) and no sequences"),
    "one frame only": (
        "png",
        lambda r: [(r / f"left/2/frame_{t}.png").unlink() for t in (1, 2, 3)],
        "left/2: has one frame only",
    ),
    "no sequences": (
        "png",
        lambda r: [shutil.rmtree(r / label) for label in STEPS],
        r"holds no sequences; expected root/label/",
    ),
    "few of a label": (
        "png",
        lambda r: [shutil.rmtree(r / f"left/{i}") for i in (0, 1)],
        r"left: expected at least three .* got 2",
    ),
    "both depths": (
        "png",
        lambda r: shutil.copytree(r / "left/0", r / "one"),
        r"one is a sequence, and left none; put all",
    ),
    "no root": ("png", shutil.rmtree, r"data\.root='.*': there is no such folder"),
    "numbers that are no times": (
        "png",
        lambda r: (r / FRAME).rename(r / "left/2/frame_50.png"),
        r"left/2: the numbers in the names",
    ),
    "a hostile NPY": ("npy", lambda r: pickled(r / "left/2/1.npy"), r"1\.npy: cannot be read .*Python objects"),
    "an NPY of integers": (
        "npy",
        lambda r: np.save(r / "left/2/1.npy", np.zeros((3, 8, 12), int)),
        "expected uint8 frames",
    ),
    "an NPY with NaN": (
        "npy",
        lambda r: np.save(r / "left/2/1.npy", np.full((3, 8, 12), np.nan)),
        r"frames in \[0, 1\]",
    ),
    "an NPZ that is none": (
        "npz",
        lambda r: (r / SEQUENCE).write_bytes(b"no zip"),
        r"2\.npz: cannot be read as frames",
    ),
    "an NPZ of two arrays": (
        "npz",
        lambda r: zipped(r / SEQUENCE, a=moving(0, 1), b=moving(0, 1)),
        "expected one array, or one called",
    ),
    "an NPZ of one frame": ("npz", lambda r: zipped(r / SEQUENCE, frames=square(1)), r"2\.npz: "),
    "a hostile NPZ": (
        "npz",
        lambda r: zipped(r / SEQUENCE, frames=np.full((4, 8, 12, 3), print, dtype=object)),
        r"2\.npz: cannot be read as frames \(.*pickle",
    ),
    "a GIF that is cut": (
        "gif",
        lambda r: [(r / "left/2.gif").write_bytes(b"GIF89a")],
        r"2\.gif: cannot be read as frames",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_is_one_clear_line(what, tmp_path, monkeypatch, capsys) -> None:
    kind, spoil, message = UNFIT[what]
    monkeypatch.chdir(tmp_path)
    root = write(tmp_path / "mine", kind, count=4)
    spoil(root)
    assert cli.main(["fit", "--config", "folder", "--data.root", "mine", *TINY, "--data.batch_size", "64"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert "Traceback" not in error


TIMES = {
    "no such columns": ("frame;time\nframe_0.png;0", r"times\.csv: expected the columns frame,time, got frame;time"),
    "a column short": ("frame,time\nframe_0.png", r"line 2: expected 2 values, as in the first line"),
    "no number": (
        "frame,time\nframe_0.png,0\nframe_1.png,soon",
        r"line 3: expected a finite time in frames, got 'soon'",
    ),
    "NaN": ("frame,time\nframe_0.png,nan", r"line 2: expected a finite time in frames, got 'nan'"),
    "unsorted": ("frame,time\nframe_0.png,1\nframe_1.png,0", r"line 3: expected times that increase, got 0 after 1"),
    "equal": ("frame,time\nframe_0.png,0\nframe_1.png,0", r"line 3: expected times that increase, got 0 after 0"),
    "no such frame": (
        "frame,time\nframe_0.png,0\nframe1.png,1",
        r"left/2 has no frame 'frame1\.png'\. Did you mean 'frame_1",
    ),
    "twice": ("frame,time\nframe_0.png,0\nframe_0.png,1", r"line 3: frame 'frame_0\.png' comes twice"),
    "too few": ("frame,time\nframe_0.png,0\nframe_1.png,1", r"has no time for frame 'frame_2\.png' of left/2"),
    "none": ("frame,time\n", r"has no time for frame 'frame_0\.png' of left/2"),
    "no first": ("frame,time\n,0\nframe_0.png,1", r"line 2: the first frame of left/2 is missing"),
    "no text": (b"\xff\xfe\x00", r"times\.csv: cannot be read"),
}


@pytest.mark.parametrize("what", TIMES)
def test_times_that_do_not_fit(what, tmp_path) -> None:
    content, message = TIMES[what]
    root = write(tmp_path, count=3)
    (root / "left/2/times.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(cflow.DataError, match=message) as caught:
        SequenceFolder(root)
    assert "\n" not in str(caught.value)


def test_times_of_all_sequences_that_do_not_fit(tmp_path) -> None:
    root = write(tmp_path, "gif", count=3)
    (root / "times.csv").write_text("sequence,frame,time\nleft/0,0,0\n")
    with pytest.raises(cflow.DataError, match=r"line 2: there is no sequence 'left/0'\. Did you mean 'left/0\.gif'"):
        SequenceFolder(root)
    rows = [f"{label}/{i}.gif,{t},{40 * t}" for label in STEPS for i in range(3) for t in range(4)]
    (root / "times.csv").write_text("\n".join(["sequence,frame,time", *rows]))
    shutil.copy(root / "times.csv", root / "left")
    with pytest.raises(cflow.DataError, match=r"left/times\.csv: belongs into the folder of one sequence, or into"):
        SequenceFolder(root)
    (root / "left/times.csv").unlink()
    with pytest.raises(cflow.DataError, match=r"usual time from frame to frame is 40 in times\.csv.*divide them by 40"):
        SequenceFolder(root)


def test_numbers_in_names_are_times() -> None:
    slots = frame_times.numbered({"a": [10, 20, 40], "b": [3, 13]})
    assert slots["a"] == frame_times.Slots([0.0, 1.0, 2.0, 3.0], [0, 1, -1, 2])
    assert slots["b"] == frame_times.Slots([0.0, 1.0], [0, 1])
    for numbers in ([0, 2, 5], [0, 1, 9]):
        with pytest.raises(cflow.DataError, match=r"are no times of 3 frames in steps of"):
            frame_times.numbered({"a": numbers})
    assert frame_times.numbers_in(["a1.png", "b2.png"]) is None
    assert frame_times.numbers_in(["a1.png", "a1.jpg"]) is None


def test_size_and_number_of_frames_on_request(tmp_path) -> None:
    root = write(tmp_path / "mine", "png", count=3)
    Image.fromarray(square(1, height=16, width=24)).save(root / "left/2/frame_1.png")
    folder = SequenceFolder(root, num_frames=3, resize=6)
    assert (folder.image_shape, folder.num_frames) == ((3, 6, 6), 3)
    for part in ("train", "val", "test"):
        assert whole(folder.split(part))[0].shape == (2, 3, 3, 6, 6)
    assert SequenceFolder(root, resize=[4, 6]).image_shape == (3, 4, 6)
    constant = torch.full((2, 3, 8, 12), 200, dtype=torch.uint8)
    assert torch.equal(frame_files.resized(constant, (4, 5)), torch.full((2, 3, 4, 5), 200, dtype=torch.uint8))
    for wrong in (0, [4], "big", [4, -1]):
        with pytest.raises(cflow.ArgumentError, match=r"^data\.resize"):
            SequenceFolder(root, resize=wrong)
    for wrong, message in (({"num_frames": 1}, r"data\.num_frames=1"),):
        with pytest.raises(cflow.ArgumentError, match=message):
            SequenceFolder(root, **wrong)
    with pytest.raises(cflow.ArgumentError, match=r"^data\.resize: data\.dataset=digits has no such setting"):
        SequenceDataModule(resize=3)
    with pytest.raises(cflow.ArgumentError, match=r"^data\.transformations: data\.dataset=folder has no such setting"):
        SequenceDataModule("folder", str(root), transformations="hue")


def test_images_of_all_modes_are_bytes(tmp_path) -> None:
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12)
    for name, array, mode in (("l", grey, "L"), ("deep", grey.astype(np.uint16) * 257, "I;16")):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.mode == mode
        assert torch.equal(frame_files.read_still(tmp_path / f"{name}.png")[0], torch.from_numpy(grey))
    clear = np.concatenate([square(2), np.zeros((8, 12, 1), np.uint8)], -1)
    clear[3, 3, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert frame_files.read_still(tmp_path / "clear.png").sum() == 3 * 255
    for shape, wanted in (((8, 12), (1, 8, 12)), ((8, 12, 3), (3, 8, 12)), ((1, 8, 12), (1, 8, 12))):
        np.save(tmp_path / "a.npy", np.ones(shape, bool))
        assert frame_files.still_shape(tmp_path / "a.npy") == wanted
        assert frame_files.read_still(tmp_path / "a.npy").unique().tolist() == [255]


def test_a_worker_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for path in write(tmp_path / "mine").rglob("frame_1.png"):
        cut(path)  # the header is whole
    assert cli.main(["fit", "--config", "folder", "--data.root", "mine", *TINY, "--data.num_workers", "1"]) == 2
    error = capsys.readouterr().err
    assert re.match(r"cflow: error: \S*frame_1\.png: cannot be read as frames \(.*\); mend or remove it\n$", error), (
        error
    )


def test_a_film_without_pyav_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a").mkdir()
    small_film(tmp_path / "a/b.mp4")
    with pytest.raises(
        cflow.errors.DependencyError, match=r"b\.mp4: films need PyAV; pip install 'cflow-torch\[video\]'"
    ):
        SequenceFolder(tmp_path)


# --- stills -------------------------------------------------------------------------------------------------


def stills(root, count=12, channels=3):
    (root / "some").mkdir(parents=True)
    for i in range(count):
        frame = square(i % 9)
        Image.fromarray(frame if channels == 3 else frame[..., 0]).save(root / ("some" if i % 2 else ".") / f"{i}.png")
    return root


OWN = """
import torch

def shifted(x, t):
    return x * torch.exp(-0.1 * t)[:, None, None, None]

MINE = {"darker": shifted}
"""


@pytest.mark.ci
def test_stills_of_ones_own_train(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    stills(tmp_path / "mine")
    Path("own.py").write_text(OWN)
    words = ["fit", "--data.dataset", "images", "--data.root", "mine", *TINY]
    for number, (given, names) in enumerate(
        {"rotation,shear": ["rotation", "shear"], "[blur]": ["blur"], "own.py:MINE": ["darker"]}.items()
    ):
        assert cli.main([*words, "--data.transformations", given]) == 0
        run = Path(f"runs/digits/version_{number}")
        metrics = json.loads((run / "metrics.json").read_text())
        assert [key.split("/")[1] for key in metrics if key.startswith("copy_input/")] == [*names, "mean"]
        stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["cflow_config"]["data"]
        assert ("transformations" in stored) == (names != ["darker"])
        again = ["test", "--ckpt_path", str(run), "--trainer.accelerator", "cpu", "--out_dir", "again"]
        capsys.readouterr()
        if names == ["darker"]:  # a checkpoint does not say which file is run
            assert cli.main(again) == 2
            assert "the checkpoint knows darker, but the data are of" in capsys.readouterr().err
            again += ["--data.transformations", given]
        assert cli.main(again) == 0
        assert json.loads(Path("again/metrics.json").read_text()) == metrics


def test_a_checkpoint_names_transformations_of_the_library_only() -> None:
    for given, kept in (
        ("hue, blur", {"transformations": "hue,blur"}),
        (["hue", "blur"], {"transformations": "hue,blur"}),
        ("evil.py:NAMES", {}),
        (["hue", "evil.py:NAMES"], {}),
        ({"class_path": "subprocess.Popen"}, {}),
        (None, {}),
    ):
        assert runs.storable({"data": {"transformations": given}})["data"] == kept


def test_stills_are_split_once_and_for_all(tmp_path) -> None:
    images = ImageFolder(stills(tmp_path, count=30), num_frames=3)
    parts = {name: images.split(name) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 24, "val": 3, "test": 3}
    assert images.names == ("scaling", "rotation", "hue")
    assert images.paths[3].name == "6.png"  # natural order, folders after files
    other = ImageFolder(tmp_path, num_frames=3).split("test")
    assert torch.equal(other.images, parts["test"].images)
    assert parts["test"].images.dtype == torch.uint8


def test_stills_that_do_not_fit(tmp_path) -> None:
    root = stills(tmp_path / "mine", channels=1)
    assert ImageFolder(root).names == ("scaling", "rotation")
    with pytest.raises(cflow.ArgumentError, match="hue needs RGB"):
        ImageFolder(root, "hue")
    Image.fromarray(square(1, width=13)[..., 0]).save(root / "5.png")
    with pytest.raises(cflow.DataError, match=r"5\.png: is 8×13, but 0\.png 8×12"):
        [ImageFolder(root).split(name) for name in ("train", "val", "test")]
    assert ImageFolder(root, resize=(8, 12)).split("train").image_shape == (1, 8, 12)
    (tmp_path / "none").mkdir()
    with pytest.raises(cflow.DataError, match=r"expected at least three images .* got 0"):
        ImageFolder(tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rotatoin", r"^data\.transformations: expected some of scaling, .*, got 'rotatoin'\. Did you mean 'rotation'"),
        ("hue,hue", "expected each name once"),
        ([], "expected names such as"),
        ({"a": 3}, "expected a dict name → function"),
        ("none.py:A", "there is no file none"),
        ("fails.py:A", r"fails with ZeroDivisionError: division by zero"),
        ("own.py:MIEN", r"own\.py has no 'MIEN'\. Did you mean 'MINE'"),
        ("own.py:torch", r"^data\.transformations=own\.py:torch: expected names such as"),
    ],
)
def test_transformations_that_are_none(given, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("fails.py").write_text("1 / 0")
    with pytest.raises(cflow.CflowError, match=message):
        cflow.data.as_transformations(given)
