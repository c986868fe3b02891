"""Models to and from folders and the Hugging Face Hub."""

from .benchmark import benchmark_file
from .card import CITATION, OF_THE_MACHINE, PAPER, count_macs, count_parameters, model_card
from .download import CONFIG, WEIGHTS, download, one_sentence, verified_cfg
from .push import check_push, check_repo_id, push_folder, push_to_hub
from .saving import PICTURES, load_model, save

__all__ = [
    "benchmark_file",
    "CITATION",
    "OF_THE_MACHINE",
    "PAPER",
    "count_macs",
    "count_parameters",
    "model_card",
    "CONFIG",
    "WEIGHTS",
    "download",
    "one_sentence",
    "verified_cfg",
    "check_push",
    "check_repo_id",
    "push_folder",
    "push_to_hub",
    "PICTURES",
    "load_model",
    "save",
]
