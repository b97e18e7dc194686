"""The report: what it says, what it leaves out and why, and how it behaves in a browser."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cflow

pytest.importorskip("pytorch_lightning")
pytest.importorskip("jsonargparse")

from cflow.data import Digits, compose
from cflow.errors import ArgumentError
from cflow.training import cli
from cflow.training.datamodule import SequenceDataModule
from cflow.training.module import FlowVAEModule
from cflow.training.report import Chapter, Subject
from cflow.training.report.landscape import SIDE, landscapes
from cflow.training.report.moving import mixtures, time_dependent, traversals
from cflow.training.report.page import page
from cflow.training.report.solving import solver_rows

CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
TINY = [
    *("--model.width", "16", "--model.latent_dim", "4", "--model.likelihood_samples", "2", "--data.batch_size", "32"),
    *("--data.val_samples", "20", "--data.test_samples", "30", "--trainer.max_steps", "4", "--trainer.precision"),
    *("32-true", "--trainer.val_check_interval", "2", *CPU),
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, weakly supervised, of potentials that depend on time."""
    root = tmp_path_factory.mktemp("report")
    words = ["fit", "--config", "digits_weak", *TINY, "--model.potential", "mlp", "--model.solenoidal", "none"]
    assert cli.main([*words, "--trainer.default_root_dir", str(root)]) == 0
    return root / "digits_weak" / "version_0"


@pytest.fixture(scope="module")
def both(run, tmp_path_factory):
    """A report about that run and the weights that come with cflow."""
    folder = tmp_path_factory.mktemp("both")
    assert cli.main(["report", str(run), "digits", "--out_dir", str(folder), *CPU]) == 0
    return folder / "report.html"


