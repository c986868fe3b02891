"""examples/train.py in this process: `train(*flags)` as `helpers.train`, without a fresh interpreter."""

import contextlib
import io
import os
import sys
from unittest import mock

import torch
import train as script
from accelerate.state import AcceleratorState, GradientState
from helpers import EXAMPLES, SMALL


def train(*args: object, ok: bool = True, **environment: str) -> str:
    """What train.py printed; whether it ended well must be as expected."""
    out = io.StringIO()
    argv = list(map(str, (*SMALL, *args)))
    failed = False
    settings = dict(ACCELERATE_USE_CPU="true", **environment)
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(sys, "argv", [str(EXAMPLES / "train.py"), *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            script.main(argv)
        except SystemExit as end:
            failed = end.code not in (None, 0)
            if isinstance(end.code, str):
                print(end.code)
        finally:
            GradientState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
            torch._dynamo.reset()
    assert failed != ok, out.getvalue()
    return out.getvalue()
