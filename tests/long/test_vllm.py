"""The real vLLM server against the transformers engine; without its environment these tests are skipped.

`make vllm-env` builds the environment, LLAMA2_CHAT_VLLM_PYTHON names another one's interpreter. SmolLM2-135M comes from
`make smollm2-135m`. A start takes about a minute on one CPU core.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llama2_chat.generation.backends import open_engine
from llama2_chat.generation.engine import GenerationEngine, Response
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.generation.vllm_engine import VllmEngine
from llama2_chat.logprobs import response_logprobs
from llama2_chat.models import load_policy
from llama2_chat.settings import (
    RunSettings,
    SamplingConfig,
    ServedSamplingConfig,
    VllmConfig,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
TOKENS = 32
QUESTIONS = [
    "What is 2 plus 2?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Who wrote Hamlet?",
]
TIE = 1e-2
"""Between two tokens whose log-probabilities lie closer than this, rounding may decide."""


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    python = Path(os.environ.get("LLAMA2_CHAT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"no {python}; make vllm-env builds vLLM's environment")
    return VllmConfig(python=str(python), max_model_len=512, kv_cache_gib=1.0)


@pytest.fixture(scope="module")
def model(smollm2: RunSettings) -> PreTrainedModel:
    return load_policy(smollm2.base_model.path, smollm2, gguf_file=smollm2.base_model.gguf_file)


@pytest.fixture(scope="module")
def served(config: VllmConfig, smollm2: RunSettings) -> Iterator[tuple[GenerationEngine, list[list[int]]]]:
    """vLLM on SmolLM2-135M, from its GGUF file, and prompts."""
    from llama2_chat.dialogue import Message

    sampling = ServedSamplingConfig(backend="vllm", vllm=config, max_new_tokens=TOKENS)
    with open_engine(smollm2.base_model.path, smollm2, sampling) as (engine, chat_format):
        yield engine, [chat_format.prompt_ids([Message("user", question)]) for question in QUESTIONS]


def test_greedy_text_is_that_of_the_transformers_engine_up_to_a_tie(served, model) -> None:
    engine, prompts = served
    theirs = TransformersEngine(model, stop_id=engine.stop_id, padding_id=0)
    found, wanted, share = greedy_up_to_a_tie(engine, theirs, prompts, TOKENS)
    assert found == wanted
    assert share > 0.3


def test_log_probabilities_are_the_models_at_temperature_one(served, model) -> None:
    engine, prompts = served
    sampling = SamplingConfig(temperature=0.8, top_p=0.9, max_new_tokens=TOKENS)
    rows = engine.generate(prompts, samples_per_prompt=4, sampling=sampling, seed=0)
    assert largest_error(model, prompts, rows) < 1e-3


def test_more_prompts_than_a_step_has_room_for(served) -> None:
    """With seeds a prompt that is computed in two steps would end the server on a CPU."""
    engine, prompts = served
    long = [(prompt * 20)[-300:] for prompt in prompts] + [(prompt * 30)[:450] for prompt in prompts]
    rows = engine.generate(long, samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=2), seed=3)
    assert [len(row) for row in rows] == [4] * len(long)


def test_samples_depend_on_seed_prompt_and_number(served) -> None:
    engine, prompts = served
    sampling = SamplingConfig(max_new_tokens=TOKENS)
    rows = ids_of(engine.generate(prompts, samples_per_prompt=6, sampling=sampling, seed=7))
    assert all(len({tuple(sample) for sample in row}) > 1 for row in rows)
    assert ids_of(engine.generate(prompts, samples_per_prompt=6, sampling=sampling, seed=7)) == rows
    assert ids_of(engine.generate(prompts, samples_per_prompt=6, sampling=sampling, seed=8)) != rows
    fewer = ids_of(engine.generate(prompts, samples_per_prompt=2, sampling=sampling, seed=7))
    agreement = [
        agreeing(a, b) for many, few in zip(rows, fewer, strict=True) for a, b in zip(many, few, strict=False)
    ]
    alone = [
        ids_of(engine.generate([prompt], samples_per_prompt=6, sampling=sampling, seed=7))[0]
        for prompt in prompts
    ]
    agreement += [
        agreeing(a, b) for row, same in zip(rows, alone, strict=True) for a, b in zip(row, same, strict=True)
    ]
    print(f"equal in other batches: {sum(agreement)} of {len(agreement)} samples")
    # The numbers drawn are the same in every batch; the logits are to their rounding, which may tip a close draw.
    assert sum(agreement) >= 0.9 * len(agreement)


def test_a_response_that_stops_ends_with_the_stop_token(served) -> None:
    engine, prompts = served
    sampling = SamplingConfig(temperature=0.5, max_new_tokens=64)
    rows = engine.generate(prompts, samples_per_prompt=2, sampling=sampling, seed=0)
    responses = [response for row in rows for response in row]
    assert {"stop", "length"} == {response.finish_reason for response in responses}
    for response in responses:
        assert engine.stop_id not in response.token_ids[:-1]
        assert (response.token_ids[-1] == engine.stop_id) == (response.finish_reason == "stop")
        assert (len(response.token_ids) == 64) or response.finish_reason == "stop"


def test_nothing_but_this_machine_can_reach_the_server(served) -> None:
    engine, _ = served
    members = processes_of(engine._server._process.pid)
    assert len(members) >= 3
    sockets = {
        str(link.readlink())
        for member in members
        for link in Path(f"/proc/{member}/fd").iterdir()
        if link.is_symlink()
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1].split(":")[0])
    assert set(listening) <= {"0100007F", "00000000000000000000000001000000"}


def test_another_models_weights_and_a_tokenizer_less_folder(config: VllmConfig, tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=160,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,
            )
        ).eval()
        made.save_pretrained(tmp_path / str(seed))
        models.append(made)
    prompts = [[1, first, 30, 41] for first in range(3, 11)]
    sampling = SamplingConfig(max_new_tokens=16)
    with VllmEngine(tmp_path / "0", stop_id=2, dtype="float32", config=config, eager=True) as engine:
        theirs = TransformersEngine(models[0], stop_id=2, padding_id=0)
        found, wanted, share = greedy_up_to_a_tie(engine, theirs, prompts, 16)
        assert found == wanted
        assert share > 0.3
        first = engine.generate(prompts, samples_per_prompt=3, sampling=sampling, seed=0)
        assert largest_error(models[0], prompts, first) < 1e-3
        begin = time.monotonic()
        engine.load(tmp_path / "1")
        print(f"another model's weights after {time.monotonic() - begin:.0f} s")
        second = engine.generate(prompts, samples_per_prompt=3, sampling=sampling, seed=0)
        assert largest_error(models[1], prompts, second) < 1e-3
        assert largest_error(models[0], prompts, second) > 0.1


def test_a_killed_client_leaves_no_server(config: VllmConfig, tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path / "model")
    script = (
        "import sys, time, json\n"
        "from llama2_chat.generation.vllm_engine import VllmEngine\n"
        "from llama2_chat.settings import VllmConfig\n"
        "config = VllmConfig(**json.loads(sys.argv[2]))\n"
        "engine = VllmEngine(sys.argv[1], stop_id=2, dtype='float32', config=config, eager=True)\n"
        "print(engine._server._process.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    arguments = [str(tmp_path / "model"), json.dumps(config.model_dump())]
    client = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        group = int(client.stdout.readline())
        assert len(processes_of(group)) >= 3
        client.send_signal(signal.SIGKILL)
        limit = time.monotonic() + 120
        while processes_of(group) and time.monotonic() < limit:
            time.sleep(0.2)
        assert processes_of(group) == []
    finally:
        client.kill()
        client.wait()


def greedy_up_to_a_tie(
    ours: GenerationEngine, theirs: TransformersEngine, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], list[list[int]], float]:
    """Greedy responses of both, cut where the two best log-probabilities first lie within TIE.

    Last comes the share of theirs that is left.
    """
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=tokens)
    rows = ours.generate(prompts, samples_per_prompt=1, sampling=greedy, seed=0)
    expected = theirs.generate(prompts, samples_per_prompt=1, sampling=greedy, seed=0)
    found, wanted = [], []
    for prompt, (our,), (their,) in zip(prompts, rows, expected, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + their.token_ids])
            best = theirs.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).topk(2).values
        ties = (best[:, 0] - best[:, 1] < TIE).nonzero()
        clear = int(ties[0]) if len(ties) else len(their.token_ids)
        found.append(our.token_ids[:clear])
        wanted.append(their.token_ids[:clear])
    compared, whole = sum(map(len, wanted)), sum(len(their.token_ids) for (their,) in expected)
    print(f"greedy: {compared} of {whole} tokens compared")
    return found, wanted, compared / whole


def largest_error(model: PreTrainedModel, prompts: list[list[int]], rows: list[list[Response]]) -> float:
    """Of the responses' log-probabilities, against a fresh forward pass."""
    flat = [(prompt, response) for prompt, row in zip(prompts, rows, strict=True) for response in row]
    again = response_logprobs(model, [p for p, _ in flat], [r.token_ids for _, r in flat], padding_id=0)
    error = max(
        abs(a - b)
        for (_, response), values in zip(flat, again, strict=True)
        for a, b in zip(response.logprobs, values, strict=True)
    )
    print(f"log-probabilities: largest error {error:.2g} over {sum(map(len, again))} tokens")
    return error


def ids_of(rows: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids for response in row] for row in rows]


def agreeing(first: list[int], second: list[int]) -> bool:
    return first == second


def processes_of(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(folder.name))
    return found
