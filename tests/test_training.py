"""The LightningModule and the DataModule."""

import contextlib
import dataclasses
import fcntl
import math
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise

import numpy as np
import pytest
import torch

import cflow
from cflow import composition, metrics
from cflow.composition import together
from cflow.data import Sequences, make_sequence
from cflow.data.digits import load_digits

pl = pytest.importorskip("pytorch_lightning")

from cflow.training import module as module_file  # noqa: E402
from cflow.training import progress, results  # noqa: E402
from cflow.training.batches import Drawn, Stream, draw_frames, draw_starts, mixed  # noqa: E402
from cflow.training.checkpoints import checkpoint_callbacks  # noqa: E402
from cflow.training.datamodule import SequenceDataModule  # noqa: E402
from cflow.training.module import FlowVAEModule  # noqa: E402
from cflow.training.schedules import learning_rate_factor  # noqa: E402

# Lightning's use of PyTorch's pytree, and its advice on workers, loggers and short epochs.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # models this small gain nothing from more
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
]

SMALL = {"latent_dim": 4, "width": 16, "likelihood_samples": 0}


def trainer(tmp_path, **settings):
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**(defaults | settings))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_random_frames_are_an_unbiased_sum_over_all(count) -> None:
    times = torch.arange(9.0)
    value = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0])  # any function of the frame
    torch.manual_seed(0)
    t, mask = draw_frames(times, 200_000, count)
    assert t.shape == (200_000, count + 1)
    assert mask is not None
    assert (t.diff(dim=1) >= 0).all()
    assert (t[:, 0] == 0).all()
    estimate = (value[t.long()] * mask).sum(1)
    assert estimate.mean() == pytest.approx(value.sum().item(), abs=4 * estimate.std().item() / math.sqrt(200_000))
    # every frame is drawn with probability 1 / (its weight)
    drawn = torch.stack([((t[:, 1:] == time) * mask[:, 1:]).sum(1).mean() for time in times])
    torch.testing.assert_close(drawn, torch.ones(9), atol=0.05, rtol=0)


def test_all_frames_need_no_mask() -> None:
    t, mask = draw_frames(torch.arange(9.0), 4, 9)
    assert mask is None
    assert t.shape == (9,)


