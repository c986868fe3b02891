import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from s3n_timm import S3NLogits, S3NLoss


def logits(seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return S3NLogits(*(torch.randn(3, classes, generator=generator, dtype=torch.float64) for _ in range(4)))


TARGET = torch.tensor([2, 0, 3])


def smoothed(output, target, epsilon):
    """-Σ_c t_c ln p_c with 1 - ε on the true class and ε / (C - 1) on every other, one number at a time."""
    total = 0.0
    for row, label in zip(output, target.tolist()):
        log_normalizer = row.exp().sum().log()
        for c, score in enumerate(row):
            share = 1 - epsilon if c == label else epsilon / (len(row) - 1)
            total = total - share * (score - log_normalizer)
    return total / len(output)


def test_sum_over_branches_plus_the_joint_term_once():
    outputs = logits()
    expected = sum(smoothed(output, TARGET, 0.0) for output in outputs)
    torch.testing.assert_close(S3NLoss()(outputs, TARGET), expected)


def test_by_hand():
    # two classes, equal logits everywhere: four times ln 2
    even = S3NLogits(*(torch.zeros(1, 2) for _ in range(4)))
    assert S3NLoss()(even, torch.tensor([1])).item() == pytest.approx(4 * 0.6931472, abs=1e-5)


@pytest.mark.parametrize("absent", ["original", "discriminative", "complementary"])
def test_an_absent_branch_adds_nothing(absent):
    outputs = logits()
    expected = S3NLoss()(outputs, TARGET) - F.cross_entropy(getattr(outputs, absent), TARGET)
    torch.testing.assert_close(S3NLoss()(outputs._replace(**{absent: None}), TARGET), expected)


def test_joint_logits_alone():
    outputs = logits()
    torch.testing.assert_close(S3NLoss(0.1)(outputs.joint, TARGET), smoothed(outputs.joint, TARGET, 0.1))
    only = S3NLogits(outputs.joint, None, None, None)
    torch.testing.assert_close(S3NLoss(0.1)(only, TARGET), S3NLoss(0.1)(outputs.joint, TARGET))


@pytest.mark.parametrize("epsilon", [0.0, 0.15, 0.3])
@pytest.mark.parametrize("classes", [4, 7])
def test_smoothing_goes_to_the_other_classes(epsilon, classes):
    outputs = logits(classes=classes)
    expected = sum(smoothed(output, TARGET, epsilon) for output in outputs)
    torch.testing.assert_close(S3NLoss(epsilon)(outputs, TARGET), expected)


def test_the_originals_smoothing_is_on_the_original_and_complementary_outputs():
    outputs = logits()
    epsilons = dict(joint=0.0, original=0.15, discriminative=0.0, complementary=0.15)
    expected = sum(smoothed(getattr(outputs, name), TARGET, epsilon) for name, epsilon in epsilons.items())
    torch.testing.assert_close(S3NLoss(S3NLoss.ORIGINAL)(outputs, TARGET), expected)


def test_soft_targets():
    outputs, one_hot = logits(), F.one_hot(TARGET, 4).double()
    torch.testing.assert_close(S3NLoss(0.15)(outputs, one_hot), S3NLoss(0.15)(outputs, TARGET))
    mixed = 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)
    expected = -(mixed * outputs.joint.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(S3NLoss()(outputs.joint, mixed), expected)
    # smoothing is linear in the target, so a mixture's loss is the mixture of the losses
    parts = [S3NLoss(0.15)(outputs.joint, target) for target in (one_hot, one_hot.roll(1, 0))]
    torch.testing.assert_close(S3NLoss(0.15)(outputs.joint, mixed), 0.7 * parts[0] + 0.3 * parts[1])


def test_every_output_receives_its_gradient():
    outputs = S3NLogits(*(output.requires_grad_() for output in logits()))
    S3NLoss()(outputs, TARGET).backward()
    for output in outputs:
        torch.testing.assert_close(output.grad, (output.softmax(1) - F.one_hot(TARGET, 4)).detach() / 3)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, {"original": 1.5}, {"fusion": 0.1}])
def test_errors_name_the_argument(smoothing):
    with pytest.raises(ValueError, match="smoothing"):
        S3NLoss(smoothing)


WEIGHTS = [0.5, 2.0, 1.0, 0.0]


def gradients(loss, outputs, target):
    outputs = S3NLogits(*(output.clone().requires_grad_() for output in outputs))
    loss(outputs, target).backward()
    return [output.grad for output in outputs]


def test_class_weights_multiply_the_loss_of_their_images_in_every_term():
    outputs = logits()
    by_hand = sum(WEIGHTS[label] * -output[row].log_softmax(0)[label]
                  for output in outputs for row, label in enumerate(TARGET.tolist())) / len(TARGET)
    torch.testing.assert_close(S3NLoss(class_weights=WEIGHTS)(outputs, TARGET), by_hand)
    torch.testing.assert_close(S3NLoss(0.1, class_weights=[1.0] * 4)(outputs, TARGET), S3NLoss(0.1)(outputs, TARGET))


