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
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

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

def center_batches(dataset, rows, image_size, device="cpu", workers=0, batch_size=256):
    """Yield the evaluation views of `rows`, normalised, (B, 3, S, S) at a time."""
    views = data.CenterView(dataset, image_size)
    batches = [part.tolist() for part in rows.split(batch_size)]
    size = 3 * batch_size * image_size ** 2
    for images, _, _ in data.iterate(views, batches, workers, batch_bytes=size):
        yield data.normalize(images.to(device))


def augmented_batches(views, items, device="cpu", workers=0, batch_size=256):
    """Yield both views of `items`, pairs (epoch, index) -> (B, 3, S, S) twice, index (B,)."""
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    size = 6 * batch_size * views.size ** 2
    for crops, params, index in data.iterate(views, batches, workers, batch_bytes=size,
                                             collate_fn=data.collate):
        view1 = data.augment(crops[0].to(device), params[0])
        view2 = data.augment(crops[1].to(device), params[1])
        yield view1, view2, index


@torch.no_grad()
def extract_features(net, dataset, image_size, *, rows=None, device="cpu", workers=0,
                     batch_size=256, what="features"):
    """Outputs of `net` for the evaluation view of each row -> (len(rows), F) on the CPU.

    rows (N,): indices, default all. Several processes share the work; all but the first get
    (0, F). The caller sets eval mode.
    """
    rows = torch.arange(len(dataset)) if rows is None else rows
    mine = own_share(rows)
    batches = center_batches(dataset, mine, image_size, device, workers, batch_size)
    return collect(map(net, batches), mine, rows, device, what)


@torch.no_grad()
def view_features(net, dataset, image_size, *, rows, seed=0, device="cpu", workers=0,
                  batch_size=256, what="features of views"):
    """The same for two augmented views of each row -> two (len(rows), F)."""
    mine = own_share(rows)
    items = [(0, index) for index in mine.tolist()]
    views = data.TwoViews(dataset, image_size, seed)
    batches = augmented_batches(views, items, device, workers, batch_size)
    outputs = (torch.cat([net(view1), net(view2)], 1) for view1, view2, _ in batches)
    return collect(outputs, mine, rows, device, what).chunk(2, dim=1)


def own_share(rows):
    """This process's part of `rows`; the last row again where the parts would be unequal."""
    if not dist.is_initialized():
        return rows
    each = math.ceil(len(rows) / dist.get_world_size())
    first = dist.get_rank() * each
    return rows[torch.arange(first, first + each).clamp(max=len(rows) - 1)]


def collect(outputs, mine, rows, device, what):
    """Outputs for `mine`, (B, F) at a time, from each process -> (len(rows), F) on the first."""
    progress = data.Progress(what, len(mine))
    parts, done = [], 0
    try:
        for out in outputs:
            parts.append(out.cpu())
            done += len(out)
            progress.show(done)
    except UserError as error:       # an image that only this process has seen
        raise LocalError(data.last_line(error)) from None
    features = torch.cat(parts)
    if not dist.is_initialized():
        return features
    first = dist.get_rank() == 0
    whole = features.new_empty(dist.get_world_size() if first else 0, *features.shape,
                               device=device)
    dist.gather(features.to(device), list(whole) if first else None)
    return whole.flatten(0, 1)[:len(rows)].cpu()


@torch.no_grad()
def estimate_batch_norm(net, dataset, rows, image_size, *, device="cpu", workers=0, seed=0,
                        images=512):
    """Give a random network the data's batch statistics, those of some images: without them it
    would be a worse baseline than it need be."""
    picks = rows[data.permutation(len(rows), data.SAMPLE, seed, 1)[:images]]
    batch = torch.cat(list(center_batches(dataset, picks, image_size, device, workers)))
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1                                               # forget what was there
    net.train()(batch)
    for layer in layers:
        layer.momentum = 0.1


# ------------------------------------------------- measures with labels

