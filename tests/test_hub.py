"""Models to and from the Hub: huggingface_hub's own client, in processes of its own, against a server on loopback.

The client reads its settings once, on import. So each client is a process that is started with them and then calls
functions of this module by name; the tests set the server's faults between the calls.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import call
from hub_server import Hub
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

import s3n_timm
from s3n_timm.hub import count_macs, model_card
from s3n_timm.hub.download import verified_cfg

LABELS = ["a wren", "a | bar", "schön"]
DATA = dict(input_size=(3, 64, 64), crop_pct=0.9)
ARGUMENTS = dict(preset="original", branches="O+D+C", grid_size=9, fwhm=5.0, window=5, gate="renormalized")
RECIPE = dict(
    dataset="birds",
    seed=31,
    epochs=7,
    lr=0.02,
    scale=[0.3, 1.0],
    comment="a|b",
    val_fraction=0.0,
    balanced=False,
    resume=None,
    clip_grad=None,
    output="/home/someone/output",
    data_dir="/home/someone/CUB_200",
)


def build(seed: int = 0, num_classes: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    options = dict(backbone="test_resnet", **ARGUMENTS) | options
    model = timm.create_model("s3n", num_classes=num_classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return model.eval()


# what clients do


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything about a loaded model that can be compared, as JSON."""
    x = torch.rand(2, model.in_chans, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model.eval()(x)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return dict(
        logits=logits.tolist(),
        weights=digest.hexdigest(),
        labels=model.pretrained_cfg.get("label_names"),
        config=model.config.to_dict(),
        crop_pct=model.pretrained_cfg["crop_pct"],
    )


def push(repo: str, seed: int = 0, num_classes: int = 3, **options: Any) -> str:
    names = LABELS if num_classes == 3 else None
    model = build(seed, num_classes)
    return s3n_timm.push_to_hub(model, repo, **dict(label_names=names, data_config=DATA) | options)


def pull(name: str, **options: Any) -> dict[str, Any]:
    return describe(timm.create_model(f"hf-hub:{name}", pretrained=True, **options))


def load(name: str, **options: Any) -> dict[str, Any]:
    return describe(s3n_timm.load_model(name, **options))


def serve() -> None:
    """The loop of a client: a call a line, an answer a line."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, args, kwargs = json.loads(line)
        try:
            answer = dict(value=globals()[name](*args, **kwargs))
        except Exception as error:
            kinds = [kind.__name__ for each in (error, error.__cause__) for kind in type(each).__mro__]
            answer = dict(kinds=kinds, said=str(error))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # an interpreter that has imported torch takes seconds to end


class Client:
    def __init__(self, hub: Hub, home: Path, token: str | None = None, **environment: str) -> None:
        inherited = {key: value for key, value in os.environ.items()
                     if not key.startswith("HF_") and "proxy" not in key.lower()}
        given = dict(HF_TOKEN=token) if token else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_hub; test_hub.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "stderr.txt").open("w"),
            text=True,
            encoding="utf-8",
            cwd=Path(__file__).parent,
            env=inherited | given | environment | dict(
                HF_ENDPOINT=hub.url,
                HF_HOME=str(home),
                HF_HUB_DISABLE_XET="1",
                HF_HUB_DISABLE_TELEMETRY="1",
                HF_HUB_DISABLE_PROGRESS_BARS="1",
                OMP_NUM_THREADS="1",
                PYTHONUTF8="1",
            ),
        )

    def call(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, args, kwargs], default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def do(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The value of a call that must succeed."""
        answer = self.call(name, *args, **kwargs)
        assert "value" in answer, answer["said"]
        return answer["value"]

    def fail(self, name: str, *args: Any, kind: str = "OSError", **kwargs: Any) -> str:
        """The sentence of a call that must fail with an error of that kind."""
        answer = self.call(name, *args, **kwargs)
        assert "said" in answer, "this must fail"
        said = answer["said"]
        assert kind in answer["kinds"], answer
        assert said.endswith("."), said
        assert "\n" not in said, said
        assert len(said) < 400, said
        assert "127.0.0.1" not in said or kind == "ConnectionError", said
        return said

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server
        assert not server.unknown


@pytest.fixture(scope="module")
def start(hub, tmp_path_factory):
    clients = []

    def create(token: str | None = None, **environment: str) -> Client:
        clients.append(Client(hub, tmp_path_factory.mktemp("home"), token, **environment))
        return clients[-1]

    yield create
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def alice(start):
    return start("token-alice")


@pytest.fixture(scope="module")
def stranger(start):
    return start()


@pytest.fixture(scope="module")
def offline(start):
    return start(HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def birds(alice, hub):
    """A repository with two commits: seed 0, then seed 1."""
    urls = [alice.do("push", "alice/birds", seed=seed) for seed in (0, 1)]
    return [url.rsplit("/", 1)[1] for url in urls]


@pytest.fixture(scope="module")
def wanted():
    return [describe(build(seed)) for seed in (0, 1)]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    keys = ("logits", "weights")
    return [found[key] for key in keys] == [wanted[key] for key in keys]


def cannot_load_offline(offline: Client, name: str, cache: Path) -> None:
    """Neither timm alone nor `load` makes a model of what a fault has left in the cache."""
    assert "said" in offline.call("pull", name, cache_dir=cache)
    offline.fail("load", name, cache_dir=cache, kind="FileNotFoundError")
    assert all(path.exists() for path in cache.rglob("snapshots/*/*"))
    for path in cache.rglob("blobs/*"):
        content = path.read_bytes()
        framed = b"blob %d\0%s" % (len(content), content)
        assert path.name in (hashlib.sha256(content).hexdigest(), hashlib.sha1(framed).hexdigest())


# push and pull


def test_one_commit_without_a_pickle(hub, alice, birds, tmp_path):
    repository = hub.repositories["alice/birds"]
    assert list(repository.commits)[1:] == birds
    assert sorted(hub.files("alice/birds")) == ["README.md", "config.json", "model.safetensors"]
    # what is pushed is what is saved
    s3n_timm.save(build(1), tmp_path, label_names=LABELS, data_config=DATA, card=dict(name="alice/birds"))
    for name, content in hub.files("alice/birds").items():
        assert (tmp_path / name).read_bytes() == content, name


@pytest.mark.parametrize("how", ["pull", "load"])
def test_pull_gives_what_was_pushed(stranger, birds, wanted, how, tmp_path):
    found = stranger.do(how, "alice/birds", cache_dir=tmp_path)
    assert same(found, wanted[1])
    assert found["labels"] == LABELS
    assert found["config"] == wanted[1]["config"]
    assert found["crop_pct"] == 0.9


def test_config_holds_every_argument(hub, birds):
    config = json.loads(hub.files("alice/birds")["config.json"])
    assert config["architecture"] == "s3n"
    assert config["num_classes"] == 3
    assert config["model_args"] == build().config.to_dict() | dict(in_chans=3, global_pool="avg")
    assert config["label_names"] == LABELS


@pytest.mark.parametrize("changed", [dict(num_classes=5), dict(in_chans=1), dict(num_classes=0), dict(fwhm=7.0)])
@pytest.mark.parametrize("how", ["pull", "load"])
def test_arguments_on_loading(stranger, birds, how, changed, tmp_path):
    s3n_timm.save(build(1), tmp_path / "saved", label_names=LABELS, data_config=DATA)
    torch.manual_seed(3)
    local = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, **changed)
    found = stranger.do(how, "alice/birds", cache_dir=tmp_path / "cache", **changed)
    assert len(found["logits"][0]) == (local.num_classes or local.head_hidden_size)
    if "num_classes" not in changed or not changed["num_classes"]:  # new classifiers are drawn at random
        assert found["weights"] == describe(local)["weights"]


@pytest.mark.parametrize("how", ["pull", "load"])
def test_pinned_revision(stranger, offline, birds, wanted, how, tmp_path):
    for i, commit in enumerate(birds):
        assert same(stranger.do(how, f"alice/birds@{commit}", cache_dir=tmp_path), wanted[i])
    assert same(stranger.do(how, "alice/birds@main", cache_dir=tmp_path), wanted[1])
    assert same(offline.do(how, f"alice/birds@{birds[0]}", cache_dir=tmp_path), wanted[0])
    if how == "load":
        said = stranger.fail(how, "alice/birds@nowhere", cache_dir=tmp_path, kind="FileNotFoundError")
        assert "alice/birds@nowhere" in said
        assert "no such revision" in said


def test_push_to_a_branch(hub, alice, stranger, birds, wanted, tmp_path):
    for seed in (0, 1):  # it is made once
        alice.do("push", "alice/birds", seed=seed, revision="trial", commit_message="Try")
    hub.repositories["alice/birds"].refs["v1"] = birds[0]  # as a tag
    assert hub.repositories["alice/birds"].refs["main"] == birds[1]
    assert same(stranger.do("load", "alice/birds@trial", cache_dir=tmp_path), wanted[1])
    assert same(stranger.do("load", "alice/birds@v1", cache_dir=tmp_path), wanted[0])


def test_push_while_another_loads(hub, alice, stranger, wanted, tmp_path):
    """Both files are of the commit that the first was of."""
    first, second = (alice.do("push", "alice/moving", seed=seed).rsplit("/", 1)[1] for seed in (0, 1))
    hub.repositories["alice/moving"].refs["main"] = first
    with hub.faults(move_main=second):
        assert same(stranger.do("load", "alice/moving", cache_dir=tmp_path), wanted[0])
    assert same(stranger.do("load", "alice/moving", cache_dir=tmp_path), wanted[1])


@pytest.mark.parametrize("how", ["pull", "load"])
def test_offline_from_the_cache(stranger, offline, birds, wanted, how, tmp_path):
    cannot_load_offline(offline, "alice/birds", tmp_path)
    stranger.do("pull", "alice/birds", cache_dir=tmp_path)
    assert same(offline.do(how, "alice/birds", cache_dir=tmp_path), wanted[1])
    assert "offline" in offline.fail("push", "alice/birds", kind="ConnectionError")


def test_load_needs_a_name_of_the_hub(stranger, alice, hub):
    stranger.fail("load", "a/b@c@d", kind="ValueError")
    assert "no such repository" in stranger.fail("load", "alice/nothing", kind="PermissionError")
    alice.do("push", "alice/incomplete")
    repository = hub.repositories["alice/incomplete"]
    del repository.commits[repository.refs["main"]]["model.safetensors"]
    assert "lacks" in stranger.fail("load", "alice/incomplete", kind="FileNotFoundError")


# refusals


def test_private_repository(hub, alice, stranger, offline, wanted, tmp_path, start):
    alice.do("push", "alice/secret", private=True)
    assert hub.repositories["alice/secret"].private
    bob = start("token-bob")
    for client, name in ((stranger, "nobody"), (bob, "bob")):
        cache = tmp_path / name
        cache.mkdir()
        answer = client.call("pull", "alice/secret", cache_dir=cache)
        assert "RepositoryNotFoundError" in answer["kinds"]
        said = client.fail("load", "alice/secret", cache_dir=cache, kind="PermissionError")
        assert "alice/secret" in said
        assert "private" in said
        cannot_load_offline(offline, "alice/secret", cache)
    assert same(alice.do("load", "alice/secret", cache_dir=tmp_path), wanted[0])
    assert same(stranger.do("load", "alice/secret", cache_dir=tmp_path / "t", token="token-alice"), wanted[0])
    # others can't write either
    before = dict(hub.repositories["alice/secret"].commits)
    for client in (bob, stranger):
        client.fail("push", "alice/secret", seed=1, kind="PermissionError")
        client.fail("push", "carol/new", seed=1, kind="PermissionError")
    assert hub.repositories["alice/secret"].commits == before
    assert "carol/new" not in hub.repositories


def test_public_repository_is_not_taken_for_a_private_one(hub, alice, birds):
    before = dict(hub.repositories["alice/birds"].refs)
    assert "is public" in alice.fail("push", "alice/birds", private=True, kind="ValueError")
    assert hub.repositories["alice/birds"].refs == before


def test_nothing_reaches_the_hub_of_what_save_refuses(hub, alice):
    said = alice.fail("push", "alice/refused", label_names=["a", "b"], kind="ValueError")
    assert "2 names for 3 classes" in said
    assert "alice/refused" not in hub.repositories


# faults of the way up


def test_upload_that_is_cut(hub, alice, stranger, offline, tmp_path):
    """The client tries six times over 23 seconds; meanwhile the repository is as it was."""
    with hub.faults(cut_upload=200_000, cut_uploads_left=6):
        said = alice.fail("push", "alice/cut", seed=2, kind="ConnectionError")
        assert hub.cut_uploads_left == 0
    assert "alice/cut" in said
    assert "connection" in said
    assert hub.files("alice/cut") == {}
    assert "lacks" in stranger.fail("load", "alice/cut", cache_dir=tmp_path, kind="FileNotFoundError")
    assert "said" in stranger.call("pull", "alice/cut", cache_dir=tmp_path)
    cannot_load_offline(offline, "alice/cut", tmp_path)
    # the same push, cut once: the client sends the file again
    with hub.faults(cut_upload=200_000, cut_uploads_left=1):
        alice.do("push", "alice/cut", seed=2)
        assert hub.cut_uploads_left == 0
    assert same(stranger.do("load", "alice/cut", cache_dir=tmp_path), describe(build(2)))


def test_upload_that_changes_on_its_way(hub, alice):
    alice.do("push", "alice/spoilt")
    before = hub.files("alice/spoilt")
    with hub.faults(spoil_upload=True):
        said = alice.fail("push", "alice/spoilt", seed=7)
    assert "sha256" in said
    assert hub.files("alice/spoilt") == before
    assert len(hub.repositories["alice/spoilt"].commits) == 2


# faults of the way down


def test_download_that_is_cut_goes_on(hub, alice, stranger, tmp_path):
    """The client writes 10 MiB at a time, and asks for what is left."""
    alice.do("push", "alice/large", num_classes=10_000)
    size, chunk = len(hub.files("alice/large")["model.safetensors"]), 10 * 2**20
    with hub.faults(cut_download=chunk + 5):
        found = stranger.do("load", "alice/large", cache_dir=tmp_path)
    assert hub.resumed == list(range(chunk, size - 5, chunk))
    assert same(found, describe(build(num_classes=10_000)))


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (dict(cut_download=600_000), "ConnectionError", "connection to the Hub broke"),
        (dict(truncate_download=600_000), "OSError", "shorter or longer"),
        (dict(truncate_storage=600_000), "OSError", "model.safetensors has another content"),
        (dict(spoil_download="model.safetensors"), "OSError", "model.safetensors has another content"),
        (dict(spoil_download="config.json"), "OSError", "config.json has another content"),
    ],
    ids=["cut", "short", "short in store", "changed weights", "changed config"],
)
def test_download_with_a_fault(hub, stranger, offline, birds, wanted, tmp_path, fault, kind, said):
    with hub.faults(**fault):
        sentence = stranger.fail("load", "alice/birds", cache_dir=tmp_path, kind=kind)
    assert "Loading alice/birds failed" in sentence
    assert said in sentence
    cannot_load_offline(offline, "alice/birds", tmp_path)
    assert same(stranger.do("load", "alice/birds", cache_dir=tmp_path), wanted[1])


