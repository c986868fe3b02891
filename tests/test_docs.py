"""The examples in docstrings run and say what they show."""

import doctest
import importlib
import pkgutil

import pytest

import s3n_timm

MODULES = sorted(module.name for module in pkgutil.walk_packages(s3n_timm.__path__, "s3n_timm."))
SHOWN = ("response", "peaks", "attention", "sampling", "loss", "model", "early_exit")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted or name.removeprefix("s3n_timm.") not in SHOWN
