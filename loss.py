"""Soft InfoNCE: tell an image's other view from a queue of other images, without trusting that they all differ.

A query q (one view) has a positive key k (the other view) and K negative keys (other images, kept in a queue):

    logits = [q.k, q.queue_1, ..., q.queue_K] / temperature                                   N x (1 + K)
    p      = softmax(logits)
    loss   = - sum_j target_j log p_j          the mean over the N queries

InfoNCE (arXiv 1807.03748) puts the whole target on the positive. But a view may be a bad positive, and among K keys some
show the query's own class. [Light] (arXiv 2212.07158) therefore smooths the target: 1 - s on the positive, and s on the
negatives most similar to the query. That needs no N x (1 + K) target, since the target is zero almost everywhere:

    loss = logsumexp(logits) - (1 - s) logit_pos - sum_j w_j logit_(j)      (j): the j-th nearest key in the queue
"""
import torch

WEIGHTINGS = ("uniform", "tiered", "geometric")


def neighbor_weights(neighbors, weighting="uniform"):
    """Shares of the smoothing mass by rank, nearest first: (neighbors,) float64, sums to 1, never increasing.

    "uniform"; "tiered": half on the first 10 %, a quarter on the next 30 %, a quarter on the rest (at least 3 neighbors);
    "geometric": halving with the rank, the last two equal. The three are ours in their details; the idea is [Light]'s.
    """
    if weighting == "uniform":
        return torch.full((neighbors,), 1 / neighbors, dtype=torch.float64)
    elif weighting == "tiered":
        if neighbors < 3:
            raise ValueError(f"neighbors must be at least 3 for weighting='tiered', not {neighbors}")
        first = max(1, round(0.1 * neighbors))
        second = max(first + 1, round(0.4 * neighbors))
        sizes = torch.tensor([first, second - first, neighbors - second])
        return (torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) / sizes).repeat_interleave(sizes)
    else:     # "geometric"
        shares = 0.5 ** torch.arange(1, neighbors + 1, dtype=torch.float64)
        shares[-1] = shares[-2] if neighbors > 1 else 1.0     # 1/2, 1/4, ..., 1/2^(n-1), 1/2^(n-1)
        return shares


