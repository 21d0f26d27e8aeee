"""Stage 2: what is in the frozen features.

    python lineval.py                                # the newest run
    python lineval.py runs/A runs/B                  # side by side
    python lineval.py RUN --data OTHER               # transfer to another dataset
    python lineval.py --weights FILE --arch resnet18 --data PATH      # torchvision's names

A network is frozen, its features are computed once, and simple readers are asked what is in them:

    x = backbone(image),  z = x / |x|                 z' : z of an augmented view of the image
    linear probe      argmax_c  w_c . x + b_c          w, b fitted on the training images
    kNN               each near training image votes for its class by exp(z . z_near / 0.07)
    own view found    z . z'  >  z . z_j               for every other image j
    alignment         mean |z - z'|^2
    uniformity        log mean exp(-2 |z_i - z_j|^2)   over all pairs
    over-clustering   mean |z_i - z_j|^2 within classes / the same between classes
    effective rank    exp(entropy of the singular values of z - mean z, as shares)

A number alone says little, since an untrained network already has useful features. So all stand
beside the same network with random weights. The last five need no training: [Small] (arXiv
2107.14762) has own view found, alignment, uniformity and distances within classes. Labels serve
the report alone, and without any it does with what is left. All views are made by MoCo v2's
augmentations, whatever a run was trained with, so that runs compare.
"""
import argparse
import csv
import json
import math
import os
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

import data
from data import LocalError, UserError, say
from models import ARCHS, Encoder, build_backbone

# ------------------------------------------------- features

def center_batches(dataset, rows, image_size, device, workers, batch_size):
    """Yield the evaluation views of `rows`, normalised, (B, 3, S, S) at a time."""
    batches = [part.tolist() for part in rows.split(batch_size)]
    views = data.CenterView(dataset, image_size)
    for images, _, _ in data.iterate(views, batches, workers,
                                     batch_bytes=3 * batch_size * image_size ** 2):
        yield data.normalize(images.to(device))


@torch.no_grad()
def extract_features(net, dataset, image_size, *, rows=None, device="cpu", workers=0,
                     batch_size=256, what="features"):
    """Outputs of `net` for the evaluation view of each row -> (len(rows), F) on the CPU.

    rows (N,): indices, default all. Several processes share the work; all but the first get
    (0, F). float16 where float32 would take more than 2 GiB. The caller sets eval mode.
    """
    rows = torch.arange(len(dataset)) if rows is None else rows
    mine = own_share(rows)
    batches = center_batches(dataset, mine, image_size, device, workers, batch_size)
    outputs = (net(images) for images in batches)
    return collect(outputs, len(mine), len(rows), device, what)


@torch.no_grad()
def view_features(net, dataset, image_size, *, rows, seed=0, device="cpu", workers=0,
                  batch_size=128, what="features of views"):
    """Outputs for two augmented views of each row -> two (len(rows), F), as `extract_features`."""
    mine = own_share(rows)
    views = data.TwoViews(dataset, image_size, seed)
    batches = [[(0, index) for index in part.tolist()] for part in mine.split(batch_size)]
    loader = data.iterate(views, batches, workers, collate_fn=data.collate,
                          batch_bytes=6 * batch_size * image_size ** 2)

    def both(crops, params):
        first = net(data.augment(crops[0].to(device), params[0]))
        second = net(data.augment(crops[1].to(device), params[1]))
        return torch.cat([first, second], 1)                             # (B, 2F)

    outputs = (both(crops, params) for crops, params, _ in loader)
    return collect(outputs, len(mine), len(rows), device, what).chunk(2, dim=1)


def own_share(rows):
    """This process's part of `rows`; the last row again where the parts would be unequal."""
    if not dist.is_initialized():
        return rows
    each = math.ceil(len(rows) / dist.get_world_size())
    first = dist.get_rank() * each
    return rows[torch.arange(first, first + each).clamp(max=len(rows) - 1)]


def collect(outputs, mine, total, device, what):
    """Outputs (B, F), a batch at a time, `mine` in all -> (total, F) on the first process."""
    progress = data.Progress(what, mine)
    features, done = None, 0
    try:
        for out in outputs:
            if features is None:     # at once: parts and their concatenation take twice the memory
                large = 4 * total * out.shape[1] > 2 ** 31
                dtype = torch.float16 if large else torch.float32
                features = torch.empty(mine, out.shape[1], dtype=dtype)
            features[done:done + len(out)] = out
            done += len(out)
            progress.show(done)
    except UserError as error:       # an image that only this process has seen
        raise LocalError(data.last_line(error)) from None
    if not dist.is_initialized():
        return features
    first = dist.get_rank() == 0
    whole = torch.empty(dist.get_world_size() if first else 0, *features.shape,
                        dtype=features.dtype, device=device)
    dist.gather(features.to(device), list(whole) if first else None)
    return whole.flatten(0, 1)[:total].cpu()


@torch.no_grad()
def estimate_batch_norm(net, dataset, rows, image_size, *, device="cpu", workers=0, seed=0,
                        batches=16, batch_size=128):
    """Give a random network the data's batch statistics, the mean over some batches: without
    them it would be a worse baseline than it need be."""
    order = rows[data.permutation(len(rows), data.SAMPLE, seed, 1)[:batches * batch_size]]
    if len(order) % batch_size == 1:                                     # it has no variance
        order = order[:-1]
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    net.train()
    parts = center_batches(dataset, order, image_size, device, workers, batch_size)
    for number, images in enumerate(parts, 1):
        for layer in layers:
            layer.momentum = 1 / number                                  # so it becomes a mean
        net(images)
    for layer in layers:
        layer.momentum = 0.1
    net.eval()


# ------------------------------------------------- measures with labels

