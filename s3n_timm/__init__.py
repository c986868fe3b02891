"""S3N, Selective Sparse Sampling Networks (ICCV 2019), as timm models.

`import s3n_timm` registers them: `timm.create_model("s3n_resnet50", num_classes=200)`.
"""

from .attention import sampling_map
from .classifier import Classifier
from .config import S3NConfig
from .extract import extract_backbone
from .heads import NoResponseMap
from .hub import load_model, push_to_hub, save
from .loss import S3NLoss
from .model import S3N
from .original import load_original_checkpoint
from .outputs import Explanation, S3NLogits
from .peaks import find_peaks, partition_peaks
from .registry import VARIANTS
from .response import class_response_maps, gate_response, normalize_response, project_response
from .sampling import SelectiveSample, resample, selective_sample, warp_grid

__version__ = "0.1.0"

__all__ = [
    "S3N",
    "VARIANTS",
    "Classifier",
    "Explanation",
    "NoResponseMap",
    "S3NConfig",
    "S3NLogits",
    "S3NLoss",
    "SelectiveSample",
    "class_response_maps",
    "extract_backbone",
    "find_peaks",
    "gate_response",
    "load_model",
    "load_original_checkpoint",
    "normalize_response",
    "partition_peaks",
    "project_response",
    "push_to_hub",
    "resample",
    "sampling_map",
    "save",
    "selective_sample",
    "warp_grid",
]
