"""Stage 2: what is in the frozen features.

    python lineval.py                                     # the newest run
    python lineval.py runs/A runs/B                       # side by side
    python lineval.py RUN --data OTHER                    # transfer to another dataset
    python lineval.py --weights FILE --arch resnet18 --data PATH      # any state dict with torchvision's names

Extracts the features once, then: linear probe, kNN, best-NN, and the second paper's view of the representation space
([Small], arXiv 2107.14762, section 3), all next to the same network with random weights. Labels are used here only.
Writes lineval.json, neighbors.png, map.png and soft_positives.png into the run's folder; with --data, --encoder or
--image-size other than the run's own lineval-OTHER.json, neighbors-OTHER.png and map-OTHER.png beside them.
"""
import argparse
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import to_pil_image

import data
from data import UserError
from models import ARCHS, Encoder, build_backbone

HELD_OUT = 0.2            # share of a dataset without a val split that is kept for evaluation
FINAL_LAYERS = ("fc.", "classifier.3.", "classifier.1.")      # torchvision's 1000-class layers
# The probe's (learning rate, weight decay) pairs, for features of length about 1.
GRID = [(lr, decay) for lr in (0.3, 1.0, 3.0, 10.0, 30.0) for decay in (0.0, 1e-6, 1e-5, 1e-4)]


# ---------------------------------------------------------------------- device, weights and datasets

def own_device():
    """The GPU of this process, one for each on a machine, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        error = UserError(f"process {local_rank} of this machine has no GPU of its own, there are {gpus}: "
                          f"pass --nproc_per_node={gpus} to torchrun")
        error.from_one_process = local_rank == gpus      # more of them have nothing to add
        raise error
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def in_turn(name, load):
    """load(), the first process of each machine before the others where dataset `name` may have to be downloaded."""
    waits = dist.is_initialized() and name in data.TORCHVISION
    later = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits and later:
        dist.barrier()
    try:
        return load()
    finally:     # also where it failed: then the others fail alike, instead of waiting for a process that left
        if waits and not later:
            dist.barrier()


def place(name):
    """A dataset's name, or its folder's one path from the root."""
    return name if name in data.NAMES else os.path.realpath(name)


def load_file(path):
    """A checkpoint as plain tensors, numbers and strings; anything else is named and not loaded (weights_only)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: pass the path of a checkpoint") from None
    except Exception as error:     # truncated zip, pickle with code, garbage: torch raises many types
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: truncated, or not plain weights) and was "
                        f"not run: use another copy, or start afresh with --restart if it is a run's last.pt") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    return content


def load_weights(backbone, path, encoder="query"):
    """Fill `backbone` from a state dict with torchvision's names, or from a run's last.pt (`encoder`: query or key)."""
    weights = load_file(path)
    part = {"query": "encoder", "key": "key_encoder"}[encoder]
    if "settings" in weights and part in weights:
        weights = {k.removeprefix("backbone."): v for k, v in weights[part].items() if k.startswith("backbone.")}
    weights = {str(k): v for k, v in weights.items() if not str(k).startswith(FINAL_LAYERS)}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]      # the first that torch names
        raise UserError(f"{path} does not fit this network ({reason} ...): "
                        f"pass the --arch (and image size) it was made with") from None


def labelled_splits(name, seed=0, train=None):
    """train, train_rows, val, val_rows (labelled rows of each dataset), classes, note. Where there is no val split,
    a keyed fifth of train is held out. Raises UserError for no labels or one class."""
    train = train or data.load_dataset(name, "train")
    val = data.load_dataset(name, "val") if data.has_val(name) else train
    train_rows, val_rows = ((dataset.labels >= 0).nonzero().flatten() for dataset in (train, val))
    note = ""
    if val is train:
        order = train_rows[torch.from_numpy(data.keyed_permutation(len(train_rows), data.HOLD_OUT, seed))]
        val_rows, train_rows = (part.sort().values for part in order.tensor_split([round(HELD_OUT * len(order))]))
        note = (f"no val split: {len(val_rows)} of {len(order)} images held out "
                f"(keyed by the seed; pretraining on these data saw them, unlabelled)")
    classes = len(train.labels[train_rows].unique())
    if classes < 2 or len(val.labels[val_rows].unique()) < 2:
        what = f"{classes} class{'es' * (classes != 1)}" if len(train_rows) else "no labels"
        raise UserError(f"{name} has {what} for {len(train_rows)} training and {len(val_rows)} validation images: "
                        f"evaluation needs at least 2 classes in each, a folder a class")
    return SimpleNamespace(train=train, train_rows=train_rows, val=val, val_rows=val_rows, names=train.classes,
                           note=note)


