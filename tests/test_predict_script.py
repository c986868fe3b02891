"""examples/predict.py as its users run it."""

import ast
import json
import multiprocessing
import os
import shutil
import struct
import time

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers import Forked, command, run
from PIL import Image, TiffImagePlugin

from s3n_timm import S3N, Classifier, save
from s3n_timm.data import drawn_birds
from s3n_timm.evaluation import Crop, magnified_boxes
from s3n_timm.sampling import warp_grid

NAMES = ["robin", "wren", "jay", "crow"]
COUNT = 23
FAST = ("--shard-size", 5, "--batch-size", 3, "--workers", 0, "--cpu-threads", 1)


@pytest.fixture(scope="module")
def script():
    import predict

    return predict


@pytest.fixture
def predict(script, capsys):
    """Runs it in this process: its exit status, 1 where images cannot be read, and what it printed."""

    def call(*args, status=0):
        try:
            found = script.main([str(word) for word in (*args, *FAST)])
        except SystemExit as exit_:
            found = exit_.code
        printed = capsys.readouterr()
        text = printed.out + printed.err + (found if isinstance(found, str) else "")
        assert (1 if isinstance(found, str) else found) == status, text
        return text

    return call


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = S3N("test_resnet", len(NAMES)).eval()
    torch.nn.init.normal_(model.fusion.weight, std=20)
    folder = tmp_path_factory.mktemp("weights")
    save(model, folder, label_names=NAMES)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder in folders, one file of which is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, image in enumerate(drawn_birds("test", COUNT, 4, 100)["image"]):
        path = folder / f"{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.resize((100, 140) if i % 2 else (100, 80)).save(path)
    (folder / "1" / "07.png").write_bytes((folder / "1" / "07.png").read_bytes()[:500])
    (folder / "notes.txt").write_text("no image, and not named like one")
    return folder


def read(folder, kind="parquet"):
    reader = dict(
        parquet=datasets.Dataset.from_parquet, csv=datasets.Dataset.from_csv, jsonl=datasets.Dataset.from_json)
    cache = str(folder / "cache")
    return [row for path in sorted(folder.glob(f"shard-*.{kind}")) for row in reader[kind](str(path), cache_dir=cache)]


