"""Evaluating policies in a second process while the run trains the next one.

Small models use one processor core; another core that stands idle can judge the policies that are done. The process
writes the same files as an evaluation at the end of the run would, and that one takes what it finds. So
nothing depends on this process: where it fails or is killed, the rest is evaluated at the end.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2_chat import interruption
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.evaluation.run import PolicyEvaluator, evaluate_and_store, stored_metrics
from llama2_chat.progress import track
from llama2_chat.settings import RunSettings
from llama2_chat.stage import EventLog

_POLL_SECONDS = 0.2


class BackgroundEvaluation:
    """The process, seen from the run: it is given one policy after the other."""

    def __init__(
        self,
        config: EvaluationConfig,
        settings: RunSettings,
        *,
        sft: str | None,
        directory: Path,
        events: Path,
    ) -> None:
        self._directory = directory
        self._expected: dict[str, str] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which then ends this process
            text=True,
        )
        self._send(
            {
                "config": config.model_dump(mode="json"),
                "settings": settings.model_dump(mode="json"),
                "sft": sft,
                "directory": str(directory),
                "events": str(events),
            }
        )

    def submit(self, name: str, policy: Path | str, fingerprint: str) -> None:
        """Have a policy evaluated after those before it."""
        self._expected[name] = fingerprint
        self._send({"name": name, "policy": str(policy), "fingerprint": fingerprint})

    def wait(self) -> None:
        """Until everything is evaluated or the process has ended.

        Raises:
            Interrupted: a signal asked for the end; the process is ended too.
        """
        missing = set(self._expected)
        with track("evaluation", total=len(missing), unit="policies") as progress:
            while missing and self._process.poll() is None:
                interruption.raise_if_requested()
                found = {
                    name for name in missing if stored_metrics(self._directory, name, self._expected[name])
                }
                missing -= found
                progress.advance(len(found))
                time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                return

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it has ended; what is missing is evaluated at the end of the run


def main() -> None:
    """The process itself: evaluates what comes on standard input; ends when the run closes it or dies."""
    messages = _messages_from_standard_input()
    head = next(messages)
    evaluator = PolicyEvaluator(
        EvaluationConfig(**head["config"]), RunSettings(**head["settings"]), head["sft"]
    )
    directory = Path(head["directory"])
    for message in messages:
        if stored_metrics(directory, message["name"], message["fingerprint"]) is not None:
            continue
        evaluate_and_store(
            evaluator,
            message["name"],
            message["policy"],
            message["fingerprint"],
            directory=directory,
            events=EventLog(Path(head["events"])),
        )


def _messages_from_standard_input() -> Iterator[dict[str, Any]]:
    """One JSON object a line. A run that is gone ends this process at once, in the middle of a policy too."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


if __name__ == "__main__":
    main()
