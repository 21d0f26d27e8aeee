"""Speed, as ratios: each part beside what one would otherwise run, in turns, in one process. Nothing is asserted.

    python tests/bench.py views FOLDER     # two 224 px views of JPEG files: PIL + torchvision transforms, and decoding alone
    python tests/bench.py loader           # two 32 px views of images in memory: the same, an item at a time
    python tests/bench.py augment          # colour jitter, gray, blur, flip: torchvision's functional, an image at a time
    python tests/bench.py loss             # soft InfoNCE: dense targets through autograd
    python tests/bench.py ema              # momentum update: a Python loop over the parameters
    python tests/bench.py models           # training step of each backbone: torchvision's
    python tests/bench.py step [FLAGS]     # where a training step spends its time; the flags are those of pretrain.py
    python tests/bench.py pure ARCH SIZE BATCH     # the step alone, views on the device: precision, memory format, slices, compile
    python tests/bench.py whole --data FOLDER [FLAGS]     # from files to weights: the step as in [Light]'s code, on the same files

One thread, on a GPU where there is one. Medians; machines are noisy: read the ratios.
"""
import copy
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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


def seconds(repeats=5, **variants):
    """Median seconds of each variant; they take turns, so that drift hits all alike."""
    times = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            CUDA and torch.cuda.synchronize()
            start = time.perf_counter()
            variant()
            CUDA and torch.cuda.synchronize()
            if turn:     # the first is warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def usual(size, blur):
    """The transform of the papers' code."""
    soften = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))
    return T.Compose([T.RandomResizedCrop(size, scale=(0.2, 1.0)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                      T.RandomGrayscale(0.2), *[T.RandomApply([soften], 0.5)] * blur, T.RandomHorizontalFlip(), T.ToTensor(),
                      T.Normalize(data.MEAN, data.STD)])


def report_views(n, t):
    for name, value in t.items():
        print(f"{name:30s} {n / value:8.1f} images/s, two views each")
    print(f"host share {t['usual'] / t['ours']:.2f} x the usual; with augment on the same core {t['usual'] / t['ours and augment']:.2f} x")


def views(folder, n=120):
    dataset = data.load_dataset(folder, "train")
    n = min(n, len(dataset))
    two_views, transform = data.TwoViews(dataset, 224), usual(224, blur=True)

    def theirs():
        for i in range(n):
            image = Image.open(dataset.path(i)).convert("RGB")
            transform(image), transform(image)

    def ours(apply=False):
        for start in range(0, n, 8):      # as the loader does, a batch at once
            crops, params, _ = data.collate(two_views.__getitems__([(0, i) for i in range(start, min(start + 8, n))]))
            if apply:
                data.augment(crops.flatten(0, 1), params.flatten(0, 1))

    t = seconds(usual=theirs, ours=ours, **{"ours and augment": lambda: ours(True),
                                            "decoding alone": lambda: [data.read_image(dataset.path(i)) for i in range(n)]})
    report_views(n, t)
    print(f"decoding alone takes {t['decoding alone'] / t['ours']:.2f} of ours")


def loader(n=512):
    dataset = data.draw_shapes(n, 0, 32)
    two_views, transform = data.TwoViews(dataset, 32, blur_p=0), usual(32, blur=False)
    arrays = dataset.images.permute(0, 2, 3, 1).numpy()

    def theirs():
        for array in arrays:
            image = Image.fromarray(array)
            transform(image), transform(image)

    def ours(apply=False):
        crops, params, _ = data.collate(two_views.__getitems__([(0, i) for i in range(n)]))
        if apply:
            data.augment(crops.flatten(0, 1), params.flatten(0, 1))

    report_views(n, seconds(usual=theirs, ours=ours, **{"ours and augment": lambda: ours(True)}))


def augment():
    for n, size in ((64, 224), (512, 32)):
        crops = torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
        p = data.draw_params(data.keyed_uniform(10, 0, torch.arange(n).numpy()), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2,
                             blur_p=0.5)
        steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        crops, p = crops.to(DEVICE), p.to(DEVICE)

        def theirs():
            for x, row in zip(crops, p.tolist()):
                x = TF.horizontal_flip(x) if row[data.FLIP] else x
                x = TF.to_dtype(x, torch.float32, scale=True)
                if any(v != neutral for v, neutral in zip(row[1:5], (1, 1, 1, 0))):
                    for j in data.ORDERINGS[int(row[data.ORDERING])].tolist():
                        x = steps[j](x, row[data.BRIGHTNESS + j])
                x = TF.rgb_to_grayscale(x, 3) if row[data.GRAY] else x
                x = TF.gaussian_blur(x, [13, 13], [row[data.SIGMA]] * 2) if row[data.SIGMA] else x
                TF.normalize(x, data.MEAN, data.STD)

        t = seconds(theirs=theirs, ours=lambda: data.augment(crops, p))
        print(f"augment [{n}, 3, {size}, {size}]: {n / t['ours']:.0f} views/s, {t['theirs'] / t['ours']:.2f} x torchvision's functional")


def dense_loss(q, keys, queue, tau, s, neighbors):
    """Soft InfoNCE with a dense target, as in [Light]'s code."""
    logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.T], 1) / tau
    target = torch.zeros_like(logits)
    target[:, 0] = 1 - s
    target.scatter_(1, logits[:, 1:].topk(neighbors).indices + 1, s / neighbors)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def loss(n=256, dim=128, k=65536, s=0.2, neighbors=20, tau=0.1):
    keys, queue = (F.normalize(torch.randn(count, dim, device=DEVICE), dim=1) for count in (n, k))
    start = F.normalize(torch.randn(n, dim, device=DEVICE), dim=1)

    def dense():
        q = start.clone().requires_grad_()
        dense_loss(q, keys, queue, tau, s, neighbors).backward()

    def ours():
        q = start.clone().requires_grad_()
        soft_info_nce(q, keys, queue, temperature=tau, smoothing=s, neighbors=neighbors)[0].backward()

    t = seconds(9, dense=dense, ours=ours)
    print(f"loss, N {n}, K {k}: {1e3 * t['ours']:.1f} ms, {t['dense'] / t['ours']:.2f} x dense targets")


