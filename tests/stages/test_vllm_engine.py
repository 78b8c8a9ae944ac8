"""The client of vLLM's server, its start and its end, against a stand-in that speaks the same protocol.

tests/long/test_vllm.py asks the real server.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig

from llama2_chat import interruption
from llama2_chat.errors import MissingFileError, SamplingServerError, UserInputError
from llama2_chat.generation import vllm_engine, vllm_server
from llama2_chat.generation.engine import Response
from llama2_chat.generation.vllm_engine import VllmEngine, seed_for_prompt
from llama2_chat.rejection_sampling import build
from llama2_chat.settings import SamplingConfig, VllmConfig

FAKE = Path(__file__).with_name("fake_vllm.py")
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=6)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment in which the stand-in is what the launcher starts."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    module = site_packages / "vllm" / "entrypoints" / "launchers" / "api_server" / "entry.py"
    module.parent.mkdir(parents=True)
    module.write_text(FAKE.read_text(encoding="utf-8"), encoding="utf-8")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(vocab_size=50, max_position_embeddings=40).save_pretrained(folder)
    return folder


@pytest.fixture
def requests_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "requests.jsonl"
    monkeypatch.setenv("FAKE_VLLM_REQUESTS", str(file))
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders have long names
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr("tempfile.tempdir", None)
        yield file


@pytest.fixture
def start(interpreter: str, model: Path, requests_file: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that starts an engine, with a fault; all are ended."""
    started: list[VllmEngine] = []

    def make(fault: str = "", **config) -> VllmEngine:
        monkeypatch.setenv("FAKE_VLLM", fault)
        settings = VllmConfig(python=interpreter, **config)
        started.append(VllmEngine(model, stop_id=2, dtype="float32", config=settings, eager=True))
        return started[-1]

    yield make
    for engine in started:
        engine.close()


def asked(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def expected(seed: int, room: int) -> Response:
    """What the stand-in says of a sample with this seed, worked out again."""
    stops = seed % 3 == 0 and room > 4
    ids = [3 + (seed + place) % 40 for place in range(3 if stops else room)] + ([2] if stops else [])
    return Response(ids, [-token / 100 for token in ids], "stop" if stops else "length")


def test_each_sample_has_its_place_and_a_seed_of_seed_prompt_and_number(start, requests_file: Path) -> None:
    engine = start()
    prompts = [[1, 9], [1, 4, 7], [1, 9]]
    rows = engine.generate(prompts, samples_per_prompt=4, sampling=SAMPLING, seed=5)
    assert rows == [[expected(seed_for_prompt(5, p) + k, 6) for k in range(4)] for p in prompts]
    assert len({seed_for_prompt(5, [1, 9]), seed_for_prompt(5, [1, 4, 7]), seed_for_prompt(6, [1, 9])}) == 3
    sent = sorted(asked(requests_file), key=lambda request: request["token_ids"])
    assert [request["token_ids"] for request in sent] == sorted(prompts)
    assert {request["path"] for request in sent} == {"/inference/v1/generate"}
    assert sent[0]["sampling_params"] == {
        "n": 4,
        "max_tokens": 6,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": seed_for_prompt(5, [1, 4, 7]),
        "logprobs": 0,
        "stop_token_ids": [2],
        "ignore_eos": True,
    }


def test_many_samples_are_asked_for_in_parts_and_stay_what_they_were(start, requests_file: Path) -> None:
    engine = start()
    (few,) = engine.generate([[1, 9]], samples_per_prompt=3, sampling=SAMPLING, seed=0)
    (many,) = engine.generate([[1, 9]], samples_per_prompt=600, sampling=SAMPLING, seed=0)
    assert many == [expected(seed_for_prompt(0, [1, 9]) + k, 6) for k in range(600)]
    assert few == many[:3]
    assert sorted(request["sampling_params"]["n"] for request in asked(requests_file)) == [3, 88, 256, 256]


@pytest.mark.parametrize(("step", "room"), [(2048, 2048), (10, 40)])
def test_prompts_are_computed_whole_on_a_cpu(start, monkeypatch, step: int, room: int) -> None:
    """None is split, and a step has room for one that fills the context of 40 tokens."""
    monkeypatch.setattr(vllm_engine, "_TOKENS_A_STEP", step)
    told = start()._server.log.read_text(encoding="utf-8")
    assert "--no-enable-chunked-prefill" in told
    assert f"--max-num-batched-tokens {room}" in told


def test_greedy_samples_are_asked_for_once(start, requests_file: Path) -> None:
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=6)
    (row,) = start().generate([[1, 9]], samples_per_prompt=3, sampling=greedy, seed=0)
    assert row == [expected(seed_for_prompt(0, [1, 9]), 6)] * 3
    assert [request["sampling_params"]["n"] for request in asked(requests_file)] == [1]


