"""A small run directory made by hand: every kind of stage, known numbers, hostile text; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp; \x1b[31m\x00 ]]> </td>'
"""What a policy may sample."""

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "model": "base", "dialogues": ["demonstrations"]},
    "helpfulness_rm": {
        "kind": "reward",
        "model": "sft",
        "preferences": ["pairs"],
        "held_out": ["held_out_pairs"],
        "domain": "helpfulness",
    },
    "safety_rm": {"kind": "reward", "model": "sft", "preferences": ["pairs"], "domain": "safety"},
    "v1": {
        "kind": "rejection_sampling",
        "policy": "sft",
        "base": "base",
        "helpfulness": "helpfulness_rm",
        "safety": "safety_rm",
        "prompts": ["prompts"],
    },
    "ppo": {
        "kind": "ppo",
        "policy": "v1",
        "helpfulness": "helpfulness_rm",
        "safety": "safety_rm",
        "prompts": ["prompts"],
    },
}

POLICIES = ("base", "sft", "v1", "ppo")


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def share(accuracy: float, count: int) -> dict[str, Any]:
    return {"accuracy": accuracy, "count": count, "low": accuracy - 0.05, "high": accuracy + 0.04}


def interval(mean: float, half: float = 0.1) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": 50}


def evaluation_of(place: int) -> dict[str, Any]:
    reward, kl, violations = 1.25 + place, 0.75 * place, 0.371 - 0.09 * place
    return {
        "reward_helpfulness_mean": reward,
        "kl_to_sft_nats": kl,
        "violation_rate": violations,
        "win_rate_vs_sft": 0.5 + 0.1 * place,
        "false_refusal_rate": {"helpful": 0.013, "borderline": 0.227},
        "attribute_recall_by_attribute": {"hobby": {"2": 0.777}},
        "correctness_greedy_by_family": {"count": 0.666},
        "attribute_recall": {str(turns): 0.9 - 0.01 * turns for turns in (2, 4, 20)},
        "a_new_measure": 0.4321,
        "intervals": {
            "reward_helpfulness_mean": interval(reward),
            "kl_to_sft_nats": interval(kl),
            "violation_rate": interval(violations, 0.02),
            "attribute_recall.2": interval(0.88, 0.03),
        },
    }


def answers_of(policy: str) -> list[dict[str, Any]]:
    rows = []
    for name, count in (("greedy", 12), ("safety", 8), ("borderline", 2), ("helpful", 3)):
        for number in range(count):
            rows.append(
                {
                    "set": name,
                    "prompt": [{"role": "user", "content": f"{name} question {number}"}],
                    "response": f"{policy} answers {number}" + (HOSTILE if policy == "ppo" else ""),
                    "status": "complete",
                    "scores": {"helpfulness": 1.0, "safety": 2.0, "combined": 0.5},
                    "refused": False,
                    # Policies differ most on question 7.
                    "oracle_helpfulness": 0.9 if policy == "ppo" and number == 7 else 0.25,
                    "oracle_safe": not (policy == "sft" and number == 7),
                }
            )
    return rows


def metrics_of(name: str) -> dict[str, Any]:
    if name.endswith("_rm"):
        return {
            "pairs": {"kept": 4321, "unrated": 17, "dropped": {"too_long": 23}},
            "accuracy": {
                "overall": share(0.7654, 900),
                "by_rating": {"significantly_better": share(0.9123, 400), "better": share(0.6, 0)},
                "by_safety": {"both_safe": share(0.7011, 300)},
            },
            "attainable_accuracy": {"overall": {"accuracy": 0.9599, "count": 900}, "by_rating": {}},
            "controls": {"length_scorer": share(0.5311, 900)},
            "unsafe_recall": None,
            "gate": {"precision": 0.0, "recall": None, "flagged": 3, "unsafe": 0},
            "calibration_error": 0.0417,
            "by_source": {
                "a <source>": {"overall": share(0.8123, 500), "by_rating": {}},
                "not named": {"overall": share(0.7222, 400), "by_rating": {}},
            },
            "matched_length": {"tokens": {**share(0.5432, 99), "pairs_needed": 514}},
            "length_rule": {"rule": "longer in tokens wins", "evaluated": share(0.6111, 900)},
        }
    if name == "v1":
        return {
            "selection": {
                "kept": 290,
                "prompts_without_complete_answer": 10,
                "samples": {"complete": 2111, "cut_off": 13},
            },
            "lengths": {"kept": 280, "shortened": 6, "dropped": 4},
            "steps": 40,
        }
    if name == "ppo":
        return {"prompts": 77, "dropped_prompts": 5, "iterations": 60}
    made = {"steps": 40, "loss_last": 0.3613}
    if name != "sft":
        return made
    files = [("help.jsonl", 300, 5, 2, 0), ("safe.jsonl", 31, 0, 0, 3)]
    mix = [
        {
            "file": file,
            "lengths": {"kept": kept, "shortened": cut, "dropped": lost},
            "untrained": mute,
            "used": 310,
        }
        for file, kept, cut, lost, mute in files
    ]
    return {"mix": mix, "lengths": {"kept": 331, "shortened": 5, "dropped": 2}, **made}


def series_of(name: str) -> list[dict[str, Any]]:
    if name == "ppo":
        return [
            {
                "step": n,
                "helpfulness_mean": n / 50,
                "safety_mean": None,
                "kl_nats": n / 40,
                "value_loss": 1 / n,
            }
            for n in range(1, 61)
        ]
    more = {"accuracy": 0.5, "learning_rate": 1e-4} if name == "sft" else {}
    return [{"step": n, "loss": 3 / n, **more} for n in range(1, 41)]


def build_run(run: Path, seed: int = 0) -> Path:
    """Write a finished run into a new folder."""
    recipe = {
        "name": "small",
        "seed": seed,
        "base_model": {"path": "some/base"},
        "chat_format": "llama2",
        "stages": STAGES,
        "evaluation": {"helpfulness": "helpfulness_rm", "safety": "safety_rm", "prompts": ["held_out"]},
    }
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = {"format_version": 1, "llama2_chat": "0.1.0", "python": "3.11.7", "processor": "A <CPU>"}
    (run / "environment.json").write_text(json.dumps({**environment, "cores": 2, "gpus": []}))
    stages = {}
    events: list[dict[str, Any]] = []
    for number, (stage, config) in enumerate(STAGES.items(), start=1):
        write_lines(run / "stages" / f"{number:02d}-{stage}" / "metrics.jsonl", series_of(stage))
        stages[stage] = {"kind": config["kind"], "wall_seconds": 100.0 * number, **metrics_of(stage)}
        time = f"2026-03-0{number}T10:00:00.000+00:00"
        events += [
            {"time": time, "event": "stage_started", "stage": stage},
            {"time": time, "event": "training_rate", "stage": stage, "tokens": 36000, "seconds": 20.0},
            {"time": time, "event": "stage_finished", "stage": stage},
        ]
    evaluation = {policy: evaluation_of(place) for place, policy in enumerate(POLICIES)}
    rate = {"sampling_tokens": 1000, "sampling_seconds": 4.0}
    events.append({"time": time, "event": "ppo_finished", "stage": "ppo", **rate})
    events.append({"time": time, "event": "warning", "stage": "safety_rm", "message": "margins <are> 0"})
    for policy in POLICIES:
        write_lines(run / "evaluation" / f"{policy}.samples.jsonl", answers_of(policy))
        time = "2026-03-09T12:30:00.000+00:00"
        events.append({"time": time, "event": "policy_evaluated", "policy": policy, "seconds": 61.0})
    write_lines(run / "events.jsonl", events)
    summary = {"recipe": "small", "seed": seed, "stages": stages, "evaluation": evaluation}
    (run / "summary.json").write_text(json.dumps({**summary, "wall_seconds": 1500.0}))
    (run / "data").mkdir()
    record = {"made_from": {}, "rows": 41, "report": {"read": 50, "imported": 41, "odd_turns": 9}}
    (run / "data" / "demonstrations.json").write_text(json.dumps(record))
    return run


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file as `change` leaves it."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


MakeRun = Callable[..., Path]
