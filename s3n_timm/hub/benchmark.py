"""Results as the benchmarks of the Hub collect them: https://huggingface.co/docs/hub/eval-results."""

from pathlib import Path

from huggingface_hub.utils import yaml_dump
from torch import nn

from .card import Source, answer_accuracy, hub_dataset, read_results


def benchmark_file(model: nn.Module, results: Source | None, task: str) -> tuple[str, str]:
    """Write a model's top-1 accuracy as the entry of a benchmark's leaderboard.

    The Hub takes entries for data sets alone that are registered there as benchmarks, by the name of a task in the
    data set's `eval.yaml`. Neither can be known here, so that the caller names the task, and so vouches that it asks
    for the top-1 accuracy in % on the split that was measured.

    Args:
        model: the model that was measured.
        results: as for `s3n_timm.hub.model_card`.
        task: id of the task.

    Returns:
        Path of the file in the repository, and its content.

    Raises:
        ValueError: `results` are not those of this model on a data set of the Hub.
        ImportError: the installed huggingface_hub knows no such entries.
        OSError: the file can't be read.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # not in the earliest version allowed

    measured = {} if results is None else read_results(results, model)
    dataset = hub_dataset(measured.get("dataset"))
    if dataset is None:
        raise ValueError("benchmark_task needs results that were measured on a data set of the Hub, hub:USER/NAME.")
    if "accuracy" not in measured["measures"]:
        raise ValueError("benchmark_task needs top-1 accuracy, which images with several labels do not have.")
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=task,
        value=answer_accuracy(measured)["top1"],
        notes=f"top-1 accuracy in %, split {measured['split']}, {measured['images']} images, one view",
    )
    return f".eval_results/{Path(dataset).name}.yaml", yaml_dump(eval_result_entries_to_yaml([entry]))
