import io
import os
import pickle
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from s3n_timm.data import (
    aircraft,
    birds,
    cars,
    check_counts,
    check_disjoint,
    class_names,
    cub,
    has_validation,
    hub,
    image_folder,
    is_multi_label,
    load,
    multi_label_folder,
    parquet,
    part_names,
)
from s3n_timm.data.schema import check_all

CUB50 = Path(__file__).parents[2] / "shared" / "data" / "cub50"

# Ids and classes are not in order and have gaps. The second box sticks out of its image on all sides.
CUB_FILES = {
    "images.txt": "7 b/two words.jpg\n2 a/one.jpg\n3 a/three.jpg\n",
    "classes.txt": "5 B class\n1 A class\n",
    "image_class_labels.txt": "2 1\n3 1\n7 5\n",
    "train_test_split.txt": "2 1\n3 0\n7 1\n",
    "bounding_boxes.txt": "2 -3.5 -1.0 100.0 100.0\n3 4.0 5.0 6.5 7.0\n7 1.0 2.0 3.0 4.0\n",
    "parts/parts.txt": "1 beak\n2 left wing bar\n",
    "parts/part_locs.txt": (
        "2 1 1.5 2.5 1\n2 2 0.0 0.0 0\n3 1 0.0 0.0 0\n3 2 9.0 8.0 1\n7 1 5.0 6.0 1\n7 2 7.0 8.0 1\n"
    ),
}

# The second training box sticks out of its image on all sides but the left. The release folder wraps these in data/.
AIRCRAFT_FILES = {
    "variants.txt": "F/A-18\n737-200\n",
    "images_variant_train.txt": "0001 737-200\n",
    "images_variant_val.txt": "0002 F/A-18\n",
    "images_variant_test.txt": "0003 737-200\n",
    "images_box.txt": "0001 2 3 10 12\n0002 1 -4 41 100\n0003 1 1 40 30\n",
}
CARS = {
    "train": [("00001.jpg", 2, (2, 3, 10, 12)), ("00002.jpg", 1, (1, 0, 400, 300))],
    "test": [("00001.jpg", 1, (39, 29, 40, 30))],
}


def write_image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def cub_dir(tmp_path):
    for name, text in CUB_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("a/one.jpg", "a/three.jpg", "b/two words.jpg"):
        write_image(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def folder_dir(tmp_path):
    for name in ("train/b/1.jpg", "train/b/0.png", "train/a/2.jpg", "val/a/3.jpg", "val/b/4.jpg"):
        write_image(tmp_path / name)
    return tmp_path


@pytest.fixture
def aircraft_dir(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for name, text in AIRCRAFT_FILES.items():
        (root / name).write_text(text)
    for number in range(1, 4):
        write_image(root / "images" / f"000{number}.jpg")
    return root


def write_annotations(path, rows, omit=()):
    """Write a 1×N struct array of 1×1 matrices, as the official files hold."""
    from scipy.io import savemat

    fields = [f for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname") if f not in omit]
    table = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for index, (name, label, box) in enumerate(rows):
        values = dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), box), fname=name, **{"class": label})
        for field in fields:
            value = values[field]
            if not isinstance(value, str):
                value = np.array([[value]], np.uint16 if isinstance(value, int) else np.float64)
            table[0, index][field] = value
    savemat(path, {"annotations": table})


@pytest.fixture
def cars_dir(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    (tmp_path / "devkit").mkdir()
    names = np.empty((1, 2), object)
    names[0, :] = ["Ram C/V Cargo Van Minivan 2012", "Acura TL Sedan 2012"]
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": names})
    write_annotations(tmp_path / "devkit/cars_train_annos.mat", CARS["train"])
    write_annotations(tmp_path / "cars_test_annos_withlabels.mat", CARS["test"])
    for split, rows in CARS.items():
        for name, *_ in rows:
            write_image(tmp_path / f"cars_{split}" / name)
    return tmp_path


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, labels, first=0, images=None, columns=("image", "label"), **options):
    images = images or [{"bytes": png(first + index), "path": "same.png"} for index in range(len(labels))]
    table = pa.table({columns[0]: images, columns[1]: pa.array(labels, **options), "extra": [0.5] * len(labels)})
    pq.write_table(table, path)


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    return cache


@pytest.fixture
def parquet_dir(tmp_path, cache):
    tmp_path = tmp_path / "parquet"
    tmp_path.mkdir()
    write_parquet(tmp_path / "train-1.parquet", ["c"], 2)
    write_parquet(tmp_path / "train-0.parquet", ["b", "a"], 0)
    write_parquet(tmp_path / "test.parquet", ["c", "b"], 10)
    return tmp_path


def image_paths(dataset):
    return [image["path"] for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]]


def fails(error_type, message, reader, *args, **options):
    """Check that the reader fails with exactly this message, in which '…' stands for any text."""
    with pytest.raises(error_type, match=f"^{re.escape(message).replace('…', '.*')}$"):
        reader(*args, **options)


def test_cub_rows(cub_dir):
    train, test = cub(cub_dir), cub(cub_dir, "test")
    assert train.features == birds.recognition_features(["B class", "A class"], ["beak", "left wing bar"])
    assert (str(train.split), str(test.split)) == ("train", "test")
    assert (train["label"][:], test["label"][:]) == ([0, 1], [1])
    assert train["box"][:] == [[1, 2, 4, 6], [0, 0, 40, 30]]
    assert test["box"][:] == [[4, 5, 10.5, 12]]
    assert train["parts"][:] == [
        {"beak": [5, 6, 1], "left wing bar": [7, 8, 1]}, {"beak": [1.5, 2.5, 1], "left wing bar": [0, 0, 0]},
    ]
    paths = [image["path"] for image in train.cast_column("image", datasets.Image(decode=False))["image"]]
    assert paths == [str(cub_dir / "images" / name) for name in ("b/two words.jpg", "a/one.jpg")]
    assert train[0]["image"].size == (40, 30)


