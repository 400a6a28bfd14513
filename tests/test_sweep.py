"""Every torchvision classifier and a sample of every timm family: found, planned, replaced, run."""

from __future__ import annotations

import copy
import gc
import zlib
from collections import Counter

import pytest
import timm
import torch
import torch.fx
import torchvision
from timm.models import list_models as timm_names
from torch import nn

from lcc.calibrate import calibrate_
from lcc.counts import count_macs
from lcc.errors import NothingToConvertError
from lcc.methods.linear_mix import LinearMix
from lcc.methods.reaction_diffusion import RdExplicit
from lcc.plan import make_plan, rules_for
from lcc.specs import Cost
from lcc.surgery import find_sites, replace_

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(600)]

TORCHVISION = tuple(torchvision.models.list_models(module=torchvision.models))
# The smallest of each family, with convolutions that LinearMix can take where the family has any.
TIMM_NAMES = """
    beit_base_patch16_224 lambda_resnet26t test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    convnext_zepto_rms_ols cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deit_tiny_patch16_224 densenetblur121d dla46x_c dpn48b edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 tf_efficientnetv2_b1 efficientvim_m1 efficientvit_l1 efficientvit_m0
    vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
    hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2
    inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout coatnet_0_224
    poolformerv2_s12 gmlp_ti16_224 mobilenetv4_conv_small mobilevit_xxs mvitv2_tiny nasnetalarge nest_tiny
    nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 rdnet_tiny regnetx_080 repghostnet_050
    repvit_m1 res2net50_14w_8s resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
    sequencer2d_s shvit_s1 skresnet18 starnet_s2 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
    twins_svt_small vgg11 visformer_tiny test_vit vit_small_resnet50d_s16_224 test_vit_relpos
    vitamin_small_224 volo_d1_224 ese_vovnet19b_slim legacy_xception xception41p xcit_nano_12_p8_224 resnet18
    resnet26t resnet50_gn resnetaa50 ecaresnet26t seresnet50 resnext50_32x4d resnetblur18 resnetrs50
    resnetv2_50 resnetv2_50d_gn resnetv2_50x1_bit vgg11_bn dla34 darknet53 cspresnet50 cspdarknet53 repvgg_a0
    gernet_s mobileone_s0 regnety_004 regnetz_b16 densenet121 hrnet_w18_small_v2 nf_resnet26 eca_nfnet_l0
    nf_regnet_b0 botnet26t_256 halonet26t bat_resnext26ts gcresnext26ts efficientnet_b0 efficientnetv2_rw_t
    efficientnet_cc_b0_4e tf_efficientnet_b0 tf_efficientnet_lite0 mixnet_s mnasnet_100 fbnetc_100
    spnasnet_100 mobilenetv2_100 mobilenetv3_small_050 tf_mixnet_s edgenext_x_small ghostnetv2_100 xception65
    res2next50 seresnextaa101d_32x8d resnest26d selecsls60b
"""
TIMM = tuple(TIMM_NAMES.split())
# Small enough to be calibrated here too: each way to normalise, activate and join branches at least once.
CALIBRATED_NAMES = """
    resnet18 test_resnet resnetv2_18 resnet50_gn test_byobnet densenetblur121d cs3darknet_focus_s dla34
    skresnet18 ese_vovnet19b_slim hrnet_w18_small res2net50_14w_8s hgnetv2_b0 fasternet_t0 selecsls42
    legacy_seresnet18 resnest26d repvgg_a0 mobilenetv4_conv_small tf_efficientnetv2_b1 efficientnetv2_rw_t
    mobilevit_xxs starnet_s2 inception_v3 lambda_resnet26t gernet_s tresnet_m
    vit_small_resnet50d_s16_224
"""
CALIBRATED = tuple(CALIBRATED_NAMES.split())
TRACED = (
    "resnet18", "resnext50_32x4d", "densenet121", "googlenet", "inception_v3", "mobilenet_v2",
    "mobilenet_v3_small", "shufflenet_v2_x1_0", "regnet_y_400mf", "efficientnet_b0", "mnasnet1_0", "vgg11_bn",
)  # fmt: skip
EVERYTHING = LinearMix(change_channels=True)
SIZE = 96


