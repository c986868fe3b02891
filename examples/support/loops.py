"""The sampling stage as the paper writes it, image by image and peak by peak: what benchmark.py compares ours with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import s3n_timm

GRID = 31
STAGE = dict(mode="expected", grid_size=GRID, floor=0.09, fwhm=13)


def draw_peaks(batch: int, peaks: int, device: torch.device) -> Tensor:
    """B×G×G responses with so many peaks each, none next to another."""
    generator = torch.Generator().manual_seed(0)
    response = torch.zeros(batch, GRID, GRID)
    free = torch.cartesian_prod(torch.arange(1, GRID, 3), torch.arange(1, GRID, 3))
    for image in response:
        y, x = free[torch.randperm(len(free), generator=generator)[:peaks]].unbind(1)
        image[y, x] = 0.3 + 0.6 * torch.rand(peaks, generator=generator)
        image[y[:1], x[:1]] = 1  # so that normalizing leaves all as they are
    return response.to(device)


def sample_by_loops(image: Tensor, response: Tensor, beta_discriminative: Tensor, beta_complementary: Tensor) -> list:
    """The stage as equations 2 to 8 are written: image by image, peak by peak, one dense convolution a map."""
    batch, cells = len(image), torch.arange(GRID, device=image.device, dtype=torch.float32)
    pad = GRID - 1
    offset = torch.arange(-pad, pad + 1, device=image.device)
    falloff = torch.exp(-4 * math.log(2) * offset.square() / STAGE["fwhm"]**2)
    kernel = (falloff[:, None] * falloff)[None, None]
    place = torch.arange(-pad, GRID + pad, device=image.device) / (GRID - 1)
    everywhere = torch.stack(torch.meshgrid(place, place, indexing="xy"))
    warped = []
    for i in range(batch):
        peaks = s3n_timm.find_peaks(response[i:i + 1])[0].nonzero().tolist()
        for strong, beta in ((True, beta_discriminative), (False, beta_complementary)):
            q = torch.full((GRID, GRID), STAGE["floor"], device=image.device)
            for y, x in peaks:
                value = response[i, y, x]
                distance = (cells[:, None] - y).square() + (cells - x).square()
                weight, height = (value, value) if strong else (1 - value, 1 / value)
                q = q + weight * height * torch.exp(-distance / (value * beta.square()))
            padded = F.pad(q[None, None], (pad, pad, pad, pad), mode="replicate")
            mass = F.conv2d(padded, kernel)
            grid = F.conv2d((padded[0] * everywhere)[:, None], kernel)[:, 0] / mass[0]
            grid = (2 * grid - 1).clamp(-1, 1)[None]
            grid = F.interpolate(grid, size=image.shape[-2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
            warped.append(F.grid_sample(image[i:i + 1], grid, align_corners=True))
    return [torch.cat(warped[0::2]), torch.cat(warped[1::2])]
