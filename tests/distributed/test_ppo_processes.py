"""PPO in two processes does what it does in one: the same metrics and weights; nothing waits while sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_world import make_ppo_world
from safetensors.torch import load_file
from test_two_processes import ACCELERATE, FSDP, HERE, TORCHRUN, launch, lines, one_process, records

LAUNCHED = str(HERE / "launched_ppo.py")


def assert_equal_runs(one: Path, two: Path) -> None:
    """Every figure of every iteration, the stage's metrics and every weight, to 1e-4."""
    assert len(lines(one)) == len(lines(two)) == 3
    for expected, found in zip(lines(one), lines(two), strict=True):
        # The policy's figures are null in the warm-up, which approx takes no figure for.
        absent = {name for name, value in expected.items() if value is None}
        assert absent == {name for name, value in found.items() if value is None}
        expected, found = ({n: row[n] for n in row.keys() - absent} for row in (expected, found))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected, found = (json.loads((run / "done.json").read_text())["metrics"] for run in (one, two))
    for name in ("guards", "stopped_by"):  # which approx does not take
        assert found.pop(name) == expected.pop(name)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    evaluations = ([json.loads(line) for line in (run / "held_out.jsonl").open()] for run in (one, two))
    for expected, found in zip(*evaluations, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    checkpoint = Path("checkpoints", "checkpoint-3")
    for file in (
        Path("model", "model.safetensors"),
        *(checkpoint / f"{n}.safetensors" for n in ("policy", "value")),
    ):
        weights, others = weights_in(one / file), weights_in(two / file)
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-4, msg=f"{file}: {name}")


def weights_in(file: Path) -> dict[str, torch.Tensor]:
    """Tied weights are stored once, under either name."""
    weights = load_file(file)
    if "model.embed_tokens.weight" not in weights:
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    return weights


def assert_moved(config: Path, output: Path) -> None:
    before, after = (
        load_file(config.parent / "base" / "model.safetensors"),
        load_file(output / "model" / "model.safetensors"),
    )
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3


def launched(
    launcher: list[str], config: Path, folder: Path, *overrides: str, **variables: str
) -> list[dict[str, Any]]:
    """Two processes, of which the last gets a signal in the second iteration; then both go on."""
    record, output = folder / "record", folder / "two"
    command = ["ppo", str(config), *overrides, "--output-dir", str(output)]
    launch([*launcher, LAUNCHED, str(record), "--stop-at", "1", "--", *command], **variables)
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    started = [event for event in events if event["event"] == "ppo_started"]
    assert [(event["resumed_from"], event["processes"]) for event in started] == [(0, 2), (1, 2)]
    found = records(record)
    assert [process["codes"] for process in found] == [[143, 0]] * 2
    return found


def test_processes_with_whole_weights(tmp_path: Path) -> None:
    """accelerate launch, stopped by a signal to one process and resumed, against one process that ran through.

    A share of a mini-batch of 5 is one response longer in one process. The first alone writes.
    """
    config = make_ppo_world(tmp_path, warmup_iterations=1)
    one = one_process("ppo", config, tmp_path / "one")
    first, second = launched([*ACCELERATE, "--multi_gpu"], config, tmp_path, "training.micro_batch_size=1")
    assert_equal_runs(one, tmp_path / "two")
    assert_moved(config, tmp_path / "two")
    assert first["shared"] == second["shared"] == {moment: [False] for moment in first["shared"]}
    # In the warm-up the policy stands still, which says nothing about β.
    betas = [row["kl_coefficient"] for row in lines(one)]
    assert betas[0] == betas[1] != betas[2]
    # The second iteration is sampled twice, before the signal counts and after the resume.
    assert first["answered"] + second["answered"] == 4 * 15
    assert max(first["answered"], second["answered"]) == 4 * 8
    assert {"metrics.jsonl", "events.jsonl"} <= set(first["written"])
    assert any(name.endswith("policy.safetensors") for name in first["written"])
    assert second["written"] == []


def test_processes_that_share_weights(tmp_path: Path) -> None:
    """torchrun with FSDP2, stopped and resumed, against one process that ran through.

    Policy and value model are held in parts but for sampling; then the processes draw different numbers of tokens and
    none waits for another. Mini-batches of 5, one at a time, leave one process a micro-batch short.
    """
    config = make_ppo_world(tmp_path, tied=True)
    one = one_process("ppo", config, tmp_path / "one")
    overrides = ["training.micro_batch_size=1", "training.gradient_checkpointing=true"]
    found = launched(TORCHRUN, config, tmp_path, *overrides, **FSDP)
    assert_equal_runs(one, tmp_path / "two")
    assert_moved(config, tmp_path / "two")
    for process in found:
        assert process["shared"] == {
            "before": [True],
            "in sampling": [False],
            "after": [True],
            "in steps": [True],
        }
        assert process["sampling_calls"] == [0] * 4
        assert process["calls"]["all_gather_single"] > 0  # what is counted would be seen
    first, second = (process["decoding_steps"] for process in found)
    assert len(first) == len(second) == 4
    assert any(left != right for left, right in zip(first, second, strict=True))
