"""What a run sends to the Hub at its end, and what is asked before it begins."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from s3n_timm.hub import check_push, check_repo_id, push_folder

RESULTS = "results.json"


def hub_name(text: str) -> str:
    """A flag's USER/NAME."""
    try:
        return check_repo_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("hub")
    hub.add_argument("--push-to-hub", type=hub_name, metavar="USER/NAME",
                     help="push best/ to this repository at the end, with a card of what was measured")
    hub.add_argument("--push-backbone", type=hub_name, metavar="USER/NAME",
                     help="push backbone/, the plain timm model, likewise")
    hub.add_argument("--hub-private", action="store_true", help="make these repositories private")


def check_hub_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.push_backbone and (args.plain or "O" not in args.branches):
        parser.error("--push-backbone needs an S3N with the O branch: give --push-to-hub alone.")
    if args.push_backbone and args.push_backbone == args.push_to_hub:
        parser.error(f"--push-to-hub and --push-backbone both name {args.push_to_hub}: give each model its own.")
    if args.hub_private and not pushed(args):
        parser.error("--hub-private needs a repository: give --push-to-hub.")


def pushed(args: argparse.Namespace) -> dict[str, str]:
    """Repositories by the folder in --output that goes to them."""
    both = dict(best=args.push_to_hub, backbone=args.push_backbone)
    return {kind: repo_id for kind, repo_id in both.items() if repo_id}


def ask_hub(args: argparse.Namespace) -> None:
    """Refuse, before training, what the Hub would refuse at its end.

    Raises:
        ValueError, OSError: as `s3n_timm.hub.check_push`.
    """
    for repo_id in pushed(args).values():
        check_push(repo_id, private=args.hub_private)


def measured_path(output: Path, kind: str) -> Path:
    """Where the run's own evaluation of the weights in a folder lies."""
    return output / "evaluation" / kind / RESULTS


def publish(args: argparse.Namespace) -> None:
    """Push a finished run's folders; exit with the commands that push them again where that fails."""
    failed: list[str] = []
    script = Path(sys.argv[0])
    for kind, repo_id in pushed(args).items():
        files = dict(results=measured_path(args.output, kind), recipe=args.output / RESULTS)
        picture = args.output / "picture.png"
        if kind == "best" and picture.is_file():
            files["picture"] = picture
        options: dict[str, Any] = dict(files, private=args.hub_private)
        try:
            print(f"{kind}/ is on the Hub: {push_folder(args.output / kind, repo_id, **options)}")
        except (OSError, ValueError) as error:
            words = ["python", script.with_name("push.py"), args.output / kind, repo_id]
            for name, path in files.items():
                words += [f"--{name}", path]
            quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
            again = quote([*map(str, words), *(["--private"] if args.hub_private else [])])
            failed.append(f"{error} {args.output} has everything; push it again with: {again}")
    if failed:
        sys.exit("\n".join(f"{script.name}: {each}" for each in failed))
