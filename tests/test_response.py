import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s3n_timm import class_response_maps, gate_response, normalize_response
from s3n_timm.response import gate_weights, grid_mean, resize_maps

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [lambda bias: nn.Linear(6, 4, bias=bias), lambda bias: nn.Conv2d(6, 4, 1, bias=bias)])
def test_mean_of_a_response_map_is_the_class_score(layer, bias):
    torch.manual_seed(0)
    classifier, features = layer(bias), torch.randn(3, 6, 5, 7)
    maps = class_response_maps(features, classifier)
    pooled = features.mean((2, 3), keepdim=True)
    pooled = pooled if isinstance(classifier, nn.Conv2d) else pooled.flatten(1)
    assert maps.shape == (3, 4, 5, 7)
    torch.testing.assert_close(maps.mean((2, 3)), classifier(pooled).flatten(1))


def test_response_maps_of_a_bare_weight_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])
    maps = class_response_maps(features, torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
    torch.testing.assert_close(maps, torch.tensor([[[[1.0, 2.0]], [[-1.0, -1.0]]]]))


@pytest.mark.parametrize(
    ("classes", "gate", "chosen"),
    [(200, "paper", 1), (200, "renormalized", 5), (100, "paper", 5), (100, "renormalized", 5)],
)
def test_gate_on_a_network_that_knows_nothing(classes, gate, chosen):
    scores = torch.zeros(2, classes)
    assert gate_weights(scores, gate=gate).sum(1).tolist() == [chosen, chosen]
    entropy = 5 / classes * math.log(classes) if gate == "paper" else math.log(5)
    for threshold, count in ((entropy + 1e-4, 1), (entropy - 1e-4, 5)):
        assert gate_weights(scores, threshold, gate=gate).sum(1).tolist() == [count, count]


def test_gate_values_named_in_the_method():
    assert oracle.gate([0.0] * 200, 0.2, "paper")[0] == pytest.approx(0.132, abs=5e-4)
    assert oracle.gate([0.0] * 100, 0.2, "paper")[0] == pytest.approx(0.230, abs=5e-4)


@pytest.mark.parametrize("gate", ["paper", "renormalized"])
def test_sure_network_picks_its_class_and_zero_probabilities_are_no_nan(gate):
    scores = torch.full((1, 7), -1e4)
    scores[0, 3] = 1e4
    assert gate_weights(scores, gate=gate).tolist() == [[0, 0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
def test_all_classes_count_where_there_are_fewer_than_five(classes):
    # one class alone has p = 1 and H = 0; the others share evenly, H = ln C
    assert gate_weights(torch.zeros(1, classes)).tolist() == [[1.0] * classes]


def test_gate_response_of_a_sure_and_an_unsure_image():
    maps = torch.arange(2 * 6 * 4).view(2, 6, 2, 2).float()
    scores = torch.tensor([[0.0, 50, 0, 0, 0, 0], [1, 1, 0.5, 1, 1, 1]])
    response = gate_response(maps, scores)
    torch.testing.assert_close(response[0], maps[0, 1])
    torch.testing.assert_close(response[1], maps[1].sum(0) - maps[1, 2])


@few
@given(
    seed=st.integers(0, 2**16),
    classes=st.integers(1, 12),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    threshold=st.sampled_from([0.05, 0.2, 1.0]),
    gate=st.sampled_from(["paper", "renormalized"]),
)
def test_gate_agrees_with_the_oracle(seed, classes, spread, threshold, gate):
    scores = torch.randn(1, classes, generator=torch.Generator().manual_seed(seed)) * spread
    _, chosen, margin = oracle.gate(scores[0].tolist(), threshold, gate)
    if margin > 1e-5:
        assert gate_weights(scores, threshold, gate=gate)[0].nonzero().flatten().tolist() == sorted(chosen)


@few
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.tuples(st.integers(2, 12), st.integers(2, 12)),
)
def test_resize_agrees_with_the_oracle_and_grid_mean_with_resize(size, grid):
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(maps, size=grid, mode="bilinear", align_corners=True)
    torch.testing.assert_close(resize_maps(maps, grid), resized)
    expected = torch.as_tensor(oracle.resize(maps[1, 2].double().numpy(), grid)).float()
    torch.testing.assert_close(resize_maps(maps, grid)[1, 2], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grid_mean(maps, grid), resized.mean((2, 3)), atol=1e-5, rtol=0)


def test_normalize_response_spans_zero_to_one_per_image():
    response = torch.stack([torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.full((2, 2), -7.3), torch.zeros(2, 2)])
    out = normalize_response(response)
    torch.testing.assert_close(out[0], torch.tensor([[0.0, 0.25], [0.5, 1.0]]))
    assert not out[1:].any()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: class_response_maps(torch.zeros(2, 6), nn.Linear(6, 4)), "features"),
        (lambda: class_response_maps(torch.zeros(2, 5, 3, 3), nn.Linear(6, 4)), "features .* classifier"),
        (lambda: gate_weights(torch.zeros(5)), "scores"),
        (lambda: gate_weights(torch.zeros(1, 5), gate="entropy"), "gate"),
        (lambda: gate_response(torch.zeros(1, 5, 2, 2), torch.zeros(1, 4)), "maps"),
        (lambda: gate_response(torch.zeros(1, 5, 2), torch.zeros(1, 5)), "maps"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
