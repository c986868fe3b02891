"""The examples in docstrings run and say what they show."""

import doctest
import importlib
import pkgutil
import re
import shutil
from pathlib import Path

import pytest

import s3n_timm

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(s3n_timm.__path__, "s3n_timm."))
SHOWN = ("response", "peaks", "attention", "sampling", "loss", "model", "early_exit")


def test_the_readme_s_first_lines(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples" / "figures", tmp_path / "examples" / "figures")
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    call, said = re.search(r"(classifier\(.*?\)) +# (.*)", block).groups()
    scope = {}
    exec(block, scope)
    assert (tmp_path / "seen.png").stat().st_size > 10_000
    (answer,) = eval(call, scope)
    assert said.startswith(f"[{{'label': {answer['label']!r}, 'score': {str(answer['score'])[:5]}")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted or name.removeprefix("s3n_timm.") not in SHOWN
