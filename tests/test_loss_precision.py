"""The loss in the machine's numbers: precision, autocast, large logits, bad arguments."""
import pytest
import torch
import torch.nn.functional as F

from loss import soft_info_nce

SOFT = dict(temperature=0.1, smoothing=0.2, neighbors=5)


def unit_rows(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def embeddings(dtype):
    """q (8, 64), k (8, 64), queue (200, 64)."""
    q, k, queue = unit_rows(8, 64, seed=1), unit_rows(8, 64, seed=2), unit_rows(200, 64, seed=3)
    return q.to(dtype), k.to(dtype), queue.to(dtype)


def test_autocast_changes_nothing():
    plain, _ = soft_info_nce(*embeddings(torch.float32), **SOFT)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = soft_info_nce(*embeddings(torch.float32), **SOFT)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half):
    rounded = [x.to(half) for x in embeddings(torch.float64)]
    found, info = soft_info_nce(*rounded, **SOFT)
    exact, _ = soft_info_nce(*[x.double() for x in rounded], **SOFT)
    assert found.dtype == info["positive"].dtype == torch.float32
    assert exact.dtype == torch.float64                       # and what is wider stays wider
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_half_precision_receives_its_gradient_in_its_own_type():
    q, k, queue = embeddings(torch.bfloat16)
    q.requires_grad_()
    loss, _ = soft_info_nce(q, k, queue, **SOFT)
    loss.backward()
    assert q.grad.dtype == torch.bfloat16 and q.grad.isfinite().all()


def test_large_logits_stay_finite():
    q = unit_rows(4, 8, seed=1).float().requires_grad_()
    same = q.detach()
    queue = torch.cat([same, -same])                          # logits of -1000 and of 1000
    loss, _ = soft_info_nce(q, -same, queue, temperature=1e-3, smoothing=0.1, neighbors=3)
    loss.backward()
    assert loss.isfinite() and q.grad.isfinite().all()


@pytest.mark.parametrize("change, words", [
    (dict(temperature=0.0), "temperature 0.0"),
    (dict(temperature=-1.0), "temperature -1.0"),
    (dict(temperature=float("nan")), "temperature nan"),
    (dict(smoothing=-0.1), "smoothing -0.1"),
    (dict(smoothing=1.1), "smoothing 1.1"),
    (dict(smoothing=float("nan")), "smoothing nan"),
    (dict(neighbors=-1), "neighbors -1"),
    (dict(neighbors=31), "neighbors 31.*30"),
    (dict(neighbors=2, weighting="tiered"), "neighbors 2.*tiered"),
    (dict(weighting="other"), "weighting 'other'"),
    (dict(q=torch.ones(4)), "q .4,."),
    (dict(k=torch.ones(3, 8)), "k .3, 8."),
    (dict(queue=torch.ones(30, 7)), "queue .30, 7."),
])
def test_bad_arguments_are_named(change, words):
    q, k, queue = unit_rows(4, 8, seed=1), unit_rows(4, 8, seed=2), unit_rows(30, 8, seed=3)
    arguments = dict(q=q, k=k, queue=queue, temperature=0.1) | change
    with pytest.raises(ValueError, match=words):
        soft_info_nce(**arguments)
