"""Six image networks written by hand, and the encoder that pretraining trains.

    python models.py          # the size table: parameters and multiply-adds, counted

Parameter names, shapes and numerics are torchvision's, so that weights travel both ways; only
torchvision's last layer, the one for 1000 classes, has no counterpart here. A network ends in its
feature: after pooling for ResNet and EfficientNet; after the last hidden layer (960 -> 1280 or
576 -> 1024) and its hard-swish for MobileNetV3. No dropout, no stochastic depth.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


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
            self.head = nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU(inplace=True),
                                      nn.Linear(hidden_dim, dim))
        for layer in self.modules():
            if isinstance(layer, BatchNorm2d):
                layer.slice_size = slice_size
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and slice_size:
                raise ValueError(f"{type(layer).__name__} knows no slices: use models.BatchNorm2d")
            elif isinstance(layer, nn.Linear):
                # Ours. With torch's random biases all embeddings would start in a narrow cone
                # behind MobileNetV3's last layer, whose weights are small.
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):                                     # (N, 3, H, W)
        z = self.head(self.backbone(x))                       # (N, dim)
        wide = torch.promote_types(z.dtype, torch.float32)    # bf16 has three digits only
        return F.normalize(z.to(wide), dim=1)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises each `slice_size` images on their own, as if each
    slice lay on a GPU of its own (None: one slice, ordinary batch norm).

    The running statistics move once a forward, towards the mean over the slices. The convolutions
    keep their full batch: on a CPU up to 2 x faster than a loop around the whole network.
    """
    slice_size = None

    def __init__(self, channels, eps=1e-5):
        # Momentum 0.1 as in both papers' code; torchvision's 0.01 for MobileNetV3 lags behind.
        super().__init__(channels, eps, momentum=0.1)

    def forward(self, x):                                     # (N, C, H, W)
        if not self.training or self.slice_size is None:
            return self.normalize(x, self.momentum)
        if torch.compiler.is_compiling():
            return self.normalize_compiled(x)
        slices = x.split(self.slice_size)
        out = []
        for i, part in enumerate(slices, start=1):
            # With these momenta the updates of all slices equal one update by their mean.
            m = self.momentum / (len(slices) - self.momentum * (len(slices) - i))
            out.append(self.normalize(part, m))
        return torch.cat(out)

    def normalize(self, x, momentum):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training, momentum, self.eps)

    def normalize_compiled(self, x):
        """The same as one formula over all slices: compiles in a minute, the loop in many."""
        parts = x.unflatten(0, (-1, self.slice_size))         # (slices, n, C, H, W)
        wide = parts.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (1, 3, 4), correction=0, keepdim=True)
        count = wide[0].numel() / wide.shape[2]               # values a channel and slice
        with torch.no_grad():
            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
            self.running_var.lerp_(unbiased.mean(0).flatten(), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight.view(-1, 1, 1)
        out = wide * scale + (self.bias.view(-1, 1, 1) - mean * scale)
        return out.flatten(0, 1).to(x.dtype)


# ------------------------------------------------- pieces of the networks

def conv(c_in, c_out, kernel, stride=1):
    """A convolution that changes the resolution by `stride` alone."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def conv_bn(convolution, act=None, eps=1e-5):
    """Convolution, batch norm, activation."""
    layers = [convolution, BatchNorm2d(convolution.out_channels, eps)]
    if act:
        layers.append(act())
    return nn.Sequential(*layers)


def pool(x):
    """The mean over all positions: (N, C, H, W) -> (N, C)."""
    return x.mean((2, 3))


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
    1905.11946, table 1). `squeeze_excite` is None or (squeezed channels, act, gate). There is a
    skip connection where the shape stays the same.
    """

    def __init__(self, c_in, expanded, c_out, kernel, stride, act, squeeze_excite, eps):
        super().__init__()
        layers = []
        if expanded != c_in:
            layers.append(conv_bn(conv(c_in, expanded, 1), act, eps))
        layers.append(conv_bn(DepthwiseConv2d(expanded, kernel, stride), act, eps))
        if squeeze_excite:
            layers.append(SqueezeExcite(expanded, *squeeze_excite))
        layers.append(conv_bn(conv(expanded, c_out, 1), None, eps))
        self.block = nn.Sequential(*layers)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        out = self.block(x)
        return x + out if self.skip else out


def strides_of(strides, small_images):
    """For small images the first two strides of 2 become 1: 32 px keep a map of 4 x 4."""
    strides = list(strides)
    if small_images:
        for _ in range(2):
            strides[strides.index(2)] = 1
    return strides


# ------------------------------------------------- MobileNetV3

HSWISH, RELU = nn.Hardswish, nn.ReLU
MOBILENETV3_LARGE = [     # arXiv 1905.02244, table 1
    # k, exp,  out,  SE,    act,    s
    (3,  16,   16,   False, RELU,   1),
    (3,  64,   24,   False, RELU,   2),
    (3,  72,   24,   False, RELU,   1),
    (5,  72,   40,   True,  RELU,   2),
    (5,  120,  40,   True,  RELU,   1),
    (5,  120,  40,   True,  RELU,   1),
    (3,  240,  80,   False, HSWISH, 2),
    (3,  200,  80,   False, HSWISH, 1),
    (3,  184,  80,   False, HSWISH, 1),
    (3,  184,  80,   False, HSWISH, 1),
    (3,  480,  112,  True,  HSWISH, 1),
    (3,  672,  112,  True,  HSWISH, 1),
    (5,  672,  160,  True,  HSWISH, 2),
    (5,  960,  160,  True,  HSWISH, 1),
    (5,  960,  160,  True,  HSWISH, 1),
]
MOBILENETV3_SMALL = [     # arXiv 1905.02244, table 2
    # k, exp,  out,  SE,    act,    s
    (3,  16,   16,   True,  RELU,   2),
    (3,  72,   24,   False, RELU,   2),
    (3,  88,   24,   False, RELU,   1),
    (5,  96,   40,   True,  HSWISH, 2),
    (5,  240,  40,   True,  HSWISH, 1),
    (5,  240,  40,   True,  HSWISH, 1),
    (5,  120,  48,   True,  HSWISH, 1),
    (5,  144,  48,   True,  HSWISH, 1),
    (5,  288,  96,   True,  HSWISH, 2),
    (5,  576,  96,   True,  HSWISH, 1),
    (5,  576,  96,   True,  HSWISH, 1),
]


def multiple_of_8(channels):
    """The nearest multiple of 8, but not more than a tenth below `channels`: torchvision's rule."""
    rounded = max(8, (channels + 4) // 8 * 8)
    if rounded < 0.9 * channels:
        rounded += 8
    return rounded


class MobileNetV3(nn.Module):
    """(N, 3, H, W) -> (N, feature_dim): stem, the table's blocks, 1x1, pool, one hidden layer."""

    def __init__(self, table, feature_dim, small_images=False):
        super().__init__()
        self.feature_dim = feature_dim
        strides = strides_of([2] + [row[-1] for row in table], small_images)
        channels, eps = 16, 1e-3
        layers = [conv_bn(conv(3, channels, 3, strides[0]), HSWISH, eps)]
        for (kernel, expanded, out, se, act, _), stride in zip(table, strides[1:]):
            squeeze_excite = None
            if se:
                squeeze_excite = multiple_of_8(expanded // 4), RELU, nn.Hardsigmoid
            layers.append(InvertedResidual(channels, expanded, out, kernel, stride, act,
                                           squeeze_excite, eps))
            channels = out
        layers.append(conv_bn(conv(channels, 6 * channels, 1), HSWISH, eps))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(6 * channels, feature_dim), HSWISH())
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        x = self.features(x)                                  # (N, 960 or 576, H/32, W/32)
        return self.classifier(pool(x))                       # (N, 1280 or 1024)


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

    def __init__(self, table=EFFICIENTNET_B0, small_images=False):
        super().__init__()
        self.feature_dim = 1280
        strides = strides_of([2] + [row[2] for row in table], small_images)
        channels = 32
        stages = [conv_bn(conv(3, channels, 3, strides[0]), nn.SiLU)]
        for (ratio, kernel, _, out, repeats), stride in zip(table, strides[1:]):
            blocks = []
            for _ in range(repeats):
                # The squeeze is a quarter of the block's input, not of its expanded width.
                squeeze_excite = (channels // 4, nn.SiLU, nn.Sigmoid)
                blocks.append(InvertedResidual(channels, ratio * channels, out, kernel, stride,
                                               nn.SiLU, squeeze_excite, eps=1e-5))
                channels, stride = out, 1
            stages.append(nn.Sequential(*blocks))
        stages.append(conv_bn(conv(channels, self.feature_dim, 1), nn.SiLU))
        self.features = nn.Sequential(*stages)
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        return pool(self.features(x))                         # (N, 1280)


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
        # The branch starts at zero, as in [Light]'s code (arXiv 1706.02677, section 5.1).
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


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
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


def shortcut(c_in, c_out, stride):
    """None where the skip is the identity, else a 1x1 convolution and batch norm."""
    if stride == 1 and c_in == c_out:
        return None
    return conv_bn(conv(c_in, c_out, 1, stride))


class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, 512 * expansion): stem, four stages, pool (arXiv 1512.03385, table 1)."""

    def __init__(self, block, depths, small_images=False):
        super().__init__()
        self.feature_dim = 512 * block.expansion
        self.small_images = small_images
        self.conv1 = conv(3, 64, 3) if small_images else conv(3, 64, 7, stride=2)
        self.bn1 = BatchNorm2d(64)
        self.channels = 64
        self.layer1 = self.stage(block, 64, depths[0], stride=1)
        self.layer2 = self.stage(block, 128, depths[1], stride=2)
        self.layer3 = self.stage(block, 256, depths[2], stride=2)
        self.layer4 = self.stage(block, 512, depths[3], stride=2)
        init_weights(self)

    def stage(self, block, width, depth, stride):
        blocks = []
        for _ in range(depth):
            blocks.append(block(self.channels, width, stride))
            self.channels, stride = width * block.expansion, 1
        return nn.Sequential(*blocks)

    def forward(self, x):                                     # (N, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)     # (N, 64, H/2, W/2)
        if not self.small_images:
            x = F.max_pool2d(x, 3, 2, 1)                      # (N, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return pool(x)                                        # (N, 512 or 2048)


# ------------------------------------------------- all six

ARCHS = {
    "mobilenetv3_large": partial(MobileNetV3, MOBILENETV3_LARGE, 1280),
    "mobilenetv3_small": partial(MobileNetV3, MOBILENETV3_SMALL, 1024),
    "efficientnet_b0": EfficientNet,
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
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def multiply_adds(net, size=224):
    """Multiplications in the convolutions and linear layers for one `size` x `size` image."""
    counts = []

    def count(layer, _, out):
        # Each value of the output is one dot product with weight[0].
        counts.append(layer.weight[0].numel() * out.numel())

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    net.eval()(torch.zeros(1, 3, size, size, device=next(net.parameters()).device))
    return sum(counts)


def print_table():
    """The six networks with a layer for 1000 classes, at 224 px, next to torchvision's figures."""
    documented = {
        "mobilenetv3_large": (5.48, 0.22),
        "mobilenetv3_small": (2.54, 0.06),
        "efficientnet_b0": (5.29, 0.39),
        "resnet18": (11.69, 1.81),
        "resnet34": (21.80, 3.66),
        "resnet50": (25.56, 4.09),
    }
    print("with a 1000-class layer, at 224 px      parameters (M)         multiply-adds (G)")
    print(f"{'arch':20s}{'feature dim':>12s}" + f"{'ours':>12s}{'torchvision':>13s}" * 2)
    for arch, (parameters, madds) in documented.items():
        net = build_backbone(arch).to("meta")
        layer = 1000 * net.feature_dim
        our_parameters = (sum(p.numel() for p in net.parameters()) + layer + 1000) / 1e6
        our_madds = (multiply_adds(net) + layer) / 1e9
        print(f"{arch:20s}{net.feature_dim:12d}{our_parameters:12.2f}{parameters:13.2f}"
              f"{our_madds:12.2f}{madds:13.2f}")


# ------------------------------------------------- faster on a CPU, equal in value
#
# What it buys: a whole training step of MobileNetV3-Small at 32 px takes 1.4 x as long without
# it. torch's own weight gradient of a depthwise convolution is slow where the map is narrower
# than the kernel (30 forwards long), and in bf16. A GPU and evaluation never come here.

class DepthwiseConv2d(nn.Conv2d):
    """One k x k filter a channel."""

    def __init__(self, channels, kernel, stride):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels,
                         bias=False)

    def forward(self, x):                                     # (N, C, H, W)
        wants_gradient = self.training and torch.is_grad_enabled()
        if x.device.type != "cpu" or not wants_gradient:
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
        n, c, h, w = x.shape
        k = weight.shape[2]
        for_x = torch.nn.grad.conv2d_input(x.shape, weight, gradient, padding=k // 2, groups=c)
        inputs = x.permute(1, 2, 3, 0).reshape(c, h * w, n)
        outputs = gradient.permute(1, 0, 2, 3).reshape(c, n, h * w)
        pairs = (inputs @ outputs).flatten(1)                 # (C, HW * HW): input, output
        down = torch.arange(h)[:, None] - torch.arange(h) + k // 2       # the tap's row (H, H)
        right = torch.arange(w)[:, None] - torch.arange(w) + k // 2      # its column (W, W)
        down, right = down[:, None, :, None], right[None, :, None, :]    # (H, W, H, W) together
        inside = (down >= 0) & (down < k) & (right >= 0) & (right < k)
        tap = torch.where(inside, down * k + right, k * k).flatten()
        of_tap = F.one_hot(tap, k * k + 1)[:, :-1].to(x.dtype)           # (HW * HW, k * k)
        # With the strides of the weight, or DistributedDataParallel warns.
        for_weight = torch.empty_like(weight).copy_((pairs @ of_tap).view_as(weight))
        return for_x, for_weight


if __name__ == "__main__":
    print_table()
