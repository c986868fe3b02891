"""Which columns of a Parquet file or of a data set of the Hub hold images and labels, as the user names them."""

import argparse
from typing import Any

COLUMNS = ("image_column", "label_column")


def add_columns(group: Any) -> None:
    """Flags of a parser or of a group of its arguments, for a script with --dataset."""
    for what in ("image", "label"):
        group.add_argument(f"--{what}-column", metavar="NAME",
                           help=f"parquet and hub: the column of {what}s, if not {what}")


def check_columns(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name in list_columns(args):
        if not str(args.dataset).startswith(("parquet", "hub:")):
            parser.error(f"--{name.replace('_', '-')} is for parquet and hub:NAME alone, not for {args.dataset}.")


def list_columns(args: argparse.Namespace) -> dict[str, str]:
    """Those that were given, as `s3n_timm.data.load` takes them."""
    return {name: getattr(args, name) for name in COLUMNS if getattr(args, name)}
