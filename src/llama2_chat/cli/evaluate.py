"""`llama2-chat evaluate reward | policy | attention | instructions`: a model's figures on held-out files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama2_chat.cli.evaluate_dialogues import attention, instructions
from llama2_chat.errors import MissingFileError, UserInputError

if TYPE_CHECKING:
    from llama2_chat.reward.scoring import RewardModel

app = typer.Typer(help="Measure a reward model or a policy on held-out data.", no_args_is_help=True)
app.command()(attention)
app.command()(instructions)
_OutputFolder = Annotated[Path | None, typer.Option(help="Gets evaluation.json and evaluation.md")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]


@app.command()
def reward(
    model: Annotated[Path, typer.Argument(help="Reward model folder")],
    preferences: Annotated[list[Path], typer.Argument(metavar="PREFERENCES.jsonl...", help="Held-out pairs")],
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Another reward model, on the same pairs and side by side; may be repeated"),
    ] = None,
    length_rule_from: Annotated[
        list[Path] | None,
        typer.Option(
            help="Training pairs; the length rule that is best on them is judged too; may be repeated"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Orients the pairs for the calibration curve")] = 0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Gets evaluation.json, evaluation.md and figures/")
    ] = None,
    device: _Device = "auto",
) -> None:
    """Accuracy by rating, safety class, source and file; unsafe responses; calibration; scores; length bias."""
    folders, training = [model, *(compare or [])], length_rule_from or []
    _check_reward_input(folders, preferences, training)
    if output_dir is not None:
        _check_writable(output_dir)
    from llama2_chat.evaluation.reward_evaluation import evaluate_reward_models, model_names
    from llama2_chat.evaluation.reward_report import by_model, reward_markdown

    models = {
        name: _reward_model(folder, name, device)
        for name, folder in zip(model_names(folders), folders, strict=True)
    }
    evaluation = evaluate_reward_models(models, preferences, length_rule_from=training, seed=seed)
    typer.echo(reward_markdown(evaluation), nl=False)
    if output_dir is None:
        return
    from llama2_chat.report.reward_figures import draw_figures

    pictures = draw_figures(evaluation, by_model(evaluation), output_dir / "figures")
    markdown = reward_markdown(evaluation, {name: f"figures/{file}" for name, file in pictures.items()})
    _write(output_dir, evaluation, markdown)
    typer.echo(f"{output_dir / 'evaluation.md'}: tables and figures; evaluation.json: every number", err=True)


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


def _check_reward_input(
    folders: Sequence[Path], preferences: Sequence[Path], training: Sequence[Path]
) -> None:
    """What can be told without loading anything, so that nobody waits for a model to learn of a typing error."""
    for file in (*preferences, *training):
        if not file.exists():
            raise MissingFileError(f"{file}: no such file")
        if file.is_dir():
            raise UserInputError(f"{file}: a folder; name a preferences file (*.jsonl or *.jsonl.gz) in it")
    for what, paths in (
        ("model", folders),
        ("preferences file", preferences),
        ("--length-rule-from", training),
    ):
        seen: set[Path] = set()
        for path in paths:
            if path.resolve() in seen:
                raise UserInputError(f"{path}: the same {what} twice; name each once")
            seen.add(path.resolve())


def _check_writable(folder: Path) -> None:
    """Fail before hours of scoring rather than after; the folder itself is made only when there are results."""
    from llama2_chat.pipeline.run_directory import ensure_writable

    ensure_writable(next(place for place in (folder, *folder.absolute().parents) if place.exists()))


def _reward_model(folder: Path, name: str, device: str) -> RewardModel:
    from safetensors import SafetensorError

    from llama2_chat.errors import disk_full
    from llama2_chat.reward.scoring import RewardModel

    try:
        model = RewardModel.from_pretrained(folder, device=device)
    except UserInputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if disk_full(error):
            raise
        raise UserInputError(f"{folder}: cannot be loaded as a reward model: {error}") from error
    model.name = name
    return model


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
