"""Labels for images of any kind, with a model's own preprocessing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from .checkpoints import label_names
from .hub import load_model
from .images import ImageLike, read_image


class Classifier:
    """A trained model that names what images show.

    Example:
        >>> from s3n_timm import S3N
        >>> classifier = Classifier(S3N("test_resnet", num_classes=3))
        >>> answers = classifier(Image.new("RGB", (120, 80)), top_k=2)
        >>> len(answers), sorted(answers[0])
        (2, ['label', 'score'])

    Args:
        model: an S3N, or any timm model with a classifier. It is put into eval mode.
        device: where it runs; where it is by default.
        batch_size: images that it reads at one time.

    Attributes:
        model: the model.
        data_config: its preprocessing, as timm describes it.
        transform: that preprocessing, of a PIL image in RGB.
        label_names: a name for each class; its number where the model knows none.

    Raises:
        ValueError: the model has no classifier, or `batch_size` is not positive.
    """

    def __init__(self, model: nn.Module, *, device: str | torch.device | None = None, batch_size: int = 16) -> None:
        if not getattr(model, "num_classes", 0):
            raise ValueError("model has no classifier: give it num_classes, and weights that were trained for them.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = model.eval() if device is None else model.eval().to(device)
        self.batch_size = batch_size
        self.data_config: dict[str, Any] = resolve_data_config({}, model=model)
        self.transform = create_transform(**self.data_config)
        self.label_names = label_names(model)

    @classmethod
    def from_pretrained(
            cls,
            name: str | Path,
            *,
            device: str | torch.device | None = None,
            batch_size: int = 16,
    ) -> "Classifier":
        """Load a model by its folder or name, as `s3n_timm.load_model` does.

        Raises:
            ValueError: there is no such model, or it cannot be loaded; the message says why.
        """
        return cls(load_model(name), device=device, batch_size=batch_size)

    def __call__(self, images: Any, top_k: int = 5) -> list[Any]:
        """Name what images show.

        Args:
            images: one image (see `prepare`), or a list, a tuple or a B×3×H×W tensor of them.
            top_k: how many labels; all of them where the model has fewer.

        Returns:
            A list of dicts with `label` and `score`, a probability, the largest first; of several images a list of such
            lists, in order.

        Raises:
            TypeError: something is no image.
            ValueError: an image cannot be read; the message says which.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        several = isinstance(images, (list, tuple)) or (isinstance(images, Tensor) and images.ndim == 4)
        rows = []
        for probabilities in self.probabilities(images if several else [images]):
            best = probabilities.topk(min(top_k, len(probabilities)))
            rows.append([dict(label=self.label_names[index], score=score)
                         for score, index in zip(best.values.tolist(), best.indices.tolist())])
        return rows if several else rows[0]

    @torch.inference_mode()
    def probabilities(self, images: Sequence[ImageLike] | Tensor) -> Tensor:
        """B×C probabilities of a sequence of images, on the CPU; the errors are those of a call."""
        device = next(self.model.parameters()).device
        parts = [torch.empty(0, len(self.label_names))]
        for start in range(0, len(images), self.batch_size):
            batch = []
            for place in range(start, min(start + self.batch_size, len(images))):
                try:
                    batch.append(self.prepare(images[place]))
                except (TypeError, ValueError) as error:
                    where = f" {place}" if len(images) > 1 else ""
                    raise type(error)(f"image{where}: {error}") from error
            parts.append(self.model(torch.stack(batch).to(device)).float().softmax(1).cpu())
        return torch.cat(parts)

    def prepare(self, image: ImageLike) -> Tensor:
        """Bring an image to what the model reads.

        Args:
            image: a path; the bytes of an image file; a PIL image of any mode, of whose frames the first counts; an
                H×W, H×W×3 or H×W×4 array; or a 1×H×W or 3×H×W tensor. Arrays and tensors hold bytes, or floats in
                [0, 1]. Images are turned as their EXIF says, transparency lies on white, 16 bits are scaled to 8.

        Returns:
            C×H×W, normalised, on the CPU.

        Raises:
            TypeError: it is none of these.
            ValueError: it cannot be read, is empty, too large, more than 20 times as long as it is wide, or has values
                that are no brightness.
        """
        return self.transform(read_image(image))
