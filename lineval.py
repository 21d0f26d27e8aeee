"""Stage 2: what is in the frozen features.

    python lineval.py                                # the newest run
    python lineval.py runs/A runs/B                  # side by side
    python lineval.py RUN --data OTHER               # transfer to another dataset
    python lineval.py RUN --shares 0.01 0.1 1        # how many labels does it save?
    python lineval.py --weights FILE --arch resnet18 --data PATH      # torchvision's names

A network is frozen, its features are computed once, and simple readers are asked what is in them:

    x = backbone(image),  z = x / |x|
    z' : z of an augmented view of the same image, z_j : z of another image
    linear probe      argmax_c  w_c . x + b_c          w, b fitted on the training images
    kNN               each near training image votes for its class by exp(z . z_near / 0.07)
    own view found    z . z'  >  z . z_j               for every other image j
    alignment         mean |z - z'|^2
    uniformity        log mean exp(-2 |z_i - z_j|^2)   over all pairs
    over-clustering   mean |z_i - z_j|^2 within classes / the same between classes
    effective rank    exp(entropy of the singular values of z - mean z, as shares)

A number alone says little, since an untrained network already has useful features. So all stand
beside the same network with random weights.

The last five classify nothing: they describe how the features lie. [Small] (arXiv 2107.14762) has
own view found, alignment, uniformity and distances within classes. All views are made by MoCo v2's
augmentations, whatever a run was trained with, so that runs of one image size compare.

Without labels the report has what needs none.
"""
import argparse
import copy
import csv
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

import data
from data import CenterView, TwoViews, UserError, say
from models import ARCHS, Encoder, build_backbone

# ------------------------------------------------- features

@torch.no_grad()
def extract_features(net, views, *, device="cpu", workers=0, batch_size=256, what="features"):
    """Outputs of `net` for each view of each image -> (V, N, F) on the CPU.

    views: data.CenterView, V = 1, or data.TwoViews, 2. The processes of pretrain.py share the work,
    and all get the result. The caller sets eval mode.
    """
    # Processes need equal parts, so some images come twice.
    n, processes = len(views.dataset), data.count_processes()
    each = math.ceil(n / processes)
    mine = data.own_part(torch.arange(each * processes) % n).tolist()
    items = [(0, row) for row in mine]         # of epoch 0
    item_lists = [items[i:i + batch_size] for i in range(0, each, batch_size)]
    progress = data.Progress(what, each)
    features = None
    batches = data.iterate(views, item_lists, workers, batch_size)
    for batch, (crops, params, _) in enumerate(batches):
        out = [net(data.augment(crop.to(device), plan)) for crop, plan in zip(crops, params)]
        out = torch.stack(out, 1).cpu()                                  # (B, V, F)
        if features is None:                   # whole: joining a list takes twice the memory
            features = out.new_empty(each, *out.shape[1:])
        start = batch * batch_size
        features[start:start + len(out)] = out
        progress.advance(len(out))
    if processes > 1:                          # alone, no trip to the GPU
        features = data.gather(features.to(device)).cpu()
    return features[:n].transpose(0, 1)


def estimate_batch_norm(net, dataset, size, seed=0, images=512, **options):
    """Set a random network's batch-norm statistics from some images: a fairer baseline. It is left
    in training mode."""
    views = CenterView(dataset.sample(images, seed, 1), size)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1                                               # forget what was there
    net.train()
    extract_features(net, views, batch_size=images, **options)           # as one batch
    for layer in layers:
        layer.momentum = 0.1


# ------------------------------------------------- measures with labels

