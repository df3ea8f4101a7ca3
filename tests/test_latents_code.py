"""Promise: bits, co-firing, splitting and absorption are what counting by hand gives, and their nulls are null."""

from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csr_array

from tcsae.evaluate.dictionary.cofiring import cofiring, shifted
from tcsae.evaluate.latents.code_length import gaussian_bits, pattern_bits, pattern_bits_given_last, value_bits


def entropy(values) -> float:
    counts = np.array(list(Counter(values).values())) / len(values)
    return float(-(counts * np.log2(counts)).sum())


def test_bits_are_entropies():
    rng = np.random.default_rng(0)
    dense = rng.integers(0, 4, (500, 6)) * (rng.random((500, 6)) < [0.5, 0.1, 0.02, 0.9, 1, 0])
    sparse = csr_array(dense)
    assert value_bits(sparse.indices, sparse.data, 500) == pytest.approx(sum(entropy(one) for one in dense.T.tolist()))
    on = csr_array(dense != 0)
    assert pattern_bits(on) == pytest.approx(sum(entropy(one) for one in (dense != 0).T.tolist()))


def test_bits_given_the_last_token_are_conditional_entropies():
    rng = np.random.default_rng(1)
    on = np.repeat(rng.random((100, 3)) < 0.3, 5, axis=0)  # slow
    sequence = np.arange(500) // 50
    expected = 0.0
    pairs = [t for t in range(1, 500) if sequence[t] == sequence[t - 1]]
    for column in on.T:
        both, last = [(column[t - 1], column[t]) for t in pairs], [column[t - 1] for t in pairs]
        expected += entropy(both) - entropy(last)
    result = pattern_bits_given_last(csr_array(on), sequence)
    assert result == pytest.approx(expected) and result < 0.7 * pattern_bits(csr_array(on))
    shuffled = csr_array(on[rng.permutation(500)])
    assert pattern_bits_given_last(shuffled, sequence) == pytest.approx(pattern_bits(shuffled), rel=0.02)


def test_bits_of_a_gaussian_are_its_rate():
    x = np.random.default_rng(2).normal(size=(20_000, 3)) * [4, 1, 0.1]
    assert gaussian_bits(x, 0.03) == pytest.approx(np.log2(4 / 0.1) + np.log2(1 / 0.1), abs=0.05)
    assert gaussian_bits(x, 20.0) == 0


def planted_code(n: int = 4000) -> np.ndarray:
    """0 and 1: twins. 2: only where 3 is. 4, 5: independent. 6: dense."""
    rng = np.random.default_rng(3)
    on = rng.random((n, 7)) < [0.05, 0, 0.3, 0.08, 0.05, 0.05, 0.6]
    on[:, 1] = on[:, 0] ^ (rng.random(n) < 0.005)
    on[:, 2] &= on[:, 3]
    return on


def test_cofiring_of_planted_pairs():
    on = planted_code()
    result = cofiring(csr_array(on))
    assert result["dense"] == 1
    assert result["twins"] == pytest.approx(2 / 7)
    lifts, follows = [], []
    for i in range(7):
        joint = [(on[:, i] & on[:, j]).sum() for j in range(7)]
        of_i = [joint[j] * len(on) / (on[:, i].sum() * on[:, j].sum()) for j in range(7) if j != i and joint[j] >= 10]
        lifts.append(max(of_i))
        follows.append(max(joint[j] / on[:, i].sum() for j in range(6) if j != i) > 0.9)  # 6 is dense
    assert result["followers"] == pytest.approx(np.mean(follows)) and follows[2] and not follows[3]
    assert result["cofiring_lift"] == pytest.approx(np.median(lifts))


def test_the_null_of_cofiring_is_null():
    on = csr_array(planted_code())
    null = shifted(on)
    assert (np.bincount(null.indices, minlength=7) == np.bincount(on.indices, minlength=7)).all()
    result = cofiring(null)
    assert result["twins"] == result["followers"] == 0 and result["cofiring_lift"] < 1.7
    assert result["dense"] == 1
    assert cofiring(csr_array((10, 3)))["cofiring_lift"] is None