# ---------------------------------------------------------------------- features

@torch.no_grad()
def outputs(net, dataset, rows, image_size, *, device="cpu", workers=0, batch_size=256):
    """Yield the outputs (B, F) of `net` for the evaluation views of `rows`, a batch at a time."""
    loader = DataLoader(Subset(data.CenterView(dataset, image_size), rows.tolist()), batch_size, num_workers=workers,
                        worker_init_fn=data.outlive_signals, pin_memory=str(device).startswith("cuda"))
    for images, _, _ in loader:
        yield net(data.normalize(images.to(device)))


def extract_features(net, dataset, image_size, *, rows=None, device="cpu", workers=0, batch_size=256):
    """Outputs (len(rows), F) of `net` for the evaluation view of each row, on the CPU; float16 where float32 would pass
    2 GiB. The work is shared out between processes; all but the first get (0, F). The caller sets eval mode.
    """
    rows = torch.arange(len(dataset)) if rows is None else rows
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    each = math.ceil(len(rows) / size)
    mine = rows[torch.arange(rank * each, (rank + 1) * each).clamp(max=len(rows) - 1)]      # padded with the last row
    features, at = None, 0
    try:
        for out in outputs(net, dataset, mine, image_size, device=device, workers=workers, batch_size=batch_size):
            if features is None:      # at once: the parts and their concatenation would be twice the memory
                half = 4 * len(rows) * out.shape[1] > 2 ** 31
                features = torch.empty(len(mine), out.shape[1], dtype=torch.float16 if half else torch.float32)
            features[at:at + len(out)] = out
            at += len(out)
    except UserError as error:      # an image that only this process has seen
        error.from_one_process = True
        raise
    if size > 1:     # the parts of all processes go to the first, straight into their places
        whole = torch.empty(size if rank == 0 else 0, *features.shape, dtype=features.dtype, device=device)
        dist.gather(features.to(device), list(whole) if rank == 0 else None)
        features = whole.flatten(0, 1).cpu()
    return features[:len(rows)]


@torch.no_grad()
def view_features(backbone, two_views, rows, *, device="cpu", workers=0, batch_size=128):
    """Features of two augmented views of each row -> two tensors (len(rows), F)."""
    batches = [[(0, int(i)) for i in part] for part in rows.split(batch_size)]
    loader = DataLoader(two_views, batch_sampler=batches, collate_fn=data.collate, num_workers=workers,
                        worker_init_fn=data.outlive_signals)
    out = [torch.stack([backbone(data.augment(c.to(device), p)) for c, p in zip(crops, params)]).float().cpu()
           for crops, params, _ in loader]
    return torch.cat(out, 1).unbind(0)


def estimate_batch_norm(backbone, dataset, rows, image_size, *, device="cpu", seed=0, batches=16, batch_size=128):
    """Set a random network's running statistics to their mean over some batches of the data: an honest baseline."""
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None                             # cumulative mean
    order = rows[torch.from_numpy(data.keyed_permutation(len(rows), data.SAMPLE, seed, 1)[:batches * batch_size])]
    if len(order) % batch_size == 1:                          # one image alone has no variance
        order = order[:-1]
    backbone.train()
    for _ in outputs(backbone, dataset, order, image_size, device=device, batch_size=batch_size):
        pass
    backbone.eval()


# ---------------------------------------------------------------------- probes

def neighbors_of(val_x, train_x, k, device="cpu", squared_distance=False, step=1024, block=1 << 17):
    """Values and rows of the k nearest rows of train_x (all, if fewer) for every row of val_x: two (V, k) tensors.

    Similarity is the inner product, or minus the squared Euclidean distance; of step x block pairs at a time.
    """
    nearest = []
    for part in val_x.split(step):
        part = part.to(device).float()
        values, rows = [], []                                 # the nearest k of each block
        for start in range(0, len(train_x), block):
            x = train_x[start:start + block].to(device).float()
            near = part @ x.T
            if squared_distance:
                near = 2 * near - x.square().sum(1) - part.square().sum(1, keepdim=True)
            top = near.topk(min(k, len(x)))
            values.append(top.values)
            rows.append(top.indices + start)
        best = torch.cat(values, 1).topk(min(k, len(train_x)))
        nearest.append((best.values.cpu(), torch.cat(rows, 1).gather(1, best.indices).cpu()))
    return [torch.cat(parts) for parts in zip(*nearest)]


