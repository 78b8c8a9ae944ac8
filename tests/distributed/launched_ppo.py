"""What one of several launched processes does: run the ppo command, and write down what it saw.

torchrun … launched_ppo.py RECORD [--stop-at ITERATION] -- COMMAND …
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed
from launched import run_launched, run_with, signal_last_process
from torch.distributed.tensor import DTensor

from llama2_chat.generation import shared_decoding
from llama2_chat.ppo import loop
from llama2_chat.ppo.learners import Learner

_COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_reduce", "all_gather_object")


def main() -> None:
    seen = Watched()
    run_launched(stopped, seen.to_json)


class Watched:
    """Collectives inside and outside of sampling, forward passes in sampling, and how weights are held."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sampling_calls: list[int] = []
        self.decoding_steps: list[int] = []
        self.shared: dict[str, set[bool]] = {
            name: set() for name in ("before", "in sampling", "after", "in steps")
        }
        self.answered = 0
        self.steps = 0
        for name in _COLLECTIVES:
            setattr(torch.distributed, name, self.counted(name, getattr(torch.distributed, name)))
        self.watch_sampling()
        self.watch_steps()

    def counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return original(*args, **kwargs)

        return call

    def watch_sampling(self) -> None:
        sample_batch, step, answer = loop.sample_batch, shared_decoding._step, loop.PpoLoop._answer

        def noted_sampling(engine: Any, *args: Any, **kwargs: Any) -> Any:
            before, self.steps = self.calls.total(), 0
            self.shared["in sampling"] |= holding(engine.model)
            answers = sample_batch(engine, *args, **kwargs)
            self.sampling_calls.append(self.calls.total() - before)
            self.decoding_steps.append(self.steps)
            self.answered += len(answers)
            return answers

        def noted_step(*args: Any) -> None:
            self.steps += 1
            step(*args)

        def noted_answer(ppo: Any, *args: Any) -> Any:
            self.shared["before"] |= holding(ppo.models.policy)
            answers = answer(ppo, *args)
            self.shared["after"] |= holding(ppo.models.policy)
            return answers

        loop.sample_batch, shared_decoding._step, loop.PpoLoop._answer = (
            noted_sampling,
            noted_step,
            noted_answer,
        )

    def watch_steps(self) -> None:
        step = Learner.step

        def noted_step(learner: Learner, *args: Any) -> Any:
            self.shared["in steps"] |= holding(learner.model)
            return step(learner, *args)

        Learner.step = noted_step

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "sampling_calls": self.sampling_calls,
            "decoding_steps": self.decoding_steps,
            "answered": self.answered,
            "shared": {name: sorted(found) for name, found in self.shared.items()},
        }


def holding(model: Any) -> set[bool]:
    """Whether every parameter is a DTensor, that is, held in parts."""
    return {all(isinstance(parameter, DTensor) for parameter in model.parameters())}


def stopped(command: list[str], iteration: int) -> int:
    """Run the command; the last process alone gets a SIGTERM as it begins to sample in that iteration."""
    answer = loop.PpoLoop._answer

    def signalled(ppo: Any, prompts: Any, members: Any, now: int) -> Any:
        if now == iteration:
            signal_last_process()
        return answer(ppo, prompts, members, now)

    return run_with(loop.PpoLoop, "_answer", signalled, command)


if __name__ == "__main__":
    main()
