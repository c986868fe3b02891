"""Draw what a trained model sees in images: `python examples/visualize.py output/s3n/best bird.jpg`."""

import argparse
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import s3n_timm  # noqa: F401  (registers the models)
from s3n_timm.draw import draw_explanation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="folder of s3n_timm.save")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("output/pictures"), help="folder for one PNG an image")
    args = parser.parse_args()
    model = timm.create_model(f"local-dir:{args.weights}", pretrained=True).eval()
    config = resolve_data_config(model=model)
    transform = create_transform(**config)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = transform(Image.open(path).convert("RGB"))
        figure = draw_explanation(model, image, config["mean"], config["std"], model.pretrained_cfg.get("label_names"))
        figure.savefig(args.output / f"{path.stem}.png", dpi=100)
        print(args.output / f"{path.stem}.png")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"visualize.py: {error}")
