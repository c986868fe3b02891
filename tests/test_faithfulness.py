"""Deletion and insertion curves: answers known by hand, a network whose response is known, and evaluate.py."""

import json

import evaluate
import pytest
import timm
import torch
from torch import nn

from s3n_timm import S3N, save
from s3n_timm.evaluation import (
    blur,
    curve_area,
    deletion_curve,
    insertion_curve,
    measure_faithfulness,
    random_importance,
    result_tables,
    summarize_faithfulness,
)
from s3n_timm.evaluation.faithfulness import rank_pixels, replacement_curve
from s3n_timm.heads import NoResponseMap
from s3n_timm.hub import model_card

SIZE = 32
SQUARE = (..., slice(8, 16), slice(20, 28))  # rows, columns: a sixteenth of the image


class RedNet(nn.Module):
    """A network with timm's interface that looks for full red: its features are what a cell has above four fifths."""

    num_features = 3

    def __init__(self, num_classes=2, cell=4):
        super().__init__()
        self.num_classes, self.cell = num_classes, cell
        self.pretrained_cfg = dict(architecture="rednet", input_size=(3, SIZE, SIZE), classifier="fc")
        self.fc = nn.Linear(3, num_classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[100.0, -50.0, -50.0], [0, 0, 0]])[:num_classes])
            self.fc.bias.copy_(torch.tensor([-3.0, 0.0])[:num_classes])

    def forward_features(self, x):
        return (nn.functional.avg_pool2d(x, self.cell) - 0.8).relu() * 5

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool=None):
        raise AssertionError


def red_squares(count=3):
    """Gray images with a red square."""
    images = torch.zeros(count, 3, SIZE, SIZE)
    images[:, 0][SQUARE] = 1.0
    return images


def areas(curves, name="original"):
    return {key: value for key, value in summarize_faithfulness(curves)["maps"][name].items() if key != "curves"}


def test_a_network_that_reads_one_region_is_found_out():
    curves = measure_faithfulness(RedNet().eval(), red_squares(8), torch.arange(8))
    deletion, insertion = (curves[f"{kind}_original"] for kind in ("deletion", "insertion"))
    # a sixteenth of the pixels is the first step of sixteen: the square is gone, or is back
    assert (deletion[:, 0] > 0.9).all()
    assert (deletion[:, 1:] < 0.1).all()
    assert (insertion[:, 2:] > 0.9).all()
    found = areas(curves)
    assert found["deletion"] < 0.08
    assert found["random_deletion"] > 0.3
    assert found["insertion"] > found["random_insertion"] + 0.1


def test_a_map_of_the_wrong_place_is_worse_than_a_random_one():
    model, images, classes = RedNet().eval(), red_squares(1), torch.tensor([0])
    wrong = torch.ones(1, SIZE, SIZE)
    wrong[SQUARE] = 0
    late = deletion_curve(model, images, wrong, classes)
    assert (late[:, :-2] > 0.9).all()
    assert curve_area(late) > curve_area(deletion_curve(model, images, random_importance((8, 8), (SIZE,) * 2,
                                                                                       torch.tensor([0])), classes))


def test_every_step_replaces_its_share_the_most_important_first():
    torch.manual_seed(0)
    importance = torch.rand(2, 3, 5)
    before, after = torch.zeros(2, 1, 3, 5), torch.ones(2, 1, 3, 5)
    read = []

    def classify(images):
        read.append(images)
        return torch.zeros(len(images), 4)

    curve = replacement_curve(classify, before, after, importance, torch.tensor([0, 3]), steps=4)
    assert torch.equal(curve, torch.full((2, 5), 0.25))
    images = torch.cat(read).view(5, 2, 3, 5)
    assert images.sum((2, 3)).tolist() == [[0, 0], [4, 4], [8, 8], [11, 11], [15, 15]]
    for image, values in zip(images.unbind(1), importance):
        for step in image[1:-1]:
            assert values[step == 1].min() > values[step == 0].max()


def test_the_class_is_that_of_the_image():
    images, classes = torch.rand(2, 3, 4, 4), torch.tensor([1, 0])
    curve = deletion_curve(lambda x: torch.tensor([3.0, 0.0]).expand(len(x), -1), images, images[:, 0], classes, 2)
    low, high = torch.tensor([0.0, 3.0]).softmax(0)
    assert torch.allclose(curve, torch.stack([low, high])[:, None].expand(-1, 3))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_batch_is_as_its_images_one_by_one(batch_size):
    torch.manual_seed(1)
    model = S3N("test_resnet", num_classes=4).eval()
    images, importance, classes = torch.rand(3, 3, 64, 64), torch.rand(3, 64, 64), torch.tensor([2, 0, 3])
    for curve in (deletion_curve, insertion_curve):
        together = curve(model, images, importance, classes, steps=3, batch_size=batch_size)
        apart = [curve(model, *(each[i:i + 1] for each in (images, importance, classes)), steps=3) for i in range(3)]
        assert torch.allclose(together, torch.cat(apart), atol=1e-5)


def test_random_maps_belong_to_their_image_and_seed():
    together = random_importance((4, 4), (16, 16), torch.tensor([5, 9]))
    assert torch.equal(random_importance((4, 4), (16, 16), torch.tensor([9])), together[1:])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(random_importance((4, 4), (16, 16), torch.tensor([5, 9]), seed=1), together)


def test_a_constant_map_orders_pixels_at_random_and_not_by_rows():
    ranks = rank_pixels(torch.zeros(2, 16, 16))
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks, rank_pixels(torch.ones(2, 16, 16)))
    assert ranks[0].flatten().sort().values.tolist() == list(range(256))
    first = (ranks[0] < 128).float()
    assert 0.3 < first[:8].mean() < 0.7
    assert 0.3 < first[:, :8].mean() < 0.7


