"""A conversation: the history, the policy that answers, and the commands; knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llama2_chat.chat.speakers import Speakers, Spoken
from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError, did_you_mean

if TYPE_CHECKING:
    from llama2_chat.reward.scoring import Score

HELP = """\
/policy [NAME]   list the policies, or go on with another one (the history stays)
/policies        list the policies
/compare         every policy's answer to the last message; the history stays as it is
/retry           another answer to the last message
/system [TEXT]   set the system message; without TEXT: none
/reset           forget the conversation (the system message stays)
/scores on|off   show the reward models' scores of each answer
/help            this list
/quit            end (so does the end of the input)
A message that begins with / is written with two: //like this."""

_STATUS = {
    "cut_off": "cut off at the limit of new tokens",
    "chat_tag": "went on with a chat tag; cut off there",
    "empty": "an empty answer",
}


@dataclass(frozen=True)
class Reply:
    """One thing to show. `title` is the policy's name above an answer."""

    kind: Literal["answer", "score", "notice", "error"]
    text: str
    title: str = ""


class Session:
    """A conversation with one policy at a time."""

    def __init__(self, speakers: Speakers, policy: str, system: str | None = None) -> None:
        """Raises UserInputError for an unknown policy, ChatTagError for tags in the system message."""
        self.speakers = speakers
        self.policy = speakers.offer.check(policy)
        self.system = Message("system", system) if system else None
        self.history: list[Message] = []
        """User and assistant in turn, without the system message."""
        self.show_scores = speakers.can_score
        self.ended = False
        self._draws = 0
        self._dropped_turns = 0
        self._commands: dict[str, Callable[[str], Iterator[Reply]]] = {
            "policy": self._policy,
            "policies": lambda _: self._policies(),
            "compare": lambda _: self._compare(),
            "retry": lambda _: self._retry(),
            "system": self._system,
            "reset": lambda _: self._reset(),
            "scores": self._scores,
            "help": lambda _: iter([Reply("notice", HELP)]),
            "quit": lambda _: self._quit(),
        }

    def respond(self, line: str) -> Iterator[Reply]:
        """What one line of the user brings about; a mistake is a reply of kind "error" and changes nothing."""
        text = line.strip()
        if not text:
            return
        try:
            if text.startswith("/") and not text.startswith("//"):
                yield from self._command(text)
            else:
                yield from self._message(text.removeprefix("/") if text.startswith("//") else text)
        except UserInputError as error:
            yield Reply("error", str(error))

    def _command(self, text: str) -> Iterator[Reply]:
        name, _, argument = text[1:].partition(" ")
        if name not in self._commands:
            raise UserInputError(
                f"/{name}: no such command{did_you_mean(name, self._commands)}; /help lists them"
            )
        yield from self._commands[name](argument.strip())

    def _message(self, text: str) -> Iterator[Reply]:
        user = Message("user", text)
        spoken = self._ask(self.policy, [*self.history, user])
        # Only now: a message that could not be answered is not part of the conversation.
        self.history += [user, Message("assistant", spoken.answer.text)]
        yield from self._shown(self.policy, spoken)

    def _retry(self) -> Iterator[Reply]:
        self._need_a_message()
        spoken = self._ask(self.policy, self.history[:-1])
        self.history[-1] = Message("assistant", spoken.answer.text)
        yield from self._shown(self.policy, spoken)

    def _compare(self) -> Iterator[Reply]:
        self._need_a_message()
        self._draws += 1
        for name in self.speakers.offer.policies:
            yield from self._shown(name, self._ask(name, self.history[:-1], same_draw=True))

    def _ask(self, policy: str, messages: list[Message], *, same_draw: bool = False) -> Spoken:
        if not same_draw:
            self._draws += 1
        system = [self.system] if self.system else []
        return self.speakers.answer(policy, [*system, *messages], draw=self._draws, scored=self.show_scores)

    def _shown(self, policy: str, spoken: Spoken) -> Iterator[Reply]:
        if spoken.dropped_turns and spoken.dropped_turns != self._dropped_turns:
            turns = "turn was" if spoken.dropped_turns == 1 else f"{spoken.dropped_turns} turns were"
            yield Reply("notice", f"the conversation is too long for {policy}: the oldest {turns} left out")
        self._dropped_turns = spoken.dropped_turns
        yield Reply("answer", spoken.answer.text, policy)
        if spoken.answer.status in _STATUS:
            yield Reply("notice", _STATUS[spoken.answer.status])
        if spoken.score is not None:
            yield Reply("score", score_line(spoken.score))
        elif spoken.unscored_because:
            yield Reply("notice", f"not scored: {spoken.unscored_because}")

    def _policy(self, name: str) -> Iterator[Reply]:
        if not name:
            yield from self._policies()
            return
        self.speakers.load(name)
        self.policy = name
        yield Reply("notice", f"{name} answers from now on")

    def _policies(self) -> Iterator[Reply]:
        names = self.speakers.offer.policies
        lines = (f"{'*' if name == self.policy else ' '} {name}" for name in names)
        yield Reply("notice", "\n".join(lines))

    def _system(self, text: str) -> Iterator[Reply]:
        self.system = Message("system", text) if text else None
        yield Reply("notice", "system message set" if text else "no system message")

    def _reset(self) -> Iterator[Reply]:
        self.history, self._dropped_turns = [], 0
        yield Reply("notice", "the conversation starts anew")

    def _scores(self, state: str) -> Iterator[Reply]:
        if state not in ("on", "off"):
            raise UserInputError(f"/scores {state}: on or off")
        if state == "on" and not self.speakers.can_score:
            raise UserInputError("no reward model is there; start with --helpfulness MODEL [--safety MODEL]")
        self.show_scores = state == "on"
        yield Reply("notice", f"scores {state}")

    def _quit(self) -> Iterator[Reply]:
        self.ended = True
        return iter(())

    def _need_a_message(self) -> None:
        if not self.history:
            raise UserInputError("there is no message yet")


def score_line(score: Score) -> str:
    """The reward models' word on an answer: probabilities, the branch of R_c and R_c itself."""
    parts = [f"helpfulness {score.helpfulness_probability:.3f}"]
    if score.safety_probability is not None:
        parts += [f"safety {score.safety_probability:.3f}", f"branch {score.branch}"]
    return " · ".join([*parts, f"R_c {score.combined:.3f}"])
