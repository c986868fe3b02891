"""experiments/cub50.py and its tables: real runs on a few small photographs, metrics by hand, and published ones."""

import json
import re
import threading

import numpy as np
import pytest
import timm
import torch
from experiments import cub50, tables
from experiments.runner import STOPPING, RunError, execute_all
from helpers import ENVIRONMENT, Forked, runs_forked
from PIL import Image
from safetensors.torch import save_file
from support.arguments import parse_args

from s3n_timm.config import S3NConfig

CLASSES, TRAINING, TEST = 4, 16, 8


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """CUB's layout, and as many training images as one batch of the recipe."""
    root = tmp_path_factory.mktemp("cub")
    (root / "images").mkdir()
    (root / "parts").mkdir()
    noise = np.random.default_rng(0)
    names = ("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs")
    lines = [(f"{i} {i}.jpg", f"{i} {1 + i % CLASSES}", f"{i} {int(i < TRAINING)}", f"{i} 5 5 30 20",
              f"{i} 1 9 {i} 1") for i in range(TRAINING + TEST)]
    for name, of_file in zip(names, zip(*lines)):
        (root / f"{name}.txt").write_text("\n".join(of_file))
    (root / "parts" / "parts.txt").write_text("1 beak")
    (root / "classes.txt").write_text("\n".join(f"{1 + i} class {i}" for i in range(CLASSES)))
    for i in range(TRAINING + TEST):
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
    return root


@pytest.fixture
def keep_signals(monkeypatch):
    """main() in this process, which keeps its own answers to signals."""
    monkeypatch.setattr("signal.signal", lambda *_: None)


def test_rows_that_share_weights_are_trained_once(photographs, keep_signals, monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "backbone.safetensors")
    words = [str(word) for word in (
        "--data-dir", photographs, "--pretrained-path", tmp_path / "backbone.safetensors", "--output",
        tmp_path / "runs", "--results", tmp_path / "results", "--seeds", 0, "--rows", "s3n", "mean", "exit")]
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(cub50.ROWS, "s3n", cub50.Row("S3N, small", ("--img-size", "64", "--epochs", "1")))
    with runs_forked():
        cub50.main(words)
    printed = capsys.readouterr().out
    found = {name: json.loads((tmp_path / "results" / f"{name}-0.json").read_text())
             for name in ("s3n", "mean", "exit")}
    assert [line.split(":")[0] for line in printed.splitlines()] == [f"{name}, seed 0" for name in found]
    assert found["s3n"]["train_seconds"] == found["mean"]["train_seconds"] == found["exit"]["train_seconds"]
    assert found["s3n"]["answered"] == found["s3n"]["correct"]["joint"]
    assert found["mean"]["answered"] == found["s3n"]["correct"]["mean"]
    # four classes know less than 1.68 nats: every image leaves
    assert found["exit"]["answered"] == found["s3n"]["correct"]["original"]
    assert (found["mean"]["exited"], found["exit"]["exited"]) == (0, 1)
    assert len(found["s3n"]["answered"]) == TEST
    assert len(found["s3n"]["betas"]) == 2
    cub50.main(words)
    assert capsys.readouterr().out == "", "what is done is not run again"


def plan(name, folder, *words, seed=0):
    args = cub50.parse_args(["--data-dir", str(folder), "--pretrained-path", str(folder / "backbone.safetensors"),
                             "--output", str(folder), "--rows", name, *words])
    return cub50.plan_run(name, seed, args)


def after(words, flag):
    return words[words.index(flag) + 1]


def test_confident_images_are_answered_by_the_original_branch(tmp_path):
    planned = plan("focus-exit", tmp_path)
    folder = planned.evaluation
    assert folder == tmp_path / "focus" / "seed-0" / "evaluation"
    folder.mkdir(parents=True)
    (planned.folder / "last").mkdir()
    save_file({"beta_discriminative": torch.tensor(2.0)}, planned.folder / "last" / "model.safetensors")
    (planned.folder / "command.json").write_text('{"seconds": 30}')
    (folder / "results.json").write_text('{"measures": {}}')
    outputs = ("joint", "mean", "original", "discriminative")
    # at the threshold an image stays
    rows = [(0.7, 0, 0, 1, 0), (0.71, 0, 0, 1, 0), (0.72, 0, 0, 1, 0), (0.1, 1, 1, 0, 1), (2.0, 0, 0, 0, 1)]
    lines = [",".join(map(str, row)) for row in rows]
    header = ",".join(("entropy", *(f"correct_{name}" for name in outputs)))
    (folder / "predictions.csv").write_text("\n".join([header, *lines]))
    found = cub50.measure(planned)
    assert found["answered"] == "10001"
    assert found["exited"] == 0.4
    assert found["betas"] == {"beta_discriminative": 2.0}
    assert found["train_seconds"] == 30


