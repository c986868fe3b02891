"""Every family of timm models: whether its head has class response maps, and whether they average to its logits."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from s3n_timm.heads import NoResponseMap, inspect_head
from s3n_timm.registry import VARIANTS

CLASSES = 5
OURS = {"s3n", *VARIANTS}

# What becomes of a family: its maps average to the logits, or nearly so, or it has none for one of these reasons.
EXACT = "exact"
APPROXIMATE = "approximate"
TOKEN = "pools by 'token'"
SEVERAL = "has several classifiers"
CONVOLUTION = "mixes positions by a convolution"


class Row(NamedTuple):
    kind: str
    name: str
    size: int | None = 64  # side of the input that the model is built for; None keeps its own
    kwargs: Mapping = MappingProxyType({})  # that make the model small, or choose its pooling


THIN = dict(depth=1, embed_dim=64, num_heads=2)
STAGES = dict(depths=(1, 1, 1, 1), embed_dim=24)

# one small model of every module of timm.models that registers any
FAMILIES = {
    "beit": Row(EXACT, "beit_base_patch16_224", kwargs=THIN),
    "byoanet": Row(EXACT, "halonet_h1", None),
    "byobnet": Row(EXACT, "test_byobnet"),
    "cait": Row(TOKEN, "cait_xxs24_224", kwargs=dict(depth=1, depth_token_only=1)),
    "coat": Row(TOKEN, "coat_tiny"),
    "convit": Row(TOKEN, "convit_tiny", kwargs=dict(depth=2)),
    "convmixer": Row(EXACT, "convmixer_768_32", 128),
    "convnext": Row(EXACT, "test_convnext"),
    "cpubone": Row(APPROXIMATE, "cpubone_nano"),
    "crossvit": Row(SEVERAL, "crossvit_tiny_240"),
    "csatv2": Row(EXACT, "csatv2", 128),
    "cspnet": Row(EXACT, "cs3darknet_focus_s"),
    "cspnext": Row(EXACT, "cspnext_tiny"),
    "davit": Row(
        EXACT, "davit_tiny", kwargs=dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8))
    ),
    "deepseek_vit": Row(APPROXIMATE, "deepseek_vit_412m", 84, THIN),
    "deit": Row(TOKEN, "deit_tiny_patch16_224", kwargs=dict(depth=1)),
    "densenet": Row(EXACT, "densenet121"),
    "dla": Row(EXACT, "dla46x_c"),
    "dpn": Row(EXACT, "dpn48b"),
    "edgenext": Row(EXACT, "edgenext_xx_small"),
    "efficientformer": Row(SEVERAL, "efficientformer_l1"),
    "efficientformer_v2": Row(SEVERAL, "efficientformerv2_s0"),
    "efficientnet": Row(EXACT, "test_efficientnet"),
    "efficientvim": Row(SEVERAL, "efficientvim_m1"),
    "efficientvit_mit": Row(APPROXIMATE, "efficientvit_b0"),
    "efficientvit_msra": Row(EXACT, "efficientvit_m0", 224),
    "eva": Row(EXACT, "eva02_tiny_patch14_224", None, dict(depth=1)),
    "fasternet": Row(APPROXIMATE, "fasternet_t0"),
    "fastvit": Row(EXACT, "fastvit_t8"),
    "focalnet": Row(EXACT, "focalnet_tiny_srf"),
    "gcvit": Row(EXACT, "gcvit_xxtiny"),
    "gemma4_vit": Row(EXACT, "gemma4_vit_167m", kwargs=THIN),
    "ghostnet": Row(APPROXIMATE, "ghostnet_050"),
    "hardcorenas": Row(APPROXIMATE, "hardcorenas_b"),
    "hgnet": Row(APPROXIMATE, "hgnetv2_b0"),
    "hiera": Row(EXACT, "hiera_tiny_224", 128, dict(stages=(1, 1, 1, 1), embed_dim=32)),
    "hieradet_sam2": Row(
        EXACT, "hieradet_small", 128, dict(stages=(1, 1, 2, 1), embed_dim=32, global_att_blocks=(3,))
    ),
    "hrnet": Row(EXACT, "hrnet_w18_small"),
    "iformer": Row(EXACT, "iformer_t"),
    "inception_next": Row(APPROXIMATE, "inception_next_atto"),
    "inception_resnet_v2": Row(EXACT, "inception_resnet_v2", 160),
    "inception_v3": Row(EXACT, "inception_v3", 160),
    "inception_v4": Row(EXACT, "inception_v4", 160),
    "lcnetv2": Row(APPROXIMATE, "lcnetv2_small"),
    "levit": Row(SEVERAL, "levit_128s"),
    "lowformer": Row(APPROXIMATE, "lowformer_b0"),
    "mambaout": Row(APPROXIMATE, "test_mambaout"),
    "maxxvit": Row(EXACT, "test_coatnet"),
    "metaformer": Row(EXACT, "poolformerv2_s12"),
    "mlp_mixer": Row(EXACT, "gmlp_ti16_224"),
    "mobilenetv3": Row(APPROXIMATE, "mobilenetv3_small_050"),
    "mobilenetv5": Row(EXACT, "mobilenetv5_base"),
    "mobilevit": Row(EXACT, "mobilevit_xxs"),
    "mvitv2": Row(EXACT, "mvitv2_tiny"),
    "naflexvit": Row(EXACT, "naflexvit_base_patch16_parfac_gap", kwargs=THIN),
    "nasnet": Row(EXACT, "nasnetalarge"),
    "nest": Row(EXACT, "nest_tiny", 128),
    "nextvit": Row(EXACT, "nextvit_small"),
    "nfnet": Row(EXACT, "test_nfnet"),
    "pit": Row(TOKEN, "pit_ti_224"),
    "pnasnet": Row(EXACT, "pnasnet5large"),
    "pvt_v2": Row(EXACT, "pvt_v2_b0"),
    "qwen3_vit": Row(EXACT, "qwen3_vit_88m", kwargs=THIN),
    "rdnet": Row(EXACT, "rdnet_tiny"),
    "regnet": Row(EXACT, "regnetx_002"),
    "repghost": Row(APPROXIMATE, "repghostnet_050"),
    "repvit": Row(SEVERAL, "repvit_m1"),
    "res2net": Row(EXACT, "res2next50"),
    "resnest": Row(EXACT, "resnest14d"),
    "resnet": Row(EXACT, "test_resnet"),
    "resnetv2": Row(EXACT, "resnetv2_18"),
    "rexnet": Row(EXACT, "rexnet_100"),
    "selecsls": Row(EXACT, "selecsls42", 128),
    "senet": Row(EXACT, "legacy_seresnet18"),
    "sequencer": Row(EXACT, "sequencer2d_s", kwargs=dict(layers=(1, 1, 1, 1))),
    "shvit": Row(EXACT, "shvit_s1", 128),
    "sknet": Row(EXACT, "skresnet18"),
    "starnet": Row(EXACT, "starnet_s050"),
    "swiftformer": Row(SEVERAL, "swiftformer_xs"),
    "swin_transformer": Row(EXACT, "swin_tiny_patch4_window7_224", kwargs=STAGES),
    "swin_transformer_v2": Row(EXACT, "swinv2_tiny_window8_256", kwargs=STAGES),
    "swin_transformer_v2_cr": Row(EXACT, "swinv2_cr_tiny_224", kwargs=STAGES),
    "tiny_vit": Row(EXACT, "tiny_vit_5m_224"),
    "tnt": Row(TOKEN, "tnt_s_legacy_patch16_224", kwargs=dict(depth=1)),
    "tresnet": Row(EXACT, "tresnet_m"),
    "twins": Row(EXACT, "twins_svt_small", 128, dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128))),
    "vgg": Row(CONVOLUTION, "vgg11"),
    "visformer": Row(EXACT, "visformer_tiny"),
    "vision_transformer": Row(TOKEN, "test_vit"),
    "vision_transformer_hybrid": Row(TOKEN, "vit_tiny_r_s16_p8_224", kwargs=dict(depth=1)),
    "vision_transformer_relpos": Row(EXACT, "test_vit_relpos"),
    "vision_transformer_sam": Row(EXACT, "samvit_base_patch16_224", kwargs=dict(THIN, img_size=64)),
    "vitamin": Row(EXACT, "vitamin_small_224"),
    "volo": Row(SEVERAL, "volo_d1_224"),
    "vovnet": Row(EXACT, "ese_vovnet19b_slim_dw"),
    "xception": Row(EXACT, "legacy_xception"),
    "xception_aligned": Row(EXACT, "xception41p"),
    "xcit": Row(TOKEN, "xcit_nano_12_p8_224", kwargs=dict(depth=1)),
}
# heads that a family has beside its usual one
OTHERS = {
    "vit, patches pooled": Row(EXACT, "test_vit", kwargs=dict(global_pool="avg")),
    "vit without a class token": Row(EXACT, "test_vit", kwargs=dict(global_pool="avg", class_token=False)),
    "vit, norm before pooling": Row(EXACT, "test_vit", kwargs=dict(global_pool="avg", fc_norm=False)),
    "vit with registers": Row(EXACT, "test_vit4"),
    "vit, class token pooled too": Row(
        "together with the patches", "test_vit", kwargs=dict(global_pool="avg", pool_include_prefix=True)
    ),
    "vit, attention pooling": Row("pools by 'map'", "test_vit3"),
    "deit, patches pooled": Row(EXACT, "deit_tiny_patch16_224", kwargs=dict(depth=1, global_pool="avg")),
    "beit, class token": Row(TOKEN, "beit_base_patch16_224", kwargs=dict(THIN, global_pool="token")),
    "deit, distilled": Row(SEVERAL, "deit_tiny_distilled_patch16_224", kwargs=dict(depth=1)),
    "twins, pyramid": Row(EXACT, "twins_pcpvt_small", 128, dict(depths=(1, 1, 1, 1))),
    "mixer": Row(EXACT, "resmlp_12_224"),
    "convnext, norm before pooling": Row(EXACT, "test_convnext2", kwargs=dict(head_norm_first=True)),
    "convnext, hidden layer": Row(APPROXIMATE, "test_convnext", kwargs=dict(head_hidden_size=24)),
    "resnet, maximum": Row("pools by 'max'", "test_resnet", kwargs=dict(global_pool="max")),
    "resnet, both": Row("pools by 'catavgmax'", "test_resnet", kwargs=dict(global_pool="catavgmax")),
    "resnet, no pooling": Row("pools by 'nothing'", "test_resnet", kwargs=dict(global_pool="")),
}
ROWS = FAMILIES | OTHERS
MAPPED = [key for key, row in ROWS.items() if row.kind in (EXACT, APPROXIMATE)]
UNMAPPED = [key for key in ROWS if key not in MAPPED]


def build(row, **kwargs):
    torch.manual_seed(0)
    overlay = {} if row.size is None else dict(pretrained_cfg_overlay=dict(input_size=(3, row.size, row.size)))
    return timm.create_model(row.name, num_classes=CLASSES, **overlay, **row.kwargs, **kwargs).eval()


def image(model, batch=2):
    size = get_model_input_config(model)["input_size"]
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))


def randomize(module):
    """Parameters and statistics that no initialization would hide: norms that scale and shift, biases not zero."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            tensor.copy_(noise.abs() + 0.5 if name == "running_var" else noise)


