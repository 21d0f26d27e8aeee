"""Stage 1: pretrain a small network by contrastive learning, without a teacher and without labels.

    python pretrain.py                                                   # a demo on drawn shapes: no data, no GPU
    python pretrain.py --data PATH --arch resnet18 --recipe small        # your own folder of images
    torchrun --nproc_per_node=8 pretrain.py --arch mobilenetv3_large --data /path/to/imagenet
    python pretrain.py --dry-run ...                                     # a few steps: speed, memory, time it would take

MoCo (arXiv 1911.05722) with the recipes of two papers on small networks, [Light] arXiv 2212.07158 and [Small] arXiv
2107.14762, in the table below. The same command, given again, continues an interrupted run. Then: python lineval.py
"""
import argparse
import copy
import csv
import ctypes
import io
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
from data import UserError
from lineval import extract_features, in_turn, knn_accuracy, labelled_splits, load_file, load_weights, own_device
from loss import WEIGHTINGS, soft_info_nce
from models import ARCHS, Encoder

# One column a recipe, one row a setting and a flag. Learning rates are per 256 images and grow with the global batch.
# [Light]'s run name has lr 0.12 at batch 512 and weight decay 1e-4 for the sum of both directions; with our mean that is
# 0.12 per 256 and 5e-5.
RECIPES = ("moco_v2", "small", "light")
TABLE = {
    # setting         moco_v2              small                light
    "symmetric":     (False,               False,               True),    # loss in both directions; [Light]'s run name
    "lr":            (0.03,                0.03,                0.12),    # MoCo v2; [Small]; [Light], as above
    "warmup_epochs": (0.0,                 0.0,                 3.0),     # [Light]'s run name
    "weight_decay":  (1e-4,                1e-4,                5e-5),    # MoCo v2; [Small]; [Light], as above
    "temperature":   (0.2,                 0.1,                 0.1),     # MoCo v2; [Small]; [Light]'s run name
    "hidden_dim":    ("1x",                "2x",                "2048"),  # "2x": twice the feature's; MoCo v2; [Small]; [Light]
    "jitter":        ((.4, .4, .4, .1),    (.8, .8, .8, .4),    (.4, .4, .4, .1)),   # brightness, contrast, saturation, hue
    "gray_p":        (0.2,                 0.5,                 0.2),     # MoCo v2; [Small]; MoCo v2's
    "batch_size":    (256,                 512,                 512),     # global; MoCo v2; [Small]; [Light]'s run name
    "epochs":        (200,                 800,                 200),     # on ImageNet
    "smoothing":     (0.0,                 0.0,                 0.1),     # the idea: [Light]; its weight, unpublished: ours
    "neighbors":     (0,                   0,                   20),      # queue entries that share the smoothing: ours
    "weighting":     ("uniform",           "uniform",           "uniform"),
    "sgd_momentum":  (0.9,                 0.9,                 0.9),     # from here on MoCo v2's for all three
    "queue_size":    (65536,               65536,               65536),
    "key_momentum":  (0.999,               0.999,               0.999),
    "dim":           (128,                 128,                 128),
    "min_scale":     (0.2,                 0.2,                 0.2),     # least share of the image in a crop
    "jitter_p":      (0.8,                 0.8,                 0.8),
    "blur_p":        (0.5,                 0.5,                 0.5),     # sigma 0.1 to 2 pixels
    "bn_splits":     (8,                   8,                   8),       # the papers' 8 GPUs
}
# [Small]'s released command also starts from weights distilled from a teacher (SEED, arXiv 2101.04731): without --init,
# `small` is not that paper's row; with it, it is not free of a teacher.

# Smaller datasets: fewer images a batch, a queue well below the dataset, a faster key encoder, more epochs. Ours, but
# for 200,000: MoCo's CIFAR-10 notebook. lr changes `light` alone: held-out images chose it, in the third row (README,
# Results). Applied over the recipe and under the command line.
SCALES = {
    500:     dict(batch_size=32, queue_size=64, key_momentum=0.99, lr=0.03, epochs=400),
    2_000:   dict(batch_size=64, queue_size=256, key_momentum=0.99, lr=0.03, epochs=400),
    20_000:  dict(batch_size=128, queue_size=1024, key_momentum=0.99, lr=0.03, epochs=200),
    200_000: dict(batch_size=512, queue_size=4096, key_momentum=0.99, lr=0.03, epochs=200),
}
# The demo on shapes: minutes on 2 cores. Crops and flips alone, since its pictures have no colour to be robust to, and a
# gentle temperature and learning rate, with which a few hundred steps are enough.
SHAPES = dict(batch_size=128, queue_size=1024, key_momentum=0.99, epochs=8, warmup_epochs=0.5, lr=0.03, temperature=0.2,
              jitter_p=0.0, gray_p=0.0, blur_p=0.0)

