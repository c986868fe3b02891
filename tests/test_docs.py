"""The examples in docstrings run and say what they show."""

import doctest
import importlib
import pkgutil

import pytest

import s3n_timm

MODULES = sorted(module.name for module in pkgutil.iter_modules(s3n_timm.__path__))
SHOWN = ("response", "peaks", "attention", "sampling", "loss", "model", "predict", "evaluation")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"s3n_timm.{name}"))
    assert result.failed == 0
    assert result.attempted or name not in SHOWN
