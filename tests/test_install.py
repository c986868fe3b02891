"""What is built and installed, and what a missing package is answered with."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from helpers import EXAMPLES
from packaging.requirements import Requirement

pytest.importorskip("hatchling", reason='building needs hatchling: pip install -e ".[test]"')

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
EXTRAS = {"demo.py": "demo", "export.py": "export"}  # of the others: train
OF_TIMM = {"pyyaml", "tqdm"}  # in every environment, as timm and huggingface_hub need them

WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv[1:] else super().find_spec(name, path, target)

sys.meta_path = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
import timm, torch
from PIL import Image
import s3n_timm
from s3n_timm import draw, evaluation
print(Path(s3n_timm.__file__).parent)
classifier = s3n_timm.Classifier("s3n_test_resnet")
picture = Image.new("RGB", (64, 64))
assert len(classifier(picture, top_k=2)) == 2
logits, labels = torch.eye(4), torch.arange(4)
calls = dict(
    calibration=lambda: evaluation.calibration_error(logits, labels),
    interval=lambda: evaluation.bootstrap_interval(labels > 0),
    box=lambda: evaluation.largest_region_box(torch.rand(1, 4, 4)),
    precision=lambda: evaluation.average_precision(logits, logits),
    several=lambda: evaluation.summarize_labels(dict(label=logits, logits_answer=logits), "abcd"),
    confusions=lambda: evaluation.draw_confusions(labels, labels, "abcd"),
    overlay=lambda: draw.overlay(picture, torch.rand(4, 4)),
    figure=lambda: classifier.draw(picture),
    data=lambda: __import__("s3n_timm.data"),
    reader=lambda: __import__("s3n_timm.data.birds"),
)
for name, call in calls.items():
    try:
        call()
    except ImportError as error:
        print(f"{name}: {error}")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, by the build backend, without a network."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return zipfile.ZipFile(wheel), tarfile.open(sdist)


@pytest.fixture(scope="module")
def metadata(built):
    wheel, _ = built
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def sources(*folders):
    """The files in folders of the checkout, but what running them leaves there."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_alone(built):
    wheel, _ = built
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == sources("s3n_timm")
    assert files >= {f"s3n_timm/{name}" for name in ("py.typed", "weights/config.json", "weights/model.safetensors")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_sdist_holds_what_building_and_testing_need(built):
    _, sdist = built
    files = {name.partition("/")[2] for name in sdist.getnames()}
    assert files >= sources("s3n_timm", "tests", "examples", ".ci", ".github")
    assert files >= {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}


def test_ci_runs_every_python_that_the_package_is_for(metadata):
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata.get_all("Classifier")))
    assert metadata["Requires-Python"] == f">={versions[0]}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == versions
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_package_without_extras(built, metadata, tmp_path):
    """The wheel in a fresh interpreter that has what the package itself requires, and nothing of any extra."""
    wheel, _ = built
    wheel.extractall(tmp_path)
    (tmp_path / "without.py").write_text(WITHOUT_EXTRAS)
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    core = {each.name for each in requirements if each.marker is None}
    extras = {each.name for each in requirements if each.marker and any(
        each.marker.evaluate({"extra": extra}) for extra in ("train", "demo", "export"))}
    assert core >= {"timm", "torch", "safetensors"}
    assert extras >= {"accelerate", "datasets", "matplotlib", "scipy", "torchmetrics", "gradio", "onnx"}
    blocked = sorted(extras - core - OF_TIMM - {"s3n-timm", "s3n_timm"})
    done = subprocess.run(
        [sys.executable, tmp_path / "without.py", *blocked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(tmp_path), HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    place, *said = done.stdout.splitlines()
    assert Path(place) == tmp_path / "s3n_timm"
    names = dict(calibration="torchmetrics", interval="scipy", box="scipy", precision="torchmetrics",
                 several="torchmetrics", confusions="matplotlib", overlay="matplotlib", figure="matplotlib",
                 data="datasets", reader="datasets")
    assert said == [f'{call}: {name} is missing: pip install "s3n_timm[train]"' for call, name in names.items()]


def run_without(package, script, folder, error=None):
    """What a script prints where importing a package raises an error, its absence if none is given."""
    error = error or f"ModuleNotFoundError('no', name='{package}')"
    (folder / f"{package}.py").write_text(f"raise {error}")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | dict(PYTHONPATH=path, PYTHONIOENCODING="utf-8"),
    )
    assert done.returncode == 1, done.stdout
    return done.stdout


def first_missing(script, folder):
    """As where nothing is installed: the package that a script asks for first."""
    for package in ("accelerate", "datasets", "gradio", "matplotlib", "onnxruntime", "psutil", "timm", "torch"):
        (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name='{package}')")
    return run_without("numpy", script, folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_names_the_extra_that_it_lacks(script, tmp_path):
    name = Path(script).name
    extra = EXTRAS.get(name, "train")
    text = first_missing(script, tmp_path)
    assert re.fullmatch(rf'{name}: \w+ is missing: pip install "s3n_timm\[{extra}\]"\n', text), text


@pytest.mark.parametrize(("script", "package"), [
    ("evaluate.py", "datasets"),
    ("train.py", "yaml"),
    ("export.py", "onnxruntime"),
    ("export.py", "onnxscript"),
    ("demo.py", "gradio"),
])
def test_package_of_an_extra_is_missing(script, package, tmp_path):
    extra = EXTRAS.get(script, "train")
    expected = f'{script}: {package} is missing: pip install "s3n_timm[{extra}]"'
    assert run_without(package, script, tmp_path).strip().splitlines()[-1] == expected


@pytest.mark.parametrize("error", ["ImportError('It is too old.', name='gradio')", "ImportError('It is too old.')"])
def test_package_that_is_there_says_what_it_lacks(error, tmp_path):
    assert run_without("gradio", "demo.py", tmp_path, error) == "demo.py: It is too old.\n"


def test_other_errors_keep_their_traceback(tmp_path):
    text = run_without("gradio", "demo.py", tmp_path, "ValueError('a fault')")
    assert text.startswith("Traceback")
    assert text.endswith("ValueError: a fault\n")