def unit(x):
    """Rows of length 1, in float32 or wider; 0 stays 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=1e-30)


def neighbors(x, others, k, *, euclidean=False, device="cpu", step=1024, block=1 << 17):
    """The k nearest rows of `others` (M, F), or all if fewer, for each row of x (N, F).

    -> similarity (N, k), rows (N, k), nearest first; similarity is the cosine, or minus the
    Euclidean distance. At most step x block pairs are in memory at a time.
    """
    progress = data.Progress("nearest neighbours", len(x))
    similarities, indices = [], []
    for part in x.split(step):
        part = part.to(device).float()
        values, rows = [], []                                            # of each block
        for start in range(0, len(others), block):
            candidates = others[start:start + block].to(device).float()
            if euclidean:
                similarity = -torch.cdist(part, candidates)
            else:
                similarity = unit(part) @ unit(candidates).T
            top = similarity.topk(min(k, len(candidates)))
            values.append(top.values)
            rows.append(top.indices + start)
        best = torch.cat(values, 1).topk(min(k, len(others)))
        similarities.append(best.values.cpu())
        indices.append(torch.cat(rows, 1).gather(1, best.indices).cpu())
        progress.show(sum(map(len, indices)))
    return torch.cat(similarities), torch.cat(indices)


def accuracy(predicted, labels):
    return (predicted == labels).double().mean().item()


def knn_accuracy(train_x, train_y, val_x, val_y, *, k=200, temperature=0.07, device="cpu"):
    """Weighted kNN (arXiv 1805.01978, section 3.4): votes exp(cosine / temperature) of the k
    nearest. x (N, F), y (N,) classes -> accuracy on val.

    k is at most the mean size of a class, or a small dataset's neighbourhood would be most of it.
    """
    k = min(k, len(train_x) // len(train_y.unique()))
    similarity, rows = neighbors(val_x, train_x, k, device=device)       # (V, k)
    weights = ((similarity - 1) / temperature).exp()
    votes = torch.zeros(len(val_x), int(train_y.max()) + 1)
    votes.scatter_add_(1, train_y[rows], weights)
    return accuracy(votes.argmax(1), val_y)


def best_nn(train_x, train_y, val_x, val_y, *, max_k=101, device="cpu"):
    """Unweighted vote of the k nearest by Euclidean distance -> (accuracy, k) of the best odd k.

    x (N, F), y (N,). k is chosen on val itself, which flatters. Of classes with equal votes the
    first wins, of several k the least.
    """
    _, rows = neighbors(val_x, train_x, max_k, euclidean=True, device=device)
    near = train_y[rows]                                                 # (V, max_k)
    best, best_k = -1.0, 0
    for k in range(1, near.shape[1] + 1, 2):
        found = accuracy(near[:, :k].mode().values, val_y)
        if found > best:
            best, best_k = found, k
    return best, best_k


DECAYS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)        # for features of length about 1
MOST_NUMBERS = {"cpu": 2 ** 26, "cuda": 2 ** 29}     # N x F that a probe is fitted to


def fit_softmax(x, y, classes, decay, steps=200):
    """Minimise mean cross entropy + decay / 2 |weight|^2: a convex problem, so by L-BFGS.

    x (N, F), y (N,) -> weight (F, classes), bias (classes,).
    """
    weight = torch.zeros(x.shape[1], classes, device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20,
                                  tolerance_grad=1e-6, line_search_fn="strong_wolfe")
    progress = data.Progress(f"linear probe, weight decay {decay:g}, steps", steps)
    calls = 0

    def closure():
        nonlocal calls
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        calls += 1
        progress.show(min(calls, steps))
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe(train_x, train_y, val_x, val_y, *, seed=0, device="cpu", decays=DECAYS):
    """Softmax regression on frozen features: x (N, F), y (N,) -> dict of top1 (on val),
    weight_decay, held_out (the accuracy that chose it), rows (how many it was fitted to).

    Features are standardised by train's statistics and divided by sqrt(F). The weight decay is
    chosen on a tenth of train, never on val; then all of train is fitted. Of more than
    `MOST_NUMBERS` a keyed part of the rows is used.
    """
    most = MOST_NUMBERS[torch.device(device).type] // train_x.shape[1]
    order = data.permutation(len(train_x), data.HOLD_OUT, seed, 1)[:most]
    if len(order) < len(train_x):
        say(f"linear probe: fitted to {len(order):,} of {len(train_x):,} images, since all "
            f"features would be too large")
    x, y = train_x[order].to(device).float(), train_y[order].to(device)
    mean, var = x.double().mean(0), x.double().var(0, correction=0)
    # Constant features become 0. Relative, since a random network's features can be tiny.
    var = torch.where(var > 1e-12 * var.max(), var, torch.inf)
    mean, scale = mean.float(), (var.rsqrt() / math.sqrt(x.shape[1])).float()
    x = (x - mean) * scale
    classes = int(max(train_y.max(), val_y.max())) + 1

    judge = max(1, len(x) // 10)
    held_out = {}
    for decay in decays:
        weight, bias = fit_softmax(x[judge:], y[judge:], classes, decay)
        held_out[decay] = accuracy((x[:judge] @ weight + bias).argmax(1), y[:judge])
    decay = max(held_out, key=held_out.get)
    weight, bias = fit_softmax(x, y, classes, decay)

    predicted = []
    for part in val_x.split(8192):
        scores = (part.to(device).float() - mean) * scale @ weight + bias
        predicted.append(scores.argmax(1).cpu())
    return dict(top1=accuracy(torch.cat(predicted), val_y), weight_decay=decay,
                held_out=held_out[decay], rows=len(x))


def augmented_probe(net, splits, val_x, image_size, *, epochs=100, seed=0, device="cpu",
                    workers=0, batch_size=256):
    """[Small]'s linear protocol, for every network: a new random crop and flip of each image in
    every epoch; batch 256, lr 30, a tenth of it after 60 and after 80 of 100 epochs.

    val_x (V, F): features of splits.val_rows -> top-1 on val.
    """
    views = data.TwoViews(splits.train, image_size, seed, min_scale=0.08, jitter_p=0, gray_p=0,
                          blur_p=0)
    rows, labels = splits.train_rows, splits.train.labels
    batch_size = min(batch_size, len(rows))
    layer = nn.Linear(val_x.shape[1], len(splits.names)).to(device)
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), 30 * batch_size / 256, momentum=0.9)
    total = epochs * (len(rows) // batch_size)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total * 6 // 10, total * 8 // 10])
    progress = data.Progress("linear probe on augmented images, steps", total)
    batches = ([(epoch, int(rows[i])) for epoch, i in items]
               for items in data.schedule(len(rows), batch_size, epochs, seed))
    loader = data.iterate(views, batches, workers, collate_fn=data.collate,
                          batch_bytes=6 * batch_size * image_size ** 2)
    for step, (crops, params, index) in enumerate(loader, 1):
        with torch.no_grad():
            x = net(data.augment(crops[0].to(device), params[0]))        # (B, F)
        optimizer.zero_grad()
        F.cross_entropy(layer(x), labels[index].to(device)).backward()
        optimizer.step()
        steps.step()
        progress.show(step)
    with torch.no_grad():
        predicted = layer(val_x.to(device).float()).argmax(1).cpu()
    return accuracy(predicted, splits.val.labels[splits.val_rows])


# ------------------------------------------------- the representation space

ROUNDING = 1e-6           # cosines that differ by less count as equal
COLLAPSED = 1e-12         # mean squared distance below which unit rows differ by rounding alone


def find_own(x, positive, step=1024):
    """Compare each row of x (N, F) with its row of `positive`, and with all other rows of x
    -> share of rows to which no other is as near (chance 1 / N), share of all others that are
    farther away (chance 1/2). To a network that has collapsed all are equally near: 0, 0."""
    x = unit(x)
    own = (x * unit(positive)).sum(1, keepdim=True)                      # (N, 1)
    n, found, nearer = len(x), 0, 0
    for start in range(0, n, step):
        rows = torch.arange(start, min(start + step, n))
        near = x[rows] @ x.T > own[rows] - ROUNDING                      # (step, N)
        near[torch.arange(len(rows)), rows] = False                      # an image itself
        found += int((near.sum(1) == 0).sum())
        nearer += int(near.sum())
    return found / n, 1 - nearer / (n * (n - 1))


def sum_of_distances(x):
    """Sum of |x_i - x_j|^2 over all ordered pairs of rows: 2 N sum |x_i - mean|^2."""
    x = x.double()
    return 2 * len(x) * (x - x.mean(0)).square().sum()


def class_distances(x, labels):
    """intra_class: mean |x_i - x_j|^2 within a class, the mean over classes; inter_class: the
    mean over pairs of different classes; over_clustering: their ratio. x (N, F) unit rows."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    within, pairs = [], []
    for c in labels.unique():
        members = x[labels == c]
        within.append(sum_of_distances(members))
        pairs.append(len(members) * (len(members) - 1))
    if max(pairs, default=0) == 0 or len(pairs) < 2:
        return {}
    within, pairs = torch.stack(within), torch.tensor(pairs)
    intra = (within / pairs)[pairs > 0].mean()
    inter = (sum_of_distances(x) - within.sum()) / (len(x) * (len(x) - 1) - pairs.sum())
    out = dict(intra_class=intra.item(), inter_class=inter.item())
    if inter > COLLAPSED:
        out["over_clustering"] = (intra / inter).item()
    return out


