"""What vLLM says of models. Runs in an environment with vLLM and no absorb.

    python -P vllm_says.py JOB.json OUT.json

JOB has `models` (name to folder), `rows` of tokens, and `rounds` of timing. OUT has for each model
the log-probability of every token of the rows but the first, or why vLLM refused it, and tokens per
second: of a prefill of all rows, and of a decode behind them. All of it runs in this process, on
one thread, and seconds are those that this had a core: other work on the machine is not in them.
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

    prompts = [{"prompt_token_ids": row} for row in rows]
    seconds = {}
    for new in (1, NEW):
        wish = SamplingParams(max_tokens=new, min_tokens=new, temperature=0, ignore_eos=True)
        start = time.process_time()
        engine.generate(prompts, wish, use_tqdm=False)
        seconds[new] = time.process_time() - start
    read, written = sum(map(len, rows)), (NEW - 1) * len(rows)
    return {"prefill": read / seconds[1], "decode": written / (seconds[NEW] - seconds[1])}


def measured(engine: Any, rows: list[list[int]], rounds: int) -> dict[str, Any]:
    timed = [speed(engine, rows) for _ in range(rounds)]
    return {
        "said": log_probabilities(engine, rows),
        "architecture": engine.llm_engine.vllm_config.model_config.architectures[0],
        "tokens_per_second": {work: max(one[work] for one in timed) for work in timed[0]}
        if timed
        else {},
    }


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
    rows, found = job["rows"], {}
    for name, folder in job["models"].items():
        try:
            engine = opened(folder, max(map(len, rows)))
            found[name] = measured(engine, rows, job["rounds"])
        except Exception as error:  # of which vLLM has all kinds
            found[name] = {"refused": f"{type(error).__name__}: {error}"}
        else:
            close(engine)
    result = {"versions": {"vllm": version("vllm-cpu"), "torch": version("torch")}, "models": found}
    result["versions"]["transformers"] = version("transformers")
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
