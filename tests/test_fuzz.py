"""Whatever comes in: a right answer, or one sentence that says what is wrong with it."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import s3n_timm
from s3n_timm import S3N, Classifier, S3NLogits, S3NLoss
from s3n_timm.data import drawn_birds
from s3n_timm.early_exit import answer_batch
from s3n_timm.images import read_image
from s3n_timm.peaks import PARTITION_MODES
from s3n_timm.sampling import BRANCHES

CLASSES = 5
REFUSALS = (ValueError, TypeError)
relaxed = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return S3N("test_resnet", CLASSES).eval()


@pytest.fixture(scope="module")
def classifier(model):
    return Classifier(model)


def refuses(call, *args, **kwargs):
    """Whether a call is refused, which it may be in one readable sentence only."""
    try:
        call(*args, **kwargs)
    except REFUSALS as error:
        message = str(error)
        assert 15 < len(message) < 400, f"no sentence: {message!r:.200}"
        assert "\n" not in message
        return True
    return False


def finite(*tensors):
    return all(tensor.isfinite().all() for tensor in tensors if tensor is not None)


# the model

WRONG = {
    "no tensor": (lambda: [1], TypeError, "must be a tensor"),
    "an array": (lambda: np.zeros((1, 3, 64, 64), np.float32), TypeError, "must be a tensor"),
    "no batch": (lambda: torch.rand(3, 64, 64), ValueError, "Add a batch dimension"),
    "matrix": (lambda: torch.rand(64, 64), ValueError, "B×3×H×W"),
    "video": (lambda: torch.rand(1, 1, 3, 64, 64), ValueError, "B×3×H×W"),
    "scalar": (lambda: torch.tensor(1.0), ValueError, "B×3×H×W"),
    "grey": (lambda: torch.rand(1, 1, 64, 64), ValueError, "3 channels"),
    "channels last in shape": (lambda: torch.rand(1, 64, 64, 3), ValueError, "3 channels"),
    "bytes": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "must be floats"),
    "whole": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.long), TypeError, "must be floats"),
    "complex": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.complex64), TypeError, "must be floats"),
    "half": (lambda: torch.zeros(1, 3, 64, 64).half(), TypeError, "float16 and the weights torch.float32"),
    "double": (lambda: torch.zeros(1, 3, 64, 64).double(), TypeError, "float64 and the weights"),
    "no row": (lambda: torch.zeros(1, 3, 0, 64), ValueError, "no pixel"),
    "no column": (lambda: torch.zeros(1, 3, 64, 0), ValueError, "no pixel"),
    "another device": (lambda: torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "move either"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_of_images_is_named(model, name):
    make, kind, message = WRONG[name]
    for call in (model, model.explain, lambda x: answer_batch(model, x)):
        with pytest.raises(kind, match=message):
            call(make())


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_what_a_backbone_cannot_read_is_named(backbone):
    model = S3N(backbone, CLASSES, backbone_args=dict(global_pool="avg") if backbone == "test_vit" else {}).eval()
    with pytest.raises(ValueError, match=r"cannot read images of shape \(2, 3, 1, 1\)"):
        model(torch.rand(2, 3, 1, 1))


def test_a_fault_that_is_not_the_images_stays_what_it_is(model, monkeypatch):
    """Out of memory, above all: Accelerate looks for it by its type."""
    def fail(x):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model.backbone, "forward_features", fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.rand(1, 3, 64, 64))


@relaxed
@given(
    batch=st.integers(0, 3), height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e15]),
    layout=st.sampled_from(["plain", "channels last", "strided", "expanded", "flipped", "with gradient"]),
)
def test_every_shape_and_layout_has_an_answer(model, batch, height, width, seed, scale, layout):
    x = scale * torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    given_as = {
        "plain": lambda: x,
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "strided": lambda: x.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": lambda: x[:, :1].expand(-1, 3, -1, -1),
        "flipped": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "with gradient": lambda: x.clone().requires_grad_(),
    }[layout]()
    logits = model(given_as)
    assert logits.shape == (batch, CLASSES)
    assert finite(logits)
    with torch.no_grad():
        # huge values leave rounding of their own size
        torch.testing.assert_close(logits, model(given_as.detach().contiguous()), rtol=1e-3, atol=1e-3 * max(1, scale))
    if layout == "with gradient" and batch:
        logits.sum().backward()
        assert finite(given_as.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_have_an_answer(dtype):
    torch.manual_seed(0)
    model = S3N("test_resnet", CLASSES).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, logits = model(x), model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_poisoned_image_spoils_no_other(model, value):
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        x[1, :, 20, 30] = value
        logits = model(x)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        answer_batch(model, x)


def test_early_exit_refuses(model):
    assert len(answer_batch(model, torch.rand(0, 3, 64, 64)).probabilities) == 0
    for entropy in (-1.0, math.nan):
        with pytest.raises(ValueError, match="exit_entropy must be at least 0"):
            answer_batch(model, torch.rand(1, 3, 64, 64), entropy)


# the equations

values = st.one_of(
    st.floats(-100, 100, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 1e-45, -1e-38, 1e30, -1e30]),
)


def floats(*shape):
    return nps.arrays(np.float32, shape, elements=values).map(torch.from_numpy)


sides = st.integers(1, 9)
responses = st.tuples(st.integers(0, 3), sides, sides).flatmap(lambda shape: floats(*shape))


@relaxed
@given(response=responses)
def test_every_response_has_peaks_and_maps(response):
    normal = s3n_timm.normalize_response(response)
    assert finite(normal)
    assert ((normal >= 0) & (normal <= 1)).all()
    peaks = s3n_timm.find_peaks(normal)
    assert peaks.shape == response.shape
    for mode in PARTITION_MODES:
        for weights, branch in zip(s3n_timm.partition_peaks(normal, peaks, mode), BRANCHES):
            assert finite(weights)
            assert (weights[~peaks] == 0).all()
            beta = torch.tensor([3.0], requires_grad=True)
            q = s3n_timm.sampling_map(normal, weights, beta, branch)
            assert finite(q)
            assert (q > 0).all()
            if min(q.shape[1:]) >= 2:
                grid = s3n_timm.warp_grid(q, (5, 7))
                assert finite(grid)
                assert (grid.abs() <= 1 + 1e-5).all()
                grid.sum().backward()
                assert finite(beta.grad)


@relaxed
@given(data=st.data(), mode=st.sampled_from(PARTITION_MODES), gate=st.sampled_from(["paper", "renormalized"]))
def test_every_map_warps(data, mode, gate):
    batch, classes = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 7))
    maps = data.draw(floats(batch, classes, data.draw(sides), data.draw(sides)))
    scores = data.draw(st.one_of(st.none(), floats(batch, classes)))
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    image = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    grid_size = data.draw(st.tuples(st.integers(2, 12), st.integers(2, 12)))
    sample = s3n_timm.selective_sample(
        image, maps, scores, mode=mode, beta_discriminative=3.9, beta_complementary=13.2, gate=gate,
        grid_size=grid_size)
    assert finite(*sample[:2], *sample.discriminative, *sample.complementary)
    for warped in (sample.discriminative.image, sample.complementary.image):
        assert warped.shape == image.shape
        assert ((warped >= -1e-5) & (warped <= 1 + 1e-5)).all(), "a bilinear reading lies between the pixels read"


SHAPES = [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (1, 2, 3, 4, 5), (0,), (2, 0, 0), (2, 3, 1), (2, 0, 4, 4)]


@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("second", SHAPES)
def test_shapes_that_do_not_fit_are_named(first, second):
    """Of any two shapes, each function answers or says which argument is wrong."""
    a, b = torch.rand(first), torch.rand(second)
    for call in (
        lambda: s3n_timm.class_response_maps(a, b),
        lambda: s3n_timm.gate_response(a, b),
        lambda: s3n_timm.normalize_response(a),
        lambda: s3n_timm.find_peaks(a),
        lambda: [s3n_timm.partition_peaks(a, b > 0.5, mode) for mode in PARTITION_MODES],
        lambda: s3n_timm.sampling_map(a, b, 3.9),
        lambda: s3n_timm.warp_grid(a, (4, 4)),
        lambda: s3n_timm.resample(a, b),
        lambda: s3n_timm.selective_sample(
            a, b, None, mode="expected", beta_discriminative=3.9, beta_complementary=13.2),
        lambda: S3NLoss()(a, b),
        lambda: S3NLoss()(a, torch.zeros(second, dtype=torch.long)),
    ):
        refuses(call)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 0.0])
def test_numbers_that_are_no_widths_are_named(wrong):
    response = torch.rand(1, 5, 5)
    peaks = s3n_timm.find_peaks(response)
    weights, _ = s3n_timm.partition_peaks(response, peaks, "expected")
    assert refuses(s3n_timm.sampling_map, response, weights, 3.9, floor=wrong)
    assert refuses(s3n_timm.warp_grid, torch.ones(1, 5, 5), (4, 4), fwhm=wrong)
    if wrong != -1.0:  # the sign of β has no meaning
        assert refuses(s3n_timm.sampling_map, response, weights, wrong)


@pytest.mark.parametrize("target", [torch.tensor([0, CLASSES]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]),
                                    torch.tensor([0]), torch.zeros(2, CLASSES + 1), torch.tensor([True, False])])
def test_targets_that_are_no_labels_are_named(target):
    logits = S3NLogits(*(torch.rand(2, CLASSES) for _ in S3NLogits._fields))
    assert refuses(S3NLoss(), logits, target)


# images


@relaxed
@given(content=st.binary(max_size=300))
def test_bytes_that_are_no_image_are_named(classifier, content):
    assert refuses(classifier, content)


@settings(relaxed, max_examples=150)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), data=st.data())
def test_damaged_files_are_read_or_named(kind, data):
    file = io.BytesIO()
    drawn_birds("test", 2, 2, 64)["image"][0].resize((24, 18)).save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[:data.draw(st.integers(0, len(content)))])
    if not refuses(read_image, content):
        image = read_image(content)
        assert image.mode == "RGB"
        assert math.prod(image.size) > 0


dtypes = st.one_of(
    nps.boolean_dtypes(), nps.integer_dtypes(), nps.unsigned_integer_dtypes(), nps.floating_dtypes(),
    nps.complex_number_dtypes(), nps.unicode_string_dtypes(max_len=2), nps.datetime64_dtypes())


@settings(relaxed, max_examples=150)
@given(array=dtypes.flatmap(lambda dtype: nps.arrays(dtype, nps.array_shapes(min_dims=0, min_side=0, max_side=5))))
def test_arrays_are_read_or_named(array):
    if not refuses(read_image, array):
        image = read_image(array)
        assert image.mode == "RGB"
        assert image.size == (array.shape[1], array.shape[0])


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2))


@relaxed
@given(thing=anything)
def test_what_is_no_image_is_named(classifier, thing):
    assert refuses(classifier, thing)