def unit(x):
    """Rows of length 1, in float32 or wider; 0 stays 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=1e-30)


def nearest_rows(x, others, k, *, device="cpu", most=2 ** 27):
    """The k nearest rows of `others` (M, F), or all if fewer, for each row of x (N, F), by
    Euclidean distance -> distances (N, k), rows (N, k), nearest first.

    At most about `most` pairs are in memory at a time.
    """
    others = others.to(device)
    half = torch.linalg.vector_norm(others, dim=1).square() / 2
    distances, rows = [], []
    progress = data.Progress("nearest images", len(x))
    for part in x.split(max(1, most // len(others))):
        part = part.to(device)
        # |x - o|^2 = |x|^2 - 2 (x . o - |o|^2 / 2): the nearest have the largest brackets.
        best = torch.addmm(-half, part, others.T).topk(min(k, len(others)))
        square = part.square().sum(1, keepdim=True) - 2 * best.values
        distances.append(square.clamp(min=0).sqrt().cpu())
        rows.append(best.indices.cpu())
        progress.advance(len(part))
    return torch.cat(distances), torch.cat(rows)


def accuracy(predicted, labels):
    return (predicted == labels).double().mean().item()


def knn_accuracy(train_x, train_y, val_x, val_y, *, k=200, temperature=0.07, device="cpu"):
    """Weighted kNN (arXiv 1805.01978, section 3.4): votes exp(cosine / temperature) of the k
    nearest. x (N, F), y (N,) classes -> accuracy on val.

    k is at most the mean size of a class: 200 images could be most of a small dataset.
    """
    k = min(k, len(train_x) // len(train_y.unique()))
    distance, rows = nearest_rows(unit(val_x), unit(train_x), k, device=device)     # (V, k)
    cosine = 1 - distance ** 2 / 2                                       # of unit rows
    votes = torch.zeros(len(val_x), int(train_y.max()) + 1)
    votes.scatter_add_(1, train_y[rows], (cosine / temperature).exp())
    return accuracy(votes.argmax(1), val_y)


def best_nn(train_x, train_y, val_x, val_y, *, max_k=101, device="cpu"):
    """Unweighted vote of the k nearest by Euclidean distance -> (accuracy, k) of the best odd k.

    x (N, F), y (N,). k is chosen on val itself, which flatters. Of classes with equal votes the
    first wins, of several k the least.
    """
    _, rows = nearest_rows(val_x, train_x, max_k, device=device)
    near = train_y[rows]                                                 # (V, max_k)
    found = {k: accuracy(near[:, :k].mode().values, val_y) for k in range(1, near.shape[1] + 1, 2)}
    best_k = max(found, key=found.get)
    return found[best_k], best_k


DECAYS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)        # for features of length about 1
MOST_NUMBERS = 2 ** 28                         # N x F that a probe is fitted to: 1 GiB
MOST_STEPS = 200                               # of L-BFGS in a fit; easy fits end earlier


def fit_softmax(x, y, classes, decay, steps=MOST_STEPS, progress=None):
    """Minimise mean cross entropy + decay / 2 |weight|^2: a convex problem, so by L-BFGS.

    x (N, F), y (N,) -> weight (F, classes), bias (classes,).
    """
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20,
                                  tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        if progress:
            progress.advance()
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe(train_x, train_y, val_x, val_y, *, seed=0, device="cpu", decays=DECAYS):
    """Softmax regression on frozen features: x (N, F), y (N,) -> dict of top1 (on val),
    weight_decay, held_out (the accuracy that chose it), rows (how many it was fitted to).

    Features are standardised by train's statistics and divided by sqrt(F). The weight decay is
    chosen on a tenth of train, never on val; then all of train is fitted. Of equally good decays
    the strongest is taken. With few labels that tenth is a few images, so the choice is partly
    chance. Where N x F exceeds `MOST_NUMBERS`, as many rows are used as fit, chosen at random.
    """
    order = data.permutation(len(train_x), data.HOLD_OUT, seed, 1)
    order = order[:MOST_NUMBERS // train_x.shape[1]]
    if len(order) < len(train_x):
        say(f"linear probe: fitted to {len(order):,} of {len(train_x):,} images, to save memory")
    x, y = train_x[order].to(device), train_y[order].to(device)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    constant = var <= 1e-12 * var.max()        # relative: a random network's features can be tiny
    var[constant] = torch.inf                  # so that they become 0, and not 0 / 0
    mean, scale = mean.float(), (var * x.shape[1]).sqrt().float()
    x = (x - mean) / scale
    classes = int(train_y.max()) + 1

    cut = max(1, len(x) // 10)
    held_out = {}
    fits = len(decays) + 1
    # L-BFGS evaluates up to 5 / 4 as often as it steps.
    most = fits * MOST_STEPS * 5 // 4
    progress = data.Progress(f"linear probe on {len(x):,} images, steps", most)
    for decay in decays:
        weight, bias = fit_softmax(x[cut:], y[cut:], classes, decay, progress=progress)
        held_out[decay] = accuracy((x[:cut] @ weight + bias).argmax(1), y[:cut])
    decay = max(held_out, key=held_out.get)
    weight, bias = fit_softmax(x, y, classes, decay, progress=progress)
    scores = ((val_x.to(device) - mean) / scale) @ weight + bias
    return dict(top1=accuracy(scores.argmax(1).cpu(), val_y), weight_decay=decay,
                held_out=held_out[decay], rows=len(x))


def train_on_crops(net, train, val, size, *, frozen, lr, epochs=100, seed=0, device="cpu",
                   workers=0):
    """As in [Small]: a linear layer is trained on new random crops in every epoch. frozen: only the
    layer is trained, [Small]'s protocol for ImageNet; else the network too, which is fine-tuning.
    Datasets `train`, `val` -> accuracy on val.

    `lr` is for a batch of 256. Frozen: crops of at least 0.08 of the image, lr / 10 after 60 and
    again after 80 % of the epochs. Fine-tuning: 0.2, 40 and 70 %. No weight decay.
    """
    min_scale, drops = (0.08, (0.6, 0.8)) if frozen else (0.2, (0.4, 0.7))
    views = TwoViews(train, size, seed, min_scale=min_scale, jitter_p=0, gray_p=0, blur_p=0)
    net = copy.deepcopy(net)                   # fine-tuning must not change the caller's
    layer = nn.Linear(net.feature_dim, len(train.classes)).to(device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(net, layer).train(not frozen)
    batch_size = min(256, len(train))
    trained = layer if frozen else model
    optimizer = torch.optim.SGD(trained.parameters(), lr * batch_size / 256, momentum=0.9)
    per_epoch = len(train) // batch_size
    milestones = [round(drop * epochs * per_epoch) for drop in drops]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    item_lists = data.schedule(len(train), batch_size, epochs, seed)
    progress = data.Progress("steps of training", epochs * per_epoch)
    for crops, params, index in data.iterate(views, item_lists, workers, batch_size):
        with torch.set_grad_enabled(not frozen):
            x = net(data.augment(crops[0].to(device), params[0]))        # (B, F)
        optimizer.zero_grad()
        F.cross_entropy(layer(x), train.labels[index].to(device)).backward()
        optimizer.step()
        scheduler.step()
        progress.advance()
    [scores] = extract_features(model.eval(), CenterView(val, size), device=device,
                                workers=workers, what="scores")
    return accuracy(scores.argmax(1), val.labels)


FINETUNE_RATES = (0.1, 0.01, 0.001)            # [Small] has 0.01


def finetune(net, train, val, size, *, seed=0, **options):
    """Fine-tuning as `train_on_crops` does it -> accuracy on val, learning rate. The rate is chosen
    on a tenth of `train`, never on val."""
    order = data.permutation(len(train), data.HOLD_OUT, seed, 2)
    cut = max(1, len(order) // 10)
    part, rest = train.select(order[:cut]), train.select(order[cut:])
    options |= dict(frozen=False, seed=seed)
    held_out = {lr: train_on_crops(net, rest, part, size, lr=lr, **options)
                for lr in FINETUNE_RATES}
    lr = max(held_out, key=held_out.get)
    return train_on_crops(net, train, val, size, lr=lr, **options), lr


def some_labels(labels, share, seed):
    """Positions of a random share of `labels` (N,), in order, at least one of each class; the same
    ones for the same seed."""
    order = data.permutation(len(labels), data.SAMPLE, seed, 5)
    first = torch.cat([order[labels[order] == c][:1] for c in labels.unique()])
    rest = order[~torch.isin(order, first)]
    count = max(len(first), round(share * len(labels)))
    return torch.cat([first, rest])[:count].sort().values


# ------------------------------------------------- the representation space

ROUNDING = 1e-6           # cosines that differ by less count as equal
COLLAPSED = 1e-12         # mean squared distance below which unit rows differ by rounding alone


def find_own(x, view):
    """Is an image x_i nearer, by cosine, to its own view v_i than to other images x_j?

    x, view (N, F) -> share of images i with x_i . v_i above every x_i . x_j (chance 1 / N); share
    of all pairs i, j with x_i . x_j below x_i . v_i (chance 1/2). After a collapse: 0, 0.
    """
    x = unit(x)
    own = (x * unit(view)).sum(1, keepdim=True)                          # (N, 1)
    n, found, nearer_pairs = len(x), 0, 0
    for rows in torch.arange(n).split(1024):
        nearer = x[rows] @ x.T > own[rows] - ROUNDING                    # (rows, N)
        nearer[range(len(rows)), rows] = False                           # an image itself
        found += (nearer.sum(1) == 0).sum().item()
        nearer_pairs += nearer.sum().item()
    return found / n, 1 - nearer_pairs / (n * (n - 1))


def mean_distance(x):
    """Mean |x_i - x_j|^2 over all pairs i != j: twice the unbiased variance, summed over the
    dimensions."""
    return 2 * x.double().var(0).sum().item()


def class_distances(x, labels):
    """intra_class: mean |x_i - x_j|^2 within a class, the mean over classes; inter_class: the
    mean over pairs of different classes; over_clustering: their ratio. x (N, F) unit rows; those
    without a label, -1, do not count."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    groups = [x[labels == c] for c in labels.unique()]
    within = [(len(group) * (len(group) - 1), mean_distance(group))      # pairs, their mean
              for group in groups if len(group) > 1]
    if not within or len(groups) < 2:
        return {}
    intra = sum(distance for _, distance in within) / len(within)
    pairs = len(x) * (len(x) - 1)
    rest = pairs - sum(count for count, _ in within)                     # of different classes
    # The sum between classes is that over all pairs, less that within classes.
    between = pairs * mean_distance(x) - sum(count * distance for count, distance in within)
    inter = between / rest
    out = dict(intra_class=intra, inter_class=inter)
    if inter > COLLAPSED:
        out["over_clustering"] = intra / inter
    return out


