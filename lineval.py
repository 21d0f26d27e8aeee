"""Stage 2: what is in the frozen features.

    python lineval.py                                     # the newest run
    python lineval.py runs/A runs/B                       # side by side
    python lineval.py RUN --data OTHER                    # transfer to another dataset
    python lineval.py --weights FILE --arch resnet18 --data PATH      # any state dict with torchvision's names

Extracts the features once, then: linear probe, kNN, best-NN, and the second paper's view of the representation space
([Small], arXiv 2107.14762, section 3), all next to the same network with random weights. Labels are used here only.
Writes lineval.json, neighbors.png, map.png and soft_positives.png into the run's folder.
"""
import argparse
import copy
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

import data
from data import UserError
from models import ARCHS, Encoder, build_backbone

HELD_OUT = 0.2            # share of a dataset without a val split that is kept for evaluation
FINAL_LAYERS = ("fc.", "classifier.3.", "classifier.1.")      # torchvision's 1000-class layers
LRS, DECAYS = (0.3, 1.0, 3.0, 10.0, 30.0), (0.0, 1e-6, 1e-5, 1e-4)      # the probe's grid, on features of length about 1


# ---------------------------------------------------------------------- weights and datasets

def load_file(path):
    """A checkpoint as plain tensors, numbers and strings; anything else is named and not loaded (weights_only)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: pass the path of a checkpoint") from None
    except Exception as error:     # truncated zip, pickle with code, garbage: torch raises many types
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: truncated, or not plain weights); nothing in it was "
                        f"run: use another copy, or start afresh with --restart if it is a run's last.pt") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    return content


def load_weights(backbone, path, encoder="query"):
    """Fill `backbone` from a state dict with torchvision's names, or from a run's last.pt (`encoder`: query or key)."""
    weights = load_file(path)
    part = {"query": "encoder", "key": "key_encoder"}[encoder]
    if "settings" in weights and part in weights:
        weights = {k.removeprefix("backbone."): v for k, v in weights[part].items() if k.startswith("backbone.")}
    own = backbone.state_dict()
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(k for k in weights.keys() - own.keys() if not str(k).startswith(FINAL_LAYERS))
    wrong = sorted(k for k in own.keys() & weights.keys() if getattr(weights[k], "shape", None) != own[k].shape)
    if missing or extra or wrong:
        what = f"no {missing[0]}" if missing else f"an unknown {extra[0]}" if extra else f"another shape of {wrong[0]}"
        raise UserError(f"{path} does not fit this network ({what}): pass the --arch (and image size) it was made with")
    backbone.load_state_dict({k: weights[k] for k in own})


def labelled_splits(name, seed=0, train=None):
    """train, train_rows, val, val_rows (labelled rows of each dataset), classes, note. Where there is no val split,
    a keyed fifth of train is held out. Raises UserError for no labels or one class."""
    train = train or data.load_dataset(name, "train")
    train_rows, note = (train.labels >= 0).nonzero().flatten(), ""
    if data.has_val(name):
        val = data.load_dataset(name, "val")
        val_rows = (val.labels >= 0).nonzero().flatten()
    else:
        val = train
        order = train_rows[torch.from_numpy(data.keyed_permutation(len(train_rows), data.HOLD_OUT, seed))]
        cut = round(HELD_OUT * len(order))
        val_rows, train_rows = order[:cut].sort().values, order[cut:].sort().values
        note = f"no val split: {cut} of {len(order)} images held out (keyed by the seed; pretraining saw them, unlabelled)"
    classes = len(train.labels[train_rows].unique())
    if classes < 2 or len(val.labels[val_rows].unique()) < 2:
        what = f"{classes} class{'es' * (classes != 1)}" if len(train_rows) else "no labels"
        raise UserError(f"{name} has {what} for {len(train_rows)} training and {len(val_rows)} validation images: evaluation needs "
                        f"at least 2 classes in each, a folder a class, or a labelled dataset by --data")
    return SimpleNamespace(train=train, train_rows=train_rows, val=val, val_rows=val_rows, names=train.classes, note=note)


# ---------------------------------------------------------------------- features

def world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def extract_features(net, dataset, image_size, *, rows=None, device="cpu", workers=0, batch_size=256):
    """Outputs (len(rows), F) of `net` for the evaluation view of each row, on the CPU; shared out between processes.

    float32, or float16 where that would pass 2 GiB. The caller sets eval mode.
    """
    rows = torch.arange(len(dataset)) if rows is None else rows
    rank, size = world()
    each = math.ceil(len(rows) / size)
    mine = rows[(torch.arange(rank * each, (rank + 1) * each)).clamp(max=len(rows) - 1)]      # padded with the last row
    loader = DataLoader(Subset(data.CenterView(dataset, image_size), mine.tolist()), batch_size, num_workers=workers,
                        worker_init_fn=data.outlive_signals, pin_memory=str(device).startswith("cuda"))
    features, at = None, 0
    try:
        for images, _, _ in loader:
            out = net(data.normalize(images.to(device)))
            if features is None:
                half = 4 * len(rows) * out.shape[1] > 2 ** 31
                features = torch.empty(len(mine), out.shape[1], dtype=torch.float16 if half else torch.float32)
            features[at:at + len(out)] = out.float()
            at += len(out)
    except UserError as error:      # an image that only this process has seen
        error.from_one_process = True
        raise
    if size > 1:
        parts = [torch.empty_like(features, device=device) for _ in range(size)]
        dist.all_gather(parts, features.to(device))
        features = torch.cat([part.cpu() for part in parts])
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


@torch.no_grad()
def estimate_batch_norm(backbone, dataset, rows, image_size, *, device="cpu", seed=0, batches=16, batch_size=128):
    """Set a random network's running statistics to the mean over some batches of the data, so that it is an honest baseline."""
    layers = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None                                 # cumulative mean
    order = rows[torch.from_numpy(data.keyed_permutation(len(rows), data.SAMPLE, seed, 1))]
    view = data.CenterView(dataset, image_size)
    backbone.train()
    for part in order.split(batch_size)[:batches]:
        if len(part) > 1:
            backbone(data.normalize(torch.stack([view[int(i)][0] for i in part]).to(device)))
    backbone.eval()