def test_fault_leaves_an_older_commit_as_it_was(hub, stranger, offline, birds, wanted, tmp_path):
    stranger.do("load", f"alice/birds@{birds[0]}", cache_dir=tmp_path)
    with hub.faults(spoil_download="model.safetensors"):
        stranger.fail("load", "alice/birds", cache_dir=tmp_path)
    offline.fail("load", "alice/birds", cache_dir=tmp_path, kind="FileNotFoundError")
    assert same(offline.do("load", f"alice/birds@{birds[0]}", cache_dir=tmp_path), wanted[0])


@pytest.mark.parametrize("fault", [dict(truncate_download=600_000), dict(truncate_storage=600_000)])
def test_timm_alone_refuses_short_weights(hub, stranger, birds, fault, tmp_path):
    with hub.faults(**fault):
        assert "said" in stranger.call("pull", "alice/birds", cache_dir=tmp_path)


def test_timm_alone_refuses_changed_weights(hub, stranger, offline, birds, tmp_path):
    with hub.faults(spoil_download="model.safetensors"):
        said = stranger.fail("pull", "alice/birds", cache_dir=tmp_path)
    assert "model.safetensors has another content" in said
    cannot_load_offline(offline, "alice/birds", tmp_path)


def test_cache_that_rots_is_found_offline(stranger, offline, birds, wanted, tmp_path):
    stranger.do("pull", "alice/birds", cache_dir=tmp_path)
    [weights] = tmp_path.rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    assert "another content" in offline.fail("load", "alice/birds", cache_dir=tmp_path)
    cannot_load_offline(offline, "alice/birds", tmp_path)