def uniformity(x):
    """log mean exp(-2 |x_i - x_j|^2) over all pairs i != j (arXiv 2005.10242). Of more than
    5,000 rows, every second, third, ... is used."""
    x = x[::math.ceil(len(x) / 5000)]
    return torch.pdist(x).square().mul(-2).exp().mean().log().item()


@torch.no_grad()
def representation_space(original, view, labels):
    """Features of images and of an augmented view of each, (N, F), labels (N,), -1 for none
    -> dict of floats, without those that are undefined (no labels, a complete collapse).

    All on unit rows. [Small] has own view found, alignment, uniformity and intra-class; the others
    are ours, effective rank after Roy and Vetterli 2007.
    """
    original, view = unit(original), unit(view)
    own_view, others_farther = find_own(original, view)
    out = dict(
        own_view=own_view,
        others_farther_than_view=others_farther,
        alignment=(original - view).square().sum(1).mean().item(),
        uniformity=uniformity(original),
        spread=original.double().var(0, correction=0).sum().sqrt().item(),
        view_images=len(original))
    out |= class_distances(original, labels)
    if mean_distance(original) > COLLAPSED:
        singular = torch.linalg.svdvals((original - original.mean(0)).double())
        out["effective_rank"] = torch.special.entr(singular / singular.sum()).sum().exp().item()
    return out


# ------------------------------------------------- datasets

VAL_SHARE = 0.2           # share of a dataset without a val split that is kept for evaluation


