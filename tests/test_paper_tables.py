"""experiments/paper_tables.py: real processes on few drawn birds, quick stand-ins for them, and metrics by hand."""

import contextlib
import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
from experiments import paper_tables, tables
from experiments.runner import RunError
from experiments.tables import compare_folders, read_metrics, spread
from helpers import ENVIRONMENT, SMALL, command, runs_forked

SCRIPT = "experiments/paper_tables.py"

FLAGS = [*SMALL, "--epochs", "1"]

# in place of train.py and evaluate.py: writes what the table reads, and does as its environment says
STAND_IN = """
import json, os, sys, time
from pathlib import Path
script, words = Path(sys.argv[1]).name, sys.argv[2:]
output = Path(words[words.index("--output") + 1])
print(script, "speaks")
if os.environ.get("FAIL_IN", "nowhere") in f"{script} {output}/":
    sys.exit("the last words")
if script == "train.py":
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    if "STOP" in os.environ:
        sys.exit(0)
    if "SLEEP" in os.environ:
        try:
            (output / "asleep").touch()
            time.sleep(60)
        finally:
            (output / "never").touch()
    (output / "results.json").write_text("{}")
else:
    output.mkdir()
    seed = int(words[words.index("--seed") + 1])
    right = [int(i < 2 + seed + ("plain" not in str(output))) for i in range(8)]
    top1 = 100 * sum(right) / 8
    (output / "results.json").write_text(json.dumps(dict(measures=dict(accuracy=dict(joint=dict(top1=top1))))))
    lines = ["index,label,correct_joint", *(f"{i},0,{each}" for i, each in enumerate(right))]
    (output / "predictions.csv").write_text("\\n".join(lines))
"""


