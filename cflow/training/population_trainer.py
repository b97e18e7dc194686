"""What a run on snapshots of a population leaves behind: metrics, pictures, and the flow."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

from matplotlib.figure import Figure
from pytorch_lightning import LightningDataModule

from .. import plots
from ..errors import DataError
from . import files, results
from .population import PopulationModule
from .trainer import FlowTrainer, fitting_weights, interruptible


class PopulationTrainer(FlowTrainer):
    """`FlowTrainer` for populations."""

    def test(  # type: ignore[override]
        self,
        model: PopulationModule | None = None,
        dataloaders: object = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        out_dir: str | None = None,
    ) -> list[Mapping[str, float]]:
        """Measure a checkpoint on members held out and draw it: metrics.json, pictures, and the flow for your own code.

        Args:
            ckpt_path: a checkpoint, the folder of a run, or `last` for the newest run.
            out_dir: folder for the results; the run's own by default.
        """
        # before all the work
        folder = results.output_folder(out_dir, ckpt_path) if isinstance(model, PopulationModule) else Path()
        with interruptible(), fitting_weights():
            metrics = super(FlowTrainer, self).test(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        if self.is_global_zero and isinstance(model, PopulationModule):
            numbers = model.sort_metrics(metrics[0])
            paths = [results.write_metrics(folder, numbers), *draw(model, folder)]
            print(table(numbers))
            results.say_where([*sorted(folder.glob("checkpoints/*.ckpt")), *sorted(folder.glob("config.yaml")), *paths])
        return metrics


def draw(model: PopulationModule, folder: Path) -> list[Path]:
    """Write the flow and, of data with two coordinates or more, the pictures of a run; return their paths."""
    flow, snapshots = model.flow.eval(), model.data.whole
    if (folder / "flow").is_symlink():
        raise DataError(f"{folder / 'flow'}: is a link, which may lead anywhere; remove it")
    flow.save_pretrained(folder / "flow")
    paths = [folder / "flow" / "config.json", folder / "flow" / "model.safetensors"]
    if snapshots.dim < 2:
        return paths
    pictures = [folder / f"{name}.png" for name in ("landscape", "marginals")]
    figures = (
        cast(Figure, plots.population_landscape(flow, snapshots).figure),
        plots.population_marginals(flow, snapshots),
    )
    for picture, figure in zip(pictures, figures, strict=True):
        files.drawn(picture, partial(figure.savefig, dpi=150))
    animate = partial(plots.population_animation, flow=flow, snapshots=snapshots)
    return [*pictures, files.drawn(folder / "population.gif", animate), *paths]


def table(metrics: Mapping[str, float]) -> str:
    """Return the metrics as a table, a row a time.

    Example:
        >>> print(table({"wasserstein/1": 0.7, "previous/1": 0.9, "floor/1": 0.5, "held_out/1": 1.0, "seconds": 3.0}))
        Wasserstein-1 at t   flow  snapshot before  floor
        1 (held out)        0.700            0.900  0.500
        <BLANKLINE>
        training seconds 3
    """
    rows = [["Wasserstein-1 at t", "flow", "snapshot before", "floor"]]
    for key in metrics:
        if key.startswith("wasserstein/"):
            t = key.removeprefix("wasserstein/")
            numbers = (metrics[f"{name}/{t}"] for name in ("wasserstein", "previous", "floor"))
            rows.append([f"{t} (held out)" if f"held_out/{t}" in metrics else t, *(f"{x:.3f}" for x in numbers)])
    return "\n".join([*results._columns(rows), "", f"training seconds {metrics['seconds']:.0f}"])