def test_cub_does_not_decode_until_read(cub_dir, monkeypatch):
    def load_pixels(self):
        raise AssertionError("pixels decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load_pixels)
    dataset = cub(cub_dir)
    with pytest.raises(AssertionError, match="pixels decoded"):
        dataset[0]


def test_part_names_survive_transformations(cub_dir, tmp_path):
    dataset = cub(cub_dir)
    names = ("beak", "left wing bar")
    assert part_names(dataset) == names
    assert part_names(dataset.select([1]).map(lambda row: {"one": 1})) == names
    dataset.save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    assert part_names(saved) == tuple(saved[0]["parts"]) == names


@pytest.mark.parametrize("name", CUB_FILES)
def test_cub_missing_index_file(cub_dir, name):
    (cub_dir / name).unlink()
    fails(FileNotFoundError, f"{cub_dir / name} does not exist; data_dir must be in the layout of CUB-200-2011.",
          cub, cub_dir)


def test_cub_missing_folder(tmp_path):
    missing = tmp_path / "none"
    fails(FileNotFoundError, f"{missing} is not a folder; data_dir must name the folder of the data set.", cub, missing)


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("images.txt", "2 a/one.jpg", "2", "line 2 is malformed: '2'; correct it."),
    ("images.txt", "2 a/one.jpg", "7 a/one.jpg", "line 2 repeats id 7; remove one of the two lines."),
    ("images.txt", "a/three.jpg", "a/one.jpg", "lists 'a/one.jpg' 2 times; names must be unique."),
    ("classes.txt", "A class", "B class", "lists 'B class' 2 times; names must be unique."),
    ("classes.txt", "5 B", "five B", "line 1 is malformed: 'five B class'; correct it."),
    ("image_class_labels.txt", "3 1\n", "", "has no line for image id 3; add it."),
    ("image_class_labels.txt", "3 1", "3 1\n\n", "line 3 is malformed: ''; correct it."),
    ("image_class_labels.txt", "3 1", "3 2",
     "gives image id 3 the class id 2, which is not in classes.txt; correct one of the two."),
    ("train_test_split.txt", "3 0\n", "", "has no line for image id 3; add it."),
    ("train_test_split.txt", "3 0", "3 2", "line 2 is malformed: '3 2'; correct it."),
    ("train_test_split.txt", "3 0", "3 0\n4 0",
     "has a line for image id 4, which no other index file lists; remove it."),
    ("bounding_boxes.txt", "7 1.0 2.0 3.0 4.0\n", "", "has no line for image id 7; add it."),
    ("bounding_boxes.txt", "7 1.0 2.0 3.0 4.0", "7 1.0 2.0 3.0",
     "line 3 is malformed: '7 1.0 2.0 3.0'; correct it."),
    ("bounding_boxes.txt", "7 1.0", "7 nan", "line 3 is malformed: '7 nan 2.0 3.0 4.0'; correct it."),
    ("bounding_boxes.txt", "7 1.0", "7 40.0",
     "gives image id 7 a box that is empty or outside the image; correct it."),
    ("bounding_boxes.txt", "3.0 4.0", "3.0 0.0",
     "gives image id 7 a box that is empty or outside the image; correct it."),
    ("parts/parts.txt", "2 left wing bar", "2 beak", "lists 'beak' 2 times; names must be unique."),
    ("parts/part_locs.txt", "3 2 9.0 8.0 1\n", "", "has no line for image id and part id (3, 2); add it."),
    ("parts/part_locs.txt", "3 2 9.0", "3 9 9.0", "has no line for image id and part id (3, 2); add it."),
    ("parts/part_locs.txt", "3 2 9.0 8.0 1", "3 2 9.0 8.0 1\n3 3 9.0 8.0 1",
     "has a line for image id and part id (3, 3), which no other index file lists; remove it."),
    ("parts/part_locs.txt", "3 2 9.0 8.0 1", "3 2 9.0 8.0 yes", "line 4 is malformed: '3 2 9.0 8.0 yes'; correct it."),
])
def test_cub_faulty_index_file(cub_dir, name, old, new, message):
    text = CUB_FILES[name]
    assert text.count(old) == 1
    (cub_dir / name).write_text(text.replace(old, new))
    separator = ", " if message.startswith("line") else " "
    fails(ValueError, f"{cub_dir / name}{separator}{message}", cub, cub_dir)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cub_empty_class(cub_dir, split):
    (cub_dir / "train_test_split.txt").write_text("2 1\n3 0\n7 0\n")
    message = f"{cub_dir} has an empty class: 'B class' has no training image; add one or remove the class."
    fails(ValueError, message, cub, cub_dir, split)


def test_cub_missing_image(cub_dir):
    path = cub_dir / "images" / "a" / "one.jpg"
    path.unlink()
    message = f"Image {path} does not exist; restore it or take it out of the index files."
    fails(FileNotFoundError, message, cub, cub_dir)


def test_checks_of_many_files_keep_their_order():
    count = 1000
    assert check_all(lambda file: file % 7, range(count), count, "counting") == [file % 7 for file in range(count)]


@pytest.mark.parametrize(("reader", "fixture", "name"), [
    (cub, "cub_dir", "images/a/one.jpg"), (image_folder, "folder_dir", "train/b/1.jpg"),
    (aircraft, "aircraft_dir", "images/0002.jpg"), (cars, "cars_dir", "cars_train/00001.jpg"),
])
def test_unreadable_image(reader, fixture, name, request):
    root = request.getfixturevalue(fixture)
    path = root / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert len(reader(root)) > 0  # the header is sound
    message = f"{path} cannot be read as an image (…); replace or remove it."
    fails(ValueError, message, reader, root, verify=True)
    path.write_text("not an image")
    if reader is image_folder:  # the others need the sizes
        assert str(path) in image_paths(reader(root, verify=None))
    fails(ValueError, f"{path} is not an image; replace or remove it.", reader, root)


