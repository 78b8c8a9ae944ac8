"""The ranking loss, margins and safety loss against hand arithmetic."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.reward_trainer import RewardTrainer

from llama2_chat.dialogue import RATINGS
from llama2_chat.reward.loss import (
    MARGIN_TABLES,
    centering_loss,
    preference_loss,
    rating_margins,
    safety_loss,
)


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


def test_margins_as_a_column_never_become_a_matrix() -> None:
    """(B, 1) against (B,) would broadcast to (B, B) and average over all pairs of rows."""
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 1.0])
    margins = torch.tensor([1.0, 0.0, 3.0])
    with pytest.raises(ValueError, match="margins \\(3, 1\\) and scores \\(3,\\)"):
        preference_loss(chosen, rejected, margins=margins.unsqueeze(-1))
    with pytest.raises(ValueError, match="shape"):
        preference_loss(chosen.unsqueeze(-1), rejected.unsqueeze(-1), margins=margins)
    with pytest.raises(ValueError, match="shape"):
        preference_loss(chosen.unsqueeze(-1), rejected)


def test_loss_row_by_row_in_plain_python() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, generator=generator, dtype=torch.float64).unbind()
    ratings = [[*RATINGS, None][number * 7 % 5] for number in range(50)]
    for table in ("none", "small", "large"):
        total = 0.0
        for c, r, rating in zip(chosen.tolist(), rejected.tolist(), ratings, strict=True):
            margin = 0.0 if rating is None else MARGIN_TABLES[table][rating]
            total += minus_log_sigmoid(c - r - margin)
        loss = preference_loss(chosen, rejected, margins=rating_margins(ratings, table=table))
        # The margins are float32, so a third is one only to seven digits.
        assert loss.item() == pytest.approx(total / 50, rel=1e-7)


@pytest.mark.parametrize("margins", [None, [0.0] * 4, [1.0, 0.0, 1 / 3, 2.5]])
@pytest.mark.parametrize("centering", [None, 0.01, 2.0])
def test_loss_is_trls(margins: list[float] | None, centering: float | None) -> None:
    """TRL's own `compute_loss` over a model that returns given scores; value and gradient."""
    start = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, 1.5, 0.5, -2.0])  # chosen, then rejected

    class Given(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=theirs.unsqueeze(-1))

    theirs = start.clone().requires_grad_(True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
        _total_train_tokens=0,
    )  # fmt: skip
    inputs = {} if margins is None else {"margin": torch.tensor(margins)}
    expected = RewardTrainer.compute_loss(trainer, Given(), inputs)
    expected.backward()

    ours = start.clone().requires_grad_(True)
    chosen, rejected = ours.chunk(2)
    loss = preference_loss(chosen, rejected, margins=None if margins is None else torch.tensor(margins)) + (
        centering or 0.0
    ) * centering_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)


def test_centering_by_hand() -> None:
    # ((2 + 1)² + (-1 + 4)² + (1 - 1)²) / 3
    loss = centering_loss(torch.tensor([2.0, -1.0, 1.0]), torch.tensor([1.0, 4.0, -1.0]))
    assert loss.item() == pytest.approx(6.0, rel=1e-6)


def test_centering_moves_the_level_and_leaves_the_difference() -> None:
    chosen, rejected = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    centering_loss(chosen, rejected).backward()
    assert chosen.grad.item() == rejected.grad.item() == pytest.approx(2 * (3.0 + 1.0))
    with pytest.raises(ValueError, match="shape"):
        centering_loss(torch.zeros(2), torch.zeros(2, 1))


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
