"""When does smoothing pay? Three experiments beside the program; what came out is in
assets/RESULTS.md.

    python tests/smoothing.py dose FOLDER OUT --seed 1 --share 0.6 --smoothing 0.4
    python tests/smoothing.py bursts FOLDER OUT --copies 8        # then pretrain.py --data OUT
    python tests/smoothing.py goon RUN OUT --seed 1 --treatment near

dose: a run of five epochs, at 16 px, in which a share of the 20 keys that get the smoothing show
the query's class. They are the nearest of that class, the others the nearest of other classes: the
labels choose them, as no user could.

bursts: a dataset in which each picture is there several times, as in videos: the nearest keys of a
query are then right by construction.

goon: continue a run from its last checkpoint with other views and another order (`--seed`), under
a treatment. Treatments of one seed share weights, views and order, so they differ by nothing else:

    none    no smoothing
    near    0.2 on the query's 20 nearest keys
    ramp    the same, from 0 to 0.2 by half a cosine over what is left of the run
    class   0.2 on the 20 nearest keys of the query's class, by the labels
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import pretrain

SMOOTHING, NEIGHBORS = 0.2, 20


def make_bursts(folder, out, copies, images=2000):
    """Write `images` near copies of the pictures in `folder`/train/CLASS: `copies` of each picture,
    every class alike. A near copy: a crop of 28 to 31 of 32 parts, its brightness within 10 %."""
    chance = random.Random(0)
    classes = sorted(path for path in (folder / "train").iterdir() if path.is_dir())
    for source in classes:
        files = sorted(source.iterdir())
        chance.shuffle(files)
        where = out / "train" / source.name
        where.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(files[:images // len(classes) // copies]):
            picture = Image.open(path).convert("RGB")
            for copy in range(copies):
                size = chance.uniform(28, 31)
                left, top = chance.uniform(0, 32 - size), chance.uniform(0, 32 - size)
                box = (left, top, left + size, top + size)
                near = picture.resize((32, 32), Image.BICUBIC, box=box)
                near = ImageEnhance.Brightness(near).enhance(chance.uniform(0.9, 1.1))
                near.save(where / f"{number:04d}_{copy}.png")


def copy_checkpoint(run, out, seed, smoothing):
    """A new run folder that goes on from the checkpoint of another, as if it were its own."""
    state = torch.load(run / "last.pt", weights_only=True)
    state["settings"] |= dict(seed=seed, smoothing=smoothing)
    state["log_bytes"] = 0
    out.mkdir(parents=True)
    torch.save(state, out / "last.pt")
    (out / "args.json").write_text(json.dumps(state["settings"]))
    return state


def ramp_from(first_step, per_epoch, epochs):
    """A schedule for `pretrain.smoothing_at`: half a cosine over the steps that are left."""
    def smoothing_at(step, *_):
        share = (step - first_step) / (epochs * per_epoch - first_step)
        return SMOOTHING * 0.5 * (1 - math.cos(math.pi * share))
    return smoothing_at


def choose_by_class(share=1.0):
    """Make `pretrain.soft_info_nce` smooth over 20 keys of which a share shows the query's class.
    Where the queue has too few of them, the nearest of other classes fill up, and count twice."""
    right = round(share * NEIGHBORS)
    seen = SimpleNamespace()
    load_dataset, plain_loss = data.load_dataset, pretrain.soft_info_nce

    def load(*args):
        dataset = load_dataset(*args)
        if not hasattr(seen, "labels"):        # the first is that of the training images
            seen.labels = dataset.labels
        return dataset

    class Queue(pretrain.KeyQueue):
        def __init__(self, *args):
            super().__init__(*args)
            seen.queue = self

    class Batches(pretrain.Batches):
        def __iter__(self):
            for crops, params, index in super().__iter__():
                seen.index = index
                yield crops, params, index

    def loss(q, k, queue, *, temperature, smoothing, **options):
        plain, info = plain_loss(q, k, queue, temperature=temperature, **options)
        directions = len(q) // len(seen.index)
        own = seen.labels[seen.index].repeat(directions)[:, None]
        same = own == seen.labels[seen.queue.index]                      # (n, K)
        negatives = q @ queue.T / temperature
        positive = (q * k).sum(1) / temperature
        first_same = (negatives.detach() + 1e3 * same).topk(right).indices
        first_other = (negatives.detach() - 1e3 * same).topk(NEIGHBORS - right).indices
        chosen = torch.cat([first_same, first_other], 1)
        soft = negatives.gather(1, chosen).mean(1)
        # The share `smoothing` of the target moves from the positive to the chosen keys.
        loss = plain + smoothing * (positive - soft).mean()
        return loss, info | {"neighbors": chosen}

    data.load_dataset = load
    pretrain.KeyQueue, pretrain.Batches, pretrain.soft_info_nce = Queue, Batches, loss


def give_dose(folder, out, seed, share, smoothing):
    choose_by_class(share)
    return pretrain.main([
        "--data", str(folder), "--image-size", "16", "--epochs", "5", "--warmup-epochs", "0.5",
        "--seed", str(seed), "--smoothing", str(smoothing), "--neighbors", str(NEIGHBORS),
        "--knn-every", "5", "--workers", "0", "--out", str(out)])


def go_on(run, out, seed, treatment):
    smoothing = 0.0 if treatment == "none" else SMOOTHING
    state = copy_checkpoint(run, out, seed, smoothing)
    settings = state["settings"]
    if treatment == "ramp":
        per_epoch = int(settings["dataset"].split()[0]) // settings["batch_size"]
        pretrain.smoothing_at = ramp_from(state["step"], per_epoch, settings["epochs"])
    if treatment == "class":
        choose_by_class()
    return pretrain.main([
        "--data", settings["data"], "--image-size", str(settings["image_size"]), "--epochs",
        str(settings["epochs"]), "--seed", str(seed), "--smoothing", str(smoothing), "--knn-every",
        "0", "--workers", "0", "--warmup-epochs", str(settings["warmup_epochs"]), "--out", str(out)])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dose", "bursts", "goon"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--treatment", default="none", choices=("none", "near", "ramp", "class"))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--smoothing", type=float, default=SMOOTHING)
    args = parser.parse_args()
    if args.what == "dose":
        return give_dose(args.source, args.out, args.seed, args.share, args.smoothing)
    if args.what == "bursts":
        make_bursts(args.source, args.out, args.copies)
        return 0
    return go_on(args.source, args.out, args.seed, args.treatment)


if __name__ == "__main__":
    sys.exit(main())
