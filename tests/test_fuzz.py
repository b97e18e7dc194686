"""Command lines, configuration files and files of data that are damaged at random, with a seed.

Whatever comes is taken, or refused in one line with exit code 2 and nothing written; never a traceback. Everyday a few
cases of each kind run; `pytest tests/test_fuzz.py -m slow` runs hundreds.
"""

import contextlib
import io
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cflow
from cflow import CflowError
from cflow.data import ImageFolder, SequenceFolder, Shapes3D, make_factor_files
from cflow.populations import Snapshots

pytest.importorskip("pytorch_lightning")
from cflow.training import app, cli, presets

MANY = pytest.mark.slow

# --- command lines and configuration files ------------------------------------------------------------------

VALUES = [
    "", " ", "-", "--", "nan", "-inf", "1e999", "-1", "0", "1.5", str(10**18), "-99999999999999999999", "true", "null",
    "[", "{", "[]", "{}", "[1, 2", "{a: 1}", "*a", "&a", "!!python/name:os.system", "../../elsewhere", "/proc/self/mem",
    "/dev/null", ".", "~", "a b", "ä", "\ud800", "a\nb", "digits", "mnist", "none.py:x", "os.system", "torch.nn.Linear",
    "%s", "x" * 3000, '"\\0"',
]  # fmt: skip


class Accepted(Exception):
    """Raised where the command would begin its work."""


def written(root: Path) -> set[Path]:
    """Files, and folders of runs; an empty folder for runs may stay."""
    return {path for path in root.rglob("*") if path.is_file() or path.name.startswith("version_")}


@pytest.fixture
def call(tmp_path, monkeypatch) -> Callable[[list[str]], str]:
    """Runs `cflow` up to its work, in an empty folder; returns "accepted", "done" or the line of the error."""

    def begin(*_: object) -> None:
        raise Accepted

    monkeypatch.setattr(app.CflowCLI, "_run_subcommand", begin)
    monkeypatch.setattr(app, "write_report", begin)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(words: list[str]) -> str:
        before = written(tmp_path)
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                code = cli.main(words)
            except Accepted:
                return "accepted"
            except SystemExit as ending:
                code = ending.code
        if code == 0:
            return "done"
        assert code == 2, (words, code)
        (line,) = said.getvalue().splitlines()
        assert "error: " in line
        assert written(tmp_path) == before, words
        return line

    return run


def command_line(draw: random.Random, options: list[str]) -> list[str]:
    """A valid command line with one to three things wrong with it."""
    words = draw.choice([
        ["fit", "--config", "digits"], ["fit", "--config", "digits_weak"], ["test", "--pretrained", "digits"],
        ["traverse", "--pretrained", "digits", "--times", "0,1"], ["report", "digits"],
        ["fit", "--config", "population"],
    ])  # fmt: skip
    words = list(words)
    for _ in range(draw.randint(1, 3)):
        match draw.randrange(6):
            case 0 | 1 | 2:
                words += [f"--{draw.choice(options)}", draw.choice(VALUES)]
            case 3:
                option = draw.choice(options)
                i = draw.randrange(len(option))
                words += [f"--{option[:i]}{draw.choice('xyz._-')}{option[i + 1 :]}", "1"]
            case 4:
                words.pop(draw.randrange(len(words)))
            case 5:
                words.insert(draw.randrange(len(words) + 1), draw.choice(VALUES))
    return words


@pytest.fixture(scope="module")
def options() -> list[str]:
    """All options of `cflow fit`, by the configuration that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main(["fit", "--print_config"])
    section, found = "", ["ckpt_path", "pretrained", "out_dir", "weights", "schedule", "times", "num_samples", "config"]
    for line in printed.getvalue().splitlines():
        name, _, value = line.partition(":")
        if line[:1].isalpha():
            section = name
            found += [name] if value.strip() else []
        elif line.startswith("  ") and line[2:3].isalpha():
            found.append(f"{section}.{name.strip()}")
    assert {"model.lr", "data.root", "seed_everything", "trainer.max_steps"} <= set(found)
    return found


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=MANY) for seed in range(6, 300))])
def test_command_lines(seed, call, options):
    call(command_line(random.Random(seed), options))


def damage_text(text: str, draw: random.Random) -> str:
    """Lines doubled, dropped, moved in or out; a value replaced; characters changed."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        i = draw.randrange(len(lines))
        match draw.randrange(6):
            case 0:
                lines.insert(i, lines[draw.randrange(len(lines))])
            case 1:
                lines = lines[:i] + lines[i + 1 :] or [""]
            case 2:
                lines[i] = draw.choice([" ", "  ", "\t"]) + lines[i]
            case 3:
                lines[i] = lines[i].strip()
            case 4:
                lines[i] = f"{lines[i].partition(':')[0]}: {draw.choice(VALUES)}"
            case 5:
                at = draw.randrange(len(lines[i]) + 1)
                lines[i] = lines[i][:at] + draw.choice("{}[]:*&!|>'\"%@`#,?\x00\x85\ufeff") + lines[i][at + 1 :]
    return "\n".join(lines) + "\n"


# 290: null for a number that jsonargparse lets through
@pytest.mark.parametrize(
    "seed", [*range(6), 290, *(pytest.param(seed, marks=MANY) for seed in range(6, 300) if seed != 290)]
)
def test_configuration_files(seed, call):
    draw = random.Random(seed)
    text = (presets.FOLDER / draw.choice(["digits.yaml", "digits_weak.yaml", "population.yaml"])).read_text("utf-8")
    Path("mine.yaml").write_bytes(damage_text(text, draw).encode("utf-8", "surrogatepass"))
    call(["fit", "--config", "mine.yaml"])