def load_splits(name, train, seed=0, with_classes=True, skip_unreadable=False):
    """Complete `train`, of dataset `name` or a path -> train, val, labelled, note (words to print).

    labelled: whether train has two classes or more. If so, images without a label are dropped from
    both splits. If no val image is left, a random fifth of train is held out. Raises UserError if
    either split has fewer than two images.
    """
    val = None
    if data.has_val(name):
        val = data.load_dataset(name, "val", with_classes, skip_unreadable)
    labelled = len(train.labels[train.labels >= 0].unique()) > 1
    if labelled:
        train = train.labelled()
        if val:
            val = val.labelled() or None       # None if no image is left
    note = ""
    if val is None:
        order = data.permutation(len(train), data.HOLD_OUT, seed)
        cut = round(VAL_SHARE * len(order))
        note = (f"; no val split{' with labels' * labelled}, so {cut} of {len(order)} images are "
                f"held out here (a run on this folder was trained on them)")
        val = train.select(order[:cut].sort().values)
        train = train.select(order[cut:].sort().values)
    if min(len(train), len(val)) < 2:
        raise UserError(f"{name} has {len(train)} training and {len(val)} validation images"
                        f"{' in class folders' if labelled else ''}: at least 2 of each are needed")
    return train, val, labelled, note


KNN_TRAIN, KNN_VAL, OWN_VIEW = 50_000, 10_000, 1000      # the most images, while training


@torch.no_grad()
def measure_online(encoder, train, val, labelled, size, seed, **options):
    """For pretrain.py, encoder in eval mode: kNN accuracy of the backbone's features and of the
    head's output; without labels the share of images whose augmented view is nearer than every
    other image -> {"knn_backbone": ..., "knn_head": ...} or {"own_view": ...}."""
    if not labelled:
        some = val.sample(OWN_VIEW, seed)
        [original] = extract_features(encoder.backbone, CenterView(some, size), **options)
        view, _ = extract_features(encoder.backbone, TwoViews(some, size, seed), **options)
        return {"own_view": find_own(original, view)[0]}
    options["what"] = "features for the kNN"
    device = options["device"]
    train, val = train.sample(KNN_TRAIN, seed), val.sample(KNN_VAL, seed)
    [train_x] = extract_features(encoder.backbone, CenterView(train, size), **options)
    [val_x] = extract_features(encoder.backbone, CenterView(val, size), **options)
    train_out, val_out = encoder.head(train_x.to(device)), encoder.head(val_x.to(device))
    return {"knn_backbone": knn_accuracy(train_x, train.labels, val_x, val.labels, device=device),
            "knn_head": knn_accuracy(train_out, train.labels, val_out, val.labels, device=device)}


# ------------------------------------------------- the report

MEASURES = {              # name: (title, how to read it); those titled % are shares
    "linear_top1": ("linear probe %", "higher: a linear layer tells the classes apart"),
    "augmented_top1": ("linear, augmented %", "higher: [Small]'s ImageNet protocol, lr 30"),
    "knn": ("kNN %", "higher: near images are of the same class; nothing is trained"),
    "best_nn": ("best-NN %", "higher: Euclidean; its k is chosen on val, which flatters"),
    "over_clustering": ("over-clustering", "lower: tight classes; 1: as wide as they lie apart"),
    "effective_rank": ("effective rank", "higher: more directions are used; 1: collapsed"),
    "own_view": ("own view found %", "higher: MoCo v2's views are recognised; not yet classes"),
    "others_farther_than_view": ("farther than own view %", "higher: other images are farther away "
                                 "than the own view; 50: chance"),
    "alignment": ("alignment", "lower: an image and its view lie together; 0 if collapsed"),
    "uniformity": ("uniformity", "lower: features fill the sphere; 0 if collapsed"),
    "spread": ("feature spread", "1: no common direction; 0: all images alike, collapsed"),
    "intra_class": ("intra-class distance", "lower among networks of one recipe; across recipes "
                                            "[Small]'s better networks have higher ones"),
    "inter_class": ("inter-class distance", "higher: classes lie apart"),
}
TABLE = ("linear_top1", "augmented_top1", "knn", "over_clustering", "effective_rank", "own_view")


def measure(net, train, val, labelled, args, size, title):
    """All measures of one frozen network -> report, features of the training images (N, F) and of
    the validation images (V, F)."""
    net.eval()                # or batch norm would adapt to the images of the evaluation
    device = data.own_device()
    options = dict(device=device, workers=args.workers)
    order = data.permutation(len(val), data.SAMPLE, args.seed, 4)
    most = 50 if labelled else 1000                        # of each label
    chosen = torch.cat([order[val.labels[order] == c][:most] for c in val.labels.unique()])

    [train_x] = extract_features(net, CenterView(train, size), **options,
                                 what=f"features of {title}, training images")
    [val_x] = extract_features(net, CenterView(val, size), **options,
                               what=f"features of {title}, validation images")
    view, _ = extract_features(net, TwoViews(val.select(chosen), size, args.seed), **options,
                               what=f"views, {title}")
    report = dict(val_images=len(val_x), image_size=size)
    report |= representation_space(val_x[chosen], view, val.labels[chosen])
    if not labelled:
        return report, train_x, val_x
    probe = linear_probe(train_x, train.labels, val_x, val.labels, seed=args.seed, device=device)
    report |= {f"linear_{name}": value for name, value in probe.items()}      # linear_top1, ...
    report["knn"] = knn_accuracy(train_x, train.labels, val_x, val.labels, device=device)
    report["best_nn"], report["best_nn_k"] = best_nn(train_x, train.labels, val_x, val.labels,
                                                     device=device)
    options |= dict(epochs=args.epochs, seed=args.seed)
    if args.protocol == "augmented":
        report["augmented_top1"] = train_on_crops(net, train, val, size, frozen=True, lr=30,
                                                  **options)
    report["few_labels"] = []                                            # fewest first
    for share in sorted(args.shares):
        some = some_labels(train.labels, share, args.seed)
        few = probe
        if len(some) < len(train):
            few = linear_probe(train_x[some], train.labels[some], val_x, val.labels,
                               seed=args.seed, device=device)
        row = dict(labels=few["rows"], linear=few["top1"])
        if args.finetune:
            row["finetuned"], row["lr"] = finetune(net, train.select(some), val, size, **options)
        report["few_labels"].append(row)
    return report, train_x, val_x


