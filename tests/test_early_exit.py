"""Early exit: confident images are answered by the original branch alone."""

import pytest
import torch

from s3n_timm import S3N
from s3n_timm.early_exit import answer_batch, choose_exit_entropy

CLASSES = 7


def build(**options):
    torch.manual_seed(0)
    model = S3N("test_resnet", CLASSES, **options).eval()
    torch.nn.init.normal_(model.backbone.get_classifier().weight, std=0.5)
    torch.nn.init.normal_(model.fusion.weight, std=0.5)
    return model


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, 3, 96, 96, generator=generator) * torch.rand(size, 1, 1, 1, generator=generator) * 4
            for size in sizes]


def count_reads(model):
    """Images of each pass of the backbone."""
    sizes, read = [], model.read
    model.read = lambda images: sizes.append(len(images)) or read(images)
    return sizes


@pytest.mark.parametrize("answer", ["joint", "mean"])
def test_without_exit_it_is_the_forward(answer):
    model, images = build(answer=answer), batches(4, 4, 2)
    with torch.no_grad():
        expected = [model(x).softmax(1) for x in images]
    for x, rows in zip(images, expected, strict=True):
        prediction = answer_batch(model, x)
        torch.testing.assert_close(prediction.probabilities, rows)
        assert not prediction.exited.any()


def test_confident_images_are_answered_by_the_original_branch():
    model, images = build(), batches(4, 4, 3)
    everything = torch.cat(images)
    with torch.no_grad():
        model.set_branch_logits(True)
        outputs = model(everything)
    own = outputs.original.softmax(1)
    entropy = torch.special.entr(own).sum(1)
    threshold = entropy.sort().values[4:6].mean().item()  # of no image itself, which rounding could move
    expected = torch.where((entropy < threshold)[:, None], own, outputs.joint.softmax(1))
    sizes = count_reads(model)
    found = [answer_batch(model, x, threshold) for x in images]
    assert [len(each.probabilities) for each in found] == [4, 4, 3]
    torch.testing.assert_close(torch.cat([each.probabilities for each in found]), expected)
    torch.testing.assert_close(torch.cat([each.entropy for each in found]), entropy)
    assert torch.cat([each.exited for each in found]).sum() == (entropy < threshold).sum() == 5
    # one pass for every image, two warps for those that did not exit
    assert sum(sizes) == 11 + 2 * 6


@pytest.mark.parametrize(("threshold", "warped"), [(0.0, 11), (10.0, 0)])
def test_extremes(threshold, warped):
    model, images = build(), batches(4, 4, 3)
    sizes = count_reads(model)
    found = [answer_batch(model, x, threshold) for x in images]
    assert sum(sizes) == 11 + 2 * warped
    assert sum(int((~each.exited).sum()) for each in found) == warped


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: build().train(), "eval mode"),
        (lambda: build(branches="D+C"), "needs the O branch"),
        (lambda: S3N("test_resnet", 0).eval(), "needs a classifier"),
    ],
)
def test_models_that_cannot_predict(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        answer_batch(model(), *batches(2))


# the threshold


def test_threshold_loses_no_more_than_it_may():
    entropy = torch.tensor([0.5, 0.1, 0.2, 0.9, 0.3, 0.4])
    original = torch.tensor([0, 1, 1, 0, 0, 1]).bool()
    joint = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    # in order of entropy the exits change the count of right answers by 0, 0, -1, 0, -1, -2
    assert choose_exit_entropy(entropy, original, joint, 0.0) == (pytest.approx(0.45), pytest.approx(4 / 6))
    assert choose_exit_entropy(entropy, original, joint, 0.17) == (pytest.approx(0.7), pytest.approx(5 / 6))
    assert choose_exit_entropy(entropy, original, joint, 0.5)[1] == 1
    assert choose_exit_entropy(entropy, ~joint, joint, 0.0)[1] == 0.0


def test_images_of_one_entropy_exit_together():
    entropy = torch.tensor([0.0, 0.2, 0.2])
    original, joint = torch.tensor([True, True, False]), torch.tensor([True, True, True])
    assert choose_exit_entropy(entropy, original, joint, 0.0) == (pytest.approx(0.1), pytest.approx(1 / 3))


@pytest.mark.parametrize("entropy", [torch.tensor([]), torch.tensor([0.1, float("nan")]), torch.rand(3)])
def test_threshold_wants_whole_columns(entropy):
    with pytest.raises(ValueError, match="entropy"):
        choose_exit_entropy(entropy, torch.ones(2).bool(), torch.ones(2).bool())
