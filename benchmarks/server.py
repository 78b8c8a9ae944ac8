"""The scoring server under load, against offline scoring of the same dialogues on the same machine.

    LLAMA2_CHAT_DATA=DIR python benchmarks/server.py [--layers 2] [--dialogues 128] [--passes 2] [--minutes 0]

HH-RLHF harmless dialogues of at most 512 tokens (tokenizer and chat format of stories260K), scored by one reward
model of SmolLM2's shape with random weights. Clients in a process of its own send one dialogue a request over kept
connections: 1, 8 and 64 at a time, each dialogue `passes` times; then 64 go on for `minutes`, a line each minute.
Printed are p50 and p99 of the latency, requests (that is: dialogues) a second, their ratio to `RewardScorer.score` on
all dialogues at once in a process of its own, and the server's resident memory. Every score is compared with the
offline one; a request without an answer or with a wrong one makes the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from smollm2_shape import smollm2_shape
from transformers import LlamaForSequenceClassification

from llama2_chat import RewardScorer
from llama2_chat.data_import import import_hh_rlhf
from llama2_chat.dialogue import Dialogue
from llama2_chat.files import read_json, write_json
from llama2_chat.models import save_model
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.tokenizers import load_tokenizer

CLIENTS = (1, 8, 64)
TOLERANCE = 1e-5
MAX_TOKENS = 512
ROUNDS = 3


def data_folder() -> Path:
    folder = Path(os.environ.get("LLAMA2_CHAT_DATA", "../shared/data"))
    if not (folder / "hh-rlhf").is_dir():
        sys.exit(f"needs {folder / 'hh-rlhf'}; see the head of this file")
    return folder


def make_model(folder: Path, layers: int) -> None:
    """A reward model with random weights whose scores differ by whole units."""
    torch.manual_seed(0)
    shape = smollm2_shape(layers)
    shape.num_labels = 1
    shape.pad_token_id = 0
    model = LlamaForSequenceClassification(shape)
    model.score.weight.data.mul_(5)
    settings = RunSettings(base_model=BaseModelSource(path="-"), device="cpu")
    save_model(model, load_tokenizer(data_folder() / "stories260K"), folder, settings=settings, card="")


def dialogues_of(model: Path, count: int) -> list[list[dict[str, str]]]:
    """The first dialogues that are short enough."""
    scorer = RewardScorer.from_pretrained(model, device="cpu")
    file = data_folder() / "hh-rlhf" / "harmless-base.jsonl.gz"
    rows = (row for row in import_hh_rlhf(file, kind="dialogues") if isinstance(row, Dialogue))
    short = (row for row in rows if len(scorer.helpfulness.encode(row.messages)) <= MAX_TOKENS)
    return [row.to_row()["messages"] for row in islice(short, count)]


def offline(work: Path) -> dict[str, Any]:
    """Scores and rate of offline scoring, in this process; the median of several rounds."""
    dialogues = read_json(work / "dialogues.json")
    scorer = RewardScorer.from_pretrained(work / "model", device="cpu")
    rates = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        scores = scorer.score(dialogues)
        rates.append(len(dialogues) / (time.perf_counter() - started))
    tokens = sum(
        len(scorer.helpfulness.encode(Dialogue.from_row({"messages": d}).messages)) for d in dialogues
    )
    return {"rate": statistics.median(rates), "scores": [s.helpfulness for s in scores], "tokens": tokens}


async def load(work: Path, port: int, clients: int, passes: int, seconds: float) -> dict[str, Any]:
    """Send every dialogue `passes` times, or for so many seconds; what came back, in figures."""
    dialogues, expected = read_json(work / "dialogues.json"), read_json(work / "offline.json")["scores"]
    bodies = [json.dumps({"dialogues": [{"messages": d}]}).encode() for d in dialogues]
    head = "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    requests = [head.format(len(body)).encode() + body for body in bodies]
    end = time.perf_counter() + seconds
    turns = cycle(range(len(requests)))
    order = turns if seconds else islice(turns, passes * len(requests))
    latencies: list[float] = []
    wrong = sent = 0

    async def client() -> None:
        nonlocal wrong, sent
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in order:
            if seconds and time.perf_counter() > end:
                break
            started = time.perf_counter()
            sent += 1
            writer.write(requests[number])
            status, body = await read_answer(reader)
            latencies.append(time.perf_counter() - started)
            score = json.loads(body)["scores"][0]["helpfulness"] if status == 200 else float("inf")
            wrong += abs(score - expected[number]) > TOLERANCE
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    latencies.sort()
    return {
        "rate": len(latencies) / (time.perf_counter() - started),
        "sent": sent,
        "answered": len(latencies),
        "wrong": wrong,
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[len(latencies) * 99 // 100],
    }


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


def resident_mib(process: int) -> float:
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def in_another_process(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(work: Path, server: subprocess.Popen[str], port: int, passes: int, minutes: int) -> bool:
    """Run and print all loads; whether every request was answered and rightly."""
    base = read_json(work / "offline.json")["rate"]
    right = True
    in_another_process("--load", work, port, 64, 1, 0)  # warms up
    begun = resident_mib(server.pid)
    for clients, seconds in [(clients, 0) for clients in CLIENTS] + [(64, 60)] * minutes:
        found = in_another_process("--load", work, port, clients, passes, seconds)
        right = right and found["sent"] == found["answered"] and not found["wrong"]
        span = " for a minute" if seconds else ""
        print(
            f"{clients:2} clients{span}: {found['rate']:6.1f} requests/s, p50 {found['p50'] * 1000:.0f} ms, "
            f"p99 {found['p99'] * 1000:.0f} ms, {found['rate'] / base:.0%} of offline; {found['sent']} sent, "
            f"{found['answered']} answered, {found['wrong']} wrong; resident {resident_mib(server.pid):.0f} MiB",
            flush=True,
        )
    print(
        f"resident memory: {begun:.0f} MiB after the first load, {resident_mib(server.pid):.0f} MiB at the end"
    )
    return right


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dialogues", type=int, default=128)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--minutes", type=int, default=0)
    parser.add_argument("--offline", metavar="WORK", help="one measurement, as JSON")
    parser.add_argument("--load", nargs=5, metavar=("WORK", "PORT", "CLIENTS", "PASSES", "SECONDS"))
    arguments = parser.parse_args()
    if arguments.offline:
        print(json.dumps(offline(Path(arguments.offline))))
        return
    if arguments.load:
        work, port, clients, passes, seconds = arguments.load
        found = asyncio.run(load(Path(work), int(port), int(clients), int(passes), float(seconds)))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.layers)
        write_json(work / "dialogues.json", dialogues_of(work / "model", arguments.dialogues))
        found = in_another_process("--offline", work)
        write_json(work / "offline.json", found)
        tokens = found["tokens"] / arguments.dialogues
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"{torch.get_num_threads()} threads, {arguments.layers} layers, {arguments.dialogues} dialogues of "
            f"{tokens:.0f} tokens\noffline: {found['rate']:.1f} dialogues/s, {found['rate'] * tokens:,.0f} tokens/s",
            flush=True,
        )
        command = [sys.executable, "-m", "llama2_chat.cli.main", "serve", "--port", "0", "--device", "cpu"]
        with subprocess.Popen(
            [*command, "--helpfulness", str(work / "model")], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            try:
                port = int(server.stdout.readline().rpartition(":")[2])
                right = measure(work, server, port, arguments.passes, arguments.minutes)
            finally:
                server.terminate()
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