@pytest.mark.parametrize(("reader", "fixture"), [
    (cub, "cub_dir"), (image_folder, "folder_dir"), (aircraft, "aircraft_dir"), (cars, "cars_dir"),
    (parquet, "parquet_dir"),
])
def test_unknown_split(reader, fixture, request):
    root = request.getfixturevalue(fixture)
    known = "'train', 'validation'" if reader in (image_folder, parquet) else "'train'"
    fails(ValueError, f"split must be {known} or 'test', got 'val'.", reader, root, "val")


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_image_folder_rows(folder_dir, name):
    (folder_dir / "val").rename(folder_dir / name)
    train, test = image_folder(folder_dir), image_folder(folder_dir, "test", verify=True)
    assert train.features == test.features == birds.recognition_features(["a", "b"])
    assert (train["label"][:], test["label"][:]) == ([0, 1, 1], [0, 1])
    paths = [image["path"] for image in train.cast_column("image", datasets.Image(decode=False))["image"]]
    assert paths == [str(folder_dir / "train" / path) for path in ("a/2.jpg", "b/0.png", "b/1.jpg")]
    assert train[0]["image"].size == (40, 30)
    assert part_names(train) == ()


def test_image_folder_without_splits(folder_dir):
    flat = folder_dir / "train"
    assert image_folder(flat)["label"][:] == [0, 1, 1]
    message = f"{flat} has no folder test, valid, val or validation; add one or read the split 'train'."
    fails(FileNotFoundError, message, image_folder, flat, "test")


def test_image_folder_faults(folder_dir):
    train, val = folder_dir / "train", folder_dir / "val"
    (train / "c").mkdir()
    fails(ValueError, f"{train / 'c'} is an empty class; add images or remove the folder.", image_folder, folder_dir)
    message = f"Class 'c' is not in both {train} and {val}; splits must have the same classes."
    fails(ValueError, message, image_folder, folder_dir, "test")
    (train / "c").rmdir()
    (val / "notes.txt").write_text("")
    message = f"{val / 'notes.txt'} is not a class folder; move it elsewhere."
    fails(ValueError, message, image_folder, folder_dir, "test")
    train.rename(folder_dir / "training")
    for split in ("train", "test"):
        message = f"{folder_dir} has a folder val but no folder train; add it."
        fails(FileNotFoundError, message, image_folder, folder_dir, split)


def test_image_folder_without_classes(tmp_path):
    message = f"{tmp_path} has no class folders; put the images of each class into a folder of its own."
    fails(ValueError, message, image_folder, tmp_path)
    missing = tmp_path / "none"
    message = f"{missing} is not a folder; data_dir must name the folder of the data set."
    fails(FileNotFoundError, message, image_folder, missing)


@pytest.mark.parametrize("name", ["valid", "val", "validation", "Valid"])
def test_image_folder_validation(folder_dir, name):
    (folder_dir / "val").rename(folder_dir / name)
    assert not has_validation("folder", folder_dir), "without a test part it is the test split"
    for index, path in enumerate(("test/a/5.jpg", "test/b/6.jpg")):
        write_image(folder_dir / path, (50 + index, 30))
    assert has_validation("folder", folder_dir)
    paths = {split: [Path(path).name for path in image_paths(load("folder", folder_dir, split))]
             for split in ("train", "validation", "test")}
    assert paths == dict(train=["2.jpg", "0.png", "1.jpg"], validation=["3.jpg", "4.jpg"], test=["5.jpg", "6.jpg"])


def test_image_folder_of_split_folders_in_capitals(folder_dir):
    (folder_dir / "train").rename(folder_dir / "Train")
    (folder_dir / "val").rename(folder_dir / "Test")
    assert image_folder(folder_dir).features["label"].names == ["a", "b"]
    assert image_folder(folder_dir, "test")["label"][:] == [0, 1]
    (folder_dir / "train").mkdir()
    message = f"{folder_dir} has Train and train; merge them or rename one."
    fails(ValueError, message, image_folder, folder_dir)


def test_image_folder_passes_over_what_is_no_image(folder_dir, caplog):
    expected = image_paths(image_folder(folder_dir))
    for name in ("train/.ipynb_checkpoints/1.jpg", "train/a/.hidden.jpg", "train/a/.cache/1.jpg"):
        write_image(folder_dir / name)
    for name in ("train/.DS_Store", "train/Thumbs.db", "train/a/Thumbs.db", "train/b/.DS_Store"):
        (folder_dir / name).write_text("")
    os.mkfifo(folder_dir / "train/b/pipe.jpg")
    (folder_dir / "train/b/labels.xml").write_text("")
    assert image_paths(image_folder(folder_dir, verify=True)) == expected
    assert len(caplog.messages) == 1
    assert "2 files" in caplog.messages[0]
    (folder_dir / "linked").mkdir()
    write_image(folder_dir / "linked/deep/7.jpe")
    (folder_dir / "train/b/more").symlink_to(folder_dir / "linked")
    assert image_paths(image_folder(folder_dir)) == [*expected, str(folder_dir / "train/b/more/deep/7.jpe")]


def test_names_that_are_not_utf_8_are_named(folder_dir):
    train = folder_dir / "train"
    for name in (b"/a/caf\xe9.jpg", b"/caf\xe9/1.jpg"):
        path = Path(os.fsdecode(os.fsencode(train) + name))
        write_image(path)
        message = f"{train}…caf\\xe9… has a name that is not UTF-8, which a data set cannot hold; rename it."
        fails(ValueError, message, image_folder, folder_dir)
        path.unlink()


