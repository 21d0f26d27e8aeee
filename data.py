"""Two random views of an image, the datasets, all randomness, and what the scripts share.

    python data.py PATH      # what was found, which files cannot be read, a picture of view pairs

A view is made in two places. The host decodes an image and cuts two random crops, in uint8 (a
quarter of the bytes of floats). The other augmentations it only draws, as eight numbers a view;
`augment` applies them on the device to a whole batch at once, without any randomness.

Random numbers are seeded by what they are for, such as (VIEWS, seed, epoch, index). So the two
views of an image in an epoch are the same whatever the number of workers, processes or restarts,
and no generator's state is ever saved.
"""
import contextlib
import copy
import functools
import hashlib
import itertools
import math
import os
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets as tv_datasets
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, for every dataset
SMALL = 64                # px: from here down, networks keep more resolution, pretraining no blur


class UserError(ValueError):
    """Something the user can put right: the scripts print it as one line and exit with code 2."""


class LocalError(UserError):
    """A UserError that one of several processes alone may have seen, so that each prints it."""


# ------------------------------------------------- randomness, seeded by what it is for

# The first number of each purpose; where one has several uses, a last number tells them apart.
VIEWS, ORDER, SHUFFLE, DRAWING, HOLD_OUT, SAMPLE = range(6)


def generator(*purpose):
    """Random numbers for one purpose, some integers: equal integers give equal numbers."""
    return np.random.default_rng(purpose)


def permutation(n, *purpose):
    """A permutation of range(n), an int64 tensor (n,)."""
    return torch.from_numpy(generator(*purpose).permutation(n))


def schedule(n, batch_size, epochs, seed, *, first_step=0, rank=0, world=1):
    """Yield this process's list of (epoch, index) for each step: its part of the global batch.

    The global batch of step t of an epoch is rows t * batch to (t + 1) * batch of
    permutation(n, ORDER, seed, epoch); the rest is dropped.
    """
    per_epoch = n // batch_size
    part = batch_size // world
    order = None
    for step in range(first_step, epochs * per_epoch):
        epoch, t = divmod(step, per_epoch)
        if order is None or t == 0:
            order = permutation(n, ORDER, seed, epoch).tolist()
        start = t * batch_size + rank * part
        yield [(epoch, index) for index in order[start:start + part]]


# ------------------------------------------------- two views: the host's share

# The columns of params (N, 8), and the 24 orders in which the four colour steps may come.
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDERING, GRAY, SIGMA = range(8)
ORDERINGS = torch.tensor(list(itertools.permutations(range(4))))          # (24, 4)
UNCHANGED = torch.tensor([[0.0, 1, 1, 1, 0, 0, 0, 0]])                    # nothing but normalised


class TwoViews:
    """Two random views of each image, with the augmentations of MoCo v2 (arXiv 2003.04297).

    Item (epoch, index) -> crops (2, 3, S, S) uint8, params (2, 8) float32, index: a function of
    (seed, epoch, index) alone. A crop has `min_scale` to 1 of the image's area and an aspect of
    3/4 to 4/3, and is resized to S x S. jitter: strengths of brightness, contrast, saturation and
    hue, applied with probability `jitter_p`. blur: a Gaussian of sigma 0.1 to 2 pixels of the crop.
    """

    def __init__(self, dataset, image_size, seed=0, *, min_scale=0.2, jitter=(0.4, 0.4, 0.4, 0.1),
                 jitter_p=0.8, gray_p=0.2, blur_p=0.5):
        self.dataset, self.size, self.seed = dataset, image_size, seed
        self.min_scale, self.jitter, self.jitter_p = min_scale, jitter, jitter_p
        self.gray_p, self.blur_p = gray_p, blur_p

    def __getitem__(self, item):
        epoch, index = item
        image, _ = self.dataset[index]                                    # (3, H, W) uint8
        rng = generator(VIEWS, self.seed, epoch, index)
        crops, params = [], []
        for _ in range(2):
            box = draw_box(rng, image.shape[1], image.shape[2], self.min_scale)
            crops.append(resize_crop(image, box, self.size))
            params.append(draw_params(rng, self.jitter, self.jitter_p, self.gray_p, self.blur_p))
        return torch.cat(crops), torch.tensor(params, dtype=torch.float32), index


