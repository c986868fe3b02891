import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from s3n_timm import birds
from s3n_timm.datasets import cub, image_folder, load, part_names

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


@pytest.mark.parametrize(("reader", "fixture", "name"), [
    (cub, "cub_dir", "images/a/one.jpg"), (image_folder, "folder_dir", "train/b/1.jpg"),
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
    fails(ValueError, message, reader, root)


@pytest.mark.parametrize(("reader", "fixture"), [(cub, "cub_dir"), (image_folder, "folder_dir")])
def test_unknown_split(reader, fixture, request):
    root = request.getfixturevalue(fixture)
    fails(ValueError, "split must be 'train' or 'test', got 'val'.", reader, root, "val")


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
    message = f"{flat} has no folder test, val or validation; add one or read the split 'train'."
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


def test_load(cub_dir, tmp_path):
    assert load("cub", cub_dir, "test")["box"][:] == cub(cub_dir, "test")["box"][:]
    assert load("folder", cub_dir / "images")["label"][:] == [0, 0, 1]
    drawn = load("birds", split="test", num_images=3, num_classes=3, cache_dir=tmp_path / "cache")
    assert (len(drawn), str(drawn.split), part_names(drawn)) == (3, "test", birds.PARTS)


def test_load_faults(tmp_path):
    fails(ValueError, "name must be 'birds', 'cub' or 'folder', got 'cars'.", load, "cars")
    for name in ("cub", "folder"):
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
