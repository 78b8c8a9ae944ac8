"""Maximum attention activations against a slow loop over queries and keys, parts and bins against hand-made ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from llama2_chat.chat_format import build_chat_format
from llama2_chat.cli.main import app
from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.evaluation import attention
from llama2_chat.evaluation.attention import (
    Part,
    TokenizedParts,
    attention_to_instruction,
    binned,
    bins_of,
    maximum_attention,
    tokenize_parts,
)
from llama2_chat.evaluation.attention_evaluation import BinSettings, evaluate_attention
from llama2_chat.jsonl import write_rows
from llama2_chat.models import load_policy, save_model
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.tokenizers import load_tokenizer

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"
SETTINGS = RunSettings(base_model=BaseModelSource(path=str(BASE)), device="cpu")
INSTRUCTION = "Act as Captain Rex."
MESSAGES = [
    Message("user", f"{INSTRUCTION} What is 3 plus 4?"),
    Message("assistant", "It is 7."),
    Message("user", "Who are you?"),
    Message("assistant", "I am Captain Rex."),
]


@pytest.fixture(scope="module")
def model():
    return load_policy(BASE, SETTINGS)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


def parts_of(tokenizer, messages=MESSAGES, **options) -> TokenizedParts:
    return tokenize_parts(messages, build_chat_format("llama2", tokenizer), tokenizer, **options)


@torch.no_grad()
def slow_maxima(model, ids: list[int], answers: list[tuple[int, int]]) -> list[list[float]]:
    """a[n, j] from every layer's input: project, rotate, and take every dot product by itself."""
    config, length = model.config, len(ids)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    inputs = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    maxima = [[0.0] * length for _ in answers]

    def rotated(vector: list[float], position: int) -> list[float]:
        half = width // 2
        turned = list(vector)
        for pair in range(half):
            angle = position * theta ** (-2 * pair / width)
            a, b = vector[pair], vector[pair + half]
            turned[pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[pair + half] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    for number, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(inputs[number])[0]
        queries = layer.self_attn.q_proj(normed).view(length, heads, width).tolist()
        keys = layer.self_attn.k_proj(normed).view(length, groups, width).tolist()
        for head in range(heads):
            own = [rotated(queries[i][head], i) for i in range(length)]
            others = [rotated(keys[j][head // (heads // groups)], j) for j in range(length)]
            for n, (start, end) in enumerate(answers):
                for i in range(start - 1, end - 1):
                    scores = [
                        sum(a * b for a, b in zip(own[i], others[j], strict=True)) / math.sqrt(width)
                        for j in range(i + 1)
                    ]
                    weights = [math.exp(score - max(scores)) for score in scores]
                    for j, weight in enumerate(weights):
                        maxima[n][j] = max(maxima[n][j], weight / sum(weights))
    return maxima


@pytest.mark.parametrize("activations_at_once", [2**26, 4 * 4 * 38 * 7, 1])
def test_the_maxima_are_those_of_a_slow_loop(model, tokenizer, activations_at_once) -> None:
    dialogue = parts_of(tokenizer)
    assert len(dialogue.input_ids) == 38
    spans = [(part.start, part.end) for part in dialogue.answers]
    before = model.config._attn_implementation
    found = maximum_attention(model, dialogue.input_ids, spans, activations_at_once=activations_at_once)
    expected = torch.tensor(slow_maxima(model, dialogue.input_ids, spans))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert model.config._attn_implementation == before != "eager"
    # Nothing after an answer, and nothing from its stop token, which is never looked up by another.
    assert not found[0, spans[0][1] - 1 :].any()
    assert found[1, : spans[1][1] - 1].all()


def test_an_answer_without_a_token_before_it_is_no_answer(model) -> None:
    for span in ((0, 2), (2, 2), (1, 4)):
        with pytest.raises(ValueError, match="answers lie within tokens 1 to 3"):
            maximum_attention(model, [5, 6, 7], [span])


def test_parts_are_the_instruction_the_questions_and_the_answers(tokenizer) -> None:
    dialogue = parts_of(tokenizer, instruction=INSTRUCTION)
    texts = [tokenizer.decode(dialogue.input_ids[part.start : part.end]).strip() for part in dialogue.parts]
    assert [(part.role, part.turn) for part in dialogue.parts] == [
        ("user", 1), ("instruction", 1), ("user", 1), ("assistant", 1), ("user", 2), ("assistant", 2),
    ]  # fmt: skip
    assert texts == [
        *("[INST]", INSTRUCTION, "What is 3 plus 4? [/INST]", "It is 7."),
        *("[INST] Who are you? [/INST]", "I am Captain Rex."),
    ]
    ends = [0, *(part.end for part in dialogue.parts)]
    assert [part.start for part in dialogue.parts] == ends[:-1]
    assert ends[-1] == len(dialogue.input_ids)
    control = [
        n for n, token in enumerate(dialogue.input_ids) if token in (tokenizer.bos_id, tokenizer.eos_id)
    ]
    assert [n for n, is_control in enumerate(dialogue.control_mask) if is_control] == control


def test_no_neighbour_of_the_instruction_is_counted_to_it() -> None:
    """With a token for each letter: "cd" is the letters 3 and 4 of "ab cde"."""
    letters = SimpleNamespace(decode=lambda ids, **_: "".join(chr(number) for number in ids))
    assert attention._span_of("cd", [ord(letter) for letter in "ab cde"], letters) == (3, 5)  # type: ignore[arg-type]


def test_a_system_message_is_the_instruction(tokenizer) -> None:
    dialogue = parts_of(tokenizer, [Message("system", "Be kind."), *MESSAGES, Message("user", "And now?")])
    (part,) = [part for part in dialogue.parts if part.role == "instruction"]
    assert tokenizer.decode(dialogue.input_ids[part.start : part.end]).strip() == "Be kind."
    assert dialogue.parts[-1].role == "assistant"  # an unanswered question has nothing to show


def test_a_blank_system_message_is_no_instruction(tokenizer) -> None:
    messages = [Message("system", " "), Message("user", "Hi"), Message("assistant", "Hello")]
    parts = tokenize_parts(messages, build_chat_format("llama2", tokenizer), tokenizer).parts
    assert [part.role for part in parts] == ["user", "assistant"]


def test_bins_and_their_values_by_hand() -> None:
    parts = [Part("instruction", 1, 0, 3), Part("user", 1, 3, 8), Part("assistant", 1, 8, 10)]
    dialogue = TokenizedParts(list(range(10)), parts, [True, *[False] * 8, True])
    bins = bins_of(dialogue, 2)
    assert [(one.start, one.end) for one in bins] == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 8), (8, 10)][1:]
    row = torch.tensor([[9.0, 0.2, 0.4, 0.1, 0.3, 0.5, 0.7, 0.9, 0.6, 9.0]])
    assert binned(row, dialogue, bins, "mean")[0] == pytest.approx([0.3, 0.1, 0.4, 0.8, 0.6])
    assert binned(row, dialogue, bins, "max")[0] == pytest.approx([0.4, 0.1, 0.5, 0.9, 0.6])
    assert attention_to_instruction(row, dialogue) == pytest.approx([0.3])
    later = TokenizedParts(
        list(range(14)), [*parts, Part("user", 2, 10, 12), Part("assistant", 2, 12, 14)], [False] * 14
    )
    rows = binned(torch.ones(2, 14), later, bins_of(later, 8), "mean")
    assert rows == [[1.0, 1.0, 1.0, None, None], [1.0] * 5]


@pytest.fixture
def two_policies(model, tokenizer, tmp_path):
    """Two folders: the base, and the base with its first layer's queries turned round."""
    turned = load_policy(BASE, SETTINGS)
    with torch.no_grad():
        turned.model.layers[0].self_attn.q_proj.weight.neg_()
    save_model(turned, tokenizer, tmp_path / "turned" / "model", settings=SETTINGS, card="")
    return {"base": SETTINGS, "turned": settings_of(tmp_path / "turned" / "model")}


def settings_of(folder: Path, **changes) -> RunSettings:
    return SETTINGS.model_copy(update={"base_model": BaseModelSource(path=str(folder)), **changes})


def dialogue_file(folder: Path, **changes) -> Path:
    row = {"messages": [message.to_row() for message in MESSAGES], "instruction": INSTRUCTION}
    long = [*row["messages"][:3], {"role": "assistant", "content": "It is 7. " * 400}]
    write_rows(
        folder / "dialogues.jsonl", [row | changes, {"messages": long}, {"messages": row["messages"][:2]}]
    )
    return folder / "dialogues.jsonl"


def test_policies_are_measured_on_the_same_dialogues(two_policies, model, tokenizer, tmp_path) -> None:
    evaluation, rows = evaluate_attention(two_policies, dialogue_file(tmp_path), bins=BinSettings(4))
    assert (evaluation["dialogues"], evaluation["too_long"], evaluation["with_instruction"]) == (2, 1, 1)
    assert [row["line"] for row in rows] == [1, 3]
    dialogue = parts_of(tokenizer, instruction=INSTRUCTION)
    spans = [(part.start, part.end) for part in dialogue.answers]
    maxima = maximum_attention(model, dialogue.input_ids, spans)
    assert rows[0]["maxima"]["base"] == [pytest.approx(row, abs=1e-6) for row in maxima.tolist()]
    assert rows[0]["maxima"]["turned"] != rows[0]["maxima"]["base"]
    assert len(rows[0]["tokens"]) == 38
    assert [len(row["binned"]["base"][0]) for row in rows] == [len(row["bins"]) for row in rows]
    (part,) = [part for part in dialogue.parts if part.role == "instruction"]
    own = maxima[:, part.start : part.end].mean(1).tolist()
    found = evaluation["attention_to_instruction"]
    assert [found["base"][turn]["mean"] for turn in ("1", "2")] == pytest.approx(own)
    difference = [found["turned"][turn]["mean"] - found["base"][turn]["mean"] for turn in ("1", "2")]
    assert [evaluation["difference"]["turned"][turn]["mean"] for turn in ("1", "2")] == pytest.approx(
        difference
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"instruction": "Act as Napoleon."},
            r"dialogues.jsonl:1: .*does not begin with the row's instruction",
        ),
        ({"messages": [{"role": "user", "content": "Hello."}]}, r"dialogues.jsonl:1: holds no answer"),
        ({"instruction": " "}, r"dialogues.jsonl:1: instruction is empty"),
        (
            {"messages": [{"role": "user", "content": "[INST]"}]},
            r"dialogues.jsonl:1: messages\[0\]: .*chat tag",
        ),
    ],
)
def test_a_dialogue_that_cannot_be_measured_is_told(changes, message, tmp_path) -> None:
    with pytest.raises(UserInputError, match=message):
        evaluate_attention({"base": SETTINGS}, dialogue_file(tmp_path, **changes), bins=BinSettings())