def draw_box(rng, height, width, min_scale):
    """A random crop as torchvision's RandomResizedCrop draws it -> top, left, height, width."""
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))  # width / height
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # No box fitted, as in a narrow image: the largest central one of an allowed aspect.
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_crop(image, box, size):
    """(3, H, W) uint8 -> (1, 3, size, size) uint8, bilinear and antialiased."""
    top, left, h, w = box
    crop = image[None, :, top:top + h, left:left + w]
    crop = crop.contiguous(memory_format=torch.channels_last)    # torch's resize is fastest so
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)


def draw_params(rng, jitter, jitter_p, gray_p, blur_p):
    """The augmentations of one view as eight numbers, in the order FLIP, ..., SIGMA."""
    flip = rng.random() < 0.5
    factors = [1.0, 1.0, 1.0]                  # brightness, contrast, saturation: 1 is neutral
    hue = 0.0                                  # in turns of the colour circle
    if rng.random() < jitter_p:
        for i in range(3):
            factors[i] = rng.uniform(max(0, 1 - jitter[i]), 1 + jitter[i])
        hue = rng.uniform(-jitter[3], jitter[3])
    ordering = rng.integers(len(ORDERINGS))
    gray = rng.random() < gray_p
    sigma = rng.uniform(0.1, 2) if rng.random() < blur_p else 0.0
    return [flip, *factors, hue, ordering, gray, sigma]


def collate(items):
    """List of items -> crops (V, N, 3, S, S), params (V, N, 8), index (N,); V views an item."""
    crops, params, index = zip(*items)
    return torch.stack(crops, dim=1), torch.stack(params, dim=1), torch.tensor(index)


# ------------------------------------------------- two views: the device's share

@torch.no_grad()
def augment(crops, params):
    """(N, 3, S, S) uint8, params (N, 8) -> (N, 3, S, S) float, channels_last, normalised.

    Flip, colour jitter in each image's own order, gray, blur, each as torchvision's functional
    transforms do it to float images in [0, 1]; then ImageNet's mean and std. A pure function, on
    the device of `crops`, in torch's default type. params should lie on the host: nothing waits.
    """
    x = crops.to(torch.get_default_dtype(), memory_format=torch.contiguous_format) / 255
    plan = params.cpu()                        # the host sees which image needs which step
    params = params.to(x.device, x.dtype, non_blocking=True)
    x = torch.where(params[:, FLIP, None, None, None] > 0.5, x.flip(3), x)
    order = ORDERINGS[plan[:, ORDERING].long()]                           # (N, 4)
    # Every image has its own order of four steps: each of its places is one round of this loop.
    for place in range(4):
        for number, adjust in enumerate(COLOR_STEPS):
            column = BRIGHTNESS + number
            neutral = 0 if column == HUE else 1
            chosen = (order[:, place] == number) & (plan[:, column] != neutral)
            apply_to(x, chosen, adjust, params[:, column])
    apply_to(x, plan[:, GRAY] > 0.5, make_gray, params[:, GRAY])
    apply_to(x, plan[:, SIGMA] > 0, gaussian_blur, params[:, SIGMA])
    # (x - mean) / std, as one multiplication and addition.
    scale = 1 / torch.tensor(STD, dtype=x.dtype).view(3, 1, 1)
    shift = -torch.tensor(MEAN, dtype=x.dtype).view(3, 1, 1) * scale
    scale, shift = scale.to(x.device, non_blocking=True), shift.to(x.device, non_blocking=True)
    return torch.addcmul(shift, x, scale).contiguous(memory_format=torch.channels_last)


def apply_to(x, chosen, step, amount):
    """x[chosen] = step(x[chosen], amount[chosen]), in place; `chosen` (N,) lies on the host."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = step(x[rows], amount[rows].view(-1, 1, 1, 1))


def luma(x):
    """(N, 3, S, S) -> (N, 1, S, S): gray by ITU-R 601, with torchvision's digits."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def make_gray(x, _):
    return luma(x).expand_as(x)