def test_a_response_ends_with_the_context_and_a_prompt_without_room_gets_an_empty_one(start) -> None:
    prompts = [[1] * 36, [1] * 40, [1] * 41]
    rows = start().generate(prompts, samples_per_prompt=2, sampling=SAMPLING, seed=1)
    assert rows[0] == [expected(seed_for_prompt(1, prompts[0]) + k, 4) for k in range(2)]
    assert rows[1:] == [[Response([], [], "length")] * 2] * 2
    shorter = start(max_model_len=10).generate([[1] * 8], samples_per_prompt=1, sampling=SAMPLING, seed=1)
    assert len(shorter[0][0].token_ids) == 2


@pytest.mark.parametrize(("prompt", "part"), [([1, 50], "token 50"), ([-1], "token -1"), ([], "no token")])
def test_a_prompt_that_would_end_the_engine_is_not_sent(start, requests_file, prompt, part: str) -> None:
    with pytest.raises(UserInputError, match=part):
        start().generate([prompt], samples_per_prompt=1, sampling=SAMPLING, seed=0)
    assert not requests_file.exists()


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("one_too_few", ["samples [1, 2] for 3"]),
        ("other_logprobs", ["other tokens"]),
        ("infinite", ["not finite"]),
        ("no_logprobs", ["TypeError"]),
        ("aborted", ["ended with abort after 1 of 6 tokens"]),
        ("beyond_the_stop", ["beyond the stop token"]),
        ("no_choices", ["KeyError: 'choices'", "make vllm-env"]),
        ("refuses", ["HTTP 400", "I will not"]),
        ("no_json", ["no JSON, found <html>"]),
        ("endless", ["longer than 76,336 bytes"]),
        ("breaks_off", ["no JSON, found"]),
        ("dies", ["the connection broke off", "RuntimeError: out of everything"]),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(start, fault: str, parts: list[str]) -> None:
    engine = start(fault)
    with pytest.raises(SamplingServerError) as caught:
        engine.generate([[1, 9]], samples_per_prompt=3, sampling=SAMPLING, seed=0)
    for part in parts:
        assert part in str(caught.value)


def test_the_log_that_an_error_names_is_left(start) -> None:
    engine = start("refuses")
    log = engine._server.log
    with pytest.raises(SamplingServerError, match=str(log)):
        engine.generate([[1, 9]], samples_per_prompt=3, sampling=SAMPLING, seed=0)
    engine.close()
    assert [file.name for file in log.parent.iterdir()] == ["log"]


def test_an_answer_is_waited_for_only_so_long(start) -> None:
    engine = start("hangs", timeout_seconds=0.5)
    with pytest.raises(
        SamplingServerError, match=r"no answer within 0.5 seconds; raise vllm.timeout_seconds"
    ):
        engine.generate([[1, 9]], samples_per_prompt=1, sampling=SAMPLING, seed=0)


def test_an_interruption_does_not_wait_for_the_answers(start, interrupted_after) -> None:
    engine = start("hangs")
    begin = time.monotonic()
    with interrupted_after(0):
        engine.generate([[1, 9]], samples_per_prompt=1, sampling=SAMPLING, seed=0)
    assert time.monotonic() - begin < 30


def test_a_server_that_does_not_start_shows_the_cause_and_the_end_of_its_log(start) -> None:
    with pytest.raises(SamplingServerError) as caught:
        start("does_not_start")
    message = str(caught.value)
    for part in ("did not start", "make vllm-env", "ValueError: the cause of it all", "line 39"):
        assert part in message
    assert "line 20" not in message
    (log,) = Path(os.environ["TMPDIR"]).glob("llama2-chat-vllm-*/*")
    assert str(log) in message
    assert "line 20" in log.read_text(encoding="utf-8")


def test_the_start_is_waited_for_only_so_long(start) -> None:
    with pytest.raises(SamplingServerError, match=r"not ready after 1 seconds; raise vllm.start_seconds"):
        start("never_ready", start_seconds=1)
    (log,) = Path(os.environ["TMPDIR"]).glob("llama2-chat-vllm-*/*")
    assert_gone(worker_in(log))