def test_the_exported_backbone_is_evaluated_beside_the_network(tmp_path):
    whole, backbone = plan("s3n-224-18", tmp_path), plan("s3n-224-18-backbone", tmp_path)
    assert whole.train == backbone.train
    assert whole.evaluate[2] == str(whole.folder / "last")
    assert backbone.evaluate[2] == str(whole.folder / "backbone")
    assert whole.evaluation != backbone.evaluation
    for name, row in cub50.ROWS.items():
        if cub50.flag(row.train, "--epochs", "6") == "18":
            assert row.is_single_pass or cub50.ROWS[f"{name}-backbone"].is_single_pass


def test_train_and_the_model_take_every_row(tmp_path):
    (tmp_path / "backbone.safetensors").touch()
    for name, row in cub50.ROWS.items():
        args = parse_args(plan(name, tmp_path).train[2:])
        if not row.is_plain:
            S3NConfig(branches=args.branches, attention=args.attention, **args.model_kwargs)


def test_every_size_has_the_baselines_of_as_much_training():
    """18 epochs of S3N's three passes are 54 of one."""
    for side, size in cub50.SIZES.items():
        rows = {name: row for name, row in cub50.ROWS.items() if row.is_plain and cub50.input_side(row.train) == side}
        epochs = {name: int(cub50.flag(row.train, "--epochs", "6")) for name, row in rows.items()}
        assert epochs[f"plain{size}-54"] == 3 * epochs[f"plain{size}-18"] == 54
        for row in rows.values():
            assert row.cost is None or cub50.input_side(cub50.ROWS[row.cost].train) == side


def test_validation_holds_the_same_images_out_of_training_and_evaluates_them(tmp_path):
    row = "plain-224-18-cutmix"
    chosen, final = plan(row, tmp_path, "--validation", seed=2), plan(row, tmp_path, seed=2)
    assert after(chosen.train, "--val-fraction") == after(chosen.evaluate, "--val-fraction") == "0.2"
    assert after(chosen.train, "--seed") == after(chosen.evaluate, "--seed") == "2"
    assert after(chosen.evaluate, "--split") == "train"
    assert "--split" not in final.evaluate
    assert "--val-fraction" not in final.train
    assert chosen.settings != final.settings
    given = ["--data-dir", "x", "--pretrained-path", "x", "--rows", "plain"]
    validation, test = cub50.parse_args([*given, "--validation"]), cub50.parse_args(given)
    assert validation.output != test.output
    assert validation.results == test.results / "validation"


# in place of train.py and evaluate.py: the first waits until as many trainings as MEET says have begun
STAND_INS = {
    "train.py": """
import os, sys, time
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
if os.environ.get("FAIL") == output.parent.name:
    sys.exit("the last words")
(output / "last").mkdir(parents=True)
until = time.monotonic() + 100
while len(list(output.parents[1].glob("*/*/last"))) < int(os.environ["MEET"]):
    assert time.monotonic() < until
    time.sleep(0.05)
(output / "last" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
(output / "results.json").write_text("{}")
""",
    "evaluate.py": """
import sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir()
(output / "results.json").write_text('{"measures": {}}')
right = int(Path(sys.argv[1]).name == "backbone")
(output / "predictions.csv").write_text(f"index,label,entropy,correct_joint\\n0,0,1,{right}\\n1,0,1,1\\n")
""",
}


@pytest.fixture
def stand_in(keep_signals, monkeypatch, tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cub50, "EXAMPLES", tmp_path)

    def call(*words):
        cub50.main(["--data-dir", "x", "--pretrained-path", "x", "--output", str(tmp_path / "runs"),
                    "--results", str(tmp_path / "results"), *map(str, words)])
        return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}

    return call