def write_features(file, train, val, train_x, val_x):
    """An .npz of features (N, F), labels (N,), paths (N,), and is_val (N,). Where some images have
    a label, those without are left out."""
    paths = [part.path(row) for part in (train, val) for row in range(len(part))]
    is_val = np.arange(len(paths)) >= len(train)
    with data.writing(file), open(file, "wb") as stream:
        np.savez(stream, features=torch.cat([train_x, val_x]).numpy(), paths=paths, is_val=is_val,
                 labels=torch.cat([train.labels, val.labels]))
    say(f"written: {file}, features of {len(paths)} images")


def standard_error(report, name):
    """Of a share p of n independent images: sqrt(p (1 - p) / n). others_farther_than_view is a mean
    of n shares: for it this is about the most."""
    of_views = ("own_view", "others_farther_than_view")
    n = report["view_images" if name in of_views else "val_images"]
    return math.sqrt(report[name] * (1 - report[name]) / n)


def verdict(trained, random, log=()):
    """One sentence on a network beside its random twin: their reports, and the run's log.

    learnt: the linear probe (without labels: own view found, or the share of other images that
    are farther) is two standard errors of the difference above the random network's.
    collapsed: effective rank below 2 and not learnt, or the log's spread below 0.1.
    not at its end: the log has hours left. still rising: its kNN, or own view found, gained over
    0.01 in its last third. was better: it lost over 0.02.
    """
    def better(name):
        error = math.hypot(standard_error(trained, name), standard_error(random, name))
        return trained[name] > random[name] + 2 * error

    names = ["own_view", "others_farther_than_view"]
    if "linear_top1" in trained:
        names = ["linear_top1"]
    learnt = any(better(name) for name in names)
    # Two tight classes, well apart, have a rank below 2 too.
    one_direction = trained.get("effective_rank", 1) < 2 and not learnt
    if one_direction or (log and log[-1].get("spread", 1) < 0.1):
        return "collapsed: all images have nearly the same features"
    if not learnt:
        title, _ = MEASURES[names[0]]
        return f"no better than random: {title.rstrip(' %')} is not two standard errors above"
    if log and log[-1].get("hours_left", 0) > 0:
        return "learnt something: clearly better than random, and the run is not at its end"
    history = [row[name] for row in log for name in ("knn_backbone", "own_view") if name in row]
    if len(history) < 3:
        return "learnt something: clearly better than random"
    gained = history[-1] - history[-1 - len(history) // 3]
    if gained > 0.01:
        return "learnt something and still rising: more epochs may help"
    if gained < -0.02:
        return "learnt something, but was better a third of the run ago: a lower --lr may help"
    return "done: clearly better than random, and the last third of the run added nothing"


def read_log(path):
    """log.csv -> a list of {column: float}, without empty cells."""
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]


def print_table(columns, every):
    """columns {title: report}, side by side: a few measures, or `every`, as without labels; a share
    with its standard error."""
    def cell(report, name):
        if name not in report:
            return "-"
        if MEASURES[name][0].endswith("%"):
            return f"{100 * report[name]:.1f} ± {100 * standard_error(report, name):.1f}"
        return f"{report[name]:.3f}"

    rows, reports = [("", columns, "")], columns.values()
    labelled = any("knn" in report for report in reports)
    for name in MEASURES if every or not labelled else TABLE:
        if any(name in report for report in reports):
            title, reading = MEASURES[name]
            rows.append((title, [cell(report, name) for report in reports], reading))
    for kind, title in (("linear", "linear probe %"), ("finetuned", "fine-tuned %")):
        for few in zip(*(report.get("few_labels", []) for report in reports)):
            if kind in few[0]:
                cells = [f"{100 * row[kind]:.1f}" for row in few]
                counts = dict.fromkeys(str(row["labels"]) for row in few)    # each once
                rows.append((f"{title} of {'/'.join(counts):>6s}", cells, "labels"))
    width = max(14, *map(len, columns)) + 2
    say()
    for first, cells, last in rows:
        say(f"{first:25s}{''.join(text.rjust(width) for text in cells)}   {last}")


# ------------------------------------------------- weights

