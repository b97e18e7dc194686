"""Puts small, realistic faults into cflow, one at a time, and looks whether the tests that should notice do.

    python tests/faults.py                  # all of them: about five minutes on one core
    python tests/faults.py mask --jobs 2    # those with a word in their description, place, tests or table

The table is in ``faults_*.toml``. An entry says what goes wrong, where (the end of the dotted path of a function:
module, classes, name; files may move), the text before and after, and the tests that should fail: files or node ids
below ``tests/``, and perhaps an expression for pytest's ``-k``. A fault is put into a temporary copy of the tree,
never into this one. The exit status is 1 where one was not caught.
"""

from __future__ import annotations

import argparse
import ast
import functools
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

TESTS = Path(__file__).resolve().parent
TREE = ("cflow", "tests", "benchmarks", "examples", "README.md", "pyproject.toml")
PASSED, FAILED = 0, 1  # exit statuses of pytest; others mean that nothing was found out

# Tests run in forks of a process that has imported what takes long, and nothing of cflow.
SERVER = multiprocessing.get_context("forkserver")
PRELOAD = ["pytest", "torch", "torchdiffeq", "scipy.integrate", "sklearn.datasets", "pytorch_lightning", "torchvision"]


@dataclass(frozen=True)
class Fault:
    """A fault and who should notice it.

    Attributes:
        what: what goes wrong, in words.
        where: the end of the dotted path of a function or class.
        before, after: text that occurs once in it, and what stands there instead.
        tests: files or node ids below ``tests/``.
        table: the name of the file that lists it.
        k: pytest's ``-k``, or "".
    """

    what: str
    where: str
    before: str
    after: str
    tests: tuple[str, ...]
    table: str
    k: str = ""

    @property
    def text(self) -> str:
        """What is searched for a word."""
        return " ".join((self.what, self.where, *self.tests, self.table)).lower()


class Unplaced(Exception):
    """A fault that does not fit the code as it is."""


def read_table() -> list[Fault]:
    """All faults, in the order of the files."""
    return [
        Fault(**{**row, "tests": tuple(row["tests"]), "table": file.stem})
        for file in sorted(TESTS.glob("faults_*.toml"))
        for row in tomllib.loads(file.read_text(encoding="utf-8"))["fault"]
    ]


def place(fault: Fault, package: Path) -> tuple[Path, str]:
    """The file that a fault changes, and its text with the fault.

    Raises:
        Unplaced: no function or several of this name, or a text that does not occur exactly once in it.
    """
    found = [d for d in definitions(package) if f".{d[0]}".endswith(f".{fault.where}")]
    if len(found) != 1:
        raise Unplaced(f"{len(found)} functions are called {fault.where}: {', '.join(d[0] for d in found)}")
    _, file, first, last = found[0]
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    body = "".join(lines[first:last])
    if body.count(fault.before) != 1:
        raise Unplaced(f"{fault.before!r} occurs {body.count(fault.before)} times in {fault.where}")
    return file, "".join([*lines[:first], body.replace(fault.before, fault.after), *lines[last:]])


@functools.cache
def definitions(package: Path) -> list[tuple[str, Path, int, int]]:
    """Dotted path, file, and lines from (counted from 0) and to of every function and class below a folder."""
    return [
        (name, file, first, last)
        for file in sorted(package.rglob("*.py"))
        for name, first, last in _inside(ast.parse(file.read_text(encoding="utf-8")), file.stem)
    ]


