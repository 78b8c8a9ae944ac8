"""Distillation: a smaller model with a tokenizer of its own, trained on what the large one's stage kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2_chat.cli.main import run_command
from llama2_chat.pipeline import evaluation

LARGE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"
STEPS = {"learning_rate": 1e-3, "batch_size": 4, "sequence_length": 128, "max_steps": 2}
SAMPLING = {"temperature": 1.0, "max_new_tokens": 8}


def test_a_small_model_is_trained_on_what_the_large_one_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_a_core_is_free", lambda: False)  # one process is enough here
    large, small = str(LARGE), str(world / "base")
    recipe = {
        "name": "distilled",
        "base_model": large,
        "models": {"small": small},
        "device": "cpu",
        "data": {
            "talks": {"testbed": "demonstrations", "rows": 30},
            "pairs": {"testbed": "preferences", "rows": 30, "options": {"domain": "helpfulness"}},
            "prompts": {"testbed": "prompts", "rows": 40},
            "held_out": {"testbed": "prompts", "rows": 6, "split": "held_out"},
        },
        "stages": {
            "sft": {"kind": "sft", "model": "base", "dialogues": ["talks"], "training": STEPS},
            "rm": {
                "kind": "reward",
                "model": "sft",
                "domain": "helpfulness",
                "preferences": ["pairs"],
                "training": STEPS,
            },
            "v1": {
                "kind": "rejection_sampling",
                "policy": "base",
                "helpfulness": "rm",
                "prompts": ["prompts"],
                "samples_per_prompt": 4,
                "sampling": {"temperature": 0.7, "max_new_tokens": 30},
                "training": STEPS,
            },
            "small_v1": {"kind": "sft", "model": "small", "dialogues": ["v1"], "training": STEPS},
        },
        "evaluation": {
            "helpfulness": "rm",
            "prompts": ["held_out"],
            "samples_per_prompt": 1,
            "sampling": SAMPLING,
        },
    }
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert run_command(["run", str(file), "--output-dir", str(out)]) == 0
    model = out / "stages" / "04-small_v1" / "model"
    assert AutoModelForCausalLM.from_pretrained(model).config.hidden_size == 64
    assert len(AutoTokenizer.from_pretrained(model)) == len(AutoTokenizer.from_pretrained(small))
    assert f"`{Path(small).name}`" in (model / "README.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    (mix,) = summary["stages"]["small_v1"]["mix"]
    kept = len((out / "stages" / "03-v1" / "dataset.jsonl").read_text().splitlines())
    assert sum(mix["lengths"].values()) == kept == summary["stages"]["v1"]["selection"]["kept"] > 0
    judged = summary["evaluation"]
    assert judged["v1"]["kl_to_sft_nats"] != 0
    # Its ids mean something else to the SFT policy: no KL, but everything that needs text alone.
    assert "kl_to_sft_nats" not in judged["small_v1"]
    assert 0 <= judged["small_v1"]["win_rate_vs_sft"] <= 1
    assert (out / "figures" / "v1-best_of.png").exists()
    assert "Rejection sampling" in (out / "report.html").read_text()
