"""`llama2-chat chat`: talk to a policy in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama2_chat.cli.options import LARGEST_SEED, Device

if TYPE_CHECKING:
    from rich.console import Console

    from llama2_chat.chat.session import Reply, Session

_STYLES = {"answer": "", "score": "cyan", "notice": "dim", "error": "red"}


def chat(
    place: Annotated[Path, typer.Argument(metavar="MODEL_OR_RUN", help="A run directory or a model folder")],
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Stage of the run, or base; default the last policy")
    ] = None,
    helpfulness: Annotated[
        Path | None, typer.Option(help="Helpfulness reward model folder; default the run's")
    ] = None,
    safety: Annotated[Path | None, typer.Option(help="Safety reward model folder; default the run's")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.9,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default 512, or half of what the model takes")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="The same input with the same seed is answered alike")
    ] = 0,
    device: Device = "auto",
) -> None:
    """Talk to a policy; /help lists the commands."""
    from llama2_chat.chat.offer import find_offer
    from llama2_chat.chat.session import Session
    from llama2_chat.chat.speakers import Speakers

    offer = find_offer(place, helpfulness=helpfulness, safety=safety, device=device)
    speakers = Speakers(offer, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    session = Session(speakers, policy or offer.last, system)
    speakers.load(session.policy)
    if speakers.can_score:
        speakers.scorer()
    _talk(session)


def _talk(session: Session) -> None:
    """The loop: a line in, its replies out, until /quit, the end of the input or Ctrl-C."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())
    interactive = sys.stdin.isatty()
    others = len(session.speakers.offer.policies) - 1
    more = f", {others} more with /policy" if others else ""
    _show(console, "notice", f"{session.policy} answers{more}; /help lists the commands")
    for line in _lines(interactive):
        try:
            for reply in session.respond(line):
                _show_reply(console, reply)
        except KeyboardInterrupt:
            # On a terminal this stops the answer; a second one, at the prompt, ends the session.
            if not interactive:
                raise
            _show(console, "notice", "stopped")
        if session.ended:
            break


def _lines(interactive: bool) -> Iterator[str]:
    """The user's lines; Ctrl-C at the prompt passes through, the end of the input ends them."""
    if not interactive:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        yield from sys.stdin
        return
    import readline  # noqa: F401  # gives `input` editing and a history

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            print(flush=True)
            if isinstance(end, KeyboardInterrupt):
                raise
            return


def _show_reply(console: Console, reply: Reply) -> None:
    if reply.title:
        _show(console, "notice", f"{reply.title}:")
    _show(console, reply.kind, reply.text)


def _show(console: Console, kind: str, text: str) -> None:
    from rich.text import Text

    # What a model writes must not steer the terminal.
    plain = "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    console.print(Text(plain, style=_STYLES[kind]))
