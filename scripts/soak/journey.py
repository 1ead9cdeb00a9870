"""From a model to a stranger's generated text, by way of a Hub on this machine.

    python -m scripts.soak.journey                    a tiny random model
    python -m scripts.soak.journey pictures           one that reads pictures too
    python -m scripts.soak.journey demo --steps 0     a real one, with options of `absorb convert`

Converts, pushes, and then, in a process without absorb and with an empty cache, loads what was
pushed as its model card says, generates, loads it by `pipeline`; then verifies it. The logits
must be those of the folder to the bit. At last it exports a .gguf file, pushes and verifies that,
and llama.cpp must say of it what transformers says of the folder, where scripts/test_llama_cpp has
installed it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from tests.helpers import warm
from tests.helpers.fake_hub import TOKEN, USER, running

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = f"{USER}/journey"
ABSORB = [sys.executable, "-c", "from absorb.cli.main import main; main()"]

LOGITS = """
import hashlib, torch
tokens = torch.arange(5, 37)[None]
with torch.no_grad():
    logits = model.eval()(tokens).logits
digest = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
"""

HERE = f"""
import sys
import absorb
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
{LOGITS}
print(digest)
"""

# The model that the card loads.
AS_A_STRANGER = """
import json, re, sys
sys.modules["absorb"] = None  # as if it were not installed
from pathlib import Path
from huggingface_hub import hf_hub_download

repository, commit = sys.argv[1:]
card = Path(hf_hub_download(repository, "README.md", revision=commit)).read_text()
example = re.search("```python\\n(.*?)```", card, re.DOTALL)[1]
exec(example.replace("PATH_OR_REPO", repository).replace("COMMIT", commit))
assert type(model).__module__.startswith("transformers_modules.")
"""

STRANGER = f"""
{AS_A_STRANGER}
from transformers import pipeline

{LOGITS}
text = tokenizer("once upon a time", return_tensors="pt")
settings = dict(max_new_tokens=16, do_sample=False)
generated = tokenizer.decode(model.generate(**text, **settings)[0])
piped = pipeline(
    "text-generation", model=repository, revision=commit, trust_remote_code=True, device="cpu"
)
assert piped("once upon a time", **settings)[0]["generated_text"] == generated
print(json.dumps([digest, generated]))
"""

COMPARED = """
import json, subprocess, sys
from pathlib import Path
import absorb, numpy, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

folder, repository, place = sys.argv[1:]
file = next(Path(snapshot_download(repository)).glob("*.gguf"))
tokens, out = Path(place, "tokens.json"), Path(place, "logits.npy")
tokens.write_text(json.dumps([[*range(5, 37)]]))
command = [sys.executable, "-m", "scripts.engines.llama_cpp", "logits", file, tokens, out]
subprocess.run(command, check=True)
with torch.no_grad():
    ours = AutoModelForCausalLM.from_pretrained(folder).float().eval()(torch.arange(5, 37)[None])
theirs = torch.from_numpy(numpy.load(out)).log_softmax(-1)
print((theirs - ours.logits.log_softmax(-1)).abs().max().item())
"""

# The same of a model that reads pictures too: it says something of one.
PICTURE = """
import hashlib, torch
from PIL import Image

picture = Image.linear_gradient("L").convert("RGB")
given = processor(images=picture, text="what is <start> here", return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**given).logits
    plain = model(**{**given, "pixel_values": torch.zeros_like(given["pixel_values"])}).logits