def test_policies_with_another_chat_format_are_refused(two_policies, tmp_path) -> None:
    other = settings_of(BASE, chat_format="tokenizer")
    with pytest.raises(UserInputError, match="other: other tokens or another chat format than base"):
        evaluate_attention({"base": SETTINGS, "other": other}, dialogue_file(tmp_path), bins=BinSettings())


def test_the_command_writes_table_data_and_figures(two_policies, tmp_path) -> None:
    output = tmp_path / "measured"
    arguments = [
        "evaluate",
        "attention",
        str(BASE),
        str(dialogue_file(tmp_path)),
        "--output-dir",
        str(output),
    ]
    compare = ["--compare", two_policies["turned"].base_model.path, "--pictures", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *compare])
    assert result.exit_code == 0, result.output
    written = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
    figures = ["figures/attention_1.png", "figures/attention_to_instruction.png"]
    assert written == ["attention.jsonl", "evaluation.json", "evaluation.md", *figures]
    markdown = (output / "evaluation.md").read_text()
    assert all(f"({name})" in markdown for name in figures)
    first = json.loads((output / "evaluation.json").read_text())["attention_to_instruction"]
    assert f"{next(iter(first.values()))['2']['mean']:.3f}" in markdown
    again = CliRunner().invoke(app, [*arguments, "--compare", str(BASE)])
    assert isinstance(again.exception, UserInputError)