def timm_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    cfg = model.default_cfg
    low = max(cfg.get("min_input_size", (3, SIZE, SIZE))[1:])
    size = cfg["input_size"][1] if cfg.get("fixed_input_size") else max(SIZE, low)
    return model, torch.randn(1, 3, size, size)


def torchvision_model(name):
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra).eval()
    size = 224 if name.startswith(("vit", "maxvit")) else SIZE
    return model, torch.randn(1, 3, size, size)


def checksum(tensor):
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def fingerprint(model):
    """Return what finding sites must leave alone: every bit, every flag, every layout, every hook."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {
            n: zlib.crc32(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            for n, t in tensors.items()
        },
        {n: (t.stride(), t.dtype, t.requires_grad) for n, t in tensors.items()},
        {n: m.training for n, m in model.named_modules()},
        {n: [len(v) for k, v in vars(m).items() if "hooks" in k] for n, m in model.named_modules()},
        torch.get_rng_state().tolist(),
    )


def shapes(output):
    if isinstance(output, torch.Tensor):
        return tuple(output.shape)
    values = output.values() if isinstance(output, dict) else output
    return [shapes(value) for value in values]


@torch.no_grad()
def expected_sites(model, x):
    """Return the names of the convolutions that LinearMix should take, told from their attributes alone."""
    called = set()
    handles = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in model.modules()]
    model(x)
    for handle in handles:
        handle.remove()
    return {
        name
        for name, m in model.named_modules()
        if type(m) is nn.Conv2d and m in called and m.groups == 1 and m.kernel_size != (1, 1)
        and all(k % 2 for k in m.kernel_size) and m.out_channels % m.in_channels == 0 and m.in_channels > 1
    }  # fmt: skip


@torch.no_grad()
def sweep(model, x):
    """Find, plan, replace, run; return how many sites were converted."""
    wanted, before = shapes(model(x)), fingerprint(model)
    sites = find_sites(model, x)
    assert fingerprint(model) == before
    convs = {s.name for s in sites if s.kind == "conv"}
    assert convs == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    blocks_cost_what_they_do(model, sites)
    runs_without_its_steps(model, x, sites)
    expected = expected_sites(model, x)
    try:
        plan = make_plan(sites, rules_for(EVERYTHING))
    except NothingToConvertError:
        assert not expected
        return 0
    assert set(plan.methods()) == expected
    originals = replace_(model, plan)
    assert originals.keys() == expected
    assert shapes(model(x)) == wanted
    return len(originals)


def blocks_cost_what_they_do(model, sites):
    for site in sites:
        if site.kind != "conv" and site.obstacle is None:
            block, size = model.get_submodule(site.name), site.sizes[0]
            counted = count_macs(block, torch.zeros(1, site.spec.channels_in, size.height, size.width))
            params = sum(p.numel() for p in block.parameters())
            assert site.spec.cost(size) == Cost(params=params, macs=counted.macs)
            assert not counted.uncounted


@torch.no_grad()
def runs_without_its_steps(model, x, sites):
    """Replace every residual step, run, and put them back."""
    try:
        plan = make_plan(sites, rules_for(RdExplicit(kernel_size=3)))
    except NothingToConvertError:
        return
    wanted = shapes(model(x))
    originals = {model.get_submodule(name): block for name, block in replace_(model, plan).items()}
    assert shapes(model(x)) == wanted
    for parent in list(model.modules()):  # a copy of the largest networks would not fit
        for key, child in parent.named_children():
            if child in originals:
                setattr(parent, key, originals[child])


def test_the_lists_name_what_there_is():
    assert len(TORCHVISION) >= 80
    assert len(set(TIMM)) == len(TIMM) >= 130
    assert set(CALIBRATED) <= set(TIMM) <= set(timm_names())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    sweep(*torchvision_model(name))
    gc.collect()


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    sweep(*timm_model(name))
    gc.collect()


# Blocks with an identity skip, blocks that change the stage and can be described, and blocks in all, by the
# architectures' depths. Of resnetaa50's, three pool inside.
BLOCKS = {
    "resnet18": (5, 3, 8),
    "resnet26t": (4, 4, 8),
    "resnet50_gn": (12, 4, 16),
    "resnetaa50": (12, 1, 16),
    "seresnet50": (12, 4, 16),
    "resnext50_32x4d": (12, 4, 16),
    "resnetv2_50": (12, 4, 16),
    "regnety_004": (12, 4, 16),
    "regnetx_080": (19, 4, 23),
    "darknet53": (23, 0, 23),
    "efficientnet_b0": (9, 6, 15),
    "mobilenetv2_100": (10, 6, 16),
    "coatnet_0_224": (3, 2, 12),
    "botnet26t_256": (2, 3, 8),
    "vit_tiny_patch16_dinov3_qkvb": (0, 0, 12),
    "convmixer_768_32": (32, 0, 32),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_as_many_blocks_are_found_as_the_architecture_has(name):
    blocks = [site for site in find_sites(*timm_model(name)) if site.kind != "conv"]
    free = Counter(site.kind for site in blocks if site.obstacle is None)
    assert (free["step"], free["transition"], len(blocks)) == BLOCKS[name]


@pytest.mark.parametrize(("name", "dearer"), [("convmixer_768_32", 32), ("resnet50_gn", 2)])
def test_steps_that_would_be_dearer_are_refused(name, dearer):
    # A ConvMixer's residual holds its depthwise convolution alone, and the 256-channel bottlenecks of a
    # ResNet-50 256 * 64 + 9 * 64 * 64 + 64 * 256 MACs a pixel against 256 * 256 + 18 * 256.
    sites = find_sites(*timm_model(name))
    reasons = [site.why_not(RdExplicit()) or "" for site in sites if site.kind == "step"]
    assert sum("would not be cheaper" in reason for reason in reasons) == dearer


def norms_of_graph(model):
    """Return each convolution's BatchNorm if the traced graph shows no other user on either side."""
    graph = torch.fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    return {
        node.target: user.target
        for node in nodes
        for user in node.users
        if type(modules[node.target]) is nn.Conv2d
        and len(node.users) == 1
        and user.op == "call_module"
        and isinstance(modules[user.target], nn.BatchNorm2d)
        and calls[node.target] == calls[user.target] == 1
    }


@pytest.mark.parametrize("name", TRACED)
def test_norms_are_those_that_the_traced_graph_shows(name):
    model, x = torchvision_model(name)
    found = {site.name: site.norm for site in find_sites(model, x) if site.norm}
    assert found == norms_of_graph(model)
    assert found


@pytest.mark.parametrize("name", CALIBRATED)
@torch.no_grad()
def test_calibration_keeps_both_streams_apart(name):
    model, x = timm_model(name)
    images = torch.nn.functional.avg_pool2d(torch.randn(6, *x.shape[1:]), 5, 1, 2) * 4
    sites = find_sites(model, x)
    original, outputs = copy.deepcopy(model), []
    originals = replace_(model, make_plan(sites, rules_for(LinearMix())))
    handle = model.register_forward_hook(lambda _m, _x, y: outputs.append(y))
    fits = calibrate_(model, originals, sites, images).fits
    handle.remove()
    assert fits.keys() == originals.keys()
    first, second = outputs[-1].chunk(2)
    scale = first.abs().max()
    torch.testing.assert_close(first / scale, original(images) / scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(second / scale, model(images) / scale, rtol=0, atol=1e-3)