@torch.no_grad()
def last_levels(model, x):
    """The last intermediate features as timm reshapes them to NCHW, without and with the final norm."""
    levels = []
    for norm in (False, True):
        with suppress(AssertionError):  # hiera norms no levels
            levels.append(model.forward_intermediates(x, norm=norm, intermediates_only=True)[-1])
    return levels


class Case(NamedTuple):
    row: Row
    model: nn.Module
    head: object
    features: torch.Tensor  # laid out as forward_features() gives them
    maps: torch.Tensor  # the same as B×D×h×w


@pytest.fixture(scope="module", params=MAPPED)
def case(request):
    row = ROWS[request.param]
    model = build(row, drop_rate=0.5)
    head = inspect_head(model)
    x = image(model)
    with torch.no_grad():
        features = model.forward_features(x)
    # an untrained network may let its signal die away: noise keeps positions and channels apart
    features = features + torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    for path in head.modules:
        randomize(model.get_submodule(path))
    return Case(row, model, head, features, head.to_map(features, x.shape[-2:]))


def test_every_family_is_in_the_table():
    known = set(FAMILIES)
    # modules by the models that they register: S3N's own registry module is listed beside timm's
    present = {module for module in timm.list_modules() if set(timm.list_models(module=module)) - OURS}
    assert not present - known, (
        f"timm has families that are new here: {', '.join(sorted(present - known))}. Add a small model of each to "
        "FAMILIES, with the kind of its head; if it has no response maps, with the reason."
    )
    assert not known - present, f"timm has these families no more, so take them out: {sorted(known - present)}."


