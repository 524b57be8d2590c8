"""What clients and operators can do to a server: leave, send half a request or too much, idle, flood, stop it."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from bitnet.serving.server import Server, Settings
from tests import ROOT, oracles
from tests.builders import save_run, tiny_model
from tests.serving.builders import running

httpx = oracles.require("httpx")
WAIT = 300.0
"""Seconds, of a machine that does other things too."""
get, post = partial(httpx.get, timeout=WAIT), partial(httpx.post, timeout=WAIT)
LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def request(path: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    ).encode() + body


def until(condition, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def strict(model):
    """A server with short times and small limits, and what is behind it."""
    with running(model, io_seconds=2.0, body_bytes=20_000, parallel=2, queue=2, api_keys=("secret", "other")) as (
        address,
        application,
    ):
        yield address, application


HEADERS = {"Authorization": "Bearer secret"}


def test_a_client_that_leaves_frees_its_place(strict, monkeypatch):
    address, application = strict
    (served,) = application.models
    metrics, step = served.scheduler.metrics, served.scheduler.step
    # Seconds for the text, so that it is being written while the client leaves.
    monkeypatch.setattr(served.scheduler, "step", lambda: (time.sleep(0.01), step())[1])
    for stream in (True, False):
        before = metrics.cancelled._value.get()
        with connect(address) as one:
            body = json.dumps({**LONG, "stream": stream}).encode()
            head = request("/v1/completions", body).replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer secret\r\n\r\n", 1)
            one.sendall(head)
            until(lambda: served.scheduler.counts[0] == 1)
        until(lambda wanted=before + 1: metrics.cancelled._value.get() == wanted)
        until(lambda: served.scheduler.counts[0] == 0)


def test_keys_are_wanted_everywhere_but_on_the_page(strict):
    address, _ = strict
    for path in ("/v1/models", "/metrics", "/nothing"):
        answer = get(address + path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("secre", "secrets", "s\u00e9cret"):
        assert get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code == 401
    assert get(f"{address}/v1/models", headers={"Authorization": "Basic secret"}).status_code == 401
    assert get(f"{address}/v1/models", headers={"Authorization": "bearer other"}).status_code == 200
    for path in ("/", "/page.js", "/theme.css", "/page.css", "/icon.svg", "/health", "/ready", "/openapi.json"):
        assert get(address + path).status_code == 200, path
    assert "default-src 'none'" in get(address).headers["content-security-policy"]


def test_only_names_of_this_machine_and_no_other_origin(address):
    assert get(f"{address}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert get(f"{address}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    answer = get(f"{address}/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert post(f"{address}/v1/completions", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"}).is_error


def test_a_page_that_may_use_the_server_reads_why_it_was_refused(model):
    """Refusals of the guard had no word of the page's origin: a browser hides such answers from it."""
    origin = {"Origin": "https://page.example"}
    with running(model, cors=("https://page.example",), api_keys=("secret",), body_bytes=100) as (address, _):
        for headers, text, status in (({}, "", 401), (HEADERS, "", 400), (HEADERS, " " * 200, 413)):
            answer = post(f"{address}/v1/completions", content=text, headers=headers | origin)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert httpx.options(f"{address}/v1/completions", headers=origin | asked).status_code == 200
        assert "access-control-allow-origin" not in get(f"{address}/health", headers={"Origin": "https://x"}).headers


def test_long_bodies_and_bodies_that_are_no_json(strict):
    address, _ = strict
    with connect(address) as one:  # what the headers announce is refused before it comes
        one.sendall(
            request("/v1/completions", b"{", 10_000_000).replace(
                b"\r\n\r\n", b"\r\nAuthorization: Bearer secret\r\n\r\n", 1
            )
        )
        assert b" 413 " in one.recv(1000)

    def pieces():
        for _ in range(100):
            yield b" " * 1000

    with contextlib.suppress(httpx.WriteError):  # the server need not read to the end
        assert post(f"{address}/v1/completions", content=pieces(), headers=HEADERS).status_code == 413
    bodies = [b"", b"[", b"[1]", b"null", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"1" * 5000, b"[" * 15_000]
    bodies += [b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "top_p": 1e999}']
    for body in bodies:
        answer = post(
            f"{address}/v1/completions", content=body, headers={**HEADERS, "Content-Type": "application/json"}
        )
        assert answer.status_code == 400, body[:40]
        assert answer.json()["error"]["message"]


def test_ten_megabytes_are_refused_to_a_client_that_sends_them_all(address):
    """Python's own client reads nothing before it has sent everything; a closed connection would break it."""
    client = http.client.HTTPConnection(address.removeprefix("http://"), timeout=WAIT)
    with contextlib.closing(client):
        for _ in range(3):  # on one connection
            client.request("POST", "/v1/completions", b" " * 10_000_000, {"Content-Type": "application/json"})
            answer = client.getresponse()
            assert answer.status == 413
            assert json.load(answer)["error"]["code"] == "too_long"
        client.request("GET", "/health")
        assert client.getresponse().status == 200