def load_file(path):
    """A checkpoint: plain tensors, numbers and strings. Anything else is a UserError; no code of it
    is run."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist, or is no file: pass the path of a checkpoint")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("its checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:     # truncated, a pickle with code, garbage: torch raises many types
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: damaged, or no state "
                        f"dict of plain weights) and was not run: use another copy, or start "
                        f"afresh with --restart if it is a run's last.pt") from None


FINAL_LAYERS = ("fc.", "classifier.3.", "classifier.1.")     # torchvision's, of 1000 classes


def load_weights(backbone, path, encoder="query"):
    """Fill `backbone` from a state dict with torchvision's names, or from a run's last.pt
    (`encoder`: query or key). Raises UserError for what does not fit."""
    weights = load_file(path)
    part = "key_encoder" if encoder == "key" else "encoder"
    if encoder == "key" and part not in weights:
        raise UserError(f"{path} holds no key encoder: --encoder key needs a run, or its last.pt")
    if part in weights:
        weights = {name.removeprefix("backbone."): value for name, value in weights[part].items()
                   if name.startswith("backbone.")}
    weights = {str(name): value for name, value in weights.items()
               if not str(name).startswith(FINAL_LAYERS)}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]              # [0] is a headline
        raise UserError(f"{path} does not fit this network ({reason} ...): pass the --arch and "
                        f"image size it was made with; the names must be torchvision's (timm's "
                        f"differ)") from None


# ------------------------------------------------- pictures

BLUE, ORANGE, SILVER = (40, 100, 220), (240, 140, 20), (150, 150, 150)
COLORS = [f"hsl({hue}, 80%, 42%)" for hue in range(0, 360, 30)]


def plot(path, panels, width, height, dots=False):
    """Diagrams below each other (with dots: side by side) of {title: [(points, color, name)]}:
    points (N, 2) as a line with its name at the end, or as dots with their name in the middle."""
    across = len(panels) if dots else 1
    image = Image.new("RGB", (width * across, height * (len(panels) // across)), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(14)
    for number, (title, groups) in enumerate(panels.items()):
        left, top = number % across * width + 6, number // across * height + 26
        right, bottom = left + width - 12, top + height - 32
        groups = [(torch.as_tensor(points).double(), *rest) for points, *rest in groups
                  if len(points)]
        every = torch.cat([points for points, *_ in groups])
        low, high = every.amin(0), every.amax(0)
        pen.text((left, top - 20), title, "black")
        pen.rectangle((left, top, right, bottom), outline=SILVER)
        if not dots:                           # the range of y
            pen.text((left + 4, top + 2), f"{high[1]:.3g}", SILVER)
            pen.text((left + 4, bottom - 18), f"{low[1]:.3g}", SILVER)
        scale, zero = torch.tensor([right - left, top - bottom]), torch.tensor([left, bottom])
        names = []
        for points, color, name in groups:
            share = 0.05 + 0.9 * (points - low) / (high - low).clamp(min=1e-12)
            places = zero + scale * share
            marks = places if dots else places[-1:]
            if not dots:
                pen.line([tuple(place) for place in places.tolist()], color, 2)
            for x, y in marks.tolist():
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), color)
            names.append((name, tuple(marks.mean(0).tolist())))
        for name, place in names:              # over all else
            pen.text(place, name, "black", anchor="mm" if dots else "rb", stroke_width=2,
                     stroke_fill="white")
    with data.writing(path):
        image.save(path)


def draw_curve(log_csv, png):
    """The log as a picture: loss, kNN or own view found, neighbours of the same class."""
    rows, panels = read_log(log_csv), {}

    def points_of(column):
        return [(row["step"], row[column]) for row in rows if column in row]

    for name, chance, title in (
            ("loss", "chance", "loss of one batch"),
            ("knn_backbone", None, "kNN accuracy of the features"),
            ("own_view", None, "images that find their own view"),
            ("same_class", "same_class_chance", "nearest keys of the same class, one batch")):
        points, guessed = points_of(name), points_of(chance)
        if points:
            (first, start), (last, end) = points[0], points[-1]
            title += f": {start:.3f} at step {first:.0f}, {end:.3f} at step {last:.0f}"
            panels[title] = [(guessed, SILVER, "chance"), (points, BLUE, "")]
    plot(png, panels, 600, 170)


def draw_few_labels(path, reports):
    """Accuracy over the number of labels, by the linear probe and fine-tuned: {title: report}."""
    lines = []
    for number, (title, report) in enumerate(reports.items()):
        for shift, kind in enumerate(("linear", "finetuned")):
            points = [(math.log10(row["labels"]), 100 * row[kind])
                      for row in report["few_labels"] if kind in row]
            lines.append((points, COLORS[(4 * number + 2 * shift) % 12], f"{kind}, {title}"))
    plot(path, {"accuracy in % over number of labels (log scale)": lines}, 600, 420)


def draw_map(path, features, labels, names):
    """2-D PCA of unit rows, a panel each of {title: features (N, F)}; a colour a class, the first
    12 of them."""
    panels = {}
    for title, x in features.items():
        x = unit(x)
        x = x - x.mean(0)
        plane = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T    # (N, 2)
        shown = zip(labels.unique().tolist(), COLORS)
        panels[title] = [(plane[labels == c], color, names[c][:16]) for c, color in shown]
    plot(path, panels, 420, 448, dots=True)


def draw_rows(path, queries, others, near):
    """A line of pictures for each of `queries`: itself, then rows near (Q, M) of `others`. Blue
    frame: the same class; orange: another; gray: no label."""
    def framed(dataset, row, frame):                                     # (1, 3, 72, 72)
        picture, _, _ = CenterView(dataset, 64)[0, row]
        return TF.pad(picture, 4, fill=frame)

    tiles = []
    for i, label in enumerate(queries.labels.tolist()):
        tiles.append(framed(queries, i, SILVER))
        for other in near[i].tolist():
            other_label = others.labels[other]
            frame = BLUE if other_label == label else ORANGE
            if min(other_label, label) < 0:
                frame = SILVER
            tiles.append(framed(others, other, frame))
    grid = make_grid(torch.cat(tiles), nrow=1 + near.shape[1], pad_value=255)
    with data.writing(path):
        TF.to_pil_image(grid).save(path)


def draw_soft_positives(path, state, dataset, seed):
    """Some images, and the keys of other images that are nearest in last.pt's queue: the first to
    get a share of the smoothing."""
    settings, queue = state["settings"], state["queue"]
    size = settings["image_size"]
    encoder = Encoder(settings["arch"], settings["dim"], settings["hidden_dim"], size <= data.SMALL)
    encoder.load_state_dict(state["encoder"])
    real = queue["index"] >= 0
    keys, images = queue["keys"][real], queue["index"][real]
    chosen = data.permutation(len(dataset), data.SAMPLE, seed, 3)[:10]
    queries = dataset.select(chosen)
    [q] = extract_features(encoder.eval(), CenterView(queries, size))
    distance = torch.cdist(q, keys)
    distance[images == chosen[:, None]] = torch.inf                      # its own older keys
    near = distance.topk(min(8, len(keys)), largest=False).indices
    draw_rows(path, queries, dataset, images[near])


# ------------------------------------------------- one run after the other

def enlarged(size):
    """The image size for torchvision's weights, which were made for large images."""
    return 224 if size <= data.SMALL else size


