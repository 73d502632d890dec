"""The losses against float64 numpy of the published formulas, and their gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.passes.distill.losses import attention_loss, hint_loss, response_loss, similarity_loss

TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0, 20.0])
SIZES = st.tuples(st.integers(1, 5), st.integers(2, 6))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q), the mean of the rows."""
    return float((p * (np.log(p) - np.log(q))).sum(1).mean())


@given(SIZES, TEMPERATURES, st.floats(0, 1), st.integers(0, 99))
def test_response_is_the_formula_of_hinton(sizes, temperature, alpha, seed):
    z, target = normal(*sizes, seed=seed), normal(*sizes, seed=seed + 1)
    labels = torch.arange(sizes[0]) % sizes[1]
    p, q = softmax(target.numpy() / temperature), softmax(z.numpy() / temperature)
    hard = -np.log(softmax(z.numpy())[np.arange(sizes[0]), labels.numpy()]).mean()
    want = (1 - alpha) * hard + alpha * temperature**2 * divergence(p, q)
    found = response_loss(z, target, labels, temperature=temperature, alpha=alpha)
    assert float(found) == pytest.approx(want, rel=1e-10, abs=1e-12)


@given(SIZES, TEMPERATURES, st.integers(0, 99))
def test_response_without_labels_is_the_soft_term_alone(sizes, temperature, seed):
    z, target = normal(*sizes, seed=seed), normal(*sizes, seed=seed + 1)
    p, q = softmax(target.numpy() / temperature), softmax(z.numpy() / temperature)
    found = response_loss(z, target, temperature=temperature, alpha=0.3)
    assert float(found) == pytest.approx(temperature**2 * divergence(p, q), rel=1e-10, abs=1e-12)


@given(SIZES, TEMPERATURES, st.integers(0, 99))
def test_standardized_response_is_the_algorithm_of_sun(sizes, temperature, seed):
    z, target = normal(*sizes, seed=seed), 3 * normal(*sizes, seed=seed + 1) + 5
    rows = [logits.numpy() for logits in (target, z)]
    p, q = (softmax((r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-7) / temperature) for r in rows)
    found = response_loss(z, target, temperature=temperature, standardize=True)
    assert float(found) == pytest.approx(temperature**2 * divergence(p, q), rel=1e-9, abs=1e-12)


def test_soft_labels_equal_class_indices_that_they_spell_out():
    z, target, labels = normal(6, 4, seed=0), normal(6, 4, seed=1), torch.arange(6) % 4
    soft = torch.nn.functional.one_hot(labels, 4).double()
    torch.testing.assert_close(response_loss(z, target, labels), response_loss(z, target, soft))


@pytest.mark.parametrize("axis", [1, 2])
def test_ignored_positions_count_in_neither_term(axis):
    z, target = normal(2, 5, 3, seed=0), normal(2, 5, 3, seed=1)
    labels = torch.tensor([[0, -100, 2, 1, 0], [1, 1, -100, -100, 2]])
    kept = labels != -100
    want = response_loss(z[kept], target[kept], labels[kept])
    z, target = (logits if axis == 2 else logits.movedim(2, 1) for logits in (z, target))
    torch.testing.assert_close(response_loss(z, target, labels, class_axis=axis), want)


def test_class_that_the_teacher_excludes_adds_nothing():
    z, target = normal(3, 4, seed=0).requires_grad_(), normal(3, 4, seed=1)
    target[:, 2] = -torch.inf
    loss = response_loss(z, target)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_attention_is_the_formula_of_zagoruyko():
    s, t = normal(3, 4, 5, 6, seed=0), normal(3, 7, 5, 6, seed=1)
    maps = [(value.numpy() ** 2).sum(1).reshape(3, -1) for value in (s, t)]
    ours, theirs = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in maps)
    assert float(attention_loss(s, t)) == pytest.approx(((ours - theirs) ** 2).mean(), rel=1e-12)


def test_similarity_is_the_formula_of_tung():
    s, t = normal(4, 3, 5, seed=0), normal(4, 9, seed=1)
    grams = [rows @ rows.T for rows in (value.numpy().reshape(4, -1) for value in (s, t))]
    ours, theirs = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in grams)
    want = np.linalg.norm(theirs - ours) ** 2 / 4**2
    assert float(similarity_loss(s, t)) == pytest.approx(want, rel=1e-12)


def test_hint_is_the_mean_squared_difference():
    s, t = normal(2, 3, 4, seed=0), normal(2, 3, 4, seed=1)
    assert float(hint_loss(s, t)) == pytest.approx(((s - t).numpy() ** 2).mean(), rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t: response_loss(z, t, torch.tensor([0, 2]), alpha=0.4),
        lambda z, t: response_loss(z, t, standardize=True),
        lambda z, t: response_loss(z, t, torch.tensor([0, -100])),
        hint_loss,
        lambda z, t: attention_loss(z.view(2, 2, 2), t.view(2, 2, 2)),
        similarity_loss,
    ],
    ids=["response", "standardized", "ignored", "hint", "attention", "similarity"],
)
def test_gradients_are_those_of_finite_differences(loss):
    z, t = normal(2, 4, seed=0).requires_grad_(), normal(2, 4, seed=1)
    assert torch.autograd.gradcheck(lambda value: loss(value, t), (z,))


def test_half_precision_is_compared_in_float32():
    z, t = (normal(4, 5, seed=seed).bfloat16() for seed in (0, 1))
    for loss in (response_loss, hint_loss, similarity_loss):
        assert loss(z, t).dtype == torch.float32
        torch.testing.assert_close(loss(z, t), loss(z.float(), t.float()), rtol=0, atol=0)
