"""Public docstrings have the sections of their signatures: Args or Attributes, Returns, Raises."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest
from pydantic import BaseModel

ROOMS = (
    "attacks",
    "classifiers",
    "data",
    "embedding",
    "eval",
    "losses",
    "models",
    "report",
    "testing",
    "training",
    "types",
)


def public_objects(room: str) -> Iterator[tuple[str, object]]:
    """(name, object) of the functions, classes and public methods that a room exports."""
    module = importlib.import_module(f"hsat.{room}")
    for name in getattr(module, "__all__", ("embed",)):
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", function


def parameters(value: Callable[..., object]) -> list[str]:
    """Names that a caller passes."""
    try:
        names = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in names if name not in {"self", "cls"} and not name.startswith("_")]


def missing_sections(value: object) -> list[str]:
    """The sections that a docstring should have and has not."""
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        described = issubclass(value, BaseModel) or Protocol in value.__bases__ or not parameters(value)
        return [] if described or "Args:" in text or "Attributes:" in text else ["Attributes"]
    assert callable(value)
    wanted = []
    if parameters(value):
        wanted.append("Args:")
        if inspect.signature(value).return_annotation not in (None, "None", inspect.Signature.empty):
            wanted.append("Returns:")
    if "\n        raise " in inspect.getsource(value):
        wanted.append("Raises:")
    return [section for section in wanted if section not in text.replace("Yields:", "Returns:")]


@pytest.mark.parametrize("room", ROOMS)
def test_public_docstrings_have_the_sections_of_their_signatures(room):
    missing = {name: sections for name, value in public_objects(room) if (sections := missing_sections(value))}
    assert not missing, missing
