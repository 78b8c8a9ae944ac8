"""`llama2-chat serve`: reward scores over HTTP."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from llama2_chat.cli.options import Device
from llama2_chat.errors import UserInputError


def serve(
    helpfulness: Annotated[Path, typer.Option(help="Helpfulness reward model folder")],
    safety: Annotated[Path | None, typer.Option(help="Safety reward model folder")] = None,
    safety_threshold: Annotated[
        float, typer.Option(help="Below this probability R_c is the safety score")
    ] = 0.15,
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the key")
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Let other machines in without a key")
    ] = False,
    model_name: Annotated[
        str | None, typer.Option(help="What answers call the model; default: the folders' names")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one request")] = 8 * 2**20,
    body_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a body to arrive")] = 30.0,
    max_dialogues: Annotated[int, typer.Option(min=1, help="In one request")] = 1024,
    max_messages: Annotated[int, typer.Option(min=2, help="In one dialogue")] = 256,
    max_characters: Annotated[int, typer.Option(min=1, help="In one dialogue")] = 200_000,
    queue_tokens: Annotated[
        int, typer.Option(min=1, help="While as many wait, requests are refused")
    ] = 262_144,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Scored at once; default: what suits the device")
    ] = None,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a request waits for others to share its batch")
    ] = 5.0,
) -> None:
    """Score dialogues over HTTP; docs/serving.md."""
    key = _checked(safety_threshold, host, api_key_env, allow_no_key)
    from llama2_chat.serving.limits import Limits
    from llama2_chat.serving.server import bind, run

    limits = Limits(
        body_bytes=max_body_bytes,
        body_seconds=body_timeout,
        dialogues=max_dialogues,
        messages=max_messages,
        characters=max_characters,
        queue_tokens=queue_tokens,
        batch_tokens=batch_tokens,
        batch_wait_seconds=batch_wait_ms / 1000,
    )
    # Before the models are loaded: a port that is taken should not be learnt minutes later.
    with bind(host, port) as listener:
        from llama2_chat.reward.scoring import RewardScorer
        from llama2_chat.serving.scoring import ScoringEngine, name_of
        from llama2_chat.serving.service import ScoringService

        scorer = RewardScorer.from_pretrained(
            helpfulness, safety, safety_threshold=safety_threshold, device=device
        )
        names = [name_of(path) for path in (helpfulness, safety) if path is not None]
        engine = ScoringEngine(scorer, name=model_name or "+".join(names))
        stopped_by = run(ScoringService(engine, limits, api_key=key), listener)
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        typer.echo(f"stopped by {name}; every request that was accepted has been answered", err=True)
        raise typer.Exit(128 + stopped_by)


def _checked(threshold: float, host: str, api_key_env: str | None, allow_no_key: bool) -> str | None:
    """The key, once everything that can be wrong without loading anything has been looked at."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserInputError(
            f"serve wants {' and '.join(missing)}, not installed here; pip install 'llama2-chat[serve]'"
        )
    if not 0 < threshold < 1:
        raise UserInputError(f"--safety-threshold: {threshold} is not between 0 and 1")
    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env, "").strip()
        if not key:
            raise UserInputError(
                f"--api-key-env: the environment variable {api_key_env} is not set or empty; put the key into it"
            )
    from llama2_chat.serving.server import is_loopback

    if key is None and not allow_no_key and not is_loopback(host):
        raise UserInputError(
            f"--host {host}: other machines could use this server without a key; give --api-key-env NAME, or "
            "--allow-no-key where the network keeps strangers out"
        )
    return key