def ema_loop(encoder, key_encoder, m):
    """As in the papers' code."""
    for a, b in zip(encoder.parameters(), key_encoder.parameters()):
        b.data = b.data * m + a.data * (1 - m)


def ema():
    q, k = (nets.build_backbone("mobilenetv3_large").to(DEVICE) for _ in range(2))
    t = seconds(20, loop=lambda: ema_loop(q, k, 0.999), ours=lambda: pretrain.ema_update(q, k, 0.999))
    print(f"ema, MobileNetV3-Large: {1e3 * t['ours']:.2f} ms, {t['loop'] / t['ours']:.2f} x the loop")


def models():
    size, batch = (224, 256) if CUDA else (96, 8)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)

    def step(net):
        with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            out = net(x)
        out.float().square().mean().backward()
        net.zero_grad(set_to_none=True)

    for name in nets.ARCHS:
        extra = dict(stochastic_depth_prob=0.0, dropout=0.0) if name == "efficientnet_b0" else {}
        theirs = getattr(torchvision.models, name.replace("mobilenetv3", "mobilenet_v3"))(**extra)
        a, b = (net.to(DEVICE, memory_format=torch.channels_last).train() for net in (nets.build_backbone(name), theirs))
        t = seconds(7, ours=lambda: step(a), theirs=lambda: step(b))
        print(f"{name:20s} {batch / t['ours']:8.1f} images/s, {t['theirs'] / t['ours']:.2f} x torchvision's")


