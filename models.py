"""Six image networks written by hand, and the encoder that pretraining trains.

    python models.py          # the size table: parameters and multiply-adds, counted

Parameter names, shapes and outputs are torchvision's (for large images), so that weights travel
both ways; only torchvision's last layer, the one for 1000 classes, has no counterpart here. A
network ends in its feature: after pooling for ResNet and EfficientNet; after the last hidden layer
(960 -> 1280 or 576 -> 1024) and its hard-swish for MobileNetV3. No dropout, no stochastic depth.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Encoder(nn.Module):
    """Backbone, projection head, unit length: (N, 3, H, W) -> (N, dim).

    The head is Linear, ReLU, Linear (MoCo v2, arXiv 2003.04297); `hidden_dim=0` makes it one
    linear layer (MoCo v1). It is thrown away after pretraining. In training, batch norm takes
    each `slice_size` images (None: the whole batch) on their own.
    """

    def __init__(self, arch, dim=128, hidden_dim=2048, small_images=False, slice_size=None):
        super().__init__()
        self.backbone = build_backbone(arch, small_images)
        width = self.backbone.feature_dim
        if hidden_dim == 0:
            self.head = nn.Linear(width, dim)
        else:
            hidden = nn.Linear(width, hidden_dim)
            self.head = nn.Sequential(hidden, nn.ReLU(), nn.Linear(hidden_dim, dim))
        for layer in self.modules():
            if isinstance(layer, BatchNorm2d):
                layer.slice_size = slice_size
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and slice_size:
                raise ValueError(f"{type(layer).__name__} knows no slices: use models.BatchNorm2d")
            elif isinstance(layer, nn.Linear):
                # Ours. MobileNetV3's last layer starts small: beside random biases in the head its
                # feature would hardly count, and all embeddings would start in a narrow cone.
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):                                     # (N, 3, H, W)
        z = self.head(self.backbone(x))                       # (N, dim)
        wide = torch.promote_types(z.dtype, torch.float32)    # bf16 has but three digits
        return F.normalize(z.to(wide), dim=1)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises each `slice_size` images on their own, as if each
    slice lay on a GPU of its own (None: one slice, ordinary batch norm).

    The running statistics move once a forward, towards the mean over the slices. The convolutions
    keep their full batch: on a CPU up to 2 x faster than a loop around the whole network.
    Momentum is torch's 0.1; torchvision's for MobileNetV3, 0.01, would lag behind a short run.
    """
    slice_size = None

    def forward(self, x):                                     # (N, C, H, W)
        if not self.training or self.slice_size in (None, len(x)):     # one slice needs no copies
            return self.normalize(x, self.momentum)
        if torch.compiler.is_compiling():
            return self.normalize_compiled(x)
        slices = x.split(self.slice_size)
        out = []
        for i, part in enumerate(slices, start=1):
            # With these momenta every slice ends up with the weight momentum / len(slices), so
            # that all updates together equal one by the slices' mean.
            m = self.momentum / (len(slices) - self.momentum * (len(slices) - i))
            out.append(self.normalize(part, m))
        return torch.cat(out)

    def normalize(self, x, momentum):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training, momentum, self.eps)

    def normalize_compiled(self, x):
        """The loop's result in one formula, which compiles in a minute; the loop takes many."""
        parts = x.unflatten(0, (-1, self.slice_size))         # (slices, n, C, H, W)
        parts = parts.to(self.weight.dtype)                   # float32, also under autocast
        var, mean = torch.var_mean(parts, (1, 3, 4), correction=0, keepdim=True)
        count = parts[0, :, 0].numel()                        # values a channel and slice
        with torch.no_grad():
            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
            self.running_var.lerp_(unbiased.mean(0).flatten(), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight.view(-1, 1, 1)
        out = parts * scale + (self.bias.view(-1, 1, 1) - mean * scale)
        return out.flatten(0, 1).to(x.dtype)


# ------------------------------------------------- pieces of the networks

def conv(c_in, c_out, kernel, stride=1):
    """A convolution that changes the resolution by `stride` alone."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def conv_bn(convolution, act=None):
    """Convolution, batch norm, activation."""
    layers = [convolution, BatchNorm2d(convolution.out_channels)]
    if act:
        layers.append(act())
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the means of all (arXiv 1709.01507)."""

    def __init__(self, channels, squeezed, act, gate):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.act = act()
        self.gate = gate()

    def forward(self, x):                                     # (N, C, H, W)
        means = x.mean((2, 3), keepdim=True)                  # (N, C, 1, 1)
        return x * self.gate(self.fc2(self.act(self.fc1(means))))


class InvertedResidual(nn.Module):
    """Expand 1x1, filter each channel k x k, squeeze-excite, project 1x1 without activation.

    The one block of MobileNetV3 (arXiv 1905.02244, section 3) and EfficientNet-B0 (arXiv
    1905.11946, table 1). `squeeze` is a SqueezeExcite or None. The input is added where the shape
    stays the same.
    """

    def __init__(self, c_in, expanded, c_out, kernel, stride, act, squeeze):
        super().__init__()
        layers = []
        if expanded != c_in:
            layers.append(conv_bn(conv(c_in, expanded, 1), act))
        layers.append(conv_bn(DepthwiseConv2d(expanded, kernel, stride), act))
        if squeeze:
            layers.append(squeeze)
        layers.append(conv_bn(conv(expanded, c_out, 1)))
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        out = self.block(x)
        return x + out if out.shape == x.shape else out


def keep_resolution(net):
    """For small images: the first two strides of 2 become 1, and 32 px keep a map of 4 x 4."""
    strided = [layer for layer in net.modules()
               if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    for layer in strided[:2]:
        layer.stride = (1, 1)


# ------------------------------------------------- MobileNetV3

# SE: channels of the squeeze, a quarter of exp in torchvision's rounding to eights; 0: none.
HSWISH, RELU = nn.Hardswish, nn.ReLU
MOBILENETV3_LARGE = [     # arXiv 1905.02244, table 1
    # k, exp,  out,   SE,  act,    s
    (3,   16,   16,    0,  RELU,   1),
    (3,   64,   24,    0,  RELU,   2),
    (3,   72,   24,    0,  RELU,   1),
    (5,   72,   40,   24,  RELU,   2),
    (5,  120,   40,   32,  RELU,   1),
    (5,  120,   40,   32,  RELU,   1),
    (3,  240,   80,    0,  HSWISH, 2),
    (3,  200,   80,    0,  HSWISH, 1),
    (3,  184,   80,    0,  HSWISH, 1),
    (3,  184,   80,    0,  HSWISH, 1),
    (3,  480,  112,  120,  HSWISH, 1),
    (3,  672,  112,  168,  HSWISH, 1),
    (5,  672,  160,  168,  HSWISH, 2),
    (5,  960,  160,  240,  HSWISH, 1),
    (5,  960,  160,  240,  HSWISH, 1),
]
MOBILENETV3_SMALL = [     # arXiv 1905.02244, table 2
    # k, exp,  out,   SE,  act,    s
    (3,   16,   16,    8,  RELU,   2),
    (3,   72,   24,    0,  RELU,   2),
    (3,   88,   24,    0,  RELU,   1),
    (5,   96,   40,   24,  HSWISH, 2),
    (5,  240,   40,   64,  HSWISH, 1),
    (5,  240,   40,   64,  HSWISH, 1),
    (5,  120,   48,   32,  HSWISH, 1),
    (5,  144,   48,   40,  HSWISH, 1),
    (5,  288,   96,   72,  HSWISH, 2),
    (5,  576,   96,  144,  HSWISH, 1),
    (5,  576,   96,  144,  HSWISH, 1),
]


class MobileNetV3(nn.Module):
    """(N, 3, H, W) -> (N, feature_dim): stem, the table's blocks, 1x1, pool, one hidden layer."""

    def __init__(self, table, feature_dim, small_images=False):
        super().__init__()
        self.feature_dim = feature_dim
        channels = 16
        layers = [conv_bn(conv(3, channels, 3, stride=2), HSWISH)]
        for kernel, expanded, out, squeezed, act, stride in table:
            squeeze = None
            if squeezed:
                squeeze = SqueezeExcite(expanded, squeezed, RELU, nn.Hardsigmoid)
            block = InvertedResidual(channels, expanded, out, kernel, stride, act, squeeze)
            layers.append(block)
            channels = out
        layers.append(conv_bn(conv(channels, 6 * channels, 1), HSWISH))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(6 * channels, feature_dim), HSWISH())
        for layer in self.modules():
            if isinstance(layer, BatchNorm2d):
                layer.eps = 1e-3     # torchvision's; elsewhere torch's 1e-5
        if small_images:
            keep_resolution(self)
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        x = self.features(x)                                  # (N, 960 or 576, H/32, W/32)
        return self.classifier(x.mean((2, 3)))                # (N, 1280 or 1024)


# ------------------------------------------------- EfficientNet-B0

EFFICIENTNET_B0 = [       # arXiv 1905.11946, table 1, stages 2 to 8
    # expand, k, s, out, repeats
    (1, 3, 1, 16,  1),
    (6, 3, 2, 24,  2),
    (6, 5, 2, 40,  2),
    (6, 3, 2, 80,  3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


class EfficientNet(nn.Module):
    """(N, 3, H, W) -> (N, 1280): stem, the table's stages, 1x1 convolution, pool."""
    feature_dim = 1280

    def __init__(self, table, small_images=False):
        super().__init__()
        act = nn.SiLU
        channels = 32
        stages = [conv_bn(conv(3, channels, 3, stride=2), act)]
        for ratio, kernel, stride, out, repeats in table:
            blocks = []
            for _ in range(repeats):
                expanded = ratio * channels
                # The squeeze is a quarter of the block's input, not of its expanded width.
                squeeze = SqueezeExcite(expanded, channels // 4, act, nn.Sigmoid)
                block = InvertedResidual(channels, expanded, out, kernel, stride, act, squeeze)
                blocks.append(block)
                channels, stride = out, 1
            stages.append(nn.Sequential(*blocks))
        stages.append(conv_bn(conv(channels, self.feature_dim, 1), act))
        self.features = nn.Sequential(*stages)
        if small_images:
            keep_resolution(self)
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        return self.features(x).mean((2, 3))                  # (N, 1280)


# ------------------------------------------------- ResNet

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip (arXiv 1512.03385, figure 5 left)."""
    expansion = 1

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = conv(c_in, width, 3, stride)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = BatchNorm2d(width)
        self.downsample = shortcut(c_in, width, stride)
        # The branch starts at zero (arXiv 1706.02677, section 5.1), as in [Light]'s code.
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a skip (figure 5 right; the stride in the 3x3)."""
    expansion = 4

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.bn3 = BatchNorm2d(4 * width)
        self.downsample = shortcut(c_in, 4 * width, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


def shortcut(c_in, c_out, stride):
    """The identity where the shape stays the same, else a 1x1 convolution and batch norm."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return conv_bn(conv(c_in, c_out, 1, stride))


class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, 512 * expansion): stem, four stages, pool (arXiv 1512.03385, table 1)."""

    def __init__(self, block, depths, small_images=False):
        super().__init__()
        if small_images:
            self.conv1 = conv(3, 64, 3)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = conv(3, 64, 7, stride=2)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = BatchNorm2d(64)
        channels, width, stride = 64, 64, 1
        stages = []
        for depth in depths:
            blocks = []
            for _ in range(depth):
                blocks.append(block(channels, width, stride))
                channels, stride = width * block.expansion, 1
            stages.append(nn.Sequential(*blocks))
            width, stride = 2 * width, 2
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.feature_dim = channels
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)))                   # (N, 64, H/2, W/2)
        x = self.maxpool(x)                                   # (N, 64, H/4, W/4)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)                                    # (N, 512 or 2048, H/32, W/32)
        return x.mean((2, 3))


# ------------------------------------------------- all six

ARCHS = {
    "mobilenetv3_large": partial(MobileNetV3, MOBILENETV3_LARGE, 1280),
    "mobilenetv3_small": partial(MobileNetV3, MOBILENETV3_SMALL, 1024),
    "efficientnet_b0": partial(EfficientNet, EFFICIENTNET_B0),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}


def build_backbone(arch, small_images=False):
    """A network of `ARCHS` with fresh weights: (N, 3, H, W) -> (N, .feature_dim).

    `small_images` (for 64 px and less): ResNet gets a 3x3 stem of stride 1 without max-pool; the
    others take their first two strides of 2 as 1. Raises ValueError for an unknown name.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    return ARCHS[arch](small_images=small_images)


def init_weights(net):
    """torchvision's: convolutions normal with variance 2 / fan_out (arXiv 1502.01852), linear
    layers (MobileNetV3's) with deviation 0.01, biases zero."""
    for name, weight in net.named_parameters():
        if weight.ndim == 4:
            nn.init.kaiming_normal_(weight, mode="fan_out")
        elif weight.ndim == 2:
            nn.init.normal_(weight, 0, 0.01)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)


@torch.no_grad()
def multiply_adds(net, size=224):
    """Multiplications in the convolutions and linear layers for one `size` x `size` image."""
    like = next(net.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        net.eval()(like.new_zeros(1, 3, size, size))
    return counter.get_total_flops() // 2                     # it counts the additions too


def print_sizes():
    """All networks with a layer for 1000 classes, at 224 px: torchvision documents the same."""
    print("with a 1000-class layer, at 224 px")
    print("arch                 feature dim  parameters (M)  multiply-adds (G)")
    for arch in ARCHS:
        net = build_backbone(arch)
        whole = nn.Sequential(net, nn.Linear(net.feature_dim, 1000)).to("meta")
        parameters = sum(p.numel() for p in whole.parameters()) / 1e6
        madds = multiply_adds(whole) / 1e9
        print(f"{arch:20s}{net.feature_dim:12d}{parameters:16.2f}{madds:19.2f}")


# ------------------------------------------------- faster on a CPU
#
# What it buys: a whole training step of MobileNetV3-Small at 32 px takes 1.4 x as long without
# it. torch's own weight gradient of a depthwise convolution is slow where the map is narrower
# than the kernel (as slow as 30 forwards), and in bf16. On a GPU, or without gradient, this is an
# ordinary convolution.

class DepthwiseConv2d(nn.Conv2d):
    """One k x k filter a channel."""

    def __init__(self, channels, kernel, stride):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels,
                         bias=False)

    def forward(self, x):                                     # (N, C, H, W)
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            x = x.to(self.weight.dtype)
            if self.stride[0] == 1 and max(x.shape[2:]) < self.kernel_size[0]:
                return NarrowDepthwise.apply(x, self.weight)
            return super().forward(x)


class NarrowDepthwise(torch.autograd.Function):
    """Depthwise k x k convolution, stride 1, of maps narrower than k, with its own gradient.

    The gradient of a tap of the filter is the sum of input * output gradient over all pairs of
    positions that the tap connects. So: first all pairs of positions, which are few, by one
    matrix product a channel; then, for each tap, the sum of the pairs at its distance.
    """

    @staticmethod
    def forward(ctx, x, weight):                              # (N, C, H, W), (C, 1, k, k)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient):                              # (N, C, H, W)
        x, weight = ctx.saved_tensors
        _, c, h, w = x.shape
        k = weight.shape[2]
        for_x = torch.nn.grad.conv2d_input(x.shape, weight, gradient, padding=k // 2, groups=c)
        pairs = torch.einsum("nci,nco->cio", x.flatten(2), gradient.flatten(2))   # (C, HW, HW)
        # Images with a single 1 show which tap t connects input position i with output position o.
        units = torch.eye(h * w, dtype=x.dtype).view(-1, 1, h, w)
        taps = F.unfold(units, k, padding=k // 2)             # (i, t, o): 1 where it does, else 0
        sums = torch.einsum("cio,ito->ct", pairs, taps)
        # With the strides of the weight, or DistributedDataParallel warns.
        for_weight = torch.empty_like(weight).copy_(sums.view_as(weight))
        return for_x, for_weight


if __name__ == "__main__":
    print_sizes()