def uniformity(x):
    """log mean exp(-2 |x_i - x_j|^2) over all pairs i != j (arXiv 2005.10242)."""
    n, total = len(x), 0.0
    for part in x.split(2048):
        total += (-2 * torch.cdist(part, x).square()).exp().double().sum().item()
    return math.log(max(total - n, 1e-300) / (n * (n - 1)))              # i = i gave exp(0) each


@torch.no_grad()
def representation_space(original, view1, view2, labels):
    """Features of images and of two augmented views of each, (N, F), labels (N,), -1 for none
    -> dict of floats, without those that are undefined (no labels, a complete collapse).

    _views: of two views, else of an image and its view. All on unit rows and all pairs. [Small]
    has own view found, alignment, uniformity and intra-class; the others are ours, effective rank
    after Roy and Vetterli 2007.
    """
    original, view1, view2 = unit(original), unit(view1), unit(view2)
    own_view, others_farther = find_own(original, view1)
    out = dict(
        own_view=own_view,
        others_farther_from_view=others_farther,
        own_view_views=find_own(view1, view2)[0],
        alignment=(original - view1).square().sum(1).mean().item(),
        alignment_views=(view1 - view2).square().sum(1).mean().item(),
        uniformity=uniformity(original),
        spread=original.double().var(0, correction=0).sum().sqrt().item(),
        view_images=len(original))
    out |= class_distances(original, labels)
    if sum_of_distances(original) > COLLAPSED * len(original) ** 2:
        singular = torch.linalg.svdvals((original - original.mean(0)).double())
        out["effective_rank"] = torch.special.entr(singular / singular.sum()).sum().exp().item()
    return out


def near_duplicates(x, most=20_000, device="cpu", seed=0):
    """Images, of at most `most`, whose nearest other image is ten times as near as is usual: its
    1 - cosine is below a tenth of the median. x (N, F) -> pairs of rows (P, 2), nearest first."""
    rows = data.permutation(len(x), data.SAMPLE, seed, 5)[:most]
    similarity, near = neighbors(x[rows], x[rows], 2, device=device)     # itself, and the next
    distance = 1 - similarity[:, 1]
    itself = near[:, 0] == torch.arange(len(rows))
    other = torch.where(itself, near[:, 1], near[:, 0])
    order = distance.argsort()
    order = order[distance[order] < distance.median() / 10]
    return torch.stack([rows[order], rows[other[order]]], 1)


# ------------------------------------------------- while training (for pretrain.py)

KNN_TRAIN, KNN_VAL = 50_000, 10_000            # the most images that are compared