def test_cache_without_links(hub, start, birds, wanted, tmp_path):
    """Some file systems have none: then the cache does not know the hashes and the server is asked."""
    client = start(HF_HUB_DISABLE_SYMLINKS="1")
    with hub.faults(spoil_download="model.safetensors"):
        assert "another content" in client.fail("load", "alice/birds", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("model.safetensors"))
    assert same(client.do("load", "alice/birds", cache_dir=tmp_path), wanted[1])
    [weights] = tmp_path.rglob("model.safetensors")
    assert not weights.is_symlink()


def test_config_for_the_registry():
    kept = dict(source="timm", hf_hub_id="timm/resnet18")
    assert verified_cfg(kept) is kept
    assert verified_cfg(None) is None


def test_clients_at_once(stranger, alice, hub, birds, wanted, tmp_path):
    """Two processes that share a cache."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda client: client.do("load", "alice/birds", cache_dir=tmp_path), (stranger, alice))
    assert all(same(each, wanted[1]) for each in found)


# the card


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the script measures of `build()`, and the folder that it measured."""
    folder = s3n_timm.save(build(), tmp_path_factory.mktemp("measured"), label_names=LABELS, data_config=DATA)
    output = tmp_path_factory.mktemp("evaluation")
    words = ("--num-images", "24", "--batch-size", "8", "--workers", "0", "--cpu-threads", "1", "--output", output)
    call("evaluate.py", folder, *words, "--ignore-names")
    return output / "results.json"


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(text: str) -> dict[str, str]:
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): " | ".join(row[1:]).strip() for row in rows}


