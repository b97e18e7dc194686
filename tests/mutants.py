"""Faults that nobody thought of: the core is changed at random in small ways, and some test should notice each.

    python tests/mutants.py                          # sixty of them, always the same: half an hour on one core
    python tests/mutants.py --count 200 --seed 1     # others
    python tests/mutants.py solve/explicit.py        # of files with that in their path

An operator changes one expression: a comparison, a sign, a sum, a number by one, `and` for `or`, two arguments swapped,
a `detach` or a statement dropped. What stands in annotations, docstrings and messages of errors is left alone. All
mutants are listed in the order of the files, and a seed draws from them. The exit status is 1 where fewer than 95 %
are caught, not counting those in `EQUIVALENT`: they compute the same, so that no test can notice them.
"""

from __future__ import annotations

import argparse
import ast
import os
import queue
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from faults import FAILED, PASSED, PRELOAD, SERVER, TESTS, copy_tree, run_tests

SOLVES = (
    "test_properties.py",
    "test_flow_exact.py",
    "test_errors.py",
    "test_against_torchdiffeq.py",
    "test_failures.py",
)
GRADIENTS = ("test_gradients.py", "test_discrete.py", "test_properties.py", "test_modes.py")
DERIVATIVES = ("test_closed_forms.py", "test_potentials.py", "test_properties.py", "test_nets.py")
ELSEWHERE = (
    *("test_distributions.py", "test_discrete.py", "test_gradients.py", "test_solenoidal.py", "test_pde.py"),
    *("test_users_modules.py", "test_differentiation.py", "test_exhaustive.py", "test_compiled.py"),
)  # asked where those whose business it is have noticed nothing
CORE = {
    "times.py": (*SOLVES, "test_vae.py"),
    "selection.py": (*SOLVES, "test_users_modules.py", "test_distributions.py"),
    "fields.py": (*DERIVATIVES, "test_solenoidal.py", "test_errors.py"),
    "transform.py": ("test_distributions.py",),
    "priors.py": ("test_distributions.py",),
    "pde": ("test_pde.py", "test_pde_linear.py"),
    "potentials": DERIVATIVES,
    "solve/discrete.py": GRADIENTS,
    "solve/gradients.py": GRADIENTS,
    "solve/explicit.py": SOLVES,
    "solve/integrate.py": SOLVES,
    "solve/norms.py": SOLVES,
    "solve/fingerprint.py": ("test_fingerprint.py", "test_compiled.py"),
    "solve/programs.py": ("test_compiled.py", "test_fingerprint.py"),
    "solve/rhs.py": SOLVES,
    "solve/segments.py": SOLVES,
    "solve/solve.py": SOLVES,
    "solve/state.py": SOLVES,
    "solve/steps.py": SOLVES,
    "solve/tableau.py": SOLVES,
}  # file or folder below cflow/ → who should notice

EQUIVALENT = {
    "seen = self.times.requires_grad_(self.times.requires_grad)": "gradients are asked of `seen` itself",
    "strict=False": "what is zipped is of one length",
    "if at > -1e-6 * solve.segment.length": "no way back ends on the bound to the last bit",
    "hidden = w2.shape[2]": "W₂ is square",
    "still = (grad == 0).all(1)": "the second of two axes is the last",
    "if part <= 0.5": "from either end the half is the same",
}  # in the line after the change → why it computes the same

Change = tuple[int, int, bytes]  # bytes from and to, and what stands there instead

COMPARISONS = {
    "Lt": "<=",
    "LtE": "<",
    "Gt": ">=",
    "GtE": ">",
    "Eq": "!=",
    "NotEq": "==",
    "Is": "is not",
    "In": "not in",
}
SYMBOLS = {"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!=", "Is": "is", "In": "in"}
SUMS = {"Add": ("+", "-"), "Sub": ("-", "+"), "Mult": ("*", "/"), "Div": ("/", "*")}


@dataclass(frozen=True)
class Mutant:
    """A change of one file: bytes `start` to `end` of it become `after`.

    Attributes:
        file: below cflow/.
        line: counted from 1.
        what: what kind of change.
    """

    file: str
    line: int
    what: str
    start: int
    end: int
    after: bytes

    def apply(self, source: bytes) -> bytes:
        """The source with the change."""
        return source[: self.start] + self.after + source[self.end :]

    def describe(self, source: bytes) -> str:
        """Where, what, and the line before and after."""
        before = source.splitlines()[self.line - 1].decode().strip()
        after = self.apply(source).splitlines()[self.line - 1].decode().strip()
        return f"{self.file}:{self.line} {self.what}: `{before}` → `{after}`"


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a file, in the order of their places."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))

    def place(node: ast.expr | ast.stmt) -> tuple[int, int]:
        return (
            offsets[node.lineno - 1] + node.col_offset,
            offsets[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0),
        )

    def between(left: ast.expr, right: ast.expr, symbol: str, after: str) -> Change | None:
        first, last = place(left)[1], place(right)[0]
        at = source.find(symbol.encode(), first, last)
        return None if at < 0 or b"#" in source[first:last] else (at, at + len(symbol), after.encode())

    found = []
    for node in _expressions(ast.parse(source)):
        for what, change in _changes(node, source, place, between):
            if change is not None:
                found.append(Mutant(file, node.lineno, what, *change))
    return sorted(found, key=lambda m: (m.start, m.end, m.after))


