import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3n_timm import find_peaks, partition_peaks
from s3n_timm.peaks import PARTITION_MODES

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

MAP = torch.tensor(
    [
        [0.9, 0.1, 0.0, 0.0, 0.3],
        [0.1, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.6, 0.0, 0.0, 0.05],
    ]
)


def cells(mask):
    return [tuple(cell) for cell in mask.nonzero().tolist()]


def test_peaks_at_the_border_and_the_floor():
    # the mean is 0.122, so the last corner is a local maximum but too low
    assert cells(find_peaks(MAP[None])[0]) == [(0, 0), (0, 4), (2, 2), (4, 1)]
    assert cells(find_peaks(MAP[None], peak_floor="none")[0]) == [(0, 0), (0, 4), (2, 2), (4, 1), (4, 4)]


@pytest.mark.parametrize(("window", "count"), [(1, 25), (3, 5), (5, 1)])
def test_a_wider_window_leaves_fewer_peaks(window, count):
    assert find_peaks(MAP[None], window, "none").sum() == count


def test_a_plateau_is_one_peak_at_its_first_cell():
    response = torch.zeros(1, 6, 6)
    response[0, 2:4, 1:4] = 1
    assert cells(find_peaks(response)[0]) == [(2, 1)]


def test_two_plateaus_in_one_window_keep_the_first_only():
    response = torch.zeros(1, 3, 5)
    response[0, 0, 1] = response[0, 1, 3] = response[0, 0, 4] = 1
    # (0, 4) and (1, 3) share a window, and the one in the earlier row counts though it lies further right
    assert cells(find_peaks(response)[0]) == [(0, 1), (0, 4)]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7])
@pytest.mark.parametrize("floor", ["mean", "none"])
def test_a_constant_map_has_no_peak(value, floor):
    assert not find_peaks(torch.full((2, 7, 5), value), peak_floor=floor).any()


def test_one_image_does_not_see_the_next():
    both = find_peaks(torch.stack([MAP, MAP.flip(0), torch.zeros(5, 5)]))
    assert torch.equal(both[0], find_peaks(MAP[None])[0])
    assert torch.equal(both[1], find_peaks(MAP.flip(0)[None])[0])
    assert not both[2].any()


@few
@given(
    seed=st.integers(0, 2**16),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    window=st.sampled_from([1, 3, 5]),
    floor=st.sampled_from(["mean", "none"]),
    levels=st.sampled_from([2, 3, 5, 1000]),
)
def test_peaks_agree_with_the_oracle(seed, size, window, floor, levels):
    response = torch.randint(0, levels, (1, *size), generator=torch.Generator().manual_seed(seed)) / 1024
    found = cells(find_peaks(response, window, floor)[0])
    if response.amax() == response.amin():
        assert found == []
        return
    expected, margin = oracle.find_peaks(response[0].double().numpy(), window, floor)
    if margin > 1e-6:  # a value equal to the mean is anyone's guess in float32
        assert found == expected


def test_partition_modes_by_hand():
    response, peaks = MAP[None], find_peaks(MAP[None])
    strong, weak = partition_peaks(response, peaks, "all")
    assert torch.equal(strong, peaks.float())
    assert torch.equal(weak, peaks.float())
    strong, weak = partition_peaks(response, peaks, "extreme")
    assert (cells(strong[0]), cells(weak[0])) == ([(2, 2)], [(0, 4)])
    strong, weak = partition_peaks(response, peaks, "expected")
    torch.testing.assert_close(strong, MAP[None] * peaks)
    torch.testing.assert_close(weak, (1 - MAP[None]) * peaks)


def test_extreme_gives_a_lone_peak_to_both_sets():
    response = torch.zeros(1, 4, 4)
    response[0, 1, 2] = 1
    for weights in partition_peaks(response, find_peaks(response), "extreme"):
        assert cells(weights[0]) == [(1, 2)]


@pytest.mark.parametrize("mode", PARTITION_MODES)
def test_no_peaks_no_weights(mode):
    response = torch.full((2, 4, 4), 0.5)
    strong, weak = partition_peaks(response, find_peaks(response), mode)
    assert not strong.any()
    assert not weak.any()


@pytest.mark.parametrize("mode", ["probability", "random"])
def test_drawn_sets_divide_the_peaks_and_repeat_under_a_seed(mode):
    response = torch.rand(4, 20, 20, generator=torch.Generator().manual_seed(0))
    peaks = find_peaks(response)

    def draw(seed, generator):
        if generator:
            return partition_peaks(response, peaks, mode, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        return partition_peaks(response, peaks, mode)

    for generator in (False, True):
        strong, weak = draw(1, generator)
        assert torch.equal(strong + weak, peaks.float())
        assert strong.any()
        assert weak.any()
        assert torch.equal(strong, draw(1, generator)[0])
        assert not torch.equal(strong, draw(2, generator)[0])


def test_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    partition_peaks(MAP[None], find_peaks(MAP[None]), "probability", torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["probability", "random"])
def test_drawn_sets_have_the_right_mean(mode):
    draws = 4000
    response = MAP.expand(draws, 5, 5)
    peaks = find_peaks(response)
    strong, _ = partition_peaks(response, peaks, mode, torch.Generator().manual_seed(0))
    expected = MAP if mode == "probability" else torch.full((5, 5), 0.5)
    # five standard deviations of a mean of 4000 coins
    torch.testing.assert_close(strong.mean(0), expected * peaks[0], atol=5 * 0.5 / draws**0.5, rtol=0)
    if mode == "probability":
        assert strong[:, 2, 2].all()  # R = 1 exceeds every draw


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: find_peaks(MAP), "response"),
        (lambda: find_peaks(MAP[None], window=2), "window"),
        (lambda: find_peaks(MAP[None], window=0), "window"),
        (lambda: find_peaks(MAP[None], window=-1), "window"),
        (lambda: find_peaks(MAP[None], peak_floor="median"), "peak_floor"),
        (lambda: partition_peaks(MAP[None], MAP[None] > 0.2, "best"), "mode"),
        (lambda: partition_peaks(MAP[None], MAP > 0.2, "all"), "response and peaks"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