def step(*flags):
    """A dry run of pretrain.py with a clock around each part; without loader workers, so that the parts add up."""
    spent = {}

    def clock(owner, name, stage):
        part = getattr(owner, name)

        def timed(*args, **kwargs):
            CUDA and torch.cuda.synchronize()
            start = time.perf_counter()
            out = part(*args, **kwargs)
            CUDA and torch.cuda.synchronize()
            key = stage if isinstance(stage, str) else stage[torch.is_grad_enabled()]
            spent.setdefault(key, []).append(time.perf_counter() - start)
            return out
        setattr(owner, name, timed)

    clock(data, "read_image", "decode")
    clock(data.F, "interpolate", "crop"), clock(data, "enlarge", "crop")
    clock(data, "augment", "augment")
    clock(nets.Encoder, "forward", ("key forward", "query forward"))
    clock(pretrain, "soft_info_nce", "loss")
    clock(torch.Tensor, "backward", "backward")
    clock(torch.optim.SGD, "step", "SGD")
    clock(pretrain, "ema_update", "momentum update")
    clock(pretrain.KeyQueue, "enqueue", "enqueue")
    clock(pretrain, "next_batch", "batch, in all")
    clock(pretrain, "train", "in all")
    try:
        pretrain.run([*flags, "--dry-run", "--workers", "0"])
    except SystemExit as end:
        if end.code:
            raise
    total = sum(spent.pop("in all"))
    spent["rest of the batch"] = [sum(spent.pop("batch, in all")), -sum(sum(spent.get(key, [])) for key in ("decode", "crop"))]
    spent["rest"] = [total, -sum(map(sum, spent.values()))]
    print("\n".join(f"{stage:20s} {100 * sum(t) / total:5.1f} %" for stage, t in spent.items()))


def pure(arch, size, batch, queue_size=65536):
    """images/s of the symmetric step without loader and augment, the first line beside the others; and how near the last
    is to the time that its memory traffic alone takes: every layer's output written and read once forward, twice that
    backward, for the query; once forward for the key (ours: a floor for unfused layers)."""
    size, batch = int(size), int(batch)
    p, order = SimpleNamespace(rank=0, world=1), torch.randperm(batch, device=DEVICE)

    def prepare(amp, layout, slices, compiled):
        encoder = nets.Encoder(arch, small_images=size <= data.SMALL, slice_size=batch // slices).to(DEVICE, memory_format=layout)
        key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        if compiled:
            encoder.backbone.compile(), key_encoder.backbone.compile()
        queue = pretrain.KeyQueue(128, queue_size, device=DEVICE)
        optimizer = torch.optim.SGD(encoder.parameters(), 0.01, 0.9, fused=True)
        views = [torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=layout) for _ in range(2)]

        def run():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                keys = pretrain.encode_keys(key_encoder, views, None, None, (1, 0), order, p)
                queries = [encoder(view) for view in views]
            value = sum(soft_info_nce(q, k, queue.keys, temperature=0.1, smoothing=0.1, neighbors=20)[0] for q, k in zip(queries, keys))
            optimizer.zero_grad(), (value / 2).backward(), optimizer.step()
            pretrain.ema_update(encoder, key_encoder, 0.999)
            queue.enqueue(torch.cat(keys), torch.zeros(2 * batch, dtype=torch.long, device=DEVICE))
        return encoder, run

    last, first = torch.channels_last, None
    variants = [(False, torch.contiguous_format, 8, False), (False, last, 1, False), (False, last, 8, False)]
    variants += [(True, last, 1, False), (True, last, 8, False), (True, last, 8, True)] * CUDA      # bf16: on a CPU ten times slower
    for amp, layout, slices, compiled in variants:
        encoder, run = prepare(amp, layout, slices, compiled)
        CUDA and torch.cuda.reset_peak_memory_stats()
        t = seconds(5, run=run)["run"]
        first = first or t
        memory = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if CUDA else ""
        print(f"{'bf16' if amp else 'fp32'}, {'channels_last' if layout is last else 'contiguous'}, {slices} slices{', compiled' * compiled}: "
              f"{batch / t:.0f} images/s, {first / t:.2f} x the first{memory}", flush=True)
    traffic = 0

    def count(_, __, out):
        nonlocal traffic
        traffic += 2 * out.numel() * (2 if amp else 4)

    for layer in encoder.backbone.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    encoder.backbone._compiled_call_impl = None      # hooks want the layers themselves
    with torch.no_grad():
        encoder.backbone(torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=last))
    source, target = torch.zeros(2, 2 ** 28, dtype=torch.uint8, device=DEVICE)
    bandwidth = 2 * len(source) / seconds(5, copy=lambda: target.copy_(source))["copy"]
    print(f"memory floor {2 * 4 * traffic / bandwidth:.3f} s at {bandwidth / 1e9:.0f} GB/s; the last line's step takes {t:.3f} s")


