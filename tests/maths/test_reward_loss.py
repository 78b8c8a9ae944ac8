"""The ranking loss, margins and safety loss against hand arithmetic."""

import math

import pytest
import torch

from llama2_chat.dialogue import RATINGS
from llama2_chat.reward.loss import MARGIN_TABLES, preference_loss, rating_margins, safety_loss


def minus_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


def test_table_27() -> None:
    ratings = ["significantly_better", "better", "slightly_better", "negligibly_better", None]
    assert rating_margins(ratings, table="large").tolist() == [3.0, 2.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(
        rating_margins(ratings, table="small"), torch.tensor([1.0, 2 / 3, 1 / 3, 0.0, 0.0]), rtol=1e-6, atol=0
    )
    assert rating_margins(ratings, table="none").tolist() == [0.0] * 5


def test_tables_and_vocabulary_name_the_same_ratings() -> None:
    assert all(tuple(table) == RATINGS for table in MARGIN_TABLES.values())


def test_custom_table_and_unknown_names() -> None:
    table = dict.fromkeys(RATINGS, 0.5)
    assert rating_margins(["better", None], table=table).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="huge"):
        rating_margins(["better"], table="huge")
    with pytest.raises(ValueError, match="much_better"):
        rating_margins(["much_better"], table="small")


def test_loss_without_margin() -> None:
    loss = preference_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((minus_log_sigmoid(1.0) + minus_log_sigmoid(-3.0)) / 2, rel=1e-6)


def test_margin_is_subtracted() -> None:
    # A margin makes the same pair harder: -log sigmoid(2 - 1 - 3), not 2 - 1 + 3.
    loss = preference_loss(torch.tensor([2.0]), torch.tensor([1.0]), margins=torch.tensor([3.0]))
    assert loss.item() == pytest.approx(minus_log_sigmoid(-2.0), rel=1e-6)


def test_rows_without_rating_are_right_beside_rated_ones() -> None:
    chosen, rejected = torch.tensor([0.5, 0.5, 0.5]), torch.zeros(3)
    for ratings in ([None, "better", None], ["better", None, None]):
        loss = preference_loss(chosen, rejected, margins=rating_margins(ratings, table="large"))
        expected = (2 * minus_log_sigmoid(0.5) + minus_log_sigmoid(-1.5)) / 3
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_pushes_scores_apart() -> None:
    chosen, rejected = torch.tensor([0.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    preference_loss(chosen, rejected).backward()
    assert chosen.grad.item() == pytest.approx(-0.5)
    assert rejected.grad.item() == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 2)])
def test_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        preference_loss(torch.zeros(2), torch.zeros(shape))
    with pytest.raises(ValueError, match="shape"):
        preference_loss(torch.zeros(2), torch.zeros(2), margins=torch.zeros(shape))


def test_safety_loss_by_hand() -> None:
    loss = safety_loss(torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
    assert loss.item() == pytest.approx((minus_log_sigmoid(2.0) + minus_log_sigmoid(1.0)) / 2, rel=1e-6)


def test_safety_loss_of_nothing_is_zero_with_a_gradient_path() -> None:
    scores = torch.zeros(4, requires_grad=True)
    loss = safety_loss(scores[torch.zeros(4, dtype=torch.bool)], torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad.tolist() == [0.0] * 4


def test_safety_loss_refuses_broadcasting() -> None:
    with pytest.raises(ValueError, match="shape"):
        safety_loss(torch.zeros(2, 1), torch.zeros(2, dtype=torch.bool))