def test_home_is_expanded(folder_dir, parquet_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(folder_dir))
    assert len(image_folder("~")) == 3
    monkeypatch.setenv("HOME", str(parquet_dir.parent))
    assert len(parquet("~/parquet")) == 3
    assert len(hub("~/parquet")) == 3


def test_boxes_are_those_of_the_turned_image(cub_dir):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(cub_dir / "images/a/one.jpg", exif=exif)
    assert cub(cub_dir)["box"][1] == [0, 0, 30, 40]


def test_postscript_is_refused(folder_dir):
    path = folder_dir / "train/a/2.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n")
    fails(ValueError, f"{path} is not an image; replace or remove it.", image_folder, folder_dir)


def test_aircraft_rows(aircraft_dir):
    train, test = aircraft(aircraft_dir.parent), aircraft(aircraft_dir, "test", verify=True)
    assert train.features == test.features
    assert train.features["label"].names == ["F/A-18", "737-200"]
    assert list(train.features) == ["image", "label", "box"]
    assert (str(train.split), str(test.split), part_names(train)) == ("train", "test", ())
    assert (train["label"][:], test["label"][:]) == ([1, 0], [1])
    assert train["box"][:] == [[1, 2, 10, 12], [0, 0, 40, 30]]
    assert test["box"][:] == [[0, 0, 40, 30]]
    assert image_paths(train) == [str(aircraft_dir / "images" / name) for name in ("0001.jpg", "0002.jpg")]
    assert train[0]["image"].size == (40, 30)


@pytest.mark.parametrize("name", AIRCRAFT_FILES)
def test_aircraft_missing_index_file(aircraft_dir, name):
    (aircraft_dir / name).unlink()
    fails(FileNotFoundError, f"{aircraft_dir / name} does not exist; data_dir must be in the layout of FGVC-Aircraft.",
          aircraft, aircraft_dir)


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("variants.txt", "737-200", "F/A-18", ", line 2 repeats id F/A-18; remove one of the two lines."),
    ("variants.txt", "737-200\n", "737-200\n\n", ", line 3 is malformed: ''; correct it."),
    ("images_variant_val.txt", "0002 F/A-18", "0002", ", line 1 is malformed: '0002'; correct it."),
    ("images_variant_val.txt", "F/A-18", "F 18",
     " gives image id 0002 the variant 'F 18', which is not in variants.txt; correct one of the two."),
    ("images_variant_test.txt", "0003", "0002", " lists image id 0002, as images_variant_val.txt does; remove one."),
    ("images_box.txt", "0003 1 1 40 30\n", "", " has no line for image id 0003; add it."),
    ("images_box.txt", "0003", "0003 1 1 9 9\n0004",
     " has a line for image id 0004, which no other index file lists; remove it."),
    ("images_box.txt", "40 30", "40 inf", ", line 3 is malformed: '0003 1 1 40 inf'; correct it."),
    ("images_box.txt", "0002 1", "0002 41",
     " gives image id 0002 a box that is empty or outside the image; correct it."),
])
def test_aircraft_faulty_index_file(aircraft_dir, name, old, new, message):
    text = AIRCRAFT_FILES[name]
    assert text.count(old) == 1
    (aircraft_dir / name).write_text(text.replace(old, new))
    fails(ValueError, f"{aircraft_dir / name}{message}", aircraft, aircraft_dir)


def test_aircraft_other_faults(aircraft_dir):
    (aircraft_dir / "images/0001.jpg").unlink()
    message = f"Image {aircraft_dir / 'images/0001.jpg'} does not exist; restore it or take it out of the index files."
    fails(FileNotFoundError, message, aircraft, aircraft_dir)
    (aircraft_dir / "images_variant_val.txt").write_text("0002 737-200\n")
    message = f"{aircraft_dir} has an empty class: 'F/A-18' has no training image; add one or remove the class."
    fails(ValueError, message, aircraft, aircraft_dir, "test")


@pytest.mark.parametrize("in_devkit", [False, True])
def test_cars_rows(cars_dir, in_devkit):
    name = "cars_test_annos_withlabels.mat"
    if in_devkit:
        (cars_dir / name).rename(cars_dir / "devkit" / name)
    train, test = cars(cars_dir), cars(cars_dir, "test", verify=True)
    assert train.features == test.features
    assert train.features["label"].names == ["Ram C/V Cargo Van Minivan 2012", "Acura TL Sedan 2012"]
    assert list(train.features) == ["image", "label", "box"]
    assert (train["label"][:], test["label"][:]) == ([1, 0], [0])
    assert train["box"][:] == [[1, 2, 10, 12], [0, 0, 40, 30]]
    assert test["box"][:] == [[38, 28, 40, 30]]
    assert image_paths(train) == [str(cars_dir / "cars_train" / name) for name in ("00001.jpg", "00002.jpg")]
    assert image_paths(test) == [str(cars_dir / "cars_test/00001.jpg")]


@pytest.mark.parametrize(("row", "message"), [
    (("00002.jpg", 3, (1, 1, 4, 4)), " gives 00002.jpg the class 3, not one of 1 to 2; correct it."),
    (("00002.jpg", 0, (1, 1, 4, 4)), " gives 00002.jpg the class 0, not one of 1 to 2; correct it."),
    (("00001.jpg", 1, (1, 1, 4, 4)), ", annotation 2 repeats 00001.jpg; remove one of the two."),
    (("00002.jpg", "one", (1, 1, 4, 4)), ", annotation 2 is malformed: …; correct it."),
    (("00002.jpg", 1, (1.0, np.nan, 4.0, 4.0)), ", annotation 2 is malformed: …; correct it."),
    (("00002.jpg", 1, (41, 1, 50, 4)), " gives 00002.jpg a box that is empty or outside the image; correct it."),
])
def test_cars_faulty_annotation(cars_dir, row, message):
    path = cars_dir / "devkit/cars_train_annos.mat"
    write_annotations(path, [CARS["train"][0], row])
    fails(ValueError, f"{path}{message}", cars, cars_dir)


