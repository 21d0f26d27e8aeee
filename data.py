"""Datasets, the two random views of every image, and all randomness of the project.

    python data.py shapes            # or cifar10, cifar100, stl10, or a folder of images:
    python data.py PATH              # what was found, which files cannot be read, and a picture of view pairs

Each random number is a hash of what it is for: (purpose, seed, epoch, index, view, ...). So an image gets the same two
views in an epoch whatever the number of workers, processes or restarts, and nothing needs a generator's state.

A view is made in two places. The host decodes, crops and resizes, all in uint8 (a quarter of the bytes of floats), and
draws the other augmentations as a few numbers; `augment` applies those on the device to the whole batch.
"""
import contextlib
import hashlib
import itertools
import math
import os
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets as tv_datasets
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's, for every dataset
TORCHVISION = ("cifar10", "cifar100", "stl10")
NAMES = ("shapes", *TORCHVISION)                             # what else is passed as --data is a folder
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SMALL = 64                                                   # px: from here down, networks and views are "small"


class UserError(ValueError):
    """Something the user can put right: the scripts print it as one line and exit with code 2."""


# ---------------------------------------------------------------------- randomness: a hash of what it is for

VIEWS, ORDER, SHUFFLE, DRAWING, HOLD_OUT, QUEUE, SAMPLE = range(7)     # the purposes, so that no two share a stream


def keyed_bits(*key):
    """Mix integers, or arrays of them that broadcast, into uint64 (finaliser of splitmix64, Steele et al. 2014)."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def keyed_uniform(count, *key):
    """`count` numbers in [0, 1) for each key: shape of the broadcast key parts + (count,), float64."""
    parts = [np.asarray(part)[..., None] for part in key]
    return (keyed_bits(*parts, np.arange(count)) >> np.uint64(11)) * 2.0 ** -53


def keyed_permutation(n, *key):
    """A permutation of range(n), int64."""
    return np.argsort(keyed_bits(*key, np.arange(n)), kind="stable")


# ---------------------------------------------------------------------- datasets: (uint8 CHW tensor, label)

class Pictures:
    """Images in memory: images (N, 3, H, W) uint8, labels (N,) int64 with -1 for none, classes a list of names."""

    def __init__(self, name, images, labels, classes):
        self.name, self.images, self.labels, self.classes = name, images, labels, classes
        self.fingerprint = hashlib.blake2b(images.numpy(), digest_size=8).hexdigest()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


class Files:
    """Image files below `root`; the paths are kept in one array, since a list of a million str is copied by workers."""

    def __init__(self, name, root, paths, labels, classes):
        self.name, self.root, self.labels, self.classes = name, root, labels, classes
        self.paths = np.array([os.fsencode(p) for p in paths])
        self.fingerprint = hashlib.blake2b(b"\n".join(self.paths.tolist()), digest_size=8).hexdigest()

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))

    def __getitem__(self, index):
        return read_image(self.path(index)), int(self.labels[index])


def read_image(path):
    """Decode any image file to RGB, (3, H, W) uint8; alpha is dropped and EXIF rotation ignored, as torchvision's loader.

    Raises UserError with the file's name. torchvision decodes what it can (1.3 x faster than Pillow), Pillow the rest:
    other formats, CMYK, 16 bits (the upper 8 count), and files that end early, which torchvision would fill up in silence.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
        end = encoded[-2:].tobytes() == b"\xff\xd9" or b"\xff\xd9" in encoded[-65536:].tobytes()
        whole = end or encoded[:2].tobytes() != b"\xff\xd8"
        image = None
        if whole and len(encoded):
            try:
                image = decode_image(torch.from_numpy(encoded), ImageReadMode.RGB)
            except RuntimeError:
                pass
        if image is None or image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            with Image.open(path) as file:
                sixteen = file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM")
                if file.mode in ("I", "F") and not sixteen:
                    raise UserError(f"cannot read image {path} (its range is unknown, mode {file.mode}): convert it to 8 or "
                                    f"16 bits")
                if sixteen:     # Pillow's convert would clip them at 255
                    bits = getattr(file, "tag_v2", {}).get(258, (16,))[0]      # TIFF's BitsPerSample: 12 in some cameras'
                    file = Image.fromarray((np.array(file) >> (bits - 8)).astype(np.uint8))
                image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        return image
    except UserError:
        raise
    except Exception as error:     # Pillow raises many types, from SyntaxError to its own decompression-bomb error
        raise UserError(f"cannot read image {path} ({type(error).__name__}): remove or replace it "
                        f"(`python data.py DATASET` lists all such files)") from None