def unit(x):
    """Rows of length 1, in float32 or wider; 0 stays 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=1e-30)


def neighbors(x, others, k, *, euclidean=False, device="cpu", most=2 ** 27):
    """The k nearest rows of `others` (M, F), or all if fewer, for each row of x (N, F).

    -> similarity (N, k), rows (N, k), nearest first; similarity is the cosine, or minus the
    Euclidean distance. At most about `most` pairs are in memory at a time.
    """
    others = others.to(device)
    if not euclidean:
        others = unit(others)
    similarities, indices = [], []
    for part in x.split(max(1, most // len(others))):
        part = part.to(device)
        if euclidean:
            similarity = -torch.cdist(part, others)
        else:
            similarity = unit(part) @ others.T
        best = similarity.topk(min(k, len(others)))
        similarities.append(best.values.cpu())
        indices.append(best.indices.cpu())
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
MOST_NUMBERS = 2 ** 28                         # N x F that a probe is fitted to: 1 GiB


def fit_softmax(x, y, classes, decay, steps=200):
    """Minimise mean cross entropy + decay / 2 |weight|^2: a convex problem, so by L-BFGS.

    x (N, F), y (N,) -> weight (F, classes), bias (classes,).
    """
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20,
                                  tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
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
    chosen on a tenth of train, never on val; then all of train is fitted. Of more than
    `MOST_NUMBERS` a keyed part of the rows is used.
    """
    order = data.permutation(len(train_x), data.HOLD_OUT, seed, 1)
    order = order[:MOST_NUMBERS // train_x.shape[1]]
    if len(order) < len(train_x):
        say(f"linear probe: fitted to {len(order):,} of {len(train_x):,} images, to save memory")
    x, y = train_x[order].to(device), train_y[order].to(device)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    # Constant features become 0. Relative, since a random network's features can be tiny.
    var = torch.where(var > 1e-12 * var.max(), var, torch.inf)
    mean, scale = mean.float(), (var * x.shape[1]).rsqrt().float()
    x = (x - mean) * scale
    classes = int(max(train_y.max(), val_y.max())) + 1

    judge = max(1, len(x) // 10)
    held_out = {}
    for decay in decays:
        weight, bias = fit_softmax(x[judge:], y[judge:], classes, decay)
        held_out[decay] = accuracy((x[:judge] @ weight + bias).argmax(1), y[:judge])
    decay = max(held_out, key=held_out.get)
    weight, bias = fit_softmax(x, y, classes, decay)
    scores = (val_x.to(device) - mean) * scale @ weight + bias
    return dict(top1=accuracy(scores.argmax(1).cpu(), val_y), weight_decay=decay,
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
    optimizer = torch.optim.SGD(layer.parameters(), 30 * batch_size / 256, momentum=0.9)
    drops = [epochs * 6 // 10, epochs * 8 // 10]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    for epoch in range(epochs):
        order = rows[data.permutation(len(rows), data.ORDER, seed, epoch)].tolist()
        whole = len(order) // batch_size * batch_size
        items = [(epoch, index) for index in order[:whole]]
        for view, _, index in augmented_batches(views, items, device, workers, batch_size):
            with torch.no_grad():
                x = net(view)                                            # (B, F)
            optimizer.zero_grad()
            F.cross_entropy(layer(x), labels[index].to(device)).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted = layer(val_x.to(device)).argmax(1).cpu()
    return accuracy(predicted, splits.val.labels[splits.val_rows])


# ------------------------------------------------- the representation space

ROUNDING = 1e-6           # cosines that differ by less count as equal
COLLAPSED = 1e-12         # mean squared distance below which unit rows differ by rounding alone


def find_own(x, positive):
    """Compare each row of x (N, F) with its row of `positive`, and with all other rows of x
    -> share of rows to which no other is as near (chance 1 / N), share of all others that are
    farther away (chance 1/2). To a network that has collapsed all are equally near: 0, 0."""
    x = unit(x)
    own = (x * unit(positive)).sum(1, keepdim=True)                      # (N, 1)
    n, found, nearer = len(x), 0, 0
    for rows in torch.arange(n).split(1024):
        near = x[rows] @ x.T > own[rows] - ROUNDING                      # (rows, N)
        near[range(len(rows)), rows] = False                             # an image itself
        found += (near.sum(1) == 0).sum().item()
        nearer += near.sum().item()
    return found / n, 1 - nearer / (n * (n - 1))


def mean_distance(x):
    """Mean |x_i - x_j|^2 over all pairs i != j: twice the variance, in all dimensions."""
    return 2 * x.double().var(0).sum().item()


def class_distances(x, labels):
    """intra_class: mean |x_i - x_j|^2 within a class, the mean over classes; inter_class: the
    mean over pairs of different classes; over_clustering: their ratio. x (N, F) unit rows."""
    groups = [x[labels == c] for c in labels.unique()]
    within = [(len(group) * (len(group) - 1), mean_distance(group))
              for group in groups if len(group) > 1]
    if not within or len(groups) < 2:
        return {}
    intra = sum(distance for _, distance in within) / len(within)
    pairs = len(x) * (len(x) - 1)
    rest = pairs - sum(count for count, _ in within)                     # of different classes
    inter = (pairs * mean_distance(x) - sum(n * distance for n, distance in within)) / rest
    out = dict(intra_class=intra, inter_class=inter)
    if inter > COLLAPSED:
        out["over_clustering"] = intra / inter
    return out


def uniformity(x):
    """log mean exp(-2 |x_i - x_j|^2) over all pairs i != j (arXiv 2005.10242)."""
    total = 0.0
    for part in x.split(2048):
        total += (-2 * torch.cdist(part, x).square()).exp().double().sum().item()
    total -= len(x)                                                      # i = i gave exp(0) each
    return math.log(max(total, 1e-300) / (len(x) * (len(x) - 1)))


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
    if mean_distance(original) > COLLAPSED:
        singular = torch.linalg.svdvals((original - original.mean(0)).double())
        out["effective_rank"] = torch.special.entr(singular / singular.sum()).sum().exp().item()
    return out


# ------------------------------------------------- while training (for pretrain.py)

KNN_TRAIN, KNN_VAL = 50_000, 10_000            # the most images that are compared


@torch.no_grad()
def online_knn(encoder, splits, image_size, seed, *, device, workers):
    """kNN accuracy of the backbone's features and of the head's output, encoder in eval mode
    -> {"knn_backbone": ..., "knn_head": ...} on the first process, {} on the others."""
    def sample(dataset, rows, most):
        rows = rows[data.permutation(len(rows), data.SAMPLE, seed)[:most]]
        x = extract_features(encoder.backbone, dataset, image_size, rows=rows, device=device,
                             workers=workers, what="features for the kNN")
        return x.to(device), dataset.labels[rows]

    train_x, train_y = sample(splits.train, splits.train_rows, KNN_TRAIN)
    val_x, val_y = sample(splits.val, splits.val_rows, KNN_VAL)
    if not len(train_x):
        return {}
    found = {"knn_backbone": knn_accuracy(train_x, train_y, val_x, val_y, device=device)}
    train_z, val_z = encoder.head(train_x), encoder.head(val_x)
    found["knn_head"] = knn_accuracy(train_z, train_y, val_z, val_y, device=device)
    return found


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
    "best_nn": ("best-NN %", "higher: Euclidean; its k is chosen on val, which flatters"),
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
}
TABLE = ("linear_top1", "augmented_top1", "knn", "over_clustering", "effective_rank", "own_view")


def measure(net, splits, job, title):
    """All measures of one frozen network -> dict, features of training and validation images;
    on all processes but the first the dict is empty."""
    net.eval()                # or batch norm would adapt to the images of the evaluation
    size, options = job.image_size, job.options
    train_y, val_y = splits.train.labels[splits.train_rows], splits.val.labels[splits.val_rows]
    chosen = choose(val_y, 50 if splits.names else 1000, job.seed)
    train_x = extract_features(net, splits.train, size, rows=splits.train_rows, **options,
                               what=f"features of {title}, training images")
    val_x = extract_features(net, splits.val, size, rows=splits.val_rows, **options,
                             what=f"features of {title}, validation images")
    view1, view2 = view_features(net, splits.val, size, rows=splits.val_rows[chosen],
                                 seed=job.seed, **options)
    if job.rank > 0:
        return {}, train_x, val_x
    report = dict(val_images=len(val_x))
    if splits.names:
        both = train_x, train_y, val_x, val_y
        probe = linear_probe(*both, seed=job.seed, device=job.device)
        report |= {f"linear_{name}": value for name, value in probe.items()}
        report["knn"] = knn_accuracy(*both, device=job.device)
        report["best_nn"], report["best_nn_k"] = best_nn(*both, device=job.device)
        if job.protocol == "augmented":
            report["augmented_top1"] = augmented_probe(net, splits, val_x, size, seed=job.seed,
                                                       **options)
    report |= representation_space(val_x[chosen], view1, view2, val_y[chosen])
    return report, train_x, val_x


def choose(labels, most, seed):
    """Keyed rows for the measures of the space: at most `most` of each class."""
    order = data.permutation(len(labels), data.SAMPLE, seed, 4)
    return torch.cat([order[labels[order] == c][:most] for c in labels.unique()])


def standard_error(share, n):
    """Of a share of n independent images: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / n)


def verdict(trained, random, log=()):
    """One sentence on a network beside its random twin: their reports, and the run's log.

    better: the linear probe (without labels: own view found, or the share of other images that
    are farther) is two standard errors of the difference above the random network's.
    still rising: the log's kNN, or own view found, gained over 0.01 in its last third.
    """
    if trained.get("effective_rank", 1) < 2 or (log and log[-1].get("spread", 1) < 0.1):
        return "collapsed: all images have nearly the same features"
    names, n = ["own_view", "others_farther_from_view"], trained["view_images"]
    if "linear_top1" in trained:
        names, n = ["linear_top1"], trained["val_images"]
    errors = [math.hypot(standard_error(trained[name], n), standard_error(random[name], n))
              for name in names]
    if not any(trained[name] > random[name] + 2 * error for name, error in zip(names, errors)):
        return f"no better than random: {MEASURES[names[0]][0][:-2]} is within two standard errors"
    history = [row[name] for row in log for name in ("knn_backbone", "own_view") if name in row]
    if len(history) < 3:
        return "learnt something: clearly better than random"
    if history[-1] - history[len(history) * 2 // 3 - 1] > 0.01:
        return "learnt something and still rising: more epochs would most likely help"
    return "done: clearly better than random, and the last third of the run added nothing"


def read_log(path):
    """log.csv -> a list of {column: float}, without empty cells."""
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]


def print_table(columns, names):
    """columns {title: report}, side by side; a share with its standard error."""
    width = max(14, *map(len, columns)) + 2
    say(f"\n{'':25s}" + "".join(title.rjust(width) for title in columns))
    for name in names:
        title, reading = MEASURES[name]
        cells = []
        for report in columns.values():
            value = report.get(name, math.nan)
            cell = f"{value:.3f}"
            if title.endswith("%"):
                n = report["view_images" if "view" in name else "val_images"]
                cell = f"{100 * value:.1f} ± {100 * standard_error(value, n):.1f}"
            cells.append(cell.rjust(width) if name in report else "-".rjust(width))
        if any(name in report for report in columns.values()):
            say(f"{title:25s}{''.join(cells)}   {reading}")


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
    train = train or data.load_dataset(name, "train", classes)
    val = data.load_dataset(name, "val", classes) if data.has_val(name) else train
    least = 0 if labelled else -1                                        # -1 is no label
    train_rows = (train.labels >= least).nonzero().flatten()
    val_rows = (val.labels >= least).nonzero().flatten()
    note = ""
    if val is train:
        order = train_rows[data.permutation(len(train_rows), data.HOLD_OUT, seed)]
        held_out = round(HELD_OUT * len(order))
        val_rows, train_rows = order[:held_out].sort().values, order[held_out:].sort().values
        note = f"; no val split, so {held_out} of {len(order)} images held out, keyed by the seed"
    if min(len(train_rows), len(val_rows)) < 2:
        raise UserError(f"{name} has {len(train_rows)} training and {len(val_rows)} validation "
                        f"images{' in class folders' * labelled}: at least 2 of each are needed")
    return SimpleNamespace(train=train, train_rows=train_rows, val=val, val_rows=val_rows,
                           names=train.classes if labelled else [], note=note)


def labelled_splits(name, seed=0, train=None, classes=True):
    """-> namespace of train, train_rows, val, val_rows (rows with a label), names (of classes),
    note. Without a val split a keyed fifth of train is held out. `train`: the dataset, if loaded
    already. Raises UserError for fewer than two classes."""
    splits = load_splits(name, seed, train, classes, labelled=True)
    for dataset, rows in ((splits.train, splits.train_rows), (splits.val, splits.val_rows)):
        if len(dataset.labels[rows].unique()) < 2:
            raise UserError(f"{name} has one class: at least 2 folders are needed in each split")
    return splits


def unlabelled_splits(name, seed=0, train=None):
    """The same without labels: all rows, names []."""
    return load_splits(name, seed, train, classes=False, labelled=False)


def load_file(path):
    """A checkpoint: plain tensors, numbers and strings. Anything else is not run, but named."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist, or is no file: pass the path of a checkpoint")
    if str(path).endswith(".safetensors"):
        raise UserError(f"{path} is a safetensors file: save its state dict by torch.save first")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("its checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:     # truncated, a pickle with code, garbage: torch raises many types
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: damaged, or no state "
                        f"dict of plain weights) and was not run: use another copy, or start "
                        f"afresh with --restart if it is a run's last.pt") from None


def load_weights(backbone, path, encoder="query"):
    """Fill `backbone` from a state dict with torchvision's names, or from a run's last.pt
    (`encoder`: query or key). Raises UserError for what does not fit."""
    weights = load_file(path)
    part = "key_encoder" if encoder == "key" else "encoder"
    if part in weights:
        weights = {name.removeprefix("backbone."): value for name, value in weights[part].items()
                   if name.startswith("backbone.")}
    weights = {name: value for name, value in weights.items()
               if not str(name).startswith(FINAL_LAYERS)}
    for name, value in weights.items():
        if torch.is_tensor(value) and not value.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite: use another copy")
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]              # the first of them
        raise UserError(f"{path} does not fit this network ({reason} ...): pass the --arch and "
                        f"image size it was made with; the names must be torchvision's (timm's "
                        f"differ)") from None


# ------------------------------------------------- pictures

BLUE, ORANGE, GRAY = (40, 100, 220), (240, 140, 20), (150, 150, 150)
COLORS = [f"hsl({hue}, 80%, 42%)" for hue in range(0, 360, 30)]


def canvas(width, height, title=""):
    """A white image and a pen, with a line of text at the top."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(14)
    pen.text((6, 6), title, "black")
    return image, pen


def panel(pen, box, title, points):
    """Draw the frame of a diagram -> its points (N, 2), scaled into box (left, top, right,
    bottom)."""
    left, top, right, bottom = box
    pen.text((left, top - 20), title, "black")
    pen.rectangle(box, outline=GRAY)
    low, high = points.amin(0), points.amax(0)
    share = 0.05 + 0.9 * (points - low) / (high - low).clamp(min=1e-12)
    return torch.tensor([left, bottom]) + share * torch.tensor([right - left, top - bottom])


CHANCES = {"loss": "chance", "knn_backbone": "", "own_view": "", "same_class": "same_class_chance"}


def draw_curve(log_csv, png):
    """The log as a picture: loss, kNN or own view found, neighbours of the same class."""
    rows = read_log(log_csv)
    names = [name for name in CHANCES if any(name in row for row in rows)]
    image, pen = canvas(600, 30 + 170 * len(names))
    for number, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        chance = [(row["step"], row[CHANCES[name]]) for row in rows if CHANCES[name] in row]
        (first, start), (last, end) = points[0], points[-1]
        title = f"{name}: {start:.3f} at step {first:.0f}, {end:.3f} at step {last:.0f}"
        top = 28 + 170 * number
        places = panel(pen, (20, top, 580, top + 140), title, torch.tensor(chance + points))
        places = [tuple(place) for place in places.tolist()]
        pen.line(places[:len(chance)], GRAY, 2)
        pen.line(places[len(chance):], BLUE, 2)
        u, v = places[-1]
        pen.ellipse((u - 3, v - 3, u + 3, v + 3), BLUE)
    with data.writing(png):
        image.save(png)


def draw_rows(path, title, queries, query_rows, others, other_rows):
    """A line of pictures for each query: itself, then `other_rows` (Q, M) of `others`. Blue frame:
    the same class; orange: another; gray: no label."""
    image, pen = canvas(168 + 72 * other_rows.shape[1], 28 + 76 * len(query_rows), title)

    def paste(dataset, row, frame, x, y):                                # 64 px, framed by 4
        picture, _, _ = data.CenterView(dataset, 64)[row]
        image.paste(ImageOps.expand(to_pil_image(picture), 4, frame), (x, y))

    for i, row in enumerate(query_rows.tolist()):
        y, label = 28 + 76 * i, queries.labels[row]
        if label >= 0:
            pen.text((4, y + 28), queries.classes[label][:11], "black")
        paste(queries, row, GRAY, 90, y)
        for j, other in enumerate(other_rows[i].tolist()):
            theirs = others.labels[other]
            frame = BLUE if theirs == label else ORANGE
            paste(others, other, frame if min(theirs, label) >= 0 else GRAY, 168 + 72 * j, y)
    image.save(path)


@torch.no_grad()
def draw_soft_positives(path, state, dataset, seed, queries=10, count=8):
    """Some images, and the keys in last.pt's queue that would get their smoothing."""
    settings, queue = state["settings"], state["queue"]
    size = settings["image_size"]
    encoder = Encoder(settings["arch"], settings["dim"], settings["hidden_dim"], size <= data.SMALL)
    encoder.load_state_dict(state["encoder"])
    real = queue["index"] >= 0
    picks = data.permutation(len(dataset), data.SAMPLE, seed, 3)[:queries]
    images = torch.cat(list(center_batches(dataset, picks, size)))
    _, near = neighbors(encoder.eval()(images), queue["keys"][real], count)
    draw_rows(path, "an image, then its soft positives in the queue", dataset, picks, dataset,
              queue["index"][real][near])


def draw_map(path, panels, labels, names, side=420):
    """2-D PCA of unit rows, a panel each of {title: features (N, F)}; a colour a class, 12 at
    most, each class's name at its centroid."""
    image, pen = canvas(len(panels) * side, side + 28)
    for number, (title, features) in enumerate(panels.items()):
        x = unit(features)
        x = x - x.mean(0)
        plane = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T    # (N, 2)
        left = number * side
        places = panel(pen, (left, 28, left + side - 2, side + 26), title, plane)
        shown = list(zip(labels.unique().tolist(), COLORS))
        for c, color in shown:
            for u, v in places[labels == c].tolist():
                pen.ellipse((u - 2, v - 2, u + 2, v + 2), color)
        for c, _ in shown:
            center = tuple(places[labels == c].mean(0).tolist())
            pen.text(center, names[c][:16], "black", anchor="mm", stroke_width=2,
                     stroke_fill="white")
    image.save(path)


# ------------------------------------------------- one run after the other

def read_job(args, run):
    """What to evaluate: the flags, completed by the settings of a run, if it is one."""
    settings = dict(arch=args.arch, data="shapes", classes=None, image_size=None, dataset=None)
    if run and not (run / "args.json").exists():
        raise UserError(f"{run} is not a run of pretrain.py (no args.json): pass a folder such as "
                        f"runs/...")
    if run:
        settings = json.loads((run / "args.json").read_text())
    elif not args.arch:
        raise UserError(f"--weights {args.weights} needs --arch: one of {', '.join(ARCHS)}")
    job = SimpleNamespace(**vars(args), run=run, settings=settings)
    job.title, job.folder = str(run or args.weights), args.out or run
    job.arch = args.arch or settings["arch"]
    job.weights = args.weights or run / ("last.pt" if args.encoder == "key" else "backbone.pt")
    job.data = args.data or settings["data"]
    if job.data == settings["data"]:
        job.classes = args.classes or settings["classes"]
    job.image_size = args.image_size or settings["image_size"]
    return job


def evaluate_job(job):
    """Measure a network and its random twin -> report (a dict for lineval.json), and for the
    pictures the splits and {network: features of training and of validation images}."""
    train = in_turn(job.data, lambda: data.load_dataset(job.data, "train", job.classes != "none"))
    if len(train.labels[train.labels >= 0].unique()) < 2:
        splits, about = unlabelled_splits(job.data, job.seed, train), "without labels"
    else:
        splits = labelled_splits(job.data, job.seed, train)
        share = torch.bincount(splits.val.labels[splits.val_rows]).max() / len(splits.val_rows)
        about = f"{len(splits.names)} classes, the largest {share:.1%} of validation"
    job.image_size = job.image_size or data.default_image_size(train)
    say(f"{job.title}: {job.arch}, {job.encoder} encoder, on {job.data} at {job.image_size} px: "
        f"{len(splits.train_rows)} training and {len(splits.val_rows)} validation images, {about}"
        f"{splits.note}")

    torch.manual_seed(job.seed)
    small = (job.settings["image_size"] or job.image_size) <= data.SMALL
    nets = {name: build_backbone(job.arch, small).to(job.device, memory_format=torch.channels_last)
            for name in ("random", "pretrained")}
    load_weights(nets["pretrained"], job.weights, job.encoder)
    estimate_batch_norm(nets["random"], splits.train, splits.train_rows, job.image_size,
                        seed=job.seed, **job.options)
    report = dict(run=job.title, data=job.data, encoder=job.encoder, seed=job.seed,
                  image_size=job.image_size, train_images=len(splits.train_rows))
    features = {}
    for name, net in nets.items():
        report[name], *features[name] = measure(net, splits, job, f"the {name} network")
    if job.rank == 0:
        log = read_log(job.run / "log.csv") if job.run else []
        report["verdict"] = verdict(report["pretrained"], report["random"], log)
    return report, splits, features


def write_job(job, report, splits, features):
    """Report and pictures into the job's folder: NAME-OTHER-key.* beside those of the run."""
    folder, settings = Path(job.folder), job.settings
    end = "" if job.data == settings["data"] else f"-{splits.train.name}"
    end += "-key" if job.encoder == "key" else ""
    picks = data.permutation(len(splits.val_rows), data.SAMPLE, job.seed, 2)
    few, many = picks[:10], picks[:2000]
    train_x, val_x = features["pretrained"]
    with data.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"lineval{end}.json").write_text(json.dumps(report, indent=1) + "\n")
        _, near = neighbors(val_x[few], train_x, 8, device=job.device)
        draw_rows(folder / f"neighbors{end}.png", "an image, then the nearest training images",
                  splits.val, splits.val_rows[few], splits.train, splits.train_rows[near])
        if splits.names:
            panels = {title: val_x[many] for title, (_, val_x) in features.items()}
            labels = splits.val.labels[splits.val_rows[many]]
            draw_map(folder / f"map{end}.png", panels, labels, splits.names)
        # The queue's keys are of the images of pretraining.
        if splits.train.fingerprint == settings["dataset"] and (job.run / "last.pt").exists():
            draw_soft_positives(folder / "soft_positives.png", load_file(job.run / "last.pt"),
                                splits.train, job.seed)
    say(f"written into {folder}: lineval{end}.json and pictures")


