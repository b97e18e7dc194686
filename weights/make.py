"""Makes a folder of weights out of a run of `cflow fit`, measures what is stored, and writes its card.

    cflow fit --config mnist --data.root data
    python weights/make.py runs/mnist/version_0 weights/mnist --data.root data

Weights are stored in half precision; the best checkpoint of the run is taken. Options after the folder go to
`cflow test`, whose metrics.json and traversals.png are those of the stored weights. With - for the run only what is
stored is measured again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import cflow
from cflow.checkpoint import find_checkpoint, read_checkpoint
from cflow.training import cli, runs

DATA = {
    "digits": "the 1,797 digits of scikit-learn (Alpaydin, Kaynak, UCI, 1998)",
    "mnist": "MNIST (LeCun, Cortes, Burges, 1998)",
}
CARD = """# {name}

A flow-factorised VAE (Song, Keller, Sebe, Welling, 2023, arXiv:2309.13167, with continuous flows) of
{data}, coloured red, under scaling, rotation and hue, nine frames a sequence.
{supervision}

| held out, {samples:.0f} images, L1 summed over pixels and frames 1..8 | this model | best trivial answer |
|---|---|---|
{rows}

Reconstruction L1 {l1:.1f}, PSNR {psnr:.1f} dB, SSIM {ssim:.3f}. All that was measured is in `metrics.json`, measured
on the stored weights, which are of half precision; `traversals.png` shows held-out images, the true ones above.

    cflow fit --config {name}{root}                         # {seconds:.0f} s on one busy CPU core
    python weights/make.py runs/{name}/version_0 {folder}{root}
    cflow test --pretrained {name}{root}                    # metrics.json again, within 1e-3 of each number

    vae = cflow.load("{name}")
    vae.traverse(x0, {k}, t=[0, 2, 4, 6, 8])  # x0 (B, 3, 28, 28) in [0, 1]: a digit in the red channel

Made for showing and testing the method. It knows these images only: upright digits in pure red at the first frame,
times 0 to 8 frames, and one transformation at a time; superpositions and times beyond were not trained (see
`composition/…` in `metrics.json`). Licence: Apache-2.0, as cflow.
"""


def main(run: str, folder: str, *options: str) -> int:
    """Write the folder and test it; returns the exit code of the test."""
    if run != "-":
        store(Path(run), folder)
    code = cli.main(["test", "--pretrained", folder, "--out_dir", folder, *options])
    if code == 0:
        for name in ("traversals.gif", "traversals.webp", "report.html"):  # a picture is enough beside weights
            (Path(folder) / name).unlink()
        (Path(folder) / "README.md").write_text(card(Path(folder)), encoding="utf-8")
    return code


def store(run: Path, folder: str) -> None:
    """Write the weights of a run, and what `cflow test` needs to know of it."""
    file = find_checkpoint(run)
    if file is None:
        raise SystemExit(f"{run}: there is no checkpoint")
    content = read_checkpoint(file)
    config = runs.storable(content[runs.CONFIG_KEY])
    config = {"model": config["model"], "data": config["data"], "seconds": round(content["seconds"])}
    if "names" in content:  # what the flows stand for, in their order
        config["names"] = content["names"]
    config["model"]["likelihood_samples"] = 16  # whatever was measured while it was trained
    config["data"].pop("root", None)
    cflow.load(file).save_pretrained(folder, dtype=torch.float16, options=config)


def card(folder: Path) -> str:
    """The card of a folder with weights and metrics.json."""
    name, metrics = folder.name, json.loads((folder / "metrics.json").read_text())
    weak = name.endswith("_weak")
    rows = []
    for row in ("scaling", "rotation", "hue", "mean"):
        trivial = min(metrics[f"{key}/{row}"] for key in ("copy_input", "black", "no_flow"))
        error = " ± ".join(f"{metrics[f'equivariance_error/{row}{key}']:.1f}" for key in ("", "_stderr"))
        rows.append(f"| {row} | {error} | {trivial:.1f} |")
    flows = ", ".join(f"{t} is flow {metrics[f'flow/{t}']:.0f}" for t in ("scaling", "rotation", "hue")) if weak else ""
    return CARD.format(
        name=name,
        folder=f"{'cflow/' if name == 'digits' else ''}weights/{name}",
        data=DATA[name.removesuffix("_weak")],
        supervision=f"Nobody named the transformations; the model found them: {flows}."
        if weak
        else "Flow 0 is scaling, 1 rotation, 2 hue.",
        samples=metrics["samples"],
        rows="\n".join(rows),
        l1=metrics["reconstruction_l1"],
        psnr=metrics["psnr/mean"],
        ssim=metrics["ssim/mean"],
        seconds=metrics["seconds"],
        root=" --data.root data" if name.startswith("mnist") else "",
        k=f"{metrics['flow/rotation']:.0f}" if weak else "1",
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