def test_cars_faulty_files(cars_dir):
    train, test = cars_dir / "devkit/cars_train_annos.mat", cars_dir / "cars_test_annos_withlabels.mat"
    write_annotations(test, CARS["test"], omit=("class",))
    message = f"{test} has annotations without 'class'; use the file that has labels and boxes."
    fails(ValueError, message, cars, cars_dir, "test")
    test.unlink()
    message = f"{test.name} is neither in {cars_dir} nor in {train.parent}; put it into one of them."
    fails(FileNotFoundError, message, cars, cars_dir, "test")
    (cars_dir / "cars_train/00001.jpg").unlink()
    message = f"Image {cars_dir / 'cars_train/00001.jpg'} does not exist; restore it or take it out of the index files."
    fails(FileNotFoundError, message, cars, cars_dir)
    write_annotations(train, CARS["train"][:1])
    message = f"{cars_dir} has an empty class: 'Ram C/V Cargo Van Minivan 2012' has no training image; add one or …."
    fails(ValueError, message, cars, cars_dir)
    train.write_text("not a MATLAB file")
    fails(ValueError, f"{train} cannot be read as a MATLAB file (…); restore it.", cars, cars_dir)
    (train.parent / "cars_meta.mat").replace(train)
    message = f"{train.parent / 'cars_meta.mat'} does not exist; data_dir must be in the layout of Stanford Cars."
    fails(FileNotFoundError, message, cars, cars_dir)
    train.rename(train.parent / "cars_meta.mat")
    write_annotations(train.parent / "cars_meta.mat", CARS["train"])
    message = f"{train.parent / 'cars_meta.mat'} has no variable 'class_names'; restore the official file."
    fails(ValueError, message, cars, cars_dir)


def test_cars_without_scipy(cars_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    message = 'scipy is missing: pip install "s3n_timm[train]"'
    fails(ImportError, message, cars, cars_dir)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("name", "fixture"), [("cub", "cub_dir"), ("aircraft", "aircraft_dir"), ("cars", "cars_dir")])
def test_counts_warning(name, fixture, split, request, caplog):
    official = {"cub": (5994, 5794), "aircraft": (6667, 3333), "cars": (8144, 8041)}[name][split == "test"]
    dataset = load(name, request.getfixturevalue(fixture), split)
    assert [(record.name, record.levelname) for record in caplog.records] == [("s3n_timm.data", "WARNING")]
    message = f"{name}: the split {split!r} has {len(dataset)} images, the official one has {official}."
    assert caplog.messages == [message]
    check_counts(name, split, official)
    assert len(caplog.records) == 1


READERS = {
    "parquet": parquet,
    "hub": lambda folder, *args, **options: hub(str(folder), *args, **options),
    "stream": lambda folder, *args, **options: hub(str(folder), *args, streaming=True, **options),
}


def rows(dataset):
    return list(dataset)  # reads a stream to its end


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_parquet_rows(parquet_dir, reader):
    for _ in range(2):  # the second time from the cache
        train, test = reader(parquet_dir), reader(parquet_dir, "test")
        assert train.features == test.features == birds.recognition_features(["a", "b", "c"])
        assert (str(train.split), str(test.split)) == ("train", "test")
        assert [row["label"] for row in rows(train)] == [1, 0, 2]
        assert [row["label"] for row in rows(test)] == [2, 1]
        assert [row["image"].getpixel((0, 0))[0] for row in rows(train)] == [0, 1, 2]
        assert set(rows(train)[0]) == {"image", "label"}
    check_disjoint(train=train, test=test)
    write_parquet(parquet_dir / "train-1.parquet", ["d"], 2)
    assert reader(parquet_dir).features["label"].names == ["a", "b", "d"]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_parquet_columns(tmp_path, cache, reader):
    # The names of the columns are swapped on purpose; integers are sorted by value; images are bare bytes
    for name, labels in (("train", [10, 9]), ("test", [10])):
        images = [png(label) for label in labels]
        write_parquet(tmp_path / f"{name}.parquet", labels, images=images, columns=("label", "image"))
    train, test = (reader(tmp_path, s, image_column="label", label_column="image") for s in ("train", "test"))
    assert train.features == test.features == birds.recognition_features(["9", "10"])
    assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in rows(train)] == [(10, 1), (9, 0)]
    assert [row["label"] for row in rows(test)] == [1]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_parquet_class_labels(tmp_path, cache, reader):
    features = birds.recognition_features(["z", "y", "x"])
    for name, labels in (("train", [2, 0]), ("test", [1])):
        columns = {"image": [{"bytes": png(label), "path": None} for label in labels], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{name}.parquet")
    train, test = reader(tmp_path), reader(tmp_path, "test")
    assert train.features == test.features == features
    assert [row["label"] for row in rows(train)] + [row["label"] for row in rows(test)] == [2, 0, 1]
    columns["label"] = [-1]
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "test.parquet")
    message = f"{tmp_path}, split 'test', row 0 has the label -1, which is none of the 3 classes; correct it …."
    fails(ValueError, message, lambda: rows(reader(tmp_path, "test")))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("split", "value"), [("train", None), ("train", ""), ("test", "d")])
