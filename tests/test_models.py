"""The six networks are torchvision's, weight for weight and number for number."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import ARCHS, BatchNorm2d, DepthwiseConv2d, Encoder, build_backbone, multiply_adds

THEIRS = {"mobilenetv3_large": ("mobilenet_v3_large", "classifier.3."), "mobilenetv3_small": ("mobilenet_v3_small", "classifier.3."),
          "efficientnet_b0": ("efficientnet_b0", "classifier.1."), "resnet18": ("resnet18", "fc."),
          "resnet34": ("resnet34", "fc."), "resnet50": ("resnet50", "fc.")}


def pair(arch):
    """Ours and torchvision's without dropout and with the same random weights, affine terms and statistics."""
    torch.manual_seed(0)
    name, final = THEIRS[arch]
    extra = dict(dropout=0.0, stochastic_depth_prob=0.0) if arch == "efficientnet_b0" else {}
    theirs = getattr(torchvision.models, name)(**extra)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.2), nn.init.normal_(layer.bias, 0, 0.2)
            nn.init.normal_(layer.running_mean, 0, 0.2), nn.init.uniform_(layer.running_var, 0.5, 2)
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    ours = build_backbone(arch)
    unmatched = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unmatched.missing_keys and all(k.startswith(final) for k in unmatched.unexpected_keys)
    assert set(unmatched.unexpected_keys) == {final + "weight", final + "bias"}
    setattr(theirs, *("fc", nn.Identity())) if final == "fc." else theirs.classifier.__setitem__(int(final[-2]), nn.Identity())
    return ours, theirs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_features_are_torchvisions(arch, training):
    ours, theirs = (net.train(training) for net in pair(arch))
    x = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    assert a.shape == (4, ours.feature_dim)
    assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_load_back_into_torchvision(arch):
    name, final = THEIRS[arch]
    theirs = getattr(torchvision.models, name)()
    unmatched = theirs.load_state_dict(build_backbone(arch).state_dict(), strict=False)
    assert not unmatched.unexpected_keys and set(unmatched.missing_keys) == {final + "weight", final + "bias"}


@pytest.mark.parametrize("arch, parameters, madds", [
    ("mobilenetv3_large", 5483032, 0.22), ("mobilenetv3_small", 2542856, 0.06), ("efficientnet_b0", 5288548, 0.39),
    ("resnet18", 11689512, 1.81), ("resnet34", 21797672, 3.66), ("resnet50", 25557032, 4.09)])
def test_size_with_a_1000_class_layer(arch, parameters, madds):
    net = build_backbone(arch).to("meta")
    assert sum(p.numel() for p in net.parameters()) + 1000 * net.feature_dim + 1000 == parameters
    assert round((multiply_adds(net) + 1000 * net.feature_dim) / 1e9, 2) == madds


def test_multiply_adds_of_layers_done_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Flatten(), nn.Linear(128, 5))
    assert multiply_adds(net, 8) == 4 * 4 * 8 * 27 + 4 * 4 * 8 * 9 + 128 * 5