def adjust_brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def adjust_hue(x, turn):
    """Turn the hue of HSV by `turn` in [-0.5, 0.5].

    Hue is an angle in sixths of the colour circle: red lies at 0, green at 2, blue at 4. A channel
    is high within 1 of its own angle, low from 2 on, and falls linearly in between.
    """
    r, g, b = x.unbind(1)                                                 # (N, S, S) each
    low, high = x.amin(1), x.amax(1)
    span = high - low
    safe = torch.where(span == 0, 1, span)
    hue = torch.where(high == r, (g - b) / safe,
                      torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = (hue + 6 * turn[:, 0]) % 6
    red = ((hue - 3).abs() - 1).clamp(0, 1)                               # 3 is red's opposite
    green = (2 - (hue - 2).abs()).clamp(0, 1)
    blue = (2 - (hue - 4).abs()).clamp(0, 1)
    return low[:, None] + span[:, None] * torch.stack([red, green, blue], 1)


COLOR_STEPS = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]


def gaussian_blur(x, sigma):
    """x (N, 3, S, S), sigma (N, 1, 1, 1) in pixels: 13 taps along each axis, mirrored borders."""
    n = len(x)
    taps = torch.arange(-6, 7, device=x.device)
    # A softmax of -t^2 / 2 sigma^2 is a Gaussian that sums to 1: (N, 1, 1, 13).
    weight = torch.softmax(-0.5 * (taps / sigma) ** 2, 3)
    # With images as channels, a grouped convolution has one filter an image.
    x = F.pad(x, (6, 6, 6, 6), mode="reflect").transpose(0, 1)            # (3, N, ...)
    x = F.conv2d(x, weight, groups=n)                                     # (3, N, S + 12, S)
    x = F.conv2d(x, weight.transpose(2, 3), groups=n)
    return x.transpose(0, 1)


# ------------------------------------------------- the view for evaluation

class CenterView:
    """Item (epoch, index) -> crops (1, 3, S, S) uint8, params (1, 8) that change nothing, index.

    The short side is resized to 256/224 of S, then the central S x S is cut; S <= 64: a plain
    resize.
    """

    def __init__(self, dataset, image_size):
        self.dataset, self.size = dataset, image_size

    def __getitem__(self, item):
        _, index = item                        # every epoch has the same
        image, _ = self.dataset[index]
        size = self.size
        if size <= SMALL:
            image = TF.resize(image, [size, size], antialias=True)
        else:
            image = TF.resize(image, [round(size * 256 / 224)], antialias=True)
            image = TF.center_crop(image, [size, size])
        return image[None], UNCHANGED, index


# ------------------------------------------------- datasets

TORCHVISION = ("cifar10", "cifar100", "stl10")
NAMES = ("shapes", *TORCHVISION)               # whatever else is passed as --data is a folder


