"""The idea of loss.py as executable mathematics, in the order of a lesson.

    python -m pytest test_loss.py

1. the definition, written out entry by entry; 2. an example worked by hand; 3. a false negative,
with and without a soft target; 4. what the loss becomes at its borders; 5. its gradient.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from loss import TIERS, WEIGHTINGS, neighbor_weights, soft_info_nce

# (smoothing, neighbors, weighting)
SETTINGS = [(0.0, 0, "uniform"), (0.3, 0, "uniform"), (0.0, 20, "uniform"), (0.2, 3, "uniform"),
            (0.2, 20, "uniform"), (0.2, 20, "tiered"), (0.2, 20, "geometric"), (1.0, 40, "uniform")]


def unit_rows(rows, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


# ----------------------------------------------------------------- 1. the definition

def target_of(q, queue, smoothing, neighbors, weighting):
    """The target distribution of one query q (D,): a list of 1 + K shares, the positive first."""
    K = len(queue)
    if neighbors == 0:
        return [1 - smoothing] + [smoothing / K] * K
    target = [1 - smoothing] + [0.0] * K
    nearest_first = sorted(range(K), key=lambda j: -float(q @ queue[j]))
    shares = neighbor_weights(neighbors, weighting).tolist()
    for j, share in zip(nearest_first, shares):
        target[1 + j] = smoothing * share
    return target


def definition(q, k, queue, temperature, smoothing, neighbors, weighting):
    """- sum_j target_j log softmax_j(logits), the mean over the queries, with nothing clever."""
    total = 0
    for i in range(len(q)):
        logits = torch.stack([q[i] @ k[i]] + [q[i] @ key for key in queue]) / temperature
        log_p = logits - logits.exp().sum().log()
        target = target_of(q[i].detach(), queue, smoothing, neighbors, weighting)
        for target_j, log_p_j in zip(target, log_p):
            total = total - target_j * log_p_j
    return total / len(q)


@pytest.mark.parametrize("smoothing, neighbors, weighting", SETTINGS)
def test_value_and_gradient_are_the_definitions(smoothing, neighbors, weighting):
    k, queue = unit_rows(5, 8, seed=1), unit_rows(40, 8, seed=2)
    q = unit_rows(5, 8, seed=3).requires_grad_()
    same_q = unit_rows(5, 8, seed=3).requires_grad_()
    expected = definition(same_q, k, queue, 0.2, smoothing, neighbors, weighting)
    found, _ = soft_info_nce(q, k, queue, temperature=0.2, smoothing=smoothing,
                             neighbors=neighbors, weighting=weighting)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(q.grad, same_q.grad, rtol=1e-11, atol=1e-12)


# ----------------------------------------------------------------- 2. worked by hand

def test_three_keys_by_hand():
    """Query and positive 60 degrees apart, two negatives at 90 and 180 degrees, temperature 1/2."""
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)      # cosine  1/2: logit  1
    queue = torch.tensor([[0.0, 1.0],                                    # cosine  0:   logit  0
                          [-1.0, 0.0]], dtype=torch.float64)             # cosine -1:   logit -2
    log_z = math.log(math.exp(1) + math.exp(0) + math.exp(-2))
    hard, info = soft_info_nce(q, k, queue, temperature=0.5, neighbors=1)
    soft, _ = soft_info_nce(q, k, queue, temperature=0.5, smoothing=0.25, neighbors=1)
    assert hard.item() == pytest.approx(log_z - 1)
    assert soft.item() == pytest.approx(log_z - 0.75 * 1 - 0.25 * 0)
    assert info["accuracy"] == 1 and info["neighbors"].tolist() == [[0]]
    assert info["positive"].item() == pytest.approx(0.5) and info["nearest"].item() == 0


# ----------------------------------------------------------------- 3. a false negative

def pull_of_a_duplicate(smoothing):
    """d loss / d logit of the positive, of its duplicate in the queue, and of an unrelated key.

    The keys are the rows of the identity. So each logit is an entry of q over the temperature, and
    d loss / d logit is the temperature times q's gradient. The unrelated keys have cosine 0.
    """
    temperature = 0.2
    keys = torch.eye(6, dtype=torch.float64)              # positive, duplicate, four unrelated
    q = torch.tensor([[1.0, 1.0, 0, 0, 0, 0]], dtype=torch.float64) / math.sqrt(2)
    q.requires_grad_()
    loss, _ = soft_info_nce(q, keys[:1], keys[1:], temperature=temperature, smoothing=smoothing,
                            neighbors=1)
    loss.backward()
    positive, duplicate, unrelated = (q.grad[0, :3] * temperature).tolist()
    return positive, duplicate, unrelated


@pytest.mark.parametrize("smoothing, positive, duplicate",
                         [(0.0, -0.53, 0.47), (0.25, -0.28, 0.22), (0.5, -0.03, -0.03)])
def test_a_duplicate_is_pushed_away_less_and_at_one_half_not_at_all(smoothing, positive, duplicate):
    """A false negative: the queue holds a key that is as near to the query as its positive.

    InfoNCE pulls the one and pushes the other nearly as hard. The soft target takes the push away,
    and at s = 1/2, all of it on one neighbour, treats the two alike. (A gradient below 0 pulls the
    query towards the key.) Shared by 20 neighbours, s = 0.1 takes 0.005 from each push.
    """
    found = pull_of_a_duplicate(smoothing)
    assert found[0] == pytest.approx(positive, abs=0.005)
    assert found[1] == pytest.approx(duplicate, abs=0.005)


def test_smoothing_moves_its_share_from_the_positive_to_the_duplicate_and_nothing_else():
    plain, soft = pull_of_a_duplicate(0.0), pull_of_a_duplicate(0.25)
    assert soft[0] - plain[0] == pytest.approx(0.25)
    assert soft[1] - plain[1] == pytest.approx(-0.25)
    assert soft[2] == pytest.approx(plain[2])


# ----------------------------------------------------------------- 4. its borders

def test_without_smoothing_it_is_cross_entropy():
    q, k, queue = unit_rows(7, 16, seed=1), unit_rows(7, 16, seed=2), unit_rows(300, 16, seed=3)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.long))
    loss, _ = soft_info_nce(q, k, queue, temperature=0.1, neighbors=20)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_even_smoothing_is_label_smoothing():
    """torch spreads it over all 1 + K choices: the share K / (1 + K) of it falls on the negatives,
    and that is our s."""
    q, k, queue = unit_rows(7, 16, seed=1), unit_rows(7, 16, seed=2), unit_rows(300, 16, seed=3)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.long), label_smoothing=0.2)
    loss, _ = soft_info_nce(q, k, queue, temperature=0.1, smoothing=0.2 * 300 / 301)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing, neighbors", [(0.0, 0), (0.2, 0), (0.2, 10)])
def test_a_collapsed_network_guesses(smoothing, neighbors):
    """All embeddings equal: the loss is log of the number of choices, and no query is right."""
    same = unit_rows(1, 16).expand(1000, -1)
    for rows in (same, same.float()):
        loss, info = soft_info_nce(rows[:4], rows[:4], rows, temperature=0.07, smoothing=smoothing,
                                   neighbors=neighbors)
        assert math.isclose(loss.item(), math.log(1001), rel_tol=1e-5)
        assert info["accuracy"] == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("neighbors", [5, 10, 20, 30])
def test_shares_sum_to_one_and_the_closer_key_never_gets_less(neighbors, weighting):
    shares = neighbor_weights(neighbors, weighting)
    assert len(shares) == neighbors and math.isclose(shares.sum().item(), 1)
    assert (shares > 0).all() and (shares[:-1] >= shares[1:]).all()


def test_shares_of_lights_released_code():
    """Its strategy 2 splits 5, 10, 20, 30 neighbours at these ranks; 3 halves from 0.2 on."""
    splits = {5: (1, 3), 10: (1, 4), 20: (2, 8), 30: (3, 12)}
    for neighbors, (first, second) in splits.items():
        shares = neighbor_weights(neighbors, "tiered")
        assert math.isclose(shares[:first].sum(), 0.5)
        assert math.isclose(shares[first:second].sum(), 0.25)
        assert TIERS[neighbors][:2] == (first, second - first)
    shares = 0.4 * neighbor_weights(11, "geometric")
    assert shares[:3].tolist() == pytest.approx([0.2, 0.1, 0.05]) and shares[9] == shares[10]


# ----------------------------------------------------------------- 5. its gradient

def test_gradient_of_the_logits_is_softmax_minus_target():
    """Again with the identity as keys, where the logits are q / temperature."""
    keys = torch.eye(10, dtype=torch.float64)
    q = unit_rows(1, 10, seed=4).requires_grad_()
    loss, _ = soft_info_nce(q, keys[:1], keys[1:], temperature=0.5, smoothing=0.3, neighbors=3)
    loss.backward()
    softmax = (q.detach()[0] / 0.5).softmax(0)
    target = target_of(q.detach()[0], keys[1:], 0.3, 3, "uniform")
    expected = softmax - torch.tensor(target, dtype=torch.float64)
    torch.testing.assert_close(q.grad[0] * 0.5, expected, rtol=1e-12, atol=1e-14)


def test_both_directions_are_one_call():
    """The mean of two losses is the loss of queries and keys put together."""
    a, b, queue = unit_rows(6, 8, seed=1), unit_rows(6, 8, seed=2), unit_rows(30, 8, seed=3)
    options = dict(temperature=0.1, smoothing=0.2, neighbors=5)
    first, _ = soft_info_nce(a, b, queue, **options)
    second, _ = soft_info_nce(b, a, queue, **options)
    together, _ = soft_info_nce(torch.cat([a, b]), torch.cat([b, a]), queue, **options)
    torch.testing.assert_close(together, (first + second) / 2)


def test_only_the_query_receives_a_gradient_and_info_is_what_it_says():
    q, k, queue = unit_rows(6, 4, seed=1), unit_rows(6, 4, seed=2), unit_rows(30, 4, seed=3)
    for rows in (q, k, queue):
        rows.requires_grad_()
    loss, info = soft_info_nce(q, k, queue, temperature=0.1, smoothing=0.2, neighbors=5)
    loss.backward()
    assert q.grad is not None and k.grad is None and queue.grad is None
    cosines = (q @ queue.T).detach()
    assert torch.equal(info["neighbors"], cosines.argsort(dim=1, descending=True)[:, :5])
    torch.testing.assert_close(info["nearest"], cosines.amax(1))
    torch.testing.assert_close(info["positive"], (q * k).sum(1).detach())
    assert info["accuracy"] == (info["positive"] > info["nearest"]).double().mean()
    assert not any(value.requires_grad for value in info.values())
