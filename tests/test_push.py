"""train.py --push-to-hub and push.py, against the Hub of the tests."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import yaml
from helpers import SMALL, assert_near, call, command, run, train, write_labels
from hub_server import Hub
from huggingface_hub import ModelCard
from PIL import Image
from support.loaders import count_test_birds

import s3n_timm
from s3n_timm.hub import check_push, check_repo_id, model_card, push_folder

PROXIES = ("NO_PROXY", "no_proxy")  # loopback is reached directly
SHORT = ("--epochs", 1, "--no-verify")


@pytest.fixture(scope="module")
def server():
    with Hub() as hub:
        yield hub
        assert not hub.unknown


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The Hub, for a client in this process and in those that it starts, logged in as alice."""
    settings = dict(HF_TOKEN="token-alice", HF_TOKEN_PATH=str(tmp_path / "token"), HF_HUB_DISABLE_XET="1",
                    HF_ENDPOINT=server.url, HF_HUB_DISABLE_TELEMETRY="1", **dict.fromkeys(PROXIES, "127.0.0.1"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # what the client read from the environment as it was imported
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(huggingface_hub.constants, name, True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", settings["HF_TOKEN_PATH"])
    return server


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was not pushed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(*SHORT, "--output", output)
    return output


def card_of(hub: Hub, repo_id: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def same_model(hub: Hub, repo_id: str, folder: Path, revision: str = "main") -> bool:
    files = hub.files(repo_id, revision)
    return all(files[name] == (folder / name).read_bytes() for name in ("model.safetensors", "config.json"))


# train.py


@pytest.fixture
def resumed(hub, finished):
    repositories = ("alice/whole", "alice/plain")
    if repositories[0] not in hub.repositories:
        train(*SHORT, "--output", finished, "--resume", "--hub-private",
              "--push-to-hub", repositories[0], "--push-backbone", repositories[1], picture=True)
    return repositories


def test_finished_run_is_pushed_as_it_is_resumed(hub, finished, resumed):
    whole, plain = resumed
    assert sorted(hub.files(whole)) == ["README.md", "config.json", "model.safetensors", "picture.png"]
    assert sorted(hub.files(plain)) == ["README.md", "config.json", "model.safetensors"]
    assert same_model(hub, whole, finished / "best")
    assert same_model(hub, plain, finished / "backbone")
    assert all(hub.repositories[name].private for name in resumed)


def test_pushed_cards_state_recipe_and_results(hub, finished, resumed):
    trained = json.loads((finished / "results.json").read_text())
    top1 = dict(zip(resumed, (trained["test_top1"]["best"]["joint"], trained["backbone_top1"])))
    for repo_id, library in zip(resumed, ("s3n_timm", "timm")):
        card = card_of(hub, repo_id)
        assert card.data.library_name == library
        assert "timm" in card.data.tags
        measured = {each.metric_name: each.metric_value for each in card.data.eval_results}
        assert measured["top-1 accuracy, %"] == pytest.approx(top1[repo_id])
        assert "| seed | 42 |" in card.content
        assert "| `epochs` | 1 |" in card.content
        assert "Data: birds." in card.content
        # where it ran and where it went is no recipe
        assert not [name for name in ("push_to_hub", "hub_private", str(finished.parent)) if name in card.content]
    assert "](picture.png)" in card_of(hub, resumed[0]).content


def test_results_for_the_card_are_those_of_evaluate(finished, resumed, tmp_path):
    call("evaluate.py", finished / "best", "--num-images", count_test_birds(48, 4), "--batch-size", 8, "--workers", 0,
         "--cpu-threads", 1, "--output", tmp_path, "--ignore-names")
    ours, theirs = (json.loads((folder / "results.json").read_text())
                    for folder in (finished / "evaluation" / "best", tmp_path))
    assert ours.keys() == theirs.keys()
    assert ours["model"] == theirs["model"]
    for measure in ("accuracy", "calibration"):
        assert_near(ours["measures"][measure], theirs["measures"][measure], rel=1e-6)
    assert theirs["measures"].keys() - ours["measures"].keys() <= {
        "boxes", "hits", "localization", "magnification", "parts"}  # of annotations


def test_cards_of_several_labels_state_average_precision(hub, tmp_path):
    data = write_labels(tmp_path / "data", dict(train=16, val=8, test=8))
    train("--dataset", "multi-label", "--recipe", "birds", "--data-dir", data, *SHORT, "--output", tmp_path / "run",
          "--push-to-hub", "alice/labels", "--push-backbone", "alice/one-pass")
    trained = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = {"alice/labels": trained["test_map"]["best"]["joint"], "alice/one-pass": trained["backbone_map"]}
    for repo_id, value in expected.items():
        card = card_of(hub, repo_id)
        (measured,) = card.data.eval_results
        assert (measured.metric_type, measured.metric_value) == ("mean_average_precision", pytest.approx(value))
        assert "| green | 4 |" in card.content
        assert "top-1" not in card.content


def test_only_one_process_pushes(hub, tmp_path):
    before = len(hub.requests)
    environment = {name: value for name, value in os.environ.items() if name.startswith("HF_") or name in PROXIES}
    words = (*SHORT, "--push-to-hub", "alice/two", "--output", tmp_path / "run")
    text = run(command("train.py", *SMALL, *words, processes=2), **environment)
    sent = hub.requests[before:]
    assert sent.count("POST /api/models/alice/two/commit/main") == 1
    assert sent.count("GET /api/whoami-v2") == 1
    assert same_model(hub, "alice/two", tmp_path / "run" / "best")
    assert text.count("is on the Hub") == 1


def test_push_that_fails_can_be_repeated(hub, finished, tmp_path):
    words = (*SHORT, "--output", finished, "--resume", "--push-to-hub", "alice/again", "--push-backbone", "alice/same")
    with hub.faults(refuse_commits=True):
        text = train(*words, ok=False)
    assert hub.files("alice/again") == {}
    assert "Pushing to alice/again failed" in text
    assert (finished / "best" / "model.safetensors").is_file()
    lines = [line.partition("push it again with: ")[2] for line in text.splitlines()]
    commands = [shlex.split(line) for line in lines if line]
    assert len(commands) == 2
    for _, script, *args in commands:
        assert Path(script).is_file()
        call(Path(script).name, *args)
    repositories = ("alice/again", "alice/same")
    first = [hub.files(repo_id) for repo_id in repositories]
    assert all(card_of(hub, repo_id).data.eval_results for repo_id in repositories)
    train(*words)  # a run pushes the same, so that there is nothing to commit
    assert [hub.files(repo_id) for repo_id in repositories] == first
    assert all(len(hub.repositories[repo_id].commits) == 2 for repo_id in repositories)


REFUSALS = [
    ("", "alice/new", "hf auth login"),
    ("token-nobody", "alice/new", "token"),
    ("token-reader", "alice/new", "may only read"),
    ("token-few", "alice/new", "may only read"),
    ("token-bob", "alice/new", "bob"),
    ("token-alice", "museum/new", "museum"),
    ("token-alice", "carol/new", "carol"),
]


@pytest.mark.parametrize(("token", "repo_id", "said"), REFUSALS)
@pytest.mark.parametrize("script", ["train.py", "push.py"])
def test_token_that_may_not_write_is_refused_first(hub, finished, tmp_path, script, token, repo_id, said):
    before = dict(hub.repositories)
    if script == "train.py":
        text = train("--push-to-hub", repo_id, "--output", tmp_path / "run", ok=False, HF_TOKEN=token)
        assert not (tmp_path / "run").exists()
    else:
        text = call(script, finished / "best", repo_id, ok=False, HF_TOKEN=token)
    assert said in text
    assert len(text.strip().splitlines()) == 1
    assert hub.repositories == before


@pytest.mark.parametrize(("token", "repo_id"), [("token-fine", "alice/x"), ("token-alice", "aviary/x")])
def test_tokens_that_may_write(hub, monkeypatch, token, repo_id):
    monkeypatch.setenv("HF_TOKEN", token)
    check_push(repo_id, private=True)


def test_public_repository_is_refused_before_training(hub, finished, tmp_path):
    push_folder(finished / "best", "alice/public")
    text = train("--push-to-hub", "alice/public", "--hub-private", "--output", tmp_path / "run", ok=False)
    assert "is public" in text
    assert not (tmp_path / "run").exists()


def test_hub_that_is_not_reached_is_one_sentence(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    text = train("--push-to-hub", "alice/new", "--output", tmp_path / "run", ok=False)
    assert "connection to the Hub broke" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["new", "a/b/c", "alice/", "/new", "alice/a b", "alice/a--b", "alice/a.git"])
def test_names_that_the_hub_has_not(name, tmp_path):
    with pytest.raises(ValueError, match="USER/NAME"):
        check_repo_id(name)
    assert "USER/NAME" in train("--push-to-hub", name, "--output", tmp_path / "run", ok=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plain", "--push-backbone", "alice/a"), "O branch"),
        (("--branches", "D+C", "--push-backbone", "alice/a"), "O branch"),
        (("--push-to-hub", "alice/a", "--push-backbone", "alice/a"), "its own"),
        (("--hub-private",), "needs a repository"),
    ],
)
def test_flags_that_contradict(words, said, tmp_path):
    assert said in train(*words, "--output", tmp_path / "run", ok=False)


# push.py


def test_folder_is_pushed_to_a_branch_with_what_is_known(hub, finished, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "bird.jpg")
    text = call("push.py", finished / "backbone", "alice/folder", "--revision", "trial", "--private", "--recipe",
                finished / "results.json", "--picture", tmp_path / "bird.jpg", "--license", "mit",
                "--limits", "Night images.", "--commit-message", "Try")
    assert "/commit/" in text
    assert same_model(hub, "alice/folder", finished / "backbone", "trial")
    card = card_of(hub, "alice/folder", "trial")
    assert (card.data.library_name, card.data.license, card.data.eval_results) == ("timm", "mit", None)
    assert "Not measured" in card.content
    assert "| seed | 42 |" in card.content
    assert "- Night images." in card.content
    assert hub.files("alice/folder", "trial")["picture.jpg"] == (tmp_path / "bird.jpg").read_bytes()


def test_weights_go_as_they_are_stored(hub, tmp_path, monkeypatch):
    model = timm.create_model("s3n", backbone="test_resnet", num_classes=3)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    s3n_timm.save(model, tmp_path, label_names=["a", "b", "c"], state_dict=halves)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    push_folder(f"~/{tmp_path.name}", "alice/half")
    assert same_model(hub, "alice/half", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda folder: None, "lack dataset"),
    ],
)
def test_folder_is_refused(hub, finished, tmp_path, change, said):
    model = timm.create_model("test_resnet", num_classes=3)
    folder = s3n_timm.save(model, tmp_path / "saved", label_names=["a", "b", "c"])
    change(folder)
    text = call("push.py", folder, "alice/refused", "--results", finished / "results.json", ok=False)
    assert said in text
    assert "alice/refused" not in hub.repositories


# evaluation files of the Hub


@pytest.fixture
def measured(finished, resumed):
    return json.loads((finished / "evaluation" / "best" / "results.json").read_text())


def test_benchmark_of_the_hub_gets_an_entry(hub, finished, measured, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(measured | dict(dataset="hub:carol/wings")))
    call("push.py", finished / "best", "alice/entry", "--results", results, "--benchmark-task", "species")
    [entry] = yaml.safe_load(hub.files("alice/entry")[".eval_results/wings.yaml"])
    assert entry["dataset"] == dict(id="carol/wings", task_id="species")
    assert entry["value"] == measured["measures"]["accuracy"]["joint"]["top1"]
    call("push.py", finished / "best", "alice/none", "--results", results)
    assert not [name for name in hub.files("alice/none") if "eval_results" in name]


@pytest.mark.parametrize("dataset", ["birds", "hub:{folder}", "hub:a/b/c"])
def test_data_that_is_no_benchmark_gets_none(hub, finished, measured, tmp_path, dataset):
    dataset = dataset.format(folder=tmp_path)
    results: dict[str, Any] = measured | dict(dataset=dataset)
    with pytest.raises(ValueError, match="data set of the Hub"):
        push_folder(finished / "best", "alice/refused", results=results, benchmark_task="species")
    model = s3n_timm.load_model(finished / "best")
    card = model_card(model, results=results, recipe=dict(dataset=dataset))
    assert card.data.datasets is None
    assert str(tmp_path.parent) not in card.content
