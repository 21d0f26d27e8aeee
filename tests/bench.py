"""Speed, as ratios: each part beside what one would otherwise run, in turns, in one process.

    python tests/bench.py views FOLDER     # two 224 px views of JPEG files: PIL + torchvision
    python tests/bench.py loader           # two 32 px views of images in memory: the same
    python tests/bench.py augment          # jitter, gray, blur, flip: torchvision's functional
    python tests/bench.py loss             # soft InfoNCE: a dense target, as in [Light]'s code
    python tests/bench.py ema              # momentum update: a Python loop over the parameters
    python tests/bench.py models [ARCH...]         # training step of a backbone: torchvision's
    python tests/bench.py pure ARCH SIZE BATCH     # the step alone: precision, layout, slices

One thread, on a GPU where there is one. Medians; machines are noisy: read the ratios. Nothing is
asserted. Numbers after the part's name make it smaller: `views FOLDER 20`, `loader 64`,
`loss 32 128 4096`.
"""
import copy
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch     # noqa: E402
import torch.nn.functional as F     # noqa: E402
import torchvision     # noqa: E402
from PIL import Image, ImageFilter     # noqa: E402
from torchvision import transforms as T     # noqa: E402
from torchvision.transforms.v2 import functional as TF     # noqa: E402

import data     # noqa: E402
import models as nets     # noqa: E402
import pretrain     # noqa: E402
from loss import soft_info_nce     # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(repeats=5, **variants):
    """Median seconds of each variant; they take turns, so that drift hits all alike."""
    times = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            start = now()
            variant()
            if turn:     # the first is warm-up
                times[name].append(now() - start)
    return {name: statistics.median(t) for name, t in times.items()}


# ------------------------------------------------- views

