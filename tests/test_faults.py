"""The table of faults fits the code and the tests as they are; running it is `python tests/faults.py`."""

import ast

import pytest
from faults import TESTS, Fault, place, read_table

TABLE = read_table()


def test_the_table_is_long_and_its_entries_differ():
    assert len(TABLE) >= 160
    assert len({fault.what for fault in TABLE}) == len(TABLE)
    assert len({(fault.where, fault.before, fault.after) for fault in TABLE}) == len(TABLE)


@pytest.mark.parametrize("fault", TABLE, ids=lambda fault: fault.what)
def test_a_fault_can_be_placed(fault: Fault) -> None:
    assert fault.before != fault.after
    _, text = place(fault, TESTS.parent / "cflow")
    ast.parse(text)
    assert fault.tests
    for test in fault.tests:
        file, _, node = test.partition("::")
        names = {d.name for d in ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8"))) if hasattr(d, "name")}
        assert not node or node.partition("[")[0] in names