def _changes(
    node: ast.AST,
    source: bytes,
    place: Callable[[ast.expr | ast.stmt], tuple[int, int]],
    between: Callable[[ast.expr, ast.expr, str, str], Change | None],
) -> Iterator[tuple[str, Change | None]]:
    """Kind and place of each change of one node; None where the text is not the plain one."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator).__name__ in COMPARISONS:
            name = type(operator).__name__
            yield "comparison", between(left, right, SYMBOLS[name], COMPARISONS[name])
        case ast.BinOp(left=left, op=operator, right=right) if type(operator).__name__ in SUMS:
            yield "arithmetic", between(left, right, *SUMS[type(operator).__name__])
        case ast.BoolOp(op=operator, values=[left, right, *_]):
            pair = ("and", "or") if isinstance(operator, ast.And) else ("or", "and")
            yield "and, or", between(left, right, *pair)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            (start, _), (first, _) = place(node), place(operand)
            yield "sign", None if b"(" in source[start:first] else (start, first, b"")
        case ast.Constant(value=bool(value)):
            yield "truth", (*place(node), str(not value).encode())
        case ast.Constant(value=int(value)):
            yield "number", (*place(node), str(value + 1).encode())
        case ast.Call(func=ast.Attribute(value=inner, attr="detach"), args=[]):
            yield "detach dropped", (*place(node), source[slice(*place(inner))])
        case ast.Call(args=[ast.Name() | ast.Attribute() as one, ast.Name() | ast.Attribute() as two, *_]):
            (a, b), (c, d) = place(one), place(two)
            if source[a:b] != source[c:d]:
                yield "arguments swapped", (a, d, source[c:d] + source[b:c] + source[a:b])
        case ast.Expr(value=ast.Call()):
            yield "statement dropped", (*place(node), b"pass")


def _expressions(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Nodes that compute something: no annotations, docstrings, decorators, or what an error says."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(tree, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)
            ):
                continue
            if isinstance(child, (ast.expr, ast.stmt)):
                yield child
            yield from _expressions(child)


def all_mutants(package: Path) -> list[Mutant]:
    """Those of the core, in the order of its files."""
    found = []
    for name in CORE:
        path = package / name
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            found += mutants_of(str(file.relative_to(package)), file.read_bytes())
    return found


def who_notices(file: str) -> tuple[str, ...]:
    """Who should notice a change of a file, and who else might."""
    own = next(tests for name, tests in CORE.items() if file == name or file.startswith(f"{name}/"))
    return tuple(dict.fromkeys((*own, *ELSEWHERE)))


def examine(mutant: Mutant, tree: Path, seconds: float) -> str:
    """Put a mutant into a tree, run its tests file by file, take it out again; say what happened."""
    file = tree / "cflow" / mutant.file
    sound = file.read_bytes()
    file.write_bytes(mutant.apply(sound))
    try:
        for test in who_notices(mutant.file):
            status, _ = run_tests(tree, [test], "", seconds)
            if status is None:
                return "caught (time)"  # what runs for ever is noticed
            if status != PASSED:
                return "caught" if status == FAILED else "caught (import)"
    finally:
        file.write_bytes(sound)
    changed = mutant.apply(sound).splitlines()[mutant.line - 1].decode()
    reason = next((why for part, why in EQUIVALENT.items() if part in changed), None)
    return "SURVIVED" if reason is None else f"equivalent ({reason})"


def main(words: Sequence[str] | None = None) -> int:
    """Draw, run, and return the exit status."""
    parser = argparse.ArgumentParser(description="Change the core at random and look whether the tests notice.")
    parser.add_argument("where", nargs="?", default="", help="only of files with it in their path below cflow/")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for one file of tests")
    options = parser.parse_args(words)
    SERVER.set_forkserver_preload(PRELOAD)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    package = TESTS.parent / "cflow"
    every = [mutant for mutant in all_mutants(package) if options.where in mutant.file]
    drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(drawn)} of {len(every)} mutants, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(options.jobs):
            trees.put(copy_tree(Path(folder) / str(number)))

        for test in sorted({test for mutant in drawn for test in who_notices(mutant.file)}):
            status, output = run_tests(Path(folder) / "0", [test], "", options.seconds)
            if status != PASSED:
                print(f"{test} fails without any change:\n{output[-4000:]}")
                return 1

        def attempt(mutant: Mutant) -> str:
            tree = trees.get()
            try:
                return examine(mutant, tree, options.seconds)
            finally:
                trees.put(tree)

        verdicts = []
        for mutant, verdict in zip(drawn, pool.map(attempt, drawn), strict=True):
            verdicts.append(verdict.split(" ")[0])
            print(f"{verdict}: {mutant.describe((package / mutant.file).read_bytes())}", flush=True)
    caught, survived = verdicts.count("caught"), verdicts.count("SURVIVED")
    print(f"{caught} of {caught + survived} caught; {verdicts.count('equivalent')} change nothing")
    return 0 if caught >= 0.95 * (caught + survived) else 1


if __name__ == "__main__":
    sys.exit(main())
