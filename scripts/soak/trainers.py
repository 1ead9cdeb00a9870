"""Train converted models with other people's trainers: save, reload, merge, and it is one model.

    scripts/test_trainers                             in an environment with peft and trl
    python -m scripts.soak.trainers llama gpt_neox    some architectures only

Converts tiny models, in logit and in key form. What follows runs in a process without absorb: peft
(LoRA on all matrices, on the embedding, and trained tokens), the Trainer of transformers, with the
weight decay of the model card, and TRL's SFTTrainer. Logits must be equal within float32.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "gemma3_text", "qwen3", "gpt_neox")
FORMS = ("logit", "key")
STEPS, RATE = 4, 1e-3
# Of the largest logit. A merge sums in another order, and a file holds the same numbers.
MERGED, SAVED = 2e-5, 0.0


def main(*families: str) -> None:
    with TemporaryDirectory() as name:
        convert_all(Path(name), families or FAMILIES)
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        quiet |= {"PYTHONWARNINGS": "ignore"}
        known = {**os.environ, **quiet, "HF_MODULES_CACHE": f"{name}/modules"}
        command = [sys.executable, "-m", "scripts.soak.trainers", "--in", name]
        sys.exit(subprocess.run(command, env=known, cwd=ROOT, stdin=subprocess.DEVNULL).returncode)


def convert_all(place: Path, families: tuple[str, ...]) -> None:
    """Tiny models with an outlier channel, as all real ones have, converted."""
    import pytest
    import torch
    from transformers.utils import logging

    import absorb
    from tests.conftest import shorten_texts
    from tests.helpers.tiny import tiny
    from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

    logging.disable_progress_bar()
    shorten_texts(pytest.MonkeyPatch())
    (place / "text.txt").write_text(letters(9_000))
    for family, form in product(families, FORMS):
        # Where the head is the embedding, what is done to one is done to the other.
        model = tiny(family, torch.float32, tie_word_embeddings=form == "logit")
        embedding = model.get_input_embeddings().weight.data
        embedding[:, 5] = 200 * embedding.abs().mean() * embedding[:, 5].sign()
        model.save_pretrained(place / family)
        tiny_tokenizer().save_pretrained(place / family)
        out = place / f"{family}-{form}"
        absorb.convert(place / family, out, text=place / "text.txt", steps=0, sink=form)
        report = json.loads((out / "absorb.json").read_text())
        assert report["inspection"]["residual_scales"], "no channel is scaled: nothing is tried"


# --- in a process without absorb -----------------------------------------------------------------


def train_all(place: Path) -> None:
    sys.modules["absorb"] = None  # type: ignore[assignment]
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    failed = 0
    for folder in sorted(place.glob("*-*")):
        for way, train in ways(folder):
            started = monotonic()
            out = place / "trained" / folder.name / way.replace(" ", "-")
            try:
                says = train(folder, out)
            except AssertionError as error:
                failed, says = failed + 1, f"FAILED: {error}"
            print(f"{folder.name}, {way}: {says} ({monotonic() - started:.1f} s)", flush=True)
    sys.exit(failed > 0)


def ways(folder: Path) -> Iterator[tuple[str, Callable[[Path, Path], str]]]:
    embedding = "embed_in" if "gpt_neox" in folder.name else "embed_tokens"
    tokens = {"trainable_token_indices": {embedding: [3, 4, 30]}}
    yield "LoRA", partial(adapted, target_modules="all-linear")
    yield "trained tokens", partial(adapted, target_modules="all-linear", **tokens)
    if folder.name.endswith("key"):  # untied: peft itself merges into the head as well
        yield "LoRA on the embedding", partial(adapted, target_modules=[embedding])
    yield "Trainer", trained
    yield "SFTTrainer", taught
    yield "SFTTrainer with LoRA", partial(taught, adapter=True)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def tokens_of(count: int = 2, seed: int = 0) -> Any:
    import torch

    return torch.randint(3, 56, (count, 24), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(tokens_of()).logits


def apart(one: Any, other: Any) -> float:
    """The largest difference of two tensors, as a share of the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def same(what: str, one: Any, other: Any, near: float) -> None:
    assert apart(one, other) <= near, f"{what}: logits differ by {apart(one, other):.1e}"


def adapted(folder: Path, out: Path, **settings: Any) -> str:
    """peft: train, save, reload, merge, save, reload."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    base = load(folder)
    before = logits(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    same("an adapter that was not trained yet", logits(model), before, MERGED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model.train()(input_ids=tokens_of(), labels=tokens_of()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    model.save_pretrained(out / "adapter")
    again = PeftModel.from_pretrained(load(folder), out / "adapter")
    return merged(before, after, again, out)


def merged(before: Any, after: Any, again: Any, out: Path) -> str:
    same("reloaded adapter", logits(again), after, SAVED)
    whole = again.merge_and_unload()
    joined = logits(whole)
    same("merged", joined, after, MERGED)
    whole.save_pretrained(out / "merged")
    same("merged and reloaded", logits(load(out / "merged")), joined, SAVED)
    return moved(before, after) + f", merged {apart(joined, after):.0e} off"


def moved(before: Any, after: Any) -> str:
    assert apart(after, before) > 1e-3, "training changed nothing"
    return f"training moved logits by {apart(after, before):.0e}"


def trained(folder: Path, out: Path) -> str:
    """The Trainer as the model card says, with a decay that would move every sink by far."""
    from datasets import Dataset
    from transformers import TrainingArguments

    example = re.search("```python\n(from transformers import Trainer.*?)```", card(folder), re.S)
    assert example, "the model card does not say how to leave sinks and scales out of weight decay"
    names: dict[str, Any] = {}
    exec(example[1], names)
    model = load(folder)
    before = logits(model)
    started = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = Dataset.from_dict({"input_ids": tokens_of(8).tolist(), "labels": tokens_of(8).tolist()})
    arguments = TrainingArguments(**arguments_for(out), weight_decay=20.0)
    names["TrainerForSinks"](model=model, args=arguments, train_dataset=rows).train()
    # Adam moves a number by at most the rate in a step; a decay of 20 takes 2 % of it.
    for name, value in model.named_parameters():
        if re.search(r"sink(_key|_value)?$|(input|output)_scale$", name):
            far = float((value.detach() - started[name]).abs().max())
            assert far <= 1.1 * STEPS * RATE, f"{name} decayed by {far:.2g}"
        elif value.ndim == 2:
            assert value.norm() < started[name].norm(), f"{name} did not decay"
    after = logits(model)
    model.save_pretrained(out / "model")
    same("reloaded", logits(load(out / "model")), after, SAVED)
    return moved(before, after)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def arguments_for(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out / "trainer"),
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def taught(folder: Path, out: Path, adapter: bool = False) -> str:
    """TRL's supervised fine-tune on chats, of all weights or by an adapter."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.unk_token
    before = logits(model)
    settings = arguments_for(out) | ({"learning_rate": 1e-2} if adapter else {})
    said = [{"prompt": "a b c", "completion": " d e f g"}, {"prompt": "x", "completion": " y z"}]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=32, bf16=False, trust_remote_code=True),
        train_dataset=Dataset.from_list(said * 4),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", r=4) if adapter else None,
    )
    trainer.train()
    after = logits(trainer.model)
    trainer.save_model(str(out / "model"))
    if adapter:
        return merged(before, after, PeftModel.from_pretrained(load(folder), out / "model"), out)
    same("reloaded", logits(load(out / "model")), after, SAVED)
    return moved(before, after)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        train_all(Path(sys.argv[2]))
    else:
        main(*sys.argv[1:])