@pytest.mark.parametrize("module", FAMILIES)
def test_row_belongs_to_its_family(module):
    assert FAMILIES[module].name in timm.list_models(module=module), "the model is of another family"


@pytest.mark.parametrize("key", UNMAPPED)
def test_none(key):
    row = ROWS[key]
    with pytest.raises(NoResponseMap, match=row.kind) as error:
        inspect_head(build(row))
    assert str(error.value).startswith(row.name), "the message does not say which model it is about"


def test_kind_of_head(case):
    assert (EXACT if case.head.exact else APPROXIMATE) == case.row.kind
    assert case.maps.shape[1] == case.head.width == case.model.num_features
    assert case.maps.shape[2] * case.maps.shape[3] > 1, "one position tells nothing: enlarge the row's size"


def test_maps_average_to_logits(case):
    with torch.no_grad():
        logits = case.model.forward_head(case.features)
        maps = case.head.response_maps(case.model, case.maps)
    assert maps.shape == (2, CLASSES, *case.maps.shape[2:])
    assert maps.isfinite().all()
    assert maps.flatten(2).std(2).min() > 0, "a map is constant"
    if case.head.exact:
        error = (maps.mean((2, 3)) - logits).abs().max() / logits.abs().max()
        assert error < 1e-4, f"maps average to other scores than the logits, by {error:.1e}"


