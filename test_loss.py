"""The idea as executable mathematics: what soft InfoNCE is, checked against the plainest code that says the same."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from loss import WEIGHTINGS, SoftInfoNCE, neighbor_weights, soft_info_nce

SETTINGS = [(0.0, 0, "uniform"), (0.3, 0, "uniform")] + [(s, n, w) for s, n, w in
                                                         itertools.product((0.0, 0.2, 1.0), (3, 20, 40), WEIGHTINGS)]


def unit_rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def target_of(q, queue, smoothing, neighbors, weighting):
    """The target distribution, written out entry by entry, for one query q (D,) -> list of 1 + K shares."""
    K = len(queue)
    target = [1.0 - smoothing] + [0.0] * K
    if neighbors == 0:
        return [target[0]] + [smoothing / K] * K
    if weighting == "uniform":
        shares = [1 / neighbors] * neighbors
    elif weighting == "tiered":
        a, b = max(1, round(0.1 * neighbors)), max(max(1, round(0.1 * neighbors)) + 1, round(0.4 * neighbors))
        shares = [0.5 / a] * a + [0.25 / (b - a)] * (b - a) + [0.25 / (neighbors - b)] * (neighbors - b)
    else:
        shares = [0.5 ** min(rank, neighbors - 1) for rank in range(1, neighbors + 1)]
    nearest_first = sorted(range(K), key=lambda j: -float(q @ queue[j]))
    for rank, share in enumerate(shares):
        target[1 + nearest_first[rank]] = smoothing * share
    return target


def oracle(q, k, queue, temperature, smoothing, neighbors, weighting):
    """- sum_j target_j log softmax_j(logits), averaged over the queries, with nothing clever."""
    total = 0
    for i in range(len(q)):
        logits = torch.stack([q[i] @ k[i]] + [q[i] @ key for key in queue]) / temperature
        log_p = logits - logits.exp().sum().log()
        target = target_of(q[i].detach(), queue, smoothing, neighbors, weighting)
        total = total - sum(t * lp for t, lp in zip(target, log_p))
    return total / len(q)


@pytest.mark.parametrize("smoothing, neighbors, weighting", SETTINGS)
def test_value_and_gradient_are_the_oracles(smoothing, neighbors, weighting):
    k, queue = unit_rows(5, 8, seed=1), unit_rows(40, 8, seed=2)
    results = []
    for function in (oracle, soft_info_nce):
        x = unit_rows(5, 8, seed=3).requires_grad_()
        arguments = dict(temperature=0.2, smoothing=smoothing, neighbors=neighbors, weighting=weighting)
        value = function(x, k, queue, **arguments)
        value = value[0] if isinstance(value, tuple) else value
        (3 * value).backward()          # an upstream factor must come through
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("smoothing, neighbors, weighting", SETTINGS)
def test_fast_form_is_the_definition(smoothing, neighbors, weighting):
    q, k, queue = unit_rows(6, 8, seed=1), unit_rows(6, 8, seed=2), unit_rows(50, 8, seed=3)
    weights = smoothing * neighbor_weights(neighbors, weighting) if neighbors else None
    a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
    slow = SoftInfoNCE.definition(a, k, queue, 0.1, smoothing, weights)
    fast, _ = soft_info_nce(b, k, queue, temperature=0.1, smoothing=smoothing, neighbors=neighbors, weighting=weighting)
    slow.backward(), fast.backward()
    torch.testing.assert_close((fast, b.grad), (slow, a.grad), rtol=1e-11, atol=1e-12)


def test_many_blocks_of_keys_are_the_definition():
    """17,000 keys are three blocks, the last one short; the neighbours lie in all of them."""
    q, k, queue = unit_rows(6, 8, seed=1), unit_rows(6, 8, seed=2), unit_rows(17000, 8, seed=3)
    a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
    slow = SoftInfoNCE.definition(a, k, queue, 0.1, 0.2, 0.2 * neighbor_weights(20, "tiered"))
    fast, info = soft_info_nce(b, k, queue, temperature=0.1, smoothing=0.2, neighbors=20, weighting="tiered")
    slow.backward(), fast.backward()
    torch.testing.assert_close((fast, b.grad), (slow, a.grad), rtol=1e-11, atol=1e-12)
    assert torch.equal(info["neighbors"], (q @ queue.T).topk(20).indices)


@pytest.mark.parametrize("smoothing, neighbors, weighting", SETTINGS)
def test_target_sums_to_one(smoothing, neighbors, weighting):
    assert math.isclose(sum(target_of(unit_rows(1, 8)[0], unit_rows(40, 8, seed=2), smoothing, neighbors, weighting)), 1)
    if neighbors:
        assert math.isclose(neighbor_weights(neighbors, weighting).sum().item(), 1)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("neighbors", [1, 2, 3, 4, 5, 10, 20, 33, 100])
def test_the_closer_neighbour_never_gets_less(neighbors, weighting):
    if weighting == "tiered" and neighbors < 3:
        pytest.skip("tiered needs three tiers")
    shares = neighbor_weights(neighbors, weighting)
    assert len(shares) == neighbors and (shares > 0).all() and (shares[:-1] >= shares[1:]).all()


def test_tiers_and_halves_as_stated():
    assert neighbor_weights(20, "tiered").tolist() == [0.25] * 2 + [0.25 / 6] * 6 + [0.25 / 12] * 12
    assert neighbor_weights(4, "geometric").tolist() == [0.5, 0.25, 0.125, 0.125]


def test_equal_embeddings_give_log_of_the_number_of_choices_and_accuracy_zero():
    same = unit_rows(1, 16).expand(1000, -1)
    for smoothing, neighbors in ((0.0, 0), (0.2, 0), (0.2, 10)):
        loss, info = soft_info_nce(same[:4], same[:4], same, temperature=0.07, smoothing=smoothing, neighbors=neighbors)
        assert math.isclose(loss.item(), math.log(1001), rel_tol=1e-12)
        assert info["accuracy"] == 0


def test_without_smoothing_it_is_cross_entropy():
    q, k, queue = unit_rows(7, 16, seed=1), unit_rows(7, 16, seed=2), unit_rows(300, 16, seed=3)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.long))
    for neighbors in (0, 20):
        loss, _ = soft_info_nce(q, k, queue, temperature=0.1, neighbors=neighbors)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_even_smoothing_is_label_smoothing():
    """F.cross_entropy smooths over all 1 + K classes, we over the K negatives: s there is s * K / (1 + K) here."""
    q, k, queue = unit_rows(7, 16, seed=1), unit_rows(7, 16, seed=2), unit_rows(300, 16, seed=3)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.long), label_smoothing=0.2)
    loss, _ = soft_info_nce(q, k, queue, temperature=0.1, smoothing=0.2 * 300 / 301)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_gradient_with_respect_to_the_logits_is_softmax_minus_target():
    """With the identity as keys the logits are q / temperature themselves: read the gradient off q."""
    K, s, temperature = 9, 0.3, 0.5
    basis = torch.eye(K + 1, dtype=torch.float64)
    q = unit_rows(1, K + 1, seed=4).requires_grad_()
    loss, _ = soft_info_nce(q, basis[:1], basis[1:], temperature=temperature, smoothing=s, neighbors=3)
    loss.backward()
    target = torch.tensor(target_of(q[0].detach(), basis[1:], s, 3, "uniform"), dtype=torch.float64)
    softmax = (q.detach()[0] / temperature).softmax(0)
    torch.testing.assert_close(q.grad[0] * temperature, softmax - target, rtol=1e-12, atol=1e-14)


def test_no_gradient_reaches_keys_or_queue():
    q, k, queue = (unit_rows(n, 8, seed=n).requires_grad_() for n in (4, 4, 30))
    k = k[:4]
    soft_info_nce(q, k, queue, temperature=0.1, smoothing=0.2, neighbors=5)[0].backward()
    assert q.grad is not None and queue.grad is None


def test_info_is_what_it_says_and_detached():
    q, k, queue = unit_rows(6, 4, seed=1), unit_rows(6, 4, seed=2), unit_rows(30, 4, seed=3)
    _, info = soft_info_nce(q.requires_grad_(), k, queue, temperature=0.1, smoothing=0.2, neighbors=5)
    cosines = q.detach() @ queue.T
    order = cosines.argsort(dim=1, descending=True)
    assert torch.equal(info["neighbors"], order[:, :5])
    torch.testing.assert_close(info["nearest"], cosines.max(1).values)
    torch.testing.assert_close(info["positive"], (q.detach() * k).sum(1))
    assert info["accuracy"] == ((q.detach() * k).sum(1) > cosines.max(1).values).double().mean()
    assert not any(v.requires_grad for v in info.values())


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_autocast_and_reduced_precision_change_nothing(precision):
    q, k, queue = (unit_rows(n, 64, seed=n).float() for n in (8, 8, 200))
    k = k.clone()
    plain, _ = soft_info_nce(q, k, queue, temperature=0.1, smoothing=0.2, neighbors=5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)      # "medium": bf16 products, also on CPUs that have them
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mixed, _ = soft_info_nce(q, k, queue, temperature=0.1, smoothing=0.2, neighbors=5)
        assert torch.get_float32_matmul_precision() == precision      # put back
    finally:
        torch.set_float32_matmul_precision(before)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


def test_half_precision_in_float32_inside_and_float64_stays():
    q, k, queue = (unit_rows(n, 64, seed=n) for n in (8, 8, 200))
    low, _ = soft_info_nce(*(x.bfloat16() for x in (q, k, queue)), temperature=0.1)
    wide, _ = soft_info_nce(*(x.bfloat16().double() for x in (q, k, queue)), temperature=0.1)
    assert low.dtype == torch.float32 and wide.dtype == torch.float64
    torch.testing.assert_close(low.double(), wide, rtol=1e-5, atol=0)


def test_large_logits_do_not_overflow():
    q = unit_rows(4, 8).float()
    loss, _ = soft_info_nce(q, -q, torch.cat([q, q]), temperature=1e-3, smoothing=0.1, neighbors=3)
    assert loss.isfinite()


@pytest.mark.parametrize("change, name", [
    (dict(temperature=0.0), "temperature"), (dict(temperature=-1.0), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(smoothing=-0.1), "smoothing"), (dict(smoothing=1.1), "smoothing"), (dict(smoothing=float("nan")), "smoothing"),
    (dict(neighbors=-1), "neighbors"), (dict(neighbors=31), "neighbors"), (dict(neighbors=2.5), "neighbors"),
    (dict(neighbors=2, weighting="tiered"), "neighbors"), (dict(neighbors=5, weighting="other"), "weighting"),
    (dict(weighting="other"), "weighting"),
    (dict(q=torch.ones(4)), "q"), (dict(q=torch.ones(0, 8)), "q"), (dict(k=torch.ones(3, 8)), "k"),
    (dict(queue=torch.ones(30, 7)), "queue"), (dict(queue=torch.ones(30, 8, dtype=torch.long)), "queue"),
])
def test_bad_arguments_are_named(change, name):
    arguments = dict(q=unit_rows(4, 8), k=unit_rows(4, 8), queue=unit_rows(30, 8), temperature=0.1) | change
    with pytest.raises(ValueError, match=name):
        soft_info_nce(**arguments)