def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: data.exit_with(UserError(message))
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs (default: the newest in runs/)")
    add("--weights", help="instead of a run: a state dict with torchvision's names; needs --arch")
    add("--arch", choices=ARCHS, metavar="ARCH", help=", ".join(ARCHS))
    add("--data", help="evaluate on another dataset than the run's own")
    add("--classes", choices=("folders", "none"), help="none: the folders are not classes")
    add("--encoder", default="query", choices=("query", "key"))
    add("--all", action="store_true", help="print all measures")
    add("--protocol", default="cached", choices=("cached", "augmented"),
        help="augmented: [Small]'s linear protocol, 100 epochs, too")
    add("--out", metavar="FOLDER", help="of report and pictures (default: the run's)")
    add("--image-size", type=int)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=data.default_workers())
    args = parser.parse_args(argv)
    for name, least in {"image_size": 8, "workers": 0, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if len(args.runs) > 1 and args.out:
        raise UserError("--out takes one run at a time")
    return args


def main(argv=None):
    args = read_flags(argv)
    torch.set_flush_denormal(True)
    args.rank, args.device = int(os.environ.get("RANK", 0)), own_device()
    args.options = dict(device=args.device, workers=args.workers)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "nccl" if args.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))      # while the first measures
    runs = [None] if args.weights else [Path(run) for run in args.runs]
    if not runs:
        files = sorted(Path("runs").glob("*/backbone.pt"), key=os.path.getmtime)
        if not files:
            raise UserError("no run in runs/ has finished an epoch: start with python pretrain.py, "
                            "or pass --weights")
        runs = [files[-1].parent]
    jobs = [read_job(args, run) for run in runs]
    results = [evaluate_job(job) for job in jobs]
    if args.rank == 0:
        columns = {}
        for job, (report, *_) in zip(jobs, results):
            title, twin = job.title, f"random {job.arch}, {Path(job.data).name}"
            if len(jobs) == 1:
                title, twin = "pretrained", "random weights"
            columns.setdefault(twin, report["random"])
            columns[title] = report["pretrained"]
        labelled = any("knn" in column for column in columns.values())
        print_table(columns, TABLE if labelled and not args.all else MEASURES)
        for job, result in zip(jobs, results):
            say(f"{job.title}: {result[0]['verdict']}")
            if job.folder:
                write_job(job, *result)
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
