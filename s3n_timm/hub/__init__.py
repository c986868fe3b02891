"""Models to and from folders and the Hugging Face Hub."""

from .card import (
    CITATION,
    OF_THE_MACHINE,
    PAPER,
    count_macs,
    count_parameters,
    model_card,
)
from .download import (
    CONFIG,
    download,
    one_sentence,
    verified_cfg,
)
from .saving import (
    PICTURES,
    load,
    push_to_hub,
    save,
)

__all__ = [
    "CITATION",
    "OF_THE_MACHINE",
    "PAPER",
    "count_macs",
    "count_parameters",
    "model_card",
    "CONFIG",
    "download",
    "one_sentence",
    "verified_cfg",
    "PICTURES",
    "load",
    "push_to_hub",
    "save",
]