def online_knn(encoder, splits, image_size, seed, *, device, workers):
    """kNN accuracy of the backbone's features and of the head's output, encoder in eval mode
    -> {"knn_backbone": ..., "knn_head": ...} on the first process, {} on the others."""
    def backbone_and_head(images):
        features = encoder.backbone(images)
        return torch.cat([features, encoder.head(features)], 1)

    def sample(dataset, rows, most):
        rows = rows[data.permutation(len(rows), data.SAMPLE, seed)[:most]]
        x = extract_features(backbone_and_head, dataset, image_size, rows=rows, device=device,
                             workers=workers, what="features for the kNN")
        return x, dataset.labels[rows]

    train_x, train_y = sample(splits.train, splits.train_rows, KNN_TRAIN)
    val_x, val_y = sample(splits.val, splits.val_rows, KNN_VAL)
    if not len(train_x):
        return {}
    width = encoder.backbone.feature_dim
    return {
        "knn_backbone": knn_accuracy(train_x[:, :width], train_y, val_x[:, :width], val_y,
                                     device=device),
        "knn_head": knn_accuracy(train_x[:, width:], train_y, val_x[:, width:], val_y,
                                 device=device),
    }


def online_own_view(encoder, dataset, rows, image_size, *, device, workers):
    """Share of images whose augmented view is nearer than every other image, for the backbone's
    features, encoder in eval mode -> {"own_view": ...} on all processes."""
    options = dict(rows=rows, device=device, workers=workers)
    original = extract_features(encoder.backbone, dataset, image_size, **options)
    view, _ = view_features(encoder.backbone, dataset, image_size, **options)
    share = find_own(original, view)[0] if len(original) else 0.0
    if dist.is_initialized():
        share = torch.tensor(share, device=device)
        dist.broadcast(share, 0)
    return {"own_view": float(share)}


# ------------------------------------------------- the report

MEASURES = {              # name: (title, how to read it); titles in % are shares of images
    "linear_top1": ("linear probe %", "higher: one plane a class tells the classes apart"),
    "augmented_top1": ("linear, augmented %", "higher: [Small]'s protocol, lr 30 in steps"),
    "knn": ("kNN %", "higher: near images are of the same class; nothing is trained"),
    "best_nn": ("best-NN % (Euclidean)", "higher: its k is chosen on val, which flatters"),
    "best_nn_unit": ("best-NN % (unit length)", "the same on features of length 1"),
    "over_clustering": ("over-clustering", "lower: classes lie together; 1: they do not show"),
    "effective_rank": ("effective rank", "higher: more directions are used; 1: collapsed"),
    "own_view": ("own view found %", "higher: the task of pretraining is solved; not yet classes"),
    "others_farther_from_view": ("farther than own view %", "higher: other images are farther away "
                                 "than the own view; 50: chance"),
    "own_view_views": ("view finds view %", "higher: the same, harder"),
    "alignment": ("alignment", "lower: an image and its view lie together; 0 if collapsed"),
    "alignment_views": ("alignment of two views", "lower: the same for two views"),
    "uniformity": ("uniformity", "lower: features fill the sphere; 0 if collapsed"),
    "spread": ("spread", "1: no common direction; 0: all images alike, collapsed"),
    "intra_class": ("intra-class distance", "lower among networks of one recipe; across recipes "
                                            "[Small]'s better networks have higher ones"),
    "inter_class": ("inter-class distance", "higher: classes lie apart"),
    "near_duplicates": ("images with a near-copy", "another image ten times as near as is usual; "
                                                   "lineval.json names them"),
}
TABLE = ("linear_top1", "augmented_top1", "knn", "over_clustering", "effective_rank", "own_view")
TABLE_UNLABELLED = ("effective_rank", "own_view", "others_farther_from_view", "alignment",
                    "uniformity", "spread", "near_duplicates")


def evaluate(net, splits, job, title):
    """All measures of one frozen network -> namespace of report, train_x, val_x, pairs; on all
    processes but the first None."""
    net.eval()                # or batch norm would adapt to the images of the evaluation
    options = dict(device=job.device, workers=job.workers)
    x, views, chosen, labels = {}, {}, {}, {}
    for part in ("train", "val"):
        dataset, rows = getattr(splits, part), getattr(splits, part + "_rows")
        labels[part] = dataset.labels[rows] if splits.names else torch.full((len(rows),), -1)
        chosen[part] = choose(labels[part], job.per_class, job.seed)
        x[part] = extract_features(net, dataset, job.image_size, rows=rows, **options,
                                   what=f"features of {title}, {part}")
        views[part] = view_features(net, dataset, job.image_size, rows=rows[chosen[part]],
                                    seed=job.seed, **options, what=f"views for {title}, {part}")
    if job.rank:
        return None
    report = dict(val_images=len(x["val"]))
    if splits.names:
        both = x["train"], labels["train"], x["val"], labels["val"]
        for name, value in linear_probe(*both, seed=job.seed, device=job.device).items():
            report["linear_" + name] = value
        report["knn"] = knn_accuracy(*both, device=job.device)
        report["best_nn"], report["best_nn_k"] = best_nn(*both, device=job.device)
        report["best_nn_unit"], _ = best_nn(unit(x["train"]), labels["train"], unit(x["val"]),
                                            labels["val"], device=job.device)
    spaces = {}
    for part in ("train", "val"):
        mine = chosen[part]
        spaces[part] = representation_space(x[part][mine], *views[part], labels[part][mine])
    report |= spaces["val"] | {"train": spaces["train"]}
    pairs = []
    if not splits.names:
        pairs = near_duplicates(x["train"], device=job.device, seed=job.seed)
        report["near_duplicates"] = len(pairs)
    return SimpleNamespace(report=report, train_x=x["train"], val_x=x["val"], pairs=pairs)


def choose(labels, per_class, seed, unlabelled=1000):
    """Keyed rows (M,) for the measures of the space: `per_class` of each class, or some of all."""
    order = data.permutation(len(labels), data.SAMPLE, seed, 4)
    chosen = []
    for c in labels.unique().tolist():
        most = per_class if c >= 0 else unlabelled
        chosen.append(order[labels[order] == c][:most])
    return torch.cat(chosen)


