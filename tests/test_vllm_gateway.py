"""The gateway before vLLM's own server, on the CPU: ids in, ids out, over both of its routes, streamed and whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import episodes
import httpx
import pytest
import torch

from torchrl_chat import training_view
from torchrl_chat.gateway import Gateway, RemoteEngine, Settings
from torchrl_chat.training import sequence_log_probs

# Of several workers one starts the server, which takes a minute and more.
pytestmark = [
    pytest.mark.vllm, pytest.mark.full, pytest.mark.timeout(1500), pytest.mark.xdist_group("engine"),
]  # fmt: skip

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def model():
    return episodes.model()


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    """The address of a server of the tiny model."""
    pytest.importorskip("vllm", reason="vLLM is not installed here: run `make vllm`", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    episodes.tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--model", str(folder), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enable-scale-out",
        "--dtype", "float32", "--max-model-len", "1024", "--block-size", "32", "--logprobs-mode", "processed_logprobs",
        "--generation-config", "vllm", "--enforce-eager",
    ]  # fmt: skip
    log = folder / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as told,
        subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=told,
            stderr=told,
            env=environment,
        ) as process,
    ):
        url, waited = f"http://127.0.0.1:{port}", time.monotonic()
        try:
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                if time.monotonic() - waited > 900:
                    pytest.fail(log.read_text()[-4000:])
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield f"{url}/v1"
        finally:
            process.terminate()


def asked(session, messages: list[dict], stream: bool) -> str:
    """The content of the answer to a chat, whole or from its stream."""
    given = {"model": "tiny", "messages": messages, "max_tokens": 40, "stream": stream}
    reply = httpx.post(
        f"{session.base_url}/chat/completions",
        json=given,
        headers={"authorization": f"Bearer {session.api_key}"},
        timeout=120,
    )
    assert reply.status_code == 200, reply.text
    if not stream:
        return reply.json()["choices"][0]["message"]["content"] or ""
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for event in events for c in event["choices"])


@pytest.mark.parametrize("api", ["generate", "completions"])
def test_what_the_server_samples_is_trained_as_it_was_sampled(server, model, api):
    tokenizer = episodes.tokenizer()
    engine = RemoteEngine("tiny", server, "k", api=api, stop_ids={tokenizer.eos_token_id})
    settings = Settings(sampling={"temperature": TEMPERATURE})
    prompts = []
    with Gateway(engine, tokenizer, settings=settings) as gateway:
        sessions = [gateway.session(seed=seed) for seed in (1, 2, 1)]
        for session, stream in zip(sessions, (False, True, True), strict=True):
            messages: list[dict] = [{"role": "user", "content": "hello"}]
            for turn in range(3):
                content = asked(session, messages, stream)
                messages += [{"role": "assistant", "content": content}, {"role": "user", "content": f"and {turn}"}]
            assert session.report["counts"] == {"begins": 1}, session.report["findings"]
            session.finish(1.0)
            prompts.append(session.transcript)
        view = training_view(gateway.episodes(sessions), layout="padded")
    mask = view["masks"].all_assistant_mask
    assert mask.any(-1).all()
    scores = sequence_log_probs(model, view, temperature=TEMPERATURE).log_probs
    assert (scores - view["log_probs"].full)[mask].abs().max() < 1e-4
    # Streamed or whole, of one seed it is one episode.
    assert prompts[0].tokens.tolist() == prompts[2].tokens.tolist()
    assert torch.allclose(prompts[0].log_probs, prompts[2].log_probs, atol=1e-5)