def load_dataset(name_or_path, split):
    """A dataset of (uint8 CHW tensor, label), with `.labels`, `.classes`, `.name` and `.fingerprint`.

    `name_or_path`: "shapes", "cifar10", "cifar100", "stl10", or a folder: with `train/` and `val/` or `test/` inside, or
    any tree of images. The class is the first folder below the split; an image in none has label -1. `split`: "train" or
    "val". Raises UserError where there is nothing to read; `has_val` tells whether a folder has a val split.
    """
    if split not in ("train", "val"):
        raise UserError(f'unknown split {split!r}: pass "train" or "val"')
    name = str(name_or_path)
    if name == "shapes":
        return draw_shapes(*((SHAPES_TRAIN, 1) if split == "train" else (SHAPES_VAL, 2)))
    if name in TORCHVISION:
        return load_torchvision(name, split)
    root = Path(os.path.realpath(name))
    if not os.path.isdir(root):      # Path.is_dir raises where it is forbidden to look
        what = "is a file" if os.path.exists(root) else "does not exist, or is forbidden to read"
        raise UserError(f"--data {name} {what}: pass a folder of images or one of {', '.join(NAMES)}")
    train_root = root / "train" if os.path.isdir(root / "train") else root
    folder = train_root if split == "train" else has_val(name)
    if folder is None:
        raise UserError(f"{name} has no val split: it needs a folder val/ or test/ beside train/")
    paths = sorted(path.removeprefix(os.path.join(folder, "")) for path in images_below(folder))
    if not paths:
        raise UserError(f"no images in {folder}: looked for {' '.join(sorted(EXTENSIONS))} at any depth")
    found = [p.split(os.sep)[0] if os.sep in p else None for p in paths]
    # The classes of both splits are train's folders with an image in them.
    classes = sorted(os.path.basename(c) for c in list_folder(train_root)[0] if any(images_below(c)))
    strange = sorted({c for c in found if c is not None} - set(classes))
    if strange:
        raise UserError(f"{folder} has a class folder {strange[0]!r} with images, {train_root} has none of that class: name "
                        f"the class folders of both splits alike, or move that one away")
    numbers = {c: i for i, c in enumerate(classes)}
    labels = torch.tensor([-1 if c is None else numbers[c] for c in found])
    return Files(root.name or "root", str(folder), paths, labels, classes)


