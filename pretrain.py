"""Stage 1: pretrain a small network by contrastive learning, without a teacher and without labels.

    python pretrain.py                                             # drawn shapes: no data, no GPU
    python pretrain.py --data PATH --arch resnet18 --recipe small  # your own folder of images
    torchrun --nproc_per_node=8 pretrain.py --arch mobilenetv3_large --data /path/to/imagenet
    python pretrain.py --dry-run ...                               # how fast, how much memory

MoCo (arXiv 1911.05722): a query encoder learns to find, among many keys, the key of its image's
other view. The keys come from a second encoder, a slow average of the first, so that a queue of
old keys stays comparable. The recipes follow two papers on small networks, [Light] arXiv
2212.07158 and [Small] arXiv 2107.14762. The same command, given again, continues an interrupted
run. Then: python lineval.py
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import lineval
from data import UserError, say
from lineval import draw_curve, load_file, load_weights
from loss import TIERS, WEIGHTINGS, soft_info_nce
from models import ARCHS, Encoder

# ------------------------------------------------- recipes

MOCO_V2 = dict(             # arXiv 2003.04297 and its code, for ImageNet
    symmetric=False,        # one direction: the first view asks, the second answers
    lr=0.03,                # per 256 images; grows with the global batch
    warmup_epochs=0.0,      # then a cosine to 0
    weight_decay=1e-4,
    sgd_momentum=0.9,
    batch_size=256,         # global, whatever the number of processes
    epochs=200,
    temperature=0.2,
    smoothing=0.0,          # the share of the target that neighbours in the queue get
    smoothing_schedule="constant",
    neighbors=0,            # how many share it; 0: the whole queue
    weighting="uniform",    # and how, see loss.py
    queue_size=65536,
    key_momentum=0.999,     # share of the old key encoder that a step keeps
    dim=128,                # of the embedding
    hidden_dim="1x",        # of the head's hidden layer; 2x: twice as wide as the feature
    min_scale=0.2,          # least share of the image in a crop
    jitter=[0.4, 0.4, 0.4, 0.1],     # brightness, contrast, saturation, hue
    jitter_p=0.8,
    gray_p=0.2,
    blur_p=0.5,             # sigma 0.1 to 2 pixels
    bn_splits=8,            # batch-norm slices of the global batch: the paper's 8 GPUs
)
RECIPES = {
    "moco_v2": MOCO_V2,
    # [Small]'s released command. It starts from two epochs of distillation: without such an --init
    # the results are not the paper's, and with it a teacher has helped.
    "small": MOCO_V2 | dict(temperature=0.1, hidden_dim="2x", batch_size=512, epochs=800,
                            jitter=[0.8, 0.8, 0.8, 0.4], gray_p=0.5),
    # [Light]: both directions, temperature, lr, warm-up and head from the only settings string in
    # its code: ResNet-18, ImageNet-100, 100 epochs, without smoothing. Epochs and decay are that
    # code's defaults, batch 512 stands in one of its commands. Its loss is the sum of both
    # directions, with lr 0.12 (for 512 images, we assume) and decay 1e-4. Ours is the mean, with
    # half the gradient: so twice the lr (0.24 for 512, 0.12 for 256), and half the decay, since SGD
    # multiplies it by the lr. Weight and neighbours of the smoothing are ours: the code does not
    # say which gave the paper's numbers.
    "light": MOCO_V2 | dict(symmetric=True, lr=0.12, warmup_epochs=3.0, weight_decay=5e-5,
                            temperature=0.1, hidden_dim="2048", batch_size=512,
                            smoothing=0.1, neighbors=20),
}


def scale_to(images, args):
    """Settings for datasets of up to 200,000 images, instead of the recipe's: our rule, see
    assets/RESULTS.md.

    The key encoder remembers 1 / (1 - key_momentum) steps. A long memory makes keys that agree, but
    lag behind the query encoder; in a short run that lag is most of the run. A rule of thumb: a
    memory of a hundredth of the run's steps, at most MoCo's 1000. So that its keys agree, the queue
    holds those of the last tenth of this memory, or of two steps if that is more. A run of 10,000
    steps remembers 100, key_momentum 0.99, and its queue holds the keys of 10 steps.

    Many steps count more than large batches. So the batch is 64 (32 up to 500 images), doubled as
    long as that leaves 20,000 steps (a guess) and it stays below an eighth of the images and within
    the recipe's. lr is 0.03; epochs are 400 up to 2,000 images, else 200; the warm-up is at most a
    tenth of the run. Batch norm has 2 slices, doubled up to 8 while they have more than 32 images:
    the mean of few is a poor estimate. No smoothing: over the nearest keys it has not helped in
    short runs. The shapes have settings of their own. In `args`, what was not typed is None.
    """
    recipe = RECIPES[args.recipe]
    if images > 200_000:
        return {}
    if args.data == "shapes":
        scale = dict(batch_size=64, epochs=4, warmup_epochs=0.5, lr=0.06, temperature=0.2,
                     jitter_p=0.0, gray_p=0.0, blur_p=0.0)
        epochs = args.epochs or scale["epochs"]
    else:
        epochs = args.epochs or (400 if images <= 2_000 else 200)
        batch_size = 32 if images <= 500 else 64
        most = min(recipe["batch_size"], images / 16)
        while batch_size < most and epochs * images / (2 * batch_size) >= 20_000:
            batch_size *= 2
        scale = dict(batch_size=batch_size, epochs=epochs, lr=0.03,
                     warmup_epochs=min(recipe["warmup_epochs"], epochs / 10))
    batch_size = args.batch_size or scale["batch_size"]
    per_epoch = max(1, images // batch_size)
    memory = min(1000, max(2, epochs * per_epoch / 100))
    symmetric = recipe["symmetric"] if args.symmetric is None else args.symmetric
    keys_a_step = batch_size * (2 if symmetric else 1)
    # At most half an epoch, so that few queries meet old keys of their own image.
    age = min(max(2, memory / 10), per_epoch / 2)
    queue_size = min(65536, round(keys_a_step * age))
    bn_splits = 2
    while bn_splits < 8 and batch_size / bn_splits > 32 and batch_size % (2 * bn_splits) == 0:
        bn_splits *= 2
    return scale | dict(key_momentum=round(1 - 1 / memory, 4), queue_size=queue_size,
                        bn_splits=bn_splits, smoothing=0.0,
                        neighbors=min(recipe["neighbors"], args.queue_size or queue_size))


# ------------------------------------------------- the method

class KeyQueue:
    """The last `size` keys, oldest first: keys (K, D) unit rows, random at first; index (K,) of
    their images, -1 at first."""

    def __init__(self, size, dim, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(size, dim, generator=generator)
        self.keys = F.normalize(keys, dim=1).to(device)
        self.index = torch.full((size,), -1, device=device)

    @torch.no_grad()
    def enqueue(self, keys, index):
        """Append keys (B, D) of images index (B,), and drop the oldest."""
        size = len(self.keys)
        self.keys = torch.cat([self.keys, keys])[-size:]
        self.index = torch.cat([self.index, index])[-size:]


@torch.no_grad()
def ema_update(encoder, key_encoder, m):
    """key = m * key + (1 - m) * query, for the parameters. The running statistics of batch norm
    are no parameters: the key encoder, in training mode, takes its own."""
    torch._foreach_lerp_(list(key_encoder.parameters()), list(encoder.parameters()), 1 - m)


@torch.no_grad()
def encode_keys(key_encoder, view, order):
    """This process's views (n, 3, S, S) -> keys (N, D) of the whole global batch, in its order.

    Batch norm mixes into every output the mean of the images it was normalised with. The negatives
    come from earlier batches, with other means. So if a query and its key were normalised beside
    the same images, the positive alone would carry the query's mean: it would be found by that
    instead of by its content. Therefore the key batch is cut into slices in another order than
    the queries: that of `order`, a permutation (N,) of the global batch. The cutting itself is done
    by models.BatchNorm2d. With one process, gather and own_part return what they are given.
    """
    # As (n, S, S, 3) a channels_last view is contiguous, so that gather copies nothing and keeps
    # its layout.
    all_views = data.gather(view.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    rows = data.own_part(order)                                      # (n,) to encode here
    keys = data.gather(key_encoder(all_views[rows]))                 # (N, D), permuted
    return keys[order.argsort()]                                     # argsort undoes a permutation


def lr_at(step, per_epoch, args):
    """Linear warm-up, then a cosine to 0: a function of the step alone."""
    peak = args.lr * args.batch_size / 256
    warm = round(args.warmup_epochs * per_epoch)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, args.epochs * per_epoch - warm)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def smoothing_at(step, per_epoch, args):
    """0 during the warm-up, as in [Light]'s code, and while the queue holds random keys (ours);
    then constant, or [Light]'s ramp of half a cosine over the whole run."""
    real_keys = step * args.batch_size * (2 if args.symmetric else 1)
    if step < args.warmup_epochs * per_epoch or real_keys < args.queue_size:
        return 0.0
    if args.smoothing_schedule == "constant":
        return args.smoothing
    progress = step / (args.epochs * per_epoch)
    return args.smoothing * 0.5 * (1 - math.cos(math.pi * progress))


