"""`bayes-merge methods`."""

from __future__ import annotations

import inspect

import pytest

from mergekit_bayes.merge.registry import methods
from tests.cli.conftest import Command


def test_every_method_is_listed_with_what_it_takes(command: Command) -> None:
    done = command("methods")
    assert (done.code, done.err) == (0, "")
    for method in methods():
        parameters = [parameter.name for parameter in method.parameters]
        for word in (method.name, *method.aliases, method.paper, *parameters):
            assert word in done.out
    assert "normalize (true)" in done.out
    assert "lambda (1)" in done.out


def test_nothing_is_wrapped_off_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = command("methods").out
    monkeypatch.setenv("COLUMNS", "30")
    assert command("methods").out == wide


@pytest.mark.parametrize("name", [name for method in methods() for name in (method.name, *method.aliases)])
def test_one_method_is_explained_by_its_docstring(command: Command, name: str) -> None:
    done = command("methods", name)
    method = next(each for each in methods() if name in (each.name, *each.aliases))
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{method.name}   ({method.paper})\n")
    assert done.out.endswith(f"\n\n{inspect.getdoc(method.kernel)}\n")
    assert all(f"  {parameter.name} = " in done.out for parameter in method.parameters)


def test_a_method_that_is_not_there_is_refused(command: Command) -> None:
    done = command("methods", "liner")
    assert (done.code, done.out) == (2, "")
    assert "Did you mean `linear`?" in done.err
