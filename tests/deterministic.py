"""Run a script with deterministic algorithms, where torch has them: `deterministic.py SCRIPT ARGS…`."""

import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
