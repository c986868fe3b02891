"""Pictures of what a model sees."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s3n_timm import S3N, save
from s3n_timm.birds import draw_bird
from s3n_timm.draw import draw_explanation

SCRIPT = Path(__file__).parents[1] / "examples" / "visualize.py"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return S3N("test_resnet", num_classes=3)


def test_every_panel_shows_what_explain_gives(model):
    image = torch.rand(3, 64, 96)
    seen = model.eval().explain(image[None])
    model.train()
    figure = draw_explanation(model, image, MEAN, STD, label_names=("wren", "robin", "dunnock"))
    assert model.training, "drawing leaves the mode as it was"
    original, response, _, _, discriminative, _, _, complementary, _ = figure.axes
    shown = torch.tensor(original.images[0].get_array())
    scale, offset = torch.tensor(STD), torch.tensor(MEAN)
    torch.testing.assert_close(shown, (image.permute(1, 2, 0) * scale + offset).clamp(0, 1))
    for axes, branch in ((discriminative, "discriminative"), (complementary, "complementary")):
        warped = getattr(seen.sample, branch)[0].permute(1, 2, 0) * scale + offset
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), warped.clamp(0, 1))
    assert f"{int(seen.sample.peaks.sum())} peak" in original.get_title()
    name = ("wren", "robin", "dunnock")[int(seen.logits.joint.argmax())]
    assert name in figure.get_suptitle()
    assert response.images[1].get_array().shape == (64, 96)


def test_peaks_are_drawn_where_they_are(model):
    image = torch.rand(3, 64, 96)
    seen = model.eval().explain(image[None])
    figure = draw_explanation(model, image, MEAN, STD)
    points = torch.tensor(figure.axes[3].collections[0].get_offsets())
    y, x = seen.sample.weights_discriminative[0].nonzero(as_tuple=True)
    torch.testing.assert_close(points, torch.stack([x * 95 / 30, y * 63 / 30], dim=1).double())


def test_errors(model):
    with pytest.raises(ValueError, match="image must be 3×H×W"):
        draw_explanation(model, torch.rand(1, 3, 64, 64), MEAN, STD)
    with pytest.raises(ValueError, match="needs a model with all branches"):
        draw_explanation(S3N("test_resnet", num_classes=3, branches="O+D"), torch.rand(3, 64, 64), MEAN, STD)


def test_script_writes_a_picture(model, tmp_path):
    bird = tmp_path / "bird.png"
    draw_bird(np.random.default_rng(0), 0, 3).image.save(bird)
    weights = save(model, tmp_path / "model", label_names=["a", "b", "c"])
    command = [sys.executable, SCRIPT, weights, bird, "--output", tmp_path / "out"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert min(Image.open(tmp_path / "out" / "bird.png").size) > 500

    bird.write_bytes(b"not a picture")
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode != 0
    assert "bird.png" in run.stderr
    assert "Traceback" not in run.stderr