# --- files of data ------------------------------------------------------------------------------------------


def sequences(kind: str) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Writes a folder of short films of a kind with times, and reads all of it."""

    def write(root: Path) -> None:
        from PIL import Image

        draw = np.random.default_rng(0)
        for label in ("left", "right"):
            (root / label).mkdir(parents=True)
            for i in range(3):
                frames = draw.integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
                path = root / label / f"{i}.{kind}"
                if kind == "npz":
                    np.savez(path, frames=frames)
                else:
                    first, *others = [Image.fromarray(frame) for frame in frames]
                    first.save(path, save_all=True, append_images=others, duration=100)
        rows = [f"{label}/{i}.{kind},{t},{0.5 * t}" for label in ("left", "right") for i in range(3) for t in range(3)]
        (root / "times.csv").write_text("\n".join(["sequence,frame,time", *rows]) + "\n")

    def read(root: Path) -> None:
        folder = SequenceFolder(root)
        for name in ("train", "val", "test"):
            part = folder.split(name)
            index = torch.arange(len(part))
            times, _ = part.frame_times(index)
            part.sequences(index, part.labels, times)

    return write, read


def write_images(root: Path) -> None:
    from PIL import Image

    root.mkdir()
    for i, ending in enumerate(["png", "jpg", "npy", "png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        if ending == "npy":
            np.save(root / f"{i}.npy", pixels)
        else:
            Image.fromarray(pixels).save(root / f"{i}.{ending}")


def read_images(root: Path) -> None:
    images = ImageFolder(root, "rotation", num_frames=2)
    for name in ("train", "val", "test"):
        images.split(name).sequences(torch.tensor([0]), torch.tensor([0]), torch.arange(2.0))


def write_grid(root: Path) -> None:
    make_factor_files("shapes3d", root, sizes=(1, 1, 4, 1, 1, 4))


def read_grid(root: Path) -> None:
    grid = Shapes3D(root, factors=["object_hue"], sizes=(1, 1, 4, 1, 1, 4), num_frames=2)
    for name in ("train", "val", "test"):
        grid.split(name).sequences(torch.tensor([0]), torch.tensor([0]), torch.arange(2.0))


def write_table(root: Path) -> None:
    root.mkdir()
    lines = [f"{i % 3},{0.1 * i:.3f},{-0.2 * i:.3f}" for i in range(12)]
    (root / "cells.csv").write_text("\n".join(["t,a,b", *lines]) + "\n")


def write_arrays(root: Path) -> None:
    root.mkdir()
    np.savez(root / "cells.npz", x=np.arange(24.0).reshape(12, 2), t=np.arange(12) % 3)


def read_cells(root: Path) -> None:
    Snapshots.from_file(next(root.iterdir()))


def write_weights(root: Path) -> None:
    cflow.PotentialFlow(cflow.MLPPotential(2, 2, hidden=3)).save_pretrained(root)


def read_weights(root: Path) -> None:
    flow: nn.Module = cflow.PotentialFlow.from_pretrained(root)
    assert flow.num_flows >= 1


KINDS = {
    "films": sequences("npz"),
    "animations": sequences("gif"),
    "images": (write_images, read_images),
    "grid": (write_grid, read_grid),
    "table": (write_table, read_cells),
    "arrays": (write_arrays, read_cells),
    "weights": (write_weights, read_weights),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Callable[[str], Path]:
    """A folder of each kind as it should be, written once."""
    root = tmp_path_factory.mktemp("sound")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            KINDS[kind][0](root / kind)
            KINDS[kind][1](root / kind)
        return root / kind

    return folder


def damage(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, bytes dropped or doubled, numbers made large, text put in; often in the first part, the header."""
    for _ in range(draw.choice([1, 1, 2, 8])):
        i = draw.randrange(max(1, draw.choice([len(content), min(len(content), 64)])))
        match draw.randrange(6):
            case 0:
                content = (
                    content[:i] + bytes([content[i] ^ (1 << draw.randrange(8))]) + content[i + 1 :] if content else b"x"
                )
            case 1:
                content = content[:i]
            case 2:
                content = content[:i] + draw.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4]) + content[i + 4 :]
            case 3:
                content = content[:i] + content[i : i + 40] + content[i:]
            case 4:
                content = (
                    content[:i]
                    + draw.choice([b",", b"\n", b'"', b"-", b"nan", b"1e999", b"{", b"[[", b"\xc3("])
                    + content[i:]
                )
            case 5:
                content = content[:i] + content[i + draw.choice([1, 4, 100]) :]
    return content


def refusal(read: Callable[[Path], None], root: Path) -> str | None:
    """What a reader says against a folder; None where it takes it."""
    try:
        read(root)
    except CflowError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=MANY) for seed in range(2, 100))])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_data(kind, seed, sound, tmp_path):
    """Three damaged files for each seed: read, or refused by a `CflowError` of one line."""
    for turn in range(3):
        draw = random.Random(f"{kind} {seed} {turn}")
        root = tmp_path / str(turn)
        shutil.copytree(sound(kind), root)
        victim = draw.choice(sorted(path for path in root.rglob("*") if path.is_file()))
        victim.write_bytes(damage(victim.read_bytes(), draw))
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused = refusal(KINDS[kind][1], root)
        assert refused is None or (refused.strip() and "\n" not in refused)
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