def unit(x):
    """Rows of length 1, in x's own type (float16 stays float16), by chunks."""
    return torch.cat([F.normalize(part.float(), dim=1, eps=1e-30).to(x.dtype) for part in x.split(65536)])


def knn_accuracy(train_x, train_y, val_x, val_y, *, k=200, temperature=0.07, device="cpu"):
    """Weighted kNN of arXiv 1805.01978, section 3.4: votes exp(cosine / temperature) of the k nearest of train.

    k is at most the mean size of a class, so that a small dataset's neighborhood is not most of it.
    """
    classes = int(train_y.max()) + 1
    k = min(k, len(train_x) // len(train_y.unique()))
    similarity, rows = neighbors_of(unit(val_x), unit(train_x), k, device)
    votes = torch.zeros(len(val_x), classes).scatter_add_(1, train_y[rows], ((similarity - 1) / temperature).exp())
    return (votes.argmax(1) == val_y).float().mean().item()


def best_nn(train_x, train_y, val_x, val_y, *, max_k=101, device="cpu"):
    """Best-NN of [Small]: unweighted vote of the k nearest by Euclidean distance -> (accuracy, k) of the best odd k.

    k is chosen on the validation set itself, as the paper does. Of classes with equal votes the first wins.
    """
    _, rows = neighbors_of(val_x, train_x, max_k, device, squared_distance=True)
    near = train_y[rows]                                                         # (V, k)
    accuracy = {k: (near[:, :k].mode().values == val_y).float().mean().item() for k in range(1, near.shape[1] + 1, 2)}
    k = max(accuracy, key=accuracy.get)                       # of several the least
    return accuracy[k], k


def train_probes(x, y, mean, scale, classes, grid, *, seed, device, steps=2000, batch_size=512):
    """Softmax regressions, a (lr, weight decay) of `grid` each, trained together -> weight (F, G, C), bias (G, C).

    SGD with momentum 0.9 and a cosine; batches are keyed permutations; every probe sees the same batches.
    """
    lr, decay = (torch.tensor(v, device=device)[:, None] for v in zip(*grid))              # (G, 1)
    weight = torch.zeros(x.shape[1], len(grid), classes, device=device)
    bias = torch.zeros(len(grid), classes, device=device)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    batch_size = min(batch_size, len(x))
    per_epoch = len(x) // batch_size
    steps = max(steps, 10 * per_epoch)
    batches = data.schedule(len(x), batch_size, math.ceil(steps / per_epoch), seed)
    for step, items in zip(range(steps), batches):
        rows = torch.tensor([row for _, row in items])
        batch, labels = (x[rows].to(device).float() - mean) * scale, y[rows].to(device)    # (B, F), (B,)
        error = (torch.tensordot(batch, weight, 1) + bias).softmax(2)                      # (B, G, C) ...
        error[torch.arange(len(rows), device=device), :, labels] -= 1                      # softmax minus target
        error /= len(rows)
        now = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        speed_w.mul_(0.9).add_(torch.tensordot(batch.T, error, 1)).add_(decay * weight)
        speed_b.mul_(0.9).add_(error.sum(0))
        weight.sub_(now * speed_w), bias.sub_(now * speed_b)
    return weight, bias


@torch.no_grad()
def linear_probe(train_x, train_y, val_x, val_y, *, seed=0, device="cpu", grid=GRID, steps=2000):
    """Linear classification of cached features -> dict of top1, top5 (on val; of more than 5 classes), lr,
    weight_decay, held_out accuracy.

    Features are standardised with the training set's statistics and divided by the square root of their number. The
    grid is trained on nine tenths of train and judged on the rest; the winner is trained again on all of it.
    """
    parts = train_x.split(16384)                                                         # in float64, a part at a time
    mean = sum(part.to(device).double().sum(0) for part in parts) / len(train_x)
    var = sum((part.to(device).double() - mean).square().sum(0) for part in parts) / len(train_x)
    # Constant features become 0. Relative, since deep random features can be tiny.
    var = torch.where(var > 1e-12 * var.max(), var, torch.inf)
    mean, scale = mean.float(), (var.rsqrt() / math.sqrt(train_x.shape[1])).float()
    classes = int(max(train_y.max(), val_y.max())) + 1
    options = dict(seed=seed, device=device, steps=steps)

    def ranked(x, fitted, count):
        """Rows of x (N, F) -> (N, G, count) classes, best first."""
        weight, bias = fitted
        scores = (torch.tensordot((part.to(device).float() - mean) * scale, weight, 1) + bias for part in x.split(1024))
        return torch.cat([part.topk(count).indices.cpu() for part in scores])

    order = torch.from_numpy(data.keyed_permutation(len(train_x), data.HOLD_OUT, seed, 1))
    judge, learn = order.tensor_split([max(1, len(order) // 10)])
    fitted = train_probes(train_x[learn], train_y[learn], mean, scale, classes, grid, **options)
    right = ranked(train_x[judge], fitted, 1)[:, :, 0] == train_y[judge, None]                # (J, G)
    held_out, winner = right.float().mean(0).max(0)
    fitted = train_probes(train_x, train_y, mean, scale, classes, [grid[winner]], **options)
    right = ranked(val_x, fitted, min(5, classes))[:, 0] == val_y[:, None]                    # (V, 5)
    top5 = {"top5": right.any(1).float().mean().item()} if classes > 5 else {}
    return {"top1": right[:, 0].float().mean().item(), **top5,
            "lr": grid[winner][0], "weight_decay": grid[winner][1], "held_out": held_out.item()}


def augmented_probe(backbone, splits, val_x, job, *, device, workers, batch_size=256):
    """The papers' protocol: a linear layer on the frozen network, a new random crop and flip of each image every epoch.

    `job` has arch, image_size, seed and epochs. SGD, momentum 0.9, no weight decay, a cosine; lr per 256 images 30 for
    ResNet (MoCo), 3 for the small networks (SEED, arXiv 2101.04731) -> top-1 on val.
    """
    images, labels = Subset(splits.train, splits.train_rows.tolist()), splits.train.labels[splits.train_rows]
    views = data.TwoViews(images, job.image_size, job.seed, min_scale=0.08, jitter_p=0, gray_p=0, blur_p=0)
    batch_size = min(batch_size, len(views))
    layer = nn.Linear(backbone.feature_dim, len(splits.names)).to(device)
    nn.init.normal_(layer.weight, 0, 0.01), nn.init.zeros_(layer.bias)
    lr = (30 if job.arch.startswith("resnet") else 3) * batch_size / 256
    optimizer = torch.optim.SGD(layer.parameters(), lr, 0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.epochs * (len(views) // batch_size))
    batches = data.schedule(len(views), batch_size, job.epochs, job.seed)
    for crops, params, index in DataLoader(views, batch_sampler=batches, collate_fn=data.collate, num_workers=workers,
                                           worker_init_fn=data.outlive_signals):
        with torch.no_grad():
            features = backbone(data.augment(crops[0].to(device), params[0]))                  # (B, F)
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels[index].to(device)).backward()
        optimizer.step(), cosine.step()
    right = layer(val_x.to(device).float()).argmax(1).cpu() == splits.val.labels[splits.val_rows]
    return right.float().mean().item()


# ---------------------------------------------------------------------- representation space

COLLAPSED = 1e-12      # mean squared distance of unit rows, below which they differ by rounding alone

def pair_distances(x):
    """Sum of |x_i - x_j|^2 over all ordered pairs of rows of x (N, F): 2 N sum |x - mean|^2, in float64."""
    x = x.double()
    return 2 * len(x) * (x - x.mean(0)).square().sum()


@torch.no_grad()
def representation_space(original, view1, view2, labels):
    """Measures of [Small], section 3, on unit-length features of images and two augmented views of them, each (N, F).

    All pairs, where the paper's code samples three batches of 128 for uniformity. Of them inter-class distance,
    over-clustering ratio and effective rank (Roy and Vetterli 2007) are ours. -> dict of floats, without those that are
    undefined (no class of two images, a complete collapse: distances of rounding errors alone).
    """
    original, view1, view2 = (unit(x.float()) for x in (original, view1, view2))
    n = len(original)

    def found(x, positive):
        """Share of x whose positive is more similar than every other row of x (the nearest row of x is itself)."""
        similarity, _ = neighbors_of(x, x, 2)
        return ((x * positive).sum(1) > similarity[:, 1]).double().mean().item()

    out = {"instance_discrimination": found(original, view1), "instance_discrimination_views": found(view1, view2),
           "alignment": (original - view1).square().sum(1).mean().item(),
           "alignment_views": (view1 - view2).square().sum(1).mean().item()}
    for x, suffix in ((original, ""), (view1, "_views")):
        total = sum((-2 * torch.cdist(part, x).square()).exp().double().sum().item() for part in x.split(2048))
        members = [x[labels == c] for c in labels.unique()]
        within = torch.stack([pair_distances(part) for part in members])
        pairs = torch.tensor([len(part) * (len(part) - 1) for part in members])
        intra = (within / pairs)[pairs > 0].mean()
        inter = (pair_distances(x) - within.sum()) / (n * (n - 1) - pairs.sum())
        out |= {"uniformity" + suffix: math.log((total - n) / (n * (n - 1))),      # the n pairs i = i added exp(0) each
                "intra_class" + suffix: intra.item(), "inter_class" + suffix: inter.item()}
        if inter > COLLAPSED:
            out["over_clustering" + suffix] = (intra / inter).item()
    if pair_distances(original) > COLLAPSED * n * n:
        singular = torch.linalg.svdvals((original - original.mean(0)).double())
        out["effective_rank"] = torch.special.entr(singular / singular.sum()).sum().exp().item()
    return {name: value for name, value in out.items() if math.isfinite(value)}


# ---------------------------------------------------------------------- pictures

GREEN, RED, GRAY = (40, 170, 70), (215, 50, 50), (150, 150, 150)


def draw_rows(path, title, queries, query_rows, others, other_rows):
    """A line of pictures for each query: itself, then its neighbours, green where the class is the same, red where not.

    queries, others: datasets; query_rows (Q,), other_rows (Q, M).
    """
    theirs = others.labels[other_rows]                                                         # (Q, M), -1: no label
    same = (queries.labels[query_rows][:, None] == theirs) & (theirs >= 0)
    out = Image.new("RGB", (168 + 72 * other_rows.shape[1], 24 + 76 * len(query_rows)), "white")
    pen = ImageDraw.Draw(out)
    pen.text((6, 6), f"{title} ({same.float().mean():.0%} of the query's class: green)", fill="black")

    def paste(dataset, row, frame, x, y):      # 64 px, framed by 4
        image, _, _ = data.CenterView(dataset, 64)[row]
        out.paste(ImageOps.expand(to_pil_image(image), 4, frame), (x, y))

    for i, row in enumerate(query_rows.tolist()):
        y, label = 24 + 76 * i, queries.labels[row]
        pen.text((4, y + 28), queries.classes[label][:14] if label >= 0 else "", fill="black")
        paste(queries, row, GRAY, 90, y)
        for j, other in enumerate(other_rows[i].tolist()):
            paste(others, other, GREEN if same[i, j] else RED, 168 + 72 * j, y)
    out.save(path)


def draw_neighbors(path, splits, train_x, val_x, seed, device, queries=10, count=8):
    """For some validation images the nearest training images, by cosine."""
    picks = torch.from_numpy(data.keyed_permutation(len(val_x), data.SAMPLE, seed, 2)[:queries])
    _, near = neighbors_of(unit(val_x[picks]), unit(train_x), count, device)
    draw_rows(path, "left: a validation image; then its nearest training images",
              splits.val, splits.val_rows[picks], splits.train, splits.train_rows[near])


@torch.no_grad()
def draw_soft_positives(path, run, c, dataset, seed, queries=10, count=8):
    """From last.pt: some images, and the keys in the queue that would take their smoothing mass."""
    if dataset.fingerprint != c["dataset"]:     # the queue's indices are of other images
        raise UserError("these are not the images of pretraining")
    state = load_file(run / "last.pt")
    encoder = Encoder(c["arch"], c["dim"], c["hidden_dim"], c["image_size"] <= data.SMALL).eval()
    encoder.load_state_dict(state["encoder"])
    real = state["queue"]["index"] >= 0
    if not real.any():
        raise UserError("the queue holds no image's key yet")
    picks = torch.from_numpy(data.keyed_permutation(len(dataset), data.SAMPLE, seed, 3)[:queries])
    q = torch.cat(list(outputs(encoder, dataset, picks, c["image_size"])))                     # (Q, D)
    _, near = neighbors_of(q, state["queue"]["keys"][real], count)                             # (Q, count)
    draw_rows(path, "left: a query; then its nearest keys in the queue, its soft positives",
              dataset, picks, dataset, state["queue"]["index"][real][near])


def draw_map(path, panels, labels, names, most=2000, side=420):
    """2-D PCA of unit-length features, a panel each of (title, features); a colour a class (12 at most), a legend."""
    shown = labels.unique()[:12]
    colors = {c: f"hsv({360 * i // len(shown)}, 90%, 85%)" for i, c in enumerate(shown.tolist())}
    out = Image.new("RGB", (len(panels) * side + 130, side + 24), "white")
    pen = ImageDraw.Draw(out)
    keep = torch.isin(labels, shown).nonzero().flatten()
    keep = keep[torch.from_numpy(data.keyed_permutation(len(keep), data.SAMPLE)[:most])]      # they come class by class
    for i, (title, features) in enumerate(panels):
        x = unit(features[keep].float())
        x = x - x.mean(0)
        plane = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T                          # (N, 2)
        plane = (plane - plane.amin(0)) / (plane.amax(0) - plane.amin(0)).clamp(min=1e-12)
        pen.text((i * side + 8, 6), title, fill="black")
        for (u, v), c in zip((plane * (side - 24) + 12).tolist(), labels[keep].tolist()):
            pen.circle((i * side + u, 24 + v), 2, fill=colors[c])
    for i, (c, color) in enumerate(colors.items()):
        pen.circle((len(panels) * side + 11, 39 + 20 * i), 5, fill=color)
        pen.text((len(panels) * side + 22, 34 + 20 * i), names[c][:16], fill="black")
    out.save(path)


# ---------------------------------------------------------------------- report

PROBES = {     # key in lineval.json: name in the table, how to read it
    "linear_top1": ("linear probe, top-1 %", "higher is better"),
    "linear_top5": ("linear probe, top-5 %", "higher is better"),
    "augmented_top1": ("linear, augmented protocol %", "higher is better; the papers' protocol"),
    "knn": ("weighted kNN %", "higher is better; no training at all"),
    "best_nn": ("best-NN %, Euclidean", "higher is better; k chosen on val, as [Small]"),
    "best_nn_unit": ("best-NN %, unit length", "higher is better"),
}
SPACE = {     # "with labels": a supervised MobileNetV3-Small on CIFAR-10, 4 epochs, val; random is the first column
    "instance_discrimination": ("image finds its own view %", "higher: the pretext task is solved; with labels 12"),
    "instance_discrimination_views": ("view finds the other view %", "higher: the same, harder; with labels 8"),
    "alignment": ("alignment", "lower: views of an image lie together; with labels 0.68"),
    "uniformity": ("uniformity", "lower: features fill the sphere; with labels -2.6"),
    "intra_class": ("intra-class alignment", "lower: a class lies together; with labels 0.92"),
    "inter_class": ("inter-class distance", "higher: classes lie apart; with labels 2.1"),
    "over_clustering": ("over-clustering, intra/inter",
                        "lower: 1 means classes do not show in distances; with labels 0.44"),
    "effective_rank": ("effective rank", "higher: more directions are used; with labels 30"),
}


def evaluate(backbone, splits, job, protocol):
    """All measures of one frozen network -> (report, train features, val features), Nones but on the first process."""
    before = [t.clone() for t in backbone.state_dict().values()]
    # Eval mode: in training mode the batch norms would adapt to the evaluation data, even with the weights frozen.
    backbone.eval()
    options = dict(device=job.device, workers=job.workers)
    sets = {"train": (splits.train, splits.train_rows), "val": (splits.val, splits.val_rows)}
    x = {part: extract_features(backbone, dataset, job.image_size, rows=rows, **options)
         for part, (dataset, rows) in sets.items()}
    if job.rank:
        return None, None, None
    y = {part: dataset.labels[rows] for part, (dataset, rows) in sets.items()}
    both = (x["train"], y["train"], x["val"], y["val"])
    report = {f"linear_{key}": value for key, value in linear_probe(*both, seed=job.seed, device=job.device).items()}
    report["knn"] = knn_accuracy(*both, device=job.device)
    report["best_nn"], report["best_nn_k"] = best_nn(*both, device=job.device)
    report["best_nn_unit"], _ = best_nn(unit(x["train"]), y["train"], unit(x["val"]), y["val"], device=job.device)
    report["space"] = {}
    for part, (dataset, rows) in sets.items():
        order = torch.from_numpy(data.keyed_permutation(len(rows), data.SAMPLE, job.seed, 4))
        chosen = torch.cat([order[y[part][order] == c][:job.per_class] for c in y[part].unique()])
        two_views = data.TwoViews(dataset, job.image_size, job.seed, **job.views)
        views = view_features(backbone, two_views, rows[chosen], **options)
        report["space"][part] = representation_space(x[part][chosen], *views, y[part][chosen])
    if protocol == "augmented":
        report["augmented_top1"] = augmented_probe(backbone, splits, x["val"], job, **options)
    if not all(map(torch.equal, before, backbone.state_dict().values())):
        raise RuntimeError("the backbone moved during its evaluation")     # a bug here, never the user's doing
    return report, x["train"], x["val"]


def print_reports(columns):
    """columns: {title: report}, side by side."""
    widths = [max(18, len(title)) + 2 for title in columns]

    def line(name, cells, reading):
        print(f"{name:32s}" + "".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths)) + f"   {reading}")

    print()
    line("", columns, "")
    for key, (name, reading) in PROBES.items():
        if any(key in report for report in columns.values()):
            line(name, [f"{100 * report[key]:.1f}" if key in report else "-" for report in columns.values()], reading)
    for part in ("train", "val"):
        print(f"representation space, {part}: unit-length features, images | augmented views where two numbers;"
              " 'with labels': a supervised network's on CIFAR-10, not on these data")
        spaces = [report["space"][part] for report in columns.values()]
        for key, (name, reading) in SPACE.items():
            if name.endswith("%"):
                cells = [f"{100 * space[key]:.1f}" for space in spaces]
            else:
                cells = [" | ".join(f"{space[k]:.3f}" for k in (key, key + "_views") if k in space) or "-"
                         for space in spaces]
            line("  " + name, cells, reading)


def read_job(flags, run):
    """What to evaluate: a run's settings, or the flags for bare --weights -> namespace."""
    job = SimpleNamespace(**vars(flags) | dict(run=run, views={}, settings=None))
    if run is None:
        if not flags.arch:
            raise UserError(f"--weights {flags.weights} needs --arch: one of {', '.join(ARCHS)}")
        job.title, job.data = Path(flags.weights).name, flags.data or "shapes"
        job.image_size = flags.image_size or data.default_image_size(
            in_turn(job.data, lambda: data.load_dataset(job.data, "train")))
        job.small_images = job.image_size <= data.SMALL
        return job
    try:
        c = job.settings = json.loads((run / "args.json").read_text())
        job.arch, job.data, job.image_size = c["arch"], flags.data or c["data"], flags.image_size or c["image_size"]
        job.small_images, job.pretrained_on = c["image_size"] <= data.SMALL, (place(c["data"]), c["dataset"])
        job.views = {k: c[k] for k in ("min_scale", "jitter", "jitter_p", "gray_p", "blur_p")}
    except OSError:
        raise UserError(f"{run} is not a run of pretrain.py (no args.json): pass a folder such as runs/...") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}/args.json is damaged ({error}): restore it or pretrain again with --restart") from None
    if flags.arch not in (None, job.arch):
        raise UserError(f"--arch {flags.arch}: {run} holds a {job.arch}; leave the flag out")
    job.weights, job.title = run / ("last.pt" if flags.encoder == "key" else "backbone.pt"), str(run)
    return job


def report_paths(job, train):
    """Where report and pictures go: what is of other data, the key encoder or another size beside the run's own."""
    here = place(job.data)
    other = [train.name] if (here, train.fingerprint) != job.pretrained_on else []
    other += ["key"] if job.encoder == "key" else []
    other += [f"{job.image_size}px"] if job.image_size != job.settings["image_size"] else []
    paths = [job.run / ("-".join([kind, *other]) + suffix)
             for kind, suffix in (("lineval", ".json"), ("neighbors", ".png"), ("map", ".png"))]
    try:
        before = json.loads(paths[0].read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return paths
    if other and before != here:
        raise UserError(f"{paths[0]} is of {before}, another folder of that name: move it away first")
    return paths


def run_job(job):
    """Evaluate a network and its random twin, write, draw -> (random report, report), None but on the first process."""
    started = time.perf_counter()
    splits = in_turn(job.data, lambda: labelled_splits(job.data, job.seed))
    paths = report_paths(job, splits.train) if job.run else ()
    torch.manual_seed(job.seed)
    random, backbone = (build_backbone(job.arch, job.small_images).to(job.device, memory_format=torch.channels_last)
                        for _ in range(2))
    load_weights(backbone, job.weights, job.encoder)
    if job.rank == 0:
        print(f"{job.title}: {job.arch}, {job.encoder} encoder, on {job.data}: {len(splits.train_rows)} training and "
              f"{len(splits.val_rows)} validation images of {len(splits.names)} classes at {job.image_size} px"
              + (f"\n  {splits.note}" if splits.note else ""), flush=True)
    estimate_batch_norm(random, splits.train, splits.train_rows, job.image_size, device=job.device, seed=job.seed)
    random_report, random_x = evaluate(random, splits, job, "cached")[::2]      # frees its training features
    report, train_x, val_x = evaluate(backbone, splits, job, job.protocol)
    if job.rank:
        return None
    if job.run:
        content = {"run": job.title, "data": place(job.data), "encoder": job.encoder, "image_size": job.image_size,
                   "note": splits.note, "train_images": len(splits.train_rows), "val_images": len(splits.val_rows),
                   "seed": job.seed, "pretrained": report, "random": random_report,
                   "seconds": time.perf_counter() - started}
        job.written = [path.name for path in paths]
        report_json, neighbors_png, map_png = paths
        with data.writing(job.run):
            report_json.write_text(json.dumps(content, indent=1) + "\n")
            draw_neighbors(neighbors_png, splits, train_x, val_x, job.seed, job.device)
            draw_map(map_png, [("random weights", random_x), ("pretrained", val_x)],
                     splits.val.labels[splits.val_rows], splits.names)
            try:
                draw_soft_positives(job.run / "soft_positives.png", job.run, job.settings, splits.train, job.seed)
                job.written.append("soft_positives.png")
            except UserError as error:      # no last.pt, or other images: the report does not need them
                print(f"no soft_positives.png: {error}")
    return random_report, report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: data.exit_with(UserError(message))
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs (default: the newest in runs/)")
    add("--weights", help="instead of a run: a state dict with torchvision's names; needs --arch")
    add("--arch", choices=ARCHS, metavar="ARCH", help=", ".join(ARCHS))
    add("--data", help="evaluate on another dataset than the run's own")
    add("--encoder", default="query", choices=("query", "key"))
    add("--protocol", default="cached", choices=("cached", "augmented"), help="augmented: the papers' 100 epochs, too")
    add("--epochs", type=int, default=100, help="of the augmented protocol")
    add("--image-size", type=int)
    add("--per-class", type=int, default=50, help="images a class for the representation space")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1)
    flags = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    flags.rank = int(os.environ.get("RANK", 0))
    flags.device = own_device()
    for name, value, least in (("epochs", flags.epochs, 1), ("per-class", flags.per_class, 2),
                               ("image-size", flags.image_size, 8), ("workers", flags.workers, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Days: the first process measures alone while the others wait.
        dist.init_process_group("nccl" if flags.device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if flags.weights:
        jobs = [read_job(flags, None)]
    else:
        newest = sorted(Path("runs").glob("*/backbone.pt"), key=lambda f: f.stat().st_mtime)[-1:]
        if not (flags.runs or newest):
            raise UserError("no finished epoch of any run in runs/: start with python pretrain.py, or pass --weights")
        jobs = [read_job(flags, Path(run)) for run in flags.runs or [newest[0].parent]]
    columns = {}
    for job in jobs:
        both = run_job(job)
        if both:
            several = (f"random {job.arch} on {Path(job.data).name}, {job.image_size} px", job.title)
            random_title, title = several if len(jobs) > 1 else ("random weights", "pretrained")
            columns.setdefault(random_title, both[0])
            columns[title] = both[1]
    if columns:
        print_reports(columns)
        print()
        for job in jobs:
            if job.run:
                print(f"written: {job.run}/{{{', '.join(job.written)}}}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as user_error:
        data.exit_with(user_error)
