"""What is wrong with arguments and configuration files, in one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ArgumentError, DataError, did_you_mean

LARGEST, DEEPEST = 10_000, 20  # of what a configuration file may hold


def explain(message: str, options: Sequence[str] = ()) -> str:
    """Return jsonargparse's message as one line that names the option and, if it is misspelt, the right one.

    Example:
        >>> explain("unrecognized arguments: --model.lrr 3", ["model.lr", "data.root"])
        "unknown option --model.lrr. Did you mean '--model.lr'?"
        >>> explain('Parser key "model.lr":\\n  Expected a <class \\'float\\'>. Got value: abc')
        '--model.lr: expected a float, got abc'
        >>> explain('Parser key "model.schedule":\\n  Expected a typing.Literal["cosine", "constant"]. Got value: x')
        '--model.schedule: expected "cosine" or "constant", got x'
    """
    text = " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).split())
    if found := re.match(r"unrecognized arguments: (.*)", text):
        return _unknown_option(found[1], options)
    if found := re.search(r"does not accept option '([\w.]+)'", text):
        return _unknown_option(f"--{found[1]}", options)
    if found := re.match(r"argument ([\w.]+) --> ([\w.]+):", text):
        return f"--{found[2]}: cannot be given, it is the data's (--{found[1].split('.')[0]}.…)"
    if found := re.match(r'Parser key "([\w.]+)":\s*(.*)', text):
        key, problem = found.groups()
        if union := re.search(r"Subtypes: \[(.*?)\] Errors: .*Given value: (.*)$", problem):
            wanted = union[1].replace("typing.", "").replace("NoneType", "null")
            return f"--{key}: {union[2]!r} is none of {wanted}"
        problem = re.sub(r"Expected an? (?:typing\.)?Literal\[(.*?)\]\.", lambda m: _choices(m[1]), problem)
        problem = re.sub(r"Expected an? (\w+)\.", r"expected a \1,", problem)
        return f"--{key}: {problem.replace('Got value:', 'got')}"
    return text


def _choices(names: str) -> str:
    *others, last = names.split(", ")
    return f"expected {', '.join(others)}{' or ' if others else ''}{last},"


def _unknown_option(given: str, options: Sequence[str]) -> str:
    option = given.split()[0]
    if not option.startswith("-"):
        return f"unexpected argument {option!r}; options are written --name value"
    return f"unknown option {option}." + nearest(option.lstrip("-").split("=")[0], options, "--")


def nearest(name: str, options: Sequence[str], prefix: str = "") -> str:
    """Return " Did you mean …?" for the option most like a name: of the same last part, or spelt alike."""
    same_leaf = [o for o in options if o.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if len(same_leaf) == 1:
        return f" Did you mean {prefix + same_leaf[0]!r}?"
    section, _, leaf = name.rpartition(".")
    initials = f"{section}.{''.join(part[0] for part in leaf.split('_') if part)}"  # learning_rate is spelt unlike lr
    if initials in options:
        return f" Did you mean {prefix + initials!r}?"
    return did_you_mean(f"{prefix}{name}", [f"{prefix}{o}" for o in options])


def read_config(path: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return the content of a configuration file as dotted names → values.

    Arguments:
        path: the file.
        options: the names it may have, or may have parts of.

    Raises:
        DataError: it cannot be read, is no YAML, or too large or deep.
        ArgumentError: a name that is no option.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--config {path}: cannot be read ({getattr(error, 'strerror', error)}).") from None
    except RecursionError:
        raise DataError(f"--config {path}: nested too deeply to be read.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DataError(f"--config {path}{where}: no valid YAML ({what}).") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(
            f"--config {path}: expected options such as 'model: {{lr: 0.001}}', got {type(content).__name__}."
        )
    _check_size(path, content)
    found = dict(_flat(content, options))
    for name in found:
        if not any(name == o or name.startswith(f"{o}.") for o in options):
            raise ArgumentError(f"--config {path}: unknown option {name}.{nearest(name, options)}")
    return found


def _check_size(path: Path, content: object) -> None:
    """Refuse what aliases have made endless, or large enough to fill the memory where it is written out."""
    waiting, count = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > LARGEST or depth > DEEPEST:
            raise DataError(
                f"--config {path}: more than {LARGEST:,} values, or nested more than {DEEPEST} deep; options are few "
                "and flat. Does an alias (*name) repeat itself?"
            )
        if isinstance(value, (dict, list)):
            waiting += [(x, depth + 1) for x in (value.values() if isinstance(value, dict) else value)]


def _flat(content: Mapping[str, Any], options: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in options:
            yield from _flat(value, options, f"{name}.")
        else:
            yield name, value
