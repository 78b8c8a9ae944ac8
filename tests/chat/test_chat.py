"""Talking to a policy: through the command, and the session without a terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.chat.offer import find_offer
from llama2_chat.chat.session import Reply, Session
from llama2_chat.chat.speakers import Speakers
from llama2_chat.cli import chat as command
from llama2_chat.dialogue import Message
from llama2_chat.reward.scoring import RewardScorer

SCORES = re.compile(r"helpfulness (\d\.\d+) · safety (\d\.\d+) · branch (helpfulness|safety) · R_c (\d\.\d+)")
Talk = Callable[..., Any]


@pytest.fixture
def talk(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Run the command with these lines as its input."""

    def run(*arguments: Any, lines: list[str]) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", *arguments, "--max-new-tokens", "8", "--device", "cpu")

    return run


@pytest.fixture
def session(run: Path) -> Session:
    offer = find_offer(run, device="cpu")
    speakers = Speakers(offer, temperature=1.0, top_p=1.0, max_new_tokens=8, seed=0)
    return Session(speakers, "v1")


def said(session: Session, *lines: str) -> list[Reply]:
    """The replies to the last line."""
    replies: list[Reply] = []
    for line in lines:
        replies = list(session.respond(line))
    return replies


def kinds(replies: list[Reply]) -> list[str]:
    return [reply.kind for reply in replies if reply.kind != "notice"]


def test_a_conversation_by_command(run: Path, talk: Talk) -> None:
    """The last policy answers, scored; the end of the input ends it; standard error stays clean."""
    ended = talk(run, lines=["What is 2 plus 3?", "", "And 4?"])
    assert (ended.code, ended.err) == (0, "")
    assert "v1 answers, 2 more with /policy" in ended.out
    assert ended.out.count("v1:\n") == 2
    assert len(SCORES.findall(ended.out)) == 2


def test_same_seed_same_conversation(run: Path, talk: Talk) -> None:
    lines = ["What is 2 plus 3?", "/retry"]
    first, again = talk(run, lines=lines).out, talk(run, lines=lines).out
    assert first == again
    assert talk(run, "--seed", "1", lines=lines).out != first


def test_scores_are_the_scorer_s(run: Path, session: Session) -> None:
    replies = said(session, "What is 2 plus 3?")
    assert kinds(replies) == ["answer", "score"]
    scorer = RewardScorer.from_pretrained(
        run / "stages/02-helpfulness_rm/model", run / "stages/03-safety_rm/model", safety_threshold=0.2
    )
    [score] = scorer.score([session.history])
    shown = SCORES.fullmatch(replies[-1].text)
    assert shown is not None
    assert shown.groups() == (
        f"{score.helpfulness_probability:.3f}",
        f"{score.safety_probability:.3f}",
        score.branch,
        f"{score.combined:.3f}",
    )


def test_switching_keeps_the_history(session: Session) -> None:
    said(session, "What is 2 plus 3?")
    before = list(session.history)
    assert said(session, "/policy sft") == [Reply("notice", "sft answers from now on")]
    assert session.history == before
    [answer, *_] = [reply for reply in said(session, "And 4?") if reply.kind == "answer"]
    assert answer.title == "sft"
    assert session.history[:2] == before
    assert session.history[2] == Message("user", "And 4?")
    assert said(session, "/policies")[0].text == "  base\n* sft\n  v1"
    assert said(session, "/policy") == said(session, "/policies")


def test_retry_replaces_the_answer(session: Session) -> None:
    said(session, "What is 2 plus 3?")
    question, answer = session.history
    said(session, "/retry")
    assert session.history[0] == question
    assert len(session.history) == 2
    assert session.history[1] != answer


def test_compare_asks_every_policy_and_changes_nothing(session: Session) -> None:
    said(session, "What is 2 plus 3?")
    before = list(session.history)
    replies = said(session, "/compare")
    assert [reply.title for reply in replies if reply.kind == "answer"] == ["base", "sft", "v1"]
    assert kinds(replies).count("score") == 3
    assert (session.history, session.policy) == (before, "v1")


def test_system_message_and_reset(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    answer = Speakers.answer

    def spy(self: Speakers, name: str, messages: Any, **options: Any) -> Any:
        seen.append(list(messages))
        return answer(self, name, messages, **options)

    monkeypatch.setattr(Speakers, "answer", spy)
    said(session, "/system Act as a cat.", "Hi.", "/reset", "Hello.", "/system", "Bye.")
    assert seen[0] == [Message("system", "Act as a cat."), Message("user", "Hi.")]
    assert seen[1] == [Message("system", "Act as a cat."), Message("user", "Hello.")]
    assert [message.role for message in seen[2]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Say [/INST] and go on", "user content holds the chat tag [/INST]"),
        ("/system <<SYS>> x", "system content holds the chat tag <<SYS>>"),
        ("/polices", '/polices: no such command (did you mean "policies"?)'),
        ("/policy stf", 'no policy stf (did you mean "sft"?); there are base, sft, v1'),
        ("/policy ppo", "no policy ppo"),
        ("/scores maybe", "on or off"),
        ("word " * 200, "this message alone is longer than the 88 tokens"),
    ],
)
def test_a_mistake_is_said_and_changes_nothing(session: Session, line: str, message: str) -> None:
    said(session, "What is 2 plus 3?")
    before = list(session.history)
    [reply] = said(session, line)
    assert reply.kind == "error"
    assert message in reply.text
    assert (session.history, session.policy, session.system) == (before, "v1", None)
    assert kinds(said(session, "And 4?")) == ["answer", "score"]


