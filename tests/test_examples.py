"""The notebooks and scripts in examples/: what a reader finds in them. That notebooks run is tested by nbmake."""

import base64
import io
import json
import math
import re
import runpy
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cflow
from cflow import plots

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SCRIPTS = sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")])
NO_USER_CALLS = {"__version__", "DependencyError"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def code(path):
    return "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "code")


def prose(path):
    return "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")


def texts(output):
    """All that an output says in words."""
    data = [part for kind, part in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in [output.get("text", ""), *data])


@every_notebook
def test_prose_stands_before_every_code_cell(path):
    kinds = [cell["cell_type"] for cell in cells(path)]
    assert source(cells(path)[0]).startswith("# ")
    for before, kind in pairwise(kinds):
        assert (before, kind) != ("code", "code")
    assert all(source(cell).strip() for cell in cells(path))


@every_notebook
def test_outputs_are_kept_and_clean(path):
    code_cells = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        # a figure that nothing has drawn leaves only its repr
        assert not re.search(r"Warning|Traceback|^<Figure", texts(output)) or "image/png" in output.get("data", {})
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@every_notebook
def test_it_says_what_to_observe_and_ends_with_two_exercises(path):
    assert prose(path).count("**Observe:**") >= 3
    last = cells(path)[-1]
    assert last["cell_type"] == "markdown"
    assert source(last).startswith("## Exercises")
    assert re.findall(r"^(\d)\. ", source(last), flags=re.MULTILINE) == ["1", "2"]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SCRIPTS], ids=lambda p: p.name)
def test_no_private_name_of_cflow(path):
    text = code(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    assert not re.search(r"\.(_[a-zA-Z]\w*)", text)
    assert not re.search(r"(from|import) +cflow[\w.]*\._|import +_\w", text)


@every_notebook
def test_its_pictures_are_sharp(path):
    """As wide as they are shown and more: twice, where a screen has the pixels."""
    outputs = [
        output for cell in cells(path) for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    for output in outputs:
        with Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))) as picture:
            assert picture.width // 2 == output["metadata"]["image/png"]["width"]
    assert path.stat().st_size < 2.5e6


@every_notebook
def test_its_thumbnail_is_cut_from_its_pictures(path):
    """Where this fails after a notebook was run anew: python docs/thumbnails.py"""
    thumbnails = runpy.run_path(str(EXAMPLES.parent / "docs" / "thumbnails.py"))
    wanted = np.asarray(thumbnails["thumbnail"](path.stem), dtype=float)
    with Image.open(EXAMPLES.parent / "docs" / "thumbnails" / f"{path.stem}.png") as picture:
        assert picture.size == (640, 360)
        kept = np.asarray(picture.convert("RGB"), dtype=float)
    assert np.abs(kept - wanted).mean() < 3  # it has 256 colours


def test_every_public_name_is_used_somewhere():
    used = "\n".join([code(p) + prose(p) for p in NOTEBOOKS] + [p.read_text(encoding="utf-8") for p in SCRIPTS])
    used += (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    names = (set(cflow.__all__) | set(plots.__all__)) - NO_USER_CALLS
    assert {name for name in names if not re.search(rf"\b{name}\b", used)} == set()


def test_the_plain_loop_runs(capsys):
    errors = runpy.run_path(str(EXAMPLES / "train_without_lightning.py"))["main"](steps=3)
    said = capsys.readouterr().out
    assert said.count("step ") == 2  # the first and the last
    for name in cflow.data.PAPER:
        assert all(math.isfinite(errors[f"{key}/{name}"]) for key in ("flow", "copy_input", "black", "no_flow"))
        assert name in said


@pytest.mark.slow
def test_the_plain_loop_learns():
    errors = runpy.run_path(str(EXAMPLES / "train_without_lightning.py"))["main"](steps=300)
    for name in cflow.data.PAPER:
        assert errors[f"flow/{name}"] < 0.6 * min(errors[f"{key}/{name}"] for key in ("copy_input", "black", "no_flow"))


def test_the_launch_on_several_gpus_is_a_command_that_cflow_takes(tmp_path, capsys):
    """`cflow` is replaced by a program that prints its arguments; the real parser then reads them."""
    pytest.importorskip("pytorch_lightning")
    yaml = pytest.importorskip("yaml")
    from cflow.training import cli

    (tmp_path / "cflow").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (tmp_path / "cflow").chmod(0o755)
    command = ["bash", str(EXAMPLES / "train_on_several_gpus.sh"), "4", "--trainer.max_steps", "10"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    arguments = run.stdout.split()
    assert arguments[:1] == ["fit"]
    assert shlex.join(arguments[-2:]) == "--trainer.max_steps 10"
    given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert given["--trainer.devices"] == "4"
    assert given["--trainer.strategy"] == "ddp"
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (str(trainer["devices"]), trainer["strategy"], trainer["max_steps"]) == ("4", "ddp", 10)