# Between the parts of one resumed run:
MAY_DIFFER = {"data", "workers", "log_every", "save_minutes", "knn_every", "compile"}
DRY_STEPS = 3, 10    # of --dry-run, at least: not timed, timed
# What a run's folder may hold, lineval.py's files too. A new start removes it; last args.json, which marks it ours.
WRITTEN = ("last.pt", "log.csv", "backbone.pt", "backbone.json", "views.png", "lineval.json", "lineval-*.json",
           "neighbors.png", "neighbors-*.png", "map.png", "map-*.png", "soft_positives.png", "args.json")
AGREE_EVERY = 5      # steps between looks at what other processes want (stop, save); alone, every step
KNN_TRAIN, KNN_VAL = 50_000, 10_000      # at most so many images for the kNN during training
LOG = ("epoch", "step", "loss", "chance", "accuracy", "positive", "nearest", "spread", "same_class", "same_class_chance",
       "smoothing", "lr", "knn_backbone", "knn_head", "images_per_s", "data_wait", "hours_left")


# ---------------------------------------------------------------------- settings

def read_flags(argv):
    """Command line -> namespace; settings of the table are None where not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="recipes: " + " | ".join(RECIPES) + "; smaller datasets change some of it")
    parser.error = lambda message: data.exit_with(UserError(message))
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, cifar10, cifar100, stl10, or a folder of images")
    add("--arch", default="mobilenetv3_small", choices=ARCHS, metavar="ARCH", help=", ".join(ARCHS))
    add("--recipe", default="light", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    add("--seed", type=int, default=0, help="of weights, views, order, queue: everything random")
    add("--image-size", type=int, help="pixels (default: 224, or the images' own if they are smaller)")
    add("--init", metavar="WEIGHTS", help="start the backbone from a state dict with torchvision's names")
    # Not --run: torchrun would take that for its own --run-path.
    add("--out", metavar="RUN", help="folder of the run (default: runs/DATA-ARCH-RECIPE-SEED)")
    add("--restart", action="store_true", help="start afresh in the run's folder")
    add("--dry-run", action="store_true", help="a few steps: speed, memory, time of the whole run; writes nothing")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="auto: on CUDA bf16, or fp16; off on a CPU")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--workers", type=int, help="loader processes for each training process")
    add("--log-every", type=int, default=20, metavar="STEPS")
    add("--save-minutes", type=float, default=15, help="save inside long epochs too, so often")
    add("--knn-every", type=int, metavar="EPOCHS", help="kNN accuracy of the features so often; 0: never (default: ten times)")
    for name, cells in TABLE.items():
        flag, row = "--" + name.replace("_", "-"), "recipes: " + " | ".join(map(str, cells))
        if name == "symmetric":
            add(flag, action=argparse.BooleanOptionalAction, help=row)
        elif name == "jitter":
            add(flag, type=float, nargs=4, metavar=("B", "C", "S", "H"), help=row)
        elif name == "weighting":
            add(flag, choices=WEIGHTINGS, help=row)
        else:
            add(flag, type=type(cells[0]), help=row)
    return parser.parse_args(argv)


def resolve(flags, dataset, feature_dim):
    """Flags -> (settings, origin of each): recipe, then dataset scale, then command line, the later the stronger."""
    column = RECIPES.index(flags.recipe)
    settings = {name: cells[column] for name, cells in TABLE.items()}
    origin = dict.fromkeys(TABLE, f"recipe {flags.recipe}")
    size = flags.image_size or data.default_image_size(dataset)
    scale = SHAPES if flags.data == "shapes" else next((s for n, s in SCALES.items() if len(dataset) <= n), {})
    scale = dict(scale, **({"blur_p": 0.0} if size <= data.SMALL else {}))
    settings.update(scale)
    origin.update(dict.fromkeys(scale, f"scale of {dataset.name}, {len(dataset)} images of {size} px"))
    given = {name: value for name, value in vars(flags).items() if name in TABLE and value is not None}
    settings.update(given)
    origin.update(dict.fromkeys(given, "command line"))
    width = str(settings["hidden_dim"])
    try:
        settings["hidden_dim"] = round(float(width[:-1]) * feature_dim) if width.endswith("x") else int(width)
    except (ValueError, OverflowError):
        raise UserError(f"--hidden-dim {width}: pass a width, or one in feature widths such as 2x") from None
    settings["jitter"] = list(settings["jitter"])
    settings.update(data=flags.data, dataset=dataset.fingerprint, arch=flags.arch, recipe=flags.recipe, seed=flags.seed,
                    init=flags.init or "", image_size=size, amp=resolve_amp(flags.amp), compile=flags.compile,
                    workers=default_workers() if flags.workers is None else flags.workers, log_every=flags.log_every,
                    save_minutes=flags.save_minutes, knn_every=flags.knn_every)
    if settings["knn_every"] is None:
        settings["knn_every"] = max(1, settings["epochs"] // 10)
    defaults = read_flags([])
    for name in settings.keys() - origin.keys():
        given = getattr(flags, name, None) != getattr(defaults, name, None)      # `dataset`, a fingerprint, has no flag
        origin[name] = "command line" if given else "default"
    return settings, origin


def resolve_amp(amp):
    if amp != "auto":
        return amp
    if not torch.cuda.is_available():
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def default_workers():
    """Half the cores of a training process on a CPU, which needs the others itself; all but one (8 at most) beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, cores - 1 if torch.cuda.is_available() else cores // 2))


