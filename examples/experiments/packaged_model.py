"""Train the model that comes with the package, s3n_test_resnet, and write it to s3n_timm/weights:

    python examples/experiments/packaged_model.py

Its weights are stored as float16, which halves the file; its config.json states the command of train.py.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of train.py and support/

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import train
from support.files import replace_text

import s3n_timm
from s3n_timm.registry import PACKAGED


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Other flags go to train.py.")
    parser.add_argument("--folder", type=Path, default=PACKAGED, help="where the model goes (%(default)s)")
    args, flags = parser.parse_known_args(argv)
    flags = flags or ["--recipe", "birds_scratch", "--num-images", "3600"]
    with tempfile.TemporaryDirectory() as output:
        train.main([*flags, "--output", output])
        pack(Path(output) / "best", args.folder, flags)


def pack(trained: Path, folder: Path, flags: list[str]) -> None:
    """Write the model of the folder `trained` to `folder`, with the flags of train.py that made it."""
    model = s3n_timm.load_model(trained).half()
    s3n_timm.save(model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["command"] = shlex.join(["python", "examples/train.py", *flags])
    replace_text(path, json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