@pytest.fixture(scope="module")
def predictions(model_folder, photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions") / "out"
    text = run(command("predict.py", model_folder, photographs, "--output", folder, *FAST), ok=False)
    assert "1 images could not be read" in text
    assert "images/s" in text
    return folder


def test_rows_are_the_answers_of_the_model(model_folder, photographs, predictions):
    rows, classifier = read(predictions), Classifier.from_pretrained(model_folder)
    paths = sorted(str(path) for path in photographs.rglob("*.png"))
    assert [row["image"] for row in rows] == paths
    assert len(list(predictions.glob("shard-*"))) == 5
    for row in rows:
        if row["image"].endswith("1/07.png"):
            assert "cannot be read" in row.pop("error")
            assert row.pop("image")
            assert set(row.values()) == {None}
            continue
        expected = classifier(row["image"])
        assert row["error"] is None
        assert row["top5"] == [each["label"] for each in expected]
        assert row["top5_probability"] == pytest.approx([each["score"] for each in expected], abs=1e-5)
        assert (row["label"], row["probability"]) == (row["top5"][0], row["top5_probability"][0])
        p = np.array(row["top5_probability"])
        assert row["entropy"] == pytest.approx(float(-(p * np.log(p.clip(1e-30))).sum()), abs=1e-4)
        seen = classifier.model.explain(classifier.prepare(row["image"])[None])
        assert row["peaks"] == seen.sample.peaks.sum()
        if row["box_discriminative"] is not None:
            x0, y0, x1, y1 = row["box_discriminative"]
            width, height = Image.open(row["image"]).size
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
    assert any(row.get("box_discriminative") for row in rows)


def test_the_digest_holds_the_options(script):
    classifier = Classifier(S3N("test_resnet", num_classes=3, partition_warmup_epochs=2))
    digests = [script.digest_model(classifier)]
    for change in (lambda model: model.set_epoch(0), lambda model: model.configure(answer="mean"),
                   lambda model: model.configure(threshold=5.0)):
        change(classifier.model)
        digests.append(script.digest_model(classifier))
    assert len(set(digests)) == 4


def test_boxes_surround_what_is_magnified():
    """A bump in the upper left of the map, on an image that is squashed into the input."""
    x = torch.arange(31.0)
    q = 0.09 + torch.exp(-((x - 8).square()[:, None] + (x - 8).square()) / 8)[None]
    grid = warp_grid(q, (64, 64))
    (box,) = magnified_boxes(grid, torch.tensor([[200, 400]]), Crop((64, 64), 1.0, "squash"))
    center = ((box[0] + box[2]) / 2 / 400, (box[1] + box[3]) / 2 / 200)
    assert center == pytest.approx((8 / 30, 8 / 30), abs=0.08)
    assert 0.1 < (box[2] - box[0]) / 400 < 0.6
    assert (box[2] - box[0]) / 400 == pytest.approx(((box[3] - box[1]) / 200).item(), abs=0.01)
    flat = magnified_boxes(warp_grid(torch.ones(1, 31, 31), (64, 64)), torch.tensor([[200, 400]]), Crop((64, 64)))
    assert flat.isnan().all()


def test_mixed_precision_is_that_of_accelerate(model_folder, photographs, predictions, predict, tmp_path):
    words = (model_folder, photographs, "--output", tmp_path / "out")
    run(command("predict.py", *words, *FAST), ok=False, ACCELERATE_MIXED_PRECISION="bf16")
    rows = [[row for row in read(folder) if row["error"] is None] for folder in (predictions, tmp_path / "out")]
    exact, rounded = ([row["probability"] for row in each] for each in rows)
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.1)
    assert "mixed_precision bf16, not of no" in predict(*words, status=1)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_formats_agree(model_folder, photographs, predictions, predict, tmp_path, kind):
    predict(model_folder, photographs, "--output", tmp_path, "--format", kind, status=1)
    rows = read(tmp_path, kind)
    assert len(rows) == COUNT
    for ours, expected in zip(rows, read(predictions)):
        for name, value in expected.items():
            mine = ast.literal_eval(ours[name]) if kind == "csv" and isinstance(value, list) else ours[name]
            assert mine == (pytest.approx(value, abs=1e-6) if isinstance(value, (float, list)) and name != "top5"
                            else value), name


def test_two_processes_write_what_one_writes(model_folder, photographs, predictions, tmp_path):
    Forked("predict.py", model_folder, photographs, "--output", tmp_path, *FAST, processes=2).end(ok=False)
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == sorted(
        path.name for path in predictions.glob("shard-*"))
    for ours, expected in zip(read(tmp_path), read(predictions), strict=True):
        assert ours["probability"] == (None if expected["probability"] is None
                                       else pytest.approx(expected["probability"], abs=1e-5))
        for name in ("image", "label", "error"):
            assert ours[name] == expected[name]


