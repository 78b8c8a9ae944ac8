"""The examples in the documentation are valid and name what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from llama2_chat.cli.main import app, run_command
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.settings import ServedSamplingConfig, VllmConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *(*ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("recipes/*/README.md")),
    ]
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_a_server_that_samples_is_valid() -> None:
    (example,) = blocks(ROOT / "docs" / "sampling.md", "yaml")
    given = yaml.safe_load(example)["sampling"]
    sampling = ServedSamplingConfig.model_validate(given, strict=True)
    assert sampling.backend == "vllm"
    assert set(given["vllm"]) == set(VllmConfig.model_fields)


def test_the_example_recipe_is_valid(tmp_path: Path) -> None:
    example, iterations = blocks(ROOT / "docs" / "pipeline.md", "yaml")
    (tmp_path / "base").mkdir()
    file = tmp_path / "example.yaml"
    file.write_text(example)
    recipe = load_recipe(str(file))
    stages = ["sft", "helpfulness_rm", "rejection_sampling"]
    assert list(recipe.stages) == stages
    assert yaml.safe_load(example)["name"] == recipe.head.name == "example"
    file.write_text(example + iterations)
    later = [
        stage
        for number in range(2, 6)
        for stage in (
            f"v{number}_helpfulness_pairs",
            f"v{number}_helpfulness_rm",
            f"v{number}_rejection_sampling",
        )
    ]
    assert list(load_recipe(str(file)).stages) == [*stages, "v1_rejection_sampling", *later, "v5_ppo"]


SFT_EXAMPLE = "counts: [100, 60] "


def test_the_example_of_several_data_sets_runs(tmp_path: Path) -> None:
    """sft/README.md: what its comments say of the mix is what comes out, with counts and with weights."""
    (example,) = blocks(ROOT / "sft" / "README.md", "yaml")
    assert SFT_EXAMPLE in example
    (tmp_path / "base").symlink_to(ROOT / "recipes" / "tiny" / "base")
    (tmp_path / "counts.yaml").write_text(example)
    by_weight = example.replace(SFT_EXAMPLE, "# counts ").replace("# weights: [", "weights: [")
    (tmp_path / "weights.yaml").write_text(by_weight)
    found = {}
    for name in ("counts", "weights"):
        arguments = ["sft", str(tmp_path / f"{name}.yaml"), "training.max_steps=1"]
        assert run_command([*arguments, "--output-dir", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "done.json").read_text())["metrics"]
    used = {name: [row["used"] for row in metrics["mix"]] for name, metrics in found.items()}
    assert used == {"counts": [100, 60], "weights": [60, 80]}
    assert [row["safety"] for row in found["counts"]["mix"]] == [0, 60]
    assert [row["file"] for row in found["counts"]["mix"]] == ["helpful.jsonl", "safety.jsonl"]
    text = (ROOT / "sft" / "README.md").read_text(encoding="utf-8")
    assert [key for key in found["counts"]["mix"][0] if f"`{key}`" not in text] == ["file"]
    assert {"before", "after", "files", "lengths"} <= set(found["counts"]["held_out"])


def test_the_example_of_several_sources_runs(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "pretrain" / "README.md", "yaml")
    file = tmp_path / "two-sources.yaml"
    file.write_text(example)
    assert run_command(["run", str(file), "--output-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    web, books = summary["stages"]["small-base"]["sources"]
    assert (web["documents"], books["documents"]) == (1500, 300)
    assert (web["share"], books["share"]) == pytest.approx((0.6, 0.4), abs=2e-3)
    assert web["epochs"] < 1 < 2 < books["epochs"]


def test_the_example_of_a_custom_reward_runs(tmp_path: Path) -> None:
    """reward/README.md: the kept answers are the shortest of their prompts' complete ones."""
    page = ROOT / "reward" / "README.md"
    (module,), (recipe,) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "base").symlink_to(ROOT / "recipes" / "tiny" / "base")
    (tmp_path / "my_rewards.py").write_text(module)
    file = tmp_path / "brief.yaml"
    file.write_text(recipe)
    assert run_command(["run", str(file), "--output-dir", str(tmp_path / "run")]) == 0
    stage = tmp_path / "run" / "stages" / "02-rejection_sampling"
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    complete: dict[str, list[int]] = {}
    for row in samples:
        length = len(row["response"])
        assert row["scores"]["helpfulness"] == pytest.approx(1 - length / 100, abs=1e-6)
        if row["status"] == "complete":
            complete.setdefault(json.dumps(row["prompt"]), []).append(length)
    kept = [json.loads(line)["messages"] for line in (stage / "dataset.jsonl").read_text().splitlines()]
    assert len(kept) == len(complete) >= 10
    for messages in kept:
        assert len(messages[-1]["content"]) == min(complete[json.dumps(messages[:-1])])
    assert any(len(set(lengths)) > 1 for lengths in complete.values())


def test_python_examples_compile() -> None:
    found = [block for page in PAGES for block in blocks(page, "python")]
    for block in found:
        compile(block, "example", "exec")
    assert len(found) >= 1


def test_links_lead_somewhere() -> None:
    checked = 0
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            checked += 1
    assert checked > 15


def test_commands_that_are_named_exist() -> None:
    import typer

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"llama2-chat ([a-z][a-z-]+)\b", page.read_text(encoding="utf-8")))
    assert len(named & known) >= 8
    assert not {name for name in named - known if name not in {"is", "has", "with"}}