def standard_error(share, n):
    """Of a share of n independent images: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / n)


def verdict(trained, random, log=()):
    """One sentence on a network beside its random twin: their reports, and the run's log (rows
    of floats). The first rule that fits:

    collapsed: effective rank below 2 or undefined, or the head's spread in the log below 0.1.
    no better than random: the linear probe (without labels: own view found, and the share of
        other images farther than it) is not two standard errors of the difference above the
        random network's. The second share has the power where images are all of few kinds.
    still rising: the log's own view, or kNN, or else 1 - loss / chance, whichever has at least 3
        values, has gained more than 0.01 in its last third.
    done: otherwise. Without a log neither of the last two is claimed.
    """
    spreads = [row["spread"] for row in log if "spread" in row]
    if trained.get("effective_rank", 1) < 2 or (spreads and spreads[-1] < 0.1):
        return "collapsed: all images have nearly the same features"
    better = False
    names, images = ["own_view", "others_farther_from_view"], "view_images"
    if "linear_top1" in trained:
        names, images = ["linear_top1"], "val_images"
    for name in names:
        n = trained[images]
        error = math.hypot(standard_error(trained[name], n), standard_error(random[name], n))
        better = better or trained[name] > random[name] + 2 * error
    if not better:
        return f"no better than random: {MEASURES[names[0]][0][:-2]} is within two standard errors"
    histories = [
        [row["own_view"] for row in log if "own_view" in row],
        [row["knn_backbone"] for row in log if "knn_backbone" in row],
        [1 - row["loss"] / row["chance"] for row in log],
    ]
    long = [history for history in histories if len(history) >= 3]
    if not long:
        return "learnt something: clearly better than random; no log says whether it still rises"
    history = long[0]
    if history[-1] - history[len(history) * 2 // 3 - 1] > 0.01:
        return "learnt something and still rising: more epochs would most likely help"
    return "done: clearly better than random, and the last third of the run added nothing"


def read_log(path):
    """log.csv -> a list of {column: float}, without empty cells; [] where there is none."""
    try:
        with open(path, newline="") as file:
            return [{name: float(cell) for name, cell in row.items() if cell}
                    for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, AttributeError):
        return []             # a log is only a report


def print_table(columns, names):
    """columns {title: report}, side by side; a share with its standard error."""
    say(f"{'':25s}" + "".join(f"{title:>{max(16, len(title) + 2)}s}" for title in columns))
    for name in names:
        title, reading = MEASURES[name]
        if not any(name in report for report in columns.values()):
            continue
        line = f"{title:25s}"
        for heading, report in columns.items():
            cell = f"{report[name]:.3f}" if name in report else "-"
            if name == "near_duplicates":
                cell = str(report[name])
            if title.split(" (")[0].endswith("%") and name in report:
                n = report["view_images" if "view" in name else "val_images"]
                error = standard_error(report[name], n)
                cell = f"{100 * report[name]:.1f} ± {100 * error:.1f}"
            line += f"{cell:>{max(16, len(heading) + 2)}s}"
        say(f"{line}   {reading}")


# ------------------------------------------------- datasets and weights

HELD_OUT = 0.2            # share of a dataset without a val split that is kept for evaluation
FINAL_LAYERS = ("fc.", "classifier.3.", "classifier.1.")     # torchvision's, of 1000 classes


def own_device():
    """The GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        kind = LocalError if local_rank == gpus else UserError           # one of them says it
        raise kind(f"process {local_rank} of this machine has no GPU of its own, there are {gpus}: "
                   f"pass --nproc_per_node={gpus} to torchrun")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def in_turn(name, load):
    """load(), on each machine first by one process where dataset `name` may be downloaded."""
    waits = dist.is_initialized() and name in data.TORCHVISION
    later = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits and later:
        dist.barrier()
    try:
        return load()
    finally:                  # also where it failed: then the others fail alike
        if waits and not later:
            dist.barrier()


def load_splits(name, seed, train, classes, labelled):
    if train is None:
        train = data.load_dataset(name, "train", classes)
    val = data.load_dataset(name, "val", classes) if data.has_val(name) else train
    least = 0 if labelled else -1                                        # -1 is no label
    train_rows = (train.labels >= least).nonzero().flatten()
    val_rows = (val.labels >= least).nonzero().flatten()
    note = ""
    if val is train:
        order = train_rows[data.permutation(len(train_rows), data.HOLD_OUT, seed)]
        held_out = round(HELD_OUT * len(order))
        val_rows, train_rows = order[:held_out].sort().values, order[held_out:].sort().values
        note = f"no val split: {len(val_rows)} of {len(order)} images held out, keyed by the seed"
    return SimpleNamespace(train=train, train_rows=train_rows, val=val, val_rows=val_rows,
                           names=train.classes if labelled else [], note=note)


def labelled_splits(name, seed=0, train=None, classes=True):
    """-> namespace of train, train_rows, val, val_rows (rows with a label), names (of classes),
    note. Without a val split a keyed fifth of train is held out. `train`: the dataset, if loaded
    already. Raises UserError for fewer than two classes."""
    splits = load_splits(name, seed, train, classes, labelled=True)
    count = len(splits.train.labels[splits.train_rows].unique())
    if count < 2 or len(splits.val.labels[splits.val_rows].unique()) < 2:
        found = f"{count} class{'es' * (count != 1)}" if len(splits.train_rows) else "no labels"
        raise UserError(f"{name} has {found} for {len(splits.train_rows)} training and "
                        f"{len(splits.val_rows)} validation images: classes need at least 2 "
                        f"folders in each")
    return splits


def unlabelled_splits(name, seed=0, train=None):
    """The same without labels: all rows, names []."""
    splits = load_splits(name, seed, train, classes=False, labelled=False)
    if len(splits.val_rows) < 2 or len(splits.train_rows) < 2:
        raise UserError(f"{name} has {len(splits.train_rows)} training and {len(splits.val_rows)} "
                        f"validation images: at least 2 of each are needed")
    return splits