def test_parquet_unknown_label(parquet_dir, reader, split, value):
    write_parquet(parquet_dir / f"{split}.parquet", ["a", value], 20)
    row = 4 if split == "train" else 1  # train.parquet comes after train-1.parquet
    message = f"{parquet_dir}, split {split!r}, row {row} has the label {value!r}, which is none of the 3 classes; …."
    fails(ValueError, message, lambda: rows(reader(parquet_dir, split)))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_parquet_faulty_images(parquet_dir, reader):
    path, place = parquet_dir / "test.parquet", f"{parquet_dir}, split 'test', row 1"
    good = {"bytes": png(0), "path": None}
    for image in ({"bytes": None, "path": None}, None):
        write_parquet(path, ["a", "b"], images=[good, image])
        message = f"{place} has no image; add it or remove the row."
        fails(ValueError, message, lambda: rows(reader(parquet_dir, "test")))
    write_parquet(path, ["a", "b"], images=[good, {"bytes": b"not an image", "path": None}])
    message = f"{place} is not an image; replace or remove it."
    fails(ValueError, message, lambda: rows(reader(parquet_dir, "test")))
    missing = parquet_dir / "none.png"
    write_parquet(path, ["a", "b"], images=[good, {"bytes": None, "path": str(missing)}])
    message = f"Image {missing} does not exist; restore it or take it out of the index files."
    fails(FileNotFoundError, message, lambda: rows(reader(parquet_dir, "test")))


@pytest.mark.parametrize("name", ["parquet", "hub"])
def test_parquet_verify(parquet_dir, name):
    write_parquet(parquet_dir / "test.parquet", ["a"], images=[{"bytes": png(0)[:45], "path": None}])
    assert len(READERS[name](parquet_dir, "test")) == 1  # the header is sound
    message = f"{parquet_dir}, split 'test', row 0 cannot be read as an image (…); replace or remove it."
    fails(ValueError, message, READERS[name], parquet_dir, "test", verify=True)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_parquet_faulty_types(tmp_path, cache, reader):
    path = tmp_path / "train.parquet"
    write_parquet(path, [0.5])
    message = f"Column 'label' of {tmp_path} has the type …float64…; labels must be strings or integers."
    fails(ValueError, message, reader, tmp_path)
    message = f"Column 'extra' of {tmp_path} has the type …float64…; it must hold images."
    fails(ValueError, message, reader, tmp_path, image_column="extra")
    write_parquet(path, [None], type=pa.string())
    message = f"{tmp_path} has no labeled image in the split 'train'; add some."
    fails(ValueError, message, reader, tmp_path)


def test_parquet_faults(parquet_dir):
    for options in ({"image_column": "img"}, {"label_column": "img"}):
        path = parquet_dir / "train-0.parquet"
        message = f"{path} has no column 'img', only 'image', 'label', 'extra'; name one of them."
        fails(ValueError, message, parquet, parquet_dir, **options)
    message = f"{parquet_dir / 'train-1.parquet'} has labels of another type than {path}; write both with the same …."
    path = parquet_dir / "train-1.parquet"
    write_parquet(path, [1])
    fails(ValueError, message, parquet, parquet_dir)
    path.write_text("not a Parquet file")
    fails(ValueError, f"{path} cannot be read as a Parquet file (…); replace it.", parquet, parquet_dir)
    (parquet_dir / "test.parquet").unlink()
    path.unlink()
    fails(FileNotFoundError, f"{parquet_dir} has no files test*.parquet; add them.", parquet, parquet_dir, "test")
    (parquet_dir / "train-0.parquet").unlink()
    fails(FileNotFoundError, f"{parquet_dir} has no files train*.parquet; add them.", parquet, parquet_dir, "test")
    missing = parquet_dir / "none"
    message = f"{missing} is not a folder; data_dir must name the folder of the data set."
    fails(FileNotFoundError, message, parquet, missing)


@pytest.mark.parametrize("name", ["hub", "stream"])
def test_hub_faults(parquet_dir, name):
    reader = READERS[name]
    for options in ({"image_column": "img"}, {"label_column": "img"}):
        message = f"{parquet_dir} has no column 'img', only 'image', 'label', 'extra'; name one of them."
        fails(ValueError, message, reader, parquet_dir, **options)
    message = f"{parquet_dir} has no split 'validation', only 'train', 'test'; choose one of them."
    fails(ValueError, message, reader, parquet_dir, "validation")
    for path in parquet_dir.glob("train*"):
        path.unlink()
    message = f"{parquet_dir} has no split 'train' to take the classes of split 'test' from; add it."
    fails(ValueError, message, reader, parquet_dir, "test")
    message = "verify must be False for streaming, which reads images only as they are needed."
    fails(ValueError, message, hub, str(parquet_dir), streaming=True, verify=True)


def test_hub_stream_without_known_columns(monkeypatch):
    def examples():
        yield {"photo": {"bytes": png(5), "path": None}, "species": "b"}
        yield {"photo": {"bytes": png(6), "path": None}, "species": "a"}

    splits = {"train": datasets.IterableDataset.from_generator(examples)}
    assert splits["train"].features is None
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: splits)
    stream = hub("a/b", image_column="photo", label_column="species", streaming=True)
    assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in stream] == [(5, 1), (6, 0)]


def test_hub_stream_can_be_sent_to_workers(parquet_dir):
    stream = pickle.loads(pickle.dumps(hub(str(parquet_dir), streaming=True)))
    assert [row["label"] for row in stream] == [1, 0, 2]


def test_hub_config(tmp_path, cache):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.parquet\n"
        "- config_name: two\n  data_files: two.parquet\n---\n"
    )
    write_parquet(tmp_path / "one.parquet", ["a"])
    write_parquet(tmp_path / "two.parquet", ["b"])
    assert hub(str(tmp_path), config="two", cache_dir=cache / "own").features["label"].names == ["b"]
    assert (cache / "own").is_dir()


@pytest.mark.parametrize("name", ["hub", "stream"])
def test_hub_image_folder(folder_dir, cache, name):
    train, test = (READERS[name](folder_dir, split) for split in ("train", "validation"))
    assert train.features == birds.recognition_features(["a", "b"])
    assert [row["label"] for row in rows(train)] == [0, 1, 1]
    assert rows(test)[0]["image"].size == (40, 30)