def test_a_single_class_is_always_certain():
    curves = measure_faithfulness(RedNet(num_classes=1).eval(), red_squares(2), torch.arange(2), steps=2)
    assert all(torch.equal(curve, torch.ones(2, 3)) for curve in curves.values())
    assert set(areas(curves).values()) == {1.0}


def test_areas_are_trapezoids():
    assert curve_area(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.5, 0.5, 0.5]])).tolist() == [0.25, 0.75, 0.5]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 64), (64, 64)])
def test_blur_takes_images_of_any_size(size):
    images = torch.rand(2, 3, *size)
    assert blur(images).shape == images.shape
    assert torch.allclose(blur(torch.full((1, 3, *size), 0.5)), torch.tensor(0.5))


@pytest.mark.parametrize("shapes", [
    dict(importance=(2, 3, 3)), dict(classes=(1,)), dict(after=(2, 3, 4, 5)), dict(importance=(2, 1, 4, 4)),
])
def test_shapes_that_do_not_fit_are_refused(shapes):
    shapes = dict(before=(2, 3, 4, 4), after=(2, 3, 4, 4), importance=(2, 4, 4), classes=(2,)) | shapes
    tensors = {name: torch.zeros(shape, dtype=torch.long if name == "classes" else torch.float)
               for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="importance"):
        replacement_curve(lambda x: x.flatten(1), **tensors)


def test_a_curve_needs_a_step():
    with pytest.raises(ValueError, match="steps"):
        deletion_curve(RedNet(), red_squares(1), torch.zeros(1, SIZE, SIZE), torch.tensor([0]), steps=0)


# models


@pytest.mark.parametrize("options", [
    dict(), dict(branches="O"), dict(branches="D+C"), dict(answer="discriminative", neck="conv"),
    dict(answer="mean", scan_size=48, zoom_size=80), dict(attention="response", branches="O+D"),
])
def test_curves_start_and_end_at_the_probabilities_of_their_branch(options):
    torch.manual_seed(2)
    model = S3N("test_resnet", num_classes=5, **options).eval()
    images = torch.rand(2, 3, 64, 64)
    curves = measure_faithfulness(model, images, torch.arange(2), steps=2)
    with torch.no_grad():
        answer = model(images).softmax(1)
        logits = model.explain(images).logits
    classes = answer.argmax(1, keepdim=True)
    expected = {name: each.softmax(1) for name, each in logits._asdict().items() if each is not None}
    assert {name.rpartition("_")[2] for name in curves} == expected.keys()
    for name, probabilities in (expected | dict(joint=answer)).items():
        whole = probabilities.gather(1, classes)[:, 0]
        for order in ("", "random_"):
            assert torch.allclose(curves[f"{order}deletion_{name}"][:, 0], whole, atol=1e-5)
            assert torch.allclose(curves[f"{order}insertion_{name}"][:, -1], whole, atol=1e-5)


def test_a_plain_model_has_the_map_of_its_head():
    torch.manual_seed(3)
    model, images = timm.create_model("test_convnext", num_classes=4).eval(), torch.rand(2, 3, 64, 64)
    curves = measure_faithfulness(model, images, torch.arange(2), steps=2)
    with torch.no_grad():
        assert torch.allclose(curves["deletion_original"][:, 0], model(images).softmax(1).amax(1), atol=1e-5)
    assert len(curves) == 4


def test_a_head_without_maps_is_refused():
    with pytest.raises(NoResponseMap, match="pools"):
        measure_faithfulness(timm.create_model("test_vit", num_classes=4).eval(), torch.rand(1, 3, 160, 160),
                             torch.arange(1))


# evaluate.py


CONFIG = dict(input_size=(3, 64, 64), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0,
              crop_mode="squash")


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(model, *args):
        save(model, tmp_path / "weights", data_config=CONFIG)
        evaluate.main([str(tmp_path / "weights"), "--num-images", "12", "--batch-size", "4", "--workers", "0",
                       "--cpu-threads", "1", "--ignore-names", "--output", str(tmp_path / "out"), *args])
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return call


def test_evaluate_reports_areas_in_file_table_and_card(run, capsys):
    model = S3N("test_resnet", num_classes=3, branches="O+D").eval()
    results = run(model, "--faithfulness", "--faithfulness-images", "4")
    measured = results["measures"]["faithfulness"]
    assert (measured["images"], measured["steps"]) == (4, 16)
    assert measured["maps"].keys() == {"joint", "original", "discriminative"}
    for areas in measured["maps"].values():
        for key, curve in areas.pop("curves").items():
            assert len(curve) == 17
            assert 0 <= min(curve) <= areas[key] <= max(curve) <= 1
    table = result_tables(results["measures"])["faithfulness"]
    shown = f"{measured['maps']['discriminative']['deletion']:.3f}"
    assert shown in capsys.readouterr().out
    assert any(shown in row for row in table.rows)
    card = str(model_card(model, results=results))
    assert table.title in card
    assert shown in card
    assert measured["method"] in card


def test_evaluate_measures_a_plain_model_and_nothing_unasked(run):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    assert run(model, "--faithfulness")["measures"]["faithfulness"]["maps"].keys() == {"original"}
    assert "faithfulness" not in run(model)["measures"]


def test_evaluate_refuses_a_head_without_maps_before_it_reads_images(run, tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    with pytest.raises(SystemExit) as end:
        run(model, "--faithfulness")
    assert "--faithfulness" in str(end.value)
    assert "pools" in str(end.value)
    assert not (tmp_path / "out").exists()