def load_file(path):
    """A checkpoint: plain tensors, numbers and strings. Anything else is not run, but named."""
    if str(path).endswith(".safetensors"):
        raise UserError(f"{path} is a safetensors file: load it with that package and save the "
                        f"state dict by torch.save")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: pass the path of a checkpoint") from None
    except Exception as error:     # truncated, a pickle with code, garbage: torch raises many types
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: damaged, or not plain "
                        f"weights): use another copy, or start afresh with --restart if it is a "
                        f"run's last.pt") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save "
                        f"model.state_dict()")
    return content


def load_weights(backbone, path, encoder="query"):
    """Fill `backbone` from a state dict with torchvision's names, or from a run's last.pt
    (`encoder`: query or key). Raises UserError for what does not fit."""
    weights = load_file(path)
    part = "key_encoder" if encoder == "key" else "encoder"
    if "settings" in weights and part in weights:
        weights = {name.removeprefix("backbone."): value for name, value in weights[part].items()
                   if name.startswith("backbone.")}
    weights = {str(name): value for name, value in weights.items()
               if not str(name).startswith(FINAL_LAYERS)}
    for name, value in weights.items():
        if torch.is_tensor(value) and value.isnan().any():
            raise UserError(f"{path} holds NaN in {name}: the training that made it diverged")
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]              # the first of them
        raise UserError(f"{path} does not fit this network ({reason} ...): pass the --arch and "
                        f"image size it was made with; the names must be torchvision's (timm's "
                        f"differ)") from None


# ------------------------------------------------- pictures

BLUE, ORANGE, GRAY = (40, 100, 220), (240, 140, 20), (150, 150, 150)
COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
          (140, 86, 75), (227, 119, 194), (90, 90, 90), (188, 189, 34), (23, 190, 207),
          (0, 0, 120), (255, 190, 130))


def draw_curve(log_csv, png, width=600, height=170):
    """The log as a picture: loss, kNN or own view found, neighbours of the same class."""
    rows = read_log(log_csv)
    panels = []
    for name, chance in (("loss", "chance"), ("knn_backbone", None), ("own_view", None),
                         ("same_class", "same_class_chance")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            panels.append((name, points, [row[chance] for row in rows if chance in row]))
    image = Image.new("RGB", (width, height * max(1, len(panels)) + 30), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    last = max([row["step"] for row in rows], default=1)
    left, right = 60, width - 20
    for number, (name, points, chances) in enumerate(panels):
        top = number * height + 28
        bottom = top + height - 36
        values = [value for _, value in points] + chances[-1:]
        margin = 0.08 * (max(values) - min(values)) or 0.05
        low, high = min(values) - margin, max(values) + margin

        def place(step, value):
            up = (value - low) / (high - low)
            return left + (right - left) * step / last, bottom - (bottom - top) * up

        title = name.replace("_", " ") + (", gray: chance" if chances else "")
        pen.text((left, top - 22), title, "black", font)
        pen.rectangle((left, top, right, bottom), outline=GRAY)
        for value in (low + margin, (low + high) / 2, high - margin):
            x, y = place(0, value)
            pen.text((x - 6, y), f"{value:.2f}", "black", font, anchor="rm")
        if chances:
            pen.line([place(0, chances[-1]), place(last, chances[-1])], GRAY, 2)
        if len(points) > 1:
            pen.line([place(*point) for point in points], BLUE, 2)
        x, y = place(*points[-1])
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), BLUE)
    for share in (0, 0.5, 1):
        x = left + (right - left) * share
        pen.text((x, image.height - 14), f"{share * last:,.0f}", "black", font, anchor="mm")
    pen.text((6, image.height - 14), "step", "black", font, anchor="lm")
    with data.writing(png):
        image.save(png)


