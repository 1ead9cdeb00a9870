"""Rows of the tables in README.md and EVIDENCE.md, from what JSON files in model_cards/ hold."""

from typing import Any

from absorb.show.tables import Row
from scripts.engines.pairs import cell
from scripts.release.accuracy import named
from scripts.trials.architectures import ALIKE

Run = dict[str, Any]


def wikitext(cpu: Run, gpu: Run) -> list[Row]:
    """WikiText-2 of the original and of conversions, each beside the original on its machine."""
    cpu = compared(cpu)
    return [
        ("", "perplexity", "W8A8 static", "largest |x|", "massive tokens"),
        ("original, on two CPU cores", *score_row(cpu["original"])),
        ("converted there", *score_row(cpu["converted"])),
        *((f"{name}, on an H200", *score_row(model)) for name, model in named(gpu).items()),
    ]


def compared(run: Run) -> Run:
    """The original and the converted model of what `absorb eval --json` printed.

    Files from before it took --calibration have the two under their names.
    """
    if "models" not in run:
        return run
    return {"converted" if m["converted"] else "original": m for m in run["models"]}


def score_row(score: Run) -> Row:
    formats = score["formats" if "formats" in score else "quantized"]
    return (
        f"{score['perplexity']:.2f}",
        f"{formats['w8a8-static']:.2f}",
        f"{score['stream_peak']:,.0f}",
        f"{score['massive_tokens']}",
    )


def attention(run: Run) -> list[Row]:
    """Time of sink attention as a multiple of the best stock attention without sinks / of eager."""
    lengths = sorted({case["length"] for case in run["cases"]})
    ratios: dict[str, dict[int, str]] = {}
    for case in run["cases"]:
        heads = f"{case['heads']}/{case['kv_heads']} heads of {case['head_dim']}"
        others = (case["ratios"].get(other) for other in ("best stock", "eager"))
        both = " / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in others)
        row = ratios.setdefault(f"{case['work']}, {case['dtype']}, {heads}", {})
        row[case["length"]] = both
    head = ("", *(f"{length}" for length in lengths))
    return [head, *((row, *(by[n] for n in lengths)) for row, by in ratios.items())]


def model(runs: dict[str, Run]) -> list[Row]:
    """Time of a converted model as a multiple of the original's, by the name of the machine."""
    shapes = [
        f"{device}, {run['dtype']}, {run['batch']} x {run['length']}"
        for device, run in runs.items()
    ]
    rows = [
        (work, *(f"{run[work]['ratios']['seconds']:.2f}" for run in runs.values()))
        for work in ("prefill", "decode", "training step")
    ]
    return [("", *shapes), *rows]


def sinks(run: Run) -> list[Row]:
    """What each form of a sink makes of the model, untrained."""
    names = ("original", "mean logits", "first fit", "sequential fit", "auto", "key")
    rows = [
        (name, f"{run[name]['perplexity']:.3f}", f"{run[name]['divergence']:.4f}") for name in names
    ]
    return [("", "perplexity", "KL from the teacher"), *rows]


def early_sink(run: Run) -> list[Row]:
    """What became of the early sink, and what that cost."""
    rows = [
        (name, f"{found['ratio']:.3f}", f"{found['kl']:.3f}", f"{found['token_ratio']:.1f}")
        for name, found in run.items()
        if name != "original"
    ]
    return [("", "perplexity", "KL", "largest token / median"), *rows]


def ablation(runs: dict[str, Run]) -> list[Row]:
    """What each choice of a conversion costs and brings, as multiples of the original."""
    names = ("perplexity", "w8a8-static", "w8a8-clipped", "w8a8-token")
    names += ("nvfp4", "mxfp4", "w4a4-hadamard")
    rows = [
        (
            name,
            f"{run['seconds']:.0f}",
            f"{run['converted']['divergence']:.4f}",
            *_ratios(run["ratios"], names),
            " ".join(map(str, run["prefix"])),
        )
        for name, run in runs.items()
    ]
    head = ("", "seconds", "KL", "perplexity", "W8A8 static", "clipped", "per token")
    return [(*head, "NVFP4", "MXFP4", "W4A4 rotated", "prefix"), *rows]


def small_models(models: dict[str, dict[str, Run]]) -> list[Row]:
    """What conversions make of small models, by name: multiples of the original in float."""
    head = ("", "perplexity", "after a BOS", "W8A8 static", "clipped", "per token")
    rows: list[Row] = [(*head, "largest |x| / median", "massive tokens", "weight on the first")]
    for name, runs in models.items():
        before = runs["untrained"]["original"]
        perplexities = {"perplexity": before["perplexity"], **before["quantized"]}
        ratios = {column: value / before["perplexity"] for column, value in perplexities.items()}
        rows.append((f"{name}, original", *_small(ratios, before)))
        for choice, run in runs.items():
            rows.append((f"{name}, {choice}", *_small(run["ratios"], run["converted"])))
    return rows