def pretrain(args):
    """Train as `args` say -> exit code."""
    # -- processes, device, data
    rank, world = start_processes()
    device = data.own_device()
    typed = vars(args).copy()                            # before the rest is filled in
    agree({name: value for name, value in typed.items() if name not in OF_A_MACHINE})
    dataset = load_in_turn(args)
    resolve(args, dataset)
    check(args, len(dataset), world)
    amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_amp(args.amp))
    per_epoch = len(dataset) // args.batch_size
    total_steps = args.epochs * per_epoch

    # -- the two encoders, the queue, the optimizer
    torch.manual_seed(args.seed)
    slice_size = args.batch_size // args.bn_splits       # batch norm sees so many images at once
    encoder = Encoder(args.arch, args.dim, args.hidden_dim,
                      small_images=args.image_size <= data.SMALL, slice_size=slice_size)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    run = Path(args.out or default_run(args, typed, dataset))
    if args.init and not continues(run, args):
        load_weights(encoder.backbone, args.init)
    checkpoint = None if args.dry_run else open_run(run, args)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    queue = KeyQueue(args.queue_size, args.dim, args.seed, device)
    fp16 = amp_dtype == torch.float16
    # fused and foreach both take all parameters at once. Not fused with fp16: torch's fused SGD
    # keeps a momentum that was never set where the scaler skips the first step.
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, args.sgd_momentum,
                                weight_decay=args.weight_decay, fused=not fp16, foreach=fp16)
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    first_step = 0
    if checkpoint:
        first_step = restore(checkpoint, run, encoder, key_encoder, optimizer, scaler, queue)
    agree({"images": args.dataset, "steps done": first_step})
    if args.dry_run:
        agree({"--workers": args.workers})     # so that all take equally many steps
    query_encoder = distribute(encoder, device) if world > 1 else encoder

    # -- the views, batch by batch
    views = data.TwoViews(dataset, args.image_size, args.seed, min_scale=args.min_scale,
                          jitter=args.jitter, jitter_p=args.jitter_p, gray_p=args.gray_p,
                          blur_p=args.blur_p)
    item_lists = data.schedule(len(dataset), args.batch_size, args.epochs, args.seed, rank=rank,
                               world=world, first_step=first_step)
    ready = 0                                  # batches before the clock starts
    if args.dry_run:                           # it may need more batches than a run has
        ready = 2 * args.workers + 3
        item_lists = itertools.islice(itertools.cycle(item_lists), 3 * ready + 10)
    loaded = data.iterate(views, item_lists, args.workers, args.batch_size // world,
                          pin_memory=device.type == "cuda")
    batches = Batches(loaded, device, ready)
    announce(args, typed, dataset, world, device, run, first_step, total_steps)
    if first_step == 0 and data.is_first() and not args.dry_run:
        data.draw_view_pairs(views, run / "views.png")
    if args.compile:                           # after views.png, which is drawn on the CPU
        for part in (encoder, key_encoder):
            part.backbone.compile()            # in place: the state dict keeps its names
        data.COLOR_STEPS[:] = [torch.compile(adjust, dynamic=True) for adjust in data.COLOR_STEPS]
    # Only now: until here an interrupt loses nothing.
    stop = SimpleNamespace(asked=0) if args.dry_run else StopSignals()
    log = Log(run, args, dataset, encoder, batches, stop)

    # -- MoCo's Algorithm 1
    loss_options = dict(temperature=args.temperature, neighbors=args.neighbors,
                        weighting=args.weighting)
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    view_dtype = amp_dtype or torch.get_default_dtype()
    stopped, done = False, first_step
    for step, (crops, params, index) in enumerate(batches, first_step):
        order = data.permutation(args.batch_size, data.SHUFFLE, args.seed, step)
        order = order.to(device, non_blocking=True)
        view1 = data.augment(crops[0], params[0]).to(view_dtype)     # (n, 3, S, S)
        view2 = data.augment(crops[1], params[1]).to(view_dtype)
        query_views, key_views = [view1], [view2]
        if args.symmetric:
            query_views, key_views = [view1, view2], [view2, view1]
        with autocast:
            q = torch.cat([query_encoder(view) for view in query_views])            # (n or 2n, D)
            keys = [encode_keys(key_encoder, view, order) for view in key_views]    # (N, D) each
        k = torch.cat([data.own_part(part) for part in keys])        # the positive keys of q
        smoothing = smoothing_at(step, per_epoch, args)
        loss, info = soft_info_nce(q, k, queue.keys, smoothing=smoothing, **loss_options)

        optimizer.param_groups[0]["lr"] = lr_at(step, per_epoch, args)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema_update(encoder, key_encoder, args.key_momentum)          # key = m key + (1 - m) query
        near_images = queue.index[info["neighbors"]]                 # before the keys move on
        images = data.gather(index).repeat(len(keys))                # once for each direction
        queue.enqueue(torch.cat(keys), images)

        done = step + 1
        if log.is_due(done):
            wanted = log.report(done, loss, info, near_images, index, keys)
            if wanted["save"]:
                save(run, args, done, encoder, key_encoder, optimizer, scaler, queue)
            stopped = wanted["stop"]
            if stopped:
                break

    # -- the end
    if args.dry_run:
        report_dry_run(args, batches, total_steps)
    elif stopped and done < total_steps:
        say(f"stopped: saved {run / 'last.pt'} after step {done} of {total_steps}; the same "
            f"command (without --restart) continues")
        return 128 + stop.asked
    else:
        say(f"done: {total_steps} steps. In {run}: backbone.pt (the weights, under torchvision's "
            f"names), last.pt, log.csv and pictures\n"
            f"next: python lineval.py {shlex.quote(run.as_posix())}")
    return 0


