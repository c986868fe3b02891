"""Batch norm over all processes, on CPUs as well, which torch's own refuses."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn


class SumOverProcesses(torch.autograd.Function):
    """All processes' sum; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, gradient)


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` by sums that autograd knows how to share."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        wide = x.to(self.running_mean.dtype)  # float32 under autocast, too
        count = SumOverProcesses.apply(wide.new_tensor([wide.numel() / wide.shape[1]]))
        mean = SumOverProcesses.apply(wide.sum((0, 2, 3))) / count
        # about the mean, in a second round: the difference of large squares would lose float32's digits
        centered = wide - mean[:, None, None]
        var = SumOverProcesses.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class CpuSyncBatchNormAct(BatchNormAct2d):
    """The same for timm's batch norm with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(CpuSyncBatchNorm.forward(self, x)))


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Turn every batch norm, torch's or timm's, into one over all processes."""
    if device.type != "cpu":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = CpuSyncBatchNormAct if isinstance(module, BatchNormAct2d) else CpuSyncBatchNorm
    return model