# ---------------------------------------------------------------------- probes

def neighbors_of(val_x, train_x, k, device, squared_distance=False, step=1024, block=1 << 17):
    """Values and rows of the k nearest rows of train_x for every row of val_x: two (V, k) tensors.

    Similarity is the inner product, or minus the squared Euclidean distance; of step x block pairs at a time.
    """
    values, rows = [], []
    for part in val_x.split(step):
        part = part.to(device).float()
        best = None
        for start in range(0, len(train_x), block):
            x = train_x[start:start + block].to(device).float()
            near = part @ x.T
            if squared_distance:
                near = 2 * near - x.square().sum(1) - part.square().sum(1, keepdim=True)
            top = near.topk(min(k, len(x)))
            found = (top.values, top.indices + start)
            best = found if best is None else [torch.cat(pair, 1) for pair in zip(best, found)]
            order = best[0].topk(min(k, best[0].shape[1])).indices
            best = [t.gather(1, order) for t in best]
        values.append(best[0].cpu()), rows.append(best[1].cpu())
    return torch.cat(values), torch.cat(rows)


def unit(x):
    """Rows of length 1, in x's own type (float16 stays float16), by chunks."""
    return torch.cat([F.normalize(part.float(), dim=1, eps=1e-30).to(x.dtype) for part in x.split(65536)])


