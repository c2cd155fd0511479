"""`finemoe serve` as a process: a tiny model through the real worker, signals, and what docs/serving.md shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import openai
import pytest

from finemoe.cli import INTERRUPTED, main
from finemoe.config import LoadConfig
from finemoe.serving.config import ServeConfig
from finemoe.serving.server import reserve
from tests.chat_model import make_chat_model

Capture = pytest.CaptureFixture[str]
DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
MAIN = "import sys; from finemoe.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("serve") / "my-model")


@dataclass
class Process:
    """A server that has said where it is."""

    popen: subprocess.Popen[str]
    name: str
    url: str
    errors: list[str]
    clients: ExitStack

    def client(self) -> openai.OpenAI:
        """Closed with the server."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        return self.clients.enter_context(client)

    def end(self, number: int) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(60)


@contextmanager
def process(folder: Path, *flags: str) -> Iterator[Process]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FINEMOE_CACHE": str(folder / "cache")}
    popen = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", *flags, "--port", "0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout is not None
    assert popen.stderr is not None
    errors: list[str] = []
    listener = threading.Thread(target=errors.extend, args=(popen.stderr,), daemon=True)
    listener.start()
    try:
        name, _, url = popen.stdout.readline().strip().partition(" at ")
        assert url, errors
        with ExitStack() as clients:
            yield Process(popen, name, url, errors, clients)
    finally:
        popen.kill()
        popen.wait()
        listener.join(10)
        popen.stdout.close()
        popen.stderr.close()


def refused(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.rstrip("\n").rpartition("\n")[2].removeprefix("finemoe: error: ")


@pytest.mark.usefixtures("own_process")
def test_bad_input_is_refused_before_a_model_is_loaded(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "--model", "/no/where"
    with reserve(ServeConfig(port=0)) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert refused(capsys, "serve", *where, "--port", port).startswith(
            f"--port: can't listen on 127.0.0.1 port {port}"
        )
    assert refused(capsys, "serve", *where, "--port", "70000").startswith("--port: 70000")
    assert refused(capsys, "serve", *where, "--request-timeout-s", "nan").startswith("--request-timeout-s: nan")
    assert refused(capsys, "serve", *where, "--api-key-file", "/no/key").startswith("--api-key-file: ")
    assert refused(capsys, "serve", *where, "--port", "0").startswith("--model: ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert refused(capsys, "serve", *where) == "serve: uvicorn not installed; pip install 'finemoe[serve]'"


def test_every_setting_is_a_flag_and_documented(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help-all"])
    output = " ".join(capsys.readouterr().out.split())
    for field in [*fields(LoadConfig), *fields(ServeConfig)]:
        assert "--" + field.name.replace("_", "-") in output
    for field in fields(ServeConfig):
        assert f"`--{field.name.replace('_', '-')}`" in DOCUMENT


def test_sigterm_lets_a_stream_finish(model: Path) -> None:
    with process(model.parent, "--model", str(model), "--expert-memory", "50%") as server:
        stream = server.client().completions.create(
            model=server.name, prompt="Hi", max_tokens=300, temperature=0, stream=True
        )
        next(iter(stream))
        server.popen.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in {"stop", "length"}
        assert server.popen.wait(60) == 0
    lines = [json.loads(line) for line in server.errors]  # no progress bar, no library's notice
    assert [line["event"] for line in lines] == ["draining", "request", "drained"]
    assert lines[1]["outcome"] == "finished"


def test_ctrl_c_ends_it_with_one_line(model: Path) -> None:
    with process(model.parent, "--model", str(model)) as server:
        assert server.end(signal.SIGINT) == INTERRUPTED
    assert server.errors[-1] == "finemoe: interrupted\n"
    assert "Traceback" not in "".join(server.errors)


def test_the_page_follows_an_answer(model: Path) -> None:
    def read(server: Process, path: str) -> bytes:
        with urllib.request.urlopen(server.url + path, timeout=60) as response:
            content: bytes = response.read()
            return content

    with process(model.parent, "--model", str(model), "--expert-memory", "50%") as server:
        assert b"<title>finemoe</title>" in read(server, "/")
        server.client().completions.create(model=server.name, prompt="Hi", max_tokens=40, temperature=0)
        experts = json.loads(read(server, "/v1/experts"))
        assert sum(experts["hits"]) + sum(experts["misses"]) > 0
        deadline_s = time.monotonic() + 30
        while not any((samples := json.loads(read(server, "/v1/live"))["samples"])["tok_s"]):
            assert time.monotonic() < deadline_s, "no sample tells of the answer"
            time.sleep(0.1)
        assert any(ttft_s is not None for ttft_s in samples["ttft_s"])


def test_the_document_is_right(model: Path) -> None:
    shells = re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    command = next(line for line in shells[0].splitlines() if line.startswith("finemoe serve "))
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    with process(model.parent, *shlex.split(command)[2:]) as server:
        assert server.name == "my-model"

        def here(text: str) -> str:
            return text.replace("http://127.0.0.1:8000", server.url)

        subprocess.run([sys.executable, "-c", here(code)], check=True, timeout=120)
        if shutil.which("curl"):
            answer = subprocess.run(
                ["bash", "-c", here(shells[1])],
                check=True,
                timeout=120,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert json.loads(answer.stdout)["object"] == "chat.completion"