def test_hidden_maps_average_to_pre_logits(case):
    with torch.no_grad():
        pooled = case.model.forward_head(case.features, pre_logits=True)
        maps = case.head.hidden_maps(case.model, case.maps)
    assert maps.shape == (2, case.head.hidden_width, *case.maps.shape[2:])
    assert pooled.shape == (2, case.head.hidden_width)
    if case.head.exact:
        assert (maps.mean((2, 3)) - pooled).abs().max() < 1e-4 * pooled.abs().max()


def test_maps_go_back_to_features(case):
    with torch.no_grad():
        expected = case.model.forward_head(case.features)
        logits = case.model.forward_head(case.head.from_map(case.maps))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_maps_change_no_state(case):
    model = case.model.train()
    # one module of the head in the other mode: flags are to come back as they were, not all alike
    model.get_submodule(case.head.modules[-1]).eval()
    try:
        flags = {name: module.training for name, module in model.named_modules()}
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            maps = case.head.response_maps(model, case.maps)
            if case.head.reads_hidden:
                case.head.hidden_maps(model, case.maps)
            inspect_head(model)
        assert {name: module.training for name, module in model.named_modules()} == flags, "a training flag changed"
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
        assert not changed, f"making maps changed {changed}"
        with torch.no_grad():
            evaluated = case.head.response_maps(model.eval(), case.maps)
        torch.testing.assert_close(maps, evaluated, msg="maps differ between train and eval mode")
    finally:
        model.eval()