def usual(size, blur):
    """MoCo v2's transform, and [Light]'s."""
    def soften(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    steps = [
        T.RandomResizedCrop(size, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
    ]
    if blur:
        steps.append(T.RandomApply([T.Lambda(soften)], 0.5))
    steps += [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(data.MEAN, data.STD)]
    return T.Compose(steps)


def two_views_of(dataset, size, blur_p, n):
    """-> function that makes two views of the first n images, with or without `augment`."""
    views = data.TwoViews(dataset, size, blur_p=blur_p)

    def make(apply=False):
        for start in range(0, n, 8):      # as the loader does: a batch of items
            items = [views[0, i] for i in range(start, min(start + 8, n))]
            crops, params, _ = data.collate(items)
            if apply:
                data.augment(crops.flatten(0, 1), params.flatten(0, 1))

    return make


def report_views(n, t):
    for name, value in t.items():
        print(f"{name:20s} {n / value:8.1f} images/s, two views each")
    print(f"host share {t['usual'] / t['ours']:.2f} x the usual; "
          f"with augment on the same core {t['usual'] / t['ours_and_augment']:.2f} x")


def views(folder, n=120):
    dataset = data.load_dataset(folder, "train")
    n = min(int(n), len(dataset))
    transform = usual(224, blur=True)
    ours = two_views_of(dataset, 224, 0.5, n)

    def theirs():
        for i in range(n):
            image = Image.open(dataset.path(i)).convert("RGB")
            transform(image)
            transform(image)

    def decode():
        for i in range(n):
            data.read_image(dataset.path(i))

    t = seconds(usual=theirs, ours=ours, ours_and_augment=lambda: ours(True), decoding=decode)
    report_views(n, t)
    print(f"decoding alone takes {t['decoding'] / t['ours']:.2f} of ours")


def loader(n=512):
    n = int(n)
    dataset = data.draw_shapes(n, seed=0)
    dataset.pictures = TF.resize(dataset.pictures, [32, 32], antialias=True)
    transform = usual(32, blur=False)
    arrays = dataset.pictures.permute(0, 2, 3, 1).numpy()
    ours = two_views_of(dataset, 32, 0.0, n)

    def theirs():
        for array in arrays:
            image = Image.fromarray(array)
            transform(image)
            transform(image)

    report_views(n, seconds(usual=theirs, ours=ours, ours_and_augment=lambda: ours(True)))


def functional(crop, row):
    """One view by torchvision's functional transforms, from the numbers of `data.draw_params`."""
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    x = TF.horizontal_flip(crop) if row[data.FLIP] else crop
    x = TF.to_dtype(x, torch.float32, scale=True)
    if row[data.BRIGHTNESS:data.HUE + 1] != [1, 1, 1, 0]:
        for j in data.ORDERINGS[int(row[data.ORDERING])].tolist():
            x = steps[j](x, row[data.BRIGHTNESS + j])
    if row[data.GRAY]:
        x = TF.rgb_to_grayscale(x, 3)
    if row[data.SIGMA]:
        x = TF.gaussian_blur(x, [13, 13], [row[data.SIGMA]] * 2)
    return TF.normalize(x, data.MEAN, data.STD)


def augment(*sizes):
    """Of (N, size) pairs, by default 64 views of 224 px and 512 of 32 px."""
    sizes = [int(size) for size in sizes] or [64, 224, 512, 32]
    for n, size in zip(sizes[::2], sizes[1::2]):
        crops = torch.randint(256, (n, 3, size, size), dtype=torch.uint8).to(DEVICE)
        rng = data.generator(10, 0)
        rows = [data.draw_params(rng, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5) for _ in range(n)]
        params = torch.tensor(rows, dtype=torch.float32)

        def theirs():
            for crop, row in zip(crops, params.tolist()):
                functional(crop, row)

        t = seconds(theirs=theirs, ours=lambda: data.augment(crops, params))
        print(f"augment [{n}, 3, {size}, {size}]: {n / t['ours']:.0f} views/s, "
              f"{t['theirs'] / t['ours']:.2f} x torchvision's functional")


# ------------------------------------------------- loss, momentum update

def dense_loss(q, keys, queue, tau, s, neighbors):
    """Soft InfoNCE with a dense target, as in [Light]'s code."""
    logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.T], 1) / tau
    target = torch.zeros_like(logits)
    target[:, 0] = 1 - s
    target.scatter_(1, logits[:, 1:].topk(neighbors).indices + 1, s / neighbors)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def loss(n=256, dim=128, k=65536, s=0.2, neighbors=20, tau=0.1):
    n, dim, k = int(n), int(dim), int(k)
    keys = F.normalize(torch.randn(n, dim, device=DEVICE), dim=1)
    queue = F.normalize(torch.randn(k, dim, device=DEVICE), dim=1)
    start = F.normalize(torch.randn(n, dim, device=DEVICE), dim=1)

    def dense():
        q = start.clone().requires_grad_()
        dense_loss(q, keys, queue, tau, s, neighbors).backward()

    def ours():
        q = start.clone().requires_grad_()
        value, _ = soft_info_nce(q, keys, queue, temperature=tau, smoothing=s,
                                 neighbors=neighbors)
        value.backward()

    t = seconds(9, dense=dense, ours=ours)
    print(f"loss, N {n}, K {k}: {1e3 * t['ours']:.1f} ms, "
          f"{t['dense'] / t['ours']:.2f} x dense targets")


def ema_loop(encoder, key_encoder, m):
    """As in the papers' code."""
    for a, b in zip(encoder.parameters(), key_encoder.parameters()):
        b.data = b.data * m + a.data * (1 - m)


def ema():
    q = nets.build_backbone("mobilenetv3_large").to(DEVICE)
    k = copy.deepcopy(q).requires_grad_(False)
    t = seconds(20, loop=lambda: ema_loop(q, k, 0.999),
                ours=lambda: pretrain.ema_update(q, k, 0.999))
    print(f"ema, MobileNetV3-Large: {1e3 * t['ours']:.2f} ms, "
          f"{t['loop'] / t['ours']:.2f} x the loop")


# ------------------------------------------------- training steps

