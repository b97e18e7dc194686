"""The LightningModule and the DataModule."""

import math
from itertools import pairwise

import pytest
import torch

import cflow
from cflow import metrics
from cflow.data import make_sequence
from cflow.data.digits import load_digits

pl = pytest.importorskip("pytorch_lightning")

from cflow.training import results  # noqa: E402
from cflow.training.callbacks import checkpoint_callbacks  # noqa: E402
from cflow.training.datamodule import SequenceDataModule  # noqa: E402
from cflow.training.module import FlowVAEModule, draw_frames, learning_rate_factor  # noqa: E402
from cflow.training.threads import FasterThreads  # noqa: E402

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
    rates = [learning_rate_factor(done / 100, "cosine", 0.1) for done in range(101)]
    assert 0 < rates[0] < 0.05
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a <= b for a, b in pairwise(rates[:11]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate_factor(0.7, "constant", 0.1) == 1.0


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
    x = data.to_float(data.examples(3, torch.device("cpu")))
    module.eval()
    torch.testing.assert_close(vae.traverse(x, 1, [0, 4]), module.vae.traverse(x, 1, [0, 4]))
    stored = torch.load(path, weights_only=True)["hyper_parameters"]["model_config"]
    assert stored == module.model_config


def test_a_training_step_weights_its_random_frames(tmp_path, monkeypatch) -> None:
    module, data, seen = FlowVAEModule(**SMALL, frames_per_step=2), SequenceDataModule(num_frames=5), []
    elbo = module.vae.elbo

    def recorded(x, k=None, t=None, mask=None, context=None):
        seen.append((x, k, t, mask))
        return elbo(x, k, t, mask, context)

    monkeypatch.setattr(module.vae, "elbo", recorded)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    x, k, t, mask = seen[0]
    assert torch.equal(mask, torch.tensor([0.0, 3.0, 2.0]).expand(96, 3))  # the input, and one frame of either stretch
    assert k.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(x, data.sequences(x[:, 0], k, t), atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_errors_are_those_of_the_images_held_out_for_them(split, tmp_path) -> None:
    module = FlowVAEModule(**SMALL)
    data = SequenceDataModule(val_samples=20, test_samples=20, batch_size=8, num_frames=3)  # batches of 8, 8 and 4
    measure = trainer(tmp_path).validate if split == "val" else trainer(tmp_path).test
    found = measure(module, data, verbose=False)[0]
    x0, model = data.to_float(load_digits(split)[:20]), module.vae.eval()
    wanted, copied = {}, {}
    for k, name in enumerate(data.transformations):
        x = make_sequence(x0, k, data.times)
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
    trainer(tmp_path, callbacks=checkpoint_callbacks(tmp_path), **settings).fit(Scores(), loader, loader)
    steps = {p.name: torch.load(p, weights_only=True)["global_step"] for p in tmp_path.glob("*.ckpt")}
    assert steps == {"best.ckpt": 2, "last.ckpt": 3}


def test_pictures_are_of_test_images_each_row_along_its_own_flow(tmp_path, monkeypatch) -> None:
    module, data, drawn = FlowVAEModule(**SMALL), SequenceDataModule(num_frames=4), []
    monkeypatch.setattr(results, "traversal_gif", lambda path, *frames: drawn.extend(frames[:2]) or path)
    results.draw(module, data, tmp_path, torch.device("cpu"), num_samples=2)
    true, made = drawn
    assert true.shape == made.shape == (3, 2, 4, 3, 28, 28)
    test = data.to_float(load_digits("test"))
    shown = torch.cdist(true[:, :, 0].flatten(2), test.flatten(1))
    assert shown.amin(-1).max() < 0.01  # 0 but for rounding
    index = shown.argmin(-1)
    assert index.unique().numel() == 6
    for k in range(3):
        x0 = test[index[k]]
        torch.testing.assert_close(true[k], make_sequence(x0, k, data.times))
        torch.testing.assert_close(made[k], module.vae.traverse(x0, k, data.times).transpose(0, 1))


def test_the_table_compares_with_the_best_trivial_answer() -> None:
    errors = {"equivariance_error/hue": 80.0, "copy_input/hue": 400.0, "black/hue": 160.0, "no_flow/hue": 200.0}
    assert results.table(errors).splitlines()[1].split() == ["hue", "80.0", "400.0", "160.0", "200.0", "2.00"]


def test_fits_with_the_same_seed_are_equal(tmp_path) -> None:
    weights = []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        module = FlowVAEModule(**SMALL)
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, SequenceDataModule())
        weights.append(torch.nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*weights)


def test_the_schedule_follows_the_time_where_time_ends_the_fit(tmp_path) -> None:
    class Rates(pl.Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    module = FlowVAEModule(**SMALL, lr=1e-3)
    limits = {"max_time": {"seconds": 2}, "max_epochs": -1, "limit_val_batches": 0}
    trainer(tmp_path, callbacks=[rates], **limits).fit(module, SequenceDataModule())
    assert max(rates.seen) > 9e-4
    assert rates.seen[-1] < 3e-4


def test_batches_are_whole_tensors_and_follow_the_seed() -> None:
    data = SequenceDataModule(batch_size=50)
    data.setup("fit")
    torch.manual_seed(3)
    first = next(iter(data.train_dataloader()))
    torch.manual_seed(3)
    again = next(iter(data.train_dataloader()))
    assert first.shape == (50, 3, 28, 28)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert sum(len(batch) for batch in data.train_dataloader()) == 1257
    assert torch.equal(next(iter(data.val_dataloader())), next(iter(data.val_dataloader())))


def test_own_transformations_are_followed() -> None:
    names = {"flip": lambda x, t: torch.where(t.view(-1, 1, 1, 1) > 0, x.flip(-1), x)}
    data = SequenceDataModule(num_frames=3, transformations=names)
    x0 = data.examples(2, torch.device("cpu"))
    frames = data.sequences(x0, torch.zeros(2, dtype=torch.long), data.times)
    assert frames.shape == (2, 3, 3, 28, 28)
    torch.testing.assert_close(frames[:, 2], x0.flip(-1) / 255)
    with pytest.raises(cflow.ArgumentError, match=r"set model\.num_flows=1"):
        trainer("", max_steps=1).fit(FlowVAEModule(**SMALL), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "data.batch_size=0"), ({"num_frames": 1}, "data.num_frames=1")],
)
def test_data_refuses_impossible_numbers(settings, message) -> None:
    with pytest.raises(cflow.ArgumentError, match=message):
        SequenceDataModule(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "model.lr=0.0"),
        ({"warmup": 1.0}, "model.warmup=1.0"),
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


