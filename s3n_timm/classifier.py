"""Labels for images of any kind, with a model's own preprocessing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import create_transform
from torch import Tensor, nn

from .checkpoints import is_multi_label_model, label_names
from .early_exit import answer_batch
from .hub import load_model
from .images import ImageLike, image_mode, input_config, read_image
from .model import S3N
from .outputs import Explanation, score_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Classifier:
    """A trained model that names what images show.

    Example:
        >>> import numpy as np
        >>> from s3n_timm.data.birds import draw_bird  # needs the extra "train"
        >>> classifier = Classifier("s3n_test_resnet")  # comes with the package, and knows drawn birds
        >>> bird = draw_bird(np.random.default_rng(0), label=5, num_classes=8)
        >>> classifier(bird.image)[0]["label"] == classifier.label_names[5]
        True

    Args:
        model: an S3N, or any timm model with a classifier, of 1 or 3 input channels, or what `s3n_timm.load_model`
            takes: a folder, a name on the Hub or one of timm's. It is put into eval mode. Images are brought to its
            device and precision.
        device: where it runs; where it is by default.
        batch_size: images that it reads at one time.
        exit_entropy: early exit: images whose O branch has less entropy than so many nats are answered by that branch
            alone. 0 asks all branches about every image. By default it is what the model's config.json states, and 0
            where that states nothing.

    Attributes:
        model: the model.
        exit_entropy: the threshold in force, in nats.
        mode: of the PIL images that it reads, 'RGB' or 'L'.
        data_config: its preprocessing, as timm describes it.
        transform: that preprocessing, of a PIL image of that mode.
        label_names: a name for each class; its number where the model knows none.
        multi_label: the model was trained for any number of labels an image, and gives each a probability of its own.

    Raises:
        ValueError: the model can't be loaded, has no classifier, or neither 1 nor 3 input channels; `batch_size` is
            not positive; or `exit_entropy` is negative or no number, or asked of a model that is no S3N with the O
            branch and one label an image.
    """

    def __init__(
            self,
            model: nn.Module | str | Path,
            *,
            device: str | torch.device | None = None,
            batch_size: int = 16,
            exit_entropy: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            model = load_model(model)
        if not getattr(model, "num_classes", 0):
            raise ValueError("model has no classifier: give it num_classes, and weights that were trained for them.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.data_config = input_config(model)
        self.mode = image_mode(self.data_config["input_size"][0])
        self.exit_entropy = _exit_entropy(model, exit_entropy)
        self.model = model.eval() if device is None else model.eval().to(device)
        self.batch_size = batch_size
        self.transform = create_transform(**self.data_config)
        self.label_names = label_names(model)
        self.multi_label = is_multi_label_model(model)

    @classmethod
    def from_pretrained(
            cls,
            name: str | Path,
            *,
            device: str | torch.device | None = None,
            batch_size: int = 16,
            exit_entropy: float | None = None,
    ) -> "Classifier":
        """The same with a folder or name alone, as libraries of Hugging Face call it."""
        return cls(name, device=device, batch_size=batch_size, exit_entropy=exit_entropy)

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
        """B×C probabilities of a sequence of images, in float32 on the CPU; the errors are those of a call."""
        if isinstance(images, (str, bytes)):  # whose letters would be taken for images
            raise TypeError("images must be a sequence of images, got one: call the classifier for it.")
        parts = [torch.empty(0, len(self.label_names), dtype=torch.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = []
            for place in range(start, min(start + self.batch_size, len(images))):
                try:
                    batch.append(self.prepare(images[place]))
                except (TypeError, ValueError) as error:
                    where = f" {place}" if len(images) > 1 else ""
                    raise type(error)(f"image{where}: {error}") from error
            x = self.to_model(torch.stack(batch))
            if self.exit_entropy and isinstance(self.model, S3N):
                probabilities = answer_batch(self.model, x, self.exit_entropy).probabilities
            else:
                logits = self.model.answer(x) if isinstance(self.model, S3N) else self.model(x)
                probabilities = score_classes(logits, self.multi_label)
            parts.append(probabilities.float().cpu())
        return torch.cat(parts)

    def prepare(self, image: ImageLike) -> Tensor:
        """Bring an image to what the model reads.

        Args:
            image: a path; the bytes of an image file; a PIL image of any mode, of whose frames the first counts; an
                H×W, H×W×3 or H×W×4 array; or a 1×H×W or 3×H×W tensor. Arrays and tensors hold bytes, or floats in
                [0, 1]. Images are turned as their EXIF says, transparency lies on white, 16 bits are scaled to 8.

        Returns:
            C×H×W, normalized, in float32 on the CPU; C is 1 for models that read grey images.

        Raises:
            TypeError: it is none of these.
            ValueError: it cannot be read, is empty, too large or too long and thin, or its pixel values are out of
                range.
        """
        return self.transform(read_image(image, self.mode))

    def to_model(self, x: Tensor) -> Tensor:
        """Prepared images on the model's device, in its precision."""
        # weights that Accelerate keeps elsewhere are meta tensors here: its hooks move the input themselves
        floating = (each for each in self.model.parameters() if each.is_floating_point() and not each.is_meta)
        weight = next(floating, x)
        return x.to(weight.device, weight.dtype, non_blocking=x.is_pinned())

    @torch.inference_mode()
    def explain(self, image: ImageLike) -> Explanation:
        """What the model sees in one image: `S3N.explain` of a batch of this image. All branches are asked.

        Raises:
            TypeError: it is no image.
            ValueError: it cannot be read, or the model is no S3N.
        """
        if not isinstance(self.model, S3N):
            raise ValueError(f"explain needs an S3N, got {type(self.model).__name__}, which has no peaks and no warps.")
        return self.model.explain(self.to_model(self.prepare(image)[None]))

    def draw(self, image: ImageLike, explanation: Explanation | None = None) -> "Figure":
        """Draw what the model sees in one image: `s3n_timm.draw.draw_explanation` (needs the extra "train").

        Args:
            image: see `prepare`.
            explanation: what `explain` gave for this image; asked for if left out, when a partition that draws at
                random draws anew.

        Raises:
            TypeError: it is no image.
            ValueError: it cannot be read, or the model is no S3N.
        """
        from .draw import draw_explanation

        explanation = self.explain(image) if explanation is None else explanation
        assert isinstance(self.model, S3N)  # or it would have explained nothing
        mean, std = self.data_config["mean"], self.data_config["std"]
        return draw_explanation(self.model, self.prepare(image), mean, std, self.label_names, explanation)


def _exit_entropy(model: nn.Module, asked: float | None) -> float:
    able, stated = False, None
    if isinstance(model, S3N) and "O" in model.config.branches and not model.config.multi_label:
        able, stated = True, model.config.exit_entropy
    name, value = ("exit_entropy of config.json", stated) if asked is None else ("exit_entropy", asked)
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} must be at least 0 nats, got {value!r}.")
    if value and not able:
        raise ValueError("exit_entropy needs an S3N with the O branch and one label an image: leave it out.")
    return float(value)
