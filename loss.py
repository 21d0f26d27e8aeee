"""Soft InfoNCE: tell an image's other view from a queue of other images, without trusting that
they all differ.

A query q (one view) has a positive key k (the other view of the same image) and K negative keys
(views of other images, kept in a queue). To find the positive among 1 + K keys is a classification.
All are of length 1, so a product is a cosine. A small temperature lets only the nearest count:

    logits = [q.k, q.queue_1, ..., q.queue_K] / temperature                  N x (1 + K)
    p      = softmax(logits)
    loss   = - sum_j target_j log p_j                          the mean over the N queries

InfoNCE (arXiv 1807.03748) puts the whole target on the positive. But some of the K keys show the
query's own kind of thing, and are pushed away. And a view may be a bad crop, which does not deserve
the whole target. [Light] (arXiv 2212.07158) therefore softens it: 1 - s on the positive, and s
shared by the negatives most similar to q: the likeliest to show the same kind of thing.

Since log p_j = logit_j - logsumexp(logits) and the target sums to 1, this is

    loss = logsumexp(logits) - (1 - s) logit_positive - s sum_j w_j near_logit_j

    near_logit_j : that of the j-th nearest key of the queue
    w_j          : its share of s, w_1 + ... + w_n = 1
"""
import torch

WEIGHTINGS = ("uniform", "tiered", "geometric")
# Number of neighbours: the sizes of its three tiers. All keys of a tier get the same share.
TIERS = {5: (1, 2, 2), 10: (1, 3, 6), 20: (2, 6, 12), 30: (3, 9, 18)}
ROUNDING = 1e-6       # cosines that differ by less count as equal


def neighbor_weights(neighbors, weighting="uniform"):
    """The shares w_1, ..., w_n of the n nearest keys: (neighbors,) float64, sums to 1.

    "uniform": all alike. "tiered": half on the first tier of `TIERS`, a quarter on the second, a
    quarter on the third. "geometric": every rank has half of the rank before; the last two are
    equal. These are strategies 1, 2 and 3 of [Light]'s released code; its third has 11 keys and
    s = 0.4. Raises ValueError where no tiers are defined.
    """
    if weighting == "uniform":
        return torch.full((neighbors,), 1 / neighbors, dtype=torch.float64)
    if weighting == "tiered":
        if neighbors not in TIERS:
            raise ValueError(f"neighbors {neighbors}: weighting='tiered' is defined for "
                             f"{', '.join(map(str, TIERS))}")
        sizes = torch.tensor(TIERS[neighbors])
        mass = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
        return (mass / sizes).repeat_interleave(sizes)
    shares = 0.5 ** torch.arange(1, neighbors + 1, dtype=torch.float64)
    shares[-1] = 1 - shares[:-1].sum()
    return shares


def soft_info_nce(q, k, queue, *, temperature, smoothing=0.0, neighbors=0, weighting="uniform"):
    """Soft InfoNCE ([Light]; the formula above) -> (loss, info).

    q (N, D), k (N, D), queue (K, D): rows of length 1; only q receives a gradient. The target is
    1 - smoothing on the positive, and smoothing on the `neighbors` most similar rows of the queue,
    shared by `neighbor_weights`, or evenly on all K for neighbors=0 (label smoothing over the
    negatives).
    smoothing=0 is plain InfoNCE. Computed in float32 or wider, whatever autocast says.

    info, detached: accuracy (scalar, share of queries whose positive is above every negative),
    positive (N,) and nearest (N,), cosines of the positive and of the nearest negative,
    neighbors (N, neighbors), which rows of the queue are nearest, nearest first. Raises ValueError
    for arguments out of range.
    """
    check(q, k, queue, temperature, smoothing, neighbors, weighting)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(wide)
        k = k.detach().to(wide)
        queue = queue.detach().to(wide)
        positive = (q * k).sum(1, keepdim=True)                              # (N, 1)
        negatives = q @ queue.T                                              # (N, K)
        logits = torch.cat([positive, negatives], 1) / temperature           # (N, 1 + K)
        # At least one, for info["nearest"].
        near_logits, rows = logits[:, 1:].topk(max(1, neighbors))            # (N, n), best first
        if neighbors > 0:
            weights = neighbor_weights(neighbors, weighting)                 # (n,)
            weights = weights.to(q, non_blocking=True)       # or the host would wait for the GPU
            near_mean = near_logits @ weights
        else:
            near_mean = logits[:, 1:].mean(1)
        loss = logits.logsumexp(1) - (1 - smoothing) * logits[:, 0] - smoothing * near_mean

    positive = positive.detach()[:, 0]
    nearest = near_logits.detach()[:, 0] * temperature       # the best, as a cosine again
    # Strictly above: a network that has collapsed, to which all images are equal, scores 0.
    right = positive > nearest + ROUNDING
    info = {
        "accuracy": right.to(wide).mean(),
        "positive": positive,
        "nearest": nearest,
        "neighbors": rows[:, :neighbors],
    }
    return loss.mean(), info


def check(q, k, queue, temperature, smoothing, neighbors, weighting):
    """Raise ValueError for an argument out of range: it names argument and value."""
    conditions = (
        (q.shape == k.shape and q.shape[1:] == queue.shape[1:],
         f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}: must be (N, D), "
         f"(N, D) and (K, D)"),
        (temperature > 0, f"temperature {temperature}: must be above 0"),
        (0 <= smoothing <= 1, f"smoothing {smoothing}: must lie in [0, 1]"),
        (0 <= neighbors <= len(queue),
         f"neighbors {neighbors}: must lie in [0, {len(queue)}], the queue's rows"),
        (weighting in WEIGHTINGS,
         f"weighting {weighting!r}: must be one of {', '.join(WEIGHTINGS)}"),
    )
    for holds, otherwise in conditions:
        if not holds:
            raise ValueError(otherwise)
