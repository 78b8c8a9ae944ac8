"""The report of one run as a page."""

from __future__ import annotations

from pathlib import Path

from llama2_chat.files import write_text
from llama2_chat.report.curves import draw_curve, metric_names
from llama2_chat.report.data_account import data_account
from llama2_chat.report.distillation_figures import context_distillation
from llama2_chat.report.distillation_figures import panels_of as distillation_panels
from llama2_chat.report.iterations import versions
from llama2_chat.report.markup import Html, element, figure, figures, folded, joined, page, section
from llama2_chat.report.overview import heading, pipeline, resolved_recipe, results, times
from llama2_chat.report.policies import kl_against_reward, policies
from llama2_chat.report.ppo_figures import panels_of, ppo
from llama2_chat.report.reward_models import reward_models
from llama2_chat.report.run_record import RunRecord, StageRecord, read_run
from llama2_chat.report.samples import samples
from llama2_chat.report.sampling_figures import panels_of as sampling_panels
from llama2_chat.report.sampling_figures import rejection_sampling, write_panels
from llama2_chat.report.style import STYLE

REPORT_FILE = "report.html"


def write_report(path: Path) -> Path:
    """Write `RUN/report.html`, and some of its figures as files too; returns its path.

    Raises:
        UserInputError: `path` is no run directory.
    """
    run = read_run(path)
    file = path / REPORT_FILE
    write_text(file, report_page(run))
    write_panels(run, sampling_panels)
    write_panels(run, distillation_panels)
    return file


def report_page(run: RunRecord) -> str:
    """The whole page; a section for which the run holds nothing is left out."""
    return page(
        f"{run.name}, seed {run.seed}",
        heading(run),
        results(run),
        pipeline(run),
        training(run),
        reward_models(run),
        rejection_sampling(run),
        ppo(run),
        context_distillation(run),
        versions(run),
        policies(run),
        kl_against_reward(run),
        samples(run),
        times(run),
        data_account(run),
        resolved_recipe(run),
        style=STYLE,
    )


def training(run: RunRecord) -> Html:
    """Curves of every stage over its steps."""
    return section("Training", *(_stage_curves(stage) for stage in run.stages), identifier="training")


def _stage_curves(stage: StageRecord) -> Html:
    main, rest = metric_names(stage)
    if stage.kind == "ppo" and any(panels_of(stage, [])):
        main, rest = [], [*main, *rest]  # the most important ones have a section of their own
    shown, more = _drawn(stage, main), _drawn(stage, rest)
    if not shown and not more:
        return Html("")
    unfinished = "" if stage.done else element("span", " (not done)", class_="soft")
    return joined(
        [
            element("h3", stage.name, unfinished),
            figures(shown),
            folded("More curves", figures(more)) if more else "",
        ]
    )


def _drawn(stage: StageRecord, names: list[str]) -> list[Html]:
    drawn = (draw_curve(stage.series, name) for name in names)
    return [figure(svg) for svg in drawn if svg is not None]