def test_classifiers_read_features_that_were_dropped_once(case):
    model, maps = copy.deepcopy(case.model), case.maps.repeat(16, 1, 1, 1)
    with torch.no_grad():
        expected = model.forward_head(case.features, pre_logits=True)
        torch.testing.assert_close(case.head.pool(model, case.maps), expected, msg="features are dropped in eval mode")
        model.train()
        torch.manual_seed(0)
        a, b = (case.head.pool(model, maps) for _ in range(2))
        left = ((a != 0) & (b != 0)).sum() / ((a != 0) | (b != 0)).sum()
        # of what is left in either draw a third is left in both: all without a dropout, a seventh after two
        assert 0.25 < left < 0.45, f"{left:.2f} of the features are in both draws"
        logits = [case.head.classify(model, maps, hidden) for hidden in (a, b)]
    assert not torch.equal(*logits), "the backbone's classifier reads all features"


def test_order_of_positions(case):
    """timm's own reshaping of the last level to NCHW is the map: both read tokens in the same order."""
    x = image(case.model)
    if case.head.layout == "NCHW":
        assert case.head.to_map(case.features, x.shape[-2:]) is case.features
        return
    with torch.no_grad():
        maps = case.head.to_map(case.model.forward_features(x), x.shape[-2:])
    levels = last_levels(case.model, x)
    assert any(torch.equal(level, maps) for level in levels), "tokens are read in another order than timm's"


WIDE = {
    "beit": (48, 96),
    "eva": (56, 112),
    "gemma4_vit": (48, 96),
    "hiera": (64, 128),
    "mlp_mixer": (48, 112),
    "naflexvit": (48, 96),
    "sequencer": (56, 112),
    "swin_transformer": (64, 128),
    "twins": (64, 128),
    "vision_transformer_relpos": (40, 88),
    "vit, patches pooled": (48, 112),
    "vitamin": (64, 96),
}


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("key", WIDE)
def test_inputs_that_are_not_square(key, turned):
    size = WIDE[key][::-1] if turned else WIDE[key]
    row = ROWS[key]
    model = build(row._replace(size=None), pretrained_cfg_overlay=dict(input_size=(3, *size)), img_size=size)
    head = inspect_head(model)
    for path in head.modules:
        randomize(model.get_submodule(path))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = head.to_map(model.forward_features(x), size)
        levels = last_levels(model, x)
        maps = head.response_maps(model, features)
        logits = model(x)
    assert any(torch.equal(level, features) for level in levels), "tokens are read in another order than timm's"
    assert (features.shape[2] < features.shape[3]) is not turned, "the map lies the other way than the image"
    assert (maps.mean((2, 3)) - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize(
    ("size", "cells"), [((96, 32), (6, 2)), ((100, 40), (6, 2)), ((272, 204), (17, 12)), ((34, 31), (2, 1))]
)
def test_grid_of_inputs_that_patches_do_not_fill(size, cells, turned):
    """Patches of 16 pixels leave a rest at the border, so the grid's shape is the image's only roughly."""
    size, cells = (size[::-1], cells[::-1]) if turned else (size, cells)
    head = inspect_head(build(ROWS["vision_transformer_relpos"]))
    tokens = torch.zeros(1, cells[0] * cells[1], head.width)
    assert head.to_map(tokens, size).shape[2:] == cells


def test_tokens_that_fill_no_grid():
    model = build(ROWS["vit, patches pooled"])
    with pytest.raises(ValueError, match="5 tokens don't fill a grid of the shape of a 64×64 image"):
        inspect_head(model).to_map(torch.zeros(1, 5 + 1, 96), (64, 64))


@pytest.mark.parametrize("method", ["forward_features", "forward_head", "get_classifier", "reset_classifier"])
def test_modules_without_timms_interface(method):
    model = build(ROWS["resnet"])
    setattr(model, method, None)
    with pytest.raises(NoResponseMap, match=rf"test_resnet has no {method}\(\)"):
        inspect_head(model)


def test_backbone_without_classes():
    model = build(ROWS["resnet"])
    model.reset_classifier(0)
    with pytest.raises(NoResponseMap, match="no linear classifier"):
        inspect_head(model)