@pytest.mark.parametrize("name", ["hub", "stream"])
def test_hub_folder_with_classes_called_as_splits(tmp_path, cache, name):
    for index, path in enumerate(("train/train/0.png", "train/test/1.png", "test/train/2.png", "test/test/3.png")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(png(index))
    for split, expected in (("train", {(0, 1), (1, 0)}), ("test", {(2, 1), (3, 0)})):
        part = rows(READERS[name](tmp_path, split))
        assert {(row["image"].getpixel((0, 0))[0], row["label"]) for row in part} == expected
        assert len(part) == 2


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_brackets_in_a_path_are_no_pattern(parquet_dir, reader):
    for path in parquet_dir.glob("train*"):
        path.rename(path.with_name(path.name.replace("-", "-[0-9]")))
    folder = parquet_dir.rename(parquet_dir.with_name("birds [2020]?"))
    assert sorted(row["label"] for row in rows(reader(folder))) == [0, 1, 2]
    assert [row["label"] for row in rows(reader(folder, "test"))] == [2, 1]


@pytest.mark.parametrize("name", ["hub", "stream"])
def test_brackets_in_the_path_of_an_image_folder(folder_dir, cache, name):
    folder = folder_dir / "birds [2020]"
    folder.mkdir()
    for part in ("train", "val"):
        (folder_dir / part).rename(folder / part)
    assert [row["label"] for row in rows(READERS[name](folder))] == [0, 1, 1]


def test_parquet_suffix_in_capitals_and_validation(parquet_dir):
    assert not has_validation("parquet", parquet_dir)
    (parquet_dir / "test.parquet").rename(parquet_dir / "test.PARQUET")
    write_parquet(parquet_dir / "validation-0.parquet", ["a"], 20)
    assert [row["label"] for row in parquet(parquet_dir, "test")] == [2, 1]
    assert [row["label"] for row in load("parquet", parquet_dir, "validation")] == [0]
    assert has_validation("parquet", parquet_dir)


@pytest.mark.parametrize("name", ["/nowhere/birds", "./birds", "photographs/of/birds", "~/birds", "../birds"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: pytest.fail("the Hub was asked"))
    message = f"{name} is not a folder, and names on the Hub have the form USER/NAME; correct it."
    fails(FileNotFoundError, message, hub, name)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_disjoint_bytes(parquet_dir, reader):
    train = reader(parquet_dir)
    write_parquet(parquet_dir / "test.parquet", ["c", "b", "a"], images=[
        {"bytes": png(value), "path": path} for value, path in ((30, "train.png"), (1, "b.png"), (2, None))
    ])
    message = "row 1 (b.png) of test has the same content as row 1 (same.png) of train; remove it from one of the two."
    fails(ValueError, message, check_disjoint, train=train, test=reader(parquet_dir, "test"))
    write_parquet(parquet_dir / "test.parquet", ["c"], images=[{"bytes": png(2), "path": None}])
    message = "row 0 of test has the same content as row 2 (same.png) of train; remove it from one of the two."
    fails(ValueError, message, check_disjoint, train=train, test=reader(parquet_dir, "test"))


def test_disjoint_paths(folder_dir, tmp_path, cache):
    train, test = folder_dir / "train", folder_dir / "val"
    for index, path in enumerate((*train.glob("*/*"), *test.glob("*/*"))):
        write_image(path, (40 + index, 30))
    check_disjoint(train=image_folder(folder_dir), test=image_folder(folder_dir, "test"))
    dataset = image_folder(folder_dir).train_test_split(1, seed=0)
    check_disjoint(**dataset)
    transformed = dataset["train"].with_transform(lambda batch: dict(image=[0] * len(batch["label"])))
    check_disjoint(train=transformed, test=dataset["test"])
    everything, held = image_folder(folder_dir), image_folder(folder_dir, "test")
    message = f"{train / 'b/0.png'} is in train and in test; remove it from one of the two splits."
    fails(ValueError, message, check_disjoint, train=everything, test=everything.select([1, 0]))
    message = f"{test / 'a/3.jpg'} is in validation and in test; remove it from one of the two splits."
    fails(ValueError, message, check_disjoint, train=everything, validation=held, test=held)
    # The same content in another folder, or within a Parquet file
    (test / "a/3.jpg").write_bytes((train / "b/1.jpg").read_bytes())
    message = f"{test / 'a/3.jpg'} of test has the same content as {train / 'b/1.jpg'} of train; remove it …."
    fails(ValueError, message, check_disjoint, train=everything, test=held)
    other = tmp_path / "other"
    other.mkdir()
    write_parquet(other / "train.parquet", ["a"], images=[{"bytes": (train / "a/2.jpg").read_bytes(), "path": None}])
    message = f"row 0 of test has the same content as {train / 'a/2.jpg'} of train; remove it from one of the two."
    fails(ValueError, message, check_disjoint, train=everything, test=parquet(other))


def test_disjoint_missing_file(folder_dir):
    train, test = image_folder(folder_dir), image_folder(folder_dir, "test")
    path = folder_dir / "val/a/3.jpg"
    path.unlink()
    message = f"Image {path} is not a local file and cannot be compared; restore or download it."
    fails(FileNotFoundError, message, check_disjoint, train=train, test=test)


def test_disjoint_hashes_only_equal_sizes(parquet_dir, monkeypatch):
    def sha256(content):
        raise AssertionError("hashed")

    images = [{"bytes": png(0) + bytes(1000), "path": None}]
    write_parquet(parquet_dir / "test.parquet", ["a"], images=images)
    monkeypatch.setattr("hashlib.sha256", sha256)
    check_disjoint(train=parquet(parquet_dir), test=parquet(parquet_dir, "test"))


def test_load(cub_dir, tmp_path):
    assert load("cub", cub_dir, "test")["box"][:] == cub(cub_dir, "test")["box"][:]
    assert load("folder", cub_dir / "images")["label"][:] == [0, 0, 1]
    drawn = load("birds", split="test", num_images=3, num_classes=3, cache_dir=tmp_path / "cache")
    assert (len(drawn), str(drawn.split), part_names(drawn)) == (3, "test", birds.PARTS)


def test_load_others(aircraft_dir, cars_dir, parquet_dir):
    assert load("aircraft", aircraft_dir, "test", verify=True)["label"][:] == [1]
    assert load("cars", cars_dir)["label"][:] == [1, 0]
    assert load("parquet", parquet_dir, "test")["label"][:] == [2, 1]
    assert load(f"hub:{parquet_dir}", split="test", verify=True)["label"][:] == [2, 1]
    assert [row["label"] for row in load(f"hub:{parquet_dir}", streaming=True)] == [1, 0, 2]


def test_load_faults(tmp_path):
    for name in ("dogs", "hub", "hub:", "cub:"):
        message = (
            f"name must be 'birds', 'cub', 'aircraft', 'cars', 'folder', 'multi-label', 'parquet' or 'hub:NAME', "
            f"got {name!r}."
        )
        fails(ValueError, message, load, name)
    message = f"data_dir must be left out for 'hub:a/b', which names its own source, got {str(tmp_path)!r}."
    fails(ValueError, message, load, "hub:a/b", tmp_path)
    for name in ("cub", "aircraft", "cars", "folder", "parquet"):
        fails(ValueError, f"data_dir must name the folder of the data set for {name!r}.", load, name)
    message = f"data_dir must be left out for 'birds', which are drawn, got {str(tmp_path)!r}."
    fails(ValueError, message, load, "birds", tmp_path)


@pytest.mark.skipif(not CUB50.is_dir(), reason="the CUB-200-2011 subset cub50 is not beside the repository")
@pytest.mark.parametrize(("split", "num_images"), [("train", 1500), ("test", 1389)])
def test_cub50(split, num_images):
    dataset = cub(CUB50, split)
    assert len(dataset) == num_images
    assert dataset.features["label"].num_classes == 50
    assert set(dataset["label"]) == set(range(50))
    assert len(part_names(dataset)) == 15
    paths = [image["path"] for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]]
    sizes = np.array([Image.open(path).size for path in paths])
    boxes = np.array(dataset["box"][:])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] <= sizes).all()
    assert dataset[0]["image"].size == tuple(sizes[0])