def models(*archs):
    size, batch = (224, 256) if CUDA else (96, 8)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)

    def step(net):
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            out = net(x)
        out.float().square().mean().backward()
        net.zero_grad(set_to_none=True)

    for name in archs or nets.ARCHS:
        extra = {}
        if name == "efficientnet_b0":
            extra = dict(stochastic_depth_prob=0.0, dropout=0.0)
        build = getattr(torchvision.models, name.replace("mobilenetv3", "mobilenet_v3"))
        a = nets.build_backbone(name).to(DEVICE, memory_format=torch.channels_last).train()
        b = build(**extra).to(DEVICE, memory_format=torch.channels_last).train()
        t = seconds(7, ours=lambda: step(a), theirs=lambda: step(b))
        print(f"{name:20s} {batch / t['ours']:8.1f} images/s, "
              f"{t['theirs'] / t['ours']:.2f} x torchvision's")


def prepare(arch, size, batch, queue_size, amp, layout, slices, compiled):
    """-> the encoder, and a function that makes one step of both directions."""
    encoder = nets.Encoder(arch, small_images=size <= data.SMALL, slice_size=batch // slices)
    encoder = encoder.to(DEVICE, memory_format=layout)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    if compiled:
        encoder.backbone.compile()
        key_encoder.backbone.compile()
    queue = pretrain.KeyQueue(queue_size, 128, device=DEVICE)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.01, 0.9, fused=True)
    order = torch.randperm(batch, device=DEVICE)
    index = torch.zeros(2 * batch, dtype=torch.long, device=DEVICE)
    view1, view2 = (torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=layout)
                    for _ in range(2))

    def run():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
            q = torch.cat([encoder(view1), encoder(view2)])
            keys = [pretrain.encode_keys(key_encoder, view, order) for view in (view2, view1)]
        k = torch.cat(keys)
        value, _ = soft_info_nce(q, k, queue.keys, temperature=0.1, smoothing=0.1, neighbors=20)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        pretrain.ema_update(encoder, key_encoder, 0.999)
        queue.enqueue(k, index)

    return encoder, run


def pure(arch, size, batch, queue_size=65536):
    """images/s of the step without loader and augment, the first line beside the others; and how
    near the last is to the time that its memory traffic alone takes: every layer's output written
    and read once forward, twice that backward, for the query; once forward for the key (a floor
    for layers that are not fused)."""
    size, batch, queue_size = int(size), int(batch), int(queue_size)
    last, first = torch.channels_last, None
    variants = [
        # bf16, layout, slices, compiled
        (False, torch.contiguous_format, 8, False),
        (False, last, 1, False),
        (False, last, 8, False),
    ]
    if CUDA:
        variants += [(True, last, 1, False), (True, last, 8, False), (True, last, 8, True)]
    for amp, layout, slices, compiled in variants:
        encoder, run = prepare(arch, size, batch, queue_size, amp, layout, slices, compiled)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        t = seconds(5, run=run)["run"]
        first = first or t
        words = "bf16" if amp else "fp32"
        words += ", channels_last" if layout is last else ", contiguous"
        words += f", {slices} slices" + ", compiled" * compiled
        memory = ""
        if CUDA:
            memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
        print(f"{words}: {batch / t:.0f} images/s, {first / t:.2f} x the first{memory}",
              flush=True)
    traffic = bytes_of_outputs(encoder, size, batch, 2 if amp else 4)
    source, target = torch.zeros(2, 2 ** 28, dtype=torch.uint8, device=DEVICE)
    bandwidth = 2 * len(source) / seconds(5, copy=lambda: target.copy_(source))["copy"]
    # Two views, each: forward 1 and backward 2 of the query, forward 1 of the key.
    print(f"memory floor {2 * 4 * traffic / bandwidth:.3f} s at {bandwidth / 1e9:.0f} GB/s; "
          f"the last line's step takes {t:.3f} s")


@torch.no_grad()
def bytes_of_outputs(encoder, size, batch, width):
    """Bytes written and read by one forward, if each layer's output goes through the memory."""
    counts = []

    def count(_, __, out):
        counts.append(2 * out.numel() * width)

    for layer in encoder.backbone.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    encoder.backbone._compiled_call_impl = None      # hooks want the layers themselves
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    encoder.backbone(x.to(memory_format=torch.channels_last))
    return sum(counts)


PARTS = (views, loader, augment, loss, ema, models, pure)

if __name__ == "__main__":
    parts = {part.__name__: part for part in PARTS}
    if len(sys.argv) < 2 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    parts[sys.argv[1]](*sys.argv[2:])