# ------------------------------------------------- several processes

def start_processes():
    """Join torchrun's processes, if any -> (rank, world)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # torch 2.14 has new names for the collectives, which 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        device = data.own_device()
        cuda = device.type == "cuda"
        # torchrun keeps one store through its restarts: without a prefix a process might find the
        # address of one that died.
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world,
                                store=dist.PrefixStore(f"start {restarts}", store),
                                timeout=timedelta(hours=2),          # a download may take long
                                device_id=device if cuda else None)
    return rank, world


def load_in_turn(args):
    """The dataset; where it may be downloaded, on each machine first by one process."""
    waits = dist.is_initialized() and args.data in data.TORCHVISION
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if waits and not first:
        dist.barrier()
    dataset = data.load_dataset(args.data, "train", args.classes != "none", args.skip_unreadable)
    if waits and first:
        dist.barrier()
    return dataset


OF_A_MACHINE = {"data", "init", "out", "workers"}     # flags that may differ between machines


def agree(mine):
    """Raise UserError unless all processes, on all machines, hold the same dict of values."""
    if not dist.is_initialized():
        return
    theirs = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    for name, value in mine.items():
        found = {str(other.get(name)) for other in theirs}
        if len(found) > 1:
            raise UserError(f"the processes differ in {name}: {', '.join(sorted(found))}: give all "
                            f"machines the same command, the same images, and a copy of the run's "
                            f"folder or a disk that they share")


def distribute(encoder, device):
    """The encoder in DDP: its gradient is the mean over all processes. Two forwards before one
    backward, for both directions, are fine."""
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(encoder, device_ids, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)


def mean_over_processes(device, **numbers):
    """The mean of each number over all processes: all get the same, so that they decide alike."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).detach()
                          for value in numbers.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(numbers, values.tolist()))


