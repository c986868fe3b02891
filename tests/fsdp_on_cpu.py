"""Run a script under FSDP on CPUs, which Accelerate allows on accelerators only: `fsdp_on_cpu.py SCRIPT ARGS…`."""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    start = PartialState.__init__

    def start_as_if_on_gpus(self, cpu=False, **kwargs):
        fresh = not self.initialized
        start(self, cpu=True, **kwargs)
        if fresh:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_if_on_gpus
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
