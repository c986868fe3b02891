"""SnapMix: pixels and label weights by hand."""

import numpy as np
import pytest
import timm
import torch
from support.snapmix import SnapMix
from timm.data.mixup import rand_bbox

from s3n_timm import S3N

CLASSES = 5


def create(kind):
    torch.manual_seed(0)
    model = S3N("test_resnet", CLASSES) if kind == "s3n" else timm.create_model("test_resnet", num_classes=CLASSES)
    return model.train()


def batch(count=4, side=64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator), torch.tensor([0, 3, 1, 4][:count])


@pytest.mark.parametrize("kind", ["s3n", "plain"])
def test_boxes_and_label_weights(kind):
    model, (images, labels) = create(kind), batch()
    mix = SnapMix(model, alpha=5.0)
    shares = mix.locate(images, labels)
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(4))
    np.random.seed(3)
    mixed, targets = mix(images, labels)
    np.random.seed(3)
    np.random.rand()
    (top, bottom, left, right), taken = (rand_bbox(images.shape, np.random.beta(5, 5)) for _ in range(2))
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    assert 0 < outside.sum() < 64 * 64
    assert torch.equal(mixed[..., outside], images[..., outside])
    for i, j in zip(range(4), reversed(range(4))):
        patch = images[j, :, taken[0]:taken[1], taken[2]:taken[3]]
        corners = mixed[i, :, [top, bottom - 1], :][..., [left, right - 1]]
        torch.testing.assert_close(corners, patch[:, [0, -1]][..., [0, -1]])
        own = shares[i][outside].sum().item()
        other = shares[j, taken[0]:taken[1], taken[2]:taken[3]].sum().item()
        expected = torch.zeros(CLASSES)
        expected[labels[i]] += own
        expected[labels[j]] += other
        torch.testing.assert_close(targets[i], expected)


def test_reading_the_maps_changes_no_mode_and_no_statistics():
    model, (images, labels) = create("plain"), batch()
    model.get_classifier().eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    SnapMix(model, alpha=5.0)(images, labels)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_mixing_targets_are_the_labels():
    images, labels = batch()
    mixed, targets = SnapMix(create("plain"), alpha=5.0, prob=0.0)(images, labels)
    assert mixed is images
    assert torch.equal(targets.argmax(1), labels)
    assert torch.equal(targets.sum(1), torch.ones(4))