class Images:
    """(uint8 tensor (3, H, W), label) by index; labels (N,) int64, -1 for none; class names.

    `pictures`: a tensor (N, 3, H, W), or a list of paths below `root`. `left_out` counts, by
    extension, the files of the folder that are no images.
    """

    def __init__(self, name, pictures, labels, classes, root="", left_out=()):
        self.name, self.labels, self.classes, self.root = name, labels, classes, root
        self.left_out = dict(left_out)
        # One array: counting references to a million strings would copy them into every worker.
        self.pictures = pictures if torch.is_tensor(pictures) else np.array(pictures)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        if not torch.is_tensor(picture):
            picture = read_image(self.path(index))
        return picture, int(self.labels[index])

    def path(self, index):
        """Where a picture lies; "" for one in memory."""
        if torch.is_tensor(self.pictures):
            return ""
        return os.path.join(self.root, self.pictures[index])

    def select(self, rows):
        """The dataset of some rows of this one: their numbers, or a mask (N,)."""
        part = copy.copy(self)
        part.pictures, part.labels = self.pictures[rows.numpy()], self.labels[rows]
        return part

    def sample(self, most, *purpose):
        """The dataset of at most `most` images, chosen at random, the same ones for a purpose."""
        return self.select(permutation(len(self), SAMPLE, *purpose)[:most])

    def labelled(self):
        """The dataset of the images with a label: itself if all have one."""
        known = self.labels >= 0
        return self if known.all() else self.select(known)

    def without(self, rows):
        """The dataset less a list of rows, which cannot be read."""
        if not rows:
            return self
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[rows] = False
        if not keep.any():
            raise UserError(f"none of the {len(self)} images in {self.root!r} can be read")
        return self.select(keep)

    def class_words(self):
        """How many classes, and the first of them."""
        count = len(self.classes)
        names = ", ".join(self.classes[:5]) + ", ..." * (count > 5)
        return f"{count} class{'es' * (count > 1)} ({names})" if count else "no classes"

    def fingerprint(self):
        """To tell this dataset from others: by its pixels, or by the names of its files and the
        sizes of some."""
        if torch.is_tensor(self.pictures):
            content = self.pictures.numpy()
        else:
            some = self.sample(16, 0)
            files = [some.path(index) for index in range(len(some))]
            sizes = [str(os.path.getsize(file)) for file in files if os.path.exists(file)]
            content = os.fsencode("\n".join([*self.pictures, *sizes]))
        return f"{len(self)} images, {digest(content)}"


