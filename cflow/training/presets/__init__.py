"""Configurations that come with cflow, one YAML file each."""

from __future__ import annotations

from pathlib import Path

from ...errors import ArgumentError, DataError, did_you_mean

FOLDER = Path(__file__).parent
DEFAULT = "digits"
POPULATION = "population"  # of no images: trained by another module
GRIDS = ("shapes3d", "falcor3d", "isaac3d")
# what a preset leaves out is as in another one
BASES = {
    "mnist_best": "mnist",
    **{f"{name}_sparse": name for name in ("digits", "mnist")},
    **{f"{name}_weak": name for name in ("digits", "mnist", *GRIDS)},
    **{f"{name}_paper": name for name in GRIDS},
}


def preset_names() -> list[str]:
    """Return the names of the presets.

    Example:
        >>> "digits" in preset_names()
        True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def is_preset(name: str) -> bool:
    """Whether ``--config`` means a preset: a file of that name in the current folder comes first."""
    return name in preset_names() and not Path(name).is_file()


def layers(name: str) -> list[Path]:
    """Return the files of a preset, of which the later ones count.

    Example:
        >>> [path.name for path in layers("digits_weak")]
        ['digits.yaml', 'digits_weak.yaml']
    """
    return [FOLDER / f"{part}.yaml" for part in (BASES.get(name), name) if part]


def kind_of(path: Path) -> str | None:
    """Return what a configuration file says that it is of, in a line of its own; None for images."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # said where it is read
        return None
    return next((line.removeprefix("kind:").strip() for line in lines if line.startswith("kind:")), None)


def config_file(name: str) -> Path:
    """Return the file that ``--config`` means.

    Raises:
        ArgumentError: an unknown preset.
        DataError: a file that is not there.
    """
    path = FOLDER / f"{name}.yaml" if is_preset(name) else Path(name)
    if path.is_file():
        return path
    known = ", ".join(preset_names())
    if path.suffix or len(path.parts) > 1 or path.exists():
        what = "is not a file" if path.exists() else "there is no such file"
        raise DataError(f"--config {name}: {what}; give a configuration file or a preset ({known}).")
    raise ArgumentError(
        f"--config {name}: unknown preset, and no such file; presets are {known}.{did_you_mean(name, preset_names())}"
    )