def _small(ratios: dict[str, float], score: Run) -> Row:
    names = ("perplexity", "perplexity after a BOS", "w8a8-static", "w8a8-clipped", "w8a8-token")
    return (
        *_ratios(ratios, names),
        f"{score['stream_ratio']:,.0f} x",
        f"{score['massive_tokens']}",
        f"{score['first_weight']:.3f}",
    )


def _ratios(ratios: dict[str, float], names: tuple[str, ...]) -> Row:
    return tuple(f"{ratios[name]:.4f}" if name in ratios else "" for name in names)


# What is said of a class for which nothing could be proved, and how it begins.
_OUTCOMES = {
    "listed": "has an entry",
    "derived": "derived and proved",
    "refused": "refused",
    "unmade": "not made tiny",
}


def architectures(run: Run) -> list[Row]:
    """Every causal class: what became of it, and the reason or how exact it is."""
    rows = [
        (f"`{one['model_type']}`{_given(one)}", _OUTCOMES[one["outcome"]], _standing(one))
        for outcome in _OUTCOMES
        for one in run["classes"]
        if one["outcome"] == outcome
    ]
    return [("architecture", "", "logits of the form `key` off by, or the reason"), *rows]


def _given(one: Run) -> str:
    """The settings that are not the defaults of a class, by the value that all layers have."""
    said = {name: value for name, value in one["settings"].items() if name != "is_decoder"}
    kinds = {name: value[0] if isinstance(value, list) else value for name, value in said.items()}
    return "".join(
        f", `{name}`{'' if isinstance(kind, dict) else f' {kind}'}" for name, kind in kinds.items()
    )


def _standing(one: Run) -> str:
    if one["key_form"] is None:
        return str(one["reason"]).replace("|", "/")
    left = "".join(f"; without {link.partition(':')[0]}" for link in one["left_out"])
    return f"{one['key_form']:.0e}{left}"


def count_of(run: Run) -> dict[str, int]:
    """How many classes came out in each way, and how many of them can be converted."""
    found = {name: sum(c["outcome"] == name for c in run["classes"]) for name in _OUTCOMES}
    converted = [c["cls"] for c in run["classes"] if c["outcome"] in ("listed", "derived")]
    return {
        **found,
        "converted": len(converted),
        "classes": len({*converted}),  # some architectures share one
        "of_one_kind": sum(c["model_type"] in ALIKE for c in run["classes"] if c["tests"]),
        "fine": sum(c["stranger"] == "fine" for c in run["classes"]),
        "all": len(run["classes"]),
    }


def windows(run: Run) -> list[Row]:
    """Perplexity of an original and its conversion by what every layer sees, and of what length."""
    names = [key.split(", ", 1) for key in run["rows"]]
    lengths = list(dict.fromkeys(name[1].rpartition(", ")[2] for name in names))
    ways = list(dict.fromkeys(name[1].rpartition(", ")[0] for name in names))
    head = ("", *(f"{int(length):,} tokens" for length in lengths))
    return [
        head,
        *(
            (f"{model}, {way}", *(_perplexity(run, f"{model}, {way}, {n}") for n in lengths))
            for way in ways
            for model in ("original", "converted")
        ),
    ]


def far(run: Run) -> list[Row]:
    """Perplexity of one long text, by what sinks were fitted to and by how far into the text."""
    spans = list(run["rows"]["original"]["parts"])
    spoken = (f"{int(a):,} to {int(b):,}" for a, b in (span.split("-") for span in spans))
    return [
        ("", "KL, nats", "all tokens", *spoken, "seconds of the fit"),
        *(
            (
                name,
                f"{one['kl']:.4f}" if "kl" in one else "",
                f"{one['perplexity']:.2f}",
                *(f"{one['parts'][span]:.2f}" for span in spans),
                f"{one['fit_seconds']:.0f}" if "kl" in one else "",
            )
            for name, one in run["rows"].items()
        ),
    ]


def _perplexity(run: Run, key: str) -> str:
    return f"{run['rows'][key]['perplexity']:.2f}" if key in run["rows"] else "–"


def engines(runs: dict[str, Run]) -> list[Row]:
    """The native export in engines: how far from transformers, and how fast beside the original."""
    head = ("", "largest difference of a log-probability", "prefill", "decode")
    return [
        head,
        *(
            (
                f"{engine}, {name}",
                f"{one['largest_difference']:.1e}",
                *(cell(one, work) for work in ("prefill", "decode")),
            )
            for engine, run in runs.items()
            for name, one in run["models"].items()
            if one["tokens_per_second"]
        ),
    ]


def onnx_float16(run: Run) -> list[Row]:
    """Planted models as ONNX in float16, before and after they are rescaled."""
    head = ("", "Clip nodes", "onnxruntime", "every result rounded")
    return [
        head,
        *(
            (
                name,
                f"{one['clips']}",
                *(_apart(one["apart"][r]) for r in ("onnxruntime", "reference")),
            )
            for name, one in run["models"].items()
        ),
    ]


def _apart(apart: float | None) -> str:
    return "no numbers" if apart is None else f"{apart:.4f}"