@pytest.mark.parametrize("arch", ARCHS)
def test_small_images_keep_four_times_the_resolution_and_every_shape_but_resnets_stem(arch):
    small, large = build_backbone(arch, small_images=True), build_backbone(arch)
    shapes = lambda net: {k: v.shape for k, v in net.state_dict().items()}
    different = {k for k in shapes(large) if shapes(large)[k] != shapes(small)[k]}
    assert different == ({"conv1.weight"} if arch.startswith("resnet") else set())
    for net, size in ((small, 32), (small, 64), (large, 128)):
        sides = []
        last = net.layer4 if arch.startswith("resnet") else net.features
        hook = last.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
        assert net.eval()(torch.zeros(1, 3, size, size)).shape == (1, net.feature_dim)
        hook.remove()
        assert sides == [size // (32 if net is large else 8)]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_residual_branches_start_at_zero(arch):
    net = build_backbone(arch)
    last = "bn2" if arch == "resnet18" else "bn3"
    assert all((b.weight == 0).all() for name, b in net.named_modules() if name.endswith(last) and name.startswith("layer"))


def test_batch_norm_momentum_and_eps():
    for arch in ARCHS:
        layers = [m for m in build_backbone(arch).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {m.momentum for m in layers} == {0.1}
        assert {m.eps for m in layers} == {1e-3 if arch.startswith("mobilenet") else 1e-5}


def test_slices_are_normalised_on_their_own_and_statistics_move_once_to_the_mean_over_them():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64) * 3 + 1
    sliced, plain = BatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    sliced.slice_size = 4
    nn.init.uniform_(sliced.running_mean), nn.init.uniform_(sliced.running_var)
    mean, var = sliced.running_mean.clone(), sliced.running_var.clone()
    out = sliced(x)
    torch.testing.assert_close(out, torch.cat([plain(part) for part in x.split(4)]))
    parts = x.view(3, 4, 5, 4, 4).transpose(1, 2).flatten(2)                     # (slices, channels, values)
    torch.testing.assert_close(sliced.running_mean, 0.9 * mean + 0.1 * parts.mean(2).mean(0))
    torch.testing.assert_close(sliced.running_var, 0.9 * var + 0.1 * parts.var(2).mean(0))
    assert not torch.allclose(out, plain(x))
    torch.testing.assert_close(sliced.eval()(x), F.batch_norm(x, sliced.running_mean, sliced.running_var))


def test_the_compiled_formula_is_the_loop_over_slices():
    torch.manual_seed(0)
    x = (torch.randn(12, 5, 4, 4, dtype=torch.float64) * 3 + 1).requires_grad_()
    upstream = torch.randn_like(x)
    loop, formula = BatchNorm2d(5).double(), BatchNorm2d(5).double()
    results = []
    for layer, forward in ((loop, loop), (formula, torch.compile(formula, backend="eager", fullgraph=True))):
        layer.slice_size = 4
        nn.init.constant_(layer.weight, 0.7), nn.init.constant_(layer.bias, 0.2)
        out = forward(x)
        results.append([out, *torch.autograd.grad(out, (x, layer.weight, layer.bias), upstream), *layer.buffers()])
    assert not torch.equal(results[0][0], results[1][0])      # else both went one way
    torch.testing.assert_close(*results)


def test_a_new_network_is_one_line_and_a_foreign_batch_norm_is_refused_with_slices(monkeypatch):
    class Foreign(nn.Sequential):
        feature_dim = 4

    def build(small_images):
        return Foreign(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(ARCHS, "foreign", build)
    assert Encoder("foreign", dim=8, hidden_dim=0)(torch.randn(2, 3, 8, 8)).shape == (2, 8)
    with pytest.raises(ValueError, match="BatchNorm2d knows no slices"):
        Encoder("foreign", slice_size=2)


@pytest.mark.parametrize("hidden", [0, 24])
def test_encoder_gives_unit_rows_and_its_slices_do_not_see_each_other(hidden):
    torch.manual_seed(0)
    encoder = Encoder("mobilenetv3_small", dim=16, hidden_dim=hidden, small_images=True, slice_size=4)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        out = encoder(x)
        changed = encoder(torch.cat([x[:4], torch.randn(4, 3, 32, 32)]))
    assert out.shape == (8, 16)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(out[:4], changed[:4])
    assert (out[4:] - changed[4:]).abs().max() > 1e-3


def test_unknown_arch_is_named():
    with pytest.raises(ValueError, match="mobilenetv9.*resnet18"):
        build_backbone("mobilenetv9")


@pytest.mark.parametrize("height, width, kernel", [(4, 4, 5), (2, 2, 5), (1, 3, 5), (2, 2, 3)])
def test_depthwise_gradients_on_maps_narrower_than_the_kernel(height, width, kernel):
    torch.manual_seed(0)
    conv = DepthwiseConv2d(7, kernel, 1).double().to(memory_format=torch.channels_last)
    x, upstream = torch.randn(6, 7, height, width).double().requires_grad_(), torch.randn(6, 7, height, width).double()
    ours, theirs = conv(x), F.conv2d(x, conv.weight, None, 1, kernel // 2, 1, 7)
    assert "NarrowDepthwise" in type(ours.grad_fn).__name__
    wanted = torch.autograd.grad(theirs, (x, conv.weight), upstream)
    found = torch.autograd.grad(ours, (x, conv.weight), upstream)
    torch.testing.assert_close(found, wanted)
    assert found[1].stride() == conv.weight.stride()          # DistributedDataParallel warns otherwise