def list_folder(folder):
    """Paths of the (folders, image files) in it; not what is hidden, nor links to a folder that they lie in.

    A link that leads nowhere counts as an image if it is named like one, so that `read_image` names it; of any other
    nobody knows whether a folder of images is missing there, so it raises UserError.
    """
    try:      # lost+found: only root may list it, in the top folder of many disks
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.name != "lost+found"]
    except OSError as error:
        raise UserError(f"cannot list {folder} ({error.strerror}): allow it, or move that folder away") from None

    def leads_back(entry):
        target = os.path.join(os.path.realpath(entry.path), "")
        above = (os.path.join(os.path.realpath(parent), "") for parent in Path(entry.path).parents)
        return any(parent.startswith(target) for parent in above)

    folders, files = [], []
    for entry in entries:
        # isdir is False where a link's target is missing or forbidden, or is the link; entry.is_dir() raises for the last two.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            if not (entry.is_symlink() and leads_back(entry)):
                folders.append(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            files.append(entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"cannot follow the link {entry.path}: mount its disk, allow it, or remove the link")
    return folders, files


def images_below(folder):
    """Paths of the image files at any depth."""
    folders, files = list_folder(folder)
    yield from files
    for below in folders:
        yield from images_below(below)


def has_val(name):
    """The folder of a dataset folder's val split, True for a dataset known by name, None where there is none."""
    if name in NAMES:
        return True
    root = Path(os.path.realpath(name))
    return next((root / v for v in ("val", "test") if os.path.isdir(root / "train") and os.path.isdir(root / v)), None)


def load_torchvision(name, split, root="datasets"):
    """CIFAR and STL-10 by torchvision, downloaded into `root`; STL-10's train split includes its unlabeled images."""
    try:
        if name == "stl10":
            source = tv_datasets.STL10(root, "train+unlabeled" if split == "train" else "test", download=True)
            images, labels = torch.from_numpy(source.data).contiguous(), source.labels
        else:
            kind = tv_datasets.CIFAR10 if name == "cifar10" else tv_datasets.CIFAR100
            source = kind(root, train=split == "train", download=True)
            images, labels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), source.targets
    except (OSError, RuntimeError) as error:      # URLError is an OSError
        raise UserError(f"cannot download {name} into {root}/ ({error}): connect to the network, put its archive there, "
                        f"or pass --data PATH with the images as files") from None
    return Pictures(name, images, torch.as_tensor(np.array(labels)).long(), list(source.classes))


# ---------------------------------------------------------------------- shapes: a dataset that needs no file

SHAPES_TRAIN, SHAPES_VAL, TILE, TILES = 6000, 1500, 24, 3
GROUND, INK = 0.3, 0.7
AREA = 1.2     # every shape is scaled to this area, or the amount of colour would tell the class
SHAPES = {     # name -> signed distance at u, v in about [-1, 1] and r = |(u, v)|, negative inside; and the area inside
    "disc":      (lambda u, v, r: r - 0.8, 2.01),
    "ring":      (lambda u, v, r: (r - 0.66).abs() - 0.2, 1.66),
    "square":    (lambda u, v, r: torch.maximum(u.abs(), v.abs()) - 0.72, 2.07),
    "frame":     (lambda u, v, r: (torch.maximum(u.abs(), v.abs()) - 0.62).abs() - 0.18, 1.79),
    "triangle":  (lambda u, v, r: torch.maximum(0.866 * u.abs() - 0.5 * v, v) - 0.48, 1.20),
    "plus":      (lambda u, v, r: torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.2, torch.maximum(u.abs(), v.abs()) - 0.9), 1.29),
    "cross":     (lambda u, v, r: torch.maximum((u.abs() - v.abs()).abs() * 0.7 - 0.2, r - 0.95), 1.36),
    "diamond":   (lambda u, v, r: 0.7 * (u.abs() + v.abs()) - 0.62, 1.57),
    "bars":      (lambda u, v, r: torch.maximum(torch.minimum(v.abs(), (v.abs() - 0.66).abs()) - 0.16, u.abs() - 0.8), 1.53),
    "crescent":  (lambda u, v, r: torch.maximum(r - 0.85, 0.65 - ((u - 0.4) ** 2 + v ** 2).sqrt()), 1.14),
    "hourglass": (lambda u, v, r: torch.maximum(0.7 * (u.abs() - v.abs()), v.abs() - 0.8), 1.28),
    "star":      (lambda u, v, r: 0.8 * (r * (1 + 0.4 * torch.cos(5 * torch.atan2(u, v))) - 0.62), 1.57),
}


