"""How the scripts start and end: processes, threads, and errors that the user can mend."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

RANKS = ("LOCAL_RANK", "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_all_processes() -> None:
    """Become torchrun with all the processes that `accelerate launch --cpu --num_processes N` was asked for.

    On a CPU Accelerate leaves starting them to MPI: without it, it starts one process and says nothing.
    """
    if "MASTER_ADDR" not in os.environ or any(name in os.environ for name in RANKS):
        return  # one process was asked for, or all are there
    command = psutil.Process(os.getppid()).cmdline()
    launch = next((i for i, word in enumerate(command) if word.endswith("launch")), None)
    if launch is None:
        return
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[launch + 1:]))
    if not asked.use_cpu or asked.mpirun_hostfile is not None:
        return
    where = ["--standalone"]  # on a port that is free
    if asked.num_machines > 1:
        where = [
            "--nnodes", str(asked.num_machines), "--node_rank", str(asked.machine_rank or 0),
            "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"],
        ]
    each = ["--nproc_per_node", str(asked.num_processes // asked.num_machines)]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *where, *each, *sys.argv])


def use_cpu_threads(threads: int | None, accelerator: Accelerator) -> None:
    """Share the cores among the processes of a CPU: `accelerate launch` leaves a process one thread."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))


@contextmanager
def exiting_on(*kinds: type[Exception]) -> Iterator[None]:
    """End with the message alone of errors that the user can mend; all others keep their traceback."""
    try:
        yield
    except kinds as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
