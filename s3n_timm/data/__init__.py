"""Readers of fine-grained data sets, and the drawn birds that come with the package."""

from ..extras import needs_extra

with needs_extra("train"):
    import datasets  # noqa: F401  (every reader needs it)

from .aircraft_cars import aircraft, cars
from .birds import (
    DIAGNOSTIC_PARTS,
    LOOKS,
    MAX_BIRD_CLASSES,
    MIN_SIZE,
    PARTS,
    Bird,
    class_looks,
    draw_bird,
    drawn_birds,
)
from .cub import cub
from .folder import image_folder
from .load import check_disjoint, has_validation, load
from .multi_label import multi_label_folder
from .schema import (
    OFFICIAL_COUNTS,
    SPLITS,
    check_counts,
    class_names,
    is_multi_label,
    part_names,
    read_stored,
    recognition_features,
    store_images,
)
from .tables import hub, load_repository, parquet

__all__ = [
    "DIAGNOSTIC_PARTS",
    "LOOKS",
    "MAX_BIRD_CLASSES",
    "MIN_SIZE",
    "OFFICIAL_COUNTS",
    "PARTS",
    "SPLITS",
    "Bird",
    "aircraft",
    "cars",
    "check_counts",
    "check_disjoint",
    "class_looks",
    "class_names",
    "cub",
    "draw_bird",
    "drawn_birds",
    "has_validation",
    "hub",
    "image_folder",
    "is_multi_label",
    "load",
    "load_repository",
    "multi_label_folder",
    "parquet",
    "part_names",
    "read_stored",
    "recognition_features",
    "store_images",
]