def draw_rows(path, title, queries, query_rows, others, other_rows):
    """A line of pictures for each query: itself, then `other_rows` (Q, M) of `others`. Blue frame
    and a tick: the same class; orange: another; gray: no label."""
    theirs, own = others.labels[other_rows], queries.labels[query_rows][:, None]
    known = (theirs >= 0) & (own >= 0)
    same = known & (theirs == own)
    image = Image.new("RGB", (168 + 72 * other_rows.shape[1], 28 + 76 * len(query_rows)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    if known.any():
        shares = torch.bincount(others.labels[others.labels >= 0]).double()
        chance = (shares / shares.sum()).square().sum()
        title += f": {same.sum() / known.sum():.0%} of its class (chance {chance:.0%})"
    pen.text((6, 6), title, "black", font)

    def paste(dataset, row, frame, x, y):                                # 64 px, framed by 4
        picture, _, _ = data.CenterView(dataset, 64)[row]
        image.paste(ImageOps.expand(to_pil_image(picture), 4, frame), (x, y))

    for i, row in enumerate(query_rows.tolist()):
        y, label = 28 + 76 * i, queries.labels[row]
        if label >= 0:
            pen.text((4, y + 28), queries.classes[label][:11], "black", font)
        paste(queries, row, GRAY, 90, y)
        for j, other in enumerate(other_rows[i].tolist()):
            x = 168 + 72 * j
            frame = ORANGE if known[i, j] else GRAY
            paste(others, other, BLUE if same[i, j] else frame, x, y)
            if same[i, j]:
                pen.rectangle((x + 50, y + 52, x + 70, y + 70), BLUE)
                pen.line([(x + 53, y + 61), (x + 58, y + 66), (x + 67, y + 56)], "white", 3)
    image.save(path)


@torch.no_grad()
def draw_soft_positives(path, run, settings, dataset, seed, queries=10, count=8):
    """From last.pt: some images, and the keys in the queue that would get their smoothing."""
    if dataset.fingerprint != settings["dataset"]:                       # the queue's are others
        raise UserError("these are not the images of pretraining")
    state = load_file(run / "last.pt")
    size = settings["image_size"]
    encoder = Encoder(settings["arch"], settings["dim"], settings["hidden_dim"], size <= data.SMALL)
    encoder.load_state_dict(state["encoder"])
    real = state["queue"]["index"] >= 0
    if not real.any():
        raise UserError("the queue holds no image's key yet")
    picks = data.permutation(len(dataset), data.SAMPLE, seed, 3)[:queries]
    images = torch.cat(list(center_batches(dataset, picks, size, "cpu", 0, queries)))
    _, near = neighbors(encoder.eval()(images), state["queue"]["keys"][real], count)
    draw_rows(path, "an image, then its soft positives in the queue", dataset, picks, dataset,
              state["queue"]["index"][real][near])


def draw_map(path, panels, labels, names, side=420):
    """2-D PCA of unit rows, a panel each of {title: features (N, F)}; a colour a class, 12 at
    most, each class's name at its centroid."""
    image = Image.new("RGB", (len(panels) * side, side + 28), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    shown = labels.unique()[:len(COLORS)].tolist()
    for number, (title, features) in enumerate(panels.items()):
        x = unit(features)
        x = x - x.mean(0)
        plane = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T    # (N, 2)
        low, high = plane.amin(0), plane.amax(0)
        plane = 14 + (side - 28) * (plane - low) / (high - low).clamp(min=1e-12)
        plane += torch.tensor([number * side, 28])
        pen.text((number * side + 8, 6), title, "black", font)
        pen.rectangle((number * side, 28, (number + 1) * side - 2, side + 26), outline=GRAY)
        for c, color in zip(shown, COLORS):
            for u, v in plane[labels == c].tolist():
                pen.ellipse((u - 2, v - 2, u + 2, v + 2), color)
        for c in shown:
            u, v = plane[labels == c].mean(0).tolist()
            pen.text((u, v), names[c][:16], "black", font, anchor="mm", stroke_width=2,
                     stroke_fill="white")
    image.save(path)


# ------------------------------------------------- one job after the other

def place(name):
    """A dataset's name, or its folder's one path from the root."""
    return name if name in data.NAMES else os.path.realpath(name)


def read_job(flags, run):
    """What to evaluate: a run's settings, or for bare --weights the flags -> namespace."""
    job = SimpleNamespace(**vars(flags), run=run, settings=None, folder=flags.out)
    if run is None:
        if not flags.arch:
            raise UserError(f"--weights {flags.weights} needs --arch: one of {', '.join(ARCHS)}")
        job.title, job.data = Path(flags.weights).name, job.data or "shapes"
        if job.image_size is None:
            dataset = in_turn(job.data, lambda: data.load_dataset(job.data, "train"))
            job.image_size = data.default_image_size(dataset)
        job.small_images = job.image_size <= data.SMALL
        return job
    try:
        settings = job.settings = json.loads((run / "args.json").read_text())
        job.arch, job.small_images = settings["arch"], settings["image_size"] <= data.SMALL
        job.pretrained_on = place(settings["data"]), settings["dataset"]
        if not flags.data:
            job.data, job.classes = settings["data"], flags.classes or settings.get("classes")
        job.image_size = flags.image_size or settings["image_size"]
    except OSError:
        raise UserError(f"{run} is not a run of pretrain.py (no args.json): pass a folder such as "
                        f"runs/...") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}/args.json is damaged ({error}): restore it, or pretrain again with "
                        f"--restart") from None
    if flags.arch not in (None, job.arch):
        raise UserError(f"--arch {flags.arch}: {run} holds a {job.arch}; leave the flag out")
    job.weights = run / ("last.pt" if flags.encoder == "key" else "backbone.pt")
    job.title, job.folder = str(run), flags.out or run
    return job


def splits_of(job):
    """The dataset's splits: with its labels, if it has any."""
    train = in_turn(job.data, lambda: data.load_dataset(job.data, "train", job.classes != "none"))
    known = train.labels[train.labels >= 0].unique()
    if job.classes == "none" or len(known) < 2:
        return unlabelled_splits(job.data, job.seed)
    return labelled_splits(job.data, job.seed, train)


def suffix(job, train):
    """What tells a report on other data, of the key encoder, or at another size from the run's
    own: the end of its file's name."""
    if job.run is None:
        return ""
    words = []
    if (place(job.data), train.fingerprint) != job.pretrained_on:
        words.append(train.name)
    if job.encoder == "key":
        words.append("key")
    if job.image_size != job.settings["image_size"]:
        words.append(f"{job.image_size}px")
    return "".join("-" + word for word in words)


def evaluate_job(job):
    """Measure a network and its random twin -> namespace of all that is to be printed, written
    and drawn; on all processes but the first None."""
    started = time.monotonic()
    splits = splits_of(job)
    name = suffix(job, splits.train)
    torch.manual_seed(job.seed)
    random = build_backbone(job.arch, job.small_images)
    net = build_backbone(job.arch, job.small_images)
    load_weights(net, job.weights, job.encoder)
    random = random.to(job.device, memory_format=torch.channels_last)
    net = net.to(job.device, memory_format=torch.channels_last)
    labels = splits.val.labels[splits.val_rows]
    about = "without labels"
    if splits.names:
        majority = torch.bincount(labels).max() / len(labels)
        about = f"{len(splits.names)} classes, the largest {majority:.1%} of validation"
    say(f"{job.title}: {job.arch}, {job.encoder} encoder, on {job.data} at {job.image_size} px: "
        f"{len(splits.train_rows)} training and {len(splits.val_rows)} validation images, {about}")
    if splits.note:
        say(f"  {splits.note}")

    estimate_batch_norm(random, splits.train, splits.train_rows, job.image_size, seed=job.seed,
                        device=job.device, workers=job.workers)
    twin = evaluate(random, splits, job, "random weights")
    trained = evaluate(net, splits, job, "the network")
    if job.rank:
        return None
    if job.protocol == "augmented" and splits.names:
        trained.report["augmented_top1"] = augmented_probe(
            net, splits, trained.val_x, job.image_size, epochs=job.epochs, seed=job.seed,
            device=job.device, workers=job.workers)
    if job.features:
        write_features(job.features, splits, trained)
    log = read_log(job.run / "log.csv") if job.run else []
    content = dict(run=job.title, data=place(job.data), encoder=job.encoder, seed=job.seed,
                   image_size=job.image_size, note=splits.note, pretrained=trained.report,
                   verdict=verdict(trained.report, twin.report, log), random=twin.report,
                   train_images=len(splits.train_rows), val_images=len(splits.val_rows),
                   near_duplicates=file_pairs(splits, trained.pairs),
                   seconds=time.monotonic() - started)
    picks = data.permutation(len(labels), data.SAMPLE, job.seed, 2)
    _, near = neighbors(trained.val_x[picks[:10]], trained.train_x, 8, device=job.device)
    few = picks[:2000]
    return SimpleNamespace(job=job, name=name, splits=splits, content=content, picks=picks[:10],
                           near=near, labels=labels[few], panels={
                               "random weights": twin.val_x[few], "pretrained": trained.val_x[few]})


def file_name(dataset, row):
    return dataset.path(row) or f"{dataset.name}/{row}"


def file_pairs(splits, pairs, most=100):
    rows = splits.train_rows[pairs[:most]] if len(pairs) else []
    return [[file_name(splits.train, int(row)) for row in pair] for pair in rows]


def write_features(path, splits, trained):
    """features (N, F), files (N,), labels (N,), split (N,): training, then validation images."""
    rows = [(splits.train, row) for row in splits.train_rows.tolist()]
    rows += [(splits.val, row) for row in splits.val_rows.tolist()]
    with data.writing(path), open(path, "wb") as file:
        np.savez(file, features=torch.cat([trained.train_x, trained.val_x]).numpy(),
                 files=[file_name(dataset, row) for dataset, row in rows],
                 labels=[int(dataset.labels[row]) for dataset, row in rows],
                 split=["train"] * len(splits.train_rows) + ["val"] * len(splits.val_rows))


def write_job(done):
    """Report and pictures into the job's folder."""
    job, splits, name = done.job, done.splits, done.name
    if job.folder is None:
        return
    folder = Path(job.folder)
    with data.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"lineval{name}.json").write_text(json.dumps(done.content, indent=1) + "\n")
        draw_rows(folder / f"neighbors{name}.png", "an image, then the nearest training images",
                  splits.val, splits.val_rows[done.picks], splits.train,
                  splits.train_rows[done.near])
        written = [f"lineval{name}.json", f"neighbors{name}.png"]
        if splits.names:
            draw_map(folder / f"map{name}.png", done.panels, done.labels, splits.names)
            written.append(f"map{name}.png")
        if job.run and not name:
            try:
                draw_soft_positives(folder / "soft_positives.png", job.run, job.settings,
                                    splits.train, job.seed)
                written.append("soft_positives.png")
            except UserError as error:                                   # no last.pt: no matter
                say(f"no soft_positives.png: {error}")
    say(f"written into {folder}: {', '.join(written)}")


