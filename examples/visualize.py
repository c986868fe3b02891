"""Draw what a trained model sees in images: `python examples/visualize.py bird.jpg --weights output/s3n/best`.

One picture per image, or with --sheet many images on one. Several --weights give a strip, which shows how the attention
to an image changes from one to the next (figure 4 of the paper). Every checkpoint of train.py holds the weights of its
epoch, and loads once the run's config.json lies beside them:

    accelerate launch examples/train.py --checkpoint-hist 60
    for folder in output/s3n/checkpoints/update-*; do cp output/s3n/last/config.json $folder; done
    python examples/visualize.py bird.jpg --weights $(ls -dv output/s3n/checkpoints/update-*)

Keeping checkpoints does not change the training; each takes about twice the space of the weights.
"""

import argparse
import sys
import unicodedata
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
from matplotlib.figure import Figure
from support.files import replacing_file
from support.launching import accept_any_encoding, exiting_on
from torch import Tensor

from s3n_timm.classifier import Classifier
from s3n_timm.draw import draw_contact_sheet, draw_epochs, draw_explanation
from s3n_timm.images import expand_path, printable
from s3n_timm.images import find_images as find_image_files

PER_SHEET = 40  # images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER",
                        help="folders are searched with all folders below; one named like a class labels its images")
    parser.add_argument("--weights", nargs="+", required=True, metavar="FOLDER_OR_HUB",
                        help="folder of s3n_timm.save, or hf-hub:USER/NAME; several for a strip, in order")
    parser.add_argument("--sheet", action="store_true", help=f"draw up to {PER_SHEET} images on one picture")
    parser.add_argument("--max-images", type=int, metavar="N", help="draw the first N only")
    parser.add_argument("--output", type=Path, default=Path("output/pictures"), help="folder (%(default)s)")
    parser.add_argument("--format", choices=("png", "pdf"), default="png", help="of the pictures (%(default)s)")
    args = parser.parse_args(argv)
    if args.max_images is not None and args.max_images < 1:
        parser.error(f"--max-images must be positive, got {args.max_images}.")
    return args


def find_images(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Image files, each with its path below the folder that it was found in."""
    found = []
    for path in map(expand_path, paths):
        if path.is_dir():
            if output.resolve() == path.resolve():
                raise ValueError(f"--output {output} would mix pictures with the images: choose another folder.")
            own = path.resolve() in output.resolve().parents  # pictures of an earlier run are no images to draw
            files = [file for file in find_image_files(path)
                     if not (own and output.resolve() in file.resolve().parents)]
            if not files:
                raise ValueError(f"{path} holds no image: no file in it has the suffix of one.")
            found += [(file, file.relative_to(path)) for file in files]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise ValueError(f"{path} does not exist: name an image or a folder of images.")
    return found


def name_epochs(weights: Sequence[str]) -> list[str]:
    """The parts of the paths in which several weights differ."""
    parts = [Path(name).parts for name in weights]
    if len(set(map(len, parts))) > 1:
        return list(weights)
    differ = [len(set(column)) > 1 for column in zip(*parts)]
    return ["/".join(compress(part, differ)) or name for part, name in zip(parts, weights)]


def load(weights: Sequence[str]) -> list[Classifier]:
    classifiers = [Classifier.from_pretrained(name) for name in weights]
    for name, classifier in zip(weights, classifiers):
        for what in ("label_names", "data_config"):
            if getattr(classifier, what) != getattr(classifiers[0], what):
                raise ValueError(f"--weights {weights[0]} and {name} differ in their {what}: draw them one by one.")
    return classifiers


def draw(
        classifiers: Sequence[Classifier],
        epochs: Sequence[str],
        images: Sequence[Tensor],
        names: Sequence[Path],
        labels: Sequence[int | None],
        sheet: bool,
) -> Figure:
    first = classifiers[0]
    mean, std, label_names = first.data_config["mean"], first.data_config["std"], first.label_names
    titles = [printable(name) for name in names]
    if len(classifiers) > 1:
        models = [classifier.model for classifier in classifiers]
        return draw_epochs(models, epochs, images, mean, std, label_names, labels, titles)
    if sheet:
        return draw_contact_sheet(first.model, images, mean, std, label_names, labels, titles)
    return draw_explanation(first.model, images[0], mean, std, label_names)


def fold(path: Path) -> str:
    """One text for all names that may be one file: on many disks upper and lower case are the same."""
    return unicodedata.normalize("NFC", str(path.resolve())).casefold()


def choose_path(output: Path, name: Path, suffix: str, taken: set[str]) -> Path:
    """Where a picture goes: under a number where an image, or a picture of this run, has its name."""
    path, number = output / name.with_suffix(f".{suffix}"), 2
    while fold(path) in taken:
        path, number = (output / name).with_name(f"{name.stem}-{number}.{suffix}"), number + 1
    taken.add(fold(path))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    found = find_images(args.images, args.output)
    drawn = found[:args.max_images]
    if len(drawn) < len(found):
        print(f"Drawing {len(drawn)} of {len(found)} images: --max-images.")
    classifiers = load(args.weights)
    label_names = classifiers[0].label_names
    per_picture = PER_SHEET if args.sheet else 1
    together = Path("strip" if len(classifiers) > 1 else "sheet")
    taken = {fold(file) for file, _ in found}
    unread = 0
    for start in range(0, len(drawn), per_picture):
        images, names, labels = [], [], []
        for file, name in drawn[start:start + per_picture]:
            try:
                images.append(classifiers[0].prepare(file))
            except Exception as error:  # whatever is wrong with a file, the others are drawn
                print(f"visualize.py: {file}: {error}", file=sys.stderr)
                unread += 1
                continue
            folder = file.resolve().parent.name
            names.append(name)
            labels.append(label_names.index(folder) if folder in label_names else None)
        if not images:
            continue
        figure = draw(classifiers, name_epochs(args.weights), images, names, labels, args.sheet)
        path = choose_path(args.output, together if args.sheet else names[0], args.format, taken)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as partial:
            figure.savefig(partial, dpi=100)
        print(path)
    if unread:
        raise ValueError(f"{unread} of {len(drawn)} images could not be read; the others are drawn.")


if __name__ == "__main__":
    with exiting_on(ValueError, OSError):
        main()
