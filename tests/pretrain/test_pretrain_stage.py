"""The stage from text to a folder that loads alone: what it counts, what it repeats to the byte, what it resumes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2_chat import interruption
from llama2_chat.cli.main import run_command
from llama2_chat.pretrain import train
from llama2_chat.pretrain.tokenizer import train_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_stage_makes_a_model_that_loads_alone(pretrain, text_file, texts) -> None:
    file = str(text_file("text.jsonl", texts))
    metrics, directory = pretrain("one", file)
    assert metrics["documents"] == 1500
    assert metrics["loss_last"] < 0.75 * metrics["loss_first"]
    model = AutoModelForCausalLM.from_pretrained(directory.model)
    assert len(AutoTokenizer.from_pretrained(directory.model)) == model.config.vocab_size == 600
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (2, 4)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, None)
    assert (directory.model / "README.md").exists()
    directory.drop_progress()  # as the pipeline does when the stage is done
    assert sorted(p.name[:11] for p in directory.checkpoints.iterdir()) == ["checkpoint-"]  # the text is gone

    again, other = pretrain("two", file)
    assert again == metrics
    assert contents(other.model) == contents(directory.model)
    assert other.metrics_file.read_bytes() == directory.metrics_file.read_bytes()


def test_metrics_count_documents_tokens_and_places(pretrain, text_file, texts) -> None:
    file = text_file("text.jsonl", [*texts[:700], "", " \n\t", *texts[700:]])
    metrics, directory = pretrain("stage", str(file), training={"max_steps": 4})
    tokenizer = train_tokenizer(texts, 600)  # empty texts teach nothing
    saved = AutoTokenizer.from_pretrained(directory.model)
    assert saved.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)  # with BOS already, and EOS
    assert (metrics["documents"], metrics["empty"], metrics["tokens"]) == (1500, 2, tokens)
    assert metrics["fill"] == pytest.approx(tokens / (metrics["rows"] * 64), rel=1e-12)


@pytest.fixture
def mixture(text_file, texts) -> dict[str, object]:
    """Two sources, the second of which is seen more than once."""
    sources = [str(text_file("first.jsonl", texts[:1200])), str(text_file("second.jsonl.gz", texts[1200:]))]
    return {"text": sources, "proportions": [1, 3], "training": {"checkpoint_steps": 5, "max_steps": 12}}


@pytest.mark.parametrize("stop_after", [1, 7])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_byte(
    pretrain, mixture, interrupted_after, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    wanted, whole = pretrain("stage", **mixture)
    Path(whole.path).rename(whole.path.with_name("whole"))
    whole_model = contents(whole.path.with_name("whole") / "model")

    with interrupted_after(stop_after):
        pretrain("stage", **mixture)
    assert not whole.model.exists()
    assert len(whole.metrics_file.read_text().splitlines()) == stop_after

    def never(*_: object) -> None:
        raise AssertionError("the tokenizer of the interrupted run is there")

    monkeypatch.setattr(train, "train_tokenizer", never)
    metrics, resumed = pretrain("stage", **mixture)
    assert metrics == wanted
    assert contents(resumed.model) == whole_model
    assert resumed.metrics_file.read_bytes() == (whole.path.with_name("whole") / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("documents", [10, 2000])
def test_interrupted_while_text_is_read(
    pretrain, mixture, monkeypatch: pytest.MonkeyPatch, documents: int
) -> None:
    """In the tokenizer's pass and in the tokens' pass: nothing half-written is left to go on from."""
    left = iter(range(documents))

    def stop() -> None:
        if next(left, None) is None:
            raise interruption.Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "raise_if_requested", stop)
        with pytest.raises(interruption.Interrupted):
            pretrain("stage", **mixture)
    wanted, whole = pretrain("whole", **mixture)
    written = {p.name for p in whole.path.with_name("stage").rglob("*") if p.is_file()}
    assert written <= {"events.jsonl"}
    metrics, resumed = pretrain("stage", **mixture)
    assert metrics == wanted
    assert resumed.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


def test_each_source_is_seen_by_its_proportion(pretrain, text_file, texts) -> None:
    sources = [str(text_file("a.jsonl", texts[:1200])), str(text_file("b.jsonl", texts[1200:]))]
    metrics, directory = pretrain(
        "stage", sources, proportions=[0.25, 0.75], training={"epochs": 1.5, "batch_size": 16}
    )
    first, second = metrics["sources"]
    available = first["tokens"] + second["tokens"]
    assert (first["documents"], second["documents"]) == (1200, 300)
    tokenizer = AutoTokenizer.from_pretrained(directory.model)
    longest = max(len(tokenizer.encode(text)) + 1 for text in texts)  # a source may have too much by less
    for source, proportion in ((first, 0.25), (second, 0.75)):
        assert 0 <= source["tokens_seen"] - 1.5 * proportion * available < longest
        assert source["epochs"] == pytest.approx(source["tokens_seen"] / source["tokens"], rel=1e-12)
        assert source["share"] == pytest.approx(proportion, abs=longest / available)
    assert metrics["tokens"] == first["tokens_seen"] + second["tokens_seen"]
    assert first["epochs"] < 1 < 3 < second["epochs"]
    steps = [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]
    assert len(steps) == metrics["steps"] == -(-metrics["rows"] // 16)  # one pass: the epochs are in the rows


def test_without_proportions_every_document_is_seen_once_an_epoch(pretrain, text_file, texts) -> None:
    sources = [str(text_file("a.jsonl", texts[:1000])), str(text_file("b.jsonl", texts[1000:]))]
    training = {"epochs": 2.0, "batch_size": 64}
    both, directory = pretrain("both", sources, training=training)
    one, other = pretrain("one", str(text_file("ab.jsonl", texts)), training=training)
    assert [(s["epochs"], s["tokens_seen"]) for s in both["sources"]] == [
        (2.0, 2 * s["tokens"]) for s in both["sources"]
    ]
    assert directory.metrics_file.read_bytes() == other.metrics_file.read_bytes()
    assert {**both, "sources": None} == {**one, "sources": None}


def test_max_steps_bounds_what_is_drawn(pretrain, text_file, texts) -> None:
    sources = [str(text_file("a.jsonl", texts[:1200])), str(text_file("b.jsonl", texts[1200:]))]
    metrics, _ = pretrain("stage", sources, proportions=[1, 1], training={"max_steps": 10})
    assert metrics["steps"] == 10
    assert metrics["rows"] >= 10 * 8
    assert 10 * 8 * 64 <= metrics["tokens"] < 1.1 * 10 * 8 * 64
    seen = [source["tokens_seen"] for source in metrics["sources"]]
    assert sum(seen) == pytest.approx(10 * 8 * 64 * metrics["fill"], abs=1)
    assert seen[0] == pytest.approx(seen[1], rel=0.1)


def test_no_row_holds_a_document_twice(trainer_of, text_file, texts) -> None:
    """A small source is seen many times; its copies are in different rows, as they would be in different epochs."""
    often = ["9" * length for length in range(1, 16)]  # packing lays what is equally long side by side
    sources = [str(text_file("a.jsonl", texts[:1200])), str(text_file("b.jsonl", often))]
    rows = trainer_of("stage", sources, proportions=[0.9, 0.1]).train_dataset
    seen = 0
    for row in rows:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        ends = [*starts[1:], len(row["input_ids"])]
        pieces = [tuple(row["input_ids"][start:end]) for start, end in zip(starts, ends, strict=True)]
        small = [piece for piece in pieces if len(piece) < 20 and piece[0] == 1 and piece[-1] == 2]
        assert len(small) == len(set(small))
        seen += len(small)
    assert seen > 10 * len(often)


def test_other_text_is_read_anew(tmp_path: Path, text_file, texts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that an interrupted run left are not used when the text has changed since."""
    config = {
        "text": "text.jsonl",
        "architecture": {"hidden_size": 16, "layers": 1, "context_length": 64},
        "vocabulary_size": 400,
        "training": {"sequence_length": 64, "batch_size": 4, "max_steps": 2},
    }
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(config))

    def command(folder: str) -> int:
        return run_command(
            ["pretrain", str(tmp_path / "pretrain.yaml"), "--output-dir", str(tmp_path / folder)]
        )

    def stop(*_: object, **__: object) -> None:
        raise interruption.Interrupted(signal.SIGTERM)

    text_file("text.jsonl", texts[:700])
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_sequences", stop)
        assert command("stage") == 143
    assert (tmp_path / "stage" / "checkpoints" / "text" / "tokens.bin").exists()
    text_file("text.jsonl", texts[700:1400])
    assert (command("stage"), command("fresh")) == (0, 0)
    assert contents(tmp_path / "stage" / "model") == contents(tmp_path / "fresh" / "model")