# several labels an image


def write_metadata(folder, text, *images):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.csv").write_text(text, encoding="utf-8")
    for i, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (i, 0, 0)).save(folder / name)


def test_multi_label_folder_reads_the_names_between_bars(tmp_path, caplog):
    write_metadata(tmp_path / "train", "\ufeffnote,file_name,labels\nx,b.png,wren | owl\n,sub/a.png,\n,c.png,kite\n",
                   "b.png", "sub/a.png", "c.png")
    write_metadata(tmp_path / "val", "file_name,labels\nv.png,owl\n", "v.png")
    write_metadata(tmp_path / "test", 'file_name,labels\nt.png,"owl|kite"\n', "t.png")
    train = load("multi-label", tmp_path, "train", verify=True)
    assert class_names(train) == ["kite", "owl", "wren"]
    assert is_multi_label(train)
    assert train["label"][:] == [[2, 1], [], [0]]
    assert [image.size for image in train["image"][:]] == [(8, 6)] * 3
    assert has_validation("multi-label", tmp_path)
    for split, labels in (("validation", [[1]]), ("test", [[1, 0]])):
        part = load("multi-label", tmp_path, split)
        assert part["label"][:] == labels
        assert part.features == train.features
    assert "passed over" not in caplog.text, "metadata.csv has been read"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,owl,wren\na.png,1,0\n", "must have one column labels"),
        ("image,labels\na.png,owl\n", "must have one column file_name"),
        ("file_name,labels,labels\na.png,owl,wren\n", "must have one column labels"),
        ("", "must have one column file_name"),
        ("file_name,labels\n", "names no image"),
        ("file_name,labels\na.png,\n", "has no label"),
        ("file_name,labels\na.png,owl;wren\n", "be separated by"),
        ('file_name,labels\na.png,"owl,wren"\n', "be separated by"),
        ("file_name,labels\na.png,['owl']\n", "be separated by"),
        ("file_name,labels\na.png,owl||wren\n", "be separated by"),
        ("file_name,labels\na.png,owl|owl\n", "names must differ"),
        ("file_name,labels\na.png,owl,wren\n", "line 2 has another number of columns"),
        ("file_name,labels\na.png\n", "line 2 has another number of columns"),
        ("file_name,labels\n../a.png,owl\n", "no path inside of this folder"),
        ("file_name,labels\n,owl\n", "no path inside of this folder"),
        ("file_name,labels\na.png,owl\na.png,wren\n", "line 3 names a.png again"),
        ("file_name,labels\nb.png,owl\n", "b.png does not exist"),
        ("file_name,labels\na.png,owl\n", "more.png has no row in metadata.csv"),
        ('file_name,labels\na.png,"owl\n', "cannot be read"),
    ],
)
def test_multi_label_folder_refuses_other_forms(tmp_path, text, said):
    write_metadata(tmp_path, text, "a.png", "more.png")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        multi_label_folder(tmp_path)


def test_multi_label_folder_refuses_a_class_that_is_not_trained(tmp_path):
    write_metadata(tmp_path / "train", "file_name,labels\na.png,owl\n", "a.png")
    write_metadata(tmp_path / "test", "file_name,labels\na.png,kite\n", "a.png")
    with pytest.raises(ValueError, match="'kite', which no training image has"):
        multi_label_folder(tmp_path, "test")
    (tmp_path / "test" / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata.csv does not exist"):
        multi_label_folder(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="no folder for the split 'validation'"):
        multi_label_folder(tmp_path, "validation")
