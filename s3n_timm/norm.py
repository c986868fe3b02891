"""Batch norm with statistics of each branch's own, as warped images differ from the input: beyond the paper."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")


class BranchBatchNorm(nn.BatchNorm2d):
    """A batch norm that reads a batch of several branches' images, one after the other, with the statistics of each.

    Weight and bias are shared. The buffers `running_mean` and `running_var` are the original's, those with a branch's
    name at the end are that branch's.
    """

    branches: tuple[str, ...]  # of the batch that comes next

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (len(self.branches), -1))
        y = torch.cat([self.normalise(parts[i], branch) for i, branch in enumerate(self.branches)])
        return self.act(self.drop(y)) if isinstance(self, BatchNormAct2d) else y

    def normalise(self, x: Tensor, branch: str) -> Tensor:
        ending = "" if branch == "original" else f"_{branch}"
        mean, var = (getattr(self, f"{name}{ending}") for name in STATISTICS)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)


class BranchBatchNormAct(BranchBatchNorm, BatchNormAct2d):
    """The same for timm's batch norm with an activation."""


def split_statistics(module: nn.Module, branches: Sequence[str]) -> tuple[BranchBatchNorm, ...]:
    """Give every batch norm of a module further statistics for these branches, in place.

    Args:
        module: a backbone.
        branches: of `"discriminative"` and `"complementary"`.

    Returns:
        The batch norms.

    Raises:
        ValueError: the module has a batch norm that is not over images or keeps no running mean, or none at all.
    """
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    kinds = {nn.BatchNorm2d: BranchBatchNorm, BatchNormAct2d: BranchBatchNormAct}
    if not norms:
        raise ValueError("branch_norm needs a backbone with batch norm, and this one has none: leave it out.")
    for norm in norms:
        # a frozen or a synchronised one computes otherwise
        if type(norm) not in kinds or norm.momentum is None or not norm.track_running_stats:
            raise ValueError(f"branch_norm knows the batch norms of torch and timm, not {type(norm).__name__}.")
        norm.__class__ = kinds[type(norm)]
        for branch in branches:
            for name in STATISTICS:
                norm.register_buffer(f"{name}_{branch}", getattr(norm, name).clone())
    split = cast(tuple[BranchBatchNorm, ...], tuple(norms))
    announce(split, ("original",))
    return split


def announce(norms: Sequence[BranchBatchNorm], branches: Sequence[str]) -> None:
    """Tell batch norms whose images the next batch holds."""
    for norm in norms:
        norm.branches = tuple(branches)
