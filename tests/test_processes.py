"""examples/train.py gives the same weights however an update's images are divided."""

import csv
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from helpers import EXAMPLES, SMALL, Forked, free_port, largest_difference, train
from support.sync_bn import synchronize
from torch import nn

# two epochs of ten updates of 16 images; the peaks are divided at random
ARGS = ("--num-images", 170, "--val-fraction", 0.05, "--epochs", 2, "--clip-grad", 1)


def rates(output):
    with (output / "summary.csv").open() as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    train(*ARGS, "--freeze-bn", "--batch-size", 16, "--output", output)
    return output


@pytest.mark.parametrize(("processes", "batch", "steps", "extra"), [(1, 4, 4, []), (2, 4, 2, ["--grad-checkpointing"])],
                         ids=["accumulation", "both, with gradient checkpointing"])  # processes: test_two_machines
def test_twenty_steps_end_at_the_same_weights_and_rates(alone, tmp_path, processes, batch, steps, extra):
    output = tmp_path / "run"
    text = train(*ARGS, "--freeze-bn", "--batch-size", batch, "--grad-accum-steps", steps, *extra, "--output", output,
                 processes=processes)
    assert f"16 images an update, {processes} process(es)" in text
    assert largest_difference(output, alone) < 1e-4
    assert rates(output) == rates(alone)
    assert rates(output)[0] > 0


def test_batch_norm_over_processes(tmp_path):
    # a small rate: the kinks of ten steps multiply float32's rounding; float64 below does without this
    args = (*ARGS, "--epochs", 1, "--sync-bn", "--lr", 0.002)
    train(*args, "--batch-size", 16, "--output", tmp_path / "alone")
    train(*args, "--batch-size", 8, "--output", tmp_path / "two", processes=2)
    assert largest_difference(tmp_path / "two", tmp_path / "alone", buffers=False) < 1e-4
    assert rates(tmp_path / "two") == rates(tmp_path / "alone")


def train_synchronized(rank, name, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=4).double().train()
    torch.manual_seed(0)
    model = synchronize(timm.create_model(name, num_classes=4).double().train(), torch.device("cpu"))
    model = nn.parallel.DistributedDataParallel(model)
    images, labels = torch.randn(8, 3, 64, 64, dtype=torch.float64), torch.randint(4, (8,))
    part = slice(4 * rank, 4 * rank + 4)
    for each, x, y in ((reference, images, labels), (model, images[part], labels[part])):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.02, momentum=0.9)
        for _ in range(5):
            nn.functional.cross_entropy(each(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.module.state_dict().values(), reference.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])  # torch's batch norm, and timm's
def test_batch_norm_over_processes_is_exact_in_float64(name):
    mp.start_processes(train_synchronized, (name, free_port()), nprocs=2, start_method="forkserver")


def test_two_machines(alone, tmp_path):
    output, port = tmp_path / "run", free_port()
    machines = [
        Forked("train.py", *SMALL, *ARGS, "--freeze-bn", "--output", output, RANK=rank, LOCAL_RANK="0",
               GROUP_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for rank in "01"
    ]
    texts = [machine.end() for machine in machines]
    assert "16 images an update, 2 process(es)" in "\n".join(texts)
    assert largest_difference(output, alone) < 1e-4


def test_processes_of_torchrun_find_each_other_on_cpus(tmp_path):
    """Accelerate asks to be told that they run on CPUs, which nobody does who has no GPU."""
    text = Forked("train.py", *SMALL, "--epochs", 1, "--output", tmp_path / "run", processes=2,
                  ACCELERATE_USE_CPU="").end()
    assert "16 images an update, 2 process(es)" in text



def test_fsdp_trains_to_the_same_weights_and_resumes(alone, tmp_path):
    output = tmp_path / "run"
    launch = ["--config_file", EXAMPLES / "configs" / "fsdp.yaml", "--num_processes", 2, "--mixed_precision", "no"]
    script = [Path(__file__).with_name("fsdp_on_cpu.py"), EXAMPLES / "train.py", *SMALL, *ARGS, "--freeze-bn",
              "--output", output]
    launch, script = list(map(str, launch)), list(map(str, script))
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args([*launch, *script]))
    environment = prepare_multi_gpu_env(launched)
    text = Forked(*script, processes=2, **environment).end()
    assert "16 images an update, 2 process(es)" in text
    assert largest_difference(output, alone) < 1e-4
    for path in (output / "checkpoints" / "update-20").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    text = Forked(*script, "--resume", processes=2, **environment).end()
    assert "Resumed from" in text
    assert "after 1 epochs and 10 updates" in text
    assert largest_difference(output, alone) < 1e-4


def test_fsdp_does_not_average_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    assert "leave it out" in train("--model-ema", "--output", tmp_path / "run", ok=False)
    assert not (tmp_path / "run").exists()


def test_two_processes_train_every_parameter_and_count_every_image_once(tmp_path):
    # 48 images: 43 to train on, 5 to validate on and 12 to test on, none of which two processes share evenly
    recipe = ["--preset", "original", "--model-kwargs", '{"partition_warmup_epochs": 0}', "--model-ema",
              "--epochs", 1, "--batch-size", 4]
    text = train(*recipe, "--output", tmp_path / "run", processes=2)
    assert "8 images an update, 2 process(es)" in text
    assert text.count("epoch 1/1  loss") == 2  # live and averaged, each once
    with (tmp_path / "run" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    shares = [float(value) for name, value in row.items() if name.startswith("val_")]
    assert len(shares) == 8
    assert all(abs(share * 5 / 100 - round(share * 5 / 100)) < 1e-9 for share in shares)


def test_a_process_that_is_alone_where_two_were_asked_for_says_so(tmp_path):
    words = ["--cpu", "--num_processes", "2", "train.py"]
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    _, environment = prepare_simple_launcher_cmd_env(launched)  # of the one process that Accelerate starts
    text = train("--output", tmp_path / "run", ok=False, **environment)
    assert "this one was started alone" in text
    assert "torchrun --nproc_per_node 2" in text
    assert not (tmp_path / "run").exists()


def test_sharded_checkpoints_are_refused(monkeypatch, tmp_path):
    for kind, refused in (("SHARDED_STATE_DICT", True), ("LOCAL_STATE_DICT", True), ("FULL_STATE_DICT", False)):
        plugin = FullyShardedDataParallelPlugin(state_dict_type=kind)
        monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
        text = train("--epochs", 1, "--output", tmp_path / kind, ok=not refused)
        assert ("set fsdp_state_dict_type: FULL_STATE_DICT" in text) == refused