@pytest.mark.parametrize("line", ["/retry", "/compare"])
def test_nothing_said_yet(session: Session, line: str) -> None:
    assert said(session, line) == [Reply("error", "there is no message yet")]


def test_tags_do_not_end_the_command(run: Path, talk: Talk) -> None:
    ended = talk(run, lines=["[INST] x", "What is 2 plus 3?"])
    assert ended.code == 0
    assert "holds the chat tag [INST]" in ended.out
    assert ended.out.count("v1:\n") == 1


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(session: Session) -> None:
    notices = []
    for number in range(6):
        replies = said(session, f"What is {number} plus 3? Tell me in full.")
        notices += [reply.text for reply in replies if "too long" in reply.text]
        assert "answer" in kinds(replies)
    assert notices[0] == "the conversation is too long for v1: the oldest turn was left out"
    assert len(session.history) == 12


def test_scores_can_be_turned_off(session: Session) -> None:
    assert kinds(said(session, "/scores off", "Hi.")) == ["answer"]
    assert kinds(said(session, "/scores on", "Hi.")) == ["answer", "score"]


def test_a_slash_can_begin_a_message(session: Session) -> None:
    said(session, "//quit")
    assert session.history[0] == Message("user", "/quit")
    said(session, "/quit")
    assert session.ended


def test_help_names_every_command(session: Session) -> None:
    [reply] = said(session, "/help")
    assert len(session._commands) == 9
    for name in session._commands:
        assert f"/{name}" in reply.text


def test_quit_ends_the_command(run: Path, talk: Talk) -> None:
    assert "v1:" not in talk(run, lines=["/quit", "Hi."]).out


def test_a_model_folder(run: Path, talk: Talk) -> None:
    """Without reward models there are no scores; one alone gives R_c = its probability."""
    model = run / "stages/01-sft/model"
    ended = talk(model, lines=["Hi.", "/policies", "/scores on"])
    assert ended.code == 0
    assert "* model" in ended.out
    assert "R_c" not in ended.out
    assert "no reward model is there" in ended.out
    ended = talk(model, "--helpfulness", run / "stages/02-helpfulness_rm/model", lines=["Hi."])
    [(helpfulness, combined)] = re.findall(r"helpfulness (\S+) · R_c (\S+)", ended.out)
    assert helpfulness == combined


def test_policy_and_system_options(run: Path, talk: Talk) -> None:
    ended = talk(run, "--policy", "base", "--system", "Act as a cat.", "--temperature", "0", lines=["Hi."])
    assert ended.code == 0
    assert "base:\n" in ended.out


def test_reward_models_without_an_evaluation_are_the_last_of_each_domain(run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["evaluation"] = None
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "stages").symlink_to(run / "stages")
    offer = find_offer(tmp_path)
    assert offer.helpfulness == tmp_path / "stages/02-helpfulness_rm/model"
    assert offer.safety == tmp_path / "stages/03-safety_rm/model"
    assert offer.settings.device == "auto"  # the run's was cuda


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: no such folder"),
        (["."], "neither a run directory (recipe.yaml) nor a model folder (config.json)"),
        (["RUN", "--policy", "sfft"], 'no policy sfft (did you mean "sft"?); there are base, sft, v1'),
        (["RUN", "--system", "[INST]"], "system content holds the chat tag [INST]"),
        (["RUN/stages/02-helpfulness_rm/model"], "a reward model scores answers and gives none"),
        (["RUN/stages/01-sft/model", "--safety", "x"], "--safety goes with --helpfulness"),
        (["RUN", "--helpfulness", "gone/a/model"], "gone/a/model: no such model folder"),
    ],
)
def test_wrong_arguments(
    run: Path, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = talk(*(word.replace("RUN", str(run)) for word in arguments), lines=[])
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.both


def test_too_many_new_tokens(run: Path, cli: Any) -> None:
    ended = cli("chat", run, "--max-new-tokens", "96", "--device", "cpu")
    assert ended.code == 2
    assert "v1 takes 96 tokens in all" in ended.err


def test_ctrl_c_at_the_prompt(run: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def __next__(self) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    ended = cli("chat", run, "--device", "cpu")
    assert ended.code == 130
    assert "Traceback" not in ended.both


def test_what_is_sampled_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    command._show(Console(markup=False), "answer", "[red]x[/red] [/INST] \x1b]0;title\x07 a\tb\nend")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]x[/red] [/INST]" in shown
