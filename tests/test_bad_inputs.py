"""Every public name refuses bad input in one line that names the argument, and stands in the table."""

import importlib
import inspect
from types import ModuleType

import pytest
from bad_inputs import BAD, NOTHING, Bad

import cflow

MODULES = [name for name in cflow.__all__ if isinstance(getattr(cflow, name), ModuleType)]


def public_names() -> set[str]:
    """What `cflow` and its public modules list in `__all__`; of one without, what it defines."""
    found = {name for name in cflow.__all__ if name not in MODULES}
    for name in MODULES:
        module = importlib.import_module(f"cflow.{name}")
        own = [x for x, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        listed = getattr(module, "__all__", [x for x in own if not x.startswith("_")])
        found |= {f"{name}.{x}" for x in listed}
    return found


def test_every_public_name_has_bad_inputs() -> None:
    names = public_names()
    assert len(names) > 120
    assert sorted(names - BAD.keys() - NOTHING.keys()) == [], "add their bad inputs to tests/bad_inputs.py"
    assert sorted((BAD.keys() | NOTHING.keys()) - names) == []
    assert not BAD.keys() & NOTHING.keys()
    assert all(BAD.values())


CALLS = [pytest.param(bad, id=f"{name}-{i}") for name, calls in BAD.items() for i, bad in enumerate(calls)]


@pytest.mark.parametrize("bad", CALLS)
def test_bad_input_is_named(bad: Bad, tmp_path) -> None:
    with pytest.raises(bad.error) as caught:
        bad.call(*[tmp_path] * len(inspect.signature(bad.call).parameters))
    message = str(caught.value)
    assert bad.words in message
    assert len(message.splitlines()) == 1, message
    assert isinstance(caught.value, cflow.CflowError)