def test_card(results, tmp_path):
    picture = tmp_path / "Bird.PNG"
    Image.new("RGB", (8, 8), "red").save(picture)
    about = dict(
        name="alice/birds", results=results, recipe=RECIPE, licence="cc-by-4.0", picture=picture,
        limits=["Night\nimages."],
    )
    folder = s3n_timm.save(build(), tmp_path / "m", label_names=LABELS, data_config=DATA, card=about)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "picture.png"]
    assert (folder / "picture.png").read_bytes() == picture.read_bytes()

    card, measured = ModelCard.load(folder / "README.md"), json.loads(results.read_text())
    text, accuracy = card.content, measured["measures"]["accuracy"]
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("s3n_timm", "cc-by-4.0", "image-classification")
    assert {"timm", "image-classification"} <= set(data.tags)
    found = {(each.dataset_name, each.dataset_split, each.metric_name): each.metric_value for each in data.eval_results}
    assert found == {
        ("birds", "test", "top-1 accuracy, %"): accuracy["joint"]["top1"],
        ("birds", "test", "top-5 accuracy, %"): accuracy["joint"]["top5"],
    }

    about_model = cells(section(text, "Model"))
    parameters = sum(parameter.numel() for parameter in build().parameters())
    assert about_model["backbone"] == "`test_resnet`"
    assert about_model["parameters"] == f"{parameters:,}"
    assert float(about_model["GMACs"]) == pytest.approx(count_macs(build(), (3, 64, 64)) / 1e9, rel=0.01)
    assert about_model["image size"] == "64 × 64 px, 3 channels"
    assert about_model["partition of peaks in eval mode"] == "extreme"
    assert "3 backbone passes" in about_model["branches"]
    assert "crop 0.9 " in about_model["preprocessing"]

    training = cells(section(text, "Data and training"))
    assert training["seed"] == "31"
    assert training["`lr`"] == "0.02"
    assert training["`scale`"] == "0.3, 1.0"
    assert training["`val_fraction`"] == "0.0"
    assert training["`data_dir`"] == "CUB_200"
    assert training["`comment`"] == r"a\|b"
    assert not {"`balanced`", "`resume`", "`output`", "`clip_grad`"} & training.keys()
    assert "someone" not in text
    assert str(results.parent) not in text
    assert "Data: birds." in text

    reported = section(text, "Results")
    table = cells(reported)
    for name, figures in accuracy.items():
        (low, high), (low5, high5) = figures["top1_interval"], figures["top5_interval"]
        top1 = f"{figures['top1']:.1f} ({low:.1f}–{high:.1f})"
        assert table[name] == f"{top1} | {figures['top5']:.1f} ({low5:.1f}–{high5:.1f})"
    measures = measured["measures"]
    assert table["negative log likelihood, nats"] == f"{measures['calibration']['nll']:.3f}"
    assert table["expected calibration error, %"] == f"{measures['calibration']['ece']:.1f}"
    assert table["peaks per image"] == f"{measures['peaks']['mean']:.1f}"
    assert table["hit rate, % (paper's table 1)"] == f"{measures['hits']['rate']:.1f}"
    bird = measures["magnification"]["discriminative"]["object"]["mean"]
    assert table["object"].split(" | ")[0] == f"{bird:.2f}"
    said = ("split test, 24 images", "64 × 64 px", "exact binomial", "`extreme`", measured["units"], timm.__version__)
    assert not [words for words in said if words not in reported]

    loading = section(text, "How to load")
    assert loading.index("import s3n_timm") < loading.index('timm.create_model("hf-hub:alice/birds", pretrained=True)')
    assert 'from_pretrained("alice/birds")' in loading
    assert "](picture.png)" in section(text, "What it sees")
    assert "- Night images." in section(text, "Limits")
    assert "cc-by-4.0" in section(text, "Licence")
    assert "ding2019selective" in section(text, "Citation")