def draw_shapes(count, seed, size=TILE * TILES):
    """`count` pictures of `size` px, each a lattice of 3 x 3 copies of one shape: the class.

    Every copy has its own size, angle and place; ink, ground and the area of ink are the same everywhere. So colour and
    background say nothing about the class, any crop still shows it, and of what two crops of a picture share, the shape
    tells most. (With coloured copies or a clouded ground the pretext task is solved by those, and the shape not learnt.)
    """
    labels = torch.from_numpy(keyed_permutation(count, DRAWING, seed) % len(SHAPES))
    parts = [draw_lattices(labels[rows], seed, rows) for rows in np.split(np.arange(count), range(256, count, 256))]
    images = torch.cat(parts)
    if size != TILE * TILES:
        images = TF.resize(images, [size, size], antialias=True)
    return Pictures("shapes", images, labels, list(SHAPES))


def draw_lattices(labels, seed, rows):
    """The pictures with the numbers `rows`: labels (n,) -> (n, 3, 72, 72) uint8."""
    n, copies = len(rows), TILES * TILES
    draws = keyed_uniform(4, DRAWING, seed, 1, rows[:, None] * copies + np.arange(copies))                    # (n, 9, 4)
    scale, angle, x, y = torch.from_numpy(draws).float().flatten(0, 1)[..., None, None].unbind(1)             # (9 n, 1, 1)
    owner = labels.repeat_interleave(copies)
    grid = (torch.arange(TILE) + 0.5) / TILE * 2 - 1
    ink = torch.empty(len(owner), TILE, TILE)
    for label, (distance, area) in enumerate(SHAPES.values()):
        mine = owner == label
        radius = (0.55 + 0.4 * scale[mine]) * (AREA / area) ** 0.5                        # of half a tile
        turn = (2 * angle[mine] - 1) * math.radians(20)
        room = (1 - radius).clamp(min=0)
        dx = grid[None, None, :] - (2 * x[mine] - 1) * room                              # from the copy's own centre
        dy = grid[None, :, None] - (2 * y[mine] - 1) * room
        u, v = (turn.cos() * dx + turn.sin() * dy) / radius, (turn.cos() * dy - turn.sin() * dx) / radius
        edge = distance(u, v, (u ** 2 + v ** 2).sqrt()) * (TILE / 2 * radius)            # in pixels: one pixel soft
        ink[mine] = (0.5 - edge).clamp(0, 1)

    pictures = GROUND + (INK - GROUND) * ink.view(n, TILES, TILES, TILE, TILE).transpose(2, 3).reshape(n, 1, TILES * TILE, -1)
    return (255 * pictures).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


# ---------------------------------------------------------------------- two views: host share

FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDERING, GRAY, SIGMA = range(8)     # columns of params (N, 8)
ORDERINGS = torch.tensor(list(itertools.permutations(range(4))))                 # (24, 4): of the jitter's four steps


class TwoViews:
    """Two random views of each image. Item (epoch, index) -> crops (2, 3, S, S) uint8, params (2, 8) float32, index.

    Crop area `min_scale` to 1 of the image, aspect 3/4 to 4/3, resized to S; params as drawn by `draw_params`, for
    `augment`. A function of (seed, epoch, index) alone. Augmentations: MoCo v2 (arXiv 2003.04297), there as here.
    """

    def __init__(self, dataset, image_size, seed=0, *, min_scale=0.2, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                 gray_p=0.2, blur_p=0.5):
        self.dataset, self.size, self.seed, self.min_scale = dataset, image_size, seed, min_scale
        self.strengths = dict(jitter=jitter, jitter_p=jitter_p, gray_p=gray_p, blur_p=blur_p)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        return self.__getitems__([item])[0]

    def __getitems__(self, items):
        """A whole batch of items at once: torch's loader calls this where it exists."""
        epochs, indices = np.array(items).T
        images = [self.dataset[i][0] for i in indices]                                   # (3, H, W) uint8 each
        draws = keyed_uniform(32, VIEWS, self.seed, epochs[:, None], indices[:, None], np.arange(2))     # (N, 2, 32)
        heights, widths = (np.array([im.shape[side] for im in images])[:, None] for side in (1, 2))
        boxes = draw_boxes(draws[..., :22], heights, widths, self.min_scale)             # (N, 2, 4)
        params = draw_params(draws[..., 22:], **self.strengths)                          # (N, 2, 8)
        crops, small = [None] * len(items), {}
        for i, image in enumerate(images):
            if max(image.shape) <= self.size:             # only ever enlarged: a whole batch at once
                small.setdefault(image.shape, []).append(i)
            else:
                crops[i] = torch.cat([resized_crop(image, box, self.size) for box in boxes[i].tolist()])
        for members in small.values():
            enlarged = enlarge(torch.stack([images[i] for i in members]), boxes[members], self.size)
            for i, pair in zip(members, enlarged):
                crops[i] = pair
        return [(crops[i], params[i], int(index)) for i, index in enumerate(indices)]