def test_an_environment_that_is_not_there(model: Path, tmp_path: Path) -> None:
    config = VllmConfig(python=str(tmp_path / "none" / "python"))
    with pytest.raises(MissingFileError, match=r"sampling.vllm.python: no interpreter .*make vllm-env"):
        VllmEngine(model, stop_id=2, dtype="float32", config=config, eager=True)


def test_an_environment_without_vllm(start, model: Path) -> None:
    config = VllmConfig(python=sys.executable)
    with pytest.raises(SamplingServerError, match=r"(?s)make vllm-env.*No module named 'vllm|ModuleNotFound"):
        VllmEngine(model, stop_id=2, dtype="float32", config=config, eager=True)


def test_more_than_the_models_context_is_refused(start) -> None:
    with pytest.raises(UserInputError, match=r"max_model_len: 41 is more than the context .* 40 tokens"):
        start(max_model_len=41)


def test_a_folder_for_sockets_with_too_long_a_name(start, tmp_path: Path, monkeypatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(UserInputError, match="TMPDIR"):
        start()
    assert list(long.iterdir()) == []


@pytest.mark.parametrize("fault", ["", "stubborn"])
def test_closing_leaves_no_process_and_no_file(start, fault: str) -> None:
    engine = start(fault)
    log = engine._server.log
    worker = worker_in(log)
    os.kill(worker, 0)
    engine.close()
    engine.close()
    assert_gone(worker)
    assert not log.parent.exists()
    with pytest.raises(SamplingServerError, match="has been ended"):
        engine.generate([[1]], samples_per_prompt=1, sampling=SAMPLING, seed=0)


def test_loading_another_model_starts_another_server(start, model: Path) -> None:
    engine = start()
    worker = worker_in(engine._server.log)
    engine.load(model)
    assert_gone(worker)
    assert worker_in(engine._server.log) != worker
    engine.generate([[1, 9]], samples_per_prompt=1, sampling=SAMPLING, seed=0)


@pytest.mark.parametrize(("victim", "fault"), [("client", ""), ("client", "stubborn"), ("launcher", "")])
def test_whoever_is_killed_leaves_no_server(
    interpreter, model, requests_file, monkeypatch, victim: str, fault: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", fault)
    script = (
        "import sys, time\n"
        "from llama2_chat.generation.vllm_server import VllmServer\n"
        "from llama2_chat.settings import VllmConfig\n"
        "server = VllmServer(sys.argv[1], VllmConfig(python=sys.argv[2]), arguments=[], offline=True)\n"
        "print(server._process.pid, server.log, flush=True)\n"
        "time.sleep(300)\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script, str(model), interpreter], stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        launcher, log = client.stdout.readline().split()
        server = server_of(int(launcher))
        os.kill(client.pid if victim == "client" else int(launcher), signal.SIGKILL)
        assert_gone(server)
        if victim == "client":
            assert_gone(int(launcher))
            assert_gone(worker_in(Path(log)))
    finally:
        client.kill()
        client.wait()


def test_the_server_hears_nothing_of_the_callers_python(start, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = vllm_server._environment(Path("/private"), offline=True)
    assert not [name for name in environment if name.startswith("PYTHON")]
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_RPC_BASE_PATH"] == "/private"


def test_rejection_sampling_writes_what_the_server_sampled(
    rejection_config, settings, stage_at, interpreter, requests_file, sft
) -> None:
    sampling = {
        "temperature": 1.0,
        "max_new_tokens": 16,
        "backend": "vllm",
        "vllm": {"python": interpreter},
    }
    directory = stage_at("rejection_by_server")
    metrics = build.run_stage(rejection_config(sampling=sampling), settings, directory)
    rows = [json.loads(line) for line in directory.samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 900
    assert metrics["selection"]["prompts"] == 300
    assert len(asked(requests_file)) == 300
    assert {row["status"] for row in rows} <= {"complete", "cut_off", "empty"}
    assert directory.model.is_dir()


def server_of(launcher: int) -> int:
    """The launcher's child."""
    return int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[0])


def worker_in(log: Path) -> int:
    (line,) = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("worker ")]
    return int(line.split()[1])


def assert_gone(process: int) -> None:
    """It may take a moment, and longer on a busy machine."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} is still there")


@pytest.fixture(autouse=True)
def _no_signal_pending():
    yield
    interruption.reset()
