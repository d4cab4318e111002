"""What docs/serving.md shows runs against the server that it starts: the command, curl and the Python blocks."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_docs import DOCS, blocks
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

for name in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(name, reason=f"needs {name}")

PAGE = DOCS / "serving.md"
ADDRESS = "http://localhost:8000"


@pytest.fixture
def address(checkpoint, tmp_path):
    """Where the page's server is, with a question answering model in the folder that it names."""
    command = shlex.split(re.search(r"^roberta-fast serve .*", PAGE.read_text(), re.MULTILINE)[0])
    folder = tmp_path / command[command.index("--model") + 1]
    torch.manual_seed(0)
    AutoModelForQuestionAnswering.from_pretrained(checkpoint).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    command[0], command[command.index("--port") + 1] = str(Path(sys.executable).with_name(command[0])), "0"
    log = tmp_path / "log"
    with log.open("w") as output:
        running = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"running on (http://\S+)", log.read_text())):
            assert running.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        running.terminate()
        running.wait()


def test_the_page_runs(address, capsys):
    scope = {}
    for code, printed in blocks(PAGE):
        assert ADDRESS in code or "server." in code
        capsys.readouterr()
        exec(code.replace(ADDRESS, address), scope)
        assert printed is not None and capsys.readouterr().out == printed
    if shutil.which("curl"):
        command = re.search(r"^curl .*?'$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0].replace(ADDRESS, address)
        done = subprocess.run(["bash", "-c", f"{command} --silent --fail"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith('{"answer":')


def test_routes_and_options_that_the_page_names_exist():
    from roberta_fast.serving.server import _parser

    source = "".join(path.read_text() for path in (DOCS.parent / "roberta_fast/serving").glob("*.py"))
    text = PAGE.read_text()
    for path in set(re.findall(r"`(?:POST |GET )?(/[a-z0-9/-]*)`", text)) - {"/docs"}:
        assert f'"{path}"' in source, path
    options = set(_parser()._option_string_actions)
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options