def test_half_a_request_is_given_up(strict):
    address, _ = strict
    authorized = b"Host: localhost\r\nAuthorization: Bearer secret\r\n"
    with contextlib.ExitStack() as stack:  # all of them at once
        half_body = stack.enter_context(connect(address))
        half_body.sendall(b"POST /v1/completions HTTP/1.1\r\n" + authorized + b"Content-Length: 100\r\n\r\n{")
        halves = (b"", b"POST /v1/comp", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        connections = [stack.enter_context(connect(address)) for _ in halves]
        for one, half in zip(connections, halves, strict=True):
            one.sendall(half)
        for one in connections:
            while one.recv(65536):
                pass
        assert b" 408 " in half_body.recv(1000)


def test_a_thousand_idle_connections_leave_room(model):
    if sys.platform == "win32":
        pytest.skip("no limit of open files here")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # both ends of every connection are in this process
    if 0 <= hard < 2500:
        pytest.skip(f"this system lets a process open {hard} files; the test needs 2,500")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2500), hard))
    try:
        with running(model, connections=1001) as (address, application), contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(connect(address))
            (served,) = application.models
            body = {"prompt": "x", "max_tokens": 8, "ignore_eos": True}
            for _ in range(3):  # each on a connection of its own, the last that there may be
                assert post(f"{address}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 8
            one = stack.enter_context(connect(address))
            until(lambda: httpx_refused(address))
            one.close()
            until(lambda: not httpx_refused(address))
            assert served.scheduler.counts[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_connection_waits_longer_than_clients_keep_theirs(model):
    with running(model) as (_, application):
        assert Server(application, Settings()).config.timeout_keep_alive > httpx.Limits().keepalive_expiry


def httpx_refused(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code != 200
    except httpx.TransportError:
        return True


def test_a_client_that_does_not_read_is_left(strict):
    address, application = strict
    (served,) = application.models
    written = served.scheduler.metrics.new_tokens._value
    before = written.get()
    with connect(address) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**LONG, "n": 2, "logprobs": 20, "max_tokens": 450}).encode()
        one.sendall(
            request("/v1/completions", body).replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer secret\r\n\r\n", 1)
        )
        until(lambda: written.get() > before)
        until(lambda: served.scheduler.counts[0] == 0)  # its texts are not held up, nor does anybody wait for it
        assert get(f"{address}/health").status_code == 200


def test_a_full_queue_is_refused(strict):
    address, application = strict
    (served,) = application.models
    statuses = []

    async def flood() -> None:
        async with httpx.AsyncClient(headers=HEADERS, timeout=WAIT) as client:
            body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True}
            answers = await asyncio.gather(*(client.post(f"{address}/v1/completions", json=body) for _ in range(12)))
            statuses.extend(answer.status_code for answer in answers)
            refused = [answer for answer in answers if answer.status_code == 429]
            assert all(
                answer.headers["retry-after"] and answer.json()["error"]["code"] == "queue_full" for answer in refused
            )

    asyncio.run(flood())
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 2
    assert served.scheduler.counts[0] == 0


def test_no_path_of_the_machine_in_an_answer(address):
    for place, body in (
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x", "name": "y"}] * 3, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 9000}], "max_tokens": 1}),
        ("/v1/models", None),
        ("/openapi.json", None),
        ("/metrics", None),
    ):
        answer = get(address + place) if body is None else post(address + place, json=body)
        assert "secret/place" not in answer.text
        assert str(ROOT) not in answer.text


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 can be reached .* --api-key"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", insecure=True).rules.hosts is None
    assert Settings(host="0.0.0.0", api_keys=("x",)).rules.api_keys == ("x",)
    for wrong in ({"api_keys": ("",)}, {"api_keys": (" x",)}, {"context": 1}, {"io_seconds": 0}, {"connections": -1}):
        with pytest.raises(ValueError, match="give"):
            Settings(**wrong)


@pytest.fixture(scope="module")
def process(tmp_path_factory, tokenizer):
    """`bitnet serve` as its own process: address, process, folder of its model."""
    run = save_run(
        tmp_path_factory.mktemp("runs") / "demo", tiny_model(vocab_size=512, max_position_embeddings=512), tokenizer
    )
    command = [sys.executable, "-m", "bitnet", "serve", f"demo={run}", "--port", "0", "--threads", "1"]
    server = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    line = server.stderr.readline()
    address = re.search(r"http://\S+", line)
    assert address, line
    threading.Thread(target=server.stderr.read, daemon=True).start()
    yield address[0], server, run
    server.kill()
    server.wait()


def test_a_model_that_is_gone_and_a_signal_in_mid_load(process):
    address, server, run = process
    for path in sorted(run.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    texts: list[str] = []
    asked_to_end = threading.Event()

    def ask(number: int) -> None:
        text = ""
        with httpx.stream("POST", f"{address}/v1/completions", json={**LONG, "seed": 1}, timeout=WAIT) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                lines[number].append(line)
                asked_to_end.wait(WAIT)
        texts.append(text)

    lines: list[list[str]] = [[], [], []]
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: all(lines))  # all of them are being written
    assert not all("data: [DONE]" in read for read in lines)
    server.send_signal(signal.SIGTERM)
    asked_to_end.set()
    for thread in threads:
        thread.join(WAIT)
    assert server.wait(WAIT) == -signal.SIGTERM
    assert all("data: [DONE]" in read for read in lines), "what ran was finished"
    assert len(set(texts)) == 1
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        http.client.HTTPConnection(address.removeprefix("http://")).request("GET", "/health")


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch, tokenizer):
    from bitnet.__main__ import main

    assert main(["serve", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), str(tmp_path)]) == 2
    assert "NAME=PATH" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err
    run = save_run(tmp_path / "demo", tiny_model(vocab_size=512), tokenizer)
    assert main(["serve", str(run), "--prompt-lookup-num-tokens", "64"]) == 2
    assert "prompt_lookup_num_tokens" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "bitnet.serving.server", raising=False)
    monkeypatch.delattr("bitnet.serving.server", raising=False)
    assert main(["serve", str(tmp_path)]) == 2
    assert "pip install -e '.[serve]'" in capsys.readouterr().err
