"""`score`: an interrupted run continues and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from llama2_chat import interruption
from llama2_chat.cli import score as command
from llama2_chat.cli.main import run_command
from llama2_chat.errors import OutputFolderError
from llama2_chat.jsonl import write_rows
from llama2_chat.models import save_model
from llama2_chat.part_file import marker_of, opened, part_of
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import HuggingFaceTokenizer

ROWS = 70
CHUNK = 16


def save(folder: Path, seed: int) -> Path:
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=400, seed=0)]
    tokenizer = HuggingFaceTokenizer(train_tokenizer(texts, 400))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=200, num_labels=1, pad_token_id=tokenizer.padding_id,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    settings = RunSettings(base_model=BaseModelSource(path="base"), device="cpu")
    save_model(LlamaForSequenceClassification(config), tokenizer, folder, settings=settings, card="")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "one", 1), save(folder / "two", 2)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "_ROWS_AT_ONCE", CHUNK)
    file = tmp_path / "in.jsonl"
    write_rows(file, [row_of(n) for n in range(ROWS)])
    return file


def row_of(number: int) -> dict:
    messages = [
        {"role": "user", "content": f"Is {number} é?"},
        {"role": "assistant", "content": "No. " * (number % 5)},
    ]
    return {"messages": messages, "note": number}


def score(rows: Path, output: Path, *models: Path, options: tuple[str, ...] = ()) -> int:
    arguments = [f"--{kind}={model}" for kind, model in zip(("helpfulness", "safety"), models, strict=False)]
    return run_command(["score", str(rows), *arguments, "--output", str(output), "--device", "cpu", *options])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many dialogues each call of the scorer got."""
    calls: list[int] = []
    real = RewardScorer.score

    def counting(self, dialogues, is_safety=None):
        calls.append(len(dialogues))
        return real(self, dialogues, is_safety)

    monkeypatch.setattr(RewardScorer, "score", counting)
    return calls


def interrupted(after: int, number: int = signal.SIGTERM):
    """Within it the run is asked to stop once so many chunks are scored."""
    patch = pytest.MonkeyPatch()
    real = RewardScorer.score
    left = after

    def last(self, dialogues, is_safety=None):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return real(self, dialogues, is_safety)

    patch.setattr(RewardScorer, "score", last)
    return patch


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_continues_to_the_same_bytes(
    models, rows: Path, tmp_path: Path, monkeypatch, counted, capsys, name: str, number: int, code: int
) -> None:
    whole, output = tmp_path / f"whole-{name}", tmp_path / name
    assert score(rows, whole, *models) == 0
    counted.clear()
    patch = interrupted(after=2, number=number)
    assert score(rows, output, *models) == code
    patch.undo()
    assert "what is done is kept, the same command continues" in capsys.readouterr().err
    assert not output.exists()
    assert interruption.requested() is None
    assert score(rows, output, *models) == 0
    assert "continuing after 32 dialogues" in capsys.readouterr().err
    assert counted == [CHUNK, CHUNK, CHUNK, CHUNK, ROWS - 4 * CHUNK]
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*out*")) == sorted([name, f"whole-{name}"])
    unpack = gzip.decompress if name.endswith(".gz") else bytes
    found = [json.loads(line) for line in unpack(output.read_bytes()).splitlines()]
    assert [row["note"] for row in found] == list(range(ROWS))
    assert list(found[0]) == ["messages", "note", "scores"]