@torch.no_grad()
def average_buffers(*encoders):
    """Running statistics: the mean over all processes. As moving averages they need it only before
    they are used: one late mean equals a mean after every step."""
    if dist.is_initialized():
        for encoder in encoders:
            for buffer in encoder.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= dist.get_world_size()


# ------------------------------------------------- batches and reports

class Batches:
    """The loaded batches, on the device, with a stopwatch.

    In a dry run, `ready` > 0, the stopwatch starts after so many batches, since the first steps are
    slow and the first batches prefetched; or half a minute after the first step, if that is sooner.
    A minute later the batches end, but not those of several processes, whose clocks differ.
    """

    def __init__(self, loaded, device, ready=0):
        self.loaded, self.device, self.ready = loaded, device, ready
        self.start = time.perf_counter()
        self.timed, self.waited = 0, 0.0       # batches since then, seconds of waiting for them

    def __iter__(self):
        asked = first_step_done = time.perf_counter()
        for number, (crops, params, index) in enumerate(self.loaded):
            if number == 1:
                first_step_done = asked
            if number <= self.ready and asked - first_step_done < 30:
                self.start, self.timed, self.waited = asked, 0, 0.0
            self.waited += time.perf_counter() - asked
            self.timed += 1
            crops = crops.to(self.device, non_blocking=True)
            yield crops, params, index.to(self.device, non_blocking=True)
            asked = time.perf_counter()
            if self.ready and number and asked - self.start > 60 and not dist.is_initialized():
                return

    def seconds(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.start


COLUMNS = ("epoch", "step", "loss", "chance", "accuracy", "positive", "nearest", "spread",
           "same_class", "same_class_chance", "smoothing", "lr", "knn_backbone", "knn_head",
           "own_view", "images_per_s", "data_wait", "hours_left")
HEADER = ("  epoch       step    loss (chance)  acc  positive nearest spread  same (chance)"
          "  images/s wait      left")


class Log:
    """A line on the terminal and a row of log.csv every so many steps, and at an epoch's end."""

    def __init__(self, run, args, dataset, encoder, batches, stop):
        self.run, self.args, self.batches, self.stop = run, args, batches, stop
        self.encoder, self.device = encoder, next(encoder.parameters()).device
        self.per_epoch = len(dataset) // args.batch_size
        self.total_steps = args.epochs * self.per_epoch
        self.labels = dataset.labels.to(self.device)
        self.saved_at, self.lines, self.splits = time.monotonic(), 0, None
        if args.knn_every and not args.dry_run:
            *self.splits, note = lineval.load_splits(args.data, dataset, args.seed,
                                                     args.classes != "none", args.skip_unreadable)
            if note:
                say(f"evaluation while training{note}")

    def is_due(self, done):
        alone_and_asked = self.stop.asked and not dist.is_initialized()
        regular = done % self.args.log_every == 0 or done % self.per_epoch == 0
        return (regular or alone_and_asked) and not self.args.dry_run

    def report(self, done, loss, info, near_images, index, keys):
        """-> {"stop": ..., "save": ...}, the same on all processes. index (n,): the batch's images.
        near_images (n or 2n, neighbors): the images of each query's nearest keys; -1: a random
        key, from before the first step."""
        key_labels = self.labels[near_images.clamp(min=0)]           # (n or 2n, neighbors)
        query_labels = self.labels[index].repeat(len(keys))[:, None]
        known = (near_images >= 0) & (key_labels >= 0) & (query_labels >= 0)
        limit = self.args.save_minutes
        if done % self.per_epoch == 0:         # saves once the last save is a minute old
            limit = min(1, limit)
        minutes = (time.monotonic() - self.saved_at) / 60
        overdue = minutes > limit or done == self.total_steps
        numbers = mean_over_processes(
            self.device, loss=loss, accuracy=info["accuracy"], positive=info["positive"].mean(),
            nearest=info["nearest"].mean(), same=(known & (key_labels == query_labels)).sum(),
            known=known.sum(), stop=bool(self.stop.asked), save=overdue)
        if not math.isfinite(numbers["loss"]):
            raise UserError(f"the loss was not finite near step {done}: the last good checkpoint, "
                            f"if any, is kept; try a lower --lr, a longer --warmup-epochs, or "
                            f"--amp off")
        variance = torch.cat(keys).double().var(0, correction=0).sum().item()
        numbers["spread"] = math.sqrt(variance)                      # 1: everywhere, 0: all alike
        if numbers["known"]:
            numbers["same_class"] = numbers["same"] / numbers["known"]
            numbers["same_class_chance"] = self.args.same_class_chance
        numbers |= self.measure_if_due(done)
        if data.is_first():
            self.write_row(done, numbers)
        # The mean of a flag is above 0 if it is set on any process.
        stop = numbers["stop"] > 0
        save = numbers["save"] > 0 or stop
        if save:
            self.saved_at = time.monotonic()
        return {"stop": stop, "save": save}

    def measure_if_due(self, done):
        """At the end of some epochs: kNN accuracy, or without labels own views found."""
        args = self.args
        epoch, rest = divmod(done, self.per_epoch)
        if self.splits is None or rest or (epoch % args.knn_every and epoch != args.epochs):
            return {}
        began = time.perf_counter()
        average_buffers(self.encoder)
        self.encoder.eval()
        # Batches no larger than those of training: see the shared memory in data.iterate.
        found = lineval.measure_online(self.encoder, *self.splits, args.image_size, args.seed,
                                       device=self.device, workers=args.workers,
                                       batch_size=args.batch_size // data.count_processes())
        self.encoder.train()
        self.batches.start += time.perf_counter() - began            # images/s is of training
        return found

    def write_row(self, done, numbers):
        args, batches = self.args, self.batches
        step, seconds = done - 1, batches.seconds()
        row = numbers | dict(
            epoch=step // self.per_epoch + 1, step=done, chance=math.log(1 + args.queue_size),
            smoothing=smoothing_at(step, self.per_epoch, args),
            lr=lr_at(step, self.per_epoch, args),
            images_per_s=batches.timed * args.batch_size / seconds,
            data_wait=batches.waited / seconds,
            hours_left=seconds / batches.timed * (self.total_steps - done) / 3600)
        if self.lines % 20 == 0:
            say(HEADER)
        self.lines += 1
        same = ""
        if "same_class" in row:
            same = f"{row['same_class']:.2f} ({row['same_class_chance']:.2f})"
        left = timedelta(seconds=round(3600 * row["hours_left"]))
        say(f"{row['epoch']:4d}/{args.epochs:<4d} {done:9d} {row['loss']:7.3f} "
            f"({row['chance']:6.3f}) {row['accuracy']:4.2f} {row['positive']:9.2f} "
            f"{row['nearest']:7.2f} {row['spread']:6.2f} {same:>14s} {row['images_per_s']:9.0f} "
            f"{row['data_wait']:4.0%} {str(left):>9s}")
        for name, words in (("knn_backbone", "kNN of the backbone's features"),
                            ("knn_head", "kNN of the head's output"),
                            ("own_view", "images that find their own view")):
            if name in row:
                say(f"      {words} {row[name]:.1%}")
        path = self.run / "log.csv"
        with data.writing(path):
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        if "knn_backbone" in row or "own_view" in row:
            draw_curve(path, self.run / "curve.png")


def report_dry_run(args, batches, total_steps):
    """Speed, memory and time of the whole run."""
    seconds = batches.seconds()
    rate = batches.timed * args.batch_size / seconds
    hours = total_steps * args.batch_size / rate / 3600
    say(f"dry run: {rate:.0f} images/s, waiting for images {batches.waited / seconds:.0%}"
        f" of the time, peak memory {peak_memory(batches.device):.1f} GiB; the whole run of "
        f"{total_steps} steps would take {hours:.2f} hours without its kNN. Nothing was written.")


def peak_memory(device):
    """In GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if not sys.platform.startswith("linux"):   # others count otherwise, or not at all
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20      # of KiB


# ------------------------------------------------- the run's folder

# What may have changed when a command continues a run; `data` too, which is only where the images
# lie: their fingerprint is compared.
MAY_CHANGE = {"data", "init", "workers", "log_every", "save_minutes", "knn_every", "compile",
              "restart", "skip_unreadable", "out", "same_class_chance"}


def default_run(args, typed, dataset):
    """runs/DATA-ARCH-RECIPE-SEED, and the settings that were typed."""
    name = f"{dataset.name}-{args.arch}-{args.recipe}-{args.seed}"
    default = vars(read_args([]))
    for setting in (*MOCO_V2, "image_size", "amp", "init", "classes"):
        if typed[setting] != default[setting]:
            value = args.init_weights if setting == "init" else typed[setting]
            value = str(value).strip("[]").replace(", ", "_")                  # of a list
            name += f"-{setting}{value}"
    return Path("runs") / name[:200]


def continues(run, args):
    """Whether there is a checkpoint to go on from. --restart is for torchrun's first start, not for
    those after a crash."""
    crashed = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return (run / "last.pt").exists() and (crashed or not args.restart)


def open_run(run, args):
    """Take the run's folder -> its checkpoint to continue from, or None for a new start."""
    with data.writing(run):
        run.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in run.iterdir() if path.suffix != ".tmp"}
    if found and "args.json" not in found:
        raise UserError(f"{str(run)!r} holds files, but no run of this program: give another "
                        f"folder with --out")
    if data.is_first():
        hold(run)
    checkpoint = None
    if continues(run, args):
        checkpoint = load_file(run / "last.pt")
        compare_settings(run, checkpoint, args)
    if dist.is_initialized():
        dist.barrier()                         # all have looked before the first one changes it
    if data.is_first():
        # Also of a run that goes on: its images may lie elsewhere now.
        write(run / "args.json", json.dumps(vars(args), indent=1).encode())
        if not checkpoint:
            for name in ("last.pt", "log.csv", "backbone.pt", "curve.png"):
                (run / name).unlink(missing_ok=True)
    return checkpoint


def hold(run):
    """Keep other runs out of the folder until this process ends, or both would mix their files."""
    if sys.platform == "win32":
        return
    import fcntl
    with data.writing(run):
        # Never closed. A .tmp, since open_run passes over those.
        file = os.open(run / "lock.tmp", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock, which the loader workers of a killed run would still hold.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{str(run)!r} is in use by another process: wait for its end, or give "
                        f"another folder with --out; several processes need torchrun") from None
    except OSError:            # a file system without locks
        pass


def compare_settings(run, checkpoint, args):
    """Raise UserError if the checkpoint is none of ours, or was made with other settings."""
    old, new = checkpoint.get("settings", {}), vars(args)
    may_change = set(MAY_CHANGE)
    if new["init_weights"] is None:            # no --init, or its file is gone: nothing to compare
        may_change.add("init_weights")
    different = sorted(name for name in {*old, *new} - may_change if old.get(name) != new.get(name))
    words = [f"{name} was {old.get(name)}, now {new.get(name)}" for name in different]
    if words:
        raise UserError(f"{str(run)!r} was started with other settings ({'; '.join(words)}): give "
                        f"the old command (or its values as flags, and --out, if the program has "
                        f"changed since), another folder with --out, or --restart; for more "
                        f"epochs start anew from its weights, with --init {run / 'backbone.pt'}")


def restore(checkpoint, run, encoder, key_encoder, optimizer, scaler, queue):
    """Put a checkpoint's state into place, cut the log to it -> the step it was saved after."""
    encoder.load_state_dict(checkpoint["encoder"])
    key_encoder.load_state_dict(checkpoint["key_encoder"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:                   # empty if that machine used no fp16
        scaler.load_state_dict(checkpoint["scaler"])
    queue.keys.copy_(checkpoint["queue"]["keys"])
    queue.index.copy_(checkpoint["queue"]["index"])
    log = run / "log.csv"
    if data.is_first() and log.exists():       # what came after the checkpoint comes again
        os.truncate(log, min(checkpoint["log_bytes"], log.stat().st_size))
    return checkpoint["step"]


def save(run, args, done, encoder, key_encoder, optimizer, scaler, queue):
    """Write backbone.pt and last.pt, which has all there is to continue from after `done` steps.

    last.pt comes last, so that backbone.pt and the log are never older than it.
    """
    average_buffers(encoder, key_encoder)
    if not data.is_first():
        return
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        raise UserError(f"the weights are not finite after step {done}: the last good checkpoint, "
                        f"if any, is kept; try a lower --lr or --amp off")
    backbone = {name: value.cpu() for name, value in encoder.backbone.state_dict().items()}
    write(run / "backbone.pt", serialize(backbone))
    state = dict(settings=vars(args), step=done, encoder=encoder.state_dict(),
                 key_encoder=key_encoder.state_dict(), optimizer=optimizer.state_dict(),
                 scaler=scaler.state_dict(), log_bytes=(run / "log.csv").stat().st_size,
                 # Clones: of a slice, as these are, torch.save would write the whole tensor.
                 queue=dict(keys=queue.keys.clone(), index=queue.index.clone()))
    write(run / "last.pt", serialize(state))


def serialize(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def write(path, content):
    """Write beside `path`, flush to the disk, rename: `path` is the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with data.writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)     # on a full disk its room is needed
            raise


# ------------------------------------------------- settings

def read_args(argv=None):
    """The command line -> args; settings of the recipes are None where not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What the recipes' settings mean stands beside them, at the top of pretrain.py.")
    parser.error = data.refuse
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, cifar10, cifar100, stl10, or a folder of images")
    add("--classes", default="folders", choices=("folders", "none"),
        help="none: the folders of the data are not classes")
    add("--arch", default="mobilenetv3_small", choices=ARCHS, metavar="ARCH", help=", ".join(ARCHS))
    add("--recipe", default="light", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    add("--seed", type=int, default=0, help="of weights, views, order, queue: everything random")
    add("--image-size", type=int, help="pixels (default: 224, or the images' own if smaller)")
    add("--init", metavar="WEIGHTS", help="start from a state dict with torchvision's names")
    # Not --run: torchrun would take that for its own --run-path.
    add("--out", metavar="RUN", help="folder (default: runs/DATA-ARCH-RECIPE-SEED-changes)")
    add("--restart", action="store_true", help="start afresh in the run's folder")
    add("--dry-run", action="store_true", help="a few steps: speed, memory, time; no run")
    add("--skip-unreadable", action="store_true", help="train without files that cannot be read")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
        help="auto: on a GPU bf16, or fp16; off on a CPU")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--workers", type=int, help="loader processes for each training process")
    add("--log-every", type=int, default=20, metavar="STEPS")
    add("--save-minutes", type=float, default=15,
        help="between saves; at an epoch's end one is enough")
    add("--knn-every", type=int, metavar="EPOCHS", help="kNN so often (0: never)")
    special = {
        "symmetric": dict(action=argparse.BooleanOptionalAction),
        "smoothing_schedule": dict(choices=("constant", "cosine")),
        "weighting": dict(choices=WEIGHTINGS),
        "jitter": dict(type=float, nargs=4, metavar=("B", "C", "S", "H")),
    }
    for name, value in MOCO_V2.items():
        columns = " | ".join(f"{recipe}: {values[name]}" for recipe, values in RECIPES.items())
        options = special.get(name, dict(type=type(value)))
        add("--" + name.replace("_", "-"), help=columns, **options)
    return parser.parse_args(argv)


def resolve(args, dataset):
    """Fill in what was not typed: from the dataset's scale, or else from the recipe."""
    if args.image_size is None:
        args.image_size = data.default_image_size(dataset)
    settings = RECIPES[args.recipe] | scale_to(len(dataset), args)
    if args.image_size <= data.SMALL:
        settings["blur_p"] = 0.0               # a sigma of two pixels would hide outlines (ours)
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.hidden_dim = hidden_width(args.hidden_dim, args.arch)
    if args.knn_every is None:
        args.knn_every = max(1, args.epochs // 10)
    if args.workers is None:
        args.workers = data.default_workers()
    if args.data not in data.NAMES:
        args.data = os.path.realpath(args.data)
    args.init_weights = None                   # with --out a run may go on when that file is gone
    if args.init:
        args.init = os.path.realpath(args.init)
        if os.path.isfile(args.init):
            args.init_weights = data.digest(Path(args.init).read_bytes())
    known = dataset.labels[dataset.labels >= 0]
    shares = torch.bincount(known) / max(1, len(known))
    args.same_class_chance = shares.square().sum().item()
    args.dataset = dataset.fingerprint()


def hidden_width(text, arch):
    """"2x" -> twice the feature's width; "2048" -> 2048."""
    try:
        if not text.endswith("x"):
            return int(text)
        with torch.device("meta"):
            return round(float(text[:-1]) * ARCHS[arch]().feature_dim)
    except ValueError:
        raise UserError(f"--hidden-dim {text}: pass a number, or 2x for twice the feature's "
                        f"width") from None


def resolve_amp(amp):
    if amp != "auto":
        return amp
    if not torch.cuda.is_available():
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


RANGES = {                  # of each number: the least and the greatest
    "batch_size": (1, 2 ** 20), "epochs": (1, 2 ** 20), "queue_size": (1, 2 ** 24),
    "dim": (1, 2 ** 14), "hidden_dim": (0, 2 ** 16), "bn_splits": (1, 2 ** 12),
    "image_size": (8, 4096), "neighbors": (0, 2 ** 16), "seed": (0, 2 ** 63 - 1),
    "workers": (0, 1024), "log_every": (1, 2 ** 30), "knn_every": (0, 2 ** 30),
    "save_minutes": (0, 1e6), "lr": (0, 1e38), "weight_decay": (0, 1e3),
    "warmup_epochs": (0, 2 ** 20), "temperature": (1e-3, 1e3), "smoothing": (0, 1),
    "key_momentum": (0, 1), "sgd_momentum": (0, 1), "min_scale": (1e-3, 1), "gray_p": (0, 1),
    "blur_p": (0, 1), "jitter_p": (0, 1),
}


def check(args, images, world):
    """Raise UserError, with value and remedy, for what cannot work on so many images."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: must lie in [{least}, {most}]")
    batch, splits = args.batch_size, args.bn_splits
    epoch_keys = images // batch * batch * (2 if args.symmetric else 1)
    conditions = (
        (min(args.jitter) >= 0 and max(args.jitter[:3]) < math.inf and args.jitter[3] <= 0.5,
         f"--jitter {args.jitter}: must not be negative, its hue at most 0.5"),
        (images >= batch,
         f"{args.data} has {images} images, fewer than one batch of {batch}: pass a smaller "
         f"--batch-size, or add images"),
        (splits % world == 0,
         f"--bn-splits {splits} cannot be shared by {world} processes: start a number that divides "
         f"it, or pass --bn-splits {world}, which changes the method"),
        (batch % splits == 0 and batch >= 2 * splits,
         f"--batch-size {batch} is not --bn-splits {splits} equal slices of at least 2 images: "
         f"pass a multiple of {splits} from {2 * splits} on"),
        (args.queue_size < epoch_keys,
         f"--queue-size {args.queue_size} holds a whole epoch's {epoch_keys} keys, so queries meet "
         f"their own old keys: pass --queue-size {epoch_keys // 8} or less"),
        (args.neighbors <= args.queue_size,
         f"--neighbors {args.neighbors}: must be at most the queue's {args.queue_size}"),
        (args.weighting != "tiered" or args.neighbors in TIERS,
         f"--neighbors {args.neighbors}: tiered is defined for {', '.join(map(str, TIERS))}"),
        (args.warmup_epochs < args.epochs,
         f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}: pass a "
         f"smaller number"),
        (args.amp != "fp16" or torch.cuda.is_available(),
         "--amp fp16 needs a GPU: pass --amp off"),
    )
    for holds, otherwise in conditions:
        if not holds:
            raise UserError(otherwise)


def announce(args, typed, dataset, world, device, run, first_step, total_steps):
    """Say what is about to run, and which settings differ from the recipe."""
    n, splits = args.batch_size // world, args.bn_splits // world
    per_epoch = total_steps // args.epochs
    say(f"{dataset.root or dataset.name}: {len(dataset)} images, {dataset.class_words()}, "
        f"{per_epoch} steps an epoch; {world} process{'es' * (world > 1)} on {device.type}, {n} "
        f"images each, {splits} batch-norm slices of {n // splits}")
    if dataset.left_out:
        say(f"left out, since no image: {data.count_words(dataset.left_out)}")
    say(f"recipe {args.recipe}, {args.arch}, {args.image_size} px, {args.epochs} epochs, seed "
        f"{args.seed}; different from the recipe, for these images or typed:")
    for name, value in RECIPES[args.recipe].items():
        now = getattr(args, name)
        if name == "hidden_dim":
            value = hidden_width(value, args.arch)
        if now != value:
            typed_so = ", typed" if typed[name] is not None else ""
            say(f"  {name:14s} {now} instead of {value}{typed_so}")
    if first_step:
        say(f"continuing {run} after step {first_step} of {total_steps}")


# ------------------------------------------------- start and end

class StopSignals:
    """Ctrl-C, SIGTERM, SIGUSR1 or a lost terminal: save and stop after this step, or with several
    processes at the next line of the log. Again, 3 seconds later: stop at once. torchrun passes
    SIGUSR1 on only if its --signals-to-handle has it; else torchrun dies, and the run goes on."""

    def __init__(self):
        self.asked, self.since = 0, 0.0
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is None:                 # Windows has two of them
                continue
            # Under nohup SIGHUP is ignored; but torchrun, which passes it on, would then kill.
            ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not ignored or "LOCAL_RANK" in os.environ:
                signal.signal(number, self.handle)

    def handle(self, number, _):
        # One wish may come twice: to the group of processes, and from torchrun.
        if self.asked and time.monotonic() - self.since < 3:
            return
        if self.asked:
            os._exit(128 + number)
        self.asked, self.since = int(number), time.monotonic()
        when = "at the next line of the log" if dist.is_initialized() else "after this step"
        words = f"stopping {when}; again, 3 seconds later, to stop at once\n"
        if data.is_first():
            with contextlib.suppress(OSError): # no print, which may be what was interrupted
                os.write(1, words.encode())


def keep_freed_memory():
    """Have glibc keep large freed blocks, which it would map anew at each step: on 2 cores 1.7 x
    as fast, MobileNetV3-Small at 72 px. Without glibc nothing happens."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4             # of malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2 ** 31 - 1)
    mallopt(m_top_pad, 2 ** 28)


def main(argv=None):
    """`pretrain` with the command line -> exit code."""
    args = read_args(argv)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True      # shapes are fixed
    if not torch.cuda.is_available():
        keep_freed_memory()
    code = pretrain(args)
    if dist.is_initialized():
        dist.barrier()         # or torchrun would end the first, which may still save
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    data.run_main(main)