def digest(content):
    """16 hex digits that tell bytes, or an array, from others."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def load_dataset(name_or_path, split, with_classes=True, skip_unreadable=False):
    """An `Images` of "shapes", "cifar10", "cifar100", "stl10", or of a folder of images.

    A folder has train/ and val/ (or test/) inside, or is any tree. The class is the first folder
    below the split. An image outside class folders has label -1, as all have if not `with_classes`.
    `split`: "train" or "val". skip_unreadable: all files are decoded once, and those that fail are
    left out. Raises UserError for a folder that it cannot use.
    """
    if name_or_path in NAMES:
        if name_or_path in TORCHVISION:
            dataset = load_torchvision(name_or_path, split)
        else:
            dataset = draw_shapes(6000, seed=1) if split == "train" else draw_shapes(1500, seed=2)
        if not with_classes:
            dataset.labels, dataset.classes = torch.full_like(dataset.labels, -1), []
        return dataset
    train, val = find_splits(name_or_path)
    folder = train if split == "train" else val
    if folder is None:
        raise UserError(f"{name_or_path!r} has no val split: it needs a folder val or test beside "
                        f"train")
    paths, left_out = find_images(folder)
    if not paths:
        raise UserError(f"no images in {folder!r}: found {count_words(left_out) or 'nothing'}")
    folders = [class_of(path) if with_classes else "" for path in paths]
    here = {*folders} - {""}
    known = here
    if with_classes and split == "val":        # val's classes are numbered as train's
        known = {class_of(path) for path in find_images(train)[0]} - {""}
    classes = sorted(known)
    # test/unknown/ alone is no class; several, or one beside known classes, are misspelt.
    unknown = sorted(here - known)
    if known and unknown and (len(unknown) > 1 or here & known):
        raise UserError(f"{folder!r} has a class {unknown[0]!r} that {train!r} has not: name the "
                        f"class folders of both splits alike")
    label_of = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([label_of.get(name, -1) for name in folders])
    root_name = os.path.basename(os.path.realpath(name_or_path)) or "root"
    dataset = Images(root_name, paths, labels, classes, folder, left_out)
    return leave_out_unreadable(dataset) if skip_unreadable else dataset


def class_of(path):
    """The first folder of a relative path; "" for a file in none."""
    return path.split(os.sep)[0] if os.sep in path else ""


def find_splits(path):
    """The folders of (train, val) of a dataset folder; val is None where there is none."""
    if not os.path.isdir(path):
        raise UserError(f"{path!r} is no folder: pass a folder of images or one of "
                        f"{', '.join(NAMES)}")
    root = os.path.realpath(path)
    _, folders, _ = next(os.walk(root, onerror=cannot_list))

    def named(*names):                         # also Train, train2017
        return [os.path.join(root, folder) for folder in sorted(folders)
                if folder.lower().rstrip("0123456789") in names]

    train = named("train", "training")
    val = named("val", "valid", "validation") + named("test", "testing")
    if len(train) > 1:
        raise UserError(f"{root!r} has several training splits: pass --data with one of them")
    if not train:
        return root, None
    if val:
        return train[0], val[0]
    for folder in sorted(folders):             # a class may be called train, beside bus and car
        beside = os.path.join(root, folder)
        if beside != train[0] and not folder.startswith(".") and find_images(beside)[0]:
            raise UserError(f"{root!r} has images in {folder!r} beside {train[0]!r}: pass --data "
                            f"with one of them, or rename what is no training split")
    return train[0], None


def has_val(name):
    """Whether a dataset has a val split of its own."""
    return name in NAMES or find_splits(name)[1] is not None


def load_torchvision(name, split, root="datasets"):
    """CIFAR and STL-10 by torchvision, downloaded into `root`; STL-10's train split includes its
    unlabelled images."""
    try:
        if name == "stl10":
            part = "train+unlabeled" if split == "train" else "test"
            source = tv_datasets.STL10(root, part, download=True)
            pictures, labels = source.data, source.labels
        else:
            kind = tv_datasets.CIFAR10 if name == "cifar10" else tv_datasets.CIFAR100
            source = kind(root, train=split == "train", download=True)
            pictures, labels = source.data.transpose(0, 3, 1, 2), source.targets
    except (OSError, RuntimeError) as error:   # URLError is an OSError
        raise UserError(f"cannot download {name} into {root}/ ({error}): connect to the network, "
                        f"put its archive there, or pass --data PATH with images") from None
    pictures = torch.from_numpy(np.ascontiguousarray(pictures))
    return Images(name, pictures, torch.as_tensor(np.array(labels)).long(), list(source.classes))


# ------------------------------------------------- files

# Pillow's raster formats: never one that would start another program, as EPS does.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")


def find_images(folder):
    """Sorted paths of the images at any depth, relative to `folder`; counts of the other files.

    A file is an image if its extension is one of Pillow's for `FORMATS`. Passed over: hidden files
    and folders, runs of pretrain.py, links back to a folder they lie in. Raises UserError for a
    folder that cannot be listed.
    """
    extensions = {ext for ext, name in Image.registered_extensions().items() if name in FORMATS}
    paths, left_out = [], Counter()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=cannot_list):
        inside = "" if where == folder else os.path.relpath(where, folder)
        leads_back = os.path.realpath(where) in map(os.path.realpath, Path(where).parents)
        if leads_back or "args.json" in files:             # the latter: a run of pretrain.py
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in extensions:
                paths.append(os.path.join(inside, name))
            else:
                left_out[extension or "without extension"] += 1
    return sorted(paths), left_out


def cannot_list(error):
    raise UserError(f"cannot list {error.filename!r}: {error.strerror}")


def count_words(counts):
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def read_image(path):
    """Decode an image file to RGB, (3, H, W) uint8; alpha and EXIF rotation are ignored, as by
    torchvision's loader. Of 16 bits the upper 8 count.

    JPEG is decoded by torchvision, everything else by Pillow. Raises LocalError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):          # a named pipe would never answer
            raise OSError(0, "no regular file")
        with open(path, "rb") as file:
            encoded = file.read()
    except OSError as error:                   # the machine's fault, not the picture's
        raise LocalError(f"cannot read {path!r}: {error.strerror}") from None
    if encoded[:2] == b"\xff\xd8":
        try:
            content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            return decode_jpeg(content, ImageReadMode.RGB)
        except RuntimeError:                   # damaged or unusual: Pillow knows
            pass
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM"):
                file = Image.fromarray((np.array(file) >> 8).astype(np.uint8))
            if file.mode in ("I", "F"):
                raise ValueError(f"mode {file.mode}: the range of its numbers is unknown")
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:                 # Pillow raises many types, SyntaxError too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LocalError(f"{path!r} cannot be decoded ({reason}): replace or remove it; pretrain.py"
                         f" can do without such files by --skip-unreadable") from None