def _inside(node: ast.AST, path: str) -> Iterator[tuple[str, int, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            name = f"{path}.{child.name}"
            yield name, child.lineno - 1, child.end_lineno or child.lineno
            yield from _inside(child, name)
        else:
            yield from _inside(child, path)


def copy_tree(to: Path) -> Path:
    """Copy what tests need, without compiled files: Python would take an old one for a text of the same length."""
    for source in (TESTS.parent / name for name in TREE):
        if source.is_dir():
            shutil.copytree(source, to / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, to / source.name)
    return to


def run_tests(tree: Path, tests: Sequence[str], k: str, seconds: float) -> tuple[int | None, str]:
    """Exit status of pytest in a tree, None where the time ran out, and what it wrote."""
    words = ["-o", "addopts=", "-m", "not slow", "-x", "-p", "no:cacheprovider", *(["-k", k] if k else [])]
    words += [f"tests/{test}" for test in tests]
    with tempfile.NamedTemporaryFile() as output:
        process = SERVER.Process(target=_pytest, args=(tree, words, output.name))
        process.start()
        process.join(seconds)
        status = process.exitcode
        if status is None:
            os.killpg(cast(int, process.pid), signal.SIGKILL)
            process.join()
        return status, Path(output.name).read_text(encoding="utf-8", errors="replace")


def _pytest(tree: Path, words: list[str], output: str) -> None:
    """Run pytest in a process of its own, as if it had been started in the tree."""
    os.setsid()  # tests start processes of their own: a group that can be ended
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != TESTS)]
    sys.argv, sys.dont_write_bytecode = ["pytest", *words], True
    import pytest

    sys.exit(pytest.main(words))


def examine(fault: Fault, tree: Path, seconds: float) -> str:
    """Put a fault into a tree, run its tests, take it out again; say what happened."""
    try:
        file, text = place(fault, tree / "cflow")
    except Unplaced as error:
        return f"COULD NOT BE PLACED ({error})"
    sound = file.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    try:
        status, output = run_tests(tree, fault.tests, fault.k, seconds)
    finally:
        file.write_text(sound, encoding="utf-8")
    if status in (PASSED, FAILED) and "ERROR collecting" not in output:  # what cannot be imported tests nothing
        return "caught" if status == FAILED else "SURVIVED"
    return "TIMED OUT" if status is None else f"NO VERDICT (pytest ended with {status})\n{output[-2000:]}"


def check_sound(tree: Path, faults: Sequence[Fault], seconds: float) -> str:
    """What pytest wrote where the tests fail even without a fault, else ""."""
    for k in sorted({fault.k for fault in faults}):
        tests = list(dict.fromkeys(test for fault in faults if fault.k == k for test in fault.tests))
        status, output = run_tests(tree, tests, k, seconds * len(tests))
        if status != PASSED:
            return f"{output[-4000:]}\n{'the time ran out' if status is None else f'pytest ended with {status}'}"
    return ""


def main(args: Sequence[str] | None = None) -> int:
    """Run the table and return the exit status."""
    parser = argparse.ArgumentParser(description="Put faults into cflow and look whether the tests notice.")
    parser.add_argument("word", nargs="?", default="", help="only faults with it in description, place, tests or table")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for the tests of one fault")
    options = parser.parse_args(args)
    SERVER.set_forkserver_preload(PRELOAD)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    faults = [fault for fault in read_table() if options.word.lower() in fault.text]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(options.jobs):
            trees.put(copy_tree(Path(folder) / str(number)))
        print(f"{len(faults)} faults; first their tests without any", flush=True)
        if broken := check_sound(Path(folder) / "0", faults, options.seconds):
            print(f"the tests fail without any fault:\n{broken}")
            return 1

        def attempt(fault: Fault) -> tuple[str, float]:
            tree, start = trees.get(), time.monotonic()
            try:
                return examine(fault, tree, options.seconds), time.monotonic() - start
            finally:
                trees.put(tree)

        caught = 0
        width = max((len(fault.where) for fault in faults), default=0)
        for fault, (verdict, seconds) in zip(faults, pool.map(attempt, faults), strict=True):
            caught += verdict == "caught"
            print(f"{seconds:4.0f} s  {fault.where:{width}}  {fault.what}: {verdict}", flush=True)
    print(f"{caught} of {len(faults)} faults caught")
    return 0 if faults and caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
