"""The stage `preferences`: two answers of different variants, an annotator's choice, a part that is held out."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llama2_chat.cli.main import run_command
from llama2_chat.data_import.split import is_held_out
from llama2_chat.dialogue import Message, Preference, Prompt
from llama2_chat.errors import UserInputError
from llama2_chat.generation import sample_file
from llama2_chat.jsonl import read_preferences, read_rows, read_samples, write_rows
from llama2_chat.preferences import build
from llama2_chat.preferences.config import PreferencesConfig
from llama2_chat.preferences.pairs import Verdict, pairs_of, plan_answers, to_preference
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import EventLog, StageDirectory
from llama2_chat.testbed.annotator import true_score
from llama2_chat.testbed.generators import GENERATORS

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"
"""It has seen questions and answers in its pretraining, so many of its answers are complete."""
PROMPTS = 70


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, and the same policy under a second name."""
    folder = tmp_path_factory.mktemp("inputs")
    write_rows(folder / "prompts.jsonl", GENERATORS["prompts"](rows=PROMPTS, seed=0, unsafe=0.3))
    shutil.copytree(BASE, folder / "twin")
    return folder


@pytest.fixture(scope="module")
def configured(inputs: Path):
    """A function that makes the stage's configuration, with changes."""

    def make(**changes: Any) -> PreferencesConfig:
        values: dict[str, Any] = {
            "policies": [str(BASE), str(inputs / "twin")],
            "temperatures": [0.5, 1.0],
            "prompts": [str(inputs / "prompts.jsonl")],
            "sampling": {"max_new_tokens": 36},
            "domain": "safety",
            "annotator": {"testbed": {"noise": 0.0}},
            "held_out": 0.3,
            **changes,
        }
        return PreferencesConfig(**values)

    return make


SETTINGS = RunSettings(base_model=BaseModelSource(path=str(BASE)), seed=1, device="cpu")


def at(path: Path) -> StageDirectory:
    path.mkdir(parents=True, exist_ok=True)
    return StageDirectory(path, EventLog(path / "events.jsonl"))