def test_jobs_train_at_the_same_time_and_rows_of_one_training_share_it(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("MEET", "2")
    found = stand_in("--rows", "plain-18", "s3n-18", "s3n-18-backbone", "--seeds", 0, "--jobs", 2)
    assert {name: each["answered"] for name, each in found.items()} == {
        "plain-18-0": "01", "s3n-18-0": "01", "s3n-18-backbone-0": "11"}
    trained = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert trained == ["plain-18", "s3n-18"]
    assert (tmp_path / "runs" / "s3n-18" / "seed-0" / "log.txt").read_text().count("$ ") == 3


def test_a_failure_ends_the_command_and_the_next_one_goes_on(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("MEET", "0")
    monkeypatch.setenv("FAIL", "plain-18")
    with pytest.raises(SystemExit, match=r"(?s)plain-18, seed 0 failed with exit status 1.*the last words"):
        stand_in("--rows", "plain", "plain-18", "--seeds", 0)
    monkeypatch.delenv("FAIL")
    before = (tmp_path / "runs" / "plain" / "seed-0" / "results.json").stat().st_mtime_ns
    assert sorted(stand_in("--rows", "plain", "plain-18", "--seeds", 0)) == ["plain-0", "plain-18-0"]
    assert (tmp_path / "runs" / "plain" / "seed-0" / "results.json").stat().st_mtime_ns == before
    (tmp_path / "results" / "plain-18-0.json").unlink()
    with pytest.raises(SystemExit, match=r"holds a run with other settings \(validation was False and is True\)"):
        stand_in("--rows", "plain-18", "--seeds", 0, "--validation")


def test_a_failing_job_stops_the_others():
    stopped, begun = [], threading.Barrier(3)

    def each(name):
        begun.wait(60)
        if name == "fails":
            raise RunError("why")
        assert STOPPING.wait(60), "still waiting when the other has failed"
        stopped.append(name)

    with pytest.raises(RunError, match="why"):
        execute_all([["waits"], ["fails"], ["waits too"], ["never begun"]], each, jobs=3)
    assert sorted(stopped) == ["waits", "waits too"]
    assert not STOPPING.is_set()


@pytest.mark.parametrize(("words", "message"), [
    (["--rows", "plain-225"], "--rows plain-225 names no row"),
    (["--rows", "plain", "--jobs", "0"], "--jobs must be positive"),
    ([], "--rows"),
])
def test_bad_arguments_end_in_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit):
        cub50.parse_args(["--data-dir", "x", "--pretrained-path", "x", *words])
    assert message in capsys.readouterr().err


def made_up(row, seed, answered, train=(), exited=0.0):
    return dict(row=row, seed=seed, answered=answered, train=list(train), exited=exited, measures=dict(accuracy={}))


def test_metrics_by_hand():
    speed = {"plain": dict(gmacs=0.2), "focus": dict(gmacs=0.6, images_per_second=63.4, training_images_per_second=10),
             "focus-224-18-exit": dict(gmacs=0.8)}
    speed["focus-exit"] = speed["focus"]
    whole = made_up("focus", 0, "1100", ("--img-size", "320", "--model-kwargs", '{"scan_size": 160}'))
    assert tables.count_passes(whole, speed) == pytest.approx(3)
    assert tables.show_speed(whole, speed) == ("63", "15")
    early = whole | dict(row="focus-exit", exited=0.25)
    assert tables.count_passes(early, speed) == pytest.approx(0.25 * 1 + 0.75 * 3)
    assert tables.show_speed(early, speed) == ("", "15"), "how fast it is depends on the images"
    larger = made_up("focus-224-18-exit", 0, "1", ("--model-kwargs", '{"scan_size": 224}'), exited=0.5)
    assert tables.count_passes(larger, speed) == pytest.approx(0.5 * (224 / 160) ** 2 + 0.5 * 4)
    ours = {0: whole, 1: made_up("focus", 1, "1111"), 2: made_up("focus", 2, "0000")}
    theirs = {0: made_up("plain", 0, "1000"), 1: made_up("plain", 1, "1010")}
    assert tables.compare_rows(ours, theirs).startswith("+37.5 ("), "seeds 0 and 1, which both have"
    assert tables.compare_rows(ours, ours) == tables.compare_rows(ours, {5: theirs[0]}) == ""


def test_table_needs_runs_and_speed(tmp_path, capsys):
    def refused():
        with pytest.raises(SystemExit):
            tables.main(["--results", str(tmp_path)])
        return capsys.readouterr().err

    assert "holds no run" in refused()
    (tmp_path / "plain-0.json").write_text(json.dumps(made_up("plain", 0, "1110")))
    assert "has no speed.json" in refused()
    (tmp_path / "speed.json").write_text('{"rows": []}')
    assert "speed.json lacks plain" in refused()
    assert not (tmp_path / "table.md").exists()
    speed = dict(row="plain", gmacs=0.2, images_per_second=200, training_images_per_second=50)
    (tmp_path / "speed.json").write_text(json.dumps(dict(rows=[speed])))
    tables.main(["--results", str(tmp_path)])
    expected = "| plain | the backbone alone, equal epochs | 6 | 160 | 1.00 | 200 | 3 | 1 | 75.0 |"
    assert expected in capsys.readouterr().out
    assert (tmp_path / "table.md").is_file()
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size == (960, 720)


def test_frontier_by_hand(capsys, tmp_path):
    """Single passes, each against the best plain row of its size; costs are those of the plain row of that size."""
    px = ("--img-size", "224", "--epochs", "18")
    made = [made_up(name, seed, answered, flags) for name, flags, of_row in (
        ("plain-18", ("--epochs", "18"), ("1000", "1000")),
        ("plain-224-18", px, ("1100", "1000")),
        ("plain-224-18-cutmix", (*px, "--cutmix", "1"), ("1100", "1010")),
        ("plain-224-18-erasing", (*px, "--reprob", "0.25"), ("1101",)),  # one seed can be above others by chance
        ("s3n-224-18", px, ("1111", "1111")),
        ("s3n-224-18-backbone", px, ("1110", "1110")),
    ) for seed, answered in enumerate(of_row)]
    for each in made:
        (tmp_path / f"{each['row']}-{each['seed']}.json").write_text(json.dumps(each))
    speed = [dict(row=name, gmacs=gmacs, images_per_second=rate, training_images_per_second=rate / 4)
             for name, gmacs, rate in (("plain", 0.2, 100), ("plain-224", 0.4, 50), ("s3n-224-18", 1.2, 20))]
    (tmp_path / "speed.json").write_text(json.dumps(dict(rows=speed)))
    tables.main(["--results", str(tmp_path)])
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "frontier.md").read_text().splitlines()]
    rows = {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
    assert list(rows) == ["plain-18", "plain-224-18-erasing", "s3n-224-18-backbone", "plain-224-18-cutmix",
                          "plain-224-18"]
    ours = rows["s3n-224-18-backbone"]
    assert [ours[name] for name in ("px", "passes an image", "images/s", "training min", "seeds", "top-1 %")] == [
        "224", "2.00", "50", "90", "2", "75.0 ± 0.0"]
    assert ours["best baseline"] == "plain-224-18-cutmix", "the first of equal ones"
    assert ours["− best baseline"].startswith("+25.0 (")
    assert "s3n-224-18 |" in capsys.readouterr().out, "which takes several passes, in the table of all rows"
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.size == (960, 720)
    # validation runs lie below the folder of speed.json
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "plain-18-0.json").write_text(json.dumps(made[0]))
    tables.main(["--results", str(tmp_path / "validation")])
    assert (tmp_path / "validation" / "frontier.md").is_file()
    (tmp_path / "gone-0.json").write_text(json.dumps(made_up("gone", 0, "1")))
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path)])
    assert "gone-0.json is a run of gone" in capsys.readouterr().err


