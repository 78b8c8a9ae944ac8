"""`llama2-chat evaluate reward | policy`: a model's figures on held-out files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llama2_chat.errors import MissingFileError

app = typer.Typer(help="Measure a reward model or a policy on held-out data.", no_args_is_help=True)
_OutputFolder = Annotated[Path | None, typer.Option(help="Gets evaluation.json and evaluation.md")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]


@app.command()
def reward(
    model: Annotated[Path, typer.Argument(help="Reward model folder")],
    preferences: Annotated[Path, typer.Argument(metavar="PREFERENCES.jsonl")],
    output_dir: _OutputFolder = None,
    device: _Device = "auto",
) -> None:
    """Accuracy by rating and safety class, recall of unsafe responses, calibration."""
    if not preferences.exists():
        raise MissingFileError(f"{preferences}: no such file")
    from llama2_chat.evaluation.reward_report import accuracy_markdown
    from llama2_chat.reward.held_out import held_out_metrics
    from llama2_chat.reward.scoring import RewardModel

    metrics = held_out_metrics(RewardModel.from_pretrained(model, device=device), [preferences])
    markdown = accuracy_markdown(metrics)
    typer.echo(markdown, nl=False)
    _write(output_dir, metrics, markdown)


@app.command()
def policy(
    model: Annotated[Path, typer.Argument(help="Policy folder")],
    helpfulness: Annotated[Path, typer.Option(help="Helpfulness reward model folder")],
    prompts: Annotated[Path, typer.Option(help="Held-out harmless prompts")],
    safety: Annotated[Path | None, typer.Option(help="Safety reward model folder")] = None,
    safety_prompts: Annotated[Path | None, typer.Option(help="Held-out unsafe prompts")] = None,
    borderline_prompts: Annotated[Path | None, typer.Option(help="Harmless prompts that look unsafe")] = None,
    attribute_dialogues: Annotated[
        Path | None, typer.Option(help="Testbed dialogues that state something first and ask for it last")
    ] = None,
    independent: Annotated[
        Path | None, typer.Option(help="A third reward model that nothing was optimised against")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Policy to compare with (win rate, KL)")] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output_dir: _OutputFolder = None,
    device: _Device = "auto",
) -> None:
    """Mean rewards, violations, false refusals, recall and, with a reference, win rate and KL."""
    for file in (prompts, safety_prompts, borderline_prompts, attribute_dialogues):
        if file is not None and not file.exists():
            raise MissingFileError(f"{file}: no such file")
    from llama2_chat.evaluation.config import EvaluationConfig
    from llama2_chat.evaluation.run import PolicyEvaluator
    from llama2_chat.models import chat_format_of
    from llama2_chat.settings import BaseModelSource, RunSettings, SamplingConfig

    settings = RunSettings(
        base_model=BaseModelSource(path=str(model)),
        chat_format=chat_format_of(model),
        seed=seed,
        device=device,
    )
    config = EvaluationConfig(
        helpfulness=str(helpfulness),
        safety=None if safety is None else str(safety),
        prompts=[str(prompts)],
        safety_prompts=[] if safety_prompts is None else [str(safety_prompts)],
        borderline_prompts=[] if borderline_prompts is None else [str(borderline_prompts)],
        attribute_dialogues=[] if attribute_dialogues is None else [str(attribute_dialogues)],
        independent=None if independent is None else str(independent),
        samples_per_prompt=samples_per_prompt,
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=max_new_tokens),
    )
    metrics, _ = PolicyEvaluator(config, settings, reference).evaluate(model)
    markdown = _policy_markdown(metrics)
    typer.echo(markdown, nl=False)
    _write(output_dir, metrics, markdown)


def _policy_markdown(metrics: dict[str, Any]) -> str:
    lines = ["| measure | value | 95 % interval | count |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['mean']:.4f} | {row['low']:.4f} to {row['high']:.4f} | {row['count']} |"
        for name, row in metrics["intervals"].items()
    ]
    return "\n".join(lines) + "\n"


def _write(output_dir: Path | None, metrics: dict[str, Any], markdown: str) -> None:
    if output_dir is None:
        return
    from llama2_chat.files import write_json, write_text

    write_json(output_dir / "evaluation.json", metrics)
    write_text(output_dir / "evaluation.md", markdown)