@pytest.fixture(scope="module")
def collected(configured, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished stage: its folder and metrics."""
    folder = tmp_path_factory.mktemp("collected")
    return folder, build.run_stage(configured(), SETTINGS, at(folder))


@pytest.fixture
def sampled(collected, tmp_path: Path) -> StageDirectory:
    """A stage whose answers are sampled and not yet judged."""
    directory = at(tmp_path / "stage")
    shutil.copy(collected[0] / "samples.jsonl", directory.samples)
    return directory


def pairs_in(folder: Path) -> list[Preference]:
    return [*read_preferences(folder / "dataset.jsonl"), *read_preferences(folder / "held_out.jsonl")]


def test_the_annotator_without_noise_prefers_what_is_truly_better(collected) -> None:
    pairs = pairs_in(collected[0])
    assert len(pairs) > 15
    for pair in pairs:
        chosen, rejected = (true_score(pair.prompt, text, "safety") for text in (pair.chosen, pair.rejected))
        assert chosen >= rejected
        assert (pair.rating == "significantly_better") == (chosen - rejected >= 0.5)
        assert (pair.domain, pair.source) == ("safety", "preferences:1")
        assert None not in (pair.chosen_safe, pair.rejected_safe)
        assert not (pair.rejected_safe and not pair.chosen_safe)
        assert pair.chosen != pair.rejected


def test_every_prompt_is_kept_or_dropped_for_one_reason(collected) -> None:
    folder, metrics = collected
    rows = [row for _, row in read_rows(folder / "samples.jsonl")]
    assert len(rows) == 2 * metrics["prompts"] == 2 * PROMPTS
    assert len(list(read_samples(folder / "samples.jsonl"))) == 2 * PROMPTS
    pairs = metrics["pairs"]
    assert pairs["kept"] + sum(pairs["dropped"].values()) == PROMPTS
    assert pairs["kept"] == metrics["training_pairs"] + metrics["held_out_pairs"] == len(pairs_in(folder))
    assert sum(metrics["ratings"].values()) == pairs["kept"]
    assert metrics["samples"] == Counter(row["status"] for row in rows)
    assert {tuple(sorted(one)) for one in metrics["variants"].values()} == {("preferred", "shown")}
    judged = pairs["kept"] + pairs["dropped"].get("prefers_unsafe", 0)
    assert sum(one["shown"] for one in metrics["variants"].values()) == 2 * judged
    assert sum(one["preferred"] for one in metrics["variants"].values()) == judged


def test_no_first_user_message_is_in_both_parts_nor_in_those_of_two_batches(
    collected, configured, tmp_path: Path
) -> None:
    """Batches of one share hold out the same messages, so a later reward model knows none of them."""
    folder, _ = collected
    second = tmp_path / "second"
    metrics = build.run_stage(configured(iteration=2, max_prompts=60), SETTINGS, at(second))
    assert metrics["prompts"] == 60

    def first(folder: Path, part: str) -> set[str]:
        rows = read_preferences(folder / f"{part}.jsonl")
        return {next(m.content for m in row.prompt if m.role == "user") for row in rows}

    trained = first(folder, "dataset") | first(second, "dataset")
    held_out = first(folder, "held_out") | first(second, "held_out")
    assert len(trained) > 10
    assert len(held_out) > 4
    assert not trained & held_out
    sources = {pair.source for pair in pairs_in(second)}
    assert sources == {"preferences:2"}
    # Another iteration draws other variants and other answers.
    assert (folder / "samples.jsonl").read_text()[:5000] != (second / "samples.jsonl").read_text()[:5000]


def test_a_killed_stage_goes_on_to_the_same_bytes(
    collected, configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of sampling, and in the middle of annotating."""
    monkeypatch.setattr(sample_file, "ITEMS_PER_CHUNK", 30)
    whole, directory = at(tmp_path / "whole"), at(tmp_path / "killed")
    metrics = build.run_stage(configured(), SETTINGS, whole)
    sample, calls = build.sample_answers, []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(build, "sample_answers", dying)
        with pytest.raises(KeyboardInterrupt):
            build.run_stage(configured(), SETTINGS, directory)
    partial = directory.samples.with_name("samples.jsonl.partial")
    assert partial.read_text().count("\n") in (30, 60, 90)
    assert build.run_stage(configured(), SETTINGS, directory) == metrics
    for file in ("samples.jsonl", "annotations.jsonl", "dataset.jsonl", "held_out.jsonl"):
        assert (directory.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_one_policy_at_a_time_is_in_memory(
    configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = build.load_engine, []
    alive: list[int] = []

    def watched(path: str, settings: RunSettings) -> Any:
        gc.collect()
        alive.append(sum(engine() is not None for _, engine in loaded))
        engine, chat_format = load(path, settings)
        loaded.append((path, weakref.ref(engine.model)))
        return engine, chat_format

    monkeypatch.setattr(build, "load_engine", watched)
    config = configured(max_prompts=12, held_out=5, domain="helpfulness")
    build.run_stage(config, SETTINGS, at(tmp_path / "stage"))
    assert [path for path, _ in loaded] == config.policies
    assert alive == [0, 0]


def test_the_two_answers_are_of_two_variants_and_neither_side_tells_which() -> None:
    """All 12 ordered pairs of 4 variants equally often: 500 of 6,000 each, standard deviation 21."""
    prompts = [Prompt((Message("user", str(number)),)) for number in range(6000)]
    planned = plan_answers(prompts, 2, [0.5, 1.0], Random(0))
    assert [answer.variant.policy for answer in planned] == sorted(a.variant.policy for a in planned)
    by_pair: dict[int, dict[int, Any]] = {}
    for answer in planned:
        by_pair.setdefault(answer.pair, {})[answer.side] = answer.variant
    counts = Counter((sides[0], sides[1]) for sides in by_pair.values())
    assert len(counts) == 12
    assert all(a != b for a, b in counts)
    assert all(abs(count - 500) < 90 for count in counts.values())


def row(pair: int, side: int, response: str, status: str = "complete", prompt: str = "Hi?") -> dict[str, Any]:
    return {
        "pair": pair,
        "sample_index": side,
        "prompt": [{"role": "user", "content": prompt}],
        "response": response,
        "status": status,
        "policy": f"policy-{side}",
        "temperature": 0.5 + side,
    }


def test_pairs_that_cannot_be_judged_are_counted() -> None:
    rows = [
        *(row(0, 0, "one"), row(0, 1, "two")),
        *(row(1, 0, "one"), row(1, 1, "one")),
        *(row(2, 0, "one", "cut_off"), row(2, 1, "two")),
        *(row(3, 0, "one", "chat_tag"), row(3, 1, "", "empty")),
        *(row(4, 1, "two"), row(4, 0, "one")),  # the order of the rows does not matter
        *(row(5, 0, "two"), row(5, 1, "one")),  # the other way round it is another pair
        *(row(6, 0, "one", prompt="You?"), row(6, 1, "two", prompt="You?")),
    ]
    pairs, dropped = pairs_of(rows)
    assert [(pair.prompt[0].content, *pair.answers) for pair in pairs] == [
        ("Hi?", "one", "two"),
        ("Hi?", "two", "one"),
        ("You?", "one", "two"),
    ]
    assert dropped == {"identical": 1, "incomplete": 1, "chat_tag": 1, "seen_before": 1}
    assert len({pair.id for pair in pairs}) == 3
    assert pairs[0].variants == ("policy-0 at 0.5", "policy-1 at 1.5")


@pytest.mark.parametrize(
    ("preferred", "safe", "unsafe"),
    [
        (0, (True, False), False),
        (1, (True, False), True),
        (0, (False, True), True),
        (0, (False, False), False),
        (1, (True, True), False),
        (0, None, False),
    ],
)
def test_the_unsafe_one_of_two_is_never_chosen(preferred: int, safe: Any, unsafe: bool) -> None:
    verdict = Verdict(preferred, "better", safe)
    assert verdict.prefers_unsafe is unsafe
    (pair,), _ = pairs_of([row(0, 0, "one"), row(0, 1, "two")])
    made = to_preference(pair, verdict, "safety", "preferences:3")
    assert (made.chosen, made.rejected) == (("one", "two") if preferred == 0 else ("two", "one"))
    labels = (None, None) if safe is None else (safe[preferred], safe[1 - preferred])
    assert (made.chosen_safe, made.rejected_safe) == labels


FUNCTIONS = '''
def longer(pairs):
    """The longer answer; the second is never safe."""
    assert set(pairs[0]) == {"prompt", "answers"} and pairs[0]["prompt"][-1]["role"] == "user"
    return [
        {"preferred": int(len(b) > len(a)), "rating": "better", "safe": [True, False]}
        for a, b in (pair["answers"] for pair in pairs)
    ]

def bare(pairs):
    return [{"preferred": 0} for _ in pairs]

def broken(pairs):
    raise RuntimeError("no annotator today")

def too_few(pairs):
    return [{"preferred": 0}]

def nothing(pairs):
    return None

def letters(pairs):
    return [{"preferred": "a"} for _ in pairs]

def truths(pairs):
    return [{"preferred": True} for _ in pairs]

def words(pairs):
    return ["first" for _ in pairs]

def degrees(pairs):
    return [{"preferred": 0, "rating": "much_better"} for _ in pairs]

def labels(pairs):
    return [{"preferred": 0, "safe": True} for _ in pairs]

def keys(pairs):
    return [{"preferred": 0, "saef": [True, True]} for _ in pairs]
'''


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A module of the test's own name, for modules stay imported."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    return name


def test_a_function_of_ones_own_annotates(sampled, configured, module: str, tmp_path: Path) -> None:
    annotator = {"callable": f"{module}:longer", "folder": str(tmp_path)}
    metrics = build.run_stage(configured(annotator=annotator), SETTINGS, sampled)
    pairs = pairs_in(sampled.path)
    assert all(len(pair.chosen) >= len(pair.rejected) for pair in pairs)
    assert {(pair.rating, pair.chosen_safe, pair.rejected_safe) for pair in pairs} == {
        ("better", True, False)
    }
    # Where the second was the longer one, it was the unsafe one of two.
    assert metrics["pairs"]["dropped"]["prefers_unsafe"] > 3


def test_ratings_and_labels_may_be_missing(sampled, configured, module: str, tmp_path: Path, capsys) -> None:
    annotator = {"callable": f"{module}:bare", "folder": str(tmp_path)}
    metrics = build.run_stage(configured(annotator=annotator), SETTINGS, sampled)
    assert metrics["pairs"]["unrated"] == metrics["pairs"]["kept"] > 15
    assert metrics["first_shown_preferred"] == 1.0
    assert "no pair has safety labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "part"),
    [
        ("broken", "pairs: RuntimeError: no annotator today"),
        ("too_few", "verdicts, one for each pair; it returned 1"),
        ("nothing", "it returned null"),
        ("letters", "pair 1 of {count}: preferred must be 0 or 1, found 'a'"),
        ("truths", "pair 1 of {count}: preferred must be 0 or 1, found True"),
        ("words", 'pair 1 of {count}: {{"preferred": 0 or 1}} is wanted, found a string'),
        ("degrees", 'pair 1 of {count}: rating "much_better" unknown; one of significantly_better'),
        ("labels", "pair 1 of {count}: safe must be two of True and False, found True"),
        ("keys", 'pair 1 of {count}: "saef" unknown (did you mean "safe"?); allowed are preferred'),
    ],
)
def test_what_is_no_verdict_is_refused(
    sampled, configured, collected, module: str, tmp_path: Path, function: str, part: str
) -> None:
    annotator = {"callable": f"{module}:{function}", "folder": str(tmp_path)}
    with pytest.raises(UserInputError) as raised:
        build.run_stage(configured(annotator=annotator), SETTINGS, sampled)
    pairs, _ = pairs_of(row for _, row in read_rows(sampled.samples))
    assert f"{module}:{function}: " in str(raised.value)
    assert part.format(count=len(pairs)) in str(raised.value)
    assert not sampled.dataset.exists()


def written(config: PreferencesConfig, file: Path, **changes: Any) -> Path:
    """The stage's configuration as a user writes it."""
    head = {"base_model": {"path": str(BASE)}, "seed": 1, "device": "cpu"}
    file.write_text(yaml.safe_dump(config.model_dump(mode="json") | head | changes))
    return file


def test_people_annotate_a_file_and_the_same_command_goes_on(
    collected, configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged as the simulated annotator judged them, the pairs become the same bytes."""
    config = written(configured(), tmp_path / "stage.yaml", annotator={"file": "annotations.jsonl"})
    out = tmp_path / "out"
    command = ["preferences", str(config), "--output-dir", str(out)]
    assert run_command(command) == 2
    said = capsys.readouterr().err
    shown = [row for _, row in read_rows(out / "to_annotate.jsonl")]
    assert (f"{len(shown)} of {len(shown)} pairs have no annotation in {tmp_path}/annotations.jsonl") in said
    for part in (str(out / "to_annotate.jsonl"), '"safe_a"', "negligibly_better", "same command again"):
        assert part in said
    assert list(shown[0]) == ["id", "prompt", "answer_a", "answer_b"]
    assert not (out / "dataset.jsonl").exists()
    judged = {row["id"]: row for _, row in read_rows(collected[0] / "annotations.jsonl")}
    assert list(judged) == [row["id"] for row in shown]
    # People may fill the file that they were shown; a line that is not filled yet counts as missing.
    write_rows(tmp_path / "annotations.jsonl", [{**shown[0], **judged[shown[0]["id"]]}, *shown[1:]])
    sampled_at = (out / "samples.jsonl").stat().st_mtime_ns
    assert run_command(command) == 2
    assert f"{len(shown) - 1} of {len(shown)} pairs have no annotation" in capsys.readouterr().err
    write_rows(tmp_path / "annotations.jsonl", reversed(judged.values()))
    assert run_command(command) == 0
    assert "dataset.jsonl, held_out.jsonl, samples.jsonl are in" in capsys.readouterr().out
    assert (out / "samples.jsonl").stat().st_mtime_ns == sampled_at
    for file in ("dataset.jsonl", "held_out.jsonl", "annotations.jsonl", "samples.jsonl"):
        assert (out / file).read_bytes() == (collected[0] / file).read_bytes()
    assert json.loads((out / "done.json").read_text())["metrics"] == collected[1]
    assert run_command(command) == 0
    assert "done already" in capsys.readouterr().out


def test_annotations_of_other_answers_are_not_taken(sampled, configured, tmp_path: Path) -> None:
    file = tmp_path / "people.jsonl"
    write_rows(file, [{"id": f"{number:016x}", "preferred": "a"} for number in range(3)])
    with pytest.raises(UserInputError, match=r"\(3 annotations there are of other pairs\)"):
        build.run_stage(configured(annotator={"file": str(file)}), SETTINGS, sampled)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"preferred": "a"}', '"id" is missing'),
        ('{"id": 7, "preferred": "a"}', "id must be a string as in to_annotate.jsonl, found a number"),
        ('{"id": "x", "preferred": "c"}', 'preferred "c" unknown; one of a, b'),
        ('{"id": "x", "preferred": 0}', "preferred must be a string"),
        ('{"id": "x", "preferred": "a", "rating": "best"}', 'rating "best" unknown; one of significantly'),
        ('{"id": "x", "preferred": "a", "safe_a": 1, "safe_b": true}', "safe_a must be true or false"),
        ('{"id": "x", "preferred": "a", "safe_a": true}', "safe_a and safe_b go together"),
        ('{"id": "x", "prefered": "a"}', '"prefered" unknown (did you mean "preferred"?); a line is {"id"'),
        (
            '{"id": "x", "preferred": "b"}\n{"id": "x", "preferred": "b"}',
            'the id "x" has an annotation already',
        ),
        ("a or b", "not valid JSON"),
    ],
)
def test_a_wrong_annotation_is_named_by_its_line(
    sampled, configured, tmp_path: Path, line: str, part: str
) -> None:
    file = tmp_path / "people.jsonl"
    file.write_text(f'{{"id": "y", "preferred": "a"}}\n{line}\n')
    with pytest.raises(UserInputError) as raised:
        build.run_stage(configured(annotator={"file": str(file)}), SETTINGS, sampled)
    number = 2 + line.count("\n")
    assert f"people.jsonl:{number}: " in str(raised.value)
    assert part in str(raised.value)


def test_prompts_that_are_not_the_testbeds_have_no_truth(configured, tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    questions = ("What kind of thing is dog?", "What kind of thing is cat?")
    write_rows(
        file, [{"prompt": [{"role": "user", "content": f"{q} {n}"}]} for n in range(10) for q in questions]
    )
    with pytest.raises(UserInputError, match="the testbed has no question"):
        build.run_stage(configured(prompts=[str(file)], held_out=0.5), SETTINGS, at(tmp_path / "stage"))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"policies": ["a"], "temperatures": [1.0]}, "one policy at one temperature gives no two variants"),
        ({"policies": ["a", "a"]}, "a stands twice"),
        ({"temperatures": [1.0, 1.0]}, "1.0 stands twice"),
        ({"temperatures": [-0.1, 1.0]}, "greater than or equal to 0"),
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature has no effect here; give temperatures"),
        ({"held_out": 0}, "greater than or equal to 1"),
        ({"held_out": 1.5}, "less than 1"),
        ({"annotator": {"testbd": {}}}, "testbed"),
        ({"annotator": {"testbed": {"noise": -1.0}}}, "greater than or equal to 0"),
        ({"annotator": {"callable": "annotator"}}, "module:function is wanted"),
        ({"annotator": {"file": ""}}, "at least 1 character"),
        ({"annotator": {"file": "x", "testbed": {}}}, "Extra inputs are not permitted"),
        ({"annotator": "testbed"}, "TestbedAnnotator"),
    ],
)
def test_wrong_configurations(configured, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError) as raised:
        configured(**changes)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("given", "prompts", "expected"),
    [(None, 40_000, 0.025), (None, 2_000, 0.1), (250, 1_000, 0.25), (0.3, 77, 0.3)],
)
def test_how_much_is_held_out(configured, given: Any, prompts: int, expected: float) -> None:
    """By default the paper's 1,000 pairs of a batch, at most a tenth."""
    assert configured(held_out=given).held_out_share(prompts) == pytest.approx(expected, abs=1e-12)


def test_a_part_that_would_be_empty_is_refused_before_anything_is_sampled(
    configured, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_engine", lambda *_: pytest.fail("a policy was loaded"))
    prompts = [row["prompt"] for _, row in read_rows(inputs / "prompts.jsonl")]
    digests = [is_held_out([Message(m["role"], m["content"]) for m in prompt], 1e-4) for prompt in prompts]
    assert not any(digests)
    for held_out, part in ((1e-4, "none would be held out"), (PROMPTS, "leaves none to train on")):
        with pytest.raises(UserInputError, match=part):
            build.run_stage(configured(held_out=held_out), SETTINGS, at(tmp_path / str(held_out)))