@pytest.mark.parametrize("soft", [False, True])
def test_a_class_of_weight_zero_teaches_nothing(soft):
    """The third image is of the fourth class, whose weight is 0."""
    target = F.one_hot(TARGET, 4).double() if soft else TARGET
    for weighted, plain in zip(gradients(S3NLoss(class_weights=WEIGHTS), logits(), target),
                               gradients(S3NLoss(), logits(), target)):
        assert weighted[2].abs().max() == 0 < plain[2].abs().min()
        torch.testing.assert_close(weighted[:2], plain[:2] * torch.tensor([[1.0], [0.5]]).double())


def test_weighted_loss_of_a_batch_is_the_mean_of_its_parts():
    """Whatever processes and accumulation steps an update is divided among."""
    outputs, loss = logits(), S3NLoss(0.1, class_weights=WEIGHTS)
    parts = [loss(S3NLogits(*(output[i:i + 1] for output in outputs)), TARGET[i:i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(outputs, TARGET), sum(parts) / 3)
    torch.testing.assert_close(loss(outputs, F.one_hot(TARGET, 4).double()), sum(parts) / 3)


def binary(output, target, weights=(1.0,) * 4):
    """Each class on its own, one number at a time."""
    total = 0.0
    for row, wanted in zip(output, target):
        for c in range(4):
            p = 1 / (1 + (-row[c]).exp())
            total = total - weights[c] * wanted[c] * p.log() - (1 - wanted[c]) * (1 - p).log()
    return total / len(output) / 4


LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)


def test_binary_cross_entropy_of_one_and_of_several_labels():
    outputs, one_hot = logits(), F.one_hot(TARGET, 4).double()
    torch.testing.assert_close(S3NLoss(bce=True)(outputs, TARGET), sum(binary(each, one_hot) for each in outputs))
    torch.testing.assert_close(S3NLoss(bce=True)(outputs, one_hot), S3NLoss(bce=True)(outputs, TARGET))
    several = S3NLoss(multi_label=True)(outputs, LABELS)
    torch.testing.assert_close(several, sum(binary(each, LABELS) for each in outputs))
    torch.testing.assert_close(S3NLoss(multi_label=True, bce_sum=True)(outputs, LABELS), 4 * several)
    torch.testing.assert_close(S3NLoss(multi_label=True)(outputs.joint, LABELS), binary(outputs.joint, LABELS))


def test_binary_smoothing_is_that_of_timm():
    output = logits().joint.float()
    theirs = BinaryCrossEntropy(0.1)(output, TARGET)
    torch.testing.assert_close(S3NLoss(0.1, bce=True)(output, TARGET), theirs)
    torch.testing.assert_close(S3NLoss(0.1, bce=True)(output, F.one_hot(TARGET, 4).float()), theirs)  # before a mixture
    torch.testing.assert_close(S3NLoss(0.1, multi_label=True)(output, LABELS.float()),
                               BinaryCrossEntropy(0.1, smooth_dense=True)(output, LABELS.float()))
    # per output, as the original smooths
    one_hot = F.one_hot(TARGET, 4).double()
    expected = sum(binary(each, one_hot * 0.85 + 0.15 / 4 if name in S3NLoss.ORIGINAL else one_hot)
                   for name, each in logits()._asdict().items())
    torch.testing.assert_close(S3NLoss(S3NLoss.ORIGINAL, bce=True)(logits(), TARGET), expected)


def test_binary_threshold_makes_mixed_targets_whole():
    outputs, one_hot = logits(), F.one_hot(TARGET, 4).double()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    both = S3NLoss(bce=True, bce_target_thresh=0.2)(outputs, mixed)
    torch.testing.assert_close(both, sum(binary(each, ((one_hot + one_hot.flip(0)) > 0).double()) for each in outputs))
    torch.testing.assert_close(S3NLoss(bce=True, bce_target_thresh=0.5)(outputs, mixed),
                               S3NLoss(bce=True)(outputs, TARGET))


def test_class_weights_of_binary_cross_entropy_weigh_images_that_show_the_class():
    outputs = logits()
    expected = sum(binary(each, LABELS, WEIGHTS) for each in outputs)
    torch.testing.assert_close(S3NLoss(multi_label=True, class_weights=WEIGHTS)(outputs, LABELS), expected)
    for weighted in gradients(S3NLoss(multi_label=True, class_weights=WEIGHTS), outputs, LABELS):
        assert weighted[2, 3] == 0  # shows the fourth class, whose weight is 0
        assert weighted[0, 3] > 0  # does not show it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(class_weights=[1.0, -1.0]), "class_weights"),
        (dict(class_weights=[1.0, float("nan")]), "class_weights"),
        (dict(class_weights=[0.0, 0.0]), "not all 0"),
        (dict(class_weights=[]), "class_weights"),
        (dict(bce_sum=True), "options of bce"),
        (dict(bce_target_thresh=0.2), "options of bce"),
    ],
)
def test_what_does_not_combine_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        S3NLoss(**options)


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        (dict(class_weights=[1.0, 2.0]), TARGET, "2 weights for 4 classes"),
        (dict(multi_label=True), TARGET, "B×C floats"),
        (dict(multi_label=True), LABELS.long(), "B×C floats"),
        (dict(bce=True), torch.tensor([0, 1, 4]), "from 0 to 3"),
        (dict(bce=True), torch.tensor([0, 1, -1]), "from 0 to 3"),
    ],
)
def test_targets_that_do_not_fit_are_refused(options, target, said):
    with pytest.raises(ValueError, match=said):
        S3NLoss(**options)(logits(), target)
