"""A native folder → one that mlx-lm runs, by a file of code that lies in it."""

import shutil
from pathlib import Path

from transformers import PretrainedConfig

from absorb.errors import AbsorbError

MODEL_FILE = "granite_swa_mlx.py"
OURS = Path(__file__).with_name(MODEL_FILE)
_ARCHITECTURE = "granite_swa"
# That scripts/engines/mlx.py compared with transformers.
_ROTATIONS = {"default", "linear", "llama3"}


def refuse(config: PretrainedConfig) -> None:
    """Refuse what the file cannot run, by name, before anything is written."""
    if config.model_type != _ARCHITECTURE:
        raise AbsorbError(
            f"absorb has code for MLX of {_ARCHITECTURE}, and this model becomes "
            f"{config.model_type}; drop --mlx"
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in _ROTATIONS:
        raise AbsorbError(
            f"this model has RoPE of the kind {kind}, and in MLX {', '.join(sorted(_ROTATIONS))} "
            "were proved; drop --mlx"
        )
    if config.hidden_act != "silu":
        raise AbsorbError(
            f"this model has the activation {config.hidden_act}, and absorb's code for MLX has "
            "silu; drop --mlx"
        )


def add(folder: Path, config: PretrainedConfig) -> None:
    """Put the code beside the model, and name it where mlx-lm looks."""
    shutil.copyfile(OURS, folder / MODEL_FILE)
    config.model_file = MODEL_FILE
    config.save_pretrained(folder)
