"""The README's worked example, against a pocket calculator."""

import math

import pytest


def test_the_worked_example(capsys):
    """Numbers of a pocket calculator: nll = -ln p of the P that paper/example.py fixes."""
    from paper.example import ARMS, best_p, conversations, loss, main

    nll = [-math.log(p) for p in (0.5, 0.8, 0.25, 0.8)]  # 0.6931, 0.2231, 1.3863, 0.2231
    crlft, plain = (nll[0] + nll[1] + 0.1 * (nll[2] + nll[3])) / 2.2, sum(nll) / 4
    for arm, expected, best in zip(ARMS, (crlft, plain, crlft, plain), (1, 1, 1 / 1.1, 0.5)):
        got, weights, value = loss(arm)
        assert got.tolist() == pytest.approx(nll, rel=1e-5) and value.item() == pytest.approx(
            expected, rel=1e-5
        )
        assert best_p(arm) == pytest.approx(best)
    assert crlft == pytest.approx(0.4897, abs=5e-5) and plain == pytest.approx(0.6314, abs=5e-5)
    (a, wa), (b, wb) = conversations("C-RLFT")
    assert (
        a.tolist() == [1, 42, 95, 43, 84, 15, 7, 96, 42, 95, 37, 84, 7, 96]
        and wa.tolist() == [0.0] * 12 + [1.0] * 2
    )
    assert b.tolist() == [1, 42, 94, 43, 84, 15, 7, 96, 42, 94, 37, 84, 8, 96] and sum(
        wb
    ) == pytest.approx(0.2)
    (a, _), (b, _) = conversations("without condition")
    assert a[:-2].tolist() == b[:-2].tolist()  # one context for both answers
    # The minimum is where the gradient over p of -w4 log p - w3 log(1 - p) vanishes.
    assert 1 / (1 / 1.1) - 0.1 / (1 - 1 / 1.1) == pytest.approx(0, abs=1e-9)
    main([])
    assert "= 0.4897; best p(right) = 1.000" in capsys.readouterr().out