def draw_boxes(u, height, width, min_scale):
    """u (..., 22) uniform -> boxes (..., 4) int64 top, left, height, width: torchvision's RandomResizedCrop.

    Ten tries at an area and an aspect, then the largest central crop of an allowed aspect.
    """
    full = np.stack([height, width], -1)[..., None]                                      # (..., 2, 1)
    area = full.prod(-2, keepdims=True) * (min_scale + (1 - min_scale) * u[..., None, :10])
    aspect = np.exp(np.log(3 / 4) + np.log(16 / 9) * u[..., None, 10:20])                # (..., 1, 10), width / height
    sides = np.rint(np.sqrt(np.concatenate([area / aspect, area * aspect], -2)))         # (..., 2, 10): heights, widths
    fits = ((sides >= 1) & (sides <= full)).all(-2, keepdims=True)                       # (..., 1, 10)
    none = ~fits.any(-1, keepdims=True)                                                  # (..., 1, 1)
    central = np.minimum(full, np.rint(full[..., ::-1, :] * 4 / 3))
    sides = np.where(none, central, np.take_along_axis(sides, fits.argmax(-1)[..., None], -1))      # (..., 2, 1)
    start = np.where(none, (full - sides) // 2, np.floor(u[..., 20:22, None] * (full - sides + 1)))
    return np.concatenate([start, sides], -2)[..., 0].astype(np.int64)


def draw_params(u, *, jitter, jitter_p, gray_p, blur_p):
    """u (..., 10) uniform -> params (..., 8) float32, the columns FLIP to SIGMA; sigma 0 means no blur."""
    params = np.zeros(u.shape[:-1] + (8,), np.float32)
    params[..., FLIP] = u[..., 0] < 0.5
    jittered = u[..., 1] < jitter_p
    strength = np.array(jitter[:3])
    low = np.maximum(0, 1 - strength)
    factors = low + (1 + strength - low) * u[..., 2:5]
    params[..., BRIGHTNESS:HUE] = np.where(jittered[..., None], factors, 1)
    params[..., HUE] = np.where(jittered, (2 * u[..., 5] - 1) * jitter[3], 0)            # in turns of the colour circle
    params[..., ORDERING] = np.floor(u[..., 6] * 24)
    params[..., GRAY] = u[..., 7] < gray_p
    params[..., SIGMA] = np.where(u[..., 8] < blur_p, 0.1 + 1.9 * u[..., 9], 0)          # in pixels of the crop
    return torch.from_numpy(params)


def resized_crop(image, box, size):
    """image (3, H, W) uint8, box top, left, height, width -> (1, 3, size, size) uint8, bilinear, antialiased.

    The crop is made channels last first, as a decoder has it: torch's resize would turn any other into that and back.
    """
    top, left, height, width = box
    crop = image[None, :, top:top + height, left:left + width].contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)


