"""Six image networks written by hand, and the encoder that pretraining trains.

    python models.py          # the size table: parameters and multiply-adds, counted from the networks

Parameter names, shapes and numerics are torchvision's, so weights travel both ways; only torchvision's final
1000-class layer has no counterpart here. A network ends in its feature: after average pooling for ResNet and
EfficientNet, after the last hidden layer (960 -> 1280, 576 -> 1024) and its hard-swish for MobileNetV3, where both
papers probe it. No dropout, no stochastic depth.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

BN_MOMENTUM = 0.1     # everywhere, as in both papers' code; torchvision's 0.01 for MobileNetV3 lags behind training


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises each `slice_size` images (None: all) on their own, as if each slice had a
    GPU of its own. The running statistics move once a forward, towards the mean over the slices.

    Slicing here and not around the whole network leaves the convolutions their full batch: up to 2 x faster on a CPU.
    """
    slice_size = None

    def __init__(self, channels, eps=1e-5):
        super().__init__(channels, eps, momentum=BN_MOMENTUM)

    def forward(self, x):                                     # (N, C, H, W)
        if not self.training or self.slice_size is None or len(x) <= self.slice_size:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        slices = x.split(self.slice_size)
        count, m, out = len(slices), self.momentum, []
        for i, part in enumerate(slices, start=1):
            # With these momenta, `count` updates equal one update by their mean.
            momentum = m / (count - m * (count - i))
            out.append(F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True, momentum,
                                    self.eps))
        return torch.cat(out)


# ---------------------------------------------------------------------- pieces of MobileNetV3 and EfficientNet-B0

class NarrowDepthwise(torch.autograd.Function):
    """Depthwise k x k convolution, stride 1, of maps narrower than k, with its gradient for the weight written out.

    There torch's own takes 30 x as long as a forward on a CPU: MobileNetV3-Small at 32 px trains 1.4 x as fast without it.
    A tap's gradient is the sum of x * gradient over all pairs of positions that the tap connects; so: first all pairs,
    which are few, for every channel by one small matrix product; then the sum of those at each tap's distance.
    """

    @staticmethod
    def forward(ctx, x, weight):                              # (N, C, H, W), (C, 1, k, k)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, 1, weight.shape[2] // 2, 1, len(weight))

    @staticmethod
    def backward(ctx, gradient):                              # (N, C, H, W)
        x, weight = ctx.saved_tensors
        (n, c, h, w), k = x.shape, weight.shape[2]
        by_x = torch.nn.grad.conv2d_input(x.shape, weight, gradient, padding=k // 2, groups=c)
        pairs = x.permute(1, 2, 3, 0).reshape(c, h * w, n) @ gradient.permute(1, 0, 2, 3).reshape(c, n, h * w)
        taps = torch.arange(k)[:, None, None]
        down, right = (torch.arange(side)[:, None] - torch.arange(side) + k // 2 == taps      # (k, H, H), (k, W, W)
                       for side in (h, w))
        joined = (down[:, None, :, None, :, None] & right[None, :, None, :, None, :]).view(k * k, -1)     # (kk, HWHW)
        by_weight = torch.empty_like(weight)                  # with its strides, or DistributedDataParallel complains
        return by_x, by_weight.copy_((pairs.flatten(1) @ joined.T.to(x.dtype)).view_as(weight))


class DepthwiseConv2d(nn.Conv2d):
    """One k x k filter a channel."""

    def __init__(self, channels, kernel, stride):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x):
        narrow = self.stride[0] == 1 and max(x.shape[2:]) < self.kernel_size[0]
        if narrow and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return NarrowDepthwise.apply(x, self.weight)
        return super().forward(x)