def data_of(report: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', report.read_text(), re.DOTALL)[1])


def table_rows(report: Path) -> list[list[str]]:
    rows = re.findall(r"<tr.*?>(.*?)</tr>", report.read_text(), re.DOTALL)
    return [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in rows]


def subject(data: SequenceDataModule | None = None, **model) -> Subject:
    data = SequenceDataModule() if data is None else data
    settings = {"latent_dim": 4, "width": 16, "data_flows": data.num_flows} | model
    return Subject(FlowVAEModule(**settings), data, torch.device("cpu"))


@pytest.mark.ci
def test_a_fit_ends_with_a_report(run):
    report = run / "report.html"
    assert 1e5 < report.stat().st_size < 5e6
    metrics = json.loads((run / "metrics.json").read_text())
    found = {row[0]: row[1:] for row in reversed(table_rows(report)) if row}
    for name in ("scaling", "rotation", "hue"):
        label = f"{name} (flow {metrics[f'flow/{name}']:.0f})"
        assert found[label][0] == f"{metrics[f'equivariance_error/{name}']:.1f}"
        assert found[label][2] == f"{metrics[f'copy_input/{name}']:.1f}"
    assert found["solver"] == ["rk4"]
    assert found["cflow"] == [cflow.__version__]
    (drawn,) = data_of(report)["runs"]
    assert [len(values) for values in drawn["curves"]["val/equivariance_error"]] == [2, 2]
    assert drawn["errors"]["hue"][3] == metrics["equivariance_error_per_frame/hue/4"]
    assert drawn["mixtures"]["levels"] == [0, 1]  # what other weights do is unknown where u depends on time
    assert drawn["mixtures"]["times"] == list(range(9))


def test_runs_side_by_side(run, both):
    rows = {row[0]: row[1:] for row in table_rows(both) if row}
    measured = [json.loads((run / "metrics.json").read_text()), json.loads((WEIGHTS / "metrics.json").read_text())]
    assert [cell.split(" ± ")[0] for cell in rows["equivariance error, hue"]] == [
        f"{found['equivariance_error/hue']:.1f}" for found in measured
    ]
    assert "these weights belong to no run" in both.read_text()  # no curves of them
    assert rows["network"] == ["mlp", "mlp"]


WEIGHTS = Path(cflow.__file__).parent / "weights" / "digits"


def test_a_report_is_said_and_lies_where_all_runs_do(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    second = run.with_name("version_1")
    second.mkdir()
    shutil.copytree(run / "checkpoints", second / "checkpoints")
    try:
        assert cli.main(["report", "digits_weak/version_0", "digits_weak/version_1", *CPU]) == 0
    finally:
        shutil.rmtree(second)
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == "digits_weak/: report.html"
    text = Path("digits_weak/report.html").read_text()
    assert "Left out of digits_weak/version_1: there is no metrics.json" in text


WRONG = {
    "no run": ([], "`cflow report` needs a run"),
    "nothing there": (["nowhere"], "--ckpt_path nowhere: there is no such file"),
    "an unknown option": (["digits", "--model.lrr", "1"], "unknown option --model.lrr. Did you mean"),
    "two models": (["digits", "--ckpt_path", "last"], "no run with a checkpoint under runs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_give_one_line_and_code_2(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, text = WRONG[what]
    try:
        code = cli.main(["report", *words])
    except SystemExit as ending:
        code = ending.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert not list(tmp_path.iterdir())


def test_the_help_says_how_runs_are_named(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", "--help"])
    assert "usage: cflow report RUN [RUN …]" in capsys.readouterr().out


# --- what is computed ---------------------------------------------------------------------------------------


def test_the_surface_is_that_of_the_potential():
    about = subject(potential="quadratic", solver="rk4")
    with torch.no_grad():
        about.vae.flow.net.shift.add_(torch.randn(3, 4))
    found = landscapes(about)["flows"][1]
    z = about.vae.flow.trajectory(about.starts(1, 64), 1, about.times).flatten(0, 1).detach()
    variance, axes = torch.linalg.eigh(torch.cov(z.mT))
    first, second = axes[:, -1], axes[:, -2]
    assert found["shares"] == pytest.approx((variance.flip(0)[:2] / variance.sum()).tolist(), rel=1e-3)
    right, up = (extent * axis for extent, axis in zip(found["extent"], (first, second), strict=True))
    (heights,) = found["surfaces"]
    corners = torch.stack([z.mean(0) + a * right + b * up for a in (-1, 1) for b in (-1, 1)])
    true = about.vae.flow.potential(corners, 0.0)[:, 1].detach()
    given = torch.tensor([heights[0], heights[-SIDE], heights[SIDE - 1], heights[-1]])
    # an axis may point either way
    assert (given - given.mean()).sort()[0].tolist() == pytest.approx(
        (true - true.mean()).sort()[0].tolist(), rel=1e-2, abs=1e-4
    )


def test_velocities_that_depend_on_time_are_noticed():
    assert not time_dependent(subject(potential="quadratic"))
    assert not time_dependent(subject(potential="quadratic", solenoidal="skew"))
    assert not time_dependent(subject(potential="ridge", time_dependent=False))
    assert time_dependent(subject(potential="ridge"))


def test_times_between_frames_only_where_they_change_nothing():
    assert len(traversals(subject(potential="quadratic", solver="rk4"))["times"]) == 33
    coarse = subject(potential="quadratic", solver="euler", step_size=8.0)
    with torch.no_grad():
        coarse.vae.flow.net.matrix.mul_(20)
    found = traversals(coarse)
    assert found["times"] == list(range(9))
    assert "so coarse" in found["whole"]


def test_the_distance_from_exact_is_eulers_error():
    about = subject(potential="quadratic", solver="euler", step_size=8.0)
    about.data.source.num_frames = 2
    a = 0.5 * torch.eye(4)
    with torch.no_grad():
        about.vae.flow.net.matrix.copy_(a.expand(3, 4, 4))
        about.vae.flow.net.shift.zero_()
    head, row, *_ = solver_rows(about)
    found = dict(zip(head, row, strict=True))
    assert found["straight to the end"] == "1"  # Euler's only step
    # z(1) = e^½ z(0), Euler's is 1.5 z(0)
    exact = float(torch.tensor(0.5, dtype=torch.float64).exp())
    assert float(found["distance from exact"]) == pytest.approx((exact - 1.5) / (exact - 1), rel=0.05)


def test_weights_of_transformations_are_those_of_the_flows_they_have_become():
    about = subject(supervision="weak")
    vars(about)["flows"] = [2, 0, 1]  # in place of what q(k|x) would say
    assert about.weights(torch.tensor([0.25, 0.5, 1.0])).tolist() == [0.5, 1.0, 0.25]
    assert about.labels == ["scaling (flow 2)", "rotation (flow 0)", "hue (flow 1)"]


def test_one_flow_mixes_with_nothing():
    data = SequenceDataModule(dataset="digits", transformations="rotation")
    with pytest.raises(ArgumentError, match="mixes with no other"):
        mixtures(subject(data, potential="quadratic"))


def test_names_of_others_are_text_and_what_is_missing_has_a_reason():
    chapter = Chapter("<b>&</b>", {}, {"model.lr": "<i>"}, {}, "</script>", "rk4", [], {}, {}, {"metrics": "<u>none"})
    text = page([chapter])
    assert "<title>&lt;b&gt;&amp;&lt;/b&gt;" in text
    assert not {"<b>", "<i>", "<u>none"} & set(re.findall(r"<[biu]>\w*", text))
    assert "Left out: &lt;u&gt;none." in text


# --- in a browser -------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def playwright():
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")


@pytest.fixture(scope="module")
def browser(playwright):
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as engine:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = engine.chromium.launch(executable_path=found, args=sandbox)
        yield running
        running.close()


@pytest.fixture
def opened(browser, both, playwright):
    """What opens the report about two runs in a window; at the end nothing may have gone wrong in there."""
    wrong, contexts = [], []

    def open_(width: int = 1200, scheme: str = "light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        shown = contexts[-1].new_page()
        shown.on("console", lambda message: wrong.append(message.text))
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on(
            "request",
            lambda asked: wrong.append(asked.url) if not asked.url.startswith(("data:", both.as_uri())) else None,
        )
        shown.goto(both.as_uri())
        playwright.expect(shown.locator("#traversals canvas").last).to_have_attribute(
            "aria-label", re.compile("generated")
        )
        return shown

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


PIXELS = """(panel, [side, s]) => {
  const { width, height } = panel.querySelectorAll('.strip')[side].querySelectorAll('canvas')[s];
  const copy = new OffscreenCanvas(width, height).getContext('2d');
  copy.drawImage(panel.querySelectorAll('.strip')[side].querySelectorAll('canvas')[s], 0, 0);
  return [height, width, [...copy.getImageData(0, 0, width, height).data]];
}"""


def image(panel, side: int, s: int) -> np.ndarray:
    """What a panel shows: side 0 is true, 1 generated."""
    height, width, values = panel.evaluate(PIXELS, [side, s])
    return np.array(values).reshape(height, width, 4)[..., :3].transpose(2, 0, 1) / 255


def held_out(count: int) -> torch.Tensor:
    test = Digits().split("test")
    index = torch.linspace(0, len(test) - 1, count).round().long()
    return test.sequences(index, torch.zeros(count, dtype=torch.long), torch.zeros(1))[:, 0]


def test_the_slider_moves_the_frames_of_the_chosen_flow(opened):
    shown = opened()
    x, vae, t = held_out(4), cflow.load("digits"), torch.tensor([0.0, 3.25, 8.0])
    panel = shown.locator("#traversals .panel").nth(1)
    for k, name in enumerate(("scaling", "rotation", "hue")):
        shown.locator(f"#traversals input[value={name}]").check(force=True)
        made = vae.traverse(x, k, t).clamp(0, 1).detach()
        true = compose(x, t[:, None] * torch.eye(3)[k])
        for n, at in enumerate(t.tolist()):
            shown.locator("#time").fill(str(at))
            assert abs(image(panel, 1, 2) - made[n, 2].numpy()).max() < 0.05  # of 32 levels, in other steps
            assert abs(image(panel, 0, 2) - true[2, n].numpy()).max() < 0.03


def test_weights_mix(opened):
    shown = opened()
    x, vae = held_out(2), cflow.load("digits")
    panel = shown.locator("#mixtures .panel").nth(1)
    for w in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.5], [-0.25, 0.75, 0.0]):
        for k, weight in enumerate(w):
            shown.locator(f"#weight-{k}").fill(str(weight))
        made = vae.traverse(x, torch.tensor(w), [0.0, 8.0])[-1].clamp(0, 1).detach()
        true = compose(x, 8 * torch.tensor([w]))
        assert abs(image(panel, 1, 1) - made[1].numpy()).max() < 0.03
        assert abs(image(panel, 0, 1) - true[1, 0].numpy()).max() < 0.03


def test_the_keyboard_is_enough(opened, playwright):
    shown = opened()
    shown.keyboard.press("Tab")
    seen = []
    for _ in range(60):
        seen.append(shown.evaluate("document.activeElement.id || document.activeElement.value || ''"))
        shown.keyboard.press("Tab")
        if seen[-1] == "tilt":
            break
    for wanted in ("theme", "scaling", "play", "time", "weight-0", "rest", "turn", "tilt"):
        assert wanted in seen
    time = shown.locator("#time")
    time.focus()
    panel = shown.locator("#traversals .panel").nth(1)
    before = image(panel, 1, 0)
    shown.keyboard.press("End")
    assert time.get_attribute("aria-valuetext") == "t = 8 of 8"
    assert abs(image(panel, 1, 0) - before).max() > 0.3
    shown.keyboard.press("ArrowLeft")
    assert time.input_value() == "7.75"
    shown.locator("#traversals input[value=scaling]").focus()
    shown.keyboard.press("ArrowRight")
    assert shown.locator("#traversals canvas").first.get_attribute("aria-label").startswith("true, rotation, example 1")
    shown.locator("#play").focus()
    shown.keyboard.press("Enter")
    assert shown.locator("#play").get_attribute("aria-pressed") == "true"
    playwright.expect(time).not_to_have_value("7.75")
    surface = "document.querySelector('#landscapes canvas').toDataURL()"
    before = shown.evaluate(surface)
    shown.locator("#turn").focus()
    shown.keyboard.press("ArrowRight")
    assert shown.evaluate(surface) != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_every_width_and_scheme(width, scheme, opened):
    shown = opened(width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    wide = shown.locator("#traversals .panel").nth(1).bounding_box()
    assert (wide["x"] < 100) == (width == 400)  # below the first one, or beside it
    for canvas in shown.locator("canvas").all():
        assert canvas.bounding_box()["width"] > 40
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\\\d+/)[0])".replace("\\\\", "\\")
    assert (shown.evaluate(brightness) > 128) == (scheme == "light")
    shown.locator("#theme").click()
    assert (shown.evaluate(brightness) > 128) == (scheme == "dark")
    assert shown.locator("#theme").get_attribute("aria-pressed") == str(scheme == "light").lower()
