"""The same network trained with labels, to set beside a pretrained one.

    python tests/supervised.py FOLDER OUT --epochs 8          # then lineval.py RUN OUT

One view of each image an epoch, with the augmentations of pretraining; cross entropy; SGD, whose
rate warms up over an epoch and falls by a cosine. OUT is a run folder for lineval.py.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import lineval
import pretrain
from models import build_backbone


def evaluate(backbone, head, train, val, size):
    """-> kNN accuracy of the features, accuracy of the classifier, on `val`."""
    backbone.eval()
    [train_x] = lineval.extract_features(backbone, data.CenterView(train, size))
    [val_x] = lineval.extract_features(backbone, data.CenterView(val, size))
    backbone.train()
    with torch.no_grad():
        predicted = head(val_x).argmax(1)
    knn = lineval.knn_accuracy(train_x, train.labels, val_x, val.labels)
    return knn, lineval.accuracy(predicted, val.labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="mobilenetv3_small")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="per 256 images")
    parser.add_argument("--warmup-epochs", type=float, default=1.0)
    parser.add_argument("--knn-every", type=int, default=1, metavar="EPOCHS")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain.keep_freed_memory()
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    train, val = data.load_dataset(args.folder, "train"), data.load_dataset(args.folder, "val")
    small = args.image_size <= data.SMALL
    backbone = build_backbone(args.arch, small).to(memory_format=torch.channels_last)
    head = nn.Linear(backbone.feature_dim, len(train.classes))
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
    views = data.TwoViews(train, args.image_size, args.seed, blur_p=0.0 if small else 0.5)
    per_epoch = len(train) // args.batch_size
    args.out.mkdir(parents=True)
    settings = dict(data=args.folder, arch=args.arch, classes="folders", skip_unreadable=False,
                    image_size=args.image_size, dataset=train.fingerprint())
    (args.out / "args.json").write_text(json.dumps(settings))
    log = csv.writer(open(args.out / "log.csv", "w", newline="", buffering=1))
    log.writerow(["epoch", "step", "loss", "knn_backbone", "top1"])

    item_lists = data.schedule(len(train), args.batch_size, args.epochs, args.seed)
    batches = data.iterate(views, item_lists, 0, args.batch_size)
    for step, (crops, params, index) in enumerate(batches):
        logits = head(backbone(data.augment(crops[0], params[0])))       # (N, classes)
        loss = F.cross_entropy(logits, train.labels[index])
        optimizer.param_groups[0]["lr"] = pretrain.lr_at(step, per_epoch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % (args.knn_every * per_epoch) == 0:
            knn, top1 = evaluate(backbone, head, train, val, args.image_size)
            row = [step // per_epoch + 1, step + 1, loss.item(), knn, top1]
            print(*row, flush=True)
            log.writerow(row)
            torch.save(backbone.state_dict(), args.out / "backbone.pt")


if __name__ == "__main__":
    main()
