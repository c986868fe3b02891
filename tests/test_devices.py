"""What can be shown of a GPU without one: nothing is built on the CPU, nothing waits, no layout is lost."""

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s3n_timm import S3N, S3NLoss

MODELS = {
    "paper": {},
    "original": dict(preset="original"),
    "learned kernel": dict(kernel="learned"),
    "scores of maps": dict(gate_scores="maps", gate="renormalized"),
    "norm before the classifier": dict(backbone="test_convnext"),
    "tokens": dict(backbone="test_vit", img_size=64, backbone_args=dict(global_pool="avg")),
    "response": dict(attention="response"),
    "saliency": dict(attention="saliency"),
    "reflected border": dict(border="reflect"),
    "zoom": dict(scan_size=32, zoom_size=48),
    "random partition": dict(partition_train="random", partition_eval="probability"),
}
LOSS = dict(smoothing=0.1)


def build(name, **options):
    torch.manual_seed(0)
    return S3N(**{**dict(backbone="test_resnet", num_classes=5), **MODELS[name], **options})


def on_fake_device(model, mode, device):
    """The model with tensors that have a device but no values: to read one is an error."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                with mode:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    return model


class Devices(TorchDispatchMode):
    """Operators by the device of what they gave, views and copies included."""

    def __init__(self):
        super().__init__()
        self.operators = defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.operators[leaf.device.type].add(str(function))
        return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_built_on_the_cpu_and_nothing_waits_for_the_device(name, training):
    """A tensor made on the CPU, or a number read from the device, would have the host wait and end CUDA graphs."""
    mode = FakeTensorMode()
    model = on_fake_device(build(name), mode, "cuda").train(training)
    with mode:
        x = torch.rand(2, 3, 64, 64, device="cuda")
        target = torch.zeros(2, dtype=torch.long, device="cuda")
        with Devices() as devices:
            model.set_branch_logits(True)
            out = model(x)
            S3NLoss(**LOSS)(out, target)
            S3NLoss(**LOSS)(out, torch.rand(2, 5, device="cuda"))
            model.explain(x)
    assert len(devices.operators["cuda"]) > 30
    assert set(devices.operators) == {"cuda"}, devices.operators["cpu"]


@pytest.mark.parametrize("name", MODELS)
def test_meta_tensors_pass_forward_and_backward(name):
    model = build(name).to("meta").train()
    out = model(torch.empty(2, 3, 64, 64, device="meta"))
    assert {tuple(logits.shape) for logits in out} == {(2, 5)}
    S3NLoss(**LOSS)(out, torch.empty(2, dtype=torch.long, device="meta")).backward()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())
    assert model.eval()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("options", [{}, dict(scan_size=32, zoom_size=48)])
def test_channels_last_is_read_in_both_passes(options):
    """By the backbone and all of its convolutions."""
    model = build("paper", **options).to(memory_format=torch.channels_last)
    seen = []

    def look(module, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.backbone.modules())
    model(torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert len(seen) == 2 * convolutions
    assert all(seen)