def test_card_of_nothing_but_the_model():
    card = model_card(build())
    assert "Not measured" in section(card.content, "Results")
    assert "Nothing was measured" in section(card.content, "Limits")
    assert "Recipe and seed: unknown" in card.content
    assert "Data: unknown" in card.content
    assert "No picture" in card.content
    assert "local-dir:FOLDER" in card.content
    assert card.data.eval_results is None
    assert "%" not in section(card.content, "Results")
    assert "seed | unknown" in model_card(build(), recipe=dict(lr=1)).content


@pytest.mark.parametrize(("options", "passes", "peaks"), [
    (dict(answer="original"), "original answers: 1 backbone pass", True),
    (dict(answer="discriminative"), "discriminative answers: 2 backbone passes", True),
    (dict(branches="O"), "1 backbone pass", False),
    (dict(attention="response"), "3 backbone passes", False),
])
def test_card_says_what_the_model_does(options, passes, peaks):
    text = model_card(build(**options)).content
    assert passes in text
    assert ("It runs the backbone" in text) == ("passes" in passes)
    assert ("partition of peaks" in text) == ("Peaks come from" in text) == peaks


def test_card_of_what_was_not_measured(results):
    measured = json.loads(results.read_text())
    for key in ("boxes", "hits", "localization", "magnification", "parts"):
        measured["measures"].pop(key, None)
    table = cells(section(model_card(build(), results=measured).content, "Results"))
    assert table["hit rate, % (paper's table 1)"] == "not measured"
    assert "object" not in table