def knn_accuracy(train_x, train_y, val_x, val_y, *, k=200, temperature=0.07, device="cpu"):
    """Weighted kNN of arXiv 1805.01978, section 3.4: votes exp(cosine / temperature) of the k nearest training features.

    k is at most the mean size of a class, so that a small dataset's neighborhood is not most of it.
    """
    classes = int(train_y.max()) + 1
    k = max(1, min(k, len(train_x) // len(train_y.unique())))
    similarity, rows = neighbors_of(unit(val_x), unit(train_x), k, device)
    votes = torch.zeros(len(val_x), classes).scatter_add_(1, train_y[rows], ((similarity - 1) / temperature).exp())
    return (votes.argmax(1) == val_y).float().mean().item()


def best_nn(train_x, train_y, val_x, val_y, *, max_k=101, device="cpu"):
    """Best-NN of [Small]: unweighted vote of the k nearest by Euclidean distance -> (accuracy, k) of the best odd k.

    k is chosen on the validation set itself, as the paper does. Of classes with equal votes the first wins.
    """
    _, rows = neighbors_of(val_x, train_x, min(max_k, len(train_x)), device, squared_distance=True)
    near = train_y[rows]                                                         # (V, k)
    classes = int(train_y.max()) + 1
    votes = -1e-6 * torch.arange(classes, dtype=torch.float64).repeat(len(val_x), 1)
    best = (-1.0, 0)
    for k in range(1, near.shape[1] + 1):
        votes.scatter_add_(1, near[:, k - 1:k], torch.ones(len(val_x), 1, dtype=torch.float64))
        if k % 2:
            accuracy = (votes.argmax(1) == val_y).float().mean().item()
            best = max(best, (accuracy, k), key=lambda found: found[0])
    return best


def train_probes(x, y, mean, scale, classes, grid, *, seed, device, steps=2000, batch_size=512):
    """Softmax regressions, one for each (lr, weight decay) of `grid`, trained together -> weight (F, G, C), bias (G, C).

    SGD with momentum 0.9 and a cosine; batches are keyed permutations; every probe sees the same batches.
    """
    lr, decay = (torch.tensor(v, device=device)[:, None] for v in zip(*grid))              # (G, 1)
    weight = torch.zeros(x.shape[1], len(grid), classes, device=device)
    bias = torch.zeros(len(grid), classes, device=device)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    batch_size = min(batch_size, len(x))
    per_epoch = len(x) // batch_size
    steps = max(steps, 10 * per_epoch)
    for step in range(steps):
        epoch, t = divmod(step, per_epoch)
        if t == 0:
            order = torch.from_numpy(data.keyed_permutation(len(x), data.ORDER, seed, epoch))
        rows = order[t * batch_size:(t + 1) * batch_size]
        batch, labels = (x[rows].to(device).float() - mean) * scale, y[rows].to(device)    # (B, F), (B,)
        error = probe_scores(batch, weight, bias).softmax(2)                               # (B, G, C) ...
        error[torch.arange(len(rows), device=device), :, labels] -= 1                      # softmax minus target
        error /= len(rows)
        now = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        speed_w.mul_(0.9).add_((batch.T @ error.flatten(1)).view_as(weight)).add_(decay * weight)
        speed_b.mul_(0.9).add_(error.sum(0))
        weight.sub_(now * speed_w), bias.sub_(now * speed_b)
    return weight, bias


def probe_scores(batch, weight, bias):
    """(B, F) -> (B, G, C), all probes in one product."""
    return (batch @ weight.flatten(1)).view(len(batch), *bias.shape) + bias


@torch.no_grad()
def linear_probe(train_x, train_y, val_x, val_y, *, seed=0, device="cpu", grid=None, steps=2000):
    """Linear classification of cached features -> dict of top1, top5 (on val), lr, weight_decay, held_out accuracy.

    Features are standardised with the training set's statistics and divided by the square root of their number. The
    grid is trained on nine tenths of train and judged on the rest; the winner is trained again on all of it.
    """
    grid = grid or [(lr, decay) for lr in LRS for decay in DECAYS]
    parts = train_x.split(16384)                                                         # in float64, a part at a time
    mean = sum(part.to(device).double().sum(0) for part in parts) / len(train_x)
    var = sum((part.to(device).double() - mean).square().sum(0) for part in parts) / len(train_x)
    alive = var > 1e-12 * var.max()                           # relative: deep random features can be tiny, constant ones are 0
    scale = (torch.where(alive, var, torch.inf).rsqrt() / math.sqrt(train_x.shape[1])).float()
    mean, classes = mean.float(), int(max(train_y.max(), val_y.max())) + 1

    def ranked(x, fitted, count):      # (N, G, count) classes, best first
        return torch.cat([probe_scores((part.to(device).float() - mean) * scale, *fitted).topk(count).indices.cpu()
                          for part in x.split(1024)])

    winner, held_out = grid[0], float("nan")
    if len(grid) > 1:
        order = torch.from_numpy(data.keyed_permutation(len(train_x), data.HOLD_OUT, seed, 1))
        judge, learn = order.tensor_split([max(1, len(order) // 10)])
        fitted = train_probes(train_x[learn], train_y[learn], mean, scale, classes, grid, seed=seed, device=device, steps=steps)
        accuracy = (ranked(train_x[judge], fitted, 1)[:, :, 0] == train_y[judge, None]).float().mean(0)      # (G,)
        winner, held_out = grid[int(accuracy.argmax())], accuracy.max().item()
    fitted = train_probes(train_x, train_y, mean, scale, classes, [winner], seed=seed, device=device, steps=steps)
    right = ranked(val_x, fitted, min(5, classes))[:, 0] == val_y[:, None]                    # (V, 5)
    return {"top1": right[:, 0].float().mean().item(), "top5": right.any(1).float().mean().item(),
            "lr": winner[0], "weight_decay": winner[1], "held_out": held_out}


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
    optimizer = torch.optim.SGD(layer.parameters(), (30 if job.arch.startswith("resnet") else 3) * batch_size / 256, 0.9)
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

def pair_sums(x, labels, t=2.0, chunk=2048):
    """Over all ordered pairs i != j of unit rows x (N, F): sums of squared distance and counts within and between classes,
    and the mean of exp(-t d^2)."""
    n, total_exp, same_sum, all_sum = len(x), 0.0, torch.zeros(int(labels.max()) + 1, dtype=torch.float64), 0.0
    for start in range(0, n, chunk):
        d2 = (2 - 2 * x[start:start + chunk] @ x.T).clamp_(min=0)                # (B, N)
        d2[torch.arange(len(d2)), torch.arange(start, start + len(d2))] = 0
        same = labels[start:start + chunk, None] == labels
        same_sum.scatter_add_(0, labels[start:start + chunk], (d2 * same).sum(1).double())
        all_sum += d2.double().sum().item()
        total_exp += (-t * d2).exp().double().sum().item()
    return same_sum, all_sum, (total_exp - n) / (n * (n - 1))      # the n pairs i = i added exp(0) each


@torch.no_grad()
def representation_space(original, view1, view2, labels):
    """Measures of [Small], section 3, on unit-length features of images and two augmented views of them, each (N, F).

    All pairs, where the paper's code samples three batches of 128 for uniformity. Of them inter-class distance,
    over-clustering ratio and effective rank (Roy and Vetterli 2007) are ours. -> dict of floats.
    """
    original, view1, view2 = (unit(x.float()) for x in (original, view1, view2))

    def retrieved(x, positive):
        """Share of x whose positive is more similar than every other row of x."""
        right = 0
        for start in range(0, len(x), 2048):
            near = x[start:start + 2048] @ x.T
            near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -torch.inf
            right += (near.amax(1) < (x[start:start + 2048] * positive[start:start + 2048]).sum(1)).sum().item()
        return right / len(x)

    out = {"instance_discrimination": retrieved(original, view1), "instance_discrimination_views": retrieved(view1, view2),
           "alignment": (original - view1).square().sum(1).mean().item(),
           "alignment_views": (view1 - view2).square().sum(1).mean().item()}
    counts = torch.bincount(labels).double()
    pairs = counts * (counts - 1)
    for x, suffix in ((original, ""), (view1, "_views")):
        same, every, potential = pair_sums(x, labels)
        intra = (same[pairs > 0] / pairs[pairs > 0]).mean().item()
        inter = (every - same.sum().item()) / (len(x) * (len(x) - 1) - pairs.sum().item())
        out |= {"uniformity" + suffix: math.log(potential), "intra_class" + suffix: intra, "inter_class" + suffix: inter,
                "over_clustering" + suffix: intra / inter}
    singular = torch.linalg.svdvals((original - original.mean(0)).double())
    shares = singular / singular.sum()
    out["effective_rank"] = torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()).item()
    return out


# ---------------------------------------------------------------------- pictures

GREEN, RED, GRAY = (40, 170, 70), (215, 50, 50), (150, 150, 150)


def thumbnail(dataset, row, frame, side=64):
    """A framed Pillow image of side + 8 px."""
    image = data.CenterView(dataset, side)[int(row)][0]
    return ImageOps.expand(Image.fromarray(image.permute(1, 2, 0).numpy()), 4, frame)


def draw_rows(path, title, queries, query_rows, others, other_rows):
    """A line of pictures for each query: itself, then its neighbours, green where the class is the same, red where not.

    queries, others: datasets; query_rows (Q,), other_rows (Q, M).
    """
    theirs = others.labels[other_rows]                                                         # (Q, M), -1: no label
    same = (queries.labels[query_rows][:, None] == theirs) & (theirs >= 0)
    out = Image.new("RGB", (168 + 72 * other_rows.shape[1], 24 + 76 * len(query_rows)), "white")
    pen = ImageDraw.Draw(out)
    pen.text((6, 6), f"{title} ({same.float().mean():.0%} of the query's class: green)", fill="black")
    for i, row in enumerate(query_rows):
        y, label = 24 + 76 * i, queries.labels[row]
        pen.text((4, y + 28), queries.classes[label][:14] if label >= 0 else "", fill="black")
        out.paste(thumbnail(queries, row, GRAY), (90, y))
        for j, other in enumerate(other_rows[i]):
            out.paste(thumbnail(others, other, GREEN if same[i, j] else RED), (168 + 72 * j, y))
    out.save(path)


def draw_neighbors(path, splits, train_x, val_x, seed, device, queries=10, count=8):
    """For some validation images the nearest training images, by cosine."""
    picks = torch.from_numpy(data.keyed_permutation(len(val_x), data.SAMPLE, seed, 2)[:queries])
    _, near = neighbors_of(unit(val_x[picks]), unit(train_x), min(count, len(train_x)), device)
    draw_rows(path, "left: a validation image; then its nearest training images",
              splits.val, splits.val_rows[picks], splits.train, splits.train_rows[near])


@torch.no_grad()
def draw_soft_positives(path, run, c, seed, queries=10, count=8):
    """From last.pt: some images, and the keys in the queue that would take their smoothing mass."""
    state, dataset = load_file(run / "last.pt"), data.load_dataset(c["data"], "train")
    encoder = Encoder(c["arch"], c["dim"], c["hidden_dim"], c["image_size"] <= data.SMALL).eval()
    encoder.load_state_dict(state["encoder"])
    real = state["queue"]["index"] >= 0
    if not real.any() or (dataset.labels < 0).all():
        return
    keys, index = state["queue"]["keys"][real], state["queue"]["index"][real]
    picks = torch.from_numpy(data.keyed_permutation(len(dataset), data.SAMPLE, seed, 3)[:queries])
    view = data.CenterView(dataset, c["image_size"])
    q = encoder(data.normalize(torch.stack([view[int(i)][0] for i in picks])))                 # (Q, D)
    near = index[(q @ keys.T).topk(min(count, len(keys))).indices]                             # (Q, count)
    draw_rows(path, "left: a query; then its nearest keys in the queue, its soft positives", dataset, picks, dataset, near)


def draw_map(path, panels, labels, names, most=2000, side=420):
    """2-D PCA of unit-length features, a panel each of (title, features), coloured by class (12 at most), with a legend."""
    shown = sorted(set(labels.tolist()))[:12]
    colors = {c: f"hsv({360 * i // len(shown)}, 90%, 85%)" for i, c in enumerate(shown)}
    out = Image.new("RGB", (len(panels) * side + 130, side + 24), "white")
    pen = ImageDraw.Draw(out)
    keep = torch.isin(labels, torch.tensor(shown)).nonzero().flatten()
    keep = keep[torch.from_numpy(data.keyed_permutation(len(keep), data.SAMPLE)[:most])]      # the rows come class by class
    for i, (title, features) in enumerate(panels):
        x = unit(features[keep].float())
        x = x - x.mean(0)
        plane = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T                          # (N, 2)
        plane = (plane - plane.amin(0)) / (plane.amax(0) - plane.amin(0)).clamp(min=1e-12)
        pen.text((i * side + 8, 6), title, fill="black")
        for (u, v), c in zip((plane * (side - 24) + 12).tolist(), labels[keep].tolist()):
            pen.ellipse((i * side + u - 2, 24 + v - 2, i * side + u + 2, 24 + v + 2), fill=colors[c])
    for i, c in enumerate(shown):
        pen.ellipse((len(panels) * side + 6, 34 + 20 * i, len(panels) * side + 16, 44 + 20 * i), fill=colors[c])
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
SPACE = {     # "with labels": a supervised MobileNetV3-Small on CIFAR-10, 4 epochs, val; a random one stands in the first column
    "instance_discrimination": ("image finds its own view %", "higher: the pretext task is solved; with labels 12"),
    "instance_discrimination_views": ("view finds the other view %", "higher: the same, harder; with labels 8"),
    "alignment": ("alignment", "lower: views of an image lie together; with labels 0.68"),
    "uniformity": ("uniformity", "lower: features fill the sphere; with labels -2.6"),
    "intra_class": ("intra-class alignment", "lower: a class lies together; with labels 0.92"),
    "inter_class": ("inter-class distance", "higher: classes lie apart; with labels 2.1"),
    "over_clustering": ("over-clustering, intra/inter", "lower: 1 means classes do not show in distances; with labels 0.44"),
    "effective_rank": ("effective rank", "higher: more directions are used; with labels 30"),
}


def evaluate(backbone, splits, job, protocol):
    """All measures of one frozen network -> (report, train features, val features); None thrice but on the first process."""
    before = copy.deepcopy(backbone.state_dict())
    # Eval mode: in training mode the batch norms would adapt to the evaluation data, even with the weights frozen.
    backbone.eval()
    options = dict(device=job.device, workers=job.workers)
    sets = {"train": (splits.train, splits.train_rows), "val": (splits.val, splits.val_rows)}
    x = {part: extract_features(backbone, dataset, job.image_size, rows=rows, **options) for part, (dataset, rows) in sets.items()}
    if world()[0]:
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
        report["space"][part] = representation_space(x[part][chosen], *view_features(backbone, two_views, rows[chosen], **options),
                                                     y[part][chosen])
    if protocol == "augmented":
        report["augmented_top1"] = augmented_probe(backbone, splits, x["val"], job, **options)
    if any(not torch.equal(t, before[name]) for name, t in backbone.state_dict().items()):
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
        for key, (name, reading) in SPACE.items():
            spaces = [report["space"][part] for report in columns.values()]
            if name.endswith("%"):
                cells = [f"{100 * space[key]:.1f}" for space in spaces]
            else:
                cells = [" | ".join(f"{space[k]:.3f}" for k in (key, key + "_views") if k in space) for space in spaces]
            line("  " + name, cells, reading)


def read_job(flags, run):
    """What to evaluate: a run's settings, or the flags for bare --weights -> namespace."""
    job = SimpleNamespace(**vars(flags) | dict(run=run, views={}, settings=None))
    if run is None:
        if not flags.arch:
            raise UserError(f"--weights {flags.weights} needs --arch: one of {', '.join(ARCHS)}")
        job.title, job.data = Path(flags.weights).name, flags.data or "shapes"
        job.image_size = flags.image_size or data.default_image_size(data.load_dataset(job.data, "train"))
        job.small_images = job.image_size <= data.SMALL
        return job
    if not (run / "args.json").is_file():
        raise UserError(f"{run} is not a run of pretrain.py (it has no args.json): pass a folder such as runs/...")
    try:
        c = job.settings = json.loads((run / "args.json").read_text())
        job.arch, job.data, job.image_size = c["arch"], flags.data or c["data"], flags.image_size or c["image_size"]
        job.small_images = c["image_size"] <= data.SMALL
        job.views = {k: c[k] for k in ("min_scale", "jitter", "jitter_p", "gray_p", "blur_p")}
    except (ValueError, KeyError) as error:
        raise UserError(f"{run / 'args.json'} is damaged ({error}): restore it or pretrain again with --restart") from None
    if flags.arch not in (None, job.arch):
        raise UserError(f"--arch {flags.arch}: {run} holds a {job.arch}; leave the flag out")
    job.weights, job.title = run / ("last.pt" if flags.encoder == "key" else "backbone.pt"), str(run)
    return job


def run_job(job):
    """Evaluate one network and its random twin, write and draw -> (random report, report); None but on the first process."""
    started = time.perf_counter()
    splits = labelled_splits(job.data, job.seed)
    torch.manual_seed(job.seed)
    random, backbone = (build_backbone(job.arch, job.small_images).to(job.device, memory_format=torch.channels_last) for _ in range(2))
    load_weights(backbone, job.weights, job.encoder)
    if world()[0] == 0:
        print(f"{job.title}: {job.arch}, {job.encoder} encoder, on {job.data}: {len(splits.train_rows)} training and "
              f"{len(splits.val_rows)} validation images of {len(splits.names)} classes at {job.image_size} px"
              + (f"\n  {splits.note}" if splits.note else ""), flush=True)
    estimate_batch_norm(random, splits.train, splits.train_rows, job.image_size, device=job.device, seed=job.seed)
    random_report, random_x = evaluate(random, splits, job, "cached")[::2]      # not its training features: at ImageNet's size, 3 GiB
    report, train_x, val_x = evaluate(backbone, splits, job, job.protocol)
    if world()[0]:
        return None
    if job.run:
        content = {"run": job.title, "data": job.data, "encoder": job.encoder, "image_size": job.image_size, "note": splits.note,
                   "train_images": len(splits.train_rows), "val_images": len(splits.val_rows), "seed": job.seed,
                   "pretrained": report, "random": random_report, "seconds": time.perf_counter() - started}
        with data.writing(job.run):
            (job.run / "lineval.json").write_text(json.dumps(content, indent=1) + "\n")
            draw_neighbors(job.run / "neighbors.png", splits, train_x, val_x, job.seed, job.device)
            draw_map(job.run / "map.png", [("random weights", random_x), ("pretrained", val_x)],
                     splits.val.labels[splits.val_rows], splits.names)
            try:
                draw_soft_positives(job.run / "soft_positives.png", job.run, job.settings, job.seed)
            except UserError as error:      # no last.pt, or its dataset is elsewhere: the report does not need them
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
    add("--protocol", default="cached", choices=("cached", "augmented"), help="augmented: also the papers' 100 epochs of crops")
    add("--epochs", type=int, default=100, help="of the augmented protocol")
    add("--image-size", type=int)
    add("--per-class", type=int, default=50, help="images a class for the representation space")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1)
    flags = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    flags.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    for name in ("epochs", "per_class", "image_size"):
        if getattr(flags, name) is not None and getattr(flags, name) < 2 - (name == "epochs"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(flags, name)}: too small")
    if flags.weights:
        jobs = [read_job(flags, None)]
    else:
        newest = sorted(Path("runs").glob("*/backbone.pt"), key=lambda f: f.stat().st_mtime)[-1:]
        if not (flags.runs or newest):
            raise UserError("no finished epoch of any run in runs/: start with python pretrain.py, or pass --weights")
        jobs = [read_job(flags, Path(run)) for run in flags.runs or [newest[0].parent]]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if flags.device.type == "cuda":
            torch.cuda.set_device(flags.device)
        # Days: the first process measures alone while the others wait.
        dist.init_process_group("nccl" if flags.device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    columns = {}
    for job in jobs:
        both = run_job(job)
        if both:
            several = (f"random {job.arch} on {Path(job.data).name}", job.title)
            random_title, title = several if len(jobs) > 1 else ("random weights", "pretrained")
            columns.setdefault(random_title, both[0])
            columns[title] = both[1]
    if columns:
        print_reports(columns)
        written = [f"{job.run}/{{lineval.json, neighbors.png, map.png, soft_positives.png}}" for job in jobs if job.run]
        print("\n".join(["", *("written: " + w for w in written)]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as user_error:
        data.exit_with(user_error)