@pytest.fixture(scope="module")
def main():
    """main() in this process, which keeps its own answers to signals; what it calls are processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield lambda *args: paper_tables.main([str(arg) for arg in args])


@pytest.fixture
def stand_in(tmp_path, main):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    launch = f"{sys.executable} {path}"

    def call(*args, flags=()):
        main("--output", tmp_path / "out", "--launch", launch, *args, "--", *FLAGS, *flags)

    return call


def stopped(call, *args, **options):
    with pytest.raises(SystemExit) as stop:
        call(*args, **options)
    return str(stop.value.code)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(output):
    return {row["row"]: row for row in read(output / "table.json")["rows"]}


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/seed-*/**/*") if path.is_file()}


# real processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, main):
    """Plain and full with one seed."""
    output = tmp_path_factory.mktemp("paper_tables")
    with contextlib.redirect_stdout(io.StringIO()) as said, runs_forked():
        main("--output", output, "--rows", "plain", "sparse", "--seeds", 0, "--", *FLAGS)
    return output, said.getvalue()


def test_table_holds_the_metrics_of_the_runs(trained):
    output, text = trained
    rows = read_rows(output)
    assert list(rows) == ["plain", "O+D+C", "sparse", "probability"]
    plain, full = (read(output / name / "seed-0" / "evaluation" / "results.json")["measures"]
                   for name in ("plain", "O+D+C"))
    baseline = plain["accuracy"]["joint"]["top1"]
    assert rows["plain"]["metrics"]["joint"] == dict(mean=baseline, sd=None, values=[baseline])
    assert rows["plain"]["difference"] is None
    for name in ("O+D+C", "sparse", "probability"):
        metrics = {key: value["mean"] for key, value in rows[name]["metrics"].items()}
        assert metrics.pop("seconds") > 0
        accuracy = full["accuracy"]
        assert metrics == dict(
            joint=accuracy["joint"]["top1"], O=accuracy["original"]["top1"], D=accuracy["discriminative"]["top1"],
            C=accuracy["complementary"]["top1"], localization=full["localization"]["joint"]["accuracy"],
            hit_rate=full["hits"]["rate"])
        assert rows[name]["difference"]["mean"] == pytest.approx(accuracy["joint"]["top1"] - baseline)
        assert rows[name]["difference"]["seeds"] == [0]
    for each in (text, (output / "table.md").read_text(encoding="utf-8")):
        assert "probability" in each
        assert "1 × 3" in each


def test_rows_get_the_same_passes(trained):
    output, rows = trained[0], read_rows(trained[0])
    for name, epochs in (("plain", 3), ("O+D+C", 1)):
        assert len(read_csv(output / name / "seed-0" / "summary.csv")) == epochs == rows[name]["epochs"]
    assert {row["passes"] for row in rows.values()} == {3}


def test_evaluation_reads_the_test_split_of_training(trained):
    folders = sorted(trained[0].glob("*/seed-*"))
    assert len(folders) == 2
    for folder in folders:
        results = read(folder / "evaluation" / "results.json")
        own = read(folder / "results.json")["test_top1"]["best"]
        assert results["images"] == 12
        assert results["weights"].endswith("best")
        assert own.keys() <= results["measures"]["accuracy"].keys()
        for name, top1 in own.items():
            assert results["measures"]["accuracy"][name]["top1"] == pytest.approx(top1), name


def test_a_changed_flag_is_refused_by_name(trained, main):
    output = trained[0]
    now = times(output)
    args = ("--output", output, "--rows", "O+D", "plain", "--seeds", 0, "--", *FLAGS)
    said = stopped(main, *args, "--lr", "0.03")
    assert f"{output / 'plain' / 'seed-0'} holds a run with other settings (lr was 0.02 and is 0.03):" in said
    assert "epochs was 3 and is 6" in stopped(main, *args, "--epochs", "2")
    assert "launch was None and is ['python']" in stopped(main, "--launch", "python", *args)
    assert times(output) == now
    assert not (output / "O+D").exists(), "nothing is begun before all is looked at"


# stand-ins


def test_what_is_done_is_not_run_again(stand_in, tmp_path, capsys):
    output = tmp_path / "out"
    stand_in("--rows", "plain", "--seeds", 0)
    before = times(output)
    capsys.readouterr()
    stand_in("--rows", "plain", "--seeds", 0, 1)
    said = capsys.readouterr().out
    assert "plain, seed 0: done before" in said
    assert "plain, seed 1: done," in said
    now = times(output)
    assert {path: now[path] for path in before} == before
    # what changes no metric may differ
    stand_in("--rows", "plain", "--seeds", 0, 1, flags=["--workers", "1", "--no-verify"])
    assert times(output) == now
    assert capsys.readouterr().out.count("done before") == 2


def test_differences_over_seeds(stand_in, tmp_path):
    stand_in("--rows", "plain", "O", "probability", "--seeds", 0, 3, 0)
    rows = read_rows(tmp_path / "out")
    assert rows["plain"]["metrics"]["joint"] == dict(mean=43.75, sd=pytest.approx(26.5165), values=[25, 62.5])
    assert rows["plain"]["difference"] is None
    assert rows["O"]["metrics"]["joint"]["values"] == [37.5, 75]
    assert rows["O"]["difference"]["values"] == [12.5, 12.5]
    assert rows["O"]["difference"]["sd"] == 0
    low, high = rows["O"]["difference"]["interval"]
    assert (low, high) == (0, 31.25), "of 16 answers 2 are gained: 0 to 5 in 95 % of the draws"
    assert rows["O"]["metrics"]["D"] == dict(mean=None, sd=None, values=[None, None])
    lines = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[3].startswith("| 2 | O | 86.0 | 1 × 3 | 2 | 56.2 ± 26.5 |  |  |  | 57.7 |  |  | ")
    assert lines[3].endswith("| +12.5 ± 0.0 | +0.0 to +31.2 |")
    assert lines[6].startswith("| 4 | probability | 88.5 | 3 × 1 |")
    assert "of CUB" not in lines[-1]
    assert lines[-1] == tables.NOTE
    line = read_csv(tmp_path / "out" / "table.csv")[1]
    assert (line["difference_mean"], line["difference_low"], line["passes"]) == ("12.5", "0.0", "3")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "O", "O+D+C", "plain", "table.csv", "table.json", "table.md"]


def test_the_first_failure_ends_the_command_and_later_ones_are_listed(stand_in, tmp_path, monkeypatch, capsys):
    args = ("--rows", "plain", "O+D", "O", "--seeds", 1, 0)
    monkeypatch.setenv("FAIL_IN", "train.py " + str(tmp_path / "out" / "O+D" / "seed-1"))
    assert "failed: O+D, seed 1." in stopped(stand_in, *args)
    said = capsys.readouterr().out
    log = tmp_path / "out" / "O+D" / "seed-1" / "log.txt"
    assert f"O+D, seed 1 failed with exit status 1; the end of {log}:" in said
    assert "  train.py speaks\n  the last words" in said
    # seed by seed, in the order of the tables
    assert {name: row["seeds"] for name, row in read_rows(tmp_path / "out").items()} == dict(plain=[1], O=[1])
    assert "failed: O+D, seed 1." in stopped(stand_in, *args, "--keep-going")
    assert {name: row["seeds"] for name, row in read_rows(tmp_path / "out").items()} == {
        "plain": [1, 0], "O": [1, 0], "O+D": [0]}
    assert read_rows(tmp_path / "out")["O+D"]["difference"]["seeds"] == [0]
    monkeypatch.delenv("FAIL_IN")
    stand_in("--rows", "O+D", "--seeds", 1)
    stand_in(*args)
    assert len(read_csv(tmp_path / "out" / "table.csv")) == 3
    log = (tmp_path / "out" / "O+D" / "seed-1" / "log.txt").read_text()
    assert log.count("$ ") == 4, "two failures, one training and one evaluation"
    assert log.count("the last words") == 2


def test_what_was_interrupted_is_not_taken_for_done(stand_in, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "plain" / "seed-0"
    args = ("--rows", "plain", "--seeds", 0)
    monkeypatch.setenv("STOP", "1")
    assert "failed: plain, seed 0." in stopped(stand_in, *args)
    monkeypatch.delenv("STOP")
    monkeypatch.setenv("FAIL_IN", "evaluate.py")
    stopped(stand_in, *args)
    assert (folder / "results.json").exists()
    monkeypatch.setenv("FAIL_IN", "train.py")  # which is through
    stand_in(*args)
    # evaluate.py writes the answers last
    (folder / "evaluation" / "predictions.csv").unlink()
    (folder / "evaluation" / "results.json").rename(folder / "evaluation.json")
    (folder / "evaluation").rmdir()
    stand_in(*args)
    assert (folder / "evaluation" / "predictions.csv").exists()
    (folder / "evaluation" / "predictions.csv").unlink()
    with pytest.raises(SystemExit):
        stand_in(*args)  # the stand-in refuses a folder that exists: it was called


def test_the_table_is_there_after_each_run(stand_in, tmp_path, monkeypatch):
    execute, seen = paper_tables.execute, []

    def watch(one):
        path = tmp_path / "out" / "table.csv"
        seen.append([row["row"] for row in read_csv(path)] if path.exists() else [])
        execute(one)

    monkeypatch.setattr(paper_tables, "execute", watch)
    stand_in("--rows", "plain", "O+D", "all", "--seeds", 0)
    assert seen == [[], ["plain"], ["plain", "O+D"]]


def test_seconds_add_up(stand_in, tmp_path, monkeypatch):
    path = tmp_path / "out" / "plain" / "seed-0" / "command.json"
    monkeypatch.setenv("STOP", "1")
    stopped(stand_in, "--rows", "plain", "--seeds", 0)
    record = read(path)
    path.write_text(json.dumps(dict(record, seconds=1000)))
    monkeypatch.delenv("STOP")
    stand_in("--rows", "plain", "--seeds", 0)
    assert read_rows(tmp_path / "out")["plain"]["metrics"]["seconds"]["mean"] > 1000
    assert record["seconds"] > 0


def test_a_run_that_learned_nothing_may_change(stand_in, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "plain" / "seed-0"
    monkeypatch.setenv("FAIL_IN", "train.py")
    args = ("--rows", "plain", "--seeds", 0)
    stopped(stand_in, *args)
    monkeypatch.delenv("FAIL_IN")
    stand_in(*args, flags=["--lr", "0.5"])
    assert read(folder / "command.json")["settings"]["lr"] == 0.5
    # a folder of another hand is nobody's to change
    (folder / "command.json").unlink()
    assert "holds a run with other settings (it has no command.json)" in stopped(stand_in, *args)


def test_rows_of_other_settings_are_left_out_of_the_table(stand_in, tmp_path):
    stand_in("--rows", "plain", "O", "--seeds", 0)
    stand_in("--rows", "O+D", "--seeds", 0, flags=["--lr", "0.5"])
    assert set(read_rows(tmp_path / "out")) == {"O+D"}
    stand_in("--rows", "O", "--seeds", 0)
    assert set(read_rows(tmp_path / "out")) == {"plain", "O"}, "what is done is there without being asked for"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_run_which_goes_on_afterwards(sent, stand_in, tmp_path):
    """A run of train.py goes on where it was, see test_interruption.py; here, that it is asked to."""
    folder, launch = tmp_path / "out" / "plain" / "seed-0", f"{sys.executable} {tmp_path / 'stand_in.py'}"
    words = command(SCRIPT, "--output", tmp_path / "out", "--rows", "plain", "--seeds", "0", "--launch", launch, "--",
                    *FLAGS)
    with subprocess.Popen(words, env=ENVIRONMENT | dict(SLEEP="1"), stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        until = time.monotonic() + 100
        while not (folder / "asleep").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        if sent == signal.SIGTERM:  # to the command alone
            process.terminate()
        else:
            os.killpg(process.pid, sent)
        assert "Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode == (128 + sent if sent == signal.SIGTERM else -sent)
    assert not (folder / "results.json").exists()
    children = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "stand_in.py") not in children
    stand_in("--rows", "plain", "--seeds", 0)
    assert (folder / "results.json").exists()
    assert (folder / "log.txt").read_text(encoding="utf-8").count("$ ") == 3


# pure functions


@pytest.mark.parametrize(
    ("name", "passes", "of_one", "of_sixty"),
    [
        ("plain", 1, 3, 180), ("O", 1, 3, 180), ("O+D", 2, 2, 90), ("O+C", 2, 2, 90), ("D+C", 3, 1, 60),
        ("O+D+C", 3, 1, 60), ("saliency", 3, 1, 60), ("response", 3, 1, 60), ("all", 3, 1, 60), ("random", 3, 1, 60),
    ],
)
def test_epochs_by_hand(name, passes, of_one, of_sixty):
    assert paper_tables.count_passes(paper_tables.ROWS[name].options) == passes
    assert [paper_tables.scale_epochs(epochs, passes) for epochs in (1, 60)] == [of_one, of_sixty]
    assert paper_tables.scale_epochs(3, 2) == 5, "halves go up"


def test_the_papers_figures_and_configurations():
    tables = {name: (row.table, row.paper_top1, row.paper_localization) for name, row in paper_tables.ROWS.items()}
    assert tables == {
        "plain": ("–", 86.0, None), "O": ("2", 86.0, 57.7), "O+D": ("2", 87.6, 59.2), "O+C": ("2", 87.3, 56.6),
        "D+C": ("2", 87.5, 62.6), "O+D+C": ("2", 88.5, 65.2), "saliency": ("3", 85.9, None),
        "response": ("3", 87.8, None), "sparse": ("3", 88.5, None), "all": ("4", 87.7, None),
        "random": ("4", 87.9, None), "probability": ("4", 88.5, None),
    }
    trained = [paper_tables.trained_as(name) for name in ("O+D+C", "sparse", "probability", "all")]
    assert trained == [*["O+D+C"] * 3, "all"]


def plan(*flags, name="O+D+C", seed=0):
    return paper_tables.plan_run(name, seed, paper_tables.parse_args(["--", *map(str, flags)]))


def test_rows_differ_in_nothing_but_what_they_compare():
    plans = {name: plan(*FLAGS, name=name).settings for name in paper_tables.ROWS}
    full = plans["O+D+C"]
    differing = {name: {key for key in full if each[key] != full[key]} for name, each in plans.items()}
    budget = {"epochs", "warmup_epochs"}
    assert differing == {
        "plain": {"plain", *budget}, "O": {"branches", *budget}, "O+D": {"branches", *budget},
        "O+C": {"branches", *budget}, "D+C": {"branches"}, "O+D+C": set(), "saliency": {"attention"},
        "response": {"attention"}, "sparse": set(), "all": {"model_kwargs"}, "random": {"model_kwargs"},
        "probability": set(),
    }
    recipe = dict(backbone_args=dict(output_stride=16))
    assert full["model_kwargs"] == plans["plain"]["model_kwargs"] == recipe
    assert plans["all"]["model_kwargs"] == dict(recipe, partition_train="all", partition_eval="all")
    assert plan(*FLAGS, seed=7).settings["seed"] == 7


def test_the_output_that_is_tabulated_chooses_the_epoch(tmp_path):
    plans = [plan("--dataset", "folder", "--data-dir", tmp_path, name=name) for name in paper_tables.ROWS]
    assert {run.settings["answer"] for run in plans} == {"joint"}, "the recipe of one's own data has the mean"


def test_further_arguments_are_merged():
    flags = [*FLAGS, "--model-kwargs", '{"grid_size": 21}']
    for name, more in (("O+D", {}), ("random", dict(partition_train="random", partition_eval="random"))):
        assert plan(*flags, name=name).settings["model_kwargs"] == dict(grid_size=21, **more)
    other = plan(*FLAGS, "--backbone", "resnet18", name="all")  # whose arguments the recipe does not know
    assert other.settings["model_kwargs"] == dict(partition_train="all", partition_eval="all")


def test_schedules_stretch_with_the_epochs():
    flags = ["--dataset", "cub", "--preset", "original", "--warmup-epochs", 3, "--freeze-epochs", 1]
    flags += ["--decay-milestones", 30, 45]
    expected = {"plain": (180, 9, 3, [90, 135]), "O+D": (90, 5, 2, [45, 68]), "D+C": (60, 3, 1, [30, 45])}
    keys = ("epochs", "warmup_epochs", "freeze_epochs", "decay_milestones")
    for name, figures in expected.items():
        settings = plan(*flags, name=name).settings
        assert tuple(settings[key] for key in keys) == figures
        warmup = settings["model_kwargs"].get("partition_warmup_epochs")
        assert warmup == {"plain": None, "O+D": 32, "D+C": 21}[name]


def words_after(words, flag):
    return words[words.index(flag) + 1] if flag in words else None


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        (["--num-images", 80], "best", {"--num-images": "20", "--split": "test", "--data-dir": None}),
        (["--num-images", 20, "--num-classes", 8, "--val-fraction", 0], "last", {"--num-images": "8"}),
        (["--dataset", "cub", "--data-dir", "there", "--cpu-threads", 3], "last",
         {"--num-images": None, "--data-dir": "there", "--image-column": None, "--cpu-threads": "3"}),
        (["--dataset", "hub:x/y", "--val-split", "dev", "--val-fraction", 0, "--test-split", "held"], "best",
         {"--split": "held", "--image-column": "image", "--label-column": "label", "--dataset": "hub:x/y"}),
        (["--dataset", "parquet", "--label-column", "kind", "-b", 5], "best",
         {"--split": "test", "--label-column": "kind", "--batch-size": "5"}),
    ],
)
def test_evaluation_follows_training(flags, kind, expected):
    one = plan(*flags, seed=5)
    assert one.evaluate[2].endswith(f"O+D+C/seed-5/{kind}")
    assert {flag: words_after(one.evaluate, flag) for flag in expected} == expected
    assert words_after(one.evaluate, "--seed") == words_after(one.train, "--seed") == "5"
    assert one.train[-1] == "--resume"
    assert "--no-verify" not in one.evaluate
    assert "--no-verify" in plan(*flags, "--no-verify").evaluate


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--", "--seed", "3"], "--seed is not for all rows"),
        (["--", "--branch=O"], "--branch=O is not for all rows"),
        (["--", "--plain"], "--plain is not for all rows"),
        (["--", "--answer", "mean"], "--answer is not for all rows"),
        (["--", "--patience", "3"], "--patience would end rows"),
        (["--", "--model-kwargs", '{"partition_eval": "all"}'], "--model-kwargs sets the partition"),
        (["--", "--epochs", "0"], "--epochs must be positive"),
        (["--rows", "D"], "argument --rows: invalid choice: 'D'"),
    ],
)
def test_bad_arguments_end_in_one_sentence(capsys, args, message):
    stopped(paper_tables.parse_args, args)
    assert message in capsys.readouterr().err


def test_spread_by_hand():
    assert spread([1.0, 2.0, 6.0]) == dict(mean=3, sd=pytest.approx(7 ** 0.5), values=[1, 2, 6])
    assert spread([1.0, 2.0, 6.0])["sd"] == pytest.approx(statistics.stdev([1, 2, 6]))
    assert spread([4.0]) == dict(mean=4, sd=None, values=[4])
    assert spread([4.0, None]) == dict(mean=None, sd=None, values=[4, None])


def test_figures_of_a_run(tmp_path):
    outputs = ("joint", "original", "discriminative", "complementary")
    measures = dict(
        accuracy={name: dict(top1=i, top5=90 + i) for i, name in enumerate(outputs)},
        localization={"images": 9, **{name: dict(accuracy=10 + i, iou=0.5) for i, name in enumerate(outputs)}},
        hits=dict(images=9, rate=20, mean=21),
    )
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "command.json").write_text('{"seconds": 30}')
    expected = dict(joint=0, O=1, D=2, C=3, localization=10, hit_rate=20, seconds=30)
    for lacking in ((), ("localization",), ("localization", "hit_rate")):
        found = {name: value for name, value in measures.items() if name.replace("hits", "hit_rate") not in lacking}
        (tmp_path / "evaluation" / "results.json").write_text(json.dumps(dict(measures=found)))
        assert read_metrics(tmp_path) == expected | dict.fromkeys(lacking)


def write_answers(folder, right, labels=None):
    (folder / "evaluation").mkdir(parents=True)
    lines = [f"{i},{label},{int(each)}" for i, (each, label) in enumerate(zip(right, labels or [0] * len(right)))]
    (folder / "evaluation" / "predictions.csv").write_text("\n".join(["index,label,correct_joint", *lines]) + "\n")
    return folder


def test_runs_are_compared_seed_by_seed(tmp_path):
    ours = {seed: write_answers(tmp_path / f"a{seed}", right) for seed, right in (
        (0, [1, 1, 1, 1]), (1, [1, 1, 0, 0]), (2, [1, 1, 1, 1]))}
    theirs = {seed: write_answers(tmp_path / f"b{seed}", right) for seed, right in (
        (1, [1, 1, 1, 0]), (0, [0, 0, 1, 1]), (5, [0] * 4))}
    found = compare_folders(ours, theirs)
    assert found["seeds"] == [0, 1]
    assert found["values"] == [50, -25]
    assert (found["mean"], found["sd"]) == (12.5, pytest.approx(75 / 2 ** 0.5))
    assert found["interval"][0] < 12.5 < found["interval"][1]
    assert compare_folders({0: ours[0]}, {1: theirs[1]}) is None
    assert compare_folders({0: ours[0]}, {0: ours[1]})["interval"][0] >= 0, "the same images cancel"
    other = write_answers(tmp_path / "c", [1, 1, 1, 1], labels=[0, 0, 1, 0])
    with pytest.raises(RunError) as error:
        compare_folders({0: ours[0]}, {0: other})
    assert f"{ours[0]} and {other} were tested on other images" in str(error.value)
