"""Model cards: what a reader must know of published weights, and where each statement comes from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints import check_regular_file, has_peaks, is_multi_label_model
from ..evaluation import INTERVAL, result_tables
from ..heads import evaluating
from ..images import image_mode, input_config
from ..model import S3N

PAPER = "https://openaccess.thecvf.com/content_ICCV_2019/html/Ding_Selective_Sparse_Sampling_for_Fine-Grained_Image_Recognition_ICCV_2019_paper.html"
CITATION = """@inproceedings{ding2019selective,
  title     = {Selective Sparse Sampling for Fine-Grained Image Recognition},
  author    = {Ding, Yao and Zhou, Yanzhao and Zhu, Yi and Ye, Qixiang and Jiao, Jianbin},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2019}
}"""
# where a run happened, not what it learned
OF_THE_MACHINE = (
    "output", "resume", "workers", "cpu_threads", "log_with", "checkpoint_every", "checkpoint_hist",
    "push_to_hub", "push_backbone", "hub_private",
)

Source = Mapping[str, Any] | str | Path


def count_macs(model: nn.Module, input_size: Sequence[int]) -> float:
    """Multiply-accumulates of one image in eval mode: convolutions and matrix products, all backbone passes.

    Args:
        model: any model, on any device; its modes are left as they are.
        input_size: (channels, height, width).

    Returns:
        A number of operations, half of what `torch.utils.flop_counter` counts.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    # fused attention kernels are not counted on every device, the matrix products that they stand for are
    with (evaluating(model.modules()), torch.no_grad(), sdpa_kernel(SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):
        model(image)
    return counter.get_total_flops() / 2


def model_card(
        model: nn.Module,
        *,
        name: str | None = None,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        results: Source | None = None,
        recipe: Source | None = None,
        dataset: str | None = None,
        licence: str = "apache-2.0",
        picture: str | None = None,
        limits: Sequence[str] = (),
) -> ModelCard:
    """Write the card of a model; what it is not told it says is unknown.

    All strings are taken as text of one line: line breaks become spaces and `<` is escaped, so that no argument can
    add a heading or a tag.

    Args:
        model: an S3N, or a plain timm model.
        name: USER/NAME of its repository on the Hub.
        label_names: a name for each class.
        data_config: preprocessing, as `timm.data.resolve_data_config` gives it; the model's own if left out.
        results: what examples/evaluate.py wrote as results.json, or the path of that file.
        recipe: arguments of the training with its seed, or the path of the results.json of examples/train.py.
        dataset: what it was trained on, in words; the recipe's `dataset` if left out.
        licence: of the weights, an identifier that the Hub knows.
        picture: file name, beside the card, of a picture of what the model sees.
        limits: further sentences on what the model can't do.

    Returns:
        The card, Markdown under the metadata that the Hub reads.

    Raises:
        ValueError: `results` or `recipe` is not such a file, in whole or in part, or the results are those of another
            model.
        OSError: a file can't be read.
    """
    config = input_config(model, data_config)
    if isinstance(limits, str):
        raise ValueError("limits must be a list of sentences, got one.")
    name, dataset, licence, limits = _plain(name), _plain(dataset), _plain(licence), _plain(limits)
    measured = None if results is None else read_results(results, model)
    settings = None if recipe is None else _read_recipe(recipe)
    if dataset is None and settings is not None and settings.get("dataset") is not None:
        dataset = str(settings["dataset"])
    with _well_formed():
        eval_results = None if measured is None else _metadata_of_results(measured)
        reported = _results(measured)
    title = name.split("/")[-1] if name else "S3N" if isinstance(model, S3N) else "Plain timm model"
    hub_data = _hub_names(dataset, settings, measured)
    metadata = ModelCardData(
        library_name="s3n_timm" if isinstance(model, S3N) else "timm",
        pipeline_tag="image-classification",
        license=licence,
        tags=["timm", "image-classification", *(["s3n", "fine-grained"] if isinstance(model, S3N) else [])],
        datasets=hub_data or None,
        model_name=title if measured else None,
        eval_results=eval_results,
    )
    sections = [
        f"# {title}",
        _what_it_is(model),
        _model_table(model, config, label_names),
        _how_to_load(model, name, image_mode(config["input_size"][0])),
        _training(dataset, settings),
        reported,
        _picture(picture),
        _limits(model, measured, limits),
        f"## Licence\n\nWeights: {licence}. The code of s3n_timm: Apache-2.0.",
    ]
    if isinstance(model, S3N):
        sections.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


# what is read


def _plain(value: Any) -> Any:
    """Strings, wherever they stand in a value, as text of one line without tags."""
    if isinstance(value, str):
        return " ".join(value.split()).replace("<", "&lt;")
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def _well_formed() -> Iterator[None]:
    """Turn what a value of the wrong type or a missing one raises into one ValueError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"results are not those that examples/evaluate.py writes ({type(error).__name__}: {error})."
        ) from error


def _read(source: Source, what: str) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return _plain(source)
    check_regular_file(source)
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {source} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {source} holds no JSON object.")
    return _plain(content)


def read_results(source: Source, model: nn.Module) -> dict[str, Any]:
    """What examples/evaluate.py wrote, with its strings as text of one line.

    Raises:
        ValueError: it is not that, or was measured on another model.
        OSError: the file can't be read.
    """
    results = _read(source, "results")
    lacking = [key for key in ("dataset", "split", "images", "units", "model", "measures", "run") if key not in results]
    if lacking:
        raise ValueError(f"results lack {', '.join(lacking)}: give the results.json that examples/evaluate.py writes.")
    found = results["model"]
    if not isinstance(found, Mapping):
        raise ValueError("results do not describe the model: give the results.json that examples/evaluate.py writes.")
    own = dict(num_classes=model.num_classes, parameters=count_parameters(model))
    for key, value in own.items():
        if found.get(key) != value:
            raise ValueError(
                f"results were measured on another model: its {key} is {found.get(key)}, this one's is {value}.")
    return results


def _read_recipe(source: Source) -> dict[str, Any]:
    recipe = _read(source, "recipe")
    settings = recipe.get("args", recipe)  # train.py writes them as args
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError("recipe holds no arguments: give those of the training, or the results.json of train.py.")
    return dict(settings)


def hub_dataset(name: Any) -> str | None:
    """The repository of a data set that is named as scripts name it; None for one that is not on the Hub."""
    if not isinstance(name, str) or not name.startswith("hub:"):
        return None
    name = name.removeprefix("hub:")
    try:
        validate_repo_id(name)  # a path is none, but for two of its parts
    except HFValidationError:
        return None
    return None if Path(name).is_dir() else name


def _data_name(dataset: str) -> str:
    """A data set's name for readers: that of its repository, or of a folder the last part."""
    name = dataset.removeprefix("hub:")
    return PurePath(name).name if name != dataset and hub_dataset(dataset) is None else name


def _hub_names(dataset: str | None, *sources: Mapping[str, Any] | None) -> list[str]:
    """Data sets that have a repository on the Hub, which its metadata may name."""
    names = map(hub_dataset, [dataset, *(source.get("dataset") for source in sources if source)])
    return sorted({name for name in names if name})


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# sections


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        cells = ["not measured" if cell is None else cell for cell in cells]
        # a bar would end the cell, a line break the table
        return f"| {' | '.join(' '.join(str(cell).replace('|', chr(92) + '|').split()) for cell in cells)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _architecture(model: nn.Module) -> str:
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    return _plain(str(cfg.get("architecture", "unknown")))


def _what_it_is(model: nn.Module) -> str:
    if not isinstance(model, S3N):
        origin = _plain(getattr(model, "pretrained_cfg", {}).get("description")) or "A plain baseline."
        return f"`{_architecture(model)}` of timm, an image classifier, trained with s3n_timm. {origin}"
    return (
        f"A Selective Sparse Sampling Network (S3N, [Ding et al., ICCV 2019]({PAPER})) for fine-grained image "
        f"classification on the timm backbone `{model.config.backbone}`. The class response maps of the backbone say "
        "where the evidence is; the image is warped around it, the same backbone reads the warped images too, and a "
        "fusion layer decides on the joined features. Made with s3n_timm, an independent implementation, not the "
        "authors' own."
    )


def _model_table(model: nn.Module, config: Mapping[str, Any], label_names: Sequence[str] | None) -> str:
    channels, height, width = config["input_size"]
    macs = count_macs(model, config["input_size"]) / 1e9
    rows: list[tuple[str, Any]] = [("architecture", f"`{_architecture(model)}`")]
    if isinstance(model, S3N):
        passes = 1 + len(model.answering)
        rows += [
            ("backbone", f"`{model.config.backbone}`"),
            ("branches", f"{model.config.branches}, {model.config.answer} answers: "
                         f"{passes} backbone pass{'es' * (passes > 1)}"),
            ("attention", model.config.attention),
            ("preset", model.config.preset),
        ]
        if has_peaks(model):
            with evaluating([model]):
                rows.append(("partition of peaks in eval mode", model.partition))
    names = "named in `config.json`" if label_names else "without names"
    rows += [
        ("parameters", f"{count_parameters(model):,}"),
        ("GMACs", f"{macs:.3g}" if macs < 100 else f"{macs:.0f}"),
        ("image size", f"{height} × {width} px, {channels} channel{'s' * (channels > 1)}"),
        ("preprocessing", f"{config['interpolation']}, crop {config['crop_pct']} ({config['crop_mode']}), mean "
                          f"{_listed(config['mean'])}, std {_listed(config['std'])}"),
        ("classes", f"{model.num_classes}, {names}" if model.num_classes else "none, it gives features"),
    ]
    return (
        f"## Model\n\n{_table(('', 'value'), rows)}\n\n"
        "GMACs: 10⁹ multiply-accumulates of one image of that size in eval mode, all backbone passes, counted by "
        "`torch.utils.flop_counter` (its FLOPs / 2): convolutions and matrix products; element-wise operations, norms "
        "and the interpolation of the warps are not counted. `config.json` holds every argument of the architecture."
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _how_to_load(model: nn.Module, name: str | None, mode: str) -> str:
    if isinstance(model, S3N):
        source = json.dumps(name or "FOLDER", ensure_ascii=False)
        timm_source = json.dumps(f"hf-hub:{name}" if name else "local-dir:FOLDER", ensure_ascii=False)
        pinned = ' Both compare the files with their hashes; `"USER/NAME@COMMIT"` pins a revision.' if name else ""
        return (
            "## How to load\n\nIn an environment with s3n_timm:\n\n```python\n"
            "import s3n_timm\n\n"
            f"classifier = s3n_timm.Classifier.from_pretrained({source})\n"
            'for answer in classifier("image.jpg"):\n'
            '    print(f"{answer[\'score\']:.3f} {answer[\'label\']}")\n'
            f"```\n\n`classifier.model` is the network. timm alone does not know it; after `import s3n_timm`, "
            f"`timm.create_model({timm_source}, pretrained=True)` gives it as well."
            f"{pinned}"
        )
    source = json.dumps(f"hf-hub:{name}" if name else "local-dir:FOLDER", ensure_ascii=False)
    return (
        "## How to load\n\n```python\n"
        "import timm\nimport torch\nfrom PIL import Image\n\n"
        f"model = timm.create_model({source}, pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))\n"
        f'x = transform(Image.open("image.jpg").convert("{mode}"))[None]\n'
        "with torch.inference_mode():\n"
        f"    probability, label = model(x).{'sigmoid()' if is_multi_label_model(model) else 'softmax(1)'}.max(1)\n"
        'names = model.pretrained_cfg.get("label_names") or range(model.num_classes)\n'
        "print(names[label], probability.item())\n"
        "```"
    )


def _training(dataset: str | None, settings: Mapping[str, Any] | None) -> str:
    data = f"Data: {_data_name(dataset)}." if dataset else "Data: unknown, the author of the card names none."
    if settings is None:
        return f"## Data and training\n\n{data} Recipe and seed: unknown, the author of the card gives none."
    # a False is a switch that is off, a 0 is a value
    rows = [(f"`{key}`", _setting(value)) for key, value in settings.items()
            if key not in (*OF_THE_MACHINE, "seed") and value is not None and value is not False
            and value not in ([], {}, (), "")]
    seed = settings.get("seed")
    rows.insert(0, ("seed", "unknown" if seed is None else seed))
    return (
        f"## Data and training\n\n{data} Arguments of the training, but those that are off and those that say where "
        f"it ran; of a path the last part:\n\n{_table(('argument', 'value'), rows)}"
    )


def _setting(value: Any) -> str:
    if isinstance(value, PurePath) or (isinstance(value, str) and PurePath(value).is_absolute()):
        return PurePath(value).name
    if isinstance(value, str) and value.startswith("hub:"):
        return _data_name(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return json.dumps(value, default=str) if isinstance(value, Mapping) else str(value)


def answer_accuracy(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Accuracies of the output that the model answers with."""
    return results["measures"]["accuracy"][results["model"].get("s3n", {}).get("answer", "joint")]


def _answer_metrics(results: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Kind, name and value in % of what counts of the output that the model answers with."""
    measures = results["measures"]
    if "mean_average_precision" in measures:
        return [("mean_average_precision", "mean average precision, %", measures["mean_average_precision"]["answer"])]
    accuracy, titles = answer_accuracy(results), dict(top1="top-1", top5="top-5")
    return [("accuracy", f"{title} accuracy, %", accuracy[key]) for key, title in titles.items()]


def _metadata_of_results(results: Mapping[str, Any]) -> list[EvalResult]:
    dataset = _data_name(str(results["dataset"]))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=results["split"],
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in _answer_metrics(results)
    ]


def _results(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "## Results\n\nNot measured: no results of examples/evaluate.py came with the weights."
    measures, run = results["measures"], results["run"]
    shown = [table for name, table in result_tables(measures).items() if name != "parts"]
    tables = "\n\n".join(f"{table.title}:\n\n{_table(table.header, table.rows)}" for table in shown)
    used = results["model"]["preprocessing"]
    partition = (results["model"].get("s3n") or {}).get("partition")
    versions = ", ".join(f"{package} {version}" for package, version in run.get("versions", {}).items())
    protocol = [
        f"{_data_name(str(results['dataset']))}, split {results['split']}, {results['images']} images, each "
        "counted once",
        f"input {' × '.join(map(str, used['input_size'][1:]))} px, {used['interpolation']}, crop {used['crop_pct']} "
        f"({used['crop_mode']}), one view, no test-time augmentation",
        *([f"peaks divided by `{partition}`"] if partition else []),
        *([f"intervals: {INTERVAL}; they do not cover how runs differ by their seeds",
           f"calibration: {measures['calibration']['method']}"] if "accuracy" in measures else []),
        *([f"faithfulness: {measures['faithfulness']['method']}"] if "faithfulness" in measures else []),
        f"units: {results['units']}",
        f"by examples/evaluate.py on {run.get('device', 'an unknown device')}, {versions or 'unknown versions'}",
    ]
    listed = "\n".join(f"- {line}" for line in protocol)
    return f"## Results\n\n{tables}\n\nProtocol:\n\n{listed}"


def _picture(picture: str | None) -> str:
    if picture is None:
        return "## What it sees\n\nNo picture came with the weights; `examples/visualize.py` draws one."
    return (
        f"## What it sees\n\n![What the model sees in one image]({quote(picture)})\n\n"
        "One image, chosen by the author of the card; it is no evidence of how the model does on others."
    )


def _limits(model: nn.Module, measured: Mapping[str, Any] | None, further: Sequence[str]) -> str:
    known = [
        "It knows its own classes alone, each of which is in an image or not." if is_multi_label_model(model) else
        "It knows its own classes alone and gives one of them to any image, also to one that shows none of them.",
        "How it does on other data, cameras or places than those of the results above is not known." if measured else
        "Nothing was measured here: don't rely on it before you have measured it on your own images.",
    ]
    if isinstance(model, S3N):
        passes = 1 + len(model.answering)
        if passes > 1:
            known.append(f"It runs the backbone {passes} times: as many times the cost of the plain network.")
        known.append(
            "Response maps show what the network used, which need not be the parts that tell the classes apart.")
        if has_peaks(model):
            known.append("Peaks come from a coarse feature map; with small inputs there is little to choose from.")
    return "## Limits\n\n" + "\n".join(f"- {' '.join(line.split())}" for line in [*known, *further])