def soft_info_nce(q, k, queue, *, temperature, smoothing=0.0, neighbors=0, weighting="uniform"):
    """Smoothed InfoNCE ([Light], section 3; ours in the details named above) -> (loss, info).

    q (N, D), k (N, D), queue (K, D): rows of unit length. The target is 1 - smoothing on the positive, and smoothing on
    the `neighbors` most similar rows of the queue, shared by `neighbor_weights`, or evenly on all K for neighbors=0
    (ordinary label smoothing); smoothing=0 is plain InfoNCE. Only q receives a gradient. Computed in float32 or wider
    and without TF32, whatever autocast says. info, detached: accuracy (scalar: share of queries whose positive is
    strictly above every negative), positive (N,) and nearest (N,), cosines of the positive and of the nearest negative,
    neighbors (N, neighbors) rows of the queue, nearest first. Raises ValueError for arguments out of range.
    """
    check(q, k, queue, temperature, smoothing, neighbors, weighting)
    weights = smoothing * neighbor_weights(neighbors, weighting) if neighbors else None
    wide = torch.promote_types(q.dtype, torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(q.device.type, enabled=False):
            return SoftInfoNCE.run(q.to(wide), k.detach().to(wide), queue.detach().to(wide),
                                   float(temperature), float(smoothing), weights)
    finally:
        torch.set_float32_matmul_precision(precision)


class SoftInfoNCE(torch.autograd.Function):
    """Value and gradient in one pass over the queue, a block of keys at a time: nothing of size N x K ever exists.

    The gradient of a cross-entropy with respect to its logits is softmax minus target, and each logit is q.key over the
    temperature. So the gradient for q needs only sum_j softmax_j key_j, which gathers block by block beside the
    partition function, and the target's own weighted keys. `definition` says the same in terms that autograd can follow.
    """

    @staticmethod
    def definition(q, k, queue, temperature, smoothing, weights):
        """The loss as the formula above; weights (n,) is already multiplied by smoothing. Kept to be read and tested."""
        positive = (q * k).sum(1)                                                # (N,)
        negative = q @ queue.T                                                   # (N, K)
        logits = torch.cat([positive[:, None], negative], 1) / temperature       # (N, 1 + K)
        nearest = logits[:, 1:] if weights is None else logits[:, 1:].topk(len(weights)).values
        soft = smoothing * nearest.mean(1) if weights is None else nearest @ weights.to(q)
        return (logits.logsumexp(1) - (1 - smoothing) * logits[:, 0] - soft).mean()

    @classmethod
    def run(cls, q, k, queue, temperature, smoothing, weights):
        loss, accuracy, positive, nearest, rows = cls.apply(q, k, queue, temperature, smoothing, weights)
        return loss, {"accuracy": accuracy, "positive": positive, "nearest": nearest, "neighbors": rows}

    @staticmethod
    def forward(ctx, q, k, queue, temperature, smoothing, weights, block=8192):
        count = 1 if weights is None else len(weights)
        positive = (q * k).sum(1) / temperature                                  # (N,)
        # The softmax as sums over blocks of keys, all scaled by exp(-peak) for the greatest logit so far, so that exp <= 1.
        peak, partition, pull = positive, torch.ones_like(positive), k           # (N,), (N,), (N, D): the positive alone
        scaled, tops, rows = q / temperature, [], []
        for start in range(0, len(queue), block):
            keys = queue[start:start + block]                                    # (B, D)
            p = scaled @ keys.T                                                  # (N, B) logits
            top, found = largest(p, min(count, len(keys)))
            tops.append(top), rows.append(found + start)
            before, peak = peak, torch.maximum(peak, top[:, 0])
            p.sub_(peak[:, None]).exp_()
            shrink = (before - peak).exp()
            partition = partition * shrink + p.sum(1)
            pull = torch.addmm(pull * shrink[:, None], p, keys)                  # sum over the keys of exp(logit - peak) key
        top, order = torch.cat(tops, 1).topk(count)                              # (N, count), nearest first
        rows = torch.cat(rows, 1).gather(1, order)
        if weights is None:     # evenly on all K: their mean stands for them
            target, rows = smoothing * queue.mean(0), rows[:, :0]                # (D,)
            soft = q @ target / temperature                                      # (N,)
        else:
            weights = weights.to(q, non_blocking=True)
            target = torch.einsum("j,njd->nd", weights, queue[rows])             # (N, D)
            soft = top @ weights
        loss = (partition.log() + peak - (1 - smoothing) * positive - soft).mean()
        if ctx.needs_input_grad[0]:     # sum over the keys of (softmax - target) key / temperature
            gradient = pull / partition[:, None] - (1 - smoothing) * k - target  # (N, D)
            ctx.save_for_backward(gradient / (len(q) * temperature))
        # Strictly nearer, by more than the rounding of a cosine: where all embeddings are equal, no query is right.
        right = (positive - top[:, 0]) * temperature > 8 * torch.finfo(q.dtype).eps
        info = right.to(q.dtype).mean(), positive * temperature, top[:, 0] * temperature, rows
        ctx.mark_non_differentiable(*info)
        return loss, *info

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        return upstream * ctx.saved_tensors[0], None, None, None, None, None


def largest(x, count, block=64):
    """`x.topk(count)` of x (N, K), twice as fast on a CPU: the `count` largest of a row lie in the `count` blocks of
    columns that have the largest maxima, so only those are searched."""
    n, size = x.shape
    if size % block or count * block >= size:
        return x.topk(count)
    blocks = x.view(n, -1, block)
    chosen = blocks.amax(2).topk(count).indices                                  # (N, count)
    columns = (chosen[:, :, None] * block + torch.arange(block, device=x.device)).flatten(1)
    top = x.gather(1, columns).topk(count)
    return top.values, columns.gather(1, top.indices)


def check(q, k, queue, temperature, smoothing, neighbors, weighting):
    """Raise ValueError naming the argument, the value seen and the range."""
    for name, rows in (("q", q), ("k", k), ("queue", queue)):
        if rows.dim() != 2 or not len(rows) or not rows.is_floating_point():
            raise ValueError(f"{name} must be a non-empty float matrix, not {tuple(rows.shape)} {rows.dtype}")
    if q.shape != k.shape or q.shape[1] != queue.shape[1]:
        raise ValueError(f"k must be shaped as q {tuple(q.shape)} and queue (K, {q.shape[1]}), "
                         f"not {tuple(k.shape)} and {tuple(queue.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], not {smoothing}")
    if neighbors != int(neighbors) or not 0 <= neighbors <= len(queue):
        raise ValueError(f"neighbors must be a whole number from 0 to the queue's {len(queue)} rows, not {neighbors}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
