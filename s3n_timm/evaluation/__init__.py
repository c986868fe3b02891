"""What the paper measures besides accuracy, as functions, and the evaluation of a model on a whole split."""

from .confusions import draw_confusions
from .geometry import (
    CROP_MODES,
    Crop,
    grid_to_pixels,
    peak_pixels,
    pixels_to_grid,
    restore_boxes,
    transform_boxes,
    transform_points,
)
from .labels import (
    average_precision,
    label_tables,
    mean_average_precision,
    measure_labels,
    summarize_labels,
)
from .localisation import box_iou, largest_region_box, localisation_accuracy, localisation_maps
from .peaks import count_hits, hit_histogram, hit_rate, nearest_parts
from .records import (
    CALIBRATION,
    INTERVAL,
    OUTPUTS,
    UNITS,
    as_plain,
    carry_annotations,
    cross_calibrate,
    measure_batch,
    summarize,
)
from .statistics import (
    bootstrap_difference,
    bootstrap_interval,
    calibration_error,
    confused_pairs,
    fit_temperature,
    nll,
    per_class_accuracy,
)
from .tables import ResultTable, result_tables
from .warps import background_magnification, box_magnification, carry_back, invert_warp, magnification, magnified_boxes

__all__ = [
    "CALIBRATION",
    "CROP_MODES",
    "INTERVAL",
    "OUTPUTS",
    "UNITS",
    "as_plain",
    "average_precision",
    "background_magnification",
    "bootstrap_difference",
    "bootstrap_interval",
    "box_iou",
    "box_magnification",
    "calibration_error",
    "carry_annotations",
    "carry_back",
    "confused_pairs",
    "count_hits",
    "Crop",
    "cross_calibrate",
    "draw_confusions",
    "fit_temperature",
    "grid_to_pixels",
    "hit_histogram",
    "hit_rate",
    "invert_warp",
    "label_tables",
    "largest_region_box",
    "localisation_accuracy",
    "localisation_maps",
    "magnification",
    "magnified_boxes",
    "mean_average_precision",
    "measure_batch",
    "measure_labels",
    "nearest_parts",
    "nll",
    "peak_pixels",
    "per_class_accuracy",
    "pixels_to_grid",
    "restore_boxes",
    "result_tables",
    "ResultTable",
    "summarize",
    "summarize_labels",
    "transform_boxes",
    "transform_points",
]