class UsualViews(torch.utils.data.Dataset):
    def __init__(self, dataset, size):
        self.dataset, self.transform = dataset, usual(size, blur=True)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image = Image.open(self.dataset.path(i)).convert("RGB")
        return self.transform(image), self.transform(image)


def whole(*flags):
    """images/s of pretrain.py's dry run, and of the same steps as [Light]'s code has them: PIL and torchvision views in
    the workers, float32, contiguous, dense targets, a Python loop for the momentum update; no shuffled slices."""
    ran, train = {}, pretrain.train
    given = pretrain.read_flags(flags)
    if given.recipe != "light":
        sys.exit(f"whole sets [Light]'s step beside ours: leave out --recipe {given.recipe}")
    workers = pretrain.default_workers() if given.workers is None else given.workers
    # Until the batches that lay ready are used up, also of a loader that is only a little slower than the step:
    pretrain.DRY_STEPS = max(3, 6 * workers + 1), max(10, 2 * workers)

    def timed(s):
        stopped = train(s)
        rate = s.clock.steps * s.c["batch_size"] / (s.clock.stopped - s.clock.started)
        ran.update(c=s.c, ours=rate, steps=s.clock.steps)
        return stopped

    pretrain.train = timed
    try:
        pretrain.run([*flags, "--smoothing", "0", "--dry-run"])
    except SystemExit as end:
        if end.code:
            raise
    c = ran["c"]
    encoder = nets.Encoder(c["arch"], c["dim"], c["hidden_dim"], c["image_size"] <= data.SMALL).to(DEVICE)
    key_encoder = copy.deepcopy(encoder)
    queue = F.normalize(torch.randn(c["queue_size"], c["dim"], device=DEVICE), dim=1)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.01, 0.9, weight_decay=1e-4)
    settings = c["temperature"], 0.0, c["neighbors"]      # without smoothing, as a run begins
    loader = torch.utils.data.DataLoader(UsualViews(data.load_dataset(c["data"], "train"), c["image_size"]), c["batch_size"], drop_last=True,
                                         num_workers=c["workers"], pin_memory=CUDA)
    first, pointer, step = pretrain.DRY_STEPS[0], 0, 0
    while step < first + ran["steps"]:
        for a, b in loader:
            a, b = a.to(DEVICE, non_blocking=True), b.to(DEVICE, non_blocking=True)
            q_a, q_b = encoder(a), encoder(b)
            with torch.no_grad():
                ema_loop(encoder, key_encoder, c["key_momentum"])
                k_a, k_b = key_encoder(a), key_encoder(b)
            value = dense_loss(q_a, k_b, queue, *settings) + dense_loss(q_b, k_a, queue, *settings)
            optimizer.zero_grad(), value.backward(), optimizer.step()
            queue[torch.arange(pointer, pointer + len(a)) % len(queue)] = k_b
            pointer += len(a)
            step += 1
            if step in (first, first + ran["steps"]):
                print(f"loss {value.item():.3f}")      # waits for the device, too
                if step > first:
                    stop = time.perf_counter()
                    break
                start = time.perf_counter()
    theirs = ran["steps"] * c["batch_size"] / (stop - start)
    print(f"[Light]'s step: {theirs:.1f} images/s; ours {ran['ours']:.1f}, {ran['ours'] / theirs:.2f} x")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("views", "loader", "augment", "loss", "ema", "models", "step", "pure", "whole"):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    globals()[sys.argv[1]](*sys.argv[2:])
