"""Push a folder of trained weights to the Hugging Face Hub, with a model card:
`python examples/push.py output/s3n/best USER/NAME --results output/s3n/best/evaluation-birds-test/results.json`.

The folder is one that train.py or s3n_timm.save wrote, of an S3N or a plain backbone; weights go as they are stored.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
from support.launching import accept_any_encoding, exiting_on
from support.publishing import hub_name

from s3n_timm.hub import check_push, push_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="S3N or plain timm model, such as output/s3n/best")
    parser.add_argument("repo_id", metavar="USER/NAME", type=hub_name, help="repository, made if need be")
    parser.add_argument("--private", action="store_true", help="make the repository private; one that exists must be")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if need be, instead of main")
    parser.add_argument("--commit-message", default="Add model")

    card = parser.add_argument_group("card", "what is left out, the card says is unknown")
    card.add_argument("--results", type=Path, metavar="FILE", help="results.json of evaluate.py")
    card.add_argument("--recipe", type=Path, metavar="FILE", help="results.json of train.py, for its arguments")
    card.add_argument("--picture", type=Path, metavar="FILE", help="of what the model sees, as visualize.py draws it")
    card.add_argument("--dataset", help="what it was trained on, in words, if not what the recipe says")
    card.add_argument("--licence", "--license", default="apache-2.0", help="of the weights, as the Hub names licences")
    card.add_argument("--limits", nargs="+", default=[], metavar="SENTENCE", help="what the model can't do")
    card.add_argument("--benchmark-task", metavar="ID",
                      help="task, in the eval.yaml of the data set of --results, whose leaderboard takes top-1 in %%")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        parser.error(f"FOLDER {args.folder} has no config.json: name a folder that train.py or s3n_timm.save wrote.")
    if args.benchmark_task and args.results is None:
        parser.error("--benchmark-task needs the results that go there: give --results.")
    if args.recipe is not None and args.recipe == args.results:
        parser.error(f"--results and --recipe both name {args.recipe}: one is of evaluate.py and one of train.py.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    options = {name: value for name, value in vars(args).items() if name not in ("folder", "repo_id")}
    with exiting_on(ValueError, OSError, ImportError):
        check_push(args.repo_id, private=args.private)
        print(f"{args.folder} is on the Hub: {push_folder(args.folder, args.repo_id, **options)}")


if __name__ == "__main__":
    main()