def find_unreadable(dataset):
    """Decode every file -> {index: its UserError}; a line on the terminal every ten seconds."""
    def error_of(index):
        try:
            dataset[index]
        except UserError as error:
            return error

    unreadable, progress = {}, Progress("reading all images", len(dataset))
    with ThreadPoolExecutor() as pool:
        for rows in torch.arange(len(dataset)).split(4096):  # map queues all its input
            for index, error in zip(rows.tolist(), pool.map(error_of, rows.tolist())):
                if error:
                    unreadable[index] = error
                progress.advance()
    return unreadable


def leave_out_unreadable(dataset):
    """The dataset without the files that cannot be read, which the first process looks for."""
    found = [find_unreadable(dataset) if is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    unreadable = found[0]
    say(f"{dataset.root}: {len(unreadable)} of {len(dataset)} files cannot be read, and are left "
        f"out")
    for error in unreadable.values():
        say(f"  {error}")
    return dataset.without(list(unreadable))


# ------------------------------------------------- shapes: a dataset that needs no file

TILE, TILES = 24, 3       # a picture is 3 x 3 copies of one shape, each in a tile of 24 px
AREA = 1.2                # of every shape at scale 1, or the amount of ink would tell the class


def signed_distances(u, v):
    """name -> (distance from the outline, negative inside; area); u, v are about -1 to 1."""
    a, b = u.abs(), v.abs()
    r = (u ** 2 + v ** 2).sqrt()
    inner, outer = torch.minimum(a, b), torch.maximum(a, b)
    ray = r * (1 + 0.4 * torch.cos(5 * torch.atan2(u, v)))
    moon = 0.65 - ((u - 0.4) ** 2 + v ** 2).sqrt()
    return {
        "disc": (r - 0.8, 2.01),
        "ring": ((r - 0.66).abs() - 0.2, 1.66),
        "square": (outer - 0.72, 2.07),
        "frame": ((outer - 0.62).abs() - 0.18, 1.79),
        "triangle": (torch.maximum(0.866 * a - 0.5 * v, v) - 0.48, 1.20),
        "plus": (torch.maximum(inner - 0.2, outer - 0.9), 1.29),
        "cross": (torch.maximum((a - b).abs() * 0.7 - 0.2, r - 0.95), 1.36),
        "diamond": (0.7 * (a + b) - 0.62, 1.57),
        "bars": (torch.maximum(torch.minimum(b, (b - 0.66).abs()) - 0.16, a - 0.8), 1.53),
        "crescent": (torch.maximum(r - 0.85, moon), 1.14),
        "hourglass": (torch.maximum(0.7 * (a - b), b - 0.8), 1.28),
        "star": (0.8 * (ray - 0.62), 1.57),
    }


AREAS = {name: area for name, (_, area) in signed_distances(torch.zeros(1), torch.zeros(1)).items()}
SHAPES = list(AREAS)


def draw_shapes(count, seed):
    """`count` pictures of 72 px: 3 x 3 copies of one shape, which is the class, gray on gray.

    Every copy has its own size, angle and place; the amount of ink varies alike in all classes. So
    two crops of a picture share its class, and little else.
    """
    rng = generator(DRAWING, seed)
    labels = torch.from_numpy(rng.permutation(count) % len(SHAPES))
    draws = torch.from_numpy(rng.random((count, TILES * TILES, 4), dtype=np.float32))
    parts = [draw_lattices(*part) for part in zip(labels.split(256), draws.split(256))]
    return Images("shapes", torch.cat(parts), labels, SHAPES)


def draw_lattices(labels, draws):
    """labels (n,), draws (n, 9, 4) in [0, 1): size, angle, x, y -> (n, 3, 72, 72) uint8."""
    n = len(labels)
    ink = torch.empty(n, TILES * TILES, TILE, TILE)
    grid = (torch.arange(TILE) + 0.5) / TILE * 2 - 1                      # pixels of a tile
    for label in labels.unique().tolist():
        mine = labels == label
        scale, angle, x, y = draws[mine][..., None, None].unbind(2)       # (m, 9, 1, 1) each
        name = SHAPES[label]
        radius = (0.55 + 0.4 * scale) * (AREA / AREAS[name]) ** 0.5       # in half tiles
        turn = (2 * angle - 1) * math.radians(20)
        room = (1 - radius).clamp(min=0)
        dx = grid[None, :] - (2 * x - 1) * room                           # from the copy's centre
        dy = grid[:, None] - (2 * y - 1) * room
        u = (turn.cos() * dx + turn.sin() * dy) / radius
        v = (turn.cos() * dy - turn.sin() * dx) / radius
        distance, _ = signed_distances(u, v)[name]
        pixels = distance * TILE / 2 * radius                             # the edge: 1 px soft
        ink[mine] = (0.5 - pixels).clamp(0, 1)
    # (n, tile row, tile column, pixel row, pixel column); the middle two change places.
    rows = ink.view(n, TILES, TILES, TILE, TILE).transpose(2, 3)
    picture = 0.3 + 0.4 * rows.reshape(n, 1, TILES * TILE, TILES * TILE)
    return (255 * picture).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


# ------------------------------------------------- what all scripts share

def default_workers():
    """Beside a GPU all cores of a process but one; on a CPU half, since training needs the rest;
    at most 16."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = cores - 1 if torch.cuda.is_available() else cores // 2
    return min(16, max(1, workers))


def default_image_size(dataset):
    """The median short side of 16 images, in eights, but at least 16 and at most 224 px."""
    some = dataset.sample(16, 0)
    short = int(np.median([min(some[index][0].shape[1:]) for index in range(len(some))]))
    return min(224, max(16, short // 8 * 8))


def draw_view_pairs(two_views, path, count=8):
    """A picture: for each of `count` images a column of the original and its two views."""
    picks = permutation(len(two_views.dataset), SAMPLE, two_views.seed)[:count].tolist()
    crops, params, _ = collate([two_views[0, index] for index in picks])
    center_view = CenterView(two_views.dataset, two_views.size)
    originals, unchanged, _ = collate([center_view[0, index] for index in picks])
    crops, params = torch.cat([originals, crops]), torch.cat([unchanged, params])
    rows = [augment(view, view_params) for view, view_params in zip(crops, params)]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    images = (torch.cat(rows).float() * std + mean).clamp(0, 1)
    grid = make_grid(images, nrow=len(picks), padding=2, pad_value=1.0)
    picture = TF.to_pil_image(grid)
    factor = max(1, round(96 / two_views.size))
    with writing(path):
        picture.resize((factor * picture.width, factor * picture.height), Image.NEAREST).save(path)


def iterate(views, item_lists, workers, batch_size, pin_memory=False):
    """Yield crops, params, index of each of `item_lists`, which have at most `batch_size` items.

    Raises LocalError for an image that cannot be read.
    """
    # In shared memory lie two batches a worker, and the one in use: where they do not fit, all
    # hang. Half of it is left free, for the evaluation that runs beside a training.
    if workers and os.path.isdir("/dev/shm"):
        views_an_image = 2 if isinstance(views, TwoViews) else 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # processes that share this machine
        batch_bytes = here * batch_size * views_an_image * 3 * views.size ** 2
        half = shutil.disk_usage("/dev/shm").total // 2
        fitting = max(0, (half // batch_bytes - 1) // 2)
        if fitting < workers:
            say_once(f"shared memory has room for {fitting} of {workers} loader workers: it is "
                     f"small in containers; docker run --shm-size enlarges it")
            workers = fitting
    # Forked workers share the list of files, and inherit how signals are handled, so that none dies
    # of one while it starts. Since Python 3.14 fork must be asked for.
    fork = "fork" if workers and sys.platform == "linux" else None
    yield from DataLoader(views, batch_sampler=item_lists, num_workers=workers, collate_fn=collate,
                          worker_init_fn=outlive_signals, pin_memory=pin_memory,
                          multiprocessing_context=fork)


def outlive_signals(_):
    """For loader workers: the signals that ask to stop reach them too, but the trainer decides, and
    may still need batches. SIGTERM ends a worker five minutes later, so that none stays behind."""
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):                            # Windows has one of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300))


def own_device():
    """Choose and return the GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        raise UserError(f"more processes than this machine's {gpus} GPUs: pass "
                        f"--nproc_per_node={gpus} to torchrun")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def is_first():
    """Whether this is the first of torchrun's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def count_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(x):
    """This process's equal part of the rows of x: (N, ...) -> (n, ...). N must divide evenly."""
    if not dist.is_initialized():
        return x
    return x.chunk(count_processes())[dist.get_rank()]


def gather(x):
    """Concatenate x (n, ...), equally long on all processes, in order of rank -> (N, ...)."""
    if not dist.is_initialized():
        return x
    whole = x.new_empty(count_processes() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def say(*words):
    """Print on the first process. A terminal that is gone must not cost the run."""
    if is_first():
        try:
            print(*words, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


say_once = functools.cache(say)                # an evaluation would say the same each time


class Progress:
    """A line on the terminal at most every ten seconds: what, how much, how long still."""

    def __init__(self, what, total):
        self.what, self.total, self.start = what, total, time.monotonic()
        self.shown, self.done = self.start, 0

    def advance(self, count=1):
        self.done += count
        now = time.monotonic()
        if now - self.shown > 10:
            self.shown = now
            left = (now - self.start) / self.done * (self.total - self.done)
            say(f"{self.what}: {self.done:,} of {self.total:,}, {left:.0f} s left")


@contextlib.contextmanager
def writing(path):
    """Turn what the disk refuses, in the block, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror or error}): make room, or "
                        f"choose another folder, and give the same command again") from None


def last_line(error):
    """An error's message: the last line, behind a loader worker's traceback."""
    return str(error).strip().splitlines()[-1].removeprefix("data.LocalError: ")


def refuse(message):
    """For argparse: a command line that cannot be read is a UserError."""
    raise UserError(message)


def run_main(main):
    """Exit with what `main` returns; for a UserError, or a full GPU, with one line and code 2. Of
    several processes on a machine the first prints it, and each its own LocalError."""
    sys.stdout.reconfigure(errors="backslashreplace")         # file names may be anything
    try:
        sys.exit(main())
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)     # frees the loader: workers delay the exit
        if isinstance(error, torch.OutOfMemoryError):
            error = LocalError("the GPU's memory is full: give pretrain.py a smaller --batch-size "
                               "or --image-size, or more GPUs; lineval.py runs on the CPU with "
                               "CUDA_VISIBLE_DEVICES= before its command")
        if not isinstance(error, UserError):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LocalError):
            print("error: " + last_line(error), file=sys.stderr, flush=True)
        sys.exit(2)


def describe():
    """Print what load_dataset finds, decode every file, and draw view pairs of the train split."""
    if len(sys.argv) != 2:
        raise UserError(f"usage: python data.py PATH, or one of {', '.join(NAMES)}")
    name = sys.argv[1]
    for split in ("train", "val") if has_val(name) else ("train",):
        dataset = load_dataset(name, split)
        unreadable = find_unreadable(dataset)
        print(f"{split}: {len(dataset)} images in {dataset.root or name}\n"
              f"  {dataset.class_words()}\n"
              f"  without a label: {(dataset.labels < 0).sum()}\n"
              f"  left out, since no image: {count_words(dataset.left_out) or 'nothing'}\n"
              f"  files that cannot be read: {len(unreadable)}")
        for error in unreadable.values():
            print(f"    {error}")
        if split == "train":
            good = dataset.without(list(unreadable))
            size = default_image_size(good)
            blur_p = 0.5 if size > SMALL else 0.0           # as in pretraining
            draw_view_pairs(TwoViews(good, size, blur_p=blur_p), "view_pairs.png")
            print(f"  {size} px by default; originals over their two views: view_pairs.png")


if __name__ == "__main__":
    run_main(describe)