@pytest.fixture
def two_threads():
    """Two threads, and the old number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("cost", "wanted"), [({1: 1.0, 2: 0.6}, 2), ({1: 1.0, 2: 8.0}, 1)])
def test_the_faster_number_of_threads_is_kept(cost, wanted) -> None:
    chooser = FasterThreads(interval=10.0)
    chooser.other, chooser._next = 1, 10.0
    now, counts = 0.0, []
    for _ in range(300):
        now += cost[torch.get_num_threads()]
        counts.append(torch.get_num_threads())
        chooser.record(cost[torch.get_num_threads()], now)
    assert counts[-1] == wanted
    assert counts[20:].count(wanted) > 0.9 * len(counts[20:])


@pytest.mark.usefixtures("two_threads")
def test_threads_follow_a_machine_that_gets_busy() -> None:
    chooser = FasterThreads(interval=10.0)
    chooser.other, chooser._next = 1, 10.0
    now, counts = 0.0, []
    for step in range(400):
        seconds = {1: 1.0, 2: 0.6 if step < 100 else 8.0}[torch.get_num_threads()]
        now += seconds
        counts.append(torch.get_num_threads())
        chooser.record(seconds, now)
    assert counts[99] == 2
    assert counts[120:].count(1) > 0.9 * len(counts[120:])
