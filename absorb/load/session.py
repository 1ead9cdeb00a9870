"""Settings that say how somebody ran a model and nothing about it: they end where it is loaded.

A `config.json` that a trainer or a notebook wrote may ask for an attention that is not installed
here, for tuples, for every hidden state; the same in generation_config.json and
tokenizer_config.json.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load.files import (
    INDEX,
    NAMED,
    WEIGHTS,
    first_line,
    index_name,
    read_json,
    refuse_no_numbers,
)
from absorb.runtime.quiet import quiet

# A leading underscore aside. Names are whole: a model may well have an `output_multiplier`.
OF_A_SESSION = frozenset(
    {
        # the type of a load: files say which types they hold
        "dtype",
        "torch_dtype",
        # what computes attention and experts
        "attn_implementation",
        "attn_implementation_autoset",
        "attn_implementation_internal",
        "experts_implementation",
        "experts_implementation_internal",
        "flash_attn_2_enabled",
        "fusion_config",
        "kernel_config",
        "use_bfloat16",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_kernels",
        "use_sdpa",
        # what is given back
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_past",
        "output_router_logits",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_return_dict",
        # caches
        "cache_config",
        "cache_dir",
        "cache_implementation",
        "return_legacy_cache",
        "use_cache",
        # gradients and the machines of a training
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "pretraining_tp",
        "use_reentrant",
        # compilers, devices, and several of them
        "compile_config",
        "continuous_batching_config",
        "device_map",
        "disable_compile",
        "distributed_config",
        "hf_device_map",
        "low_cpu_mem_usage",
        "low_memory",
        "max_memory",
        "prefill_chunk_size",
        "tp_plan",
        "tp_size",
        # where from, by which rights, and with what a load was asked for
        "adapter_kwargs",
        "commit_hash",
        "force_download",
        "is_local",
        "local_files_only",
        "name_or_path",
        "proxies",
        "resume_download",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
        "unsloth_fixed",
        "unsloth_version",
        "use_auth_token",
    }
)
_GENERATION = "generation_config.json"


def without_session(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those of a session, in the parts of a model as well."""
    return {
        key: without_session(value) if key.endswith("_config") and type(value) is dict else value
        for key, value in settings.items()
        if not is_of_session(key)
    }


def is_of_session(key: str) -> bool:
    return key.lstrip("_") in OF_A_SESSION


@contextmanager
def shown(folder: Path, files: list[Path], name: str) -> Iterator[Path]:
    """A folder with the model of another one, its weights being links, for transformers to load.

    It holds what was looked at and nothing else. Out of the other one a load takes more, and says
    nothing: adapters, parts of a training that was sharded, weights that a setting names.
    """
    with TemporaryDirectory() as place:
        view = Path(place)
        config = without_session(read_json(folder / "config.json", name))
        config.pop(NAMED, None)
        (view / "config.json").write_text(json.dumps(config))
        if (folder / _GENERATION).is_file():
            generation = without_session(read_json(folder / _GENERATION, name))
            (view / _GENERATION).write_text(json.dumps(generation))
        if len(files) == 1:
            (view / WEIGHTS).symlink_to(files[0].resolve())
        else:
            (view / INDEX).symlink_to((folder / index_name(folder, name)).resolve())
            for file in files:
                (view / file.name).symlink_to(file.resolve())
        yield view


def forget(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer not write down how it was loaded, nor how its folder was written."""
    kwargs = tokenizer.init_kwargs
    for key in filter(is_of_session, list(kwargs)):
        del kwargs[key]


def rehearse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Write what a conversion writes beside its weights: now, not after the fine-tune.

    Refuses what transformers would refuse then, and what is no JSON.
    """
    parts: dict[str, Any] = {
        "config.json": model.config,
        _GENERATION: model.generation_config,
        "tokenizer": tokenizer,
    }
    with quiet(), TemporaryDirectory() as folder:
        for part, what in parts.items():
            try:
                what.save_pretrained(folder)
            except Exception as error:
                raise AbsorbError(
                    f"the {part} of {name} cannot be written again ({first_line(error)}); "
                    "correct it, or fetch it again"
                ) from error
        refuse_no_numbers(Path(folder), name, "correct it, or fetch it again")