def test_published_metrics_are_those_of_the_runs():
    """table.md and frontier.md, and the rows and columns of them that both READMEs show."""
    runs, speed = tables.read_runs(cub50.RESULTS), tables.read_speed(cub50.RESULTS / "speed.json")
    single = {name: of_row for name, of_row in runs.items() if cub50.ROWS[name].is_single_pass}
    made: dict[str, dict[str, str]] = {}
    for name, header, rows in (("table", tables.HEADER, tables.format_rows(runs, speed)),
                               ("frontier", tables.FRONTIER_HEADER, tables.format_frontier(single, speed))):
        assert (cub50.RESULTS / f"{name}.md").read_text(encoding="utf-8") == tables.as_markdown(header, rows)
        for row in rows:
            made.setdefault(row[0], {}).update(zip(header, row))
    results = cub50.RESULTS.parent
    shown = 0
    for path in (results / "README.md", results.parents[1] / "README.md"):
        for table in re.findall(r"^\| row \|.*\n(?:\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
            header, _, *lines = ([cell.strip(" `*") for cell in line.removeprefix("|").removesuffix("|").split("|")]
                                 for line in table.splitlines())
            for line in lines:
                for column, cell in zip(header, line, strict=True):
                    assert column == "what" or cell == made[line[0]][column], (path, line[0])
                shown += 1
    assert shown > 3


@pytest.mark.parametrize("script", ["cub50.py", "paper_tables.py", "packaged_model.py", "tables.py", "speed.py"])
def test_scripts_run_as_files(script):
    """They find what lies in examples/ without pytest's path."""
    assert "usage:" in Forked(f"experiments/{script}", "--help").end()
