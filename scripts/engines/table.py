"""Tables of what engines said, from the JSON that the scripts of this folder wrote."""

import re
from typing import Any

from absorb.show.tables import Row
from scripts.engines.pairs import cell


def vllm_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model: how far vLLM is from transformers, and how fast."""
    head = ("", "largest difference of a log-probability", "prefill", "decode")
    rows = [(name, *_row(one)) for name, one in done.get("families", {}).items()]
    rows += [(f"the demo, {kind}", *_row(one)) for kind, one in done.get("model", {}).items()]
    return [head, *rows]


def _row(one: dict[str, Any]) -> Row:
    if "refused" in one:
        return ("refused", "", "")
    speeds = (cell(one, work) for work in ("prefill", "decode"))
    return (f"{one['largest_difference']:.1e}", *speeds)


def engine_rows(vllm: dict[str, Any], stranger: dict[str, Any]) -> list[Row]:
    """A row for every engine: what to type, and how far it is from transformers."""
    head = ("", "command", "from transformers, nats")
    rows: list[Row] = [("transformers", '`from_pretrained("NATIVE")`', "")]
    commands = {
        "native": ("vLLM", "`vllm serve NATIVE`"),
        "custom": ("vLLM, as converted", "`vllm serve DIR --trust-remote-code`"),
    }
    for kind, words in commands.items():
        one = vllm["model"][kind]
        rows.append((*words, f"{one['largest_difference']:.0e}"))
    server = stranger["llama.cpp"]
    rows.append(("llama.cpp", "`llama-server -m FILES/*.gguf`", _apart(server["found"])))
    return [head, *rows]


def _apart(found: str) -> str:
    """The figure in what `absorb verify` says of a server that it found well."""
    figure = re.search(r"is (\S+) nats per token", found)
    assert figure
    return figure[1]


def stranger_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every engine: seconds of each command, and what is said of the server."""
    head = ("", "export", "serve", "ask", "what `absorb verify` says", "and without biases")
    rows = [
        (
            engine,
            *(f"{one['seconds'][step]:.0f} s" for step in ("export", "serve", "ask")),
            f"{_apart(one['found'])} nats per token" if one["verified"] else one["found"],
            one["found_without_biases"].removeprefix("absorb: ").partition(":")[0],
        )
        for engine, one in done.items()
    ]
    return [head, *rows]


def chain_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model by every recipe, as vLLM runs it."""
    head = ("", "perplexity", "MB", "prefill", "decode", "seconds of `oneshot`")
    return [head, *(_chain_row(name, run) for name, run in done["rows"].items())]


def _chain_row(name: str, run: dict[str, Any]) -> Row:
    seconds = run.get("oneshot_seconds")
    return (
        name,
        f"{run['perplexity']:.2f}",
        f"{run['bytes'] / 1e6:,.0f}",
        *(cell(run, work) for work in ("prefill", "decode")),
        "" if seconds is None else f"{seconds:.0f}",
    )


def four_bit_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model by every recipe of llm-compressor, as transformers computes it."""
    head = ("", "perplexity", "MB", "seconds of `oneshot`")
    return [
        head,
        *(
            (
                name,
                f"{run['perplexity']:.2f}",
                f"{run['bytes'] / 1e6:,.0f}",
                f"{run['oneshot_seconds']:.0f}",
            )
            for name, run in done["rows"].items()
        ),
    ]
