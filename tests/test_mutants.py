"""The mutants of the core are what they are meant to be; running them is `python tests/mutants.py`."""

import ast

import pytest
from faults import TESTS
from mutants import CORE, all_mutants, mutants_of, who_notices

PACKAGE = TESTS.parent / "cflow"

SOURCE = '''"""A docstring with 1 < 2."""


def f(a: int, b: int = 3) -> int:
    """1 + 1."""
    check(a, b)
    if a < b and not b:
        raise ValueError(f"{a + b} < 3")
    é = -a * (b + 1)
    return g(é, b).detach() if a in (True,) else é
'''
CHANGES = {
    "number": ["def f(a: int, b: int = 4) -> int:", "é = -a * (b + 2)"],
    "comparison": ["if a <= b and not b:", "return g(é, b).detach() if a not in (True,) else é"],
    "and, or": ["if a < b or not b:"],
    "sign": ["if a < b and b:", "é = a * (b + 1)"],
    "arithmetic": ["é = -a / (b + 1)", "é = -a * (b - 1)"],
    "detach dropped": ["return g(é, b) if a in (True,) else é"],
    "arguments swapped": ["check(b, a)", "return g(b, é).detach() if a in (True,) else é"],
    "truth": ["return g(é, b).detach() if a in (False,) else é"],
    "statement dropped": ["pass"],
}


def test_every_operator_changes_what_it_says_and_nothing_else():
    source, found = SOURCE.encode(), {}
    for mutant in mutants_of("x.py", source):
        lines = mutant.apply(source).decode().splitlines()
        changed = [new.strip() for new, old in zip(lines, SOURCE.splitlines(), strict=True) if new != old]
        assert len(changed) == 1
        found.setdefault(mutant.what, []).extend(changed)
    assert found == CHANGES


def test_mutants_of_the_core_are_many_parse_and_are_always_the_same():
    every = all_mutants(PACKAGE)
    assert every == all_mutants(PACKAGE)
    assert len(every) > 1000
    assert {mutant.what for mutant in every} == set(CHANGES)
    for mutant in every[::50]:
        source = (PACKAGE / mutant.file).read_bytes()
        assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
        assert " → " in mutant.describe(source)


@pytest.mark.parametrize("name", CORE)
def test_who_should_notice_is_there(name):
    assert (PACKAGE / name).exists()
    assert all((TESTS / test).is_file() for test in who_notices(name))
