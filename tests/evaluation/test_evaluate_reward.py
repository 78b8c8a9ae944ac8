"""`llama2-chat evaluate reward` from the command line to its files, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import Message
from llama2_chat.jsonl import read_preferences, write_rows
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.report.drawing import COLOURS
from llama2_chat.reward.metrics import accuracy_points
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.testbed.generators import GENERATORS

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "recipes" / "tiny" / "base"
FIGURES = ["accuracy", "calibration", "length", "scores"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Testbed pairs of both domains, and pairs to choose a length rule on."""
    folder = tmp_path_factory.mktemp("data")
    for name, domain, rows in (("helpful", "helpfulness", 60), ("safety", "safety", 50)):
        made = GENERATORS["preferences"](rows=rows, seed=0, domain=domain, split="held_out")
        write_rows(folder / f"{name}.jsonl", made)
    write_rows(folder / "train.jsonl", GENERATORS["preferences"](rows=200, seed=0))
    return folder


@pytest.fixture(scope="session")
def evaluated(reward_models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "deep" / "evaluation"
    command = [
        *(
            "evaluate",
            "reward",
            reward_models / "plain" / "model",
            data / "helpful.jsonl",
            data / "safety.jsonl",
        ),
        *("--compare", reward_models / "margin" / "model", "--length-rule-from", data / "train.jsonl"),
        *("--output-dir", output, "--device", "cpu"),
    ]
    assert run_command([str(word) for word in command]) == 0
    return output


def test_the_numbers_are_those_of_the_models_own_scores(
    evaluated: Path, reward_models: Path, data: Path
) -> None:
    made = json.loads((evaluated / "evaluation.json").read_text())
    pairs = [pair for name in ("helpful", "safety") for pair in read_preferences(data / f"{name}.jsonl")]
    for name, figures in (("plain", made), ("margin", made["compared"]["margin"])):
        model = RewardModel.from_pretrained(reward_models / name / "model", device="cpu")
        chosen, rejected = (
            model.score_messages([(*p.prompt, Message("assistant", getattr(p, side))) for p in pairs])
            for side in ("chosen", "rejected")
        )
        points = accuracy_points(chosen.tolist(), rejected.tolist())
        assert figures["accuracy"]["overall"]["accuracy"] == pytest.approx(sum(points) / 110, rel=1e-12)
        assert figures["by_file"]["helpful.jsonl"]["overall"]["accuracy"] == pytest.approx(
            sum(points[:60]) / 60
        )
        gap = (chosen - rejected).double()
        assert figures["score_spread"]["mean_gap"] == pytest.approx(gap.mean().item(), abs=1e-5)
        assert figures["score_spread"]["gap_deviation"] == pytest.approx(gap.std().item(), abs=1e-5)
        labels = [(p.chosen_safe, p.rejected_safe) for p in pairs]
        unsafe = torch.cat([chosen, rejected])[[not ok for side in zip(*labels, strict=True) for ok in side]]
        assert figures["unsafe_recall"] == pytest.approx((unsafe < 0).double().mean().item(), rel=1e-12)
        lengths = [
            len(model.chat_format.segments((*p.prompt, Message("assistant", p.chosen)))[-1].ids)
            for p in pairs
        ]
        assert figures["length"]["tokens"]["mean_chosen"] == pytest.approx(sum(lengths) / 110, rel=1e-12)
    assert made["model"] == "plain"
    assert made["length_rule"]["train"]["count"] == 200
    assert "attainable_accuracy" in made
    finite = json.dumps(made, allow_nan=False)
    assert str(data) not in finite  # the files' names alone


def test_the_report_shows_its_figures(evaluated: Path) -> None:
    text = (evaluated / "evaluation.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert sorted(pictures) == [f"figures/{name}.png" for name in FIGURES]
    assert sorted(path.name for path in evaluated.iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "figures",
    ]
    assert [path.stem for path in sorted((evaluated / "figures").iterdir())] == FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_pictures_with_both_models_in_them(evaluated: Path, name: str) -> None:
    with Image.open(evaluated / "figures" / f"{name}.png") as picture:
        picture.verify()
    with Image.open(evaluated / "figures" / f"{name}.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
        rgb = picture.convert("RGB")
        colours = {colour for _, colour in rgb.getcolors(maxcolors=rgb.width * rgb.height)}
    for colour in COLOURS[:2]:
        assert tuple(round(255 * part) for part in to_rgb(colour)) in colours


def test_without_a_folder_the_tables_are_printed_and_nothing_is_written(
    reward_models: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(reward_models / "plain" / "model"), str(data / "safety.jsonl"), "--device", "cpu"]
    assert run_command(["evaluate", "reward", *arguments]) == 0
    printed = capfd.readouterr()
    assert printed.out.startswith("# Reward model plain\n")
    assert "![" not in printed.out
    assert "| attainable (all pairs)" in printed.out
    assert list(tmp_path.iterdir()) == []


def test_what_is_shortened_or_dropped_is_said(
    reward_models: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [pair.to_row() for pair in read_preferences(data / "helpful.jsonl")][:4]
    prefers_unsafe = {**rows[0], "chosen_safe": False, "rejected_safe": True}
    endless = {**rows[1], "chosen": [{"role": "assistant", "content": "yes " * 4000}]}
    write_rows(tmp_path / "pairs.jsonl", [*rows, prefers_unsafe, endless])
    arguments = [str(reward_models / "plain" / "model"), str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    assert run_command(["evaluate", "reward", *arguments]) == 0
    printed = capfd.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "pairs.jsonl: of 6 pairs" in line]
    assert "1 dropped: preferred response is the unsafe one" in line
    assert "1 dropped: longer than" in line
    assert "1 preferred response is the unsafe one" in printed.out


def test_the_same_command_writes_the_same_bytes(reward_models: Path, data: Path, tmp_path: Path) -> None:
    written = []
    for folder in ("one", "two"):
        arguments = [str(reward_models / "plain" / "model"), str(data / "helpful.jsonl"), "--device", "cpu"]
        assert run_command(["evaluate", "reward", *arguments, "--output-dir", str(tmp_path / folder)]) == 0
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        written.append([path.read_bytes() for path in files])
    assert len(written[0]) == 6
    assert written[0] == written[1]


def test_a_pair_without_rating_or_label(
    reward_models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One pair of one length, unrated and unlabelled: nothing is divided by zero and nothing is infinite."""
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "Yes."}],
    }
    write_rows(tmp_path / "pairs.jsonl", [row])
    arguments = [str(reward_models / "plain" / "model"), str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    assert run_command(["evaluate", "reward", *arguments, "--output-dir", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    json.dumps(made, allow_nan=False)
    assert made["accuracy"]["overall"]["accuracy"] == 0.5
    assert made["length"]["tokens"]["prefers_longer"]["share"] is None
    assert "## Safety" not in capfd.readouterr().out
    assert math.isclose(made["calibration_error"], 0.5)


CHANGES = {
    "missing file": (["MODEL", "gone.jsonl"], ["gone.jsonl: no such file"]),
    "second file missing": (["MODEL", "PAIRS", "gone.jsonl"], ["gone.jsonl: no such file"]),
    "folder as file": (["MODEL", "DATA"], ["a folder", "*.jsonl"]),
    "same file twice": (["MODEL", "PAIRS", "PAIRS"], ["the same preferences file twice"]),
    "missing model": (["gone/deep/model", "PAIRS"], ["gone/deep/model", "no such model folder"]),
    "policy as model": (["BASE", "PAIRS"], ["num_labels 1"]),
    "folder without model": (["DATA", "PAIRS"], ["no *.safetensors"]),
    "compared model missing": (["MODEL", "PAIRS", "--compare", "gone/deep/model"], ["no such model folder"]),
    "compared with itself": (["MODEL", "PAIRS", "--compare", "MODEL"], ["the same model twice"]),
    "compared with a policy": (["MODEL", "PAIRS", "--compare", "BASE"], ["num_labels 1"]),
    "broken weights": (["BROKEN", "PAIRS"], ["broken", "cannot be loaded as a reward model"]),
    "no configuration": (["BARE", "PAIRS"], ["bare", "cannot be loaded as a reward model"]),
    "no usable pair": (
        ["MODEL", "UNSAFE"],
        ["unsafe.jsonl: no usable pair", "preferred response is the unsafe"],
    ),
    "empty file": (["MODEL", "EMPTY"], ["empty.jsonl"]),
    "bad row": (["MODEL", "BAD"], ["bad.jsonl:1: "]),
    "missing training file": (
        ["MODEL", "PAIRS", "--length-rule-from", "gone.jsonl"],
        ["gone.jsonl: no such file"],
    ),
    "unusable training file": (
        ["MODEL", "PAIRS", "--length-rule-from", "UNSAFE"],
        ["unsafe.jsonl: no usable pair"],
    ),
    "dialogues": (["MODEL", "DIALOGUES"], ["dialogues.jsonl:1: "]),
}


@pytest.fixture
def places(reward_models: Path, data: Path, tmp_path: Path) -> dict[str, Path]:
    row = next(read_preferences(data / "helpful.jsonl")).to_row()
    write_rows(tmp_path / "unsafe.jsonl", [{**row, "chosen_safe": False, "rejected_safe": True}])
    write_rows(tmp_path / "bad.jsonl", [{**row, "rating": "much_better"}])
    write_rows(tmp_path / "dialogues.jsonl", [{"messages": [*row["prompt"], *row["chosen"]]}])
    (tmp_path / "empty.jsonl").touch()
    for name, lost in (("broken", None), ("bare", "config.json")):
        shutil.copytree(reward_models / "plain" / "model", tmp_path / name)
        if lost:
            (tmp_path / name / lost).unlink()
        else:
            (tmp_path / name / "model.safetensors").write_bytes(b"half a file")
    files = {name.upper(): tmp_path / f"{name}.jsonl" for name in ("unsafe", "bad", "dialogues", "empty")}
    folders = {"BASE": BASE, "DATA": data, "BROKEN": tmp_path / "broken", "BARE": tmp_path / "bare"}
    return {"MODEL": reward_models / "plain" / "model", "PAIRS": data / "helpful.jsonl", **files, **folders}


@pytest.mark.parametrize("change", CHANGES)
def test_users_mistakes_leave_one_message_and_no_folder(
    change: str, places: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words, parts = CHANGES[change]
    command = ["evaluate", "reward", *(str(places.get(word, word)) for word in words)]
    output = tmp_path / "new" / "out"
    assert run_command([*command, "--output-dir", str(output), "--device", "cpu"]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("error: ") == 1
    for part in parts:
        assert part in printed.err
    assert "Traceback" not in printed.err
    assert not output.parent.exists()


def test_an_output_folder_that_is_a_file_is_told_before_anything_is_loaded(
    places: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    command = ["evaluate", "reward", str(places["MODEL"]), str(places["PAIRS"])]
    for output in (places["BAD"], places["BAD"] / "out"):
        before = places["BAD"].read_bytes()
        assert run_command([*command, "--output-dir", str(output)]) == 2
        assert "cannot write here" in capfd.readouterr().err
        assert places["BAD"].read_bytes() == before


def test_the_documented_commands_run(
    reward_models: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """reward/README.md and evaluation/README.md, in a folder that looks as their words say."""
    recipe = load_recipe("tiny")
    assert list(recipe.stages)[1:3] == ["helpfulness_rm", "safety_rm"]
    run = tmp_path / "runs" / "tiny"
    for name, model in (("02-helpfulness_rm", "plain"), ("03-safety_rm", "margin")):
        shutil.copytree(reward_models / model / "model", run / "stages" / name / "model")
    (run / "data").mkdir()
    for name, file in (
        ("held_out_helpfulness_pairs", "helpful"),
        ("held_out_safety_pairs", "safety"),
        ("helpfulness_pairs", "train"),
    ):
        assert name in recipe.data
        shutil.copy(data / f"{file}.jsonl", run / "data" / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    commands = []
    for page in ("reward", "evaluation"):
        text = (ROOT / page / "README.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        commands.append(shlex.split(block.replace("\\\n", " ")))
    for words in commands:
        assert words[:3] == ["llama2-chat", "evaluate", "reward"]
        assert run_command(words[1:]) == 0
        output = Path(words[words.index("--output-dir") + 1])
        made = json.loads((output / "evaluation.json").read_text())
        assert made["model"] == "02-helpfulness_rm"
    assert list(made["compared"]) == ["03-safety_rm"]
    assert "02-helpfulness_rm minus that rule" in capfd.readouterr().out
    heads = re.findall(
        r"^\| (`.*?) \|", text.split("## What `evaluation.json`")[1].split("\n## ")[0], re.MULTILINE
    )
    fields = {field for head in heads for field in re.findall(r"`([a-z_]+)`", head)}
    assert len(fields) == 19
    assert set(made) - fields == {"model", "seed", "left_out"}
    assert not fields - set(made)
