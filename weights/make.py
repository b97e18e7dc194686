"""Makes a folder of weights out of a run of `cflow fit`, and measures what is stored.

    cflow fit --config mnist --data.root data
    python weights/make.py runs/mnist/version_0 weights/mnist --data.root data

Weights are stored in half precision. Options after the folder go to `cflow test`, whose metrics.json and pictures are
those of the stored weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import cflow
from cflow.checkpoint import find_checkpoint, read_checkpoint
from cflow.training import cli, runs


def main(run: str, folder: str, *options: str) -> int:
    """Write the folder and test it; returns the exit code of the test."""
    file = find_checkpoint(Path(run))
    if file is None:
        raise SystemExit(f"{run}: there is no checkpoint")
    content = read_checkpoint(file)
    config = runs.storable(content[runs.CONFIG_KEY])
    config = {"model": config["model"], "data": config["data"], "seconds": round(content["seconds"])}
    # of how it is measured, whatever was asked for while it was trained
    config["model"]["likelihood_samples"] = 16
    del config["data"]["root"]
    cflow.load(file).save_pretrained(folder, dtype=torch.float16, options=config)
    return cli.main(["test", "--pretrained", folder, "--out_dir", folder, *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