def test_learning_rate_rises_and_anneals() -> None:
    rates = [learning_rate_factor(step, 100, "cosine", 10) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a <= b for a, b in pairwise(rates[:11]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert [learning_rate_factor(step, math.inf, "constant", 10) for step in (9, 10, 70)] == [10 / 11, 1.0, 1.0]


def test_a_fit_learns_and_its_weights_load_without_lightning(tmp_path) -> None:
    pl.seed_everything(0, verbose=False)
    module, data = FlowVAEModule(**SMALL), SequenceDataModule(val_samples=32)
    fit = trainer(tmp_path, max_steps=40, limit_val_batches=1, num_sanity_val_steps=1)
    fit.fit(module, data)
    first = fit.callback_metrics["val/equivariance_error"]
    assert torch.isfinite(first)
    path = tmp_path / "model.ckpt"
    fit.save_checkpoint(path)
    vae = cflow.load(path)
    x = load_digits("test")[:3] / 255
    module.eval()
    torch.testing.assert_close(vae.traverse(x, 1, [0, 4]), module.vae.traverse(x, 1, [0, 4]))
    stored = torch.load(path, weights_only=True)["hyper_parameters"]["model_config"]
    assert stored == dataclasses.asdict(module.config)


def test_a_training_step_weights_its_random_frames(tmp_path, monkeypatch) -> None:
    module, data, seen = FlowVAEModule(**SMALL, frames_per_step=2), SequenceDataModule(num_frames=5), []
    elbo = module.vae.elbo

    def recorded(x, k=None, t=None, mask=None, **more):
        seen.append((x, k, t, mask))
        return elbo(x, k, t, mask, **more)

    monkeypatch.setattr(module.vae, "elbo", recorded)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    x, k, t, mask = seen[0]
    assert torch.equal(mask, torch.tensor([0.0, 3.0, 2.0]).expand(96, 3))  # the input, and one frame of either stretch
    assert k.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(x, data.source.frames(x[:, 0], k, t), atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_errors_are_those_of_the_images_held_out_for_them(split, tmp_path) -> None:
    module = FlowVAEModule(**SMALL)
    data = SequenceDataModule(val_samples=20, test_samples=20, batch_size=8, num_frames=3)  # batches of 8, 8 and 4
    measure = trainer(tmp_path).validate if split == "val" else trainer(tmp_path).test
    found = measure(module, data, verbose=False)[0]
    x0, model = load_digits(split)[:20] / 255, module.vae.eval()
    wanted, copied = {}, {}
    for k, name in enumerate(data.source.names):
        x = make_sequence(x0, k, data.source.times)
        wanted[f"equivariance_error/{name}"] = metrics.equivariance_error(model, x, k).sum(0).mean().item()
        copied[f"copy_input/{name}"] = metrics.copy_input(x).sum(0).mean().item()
    if split == "val":
        assert found["val/equivariance_error"] == pytest.approx(sum(wanted.values()) / 3, rel=1e-4)
        return
    wanted |= copied | {"reconstruction_l1": metrics.reconstruction_l1(model, x0).mean().item()}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


class Scores(pl.LightningModule):
    """Validation errors 3, 1, 2 after the steps 1, 2, 3."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return self.w.square()

    def validation_step(self, batch, batch_idx):
        self.log("val/equivariance_error", [3.0, 1.0, 2.0][self.global_step - 1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_best_checkpoint_has_the_smallest_error_and_the_last_one_all_steps(tmp_path) -> None:
    settings = {"max_steps": 3, "val_check_interval": 1, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    loader = torch.utils.data.DataLoader(torch.zeros(3))
    callbacks = checkpoint_callbacks(tmp_path, "val/equivariance_error")
    trainer(tmp_path, callbacks=callbacks, **settings).fit(Scores(), loader, loader)
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in tmp_path.glob("*.ckpt")}
    assert steps == {"best.ckpt": 2, "last.ckpt": 3}


def test_pictures_are_of_test_images_each_row_along_its_own_flow(tmp_path, monkeypatch) -> None:
    module, data, drawn = FlowVAEModule(**SMALL), SequenceDataModule(num_frames=4), []
    monkeypatch.setattr(
        results, "traversal_animation", lambda path, **given: drawn.append([*given.values()][:3]) or path.touch()
    )
    written = results.draw(module, data, tmp_path, torch.device("cpu"), num_samples=2)
    assert [path.name for path in written] == ["traversals.png", "traversals.gif", "traversals.webp"]
    (true, made, _), _ = drawn
    assert true.shape == made.shape == (3, 2, 4, 3, 28, 28)
    test = load_digits("test") / 255
    shown = torch.cdist(true[:, :, 0].flatten(2), test.flatten(1))
    assert shown.amin(-1).max() < 0.01  # 0 but for rounding
    index = shown.argmin(-1)
    assert index.unique().numel() == 6
    for k in range(3):
        x0 = test[index[k]]
        torch.testing.assert_close(true[k], make_sequence(x0, k, data.source.times))
        torch.testing.assert_close(made[k], module.vae.traverse(x0, k, data.source.times).transpose(0, 1))


def test_the_table_compares_with_the_best_trivial_answer() -> None:
    errors = {"equivariance_error/hue": 80.0, "copy_input/hue": 400.0, "black/hue": 160.0, "no_flow/hue": 200.0}
    assert results.table(errors).splitlines()[1].split() == ["hue", "80.0", "400.0", "160.0", "200.0", "2.00"]
    header, row, *_ = results.table(errors | {"not_gradient/hue": 0.314, "mean_square/gradient/hue": 1.0}).splitlines()
    assert (header[-12:], row[-12:].strip()) == ("not gradient", "0.31")
    assert len(header) <= 100


def test_fits_with_the_same_seed_are_equal(tmp_path) -> None:
    weights = []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        module = FlowVAEModule(**SMALL)
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, SequenceDataModule())
        weights.append(torch.nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*weights)


def test_a_fit_without_an_end_in_steps_needs_a_constant_rate(tmp_path) -> None:
    limits = {"max_time": {"seconds": 1}, "max_epochs": -1, "limit_val_batches": 0}
    with pytest.raises(cflow.ArgumentError, match=r"give trainer\.max_steps"):
        trainer(tmp_path, **limits).fit(FlowVAEModule(**SMALL), SequenceDataModule())
    trainer(tmp_path, **limits).fit(FlowVAEModule(**SMALL, schedule="constant"), SequenceDataModule())


def test_without_a_terminal_a_line_comes_at_least_every_few_seconds(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress.FitProgress, "LINE", 0.0)
    said = progress.FitProgress("there")
    settings = {"max_steps": 3, "limit_val_batches": 0, "enable_progress_bar": True}
    trainer(tmp_path, callbacks=[said], **settings).fit(FlowVAEModule(**SMALL), SequenceDataModule())
    lines = capsys.readouterr().out.splitlines()
    first = "training scaling, rotation, hue of 1,257 Digits: ridge potentials, D=4, 0.1 M weights; 3 steps on cpu "
    assert lines[0] == first + "(1 thread); writes there"
    assert [line.split(",")[0] for line in lines[1:]] == [f"step {step} of 3" for step in (1, 2, 3)]
    assert all(re.search(r"loss -?\d", line) for line in lines[1:])


def test_a_long_test_says_how_far_it_is(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress.FitProgress, "LINE", 0.0)
    data = SequenceDataModule(test_samples=20, batch_size=8, num_frames=3)
    test = trainer(tmp_path, callbacks=[progress.FitProgress()], enable_progress_bar=True)
    test.test(FlowVAEModule(**SMALL), data, verbose=False)
    assert capsys.readouterr().out.splitlines() == [f"testing, batch {n} of 3" for n in (1, 2, 3)]


@pytest.mark.ci
def test_bars_need_a_terminal_with_rows_and_columns() -> None:
    """The same process on terminals of several sizes: what it writes to is what counts."""
    clean = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    sizes = [(24, 80), (0, 0), (24, 0), (24, 20)]
    theirs = [pty.openpty()[1] for _ in sizes]
    for descriptor, (rows, columns) in zip(theirs, sizes, strict=True):
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    code = (
        "import os, sys\n"
        "from cflow.training.progress import draws_bars\n"
        "found = [(os.dup2(int(n), 1), draws_bars())[1] for n in sys.argv[1:]]\n"
        "print(found, file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", code, *map(str, theirs)]
    done = subprocess.run(words, pass_fds=theirs, env=clean, check=True, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "[True, False, False, False]\n"


class Stopped(pl.Callback):
    """Interrupts a fit before some step, as Ctrl-C does, and has it saved."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.ci)])
def test_a_fit_that_goes_on_is_the_one_that_was_never_interrupted(tmp_path, num_workers) -> None:
    """Bit for bit, with a rate that falls to the end, noise in the model, and a validation only one of the two has."""
    settings = {"max_steps": 24, "limit_val_batches": 1, "check_val_every_n_epoch": None}

    def fit(seed, ckpt_path=None, **more):
        pl.seed_everything(seed, verbose=False)
        module = FlowVAEModule(**SMALL)
        module.vae.decoder.body.insert(1, torch.nn.Dropout(0.2))
        data = SequenceDataModule(val_samples=32, num_workers=num_workers)
        with contextlib.suppress(SystemExit):
            trainer(tmp_path, **(settings | more)).fit(module, data, ckpt_path=ckpt_path)
        random_numbers = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
        return torch.nn.utils.parameters_to_vector(module.parameters()), random_numbers

    path = tmp_path / "stopped.ckpt"
    whole, numbers = fit(7, val_check_interval=20)
    fit(7, val_check_interval=10, callbacks=[Stopped(17, path)])
    again, numbers_again = fit(99, ckpt_path=path, val_check_interval=20)
    assert torch.load(path, weights_only=True)["global_step"] == 17
    assert torch.equal(whole, again)
    assert numbers == numbers_again


def test_processes_share_a_batch() -> None:
    whole = Stream(50, 8, seed=3, start=lambda: 0)
    parts = [Stream(50, 4, seed=3, start=lambda: 0, rank=rank, world_size=2) for rank in range(2)]
    for number in range(20):
        assert whole.batch(number) == parts[0].batch(number) + parts[1].batch(number)
    assert len(whole) == len(parts[0]) == 7
    first = [thing for number in range(7) for thing in whole.batch(number)]
    assert sorted(first[:50]) == list(range(50))
    assert first[:50] != list(range(50))
    assert sorted(first[50:] + [thing for n in range(7, 13) for thing in whole.batch(n)][:44]) == list(range(50))


def test_draws_follow_from_the_number_of_the_batch() -> None:
    source = SequenceDataModule().source.split("train")
    drawn = Drawn(source, 2, seed=5)
    a, b, c = (drawn.__getitems__([(number, thing) for thing in range(8)]) for number in (3, 3, 4))
    assert torch.equal(a.t, b.t)
    assert torch.equal(a.k, b.k)
    assert not torch.equal(a.t, c.t)
    assert torch.equal(a.stored, c.stored)
    other = Drawn(source, 2, seed=5, rank=1).__getitems__([(3, thing) for thing in range(8)])
    assert not torch.equal(a.t, other.t)
    assert len({mixed(seed, number) for seed in range(30) for number in range(30)}) == 900


class Counting(Sequences):
    """Ten numbers, each a grey level; a sequence counts up or down. What lies in files: `read` does all the work."""

    names, image_shape, num_frames = ("up", "down"), (1, 4, 4), 5

    def split(self, name):
        return self

    def __len__(self):
        return 10

    def read(self, index, k, t):
        t = t.expand(len(index), -1)
        level = index[:, None] + torch.where(k[:, None] == 0, t, -t)
        return (level + 20)[:, :, None, None, None].expand(-1, -1, 1, 4, 4).byte()

    def frames(self, stored, k, t):
        return stored.float() / 255


def test_a_set_of_sequences_of_ones_own_is_trained_on(tmp_path) -> None:
    data = SequenceDataModule(source=Counting(), batch_size=4, num_workers=1)
    module = FlowVAEModule(**SMALL, image_shape=data.image_shape, num_flows=2)
    fit = trainer(tmp_path, max_steps=3, limit_val_batches=1)
    fit.fit(module, data)
    assert fit.global_step == 3
    numbers = fit.test(module, data, verbose=False)[0]
    # copying 20 … 29 against what counts up by 1, 2, 3, 4: 10 levels of 16 pixels in all
    assert numbers["copy_input/up"] == pytest.approx(10 * 16 / 255, rel=1e-4)
    figures = results.draw(module, data, tmp_path, torch.device("cpu"), num_samples=2)
    assert all(path.is_file() for path in figures)


def test_data_that_cannot_be_composed_shows_its_input(tmp_path, monkeypatch) -> None:
    data, drawn = SequenceDataModule(source=Counting()), []
    module = FlowVAEModule(**SMALL, image_shape=data.image_shape, num_flows=2)
    monkeypatch.setattr(
        results, "traversal_animation", lambda path, **given: drawn.append([*given.values()][:3]) or path.touch()
    )

    def draw(t):
        results.draw(module, data, tmp_path, torch.device("cpu"), 2, [together([0, 1], 2)], torch.tensor(t), "both")

    draw([0.0, 1.5, 3.0])
    true, made, titles = drawn[0]
    assert true.shape == (1, 2, 1, 1, 4, 4)
    assert made.shape == (1, 2, 3, 1, 4, 4)
    assert titles == ["up + down"]
    torch.testing.assert_close(true[0, :, 0, 0, 0, 0] * 255, torch.tensor([20.0, 29.0]))
    both = module.vae.traverse(true[0, :, 0], torch.tensor([1.0, 1.0]), [0.0, 1.5, 3.0])
    torch.testing.assert_close(made[0], both.transpose(0, 1))
    with pytest.raises(cflow.ArgumentError, match=r"^--times: Counting cannot render what is composed; begin with"):
        draw([1.0, 2.0])
    with pytest.raises(cflow.ArgumentError, match=r"^data\.random_starts: Counting holds no images"):
        SequenceDataModule(source=Counting(), random_starts=True)


def test_compositions_are_measured_on_the_first_held_out_things(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module_file, "COMPOSED_THINGS", 7)
    module, data = FlowVAEModule(**SMALL), SequenceDataModule(batch_size=5, test_samples=12)
    numbers = trainer(tmp_path).test(module, data, verbose=False)[0]
    errors = composition.errors(module.vae.eval(), load_digits("test")[:7] / 255, data.source.transformations)
    measured = {key.removeprefix("composition/"): value for key, value in numbers.items() if "composition/" in key}
    assert measured == pytest.approx({name: error.mean().item() for name, error in errors.items()}, rel=1e-4)


def test_random_starts_begin_with_what_others_have_done() -> None:
    t = torch.arange(9.0)
    k = torch.arange(3).repeat(20_000)
    stretched, start = draw_starts(t, k, 3, 8.0, torch.Generator().manual_seed(0))
    rows = torch.arange(len(k))
    assert start.min() == 0
    assert 7.9 < start.max() <= 8
    assert start[rows, k].max() == 0
    others = torch.ones_like(start, dtype=torch.bool).index_put_((rows, k), torch.tensor(False))
    assert (start[others] > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert start[others][start[others] > 0].mean() == pytest.approx(4.0, abs=0.05)
    plain = (stretched == t).all(1)
    assert plain.float().mean() == pytest.approx(0.5, abs=0.01)
    assert stretched.min() >= 0
    assert stretched.max() <= 8
    ends = stretched[~plain][:, [0, -1]]
    assert (ends[:, 1] > ends[:, 0]).float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(ends.T)[0, 1].abs() < 0.02
    torch.testing.assert_close(stretched, torch.lerp(stretched[:, :1], stretched[:, -1:], t / 8))
    own = draw_starts(torch.tensor([[0.0, 2.0], [0.0, 5.0]]), torch.tensor([0, 2]), 3, 8.0)[0]
    assert own.shape == (2, 2)


def test_a_step_with_random_starts_sees_them(tmp_path, monkeypatch) -> None:
    module, data, seen = FlowVAEModule(**SMALL), SequenceDataModule(batch_size=6, random_starts=True), []
    monkeypatch.setattr(module.vae, "elbo", lambda *given, **more: seen.append(given) or elbo(*given, **more))
    elbo = cflow.FlowVAE.elbo.__get__(module.vae)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    x, k, t, mask = seen[0]
    train = data.source.split("train")
    stream = Stream(len(train), 6, seed=module.seed, start=lambda: 0)
    index = stream.batch(0)
    batch = Drawn(train, 2, module.seed, random_starts=True).__getitems__([(0, thing) for thing in index])
    functions = list(cflow.data.PAPER.values())
    assert (batch.start > 0).any()
    for i in range(6):
        still = load_digits("train")[index[i]][None] / 255
        for function, amount in zip(functions, batch.start[i], strict=True):
            if amount:
                still = function(still, amount)
        for frame in range(3):
            wanted = functions[k[i]](still, t[i, frame])[0]
            torch.testing.assert_close(x[i, frame], wanted, rtol=0, atol=1e-5)
    assert torch.equal(mask, batch.mask)
    plain = Drawn(train, 2, module.seed).__getitems__([(0, thing) for thing in index])
    assert plain.start is None
    assert torch.equal(plain.k, batch.k)
    assert not torch.equal(plain.t, batch.t)


def test_batches_are_what_is_stored() -> None:
    data = SequenceDataModule(batch_size=50, val_samples=70)
    first, second = data.val_dataloader()
    assert first.stored.shape == (150, 3, 28, 28)
    assert len(second.stored) == 60
    assert first.stored.dtype == torch.uint8
    assert torch.equal(first.stored[50:100], load_digits("val")[:50])
    assert first.k.tolist() == [0] * 50 + [1] * 50 + [2] * 50


def test_own_transformations_are_followed() -> None:
    names = {"flip": lambda x, t: torch.where(t.view(-1, 1, 1, 1) > 0, x.flip(-1), x)}
    data = SequenceDataModule(num_frames=3, transformations=names)
    frames = data.source.split("test").sequences(torch.arange(2), torch.zeros(2, dtype=torch.long), data.source.times)
    assert frames.shape == (2, 3, 3, 28, 28)
    torch.testing.assert_close(frames[:, 2], load_digits("test")[:2].flip(-1) / 255)
    with pytest.raises(cflow.ArgumentError, match=r"set model\.num_flows=1"):
        trainer("", max_steps=1).fit(FlowVAEModule(**SMALL), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"num_frames": 1}, "data.num_frames=1"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        (
            {"dataset": "mist"},
            "data.dataset='mist': expected one of digits, mnist, shapes3d, falcor3d, isaac3d, dsprites, images",
        ),
    ],
)
def test_data_refuses_impossible_numbers(settings, message) -> None:
    with pytest.raises(cflow.ArgumentError, match=re.escape(message)):
        SequenceDataModule(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "model.lr=0.0"),
        ({"warmup_steps": -1}, "model.warmup_steps=-1"),
        ({"frames_per_step": 0}, "frames_per_step=0"),
    ],
)
def test_module_refuses_impossible_numbers(settings, message) -> None:
    with pytest.raises(cflow.ArgumentError, match=message):
        FlowVAEModule(**SMALL, **settings)


def test_results_go_where_asked_else_into_the_run_else_here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "version_0"
    for out_dir, checkpoint, wanted in (
        ("mine", run / "checkpoints" / "last.ckpt", tmp_path / "mine"),
        (None, str(run / "checkpoints" / "last.ckpt"), run),
        (None, None, tmp_path),
    ):
        assert results.output_folder(out_dir, checkpoint).resolve() == wanted
        assert wanted.is_dir()