@pytest.mark.parametrize("cut", [1, 30, 4000])
def test_a_torn_end_is_cut_off(models, rows: Path, tmp_path: Path, monkeypatch, counted, cut: int) -> None:
    """As a kill in the middle of a write leaves it: the last line, the last chunk or more is missing."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert score(rows, whole, *models) == 0
    patch = interrupted(after=3)
    assert score(rows, output, *models) == 143
    patch.undo()
    part = part_of(output)
    part.write_bytes(part.read_bytes()[:-cut])
    counted.clear()
    assert score(rows, output, *models) == 0
    assert 70 - 32 <= sum(counted) < ROWS
    assert output.read_bytes() == whole.read_bytes()


def test_another_model_input_or_option_starts_anew(
    models, rows: Path, tmp_path: Path, monkeypatch, counted, capsys
) -> None:
    output = tmp_path / "out.jsonl"
    one, two = models

    def begun() -> None:
        patch = interrupted(after=2)
        assert score(rows, output, one) == 143
        patch.undo()
        counted.clear()
        capsys.readouterr()

    def begins_anew(*models: Path, options: tuple[str, ...] = ()) -> bool:
        assert score(rows, output, *models, options=options) == 0
        anew = f"{part_of(output)}: holds scores of another input" in capsys.readouterr().err
        assert (sum(counted) == ROWS) == anew
        output.unlink()
        return anew

    begun()
    assert not begins_anew(one)
    for change in ((two,), (one, two)):
        begun()
        assert begins_anew(*change)
    begun()
    assert begins_anew(one, options=("--safety-threshold", "0.2"))
    begun()
    # The same model with one weight changed: name and size are the same.
    weights = one / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert begins_anew(one)
    weights.write_bytes(before)
    begun()
    write_rows(rows, [row_of(n) for n in range(1, ROWS + 1)])
    assert begins_anew(one)


def test_a_killed_process_continues(models, tmp_path: Path, counted) -> None:
    """SIGKILL, with the command's own chunks."""
    rows, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    write_rows(rows, [row_of(n) for n in range(8_000)])
    arguments = ["score", str(rows), "--helpfulness", str(models[0]), "--device", "cpu", "--output"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama2_chat.cli.main", *arguments, str(output)], stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    # Two chunks and a little: the first of them is on the disk as a whole.
    while not (part_of(output).exists() and part_of(output).read_bytes().count(b"\n") > 512):
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert run_command([*arguments, str(output)]) == 0
    assert 0 < sum(counted) < 8_000
    assert run_command([*arguments, str(whole)]) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_a_turn_that_no_model_takes_is_found_before_any_scoring(
    models, rows: Path, tmp_path: Path, counted, capsys
) -> None:
    with rows.open("a") as stream:
        long = {"messages": [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "y"}]}
        stream.write(json.dumps(long) + "\n")
    assert score(rows, tmp_path / "out.jsonl", *models) == 2
    assert (
        f"in.jsonl:{ROWS + 1}: the last turn alone is longer than the 200 tokens" in capsys.readouterr().err
    )
    assert counted == []
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_cannot_be_written_is_said(models, rows: Path, tmp_path: Path, capsys) -> None:
    before = rows.read_bytes()
    assert score(rows, rows, *models) == 2
    assert "is the input itself" in capsys.readouterr().err
    assert rows.read_bytes() == before
    assert score(rows, tmp_path, *models) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    output = tmp_path / "out.jsonl"
    with opened(output, {}, rows_per_chunk=1):
        assert score(rows, output, *models) == 2
    assert "another process is making this file" in capsys.readouterr().err


def test_a_part_without_its_marker_is_not_trusted(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    part_of(output).write_text("somebody else's\n")
    with (
        pytest.raises(OutputFolderError, match=r"out\.jsonl\.part\.json is not beside it"),
        opened(output, {"a": 1}, rows_per_chunk=1),
    ):
        pass
    assert part_of(output).read_text() == "somebody else's\n"
    for marker in ("", "[1", '{"a": 2}'):
        part_of(output).write_text('{"n": 0}\n')
        marker_of(output).write_text(marker)
        with opened(output, {"a": 1}, rows_per_chunk=1) as part:
            assert (part.rows_done, part.started_anew) == (0, True)
            part.append([{"n": 5}])
    with opened(output, {"a": 1}, rows_per_chunk=1) as part:
        assert (part.rows_done, part.started_anew) == (1, False)
        part.finish()
    assert output.read_text() == '{"n": 5}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
