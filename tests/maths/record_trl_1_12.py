"""Writes `trl_1_12_advantages.json`: what TRL 1.12.0 makes of a few seeded inputs, in an environment of its own.

    python -m venv DIR && DIR/bin/pip install -r constraints-trl-peer.txt
    DIR/bin/python tests/maths/record_trl_1_12.py

Its `masked_whiten` is called as it is. Its loop over tokens stands in the middle of `PPOTrainer.train`, so the lines
from `lastgaelam = 0` to `returns = …` are taken out of the installed source and run.
"""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from trl.experimental.ppo import ppo_trainer

VERSION = "1.12.0"
SHAPES = ((1, 1), (3, 5), (6, 9), (4, 16))


def advantage_loop() -> str:
    """The lines of TRL's loop."""
    lines = inspect.getsource(ppo_trainer.PPOTrainer.train).splitlines()
    first = next(number for number, line in enumerate(lines) if "lastgaelam = 0" in line)
    last = next(number for number, line in enumerate(lines) if "returns = advantages + values" in line)
    return textwrap.dedent("\n".join(lines[first : last + 1]))


def record(rows: int, tokens: int, discount: float, gae_lambda: float) -> dict[str, Any]:
    """Inputs and TRL's outputs for responses of differing length; what lies behind a response is 0, as TRL has it."""
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    mask = torch.arange(tokens) < lengths[:, None]
    rewards = torch.randn(rows, tokens, generator=generator) * mask
    values = torch.randn(rows, tokens, generator=generator) * mask
    scope: dict[str, Any] = {
        "torch": torch,
        "values": values,
        "rewards": rewards,
        "gen_length": tokens,
        "responses": values,
        "args": SimpleNamespace(gamma=discount, lam=gae_lambda),
    }
    exec(advantage_loop(), scope)  # TRL's own lines, from the installed package
    case = {
        "lengths": lengths.tolist(),
        "discount": discount,
        "gae_lambda": gae_lambda,
        "rewards": rewards.tolist(),
        "values": values.tolist(),
        "advantages": scope["advantages"].tolist(),
        "returns": scope["returns"].tolist(),
    }
    if int(mask.sum()) > 1:  # TRL divides by one less
        case["whitened"] = ppo_trainer.masked_whiten(scope["advantages"], mask).tolist()
        case["whitened_around_the_mean"] = ppo_trainer.masked_whiten(
            scope["advantages"], mask, shift_mean=False
        ).tolist()
    return case


def main() -> None:
    assert trl.__version__ == VERSION, trl.__version__
    cases = [
        record(*shape, *constants) for shape in SHAPES for constants in ((1.0, 0.95), (0.9, 0.5), (0.99, 0.0))
    ]
    text = json.dumps({"trl": VERSION, "torch": torch.__version__, "cases": cases}, indent=None)
    Path(__file__).with_name("trl_1_12_advantages.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