def test_a_killed_run_goes_on_without_loss_or_repetition(model_folder, photographs, predictions, predict, tmp_path):
    words = (model_folder, photographs, "--output", tmp_path)
    started = Forked("predict.py", *words, *FAST)
    while not list(tmp_path.glob("shard-000001-*")):
        assert started.is_alive(), "it ended before it could be killed"
        time.sleep(0.005)
    started.kill()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    predict(*words, status=1)
    assert [row["image"] for row in read(tmp_path)] == [row["image"] for row in read(predictions)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "whole shards are not written again"
    assert "choose another folder" in predict(*words, "--split", "other", status=1)


def test_parquet_and_hub_sources(model_folder, photographs, predictions, predict, tmp_path):
    paths = sorted(photographs.rglob("*.png"))
    stored = [dict(bytes=path.read_bytes(), path=None) for path in paths]
    features = datasets.Features(picture=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict(dict(picture=stored), features=features)
    for path in ("data/test.parquet", "data [1]/test.PARQUET"):
        (tmp_path / path).parent.mkdir()
        rows.to_parquet(tmp_path / path)
    expected = read(predictions)
    sources = (tmp_path / "data" / "test.parquet", tmp_path / "data [1]" / "test.PARQUET", f"hub:{tmp_path / 'data'}")
    for source in sources:
        folder = tmp_path / f"out{len(str(source))}"
        predict(model_folder, source, "--image-column", "picture", "--output", folder, status=1)
        found = read(folder)
        assert [row["image"] for row in found] == [str(i) for i in range(COUNT)]
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        assert ["cannot be read" in (row["error"] or "") for row in found] == [bool(row["error"]) for row in expected]
        assert found[0]["box_discriminative"] == pytest.approx(expected[0]["box_discriminative"], abs=1e-3)


def test_plain_models_have_no_peaks(photographs, predict, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "plain", safe_serialization=True)
    predict(tmp_path / "plain", photographs / "0", "--output", tmp_path / "out")
    assert all(row["peaks"] is None and row["box_complementary"] is None and row["label"] in "012"
               for row in read(tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere", [], "is neither a folder nor"),
        ("EMPTY", [], "has no image"),
        ("hub:./photgraphs", [], "photgraphs is not a folder"),
        ("PHOTOGRAPHS", ["--output", "EMPTY/used"], "is not empty"),
        ("PHOTOGRAPHS", ["--output", "EMPTY/used/diary.txt"], "cannot be written"),
    ],
)
def test_bad_arguments_end_in_one_sentence(model_folder, photographs, predict, tmp_path, source, more, message):
    (tmp_path / "used").mkdir()
    source = dict(EMPTY=tmp_path, PHOTOGRAPHS=photographs).get(source, source)
    if more:
        (tmp_path / "used" / "diary.txt").write_text("mine")
    more = [word.replace("EMPTY", str(tmp_path)) for word in more] or ["--output", tmp_path / "out"]
    text = predict(model_folder, source, *more, status=1)
    assert message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--shard-size", "--batch-size", "--workers", "--cpu-threads", "--exit-entropy"])
def test_numbers_out_of_range_are_refused(script, flag, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["weights", "source", flag, "-1"])
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_bad_weights_end_in_one_sentence(photographs, predict, tmp_path):
    text = predict(tmp_path / "none", photographs, "--output", tmp_path / "out", status=1)
    assert str(tmp_path / "none") in text
    assert not (tmp_path / "out").exists()


# workers


def test_workers_that_do_not_fork(model_folder, photographs, predictions, script, tmp_path, monkeypatch):
    """test_interruption.py has training's, by spawn, the other way to start a process that shares no memory."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context",
                        multiprocessing.get_context("forkserver"))
    words = [model_folder, photographs, "--output", tmp_path, *FAST[:4], "--workers", 1, "--cpu-threads", 1]
    assert script.main(list(map(str, words))) == 1
    assert read(tmp_path) == read(predictions)


def test_workers_keep_the_order(model_folder, photographs, predictions, script, tmp_path):
    words = [model_folder, photographs, "--output", tmp_path, *FAST[:4], "--workers", 2, "--cpu-threads", 1]
    assert script.main(list(map(str, words))) == 1
    assert read(tmp_path) == read(predictions)


def test_a_shard_that_cannot_be_written_ends_the_run(model_folder, photographs, predict, script, tmp_path, monkeypatch):
    def fail(path, rows, format):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_shard", fail)
        assert "No space left" in predict(model_folder, photographs, "--output", tmp_path / "out", status=1)
    assert not list((tmp_path / "out").glob("shard-*"))
    assert not (tmp_path / "out" / ".lock").exists()
    predict(model_folder, photographs, "--output", tmp_path / "out", status=1)
    assert len(read(tmp_path / "out")) == COUNT


# files of every kind


def test_no_single_file_ends_the_run(model_folder, predict, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    image = drawn_birds("test", 1, 4, 100)["image"][0]
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, TiffImagePlugin.IFDRational(12347, 678)
    image.save(folder / "odd.jpg", exif=exif)
    content = (folder / "odd.jpg").read_bytes()
    for order in "<>":  # a resolution of -1/0, of which ImageOps.exif_transpose dies when it writes it anew
        content = content.replace(struct.pack(f"{order}II", 12347, 678), struct.pack(f"{order}iI", -1, 0))
    assert content != (folder / "odd.jpg").read_bytes()
    (folder / "odd.jpg").write_bytes(content)
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.new("L", (1, 5000)).save(folder / "line.png")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    (folder / "folder.png").mkdir()
    (folder / ".hidden.png").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    image.save(os.fsencode(folder) + b"/caf\xe9.png", format="png")
    predict(model_folder, folder, "--output", tmp_path / "out", status=1)
    rows = {os.path.basename(row["image"]): row["error"] for row in read(tmp_path / "out")}
    assert {name for name, error in rows.items() if error} == {"eps.png", "line.png", "huge.png"}
    assert {name for name, error in rows.items() if not error} == {"odd.jpg", "caf\\xe9.png"}


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError("exif")])
def test_whatever_a_reader_raises_is_a_row(script, error):
    import support.sources as sources

    class Stand:
        mode = "RGB"

        @staticmethod
        def transform(image):
            raise error

    item = sources.Item(0, "a.png", Image.new("RGB", (9, 9)))
    batch = sources.Reader(Stand).__getitems__([item])
    assert batch.images is None
    assert batch.errors == [str(error) or type(error).__name__]


def test_spreadsheets_execute_no_cell(predict, tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    save(model, tmp_path / "weights", label_names=["=1+1", "@SUM(A1)"])
    os.makedirs(tmp_path / "photographs")
    Image.new("RGB", (50, 40)).save(tmp_path / "photographs" / "a.png")
    (tmp_path / "photographs" / "b.png").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        os.rename("photographs", "-photographs")
        predict("weights", "./-photographs", "--output", "out", "--format", "csv", status=1)
    (row, bad) = read(tmp_path / "out", "csv")
    assert row["label"].startswith(("'=", "'@"))
    assert not any(str(value).startswith(("=", "@", "+", "-")) for each in (row, bad) for value in each.values())


# early exit


def test_early_exit(model_folder, photographs, predict, tmp_path):
    classifier = Classifier.from_pretrained(model_folder)
    paths = sorted(photographs.glob("0/*.png"))
    entropy = []
    for path in paths:
        logits = classifier.explain(path).logits.original
        entropy.append(torch.special.entr(logits.softmax(1)).sum().item())
    threshold = sum(sorted(entropy)[3:5]) / 2
    predict(model_folder, photographs / "0", "--output", tmp_path / "out", "--exit-entropy", threshold)
    rows = read(tmp_path / "out")
    assert [row["exited"] for row in rows] == [value < threshold for value in entropy]
    expected = Classifier.from_pretrained(model_folder, exit_entropy=threshold)(paths)
    assert [row["top5"] for row in rows] == [[each["label"] for each in answer] for answer in expected]
    assert [row["probability"] for row in rows] == pytest.approx([answer[0]["score"] for answer in expected], abs=1e-5)
    assert all(row["peaks"] is None for row in rows)
    assert "exit_entropy" in predict(model_folder, photographs / "0", "--output", tmp_path / "out", status=1)


# a changing world


@pytest.fixture
def growing(photographs, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    for path in sorted(photographs.glob("0/*.png"))[1:]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def add(folder, *names):
    for number, name in enumerate(names):
        drawn_birds("test", number + 1, 4, 80)["image"][number].save(folder / name)


def names_of(folder):
    return [os.path.basename(row["image"]) for row in read(folder)]


def test_images_added_later_are_refused_or_appended(model_folder, growing, predict, tmp_path):
    words = (model_folder, growing, "--output", tmp_path / "out")
    predict(*words)
    first = names_of(tmp_path / "out")
    add(growing, "000.png", "zzz.png")  # the first would shift all others
    text = predict(*words, status=1)
    assert "2 new images" in text
    assert "--append" in text
    assert names_of(tmp_path / "out") == first
    predict(*words, "--append")
    assert names_of(tmp_path / "out") == [*first, "000.png", "zzz.png"]
    predict(*words)
    assert names_of(tmp_path / "out") == [*first, "000.png", "zzz.png"], "nothing is done twice"
    add(growing, "111.png")
    predict(*words, "--append")
    assert names_of(tmp_path / "out") == [*first, "000.png", "zzz.png", "111.png"]
    (growing / "111.png").unlink()
    assert "lacks 1" in predict(*words, status=1)


def test_images_with_errors_are_read_again_when_asked(model_folder, growing, predict, tmp_path):
    whole, broken = growing / "000.png", growing / "broken.png"
    add(growing, whole.name)
    broken.write_bytes(b"")
    words = (model_folder, growing, "--output", tmp_path / "out")
    predict(*words, status=1)
    names, others = names_of(tmp_path / "out"), {path.name for path in (tmp_path / "out").glob("shard-*-0.parquet")}
    shutil.copy(whole, broken)
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in others}
    assert "--retry-errors" in predict(*words, status=1)
    predict(*words, "--retry-errors")
    assert names_of(tmp_path / "out") == names
    assert not any(row["error"] for row in read(tmp_path / "out"))
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in others} == written
    predict(model_folder, f"{growing}/", *words[2:])  # as shells complete it


def test_images_added_between_kill_and_resume(model_folder, growing, predict, tmp_path):
    words = (model_folder, growing, "--output", tmp_path / "out")
    predict(*words)
    first = names_of(tmp_path / "out")
    (last,) = (tmp_path / "out").glob("shard-000001-*")
    last.unlink()  # as a run that was killed leaves it
    add(growing, "000.png")
    predict(*words, status=1)
    predict(*words, "--append")
    assert names_of(tmp_path / "out") == [*first, "000.png"]


def test_another_model_in_the_same_folder_is_refused(growing, predict, tmp_path):
    words = (tmp_path / "weights", growing, "--output", tmp_path / "out")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    save(model, tmp_path / "weights", label_names=NAMES)
    predict(*words)
    before = read(tmp_path / "out")
    save(model, tmp_path / "weights", label_names=NAMES[::-1])
    assert "changed since" in predict(*words, status=1)
    torch.nn.init.normal_(model.get_classifier().weight)
    save(model, tmp_path / "weights", label_names=NAMES)
    assert "changed since" in predict(*words, "--append", status=1)
    assert read(tmp_path / "out") == before


class OtherProcess:
    """An accelerator of a process that listed the images after the main process did."""

    is_main_process, device, process_index, num_processes = False, torch.device("cpu"), 1, 2
    mixed_precision = "no"

    def __init__(self, main):
        self.main, self.waits = main, 0

    def wait_for_everyone(self):
        self.waits += 1
        if self.waits == 2:  # the main process has written
            self.main()


def test_all_processes_take_the_list_of_the_main_one(script, model_folder, growing, tmp_path):
    from accelerate import Accelerator

    args = script.parse_args([str(word) for word in (model_folder, growing, "--output", tmp_path / "out", *FAST)])
    classifier = Classifier.from_pretrained(args.weights)
    args.output.mkdir()
    listed = script.open_source(args)
    add(growing, "00.png")
    late = script.open_source(args)
    assert len(late.names) > len(listed.names)
    other = OtherProcess(lambda: script.claim(listed, classifier, args, Accelerator()))
    source, parts = script.claim(late, classifier, args, other)
    assert (source.names, parts) == (listed.names, [len(listed.names)])


def test_rows_that_changed_are_refused(model_folder, photographs, predict, tmp_path):
    def write(count):
        stored = [dict(bytes=path.read_bytes(), path=None) for path in sorted(photographs.glob("0/*.png"))[:count]]
        features = datasets.Features(image=datasets.Image(decode=False))
        datasets.Dataset.from_dict(dict(image=stored), features=features).to_parquet(tmp_path / "rows.parquet")
        os.utime(tmp_path / "rows.parquet", (count, count))

    words = (model_folder, tmp_path / "rows.parquet", "--output", tmp_path / "out")
    write(4)
    predict(*words)
    predict(*words)
    write(6)
    assert "changed since" in predict(*words, "--append", status=1)


def test_a_damaged_manifest_is_refused(model_folder, growing, predict, tmp_path):
    words = (model_folder, growing, "--output", tmp_path / "out")
    predict(*words)
    for text in ("{", "[]", json.dumps(dict(command=None)), "null"):
        (tmp_path / "out" / "predictions.json").write_text(text)
        assert "is damaged" in predict(*words, status=1)


def test_two_runs_at_once(model_folder, growing, predict, script, tmp_path):
    with script.claimed(tmp_path / "out"):
        assert "is being written by" in predict(model_folder, growing, "--output", tmp_path / "out", status=1)