def enlarge(images, boxes, size):
    """images (B, 3, H, W) uint8, boxes (B, 2, 4) -> crops (B, 2, 3, size, size) uint8, bilinear.

    The edge pixel is held beyond a crop's border, as where the crop is cut out first.
    """
    boxes = torch.from_numpy(boxes).flatten(0, 1).float()                                # (2B, 4)
    steps = (torch.arange(size) + 0.5) / size

    def positions(start, length, full):                       # of the output pixels in the image, scaled to [-1, 1]
        pixel = start + (steps * length - 0.5).clamp(min=0).minimum(length - 1)          # (2B, size)
        return 2 * pixel / max(full - 1, 1) - 1

    y = positions(boxes[:, :1], boxes[:, 2:3], images.shape[2])
    x = positions(boxes[:, 1:2], boxes[:, 3:], images.shape[3])
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    pixels = images.float().repeat_interleave(2, 0)                                      # (2B, 3, H, W)
    crops = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return crops.round().to(torch.uint8).view(len(images), 2, 3, size, size)


def collate(items):
    """List of items -> crops (2, N, 3, S, S), params (2, N, 8), index (N,)."""
    crops, params, index = zip(*items)
    return torch.stack(crops, dim=1), torch.stack(params, dim=1), torch.tensor(index)