def test_card_names_data_of_the_hub(results):
    measured = json.loads(results.read_text()) | dict(dataset="hub:alice/photos")
    card = model_card(build(), results=measured, recipe=dict(args=dict(RECIPE, dataset="hub:carol/more")))
    assert card.data.datasets == ["alice/photos", "carol/more"]
    assert card.data.eval_results[0].dataset_type == "alice/photos"
    assert "Data: carol/more." in card.content


def test_card_of_a_plain_model(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    text = (s3n_timm.save(model, tmp_path, card={}) / "README.md").read_text(encoding="utf-8")
    assert "plain baseline" in text
    assert "ding2019" not in text
    assert "peaks" not in section(text, "Limits").lower()
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "timm"
    assert "s3n_timm" not in section(text, "How to load")


def run_snippet(folder: Path, text: str, **environment: str) -> str:
    """What the code of a card prints in a fresh interpreter, beside a photograph."""
    Image.new("RGB", (80, 70), "green").save(folder / "image.jpg")
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, text=True, capture_output=True, timeout=240, encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"} | environment,
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("plain", [False, True])
def test_code_of_the_card_runs(tmp_path, plain):
    model = timm.create_model("test_resnet", num_classes=3) if plain else build()
    s3n_timm.save(model, tmp_path, label_names=LABELS, data_config=DATA, card={})
    text = (tmp_path / "README.md").read_text(encoding="utf-8").replace("FOLDER", str(tmp_path))
    # a plain model needs no s3n_timm: there is none to import
    blocked = {"PYTHONPATH": str(tmp_path / "empty")} if plain else {}
    if plain:
        (tmp_path / "empty" / "s3n_timm").mkdir(parents=True)
        (tmp_path / "empty" / "s3n_timm" / "__init__.py").write_text("raise ImportError('not here')")
    printed = run_snippet(tmp_path, text, **blocked)
    assert any(label in printed for label in LABELS)


def test_code_of_a_pushed_card_runs(hub, birds, tmp_path):
    text = hub.files("alice/birds")["README.md"].decode()
    home = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1", HF_TOKEN="",
                HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    printed = run_snippet(tmp_path, text, **home)
    assert any(label in printed for label in LABELS)


FORGED = "x\n\n# Forged\n<script>alert(1)</script>"


def replace_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: replace_strings(each) for key, each in value.items()}
    return FORGED if isinstance(value, str) else value