def load_networks(args, run, arch, size, small):
    """-> {name: (network, its image size)}: random, pretrained and, if asked for, another's
    weights. All are tried before the long work begins."""
    for flag, file in (("--weights", args.weights), ("--against", args.against)):
        if file and (Path(file).parent / "args.json").exists():
            raise UserError(f"{flag} {file}: it lies in a run of pretrain.py, which knows its "
                            f"network: pass the folder, or two, as in lineval.py RUN1 RUN2")

    def build(small_images, file=None, encoder="query"):
        torch.manual_seed(args.seed)
        net = build_backbone(arch, small_images)
        net = net.to(data.own_device(), memory_format=torch.channels_last)
        if file:
            load_weights(net, file, encoder)
        return net

    networks = {"random": (build(small), size)}
    if args.against:                           # torchvision's, made for large images
        name = f"against {Path(args.against).stem}"
        networks[name] = (build(False, args.against), enlarged(size))
    file = args.weights or run / ("last.pt" if args.encoder == "key" else "backbone.pt")
    # Last: its features are used further.
    networks["pretrained"] = (build(small, file, args.encoder), size)
    return networks


def evaluate(args, run):
    """Measure a run's network and its random twin: print a table, write report and pictures into
    the run's folder; for other data or the key encoder their names end in -OTHER, -key.
    -> title, {network: its report}."""
    settings = dict(data="shapes", classes="folders", image_size=None, dataset=None,
                    skip_unreadable=False)
    log = []
    if run:
        settings |= json.loads((run / "args.json").read_text())
        log = read_log(run / "log.csv") if (run / "log.csv").exists() else []
    if args.data:                              # its folders may be classes, the run's own not
        settings["classes"] = "folders"
    for flag in ("arch", "data", "classes"):
        if getattr(args, flag):
            settings[flag] = getattr(args, flag)
    name, arch = settings["data"], settings["arch"]
    with_classes = settings["classes"] != "none"
    skip = settings["skip_unreadable"]
    whole = data.load_dataset(name, "train", with_classes, skip)
    own_data = whole.fingerprint() == settings["dataset"]
    train, val, labelled, note = load_splits(name, whole, args.seed, with_classes, skip)
    size = args.image_size or settings["image_size"] or data.default_image_size(whole)
    if args.weights and not args.image_size:
        size = enlarged(size)
    about = "without labels"
    if labelled:
        share = torch.bincount(val.labels).max() / len(val)
        about = f"{train.class_words()}, the largest {share:.1%} of validation"
    elif args.shares or args.protocol == "augmented":
        raise UserError(f"{name} has no labels: --shares, --finetune and --protocol augmented need "
                        f"class folders, here or by --labels FOLDER")
    title = str(run or args.weights)
    say(f"{title}: {arch}, {args.encoder} encoder, on {name} at {size} px: {len(train)} training "
        f"and {len(val)} validation images, {about}{note}")

    # A run's first layers are those of its own image size, those of --weights of the size here.
    small = (settings["image_size"] or size) <= data.SMALL
    networks = load_networks(args, run, arch, size, small)
    random, _ = networks["random"]
    device = data.own_device()
    estimate_batch_norm(random, train, size, args.seed, device=device, workers=args.workers)

    report = dict(run=title, data=name, encoder=args.encoder, seed=args.seed, image_size=size,
                  train_images=len(train))
    features = {}
    for network, (net, its_size) in networks.items():
        train_x = None                         # frees the last network's; pretrained's stays
        report[network], train_x, features[network] = measure(
            net, train, val, labelled, args, its_size, f"the {network} network")
    report["verdict"] = verdict(report["pretrained"], report["random"], log)
    columns = {network: report[network] for network in networks}
    print_table(columns, args.all)
    say(f"{title}: {report['verdict']}")

    # From here on files: the report stands already, whatever the disk says.
    if args.features:
        write_features(args.features, train, val, train_x, features["pretrained"])
    if not (run or args.out):
        return title, columns
    folder = Path(args.out or run)
    end = "" if own_data or not args.data else f"-{train.name}"
    end += "-key" if args.encoder == "key" else ""
    with data.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"lineval{end}.json").write_text(json.dumps(report, indent=1) + "\n")
    # Five images, and the five that are nearest to a training image.
    order = data.permutation(len(val), data.SAMPLE, args.seed, 2)
    distance, near = nearest_rows(unit(features["pretrained"]), unit(train_x), 8, device=device)
    shown = torch.cat([order[:5], distance[:, 0].argsort()[:5]])
    draw_rows(folder / f"neighbors{end}.png", val.select(shown), train, near[shown])
    if labelled:
        shown = order[:2000]
        draw_map(folder / f"map{end}.png", {title: x[shown] for title, x in features.items()},
                 val.labels[shown], val.classes)
    if args.shares:
        draw_few_labels(folder / f"few_labels{end}.png", columns)
    # The queue's keys are of the images of pretraining.
    if own_data and (run / "last.pt").exists():
        draw_soft_positives(folder / "soft_positives.png", load_file(run / "last.pt"), whole,
                            args.seed)
    say(f"written into {folder}: lineval{end}.json and pictures; the last rows of "
        f"neighbors{end}.png: validation images most like a training image, perhaps duplicates")
    return title, columns


