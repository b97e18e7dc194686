"""The page: tables of several runs side by side, and the template that puts everything into one file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...plots import style
from .. import files, results
from .chapter import Chapter

REPORT = "report.html"
HERE = Path(__file__).parent
# On a dark page the darkest colours of the palette give way to the lightest ones.
DARK = {style.BLUE: style.SKY, style.SKY: style.YELLOW, style.BLACK: "#FFFFFF"}
RUNS = (*style.PALETTE[2:], *style.PALETTE[:2])  # the first two are those of true and generated frames
SHADES = 64  # of the colour map
UNKNOWN = "–"
COMPARED = {
    "flow_accuracy": ("accuracy of q(k|x)", "{:.3f}"),
    "reconstruction_l1": ("reconstruction, L1", "{:.1f}"),
    "elbo": ("ELBO, nats", "{:.1f}"),
    "log_likelihood": ("log-likelihood, nats", "{:.1f}"),
    "psnr/mean": ("PSNR, dB", "{:.2f}"),
    "ssim/mean": ("SSIM", "{:.3f}"),
    "vp_score": ("VP score", "{:.3f}"),
    "samples": ("held-out things", "{:,.0f}"),
    "seconds": ("training, seconds", "{:,.0f}"),
}


@dataclass(frozen=True)
class Bar:
    """An error as a part of that of the best trivial answer.

    Attributes:
        name: the transformation.
        run: number of the run.
        error, trivial: the two errors.
    """

    name: str
    run: int
    error: float
    trivial: float

    @property
    def percent(self) -> float:
        """How long the bar is: 100 is as bad as the best trivial answer, or worse."""
        return min(100.0, 100.0 * self.error / self.trivial) if self.trivial > 0 else 100.0


def bars(chapters: Sequence[Chapter]) -> list[Bar]:
    """The errors of every transformation, of all runs, one transformation after the other."""
    found = []
    for name in measured_names([chapter.metrics for chapter in chapters]):
        for run, chapter in enumerate(chapters):
            error, trivial = chapter.metrics.get(f"{results.ERROR}/{name}"), results.best_trivial(chapter.metrics, name)
            if error is not None and not math.isnan(trivial):
                plain = name.replace("_", " ")
                label = chapter.labels.get(name, plain) if len(chapters) == 1 else plain
                found.append(Bar(label, run, error, trivial))
    return found


def measured_names(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The transformations that were measured in any of several runs, with "mean" as the last."""
    return sorted(union(map(results.transformation_names, metrics)), key="mean".__eq__)


def comparison(chapters: Sequence[Chapter]) -> list[list[str]]:
    """What was measured, a column a run, as the cells of a table with its head."""
    measured = [chapter.metrics for chapter in chapters]
    rows = [["measure", *(chapter.name for chapter in chapters)]]
    for name in measured_names(measured):
        rows.append([f"equivariance error, {name.replace('_', ' ')}"])
        rows[-1] += [number(found, f"{results.ERROR}/{name}", "{:.1f}") for found in measured]
    if any(not math.isnan(results.best_trivial(found, "mean")) for found in measured):
        trivial = [results.best_trivial(found, "mean") for found in measured]
        rows.append(["best trivial answer, mean", *("–" if math.isnan(value) else f"{value:.1f}" for value in trivial)])
    for key, (name, digits) in COMPARED.items():
        if any(key in found for found in measured):
            rows.append([name, *(number(found, key, digits) for found in measured)])
    return rows


def number(metrics: Mapping[str, float], key: str, digits: str) -> str:
    """A number with its standard error, where those are known.

    Example:
        >>> number({"elbo": 8.04, "elbo_stderr": 0.3}, "elbo", "{:.1f}"), number({}, "elbo", "{:.1f}")
        ('8.0 ± 0.3', '–')
    """
    if key not in metrics:
        return "–"
    spread = metrics.get(f"{key}{results.STDERR}")
    return digits.format(metrics[key]) + ("" if spread is None else f" ± {digits.format(spread)}")


def side_by_side(columns: Sequence[Mapping[str, str]], heads: Sequence[str]) -> list[list[str]]:
    """Names with their values, a column a run, as the cells of a table with its head.

    What has no value in any of them is left out.

    Example:
        >>> side_by_side([{"lr": "0.1", "factors": "null"}, {"width": "8", "factors": "null"}], ["a", "b"])
        [['', 'a', 'b'], ['lr', '0.1', '–'], ['width', '–', '8']]
    """
    rows = [[key, *(column.get(key, UNKNOWN) for column in columns)] for key in union(columns)]
    return [["", *heads], *(row for row in rows if not {*row[1:]} <= {"null", UNKNOWN})]


def by_section(chapters: Sequence[Chapter]) -> list[tuple[str, list[dict[str, str]]]]:
    """The options of each section, a mapping a run: of the model, the data, the trainer, and the rest."""
    found: dict[str, list[dict[str, str]]] = {
        section: [{} for _ in chapters] for section in ("model", "data", "trainer")
    }
    found["run"] = [{} for _ in chapters]
    for run, chapter in enumerate(chapters):
        for key, value in chapter.options.items():
            section, _, name = key.partition(".")
            place, name = (section, name) if name and section in found else ("run", key)
            found[place][run][name] = value
    return [(section.capitalize(), columns) for section, columns in found.items() if any(columns)]


def union(lists: Any) -> list[str]:
    """What is in any of several lists, in the order in which it is met."""
    return list(dict.fromkeys(item for each in lists for item in each))


def page(chapters: Sequence[Chapter], now: datetime | None = None) -> str:
    """The report as HTML."""
    heads = [chapter.name for chapter in chapters] if len(chapters) > 1 else ["value"]
    text: str = _template().render(
        chapters=chapters,
        version=__version__,
        now=(now or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M"),
        palette=[(colour, DARK.get(colour, colour)) for colour in RUNS],
        sides=(style.TRUE_COLOUR, DARK.get(style.TRUE_COLOUR, style.TRUE_COLOUR), style.GENERATED_COLOUR),
        bars=bars(chapters),
        comparison=comparison(chapters) if len(chapters) > 1 else None,
        errors=[results.error_rows(chapter.metrics) if chapter.metrics else None for chapter in chapters],
        compositions=[results.composition_rows(chapter.metrics) for chapter in chapters],
        others=[results.rest(chapter.metrics) for chapter in chapters],
        configuration=[(section, side_by_side(columns, heads)) for section, columns in by_section(chapters)],
        versions=side_by_side([chapter.versions for chapter in chapters], heads),
        names={part: union(c.pictures[part]["names"] for c in chapters if part in c.pictures) for part in CHOSEN},
        data={"shades": shades(), "runs": [{"name": c.name, "labels": c.labels, **c.pictures} for c in chapters]},
        unknown=UNKNOWN,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        js=(HERE / "page.js").read_text(encoding="utf-8"),
    )
    return text


CHOSEN = ("traversals", "mixtures", "landscapes")  # the sections in which a transformation is chosen


def shades() -> list[str]:
    """The colour map of potentials, from low to high."""
    style.require("matplotlib")
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps[style.COLOUR_MAP](np.linspace(0, 1, SHADES))]


@cache
def _template() -> Any:
    style.require("jinja2")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # the order of names is that of the data, and NaN is no JSON
    found.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    return found.get_template("page.html")


def write_report(path: Path, chapters: Sequence[Chapter]) -> Path:
    """Write the report about one run or several, and return its path.

    Raises:
        DataError: the file cannot be written.
    """
    files.write(path, page(chapters).encode())
    return path