def conv_bn(c_in, c_out, kernel=3, stride=1, depthwise=False, act=nn.ReLU, eps=1e-5):
    """Convolution, batch norm, activation (`act=None`: none); the resolution changes by `stride` alone."""
    conv = (DepthwiseConv2d(c_in, kernel, stride) if depthwise
            else nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False))
    layers = [conv, BatchNorm2d(c_out, eps)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the image's mean of all channels (arXiv 1709.01507)."""

    def __init__(self, channels, squeezed, act, gate):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = act(inplace=True), gate()

    def forward(self, x):                                     # (N, C, H, W)
        s = F.adaptive_avg_pool2d(x, 1)                       # (N, C, 1, 1)
        return x * self.gate(self.fc2(self.act(self.fc1(s))))


class InvertedResidual(nn.Module):
    """Expand 1x1, filter each channel k x k, squeeze-excite (`squeezed` channels, 0: none), project 1x1 (no activation).

    The one block of MobileNetV3 (arXiv 1905.02244, section 3) and EfficientNet-B0 (arXiv 1905.11946, table 1), which
    differ in `act`, `se_act`, `gate`, `eps` and how wide the squeeze is. Skipped over where the shape stays the same.
    """

    def __init__(self, c_in, expanded, c_out, kernel, stride, squeezed, act, se_act, gate, eps):
        super().__init__()
        layers = [] if expanded == c_in else [conv_bn(c_in, expanded, 1, act=act, eps=eps)]
        layers += [conv_bn(expanded, expanded, kernel, stride, depthwise=True, act=act, eps=eps)]
        layers += [SqueezeExcite(expanded, squeezed, se_act, gate)] if squeezed else []
        layers += [conv_bn(expanded, c_out, 1, act=None, eps=eps)]
        self.block = nn.Sequential(*layers)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.block(x) if self.skip else self.block(x)


def small_strides(strides):
    """The first two strides of 2 become 1: an image of 32 px keeps the 4 x 4 map that 128 px would have."""
    for i in [i for i, s in enumerate(strides) if s == 2][:2]:
        strides[i] = 1
    return strides


# ---------------------------------------------------------------------- MobileNetV3

MOBILENETV3_LARGE = [     # arXiv 1905.02244, table 1
    # k,  exp, out,   SE,    act, s
    (3,    16,  16, False, "RE", 1),
    (3,    64,  24, False, "RE", 2),
    (3,    72,  24, False, "RE", 1),
    (5,    72,  40, True,  "RE", 2),
    (5,   120,  40, True,  "RE", 1),
    (5,   120,  40, True,  "RE", 1),
    (3,   240,  80, False, "HS", 2),
    (3,   200,  80, False, "HS", 1),
    (3,   184,  80, False, "HS", 1),
    (3,   184,  80, False, "HS", 1),
    (3,   480, 112, True,  "HS", 1),
    (3,   672, 112, True,  "HS", 1),
    (5,   672, 160, True,  "HS", 2),
    (5,   960, 160, True,  "HS", 1),
    (5,   960, 160, True,  "HS", 1),
]
MOBILENETV3_SMALL = [     # arXiv 1905.02244, table 2
    # k,  exp, out,   SE,    act, s
    (3,    16,  16, True,  "RE", 2),
    (3,    72,  24, False, "RE", 2),
    (3,    88,  24, False, "RE", 1),
    (5,    96,  40, True,  "HS", 2),
    (5,   240,  40, True,  "HS", 1),
    (5,   240,  40, True,  "HS", 1),
    (5,   120,  48, True,  "HS", 1),
    (5,   144,  48, True,  "HS", 1),
    (5,   288,  96, True,  "HS", 2),
    (5,   576,  96, True,  "HS", 1),
    (5,   576,  96, True,  "HS", 1),
]


class MobileNetV3(nn.Module):
    """(N, 3, H, W) -> (N, feature_dim): stem, the table's blocks, 1x1 convolution, pool, one hidden layer."""

    def __init__(self, table, feature_dim, small_images=False):
        super().__init__()
        self.feature_dim = feature_dim
        strides = [2] + [row[-1] for row in table]
        strides = small_strides(strides) if small_images else strides
        channels, eps = 16, 1e-3
        layers = [conv_bn(3, channels, 3, strides[0], act=nn.Hardswish, eps=eps)]
        for (kernel, expanded, out, se, act, _), stride in zip(table, strides[1:]):
            squeezed = max(8, (expanded // 4 + 4) // 8 * 8) if se else 0      # a quarter, rounded to eights ...
            squeezed += 8 if squeezed and squeezed < 0.9 * (expanded // 4) else 0     # ... by at most a tenth down
            layers.append(InvertedResidual(channels, expanded, out, kernel, stride, squeezed,
                                           nn.Hardswish if act == "HS" else nn.ReLU, nn.ReLU, nn.Hardsigmoid, eps))
            channels = out
        layers.append(conv_bn(channels, 6 * channels, 1, act=nn.Hardswish, eps=eps))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(6 * channels, feature_dim), nn.Hardswish(inplace=True))
        init_weights(self, lambda layer: nn.init.normal_(layer.weight, 0, 0.01))     # as torchvision

    def forward(self, x):                                     # (N, 3, H, W)
        x = self.features(x)                                  # (N, 960 or 576, H/32, W/32)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)            # (N, 960 or 576)
        return self.classifier(x)                             # (N, 1280 or 1024)


# ---------------------------------------------------------------------- EfficientNet-B0

EFFICIENTNET_B0 = [       # arXiv 1905.11946, table 1, stages 2 to 8
    # t, k, s, out, n
    (1, 3, 1,  16, 1),
    (6, 3, 2,  24, 2),
    (6, 5, 2,  40, 2),
    (6, 3, 2,  80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


class EfficientNet(nn.Module):
    """(N, 3, H, W) -> (N, 1280): stem, the table's stages, 1x1 convolution, pool."""

    def __init__(self, table=EFFICIENTNET_B0, small_images=False):
        super().__init__()
        self.feature_dim = 1280
        strides = [2] + [row[2] for row in table]
        strides = small_strides(strides) if small_images else strides
        channels = 32
        stages = [conv_bn(3, channels, 3, strides[0], act=nn.SiLU)]
        for (ratio, kernel, _, out, repeats), stride in zip(table, strides[1:]):
            stage = []
            for i in range(repeats):
                # The squeeze is a quarter of the block's input, not of its expanded width.
                stage.append(InvertedResidual(channels, ratio * channels, out, kernel, stride if i == 0 else 1,
                                              channels // 4, nn.SiLU, nn.SiLU, nn.Sigmoid, 1e-5))
                channels = out
            stages.append(nn.Sequential(*stage))
        stages.append(conv_bn(channels, self.feature_dim, 1, act=nn.SiLU))
        self.features = nn.Sequential(*stages)
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        x = self.features(x)                                  # (N, 1280, H/32, W/32)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)         # (N, 1280)


# ---------------------------------------------------------------------- ResNet

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip (arXiv 1512.03385, figure 5 left)."""
    expansion = 1

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.downsample = shortcut(c_in, width, stride)
        nn.init.zeros_(self.bn2.weight)     # the branch starts at zero, as [Light]'s code (arXiv 1706.02677, 5.1)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a skip (arXiv 1512.03385, figure 5 right; the stride in the 3x3, as torchvision)."""
    expansion = 4

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
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
    return conv_bn(c_in, c_out, 1, stride, act=None) if stride != 1 or c_in != c_out else None


class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, 512 * expansion): stem, four stages of blocks, pool (arXiv 1512.03385, table 1)."""

    def __init__(self, block, depths, small_images=False):
        super().__init__()
        self.feature_dim = 512 * block.expansion
        self.small_images = small_images
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small_images else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = BatchNorm2d(64)
        channels = 64
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths), start=1):
            blocks = []
            for i in range(depth):
                blocks.append(block(channels, width, stride=2 if stage > 1 and i == 0 else 1))
                channels = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        init_weights(self)

    def forward(self, x):                                     # (N, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)     # (N, 64, H/2, W/2); small images (N, 64, H, W)
        x = x if self.small_images else F.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)         # (N, 512 or 2048)


# ---------------------------------------------------------------------- all six, and the encoder

def init_weights(net, init_linear=None):
    """Convolutions normal with variance 2 / fan_out (arXiv 1502.01852), biases zero: torchvision's for all six.

    Batch norm keeps torch's weight 1 and bias 0, but for the zeros that the residual blocks set themselves.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        if isinstance(layer, nn.Linear):
            init_linear(layer)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


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

    `small_images` (for 64 px and less): ResNet gets a 3x3 stride-1 stem without max-pool, the others keep their
    parameter shapes and take their first two strides of 2 as 1. Raises ValueError for an unknown name.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    return ARCHS[arch](small_images=small_images)


class Encoder(nn.Module):
    """Backbone, projection head, unit length: (N, 3, H, W) -> (N, dim).

    The head is Linear, ReLU, Linear (MoCo v2, arXiv 2003.04297); `hidden_dim=0` makes it one linear layer (MoCo v1).
    In training, batch norm takes each `slice_size` images (None: the whole batch) on their own.
    """

    def __init__(self, arch, dim=128, hidden_dim=2048, small_images=False, slice_size=None):
        super().__init__()
        self.backbone = build_backbone(arch, small_images)
        for layer in self.backbone.modules():
            if isinstance(layer, BatchNorm2d):
                layer.slice_size = slice_size
        width = self.backbone.feature_dim
        self.head = nn.Linear(width, dim) if hidden_dim == 0 else nn.Sequential(
            nn.Linear(width, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))
        # Ours. With torch's random biases behind MobileNetV3's last layer (torchvision: standard deviation 0.01), the biases
        # outweigh the image and all embeddings start in a narrow cone. Tried together with other changes, not on its own.
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):                                     # (N, 3, H, W)
        z = self.head(self.backbone(x))                       # (N, dim)
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)     # unit to more than bf16's 3 digits


@torch.no_grad()
def multiply_adds(net, size=224):
    """Multiplications in the convolutions and linear layers of one forward of one `size` x `size` image."""
    total = 0

    def count(layer, _, out):
        nonlocal total
        total += layer.weight[0].numel() * out.numel()        # each output value: one weight[0]-sized dot product

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    was_training = net.training
    net.eval()(torch.zeros(1, 3, size, size, device=next(net.parameters()).device))
    net.train(was_training)
    for hook in hooks:
        hook.remove()
    return total


def print_table():
    """Size of the six networks with a 1000-class layer at 224 px, next to torchvision's documented figures."""
    documented = {"mobilenetv3_large": (5.48, 0.22), "mobilenetv3_small": (2.54, 0.06), "efficientnet_b0": (5.29, 0.39),
                  "resnet18": (11.69, 1.81), "resnet34": (21.80, 3.66), "resnet50": (25.56, 4.09)}
    print("with a 1000-class layer, at 224 px      parameters (M)         multiply-adds (G)")
    print(f"{'arch':20s}{'feature dim':>12s}{'ours':>12s}{'torchvision':>13s}{'ours':>12s}{'torchvision':>13s}")
    for arch, (parameters, madds) in documented.items():
        net = build_backbone(arch).to("meta")
        layer = 1000 * net.feature_dim
        ours = (sum(p.numel() for p in net.parameters()) + layer + 1000) / 1e6, (multiply_adds(net) + layer) / 1e9
        print(f"{arch:20s}{net.feature_dim:12d}{ours[0]:12.2f}{parameters:13.2f}{ours[1]:12.2f}{madds:13.2f}")


if __name__ == "__main__":
    print_table()