def check(c, n, world):
    """Raise UserError, with the value and the remedy, for settings that cannot work on n images and `world` processes."""
    whole = ("batch_size", "epochs", "queue_size", "dim", "bn_splits", "log_every")
    for name in whole:
        if c[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {c[name]}: must be at least 1")
    for name in ("lr", "weight_decay", "warmup_epochs", "hidden_dim", "smoothing", "neighbors", "workers", "knn_every",
                 "save_minutes", *(f"jitter {i}" for i in range(4))):
        value = c["jitter"][int(name[-1])] if name.startswith("jitter") else c[name]
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must not be negative")
    for name in ("key_momentum", "sgd_momentum", "smoothing", "gray_p", "blur_p", "jitter_p", "min_scale"):
        if not 0 <= c[name] <= 1:
            raise UserError(f"--{name.replace('_', '-')} {c[name]}: must lie in [0, 1]")
    if c["jitter"][3] > 0.5:
        raise UserError(f"--jitter's hue {c['jitter'][3]}: must be at most 0.5, half the colour circle")
    for name in ("min_scale", "temperature"):
        if not 0 < c[name] < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {c[name]}: must be above 0")
    if c["image_size"] < 8:
        raise UserError(f"--image-size {c['image_size']}: must be at least 8")
    if not 0 <= c["seed"] < 2 ** 63:
        raise UserError(f"--seed {c['seed']}: must lie in [0, 2^63)")
    batch, splits = c["batch_size"], c["bn_splits"]
    if n < batch:
        fits = f"pass --batch-size {n // splits * splits} or less, or " if n >= 2 * splits else ""
        raise UserError(f"{c['data']} has {n} images, fewer than one batch of {batch}: {fits}add images")
    if splits % world:
        raise UserError(f"--bn-splits {splits} cannot be shared by {world} processes: pass --bn-splits {world} (this changes "
                        f"the method) or start a number of processes that divides {splits}")
    if batch % splits or batch < 2 * splits:
        raise UserError(f"--batch-size {batch} is not --bn-splits {splits} equal slices of at least 2 images: "
                        f"pass a multiple of {splits} from {2 * splits} on")
    keys = n // batch * batch * (2 if c["symmetric"] else 1)
    if c["queue_size"] >= keys:
        raise UserError(f"--queue-size {c['queue_size']} holds a whole epoch's {keys} keys, so a query would meet its own old "
                        f"keys as negatives: pass --queue-size {max(1, keys // 8)} or less")
    if c["neighbors"] > c["queue_size"] or (c["weighting"] == "tiered" and 0 < c["neighbors"] < 3):
        raise UserError(f"--neighbors {c['neighbors']}: must be at most the queue's {c['queue_size']}, and 3 or more if tiered")
    if c["warmup_epochs"] >= c["epochs"] and c["warmup_epochs"]:
        raise UserError(f"--warmup-epochs {c['warmup_epochs']} leaves nothing of --epochs {c['epochs']}: pass a smaller number")
    if c["amp"] == "fp16" and not torch.cuda.is_available():
        raise UserError("--amp fp16 needs a GPU: pass --amp off")
    return 4 * c["queue_size"] > keys


# ---------------------------------------------------------------------- the method

class KeyQueue:
    """The last `size` keys, a ring: keys (K, D) unit rows, random at first; index (K,) of their images, -1 at first."""

    def __init__(self, dim, size, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        self.keys = F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(device)
        self.index = torch.full((size,), -1, device=device)
        self.pointer = 0

    @torch.no_grad()
    def enqueue(self, keys, index):
        """Overwrite the oldest: keys (B, D), index (B,); of more than `size` only the last stay."""
        size = len(self.keys)
        rows = torch.arange(self.pointer, self.pointer + len(keys), device=keys.device)[-size:] % size
        self.keys[rows] = keys[-size:].to(self.keys.dtype)
        self.index[rows] = index[-size:].to(self.index.device)
        self.pointer = (self.pointer + len(keys)) % size


@torch.no_grad()
def ema_update(encoder, key_encoder, m):
    """key = m * key + (1 - m) * query, for the parameters; buffers come from the key encoder's own forwards."""
    torch._foreach_lerp_(list(key_encoder.parameters()), list(encoder.parameters()), 1 - m)


def lr_at(step, c, steps_per_epoch):
    """Linear warm-up, then a cosine to 0: a function of the step alone."""
    peak = c["lr"] * c["batch_size"] / 256
    warm, total = round(c["warmup_epochs"] * steps_per_epoch), c["epochs"] * steps_per_epoch
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def smoothing_at(step, c, steps_per_epoch):
    """Smoothing starts when the warm-up is over and the queue holds real keys only."""
    real_keys = step * c["batch_size"] * (2 if c["symmetric"] else 1)
    return c["smoothing"] if step >= c["warmup_epochs"] * steps_per_epoch and real_keys >= c["queue_size"] else 0.0


def gather(x, p, dim=0):
    """Concatenate x of all processes, in order of rank."""
    if p.world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(p.world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


@torch.no_grad()
def encode_keys(key_encoder, views, crops, params, key_views, order, p):
    """Keys of the chosen views, each (N, D) of the whole global batch, normalised in other company than the queries were.

    The batch-norm slices are cut from a permutation `order` (N,) of the global batch. What crosses processes is uint8
    crops (2, n, 3, S, S) and params (2, n, 8); a single process permutes the views, 2 x (n, 3, S, S), that it has.
    """
    mine, back = order.chunk(p.world)[p.rank], order.argsort()                     # (n,), (N,)
    if p.world > 1:
        params = gather(params.to(p.device), p, dim=1)[:, mine].cpu()              # to the host, where `augment` plans
    keys = []
    for v in key_views:
        view = views[v][mine] if p.world == 1 else data.augment(gather(crops[v], p)[mine], params[v])
        keys.append(gather(key_encoder(view), p)[back])                            # (N, D), in the batch's order
    return keys


@torch.no_grad()
def average_buffers(p, *encoders):
    """Running statistics: the mean over all processes, as they already are the mean over each process's slices."""
    if p.world == 1:
        return
    buffers = [b for e in encoders for b in e.buffers() if b.is_floating_point()]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    torch._foreach_copy_(buffers, [part.view_as(b) for part, b in
                                   zip((flat / p.world).split([b.numel() for b in buffers]), buffers)])


def train(s):
    """The loop; `s` is what `build` made. Returns the signal that stopped it, 0 when the last step is done."""
    c, p, queue, per_epoch = s.c, s.p, s.queue, s.per_epoch
    n = c["batch_size"] // p.world
    mine = slice(p.rank * n, (p.rank + 1) * n)                # this process's rows of the global batch
    query_views, key_views = ((0, 1), (1, 0)) if c["symmetric"] else ((0,), (1,))
    batches, saved_at = iter(s.loader), time.monotonic()
    for step in range(s.step, s.last_step):
        waiting = time.perf_counter()
        crops, params, index = next_batch(s, batches, step)                        # (2, n, 3, S, S), (2, n, 8), (n,)
        s.clock.waited += time.perf_counter() - waiting
        lr, smoothing = lr_at(step, c, per_epoch), smoothing_at(step, c, per_epoch)
        order = torch.from_numpy(data.keyed_permutation(c["batch_size"], data.SHUFFLE, c["seed"], step))
        order = order.to(p.device, non_blocking=True)

        views = data.augment(crops.flatten(0, 1), params.flatten(0, 1)).chunk(2)   # 2 x (n, 3, S, S)
        with torch.autocast(p.device.type, p.amp_dtype, enabled=p.amp_dtype is not None):
            keys = encode_keys(s.key_encoder, views, crops, params, key_views, order, p)     # V x (N, D)
            queries = [s.query(views[v]) for v in query_views]                     # V x (n, D)
        losses, infos = zip(*[soft_info_nce(q, k[mine], queue.keys, temperature=c["temperature"], smoothing=smoothing,
                                            neighbors=c["neighbors"], weighting=c["weighting"])
                              for q, k in zip(queries, keys)])
        loss = sum(losses) / len(losses)

        s.optimizer.param_groups[0]["lr"] = lr
        s.optimizer.zero_grad(set_to_none=True)
        s.scaler.scale(loss).backward()
        s.scaler.step(s.optimizer)
        s.scaler.update()
        average_buffers(p, s.encoder, s.key_encoder)
        ema_update(s.encoder, s.key_encoder, c["key_momentum"])
        neighbor_index = queue.index[infos[0]["neighbors"]]                        # (n, neighbors), before they move on
        queue.enqueue(torch.cat(keys), gather(index, p).repeat(len(keys)))
        s.bad_step = torch.where((s.bad_step < 0) & ~loss.isfinite(), step, s.bad_step)

        done, end_of_epoch = step + 1, (step + 1) % per_epoch == 0
        s.clock.steps += 1
        if done % c["log_every"] == 0 or end_of_epoch or s.dry_run:
            paused = time.perf_counter()
            knn = online_knn(s, done) if end_of_epoch and not s.dry_run else None
            s.clock.started += time.perf_counter() - paused      # images/s and the time left are those of training alone
            log(s, step, loss, infos[0], neighbor_index, index, keys, smoothing, lr, knn)
        if s.dry_run and done == s.timed_from:      # start-up and compilation are over
            s.clock = SimpleNamespace(started=time.perf_counter(), waited=0.0, steps=0)
        stop, overdue = agree(p, done, time.monotonic() - saved_at > 60 * c["save_minutes"])
        if end_of_epoch or stop or overdue:
            save(s, done)
            saved_at = time.monotonic()
        if stop and done < s.last_step:
            return stop
    s.clock.stopped = time.perf_counter()      # the end of the workers, which follows, takes a while
    return 0


def next_batch(s, batches, step):
    """The next batch, on the device (params stay: `augment` wants to see them from the host as well)."""
    try:
        crops, params, index = next(batches)
        return crops.to(s.p.device, non_blocking=True), params, index.to(s.p.device, non_blocking=True)
    except UserError as error:     # one process alone knows; but all hold the same state, so it can save by itself
        message = data.last_line(error)
    save(s, step, alone=True)
    error = UserError(message + ("" if s.dry_run else f"; saved {s.run / 'last.pt'} at step {step}"))
    error.from_one_process = True
    raise error      # outside of except: the first error's traceback would keep the loader and its workers alive


STOP = {"signal": 0}     # set by the signal handler, read by `agree`


def agree(p, done, overdue):
    """(signal to stop for or 0, whether a save is due): the same answer on all processes, or they would deadlock."""
    if p.world == 1:
        return STOP["signal"], overdue
    if done % AGREE_EVERY:
        return 0, False
    wants = torch.tensor([STOP["signal"], int(overdue)], device=p.device)
    dist.all_reduce(wants, dist.ReduceOp.MAX)
    return wants.tolist()


# ---------------------------------------------------------------------- reports

def log(s, step, loss, info, neighbor_index, index, keys, smoothing, lr, knn):
    """One line on the terminal and one in log.csv: this step's values, means over all processes."""
    c, p, labels = s.c, s.p, s.labels
    same, count = torch.zeros((), device=p.device), torch.zeros((), device=p.device)
    if labels is not None:
        known = (neighbor_index >= 0) & (labels[index] >= 0)[:, None]              # -1: no image, or no label
        known &= labels[neighbor_index.clamp(min=0)] >= 0
        same = (known & (labels[neighbor_index.clamp(min=0)] == labels[index][:, None])).sum()
        count = known.sum()
    values = torch.stack([v.detach().double().mean() for v in
                          (loss, info["accuracy"], info["positive"], info["nearest"], same.double(), count.double())])
    values /= p.world
    if p.world > 1:
        dist.all_reduce(values)
    loss, accuracy, positive, nearest, same, count = values.tolist()
    check_finite(s)
    elapsed = time.perf_counter() - s.clock.started
    row = dict(epoch=step // s.per_epoch + 1, step=step + 1, loss=loss, chance=math.log(1 + c["queue_size"]),
               accuracy=accuracy, positive=positive, nearest=nearest,
               spread=torch.cat(keys).double().std(0).mean().item() * math.sqrt(c["dim"]),
               same_class=same / count if count else "", same_class_chance=s.same_class_chance if count else "",
               smoothing=smoothing, lr=lr, knn_backbone=knn[0] if knn else "", knn_head=knn[1] if knn else "",
               images_per_s=s.clock.steps * c["batch_size"] / elapsed, data_wait=s.clock.waited / elapsed,
               hours_left=elapsed / s.clock.steps * max(0, s.total_steps - step - 1) / 3600)
    if p.rank:
        return
    random_keys = (step + 1) * c["batch_size"] * (1 + c["symmetric"]) < c["queue_size"]
    left = round(row["hours_left"] * 3600)
    print(f"epoch {row['epoch']}/{c['epochs']} step {step + 1}/{s.total_steps}  loss {loss:.3f} (chance {row['chance']:.3f})  "
          f"acc {accuracy:.3f}  positive {positive:.2f}  nearest {nearest:.2f}  spread {row['spread']:.2f}  "
          + (f"same class {same / count:.2f} (chance {s.same_class_chance:.2f})  " if count else "")
          + f"lr {lr:.4f}  {row['images_per_s']:.0f} images/s  wait {row['data_wait']:.0%}  "
          f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
          + ("  [queue still holds random keys]" if random_keys else "")
          + (f"\n  kNN of the backbone's features {knn[0]:.1%}, of the head's output {knn[1]:.1%}" if knn else ""), flush=True)
    if not s.dry_run:
        with data.writing(s.run / "log.csv"), open(s.run / "log.csv", "a", newline="") as file:
            file.write(as_csv([row], header=file.tell() == 0))


def online_knn(s, done):
    """Accuracies of the backbone's features and of the head's output, labels used for this report only; None if not due."""
    epoch = done // s.per_epoch
    due = s.c["knn_every"] and (epoch % s.c["knn_every"] == 0 or epoch == s.c["epochs"])
    if not due or s.splits is None:
        return None
    s.encoder.eval()

    def backbone_and_head(x):
        features = s.encoder.backbone(x)
        return torch.cat([features, s.encoder.head(features)], 1)

    width = s.encoder.backbone.feature_dim
    sets = []
    for dataset, rows, most in ((s.splits.train, s.splits.train_rows, KNN_TRAIN), (s.splits.val, s.splits.val_rows, KNN_VAL)):
        rows = rows[torch.from_numpy(data.keyed_permutation(len(rows), data.SAMPLE, s.c["seed"])[:most])]
        try:
            sets.append((extract_features(backbone_and_head, dataset, s.c["image_size"], rows=rows, device=s.p.device,
                                          workers=s.c["workers"]), dataset.labels[rows]))
        except UserError:      # an image of val, say: what was trained is kept
            save(s, done, alone=True)
            raise
    s.encoder.train()
    if s.p.rank:     # the first process has the features, and prints
        return None
    (train_x, train_y), (val_x, val_y) = sets
    parts = (slice(0, width), slice(width, None))
    return [knn_accuracy(train_x[:, part], train_y, val_x[:, part], val_y, device=s.p.device) for part in parts]


# ---------------------------------------------------------------------- checkpoints

def check_finite(s, alone=False):
    """Raise UserError if a loss was not finite; agreed between the processes unless `alone`."""
    bad = s.bad_step.clone()
    if s.p.world > 1 and not alone:
        bad = torch.where(bad < 0, 2 ** 62, bad)
        dist.all_reduce(bad, dist.ReduceOp.MIN)
        bad = torch.where(bad == 2 ** 62, -1, bad)
    if bad >= 0:
        raise UserError(f"the loss was not finite at step {int(bad) + 1}: the last good checkpoint, if any, is kept; "
                        f"try a lower --lr, a longer --warmup-epochs, or --amp off")


def save(s, done, alone=False):
    """Write last.pt (all there is to continue from after `done` steps) and backbone.pt; refuse what is not finite."""
    check_finite(s, alone)
    if s.dry_run or (s.p.rank and not alone):
        return
    state = {"settings": s.c, "step": done, "encoder": s.encoder.state_dict(), "key_encoder": s.key_encoder.state_dict(),
             "optimizer": s.optimizer.state_dict(), "scaler": s.scaler.state_dict(),
             "queue": {"keys": s.queue.keys, "index": s.queue.index, "pointer": s.queue.pointer}}
    tensors = [t for part in ("encoder", "key_encoder") for t in state[part].values()] + [s.queue.keys]
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise UserError(f"the weights are not finite after step {done}: the last good checkpoint, if any, is kept; "
                        f"try a lower --lr, a longer --warmup-epochs, or --amp off")
    write(s.run / "last.pt", state)
    write(s.run / "backbone.pt", {name: t.cpu() for name, t in s.encoder.backbone.state_dict().items()})
    about = {"arch": s.c["arch"], "feature_dim": s.encoder.backbone.feature_dim, "image_size": s.c["image_size"],
             "small_images": s.c["image_size"] <= data.SMALL, "mean": data.MEAN, "std": data.STD, "encoder": "query",
             "data": s.c["data"], "epoch": done / s.per_epoch}
    write(s.run / "backbone.json", as_json(about))


def write(path, content):
    """Serialise in memory, write beside `path`, flush to disk, rename: `path` is the old file or the new, never half."""
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(content, buffer)
    else:
        buffer.write(content.encode())
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.tmp")      # a process that saves alone has its own
    with data.writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def as_json(content):
    return json.dumps(content, indent=1) + "\n"


def as_csv(rows, header):
    """Rows of the log -> text."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def written(run):
    """The files of an earlier run in the folder `run`; raise UserError if they are there, but not of this program."""
    files = [path for pattern in WRITTEN for path in run.glob(pattern) if path.is_file()]
    try:
        ours = {"recipe", "dataset"} <= {*json.loads((run / "args.json").read_text())}
    except (OSError, ValueError, TypeError):
        ours = False
    if files and not ours:
        raise UserError(f"{files[0]} would be written over, but {run} holds no run (there is no args.json of "
                        f"pretrain.py): give another folder with --out, or move the file away")
    return files


def resume(s):
    """Load last.pt into `s` and cut the log to it; raise UserError if it is of other settings."""
    path = s.run / "last.pt"
    state = load_file(path)
    if "settings" not in state or "queue" not in state:
        raise UserError(f"{path} is not a checkpoint of this program: move it away, or pass --restart")
    old, new = state["settings"], s.c
    differences = [f"{k} was {old.get(k)}, now {new.get(k)}"
                   for k in sorted({*old, *new} - MAY_DIFFER) if old.get(k) != new.get(k)]
    if differences:
        raise UserError(f"{s.run} was started with other settings ({'; '.join(differences)}): "
                        f"give the old command, another folder with --out, or start afresh with --restart")
    s.encoder.load_state_dict(state["encoder"])
    s.key_encoder.load_state_dict(state["key_encoder"])
    s.optimizer.load_state_dict(state["optimizer"])
    s.scaler.load_state_dict(state["scaler"])
    s.queue.keys.copy_(state["queue"]["keys"])
    s.queue.index.copy_(state["queue"]["index"])
    s.queue.pointer, s.step = state["queue"]["pointer"], state["step"]
    log_file = s.run / "log.csv"
    if s.p.rank == 0 and log_file.exists():
        with open(log_file, newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["hours_left"] and int(r["step"]) <= s.step]     # whole rows
        write(log_file, as_csv(rows, header=True))


# ---------------------------------------------------------------------- start to end

def start_processes():
    """Join torchrun's processes, if any -> p: rank, world, device, amp_dtype."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = own_device()
    if world > 1:
        # torchrun keeps one store through its restarts: without a prefix, processes would find the addresses of dead ones.
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return SimpleNamespace(rank=rank, world=world, device=device, amp_dtype=None)


def keep_freed_memory():
    """Have glibc keep large freed blocks: handed back, each costs a page fault per 4 KiB again at the next step.

    Measured on 2 cores, MobileNetV3-Small at 72 px: 1.7 x. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4     # of malloc.h
    mallopt(m_mmap_max, 0), mallopt(m_trim_threshold, 2 ** 31 - 1), mallopt(m_top_pad, 2 ** 28)


def build(c, p, dataset, flags):
    """Everything `train` works on, at step 0 or at the step of the run's last.pt."""
    per_epoch = len(dataset) // c["batch_size"]
    torch.manual_seed(c["seed"])
    encoder = Encoder(c["arch"], c["dim"], c["hidden_dim"], c["image_size"] <= data.SMALL, c["batch_size"] // c["bn_splits"])
    if c["init"]:
        load_weights(encoder.backbone, c["init"])
    encoder = encoder.to(p.device, memory_format=torch.channels_last)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    if c["compile"]:
        for part in (encoder, key_encoder):
            part.backbone.compile(), part.head.compile()      # in place: the names in the state dict stay torchvision's
    query = encoder
    if p.world > 1:
        with warnings.catch_warnings():     # torch 2.14 has a new name for broadcast_buffers, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            query = DistributedDataParallel(encoder, [p.device] if p.device.type == "cuda" else None, broadcast_buffers=False)
    # Not fused with fp16: where the scaler skips the first step, torch's fused SGD keeps a momentum that was never set.
    optimizer = torch.optim.SGD(encoder.parameters(), c["lr"], c["sgd_momentum"], weight_decay=c["weight_decay"],
                                fused=p.amp_dtype != torch.float16)
    seen = dataset.labels[dataset.labels >= 0]
    shares = torch.bincount(seen) / max(len(seen), 1)
    s = SimpleNamespace(
        c=c, p=p, encoder=encoder, key_encoder=key_encoder, query=query, optimizer=optimizer, step=0, per_epoch=per_epoch,
        queue=KeyQueue(c["dim"], c["queue_size"], c["seed"], p.device), dry_run=flags.dry_run,
        scaler=torch.amp.GradScaler(p.device.type, enabled=p.amp_dtype == torch.float16),
        bad_step=torch.tensor(-1, device=p.device), total_steps=c["epochs"] * per_epoch,
        labels=dataset.labels.to(p.device) if len(seen) else None, same_class_chance=shares.square().sum().item(),
        run=Path(flags.out or f"runs/{dataset.name}-{c['arch']}-{c['recipe']}-{c['seed']}"))
    # Not when torchrun restarts us:
    restart = flags.restart and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0
    if not s.dry_run:
        with data.writing(s.run):      # it may be forbidden even to look there
            if (s.run / "last.pt").exists() and not restart:
                resume(s)
            elif s.run / "backbone.pt" in written(s.run) and not restart:
                raise UserError(f"{s.run} holds weights but no last.pt to continue from: give another folder with "
                                f"--out, or write over them with --restart")
    if (gather(torch.tensor([s.step], device=p.device), p) != s.step).any():
        raise UserError(f"the processes found different checkpoints in {s.run}: --out must lie on a disk that all "
                        f"machines share")
    # The workers keep two batches each, ready before the first step ends.
    s.timed_from = s.step + max(DRY_STEPS[0], 2 * c["workers"] + 1)
    s.last_step = s.timed_from + max(DRY_STEPS[1], 2 * c["workers"]) if s.dry_run else s.total_steps
    s.clock = SimpleNamespace(started=time.perf_counter(), waited=0.0, steps=0)
    two_views = data.TwoViews(dataset, c["image_size"], c["seed"], min_scale=c["min_scale"], jitter=c["jitter"],
                              jitter_p=c["jitter_p"], gray_p=c["gray_p"], blur_p=c["blur_p"])
    epochs = 3 * s.last_step // per_epoch + 1 if s.dry_run else c["epochs"]     # enough for `measured`, too
    steps = data.schedule(len(dataset), c["batch_size"], epochs, c["seed"], first_step=s.step, rank=p.rank, world=p.world)
    s.loader = DataLoader(two_views, batch_sampler=steps, collate_fn=data.collate, num_workers=c["workers"],
                          worker_init_fn=data.outlive_signals, pin_memory=p.device.type == "cuda")
    return s, two_views


def measured(s):
    """What a dry run tells. The slower of training and loader counts: of batches that lay ready, steps are too fast."""
    images = s.clock.steps * s.c["batch_size"]
    rate = training = images / (s.clock.stopped - s.clock.started)
    if s.c["workers"]:
        batches = iter(s.loader)
        for step in range(s.last_step):
            if step == s.timed_from:
                started = time.perf_counter()
            next_batch(s, batches, step)
        loaded = (s.last_step - s.timed_from) * s.c["batch_size"] / (time.perf_counter() - started)
        rate = min(training, loaded)
    memory = (torch.cuda.max_memory_allocated() if s.p.device.type == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    hours = s.total_steps * s.c["batch_size"] / rate / 3600
    return (f"dry run of {s.clock.steps} steps: {training:.0f} images/s"
            + (f", the loader alone {loaded:.0f}" if s.c["workers"] else "")
            + f", peak memory {memory / 2 ** 30:.1f} GiB a process; the whole run of {s.total_steps} steps would take "
            f"{hours:.2f} hours without its kNN. Nothing was written.")


def main(argv=None):
    flags = read_flags(argv)
    p = start_processes()
    torch.set_flush_denormal(True)
    if p.device.type == "cpu":
        keep_freed_memory()
    say = print if p.rank == 0 else lambda *_, **__: None
    dataset = in_turn(flags.data, lambda: data.load_dataset(flags.data, "train"))
    with torch.device("meta"):
        feature_dim = ARCHS[flags.arch]().feature_dim
    c, origin = resolve(flags, dataset, feature_dim)
    p.amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(c["amp"])
    large_queue = check(c, len(dataset), p.world)
    s, two_views = build(c, p, dataset, flags)
    try:
        s.splits = labelled_splits(flags.data, c["seed"], dataset) if c["knn_every"] else None
    except UserError as error:     # no labels: pretraining needs none
        s.splits = None
        say(f"no kNN during training: {error}")
    drawn = " drawn by data.py (pass --data PATH for your own)" if flags.data == "shapes" else ""
    say(f"{dataset.name}: {len(dataset)} images{drawn}, {s.per_epoch} steps an epoch; "
        f"{p.world} process{'es' * (p.world > 1)} on {p.device.type}, "
        f"{c['batch_size'] // p.world} images each, {c['bn_splits'] // p.world} batch-norm slices of "
        f"{c['batch_size'] // c['bn_splits']}")
    say("\n".join(f"  {name:14s} {str(value):22s} {origin[name]}" for name, value in c.items()))
    if large_queue:
        say("warning: the queue holds over a quarter of an epoch's keys: a smaller --queue-size has fewer of a query's own")
    if s.step:
        say(f"continuing {s.run} after step {s.step} of {s.total_steps}")
    elif not s.dry_run and p.rank == 0:
        with data.writing(s.run):
            s.run.mkdir(parents=True, exist_ok=True)
            for old in written(s.run):
                old.unlink()
            write(s.run / "args.json", as_json(c))
            data.draw_view_pairs(two_views, s.run / "views.png")
    for number in (signal.SIGINT, signal.SIGTERM):     # a dry run has nothing to save
        signal.signal(number, signal.SIG_DFL if s.dry_run else lambda received, _: STOP.update(signal=received))
    stopped = train(s)
    if s.dry_run:
        say(measured(s))
    elif stopped:
        say(f"stopped by {signal.Signals(stopped).name}: saved {s.run / 'last.pt'}; the same command continues", flush=True)
    else:
        say(f"done: {s.total_steps} steps. In {s.run}: backbone.pt (the weights, under torchvision's names), last.pt, "
            f"log.csv, views.png\nnext: python lineval.py {shlex.quote(str(s.run))}")
    if p.world > 1:
        dist.destroy_process_group()
    sys.exit(128 + stopped if stopped else 0)


def run(argv=None):
    """`main`, with what a user or another process did wrong as one line and no traceback."""
    try:
        main(argv)
    except UserError as error:
        data.exit_with(error)
    except Exception as error:
        # gloo and NCCL report a process that left; its own message says why.
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and any(words in str(error) for words in ("by peer", "NCCL", "Broken pipe")):
            print(f"process {os.environ['RANK']}: another process stopped ({data.last_line(error)})", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)     # at once: an ordinary exit waits for the loader's workers, which outlive SIGTERM by a minute


if __name__ == "__main__":
    run()
