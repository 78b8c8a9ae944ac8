"""Running statistics against numpy on all the data, the controller of β against hand arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.ppo.running import RunningMoments, RunningState, next_kl_coefficient, whiten_scores

batches = st.lists(
    st.lists(st.floats(-100.0, 100.0, width=32), min_size=1, max_size=12), min_size=1, max_size=8
)


@given(batches)
def test_merged_moments_are_those_of_all_values_together(parts: list[list[float]]) -> None:
    moments = RunningMoments()
    for part in parts:
        moments = moments.merged(torch.tensor(part))
    values = np.concatenate([np.asarray(part) for part in parts])
    assert moments.count == len(values)
    assert moments.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9)
    assert moments.variance == pytest.approx(values.var(), rel=1e-9, abs=1e-9)


def test_moments_by_hand() -> None:
    first = RunningMoments().merged(torch.tensor([1.0, 3.0]))
    assert (first.count, first.mean, first.squares) == (2, 2.0, 2.0)  # (1-2)² + (3-2)²
    both = first.merged(torch.tensor([8.0]))
    # Mean 12/3 = 4; 9 + 1 + 16 = 26.
    assert (both.count, both.mean, both.squares) == (3, 4.0, 26.0)
    assert RunningMoments().variance == 0.0


def test_a_large_common_offset_costs_no_digits() -> None:
    """Sums of squares would: 1e6 squared leaves nothing of a variance of 2/3 in float32, little in float64."""
    moments = RunningMoments()
    for value in (1e6, 1e6 + 1, 1e6 + 2):
        moments = moments.merged(torch.tensor([value]))
    assert moments.variance == pytest.approx(2 / 3, rel=1e-12)


def test_what_scores_are_whitened_by() -> None:
    earlier, scores = [-4.0, 0.0, 1.0], [2.0, 5.0, -1.0, 0.5]
    seen = RunningMoments().merged(torch.tensor(earlier)).merged(torch.tensor(scores))
    together = np.asarray(earlier + scores)
    by_all = (np.asarray(scores) - together.mean()) / together.std()
    by_batch = (np.asarray(scores) - np.mean(scores)) / np.std(scores)
    raw = torch.tensor(scores)
    for over, expected in (("running", by_all), ("batch", by_batch), ("none", np.asarray(scores))):
        found = whiten_scores(raw, seen, over=over)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    first = RunningMoments().merged(raw)
    torch.testing.assert_close(
        whiten_scores(raw, first, over="running"), whiten_scores(raw, first, over="batch")
    )
    equal = torch.full((3,), 7.0)
    assert whiten_scores(equal, RunningMoments().merged(equal), over="running").tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("kl_nats", "expected"),
    [
        (6.0, 0.1),  # at the target nothing moves
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # a tenth above, 500 of 10,000 responses
        (60.0, 0.1 * (1 + 0.2 * 0.05)),  # the error is clipped
        (5.4, 0.1 * (1 - 0.1 * 0.05)),
        (0.0, 0.1 * (1 - 0.2 * 0.05)),
        (-3.0, 0.1 * (1 - 0.2 * 0.05)),  # the estimate can be below 0
    ],
)
def test_beta_by_hand(kl_nats: float, expected: float) -> None:
    found = next_kl_coefficient(0.1, kl_nats, target=6.0, responses=500, horizon=10000)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_steady_error_moves_beta_by_itself_in_one_horizon() -> None:
    """20 iterations of 500 responses, 10 % too far away: e^0.1, up to the steps' size."""
    beta = 1.0
    for _ in range(20):
        beta = next_kl_coefficient(beta, 1.1, target=1.0, responses=500, horizon=10000)
    assert math.log(beta) == pytest.approx(0.1, rel=3e-3)


def test_a_step_that_could_take_all_of_beta_is_refused() -> None:
    with pytest.raises(ValueError, match="too many for a horizon of 100"):
        next_kl_coefficient(0.1, 1.0, target=1.0, responses=500, horizon=100)
    assert next_kl_coefficient(0.1, 0.0, target=1.0, responses=499, horizon=100) > 0


@given(batches, st.floats(1e-9, 10.0))
def test_the_state_comes_back_from_json_to_the_bit(parts: list[list[float]], beta: float) -> None:
    state = RunningState(beta)
    for part in parts:
        state = state.with_scores(torch.tensor(part))
    assert RunningState.from_json(json.loads(json.dumps(state.to_json()))) == state