def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: data.exit_with(UserError(message))
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs (default: the newest in runs/)")
    add("--weights", help="instead of a run: a state dict with torchvision's names; needs --arch")
    add("--arch", choices=ARCHS, metavar="ARCH", help=", ".join(ARCHS))
    add("--data", "--labels", help="evaluate on another dataset than the run's own")
    add("--classes", choices=("folders", "none"), help="none: the folders are not classes")
    add("--encoder", default="query", choices=("query", "key"))
    add("--all", action="store_true", help="print all measures, of train too")
    add("--protocol", default="cached", choices=("cached", "augmented"),
        help="augmented: [Small]'s linear protocol, 100 epochs, too")
    add("--epochs", type=int, default=100, help="of the augmented protocol")
    add("--features", metavar="FILE.npz", help="write features, file names and labels")
    add("--out", metavar="FOLDER", help="of report and pictures (default: the run's)")
    add("--image-size", type=int)
    add("--per-class", type=int, default=50, help="images a class for the space's measures")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=data.default_workers())
    flags = parser.parse_args(argv)
    for name, least in (("epochs", 1), ("per_class", 2), ("image_size", 8), ("workers", 0),
                        ("seed", 0)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if len(flags.runs) > 1 and (flags.out or flags.features):
        raise UserError("--out and --features take one run at a time")
    return flags


def main(argv=None):
    flags = read_flags(argv)
    torch.set_flush_denormal(True)
    flags.rank, flags.device = int(os.environ.get("RANK", 0)), own_device()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "nccl" if flags.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))      # while the first measures
    runs = [None] if flags.weights else [Path(run) for run in flags.runs]
    if not runs:
        runs = [path.parent for path in Path("runs").glob("*/backbone.pt")]
        runs = sorted(runs, key=lambda run: (run / "backbone.pt").stat().st_mtime)[-1:]
        if not runs:
            raise UserError("no run in runs/ has finished an epoch: start with python pretrain.py, "
                            "or pass --weights")
    jobs = [read_job(flags, run) for run in runs]
    finished = [evaluate_job(job) for job in jobs]
    if flags.rank == 0:
        columns = {}
        for job, done in zip(jobs, finished):
            random_title, title = "random weights", "pretrained"
            if len(jobs) > 1:
                random_title = f"random {job.arch}, {Path(job.data).name}"
                title = job.title
            columns.setdefault(random_title, done.content["random"])
            columns[title] = done.content["pretrained"]
        labelled = any("knn" in report for report in columns.values())
        say()
        print_table(columns, MEASURES if flags.all else TABLE if labelled else TABLE_UNLABELLED)
        if flags.all:
            say("\nfeatures of training images")
            print_table({title: report["train"] for title, report in columns.items()}, MEASURES)
        for job, done in zip(jobs, finished):
            say(f"{job.title}: {done.content['verdict']}")
        for done in finished:
            write_job(done)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as user_error:
        data.exit_with(user_error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