def schedule(n, batch_size, epochs, seed, *, first_step=0, rank=0, world=1):
    """Yield this process's (epoch, index) pairs of each step: the rank-th part of the global batch.

    The global batch of step t of an epoch is permutation(seed, epoch)[t * batch : (t + 1) * batch]; the rest is dropped.
    """
    part = batch_size // world
    for step in range(first_step, epochs * (n // batch_size)):
        epoch, t = divmod(step, n // batch_size)
        if t == 0 or step == first_step:
            order = keyed_permutation(n, ORDER, seed, epoch)
        start = t * batch_size + rank * part
        yield [(epoch, int(i)) for i in order[start:start + part]]


# ---------------------------------------------------------------------- two views: device share

@torch.no_grad()
def augment(crops, params):
    """(N, 3, S, S) uint8, (N, 8) -> (N, 3, S, S) float, channels_last, normalised: a pure function, on any device.

    Flip, colour jitter in each image's own order, gray, blur, as torchvision's functional transforms do them to float
    images in [0, 1]; then ImageNet mean and std. Computes in torch's default dtype.
    """
    n, _, size, _ = crops.shape
    out = torch.empty(crops.shape, dtype=torch.get_default_dtype(), device=crops.device,
                      memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, dtype=out.dtype).view(3, 1, 1).to(out.device, non_blocking=True) for v in (MEAN, STD))
    # On a CPU, as many images at a time as stay in its cache.
    chunk = max(1, 16 * 224 ** 2 // size ** 2) if crops.device.type == "cpu" else n
    # The host's copy tells which image needs which step; if `params` lie there, nothing waits for the device.
    plan, params = params.cpu(), params.to(crops.device, out.dtype, non_blocking=True)
    with torch.autocast(crops.device.type, enabled=False):
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            p, todo, x = params[rows], plan[rows], crops[rows]
            x = torch.where(p[:, FLIP, None, None, None] > 0.5, x.flip(3), x)
            # Planar, whatever the crops are: most steps below take channels apart.
            x = x.to(out.dtype, memory_format=torch.contiguous_format).div_(255)
            color_jitter_(x, p, todo)
            for_each(x, todo[:, GRAY] > 0.5, lambda part, _: luma(part).expand_as(part), p)
            for_each(x, todo[:, SIGMA] > 0, lambda part, q: gaussian_blur(part, q[:, SIGMA]), p)
            out[rows] = x.sub_(mean).div_(std)
    return out


def for_each(x, chosen, step, p):
    """x[chosen] = step(x[chosen], p[chosen]), in place; `chosen` (N,) bool on the host."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = step(x[rows], p[rows])


def color_jitter_(x, p, todo):
    """Brightness, contrast, saturation, hue, each image in its own order; x (N, 3, S, S) in [0, 1], in place."""
    steps = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    neutral = (1, 1, 1, 0)
    order = ORDERINGS[todo[:, ORDERING].long()]               # (N, 4): which step comes first, second, ...
    for turn in range(4):
        for number, step in enumerate(steps):
            column = BRIGHTNESS + number
            chosen = (order[:, turn] == number) & (todo[:, column] != neutral[number])
            for_each(x, chosen, lambda part, q: step(part, q[:, column].view(-1, 1, 1, 1)), p)


def luma(x):
    """(N, 3, S, S) -> (N, 1, S, S): ITU-R 601 gray with torchvision's digits."""
    return (0.2989 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def adjust_brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(luma(x).expand_as(x), x, factor).clamp_(0, 1)


def adjust_hue(x, turn):
    """Turn the HSV hue by `turn` in [-0.5, 0.5]. With m and c the least channel and the range of a pixel, a channel is
    m + c * clamp(triangle(hue)): the closed form of HSV -> RGB."""
    r, g, b = x.unbind(1)                                     # (N, S, S)
    turn = turn.view(-1, 1, 1)
    low, high = x.amin(1), x.amax(1)
    c = high - low
    span = torch.where(c == 0, 1, c)
    hue = torch.where(high == r, (g - b) / span, torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
    hue = (hue + 6 * turn).remainder_(6)                      # in sixths of the circle
    red = (hue - 3).abs_().sub_(1).clamp_(0, 1)
    green = (hue - 2).abs_().neg_().add_(2).clamp_(0, 1)
    blue = (hue - 4).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.stack([red, green, blue], 1).mul_(c[:, None]).add_(low[:, None])


def gaussian_blur(x, sigma):
    """x (N, 3, S, S), sigma (N,) pixels: 13 taps, mirrored at the border.

    Along each axis a product by a band matrix, for 32 pixels at a time where that divides S: the fewer, the fewer zeros.
    """
    n, channels, size, _ = x.shape
    taps = torch.arange(-6, 7, device=x.device)
    weight = torch.softmax(-0.5 * (taps / sigma[:, None]) ** 2, 1).to(x.dtype)           # (N, 13), sums to 1
    block = 32 if size % 32 == 0 else size
    offset = torch.arange(block + 12, device=x.device)[:, None] - torch.arange(block, device=x.device)
    band = weight[:, offset.clamp(0, 12)].masked_fill_((offset < 0) | (offset > 12), 0)  # (N, B + 12, B)
    for _ in range(2):
        near = F.pad(x, (6, 6, 0, 0), mode="reflect").unfold(3, block + 12, block)       # (N, 3, S, S / B, B + 12)
        x = torch.bmm(near.reshape(n, -1, block + 12), band).view(n, channels, size, size).transpose(2, 3)
    return x


# ---------------------------------------------------------------------- the view for evaluation

class CenterView:
    """Item index -> (3, S, S) uint8, label, index: short side to 256/224 of S, centre crop; S <= 64: plain resize."""

    def __init__(self, dataset, image_size):
        self.dataset, self.size = dataset, image_size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        size = self.size
        if size <= SMALL:
            image = image if image.shape[1:] == (size, size) else TF.resize(image, [size, size], antialias=True)
        else:
            image = TF.center_crop(TF.resize(image, [round(size * 256 / 224)], antialias=True), [size, size])
        return image, label, int(index)


def normalize(images):
    """(N, 3, S, S) uint8 -> float, channels_last, ImageNet mean and std: `augment` with nothing to do."""
    params = torch.zeros(len(images), 8)
    params[:, BRIGHTNESS:HUE] = 1
    return augment(images, params)


# ---------------------------------------------------------------------- pictures, and this file as a program

def outlive_signals(_):
    """For loader workers: Ctrl-C and SIGTERM reach the whole process group, but the trainer decides what to do, and it may
    still need batches. SIGTERM ends a worker a minute later, so that none stays behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def draw_view_pairs(two_views, path, count=8):
    """Write a picture: for each of `count` images a column with its two views of epoch 0."""
    count = min(count, len(two_views))
    indices = keyed_permutation(len(two_views), SAMPLE, two_views.seed)[:count]
    crops, params, _ = collate(two_views.__getitems__([(0, int(i)) for i in indices]))
    write_grid(augment(crops.flatten(0, 1), params.flatten(0, 1)), path, columns=count)


def write_grid(images, path, columns):
    """Normalised float images (N, 3, S, S) -> one PNG, enlarged to about 96 px an image."""
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (MEAN, STD))
    grid = make_grid((images * std + mean).clamp(0, 1).cpu().float(), nrow=columns, padding=2, pad_value=1.0)
    picture = Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    factor = max(1, round(96 / images.shape[2]))
    picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST).save(path)


def describe(name):
    """Print what load_dataset finds, decoding every file, and draw view pairs of the train split."""
    for split in ("train", "val"):
        if split == "val" and not has_val(name):
            print("val: none (lineval.py holds out a fifth of the labelled images)")
            continue
        dataset = load_dataset(name, split)
        modes, sizes, broken = {}, [], []

        def check(i):
            try:
                if isinstance(dataset, Files):
                    with Image.open(dataset.path(i)) as file:
                        mode = f"{file.format} {file.mode}"
                else:
                    mode = "RGB in memory"
                return mode, dataset[i][0].shape[1:]
            except Exception:
                return None

        with ThreadPoolExecutor() as pool:
            for i, found in enumerate(pool.map(check, range(len(dataset)))):
                if found is None:
                    broken.append(dataset.path(i))
                else:
                    modes[found[0]] = modes.get(found[0], 0) + 1
                    sizes.append(tuple(found[1]))
        counts = torch.bincount(dataset.labels[dataset.labels >= 0], minlength=len(dataset.classes)).tolist()
        unlabelled = int((dataset.labels < 0).sum())
        print(f"{split}: {len(dataset)} images of {dataset.name}"
              + (f", {len(dataset.classes)} classes of {min(counts)} to {max(counts)} images" if dataset.classes else "")
              + (f", {unlabelled} without a label" if unlabelled else ""))
        if sizes:
            heights, widths = np.array(sizes).T
            print(f"  height {heights.min()} to {heights.max()} px (median {np.median(heights):.0f}), "
                  f"width {widths.min()} to {widths.max()} px (median {np.median(widths):.0f})")
            print("  " + ", ".join(f"{mode}: {count}" for mode, count in sorted(modes.items())))
        print(f"  files that cannot be read: {len(broken)}" + "".join(f"\n    {path}" for path in broken))
        if split == "train":
            train, bad = dataset, bool(broken)
    if bad:
        raise UserError("no view pairs drawn: remove or replace the files named above first")
    draw_view_pairs(TwoViews(train, default_image_size(train)), "view_pairs.png")
    print("view pairs, one image a column: view_pairs.png")


def default_image_size(dataset):
    """224 px, or what the images have if that is less: the median short side of 16 of them, in multiples of 8."""
    picks = keyed_permutation(len(dataset), SAMPLE, 0)[:16]
    short = int(np.median([min(dataset[int(i)][0].shape[1:]) for i in picks]))
    return min(224, max(16, short // 8 * 8))


@contextlib.contextmanager
def writing(path):
    """Turn what the disk refuses, in the block, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make room, or choose another folder, and give the same "
                        f"command again; what was saved before is whole") from None


def last_line(error):
    """The message of an error, without the traceback that a loader worker puts before it."""
    return str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")


def exit_with(error):
    """Print one line for a UserError and exit with code 2; of several processes with the same error the first prints."""
    traceback.clear_frames(error.__traceback__)     # lets go of loaders, whose workers would hold up the exit
    if os.environ.get("RANK", "0") == "0" or getattr(error, "from_one_process", False):
        print("error: " + last_line(error), file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        exit_with(UserError(f"usage: python data.py PATH (in quotes if it has spaces), or one of {', '.join(NAMES)}"))
    try:
        describe(sys.argv[1])
    except UserError as error:
        exit_with(error)