assert not torch.equal(plain, logits), "the picture is not seen"
digest = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
"""

HERE_PICTURE = f"""
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
{PICTURE}
print(digest)
"""

STRANGER_PICTURE = f"""
{AS_A_STRANGER}
{PICTURE}
settings = dict(max_new_tokens=16, do_sample=False)
rows = [model.generate(**given, use_cache=use, **settings) for use in (True, False)]
assert torch.equal(*rows), "with a cache it says something else"
text = processor.tokenizer("once upon a time", return_tensors="pt")
model.generate(**text, **settings)
print(json.dumps([digest, processor.decode(rows[0][0])]))
"""


def main(model: str | None, *options: str) -> None:
    with TemporaryDirectory() as name, running(Path(name, "hub")) as hub:
        place = Path(name)
        out = place / "converted"
        scripts = (HERE_PICTURE, STRANGER_PICTURE) if model == "pictures" else (HERE, STRANGER)
        user = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "user")}
        source, tiny = model or "tiny", model in (None, "pictures")
        if not tiny:  # it may come from the real Hub
            fresh("convert", [*ABSORB, "convert", source, "--out", str(out), *options], {})
        os.environ.update(user)  # read once, by the process that all others are forked from
        if tiny:
            source = str(place / "tiny")
            warm.call(tiny_model, place, model is not None)
            plain = ("--steps", "0", "--sink", "logit", "--text", str(place / "text.txt"))
            run("convert", [*ABSORB, "convert", source, "--out", str(out), *plain], {})
        push = [*ABSORB, "push", str(out), REPOSITORY, "--json"]
        pushed = json.loads(run("push", push, {**user, "HF_TOKEN": TOKEN}))
        here = run("load here", [sys.executable, "-c", scripts[0], str(out)], {}).strip()
        stranger = {**user, "HF_HOME": str(place / "stranger")}
        command = [sys.executable, "-I", "-c", scripts[1], REPOSITORY, pushed["commit"]]
        there, text = json.loads(fresh("load as a stranger", command, stranger).splitlines()[-1])
        verify = [*ABSORB, "verify", REPOSITORY, "--revision", pushed["commit"]]
        print(run("verify", verify, {**user, "HF_HOME": str(place / "verifier")}), end="")
        assert here == there, f"the logits differ: {here} here, {there} there"
        print(f"logits equal to the bit: {here}\ngenerated: {text!r}")
        if model != "pictures":
            go_on_to_llama_cpp(out, place, user)


def go_on_to_llama_cpp(converted: Path, place: Path, user: dict[str, str]) -> None:
    repository, out = f"{REPOSITORY}-gguf", place / "gguf"
    words = ["--to", "gguf", "--type", "f32", "--out", str(out), "--tolerance", "1"]
    run("export", [*ABSORB, "export", str(converted), *words], {})
    run("push the export", [*ABSORB, "push", str(out), repository], {**user, "HF_TOKEN": TOKEN})
    engine = {**user, "HF_HOME": str(place / "engine")}
    print(run("verify the export", [*ABSORB, "verify", repository], engine), end="")
    installed = [*(ROOT / ".venv").glob("llama-cpp-*[0-9]")]
    if not installed:
        print("llama.cpp is not installed: run scripts/test_llama_cpp first")
        return
    command = [sys.executable, "-c", COMPARED, str(converted), repository, str(place)]
    path = {"PYTHONPATH": f"{ROOT}:{installed[-1]}"}
    apart = float(run("load by llama.cpp", command, engine | path).splitlines()[-1])
    assert apart < 1e-3, f"llama.cpp is {apart} nats from transformers"
    print(f"llama.cpp says the same to {apart:.1e} nats")


def tiny_model(place: Path, pictures: bool) -> None:
    import torch
    from transformers.utils import logging

    from tests.helpers.tiny import tiny
    from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer
    from tests.helpers.wrappers import saved_with_processor

    logging.disable_progress_bar()
    folder = place / "tiny"
    (place / "text.txt").write_text(letters(9_000))
    if pictures:
        saved_with_processor(folder)
        return
    tiny("llama", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def fresh(name: str, command: list[str], environment: dict[str, str]) -> str:
    """What a command prints in a Python that starts with nothing."""
    return run(name, command, environment, partial(subprocess.run, capture_output=True, text=True))


def run(
    name: str, command: list[str], environment: dict[str, str], ran: Callable[..., Any] = warm.run
) -> str:
    """What a command prints. Its progress is shown where it fails."""
    started = monotonic()
    done = ran(command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr}")
    print(f"{name}: {monotonic() - started:.1f} s")
    return done.stdout


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
