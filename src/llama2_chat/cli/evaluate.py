"""`llama2-chat evaluate reward | policy | attention | instructions`: a model's figures on held-out files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llama2_chat.cli.evaluate_dialogues import attention, instructions
from llama2_chat.cli.options import LARGEST_SEED, Device
from llama2_chat.errors import MissingFileError, UserInputError

if TYPE_CHECKING:
    from llama2_chat.evaluation.config import EvaluationConfig
    from llama2_chat.reward.scoring import RewardModel

app = typer.Typer(help="Measure a reward model or a policy on held-out data.", no_args_is_help=True)
app.command()(attention)
app.command()(instructions)


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
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Orients the pairs for the calibration curve")
    ] = 0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Gets evaluation.json, evaluation.md and figures/")
    ] = None,
    device: Device = "auto",
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
    helpfulness: Annotated[
        Path | None, typer.Option(help="Helpfulness reward model folder; --prompts need it")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Held-out harmless prompts; may be repeated, as the next two")
    ] = None,
    safety: Annotated[
        Path | None, typer.Option(help="Safety reward model folder; without it no violations")
    ] = None,
    safety_prompts: Annotated[list[Path] | None, typer.Option(help="Held-out unsafe prompts")] = None,
    borderline_prompts: Annotated[
        list[Path] | None, typer.Option(help="Harmless prompts that look unsafe")
    ] = None,
    attribute_dialogues: Annotated[
        Path | None, typer.Option(help="Testbed dialogues that state something first and ask for it last")
    ] = None,
    independent: Annotated[
        Path | None, typer.Option(help="A third reward model that nothing was optimised against")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Policy to compare with (win rate, KL)")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of a GGUF file in the policy's folder")] = None,
    chat_format: Annotated[
        Literal["llama2", "tokenizer"] | None,
        typer.Option(help="tokenizer: the tokenizer's own template; default: what the model's config says"),
    ] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; KL to a reference wants 1")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Gets evaluation.json, evaluation.md and samples.jsonl, every answer")
    ] = None,
    device: Device = "auto",
) -> None:
    """Mean rewards, violations, refusals (also by source), recall and, with a reference, win rate and KL."""
    files = [*(prompts or []), *(safety_prompts or []), *(borderline_prompts or [])]
    for file in (*files, *([attribute_dialogues] if attribute_dialogues is not None else [])):
        if not file.exists():
            raise MissingFileError(f"{file}: no such file")
    if reference is not None and temperature != 1.0:
        raise UserInputError(
            f"--temperature {temperature:g}: KL to --reference is estimated from answers at temperature 1; "
            "leave one of the two out"
        )
    if output_dir is not None:
        _check_writable(output_dir)
    config = _policy_config(
        helpfulness=helpfulness,
        safety=safety,
        independent=independent,
        prompts=prompts or [],
        safety_prompts=safety_prompts or [],
        borderline_prompts=borderline_prompts or [],
        attribute_dialogues=[] if attribute_dialogues is None else [attribute_dialogues],
        samples_per_prompt=samples_per_prompt,
        sampling={"temperature": temperature, "max_new_tokens": max_new_tokens},
    )
    from llama2_chat.evaluation.policy_report import policy_markdown
    from llama2_chat.evaluation.run import PolicyEvaluator
    from llama2_chat.models import chat_format_of
    from llama2_chat.settings import BaseModelSource, RunSettings

    if chat_format is None:
        chat_format = "llama2" if gguf_file is not None else chat_format_of(model)
    settings = RunSettings(
        base_model=BaseModelSource(path=str(model), gguf_file=gguf_file),
        chat_format=chat_format,
        seed=seed,
        device=device,
    )
    metrics, samples = PolicyEvaluator(config, settings, reference).evaluate(model)
    markdown = policy_markdown(metrics)
    typer.echo(markdown, nl=False)
    _write(output_dir, metrics, markdown)
    if output_dir is not None:
        from llama2_chat.jsonl import write_rows

        write_rows(output_dir / "samples.jsonl", samples)


def _policy_config(**options: Any) -> EvaluationConfig:
    """The options as a recipe would have them; what is wrong with them is said without a traceback."""
    from pydantic import ValidationError

    from llama2_chat.evaluation.config import EvaluationConfig

    def text(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    fields = {
        name: [text(one) for one in value] if isinstance(value, list) else text(value)
        for name, value in options.items()
    }
    try:
        return EvaluationConfig(**fields)
    except ValidationError as error:
        problems = [str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()]
        raise UserInputError("; ".join(problems)) from None


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


def _write(output_dir: Path | None, metrics: dict[str, Any], markdown: str) -> None:
    if output_dir is None:
        return
    from llama2_chat.files import write_json, write_text

    write_json(output_dir / "evaluation.json", metrics)
    write_text(output_dir / "evaluation.md", markdown)
