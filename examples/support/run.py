"""What a training run consists of, and the exchange between its processes."""

import argparse
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from support.checkpoints import Progress, replacing, save_checkpoint, set_aside_diverged
from support.launching import StopSignal
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import s3n_timm


def unwrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    return accelerator.unwrap_model(model, keep_torch_compile=False)


@dataclass
class Run:
    """What a run trains, and with what; what follows it is written to `args.output`."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: nn.Module  # as Accelerate prepared it
    ema: ModelEmaV3 | None
    criterion: s3n_timm.S3NLoss
    optimizer: torch.optim.Optimizer
    scheduler: Any
    mixup: Mixup | None
    progress: Progress
    trajectory: dict[str, Any]
    names: list[str]
    data_config: dict[str, Any]
    stop: StopSignal

    @property
    def bare(self) -> nn.Module:
        return unwrap(self.model, self.accelerator)

    @property
    def rate(self) -> float:
        """The learning rate of new layers: those of the backbone and of beta are parts of it."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def watched(self) -> str:
        """The split that is evaluated after an epoch."""
        return "val" if self.args.val_fraction or self.args.val_split else "test"

    @property
    def multi_label(self) -> bool:
        return self.criterion.multi_label

    @property
    def metric(self) -> str:
        """What `evaluate` measures, in %."""
        return "mAP" if self.multi_label else "top-1"

    def save(self) -> None:
        save_checkpoint(self.args.output, self.progress, self.ema, self.trajectory, self.args.checkpoint_hist,
                        self.accelerator)

    def export(self, model: nn.Module, kind: str) -> None:
        """Write weights that timm loads to the folder `kind`."""
        state_dict = self.accelerator.get_state_dict(model)  # of all processes, where each holds a shard
        state_dict = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}  # torch.compile's
        with replacing(self.args.output / kind, self.accelerator) as folder:
            if self.accelerator.is_main_process:
                s3n_timm.save(unwrap(model, self.accelerator), folder, label_names=self.names,
                              data_config=self.data_config, state_dict=state_dict)

    def say_stopped(self) -> None:
        name = self.stop.name or "a signal to another process"
        self.accelerator.print(f"Stopped by {name} after {self.progress.updates} updates. Everything is saved: "
                               "continue with --resume.")


class Exchange:
    """The loss and the stop signals of all processes: exchanged once an update, looked at one update later.

    By then the device has computed them, so the host queues work ahead and never waits.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.waiting: deque[tuple[int, float, Tensor]] = deque()

    def send(self, loss: Tensor, rate: float) -> None:
        """Start the exchange of an update: `loss` is this process's mean over its accumulation steps."""
        signals = torch.stack([loss.float(), torch.full_like(loss, self.run.stop.name is not None).float()])
        self.waiting.append((self.run.progress.updates, rate, self.run.accelerator.reduce(signals, "mean")))

    def receive(self, leave: int = 0) -> Iterator[tuple[float, float, bool]]:
        """Loss, learning rate and stop signal of the updates sent, the last `leave` excepted.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        args, accelerator = self.run.args, self.run.accelerator
        while len(self.waiting) > leave:
            update, rate, signals = self.waiting.popleft()
            loss, stop = signals.tolist()
            if not math.isfinite(loss):
                set_aside_diverged(args.output, update, accelerator)
                raise FloatingPointError(
                    f"The loss became {loss} at update {update}: lower --lr ({args.lr}) or add --clip-grad or "
                    "--warmup-epochs, and continue with --resume."
                )
            self.run.progress.loss += loss
            if args.log_with:
                accelerator.log(dict(loss=loss, lr=rate), step=update)
            yield loss, rate, stop > 0