def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.refuse
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs (default: the newest in runs/)")
    add("--weights", help="instead of a run: a state dict with torchvision's names; needs --arch. "
        "Images of up to 64 px are enlarged to 224. --image-size of up to 64: weights of a network "
        "for small images")
    add("--arch", choices=ARCHS, metavar="ARCH", help=", ".join(ARCHS))
    add("--data", "--labels", metavar="DATA", help="evaluate on another dataset than the run's own")
    add("--classes", choices=("folders", "none"), help="none: the folders are not classes")
    add("--encoder", default="query", choices=("query", "key"))
    add("--all", action="store_true", help="print all measures")
    add("--against", metavar="WEIGHTS", help="measure torchvision's weights too, such as "
        "ImageNet's; for them images of up to 64 px are enlarged to 224")
    add("--shares", nargs="+", type=float, default=[], metavar="SHARE",
        help="also with so few of the labels: 0.01 0.1 1, at least one a class")
    add("--finetune", action="store_true", help="train the network too; by all labels, or --shares")
    add("--protocol", default="cached", choices=("cached", "augmented"),
        help="augmented: [Small]'s ImageNet protocol too")
    add("--epochs", type=int, default=100, help="of --finetune and --protocol augmented")
    add("--features", metavar="FILE.npz", help="write the features, with labels and file names")
    add("--out", metavar="FOLDER", help="of report and pictures (default: the run's)")
    add("--image-size", type=int)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=data.default_workers())
    args = parser.parse_args(argv)
    if not all(0 < share <= 1 for share in args.shares):
        raise UserError(f"--shares {args.shares}: must lie above 0 and be at most 1")
    for name, least in (("seed", 0), ("workers", 0), ("epochs", 1), ("image_size", 8)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.weights and not args.arch:
        raise UserError(f"--weights {args.weights} needs --arch: one of {', '.join(ARCHS)}")
    if args.weights and args.runs:
        raise UserError(f"--weights {args.weights}: pass it instead of a run; beside a run, pass "
                        f"--against")
    if args.features and not Path(args.features).parent.is_dir():
        raise UserError(f"--features {args.features}: its folder does not exist")
    if args.finetune and not args.shares:
        args.shares = [1.0]
    if len(args.runs) > 1 and (args.out or args.features):
        raise UserError("--out and --features take one run at a time")
    return args


def newest_run():
    files = sorted(Path("runs").glob("*/backbone.pt"), key=os.path.getmtime)
    if not files:
        raise UserError("no run in runs/ has saved its weights: start with python pretrain.py, or "
                        "pass --weights")
    return files[-1].parent


def main(argv=None):
    args = read_flags(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("lineval.py runs in one process: start it without torchrun")
    torch.set_flush_denormal(True)
    runs = [None] if args.weights else ([Path(run) for run in args.runs] or [newest_run()])
    # Before the long work on the first one.
    for name in ("args.json", "backbone.pt"):
        without = [str(run) for run in runs if run and not (run / name).exists()]
        if without:
            raise UserError(f"{', '.join(without)}: no run of pretrain.py, or none that has saved "
                            f"its weights (no {name}): pass folders such as runs/...")
    measured = [evaluate(args, run) for run in runs]
    if len(measured) > 1:
        columns = {}
        for number, (title, reports) in enumerate(measured, 1):
            say(f"{number}: {title}")
            columns |= {f"{network} {number}": report for network, report in reports.items()}
        print_table(columns, args.all)


if __name__ == "__main__":
    data.run_main(main)