@pytest.mark.parametrize("field", ["dataset", "licence", "name", "picture", "limits", "recipe", "results"])
def test_card_fields_forge_nothing(results, field):
    value: Any = FORGED
    if field == "limits":
        value = [FORGED]
    elif field == "recipe":
        value = {FORGED: FORGED, "dataset": FORGED}
    elif field == "results":
        measured = json.loads(results.read_text())
        value = replace_strings(measured) | dict(measures=measured["measures"])
        value["measures"]["accuracy"][FORGED] = value["measures"]["accuracy"]["joint"]
        value["model"]["s3n"]["answer"] = "joint"
    card = model_card(build(), **{field: value})
    assert "\n# Forged" not in card.content
    assert "<script" not in card.content
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict(), "the metadata can no longer be read"
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    wanted = [line for line in model_card(build()).text.splitlines() if line.startswith("#")]
    assert headings[1:] == wanted[1:]


def test_malformed_results_are_one_sentence(results):
    """Values of the file, replaced by ones of another type, give a card or a ValueError."""
    measured = json.loads(results.read_text())

    def places(value: Any, prefix: tuple = ()) -> Any:
        for key, each in value.items():
            yield (*prefix, key)
            if isinstance(each, dict):
                yield from places(each, (*prefix, key))

    refused, model = 0, build()
    every = [(place, value) for place in places(measured) for value in (None, "text", 5, [1], {})]
    for place, value in random.Random(0).sample(every, 60):
        changed = json.loads(json.dumps(measured))
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        try:
            model_card(model, results=changed, data_config=DATA)
        except ValueError:
            refused += 1
    assert refused > 10


def test_macs_are_those_of_every_layer():
    model, counted = build(gate_scores="logits"), []

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        width = module.weight[0].numel()
        counted.append(out.numel() * width)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    macs = count_macs(model, (3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    # the response's projection, and the Gaussian kernel of the sampling maps, are not layers
    assert sum(counted) <= macs < 1.02 * sum(counted)
    assert sum(counted) > 2.9 * sum(counted[:len(counted) // 4])


def test_picture_is_drawn(tmp_path):
    bird = Image.new("RGB", (90, 70), "blue")
    folder = s3n_timm.save(build(), tmp_path, data_config=DATA, card=dict(picture=bird))
    with Image.open(folder / "picture.png") as picture:
        assert min(picture.size) > 500
    with pytest.raises(ValueError, match="plain model"):
        s3n_timm.save(timm.create_model("test_resnet"), tmp_path / "plain", card=dict(picture=bird))
    assert (s3n_timm.save(build(in_chans=1), tmp_path / "grey", card=dict(picture=bird)) / "picture.png").is_file()


@pytest.mark.parametrize(
    ("about", "kind", "said"),
    [
        (dict(results=dict(test_top1=1, args={})), ValueError, "examples/evaluate.py writes"),
        (dict(results="nowhere.json"), FileNotFoundError, "nowhere"),
        (dict(results=__file__), ValueError, "is not JSON"),
        (dict(recipe={}), ValueError, "recipe holds no arguments"),
        (dict(picture="picture.exe"), ValueError, "must end in one of"),
        (dict(picture="nowhere.png"), FileNotFoundError, "nowhere.png"),
        (dict(limits="Night images."), ValueError, "limits must be a list"),
    ],
)
def test_card_refuses(tmp_path, about, kind, said):
    with pytest.raises(kind, match=said):
        s3n_timm.save(build(), tmp_path / "m", card=about)
    assert not any(tmp_path.iterdir())


def test_card_refuses_results_of_another_model(results):
    with pytest.raises(ValueError, match="another model: its num_classes is 3, this one's is 4"):
        model_card(build(num_classes=4), results=results)
    with pytest.raises(ValueError, match="another model: its parameters"):
        model_card(build(neck="none"), results=results)
