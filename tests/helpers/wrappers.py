"""Tiny random models that read pictures, and pictures for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.helpers.tiny import COMMON, HIDDEN, SPECIAL, randomise
from tests.helpers.tiny_tokenizer import tiny_tokenizer

IMAGE = 63  # the token in whose place the patches of a picture stand
VIDEO, START, END = 60, 61, 62
PATCHES = 4  # tokens of a picture
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Where pictures are cut into patches by their own sizes.
_GRID = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": HIDDEN,
    "image_size": 16,
}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
}

Pictures = Callable[[Tensor], dict[str, Tensor]]


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _pixels(rows: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _noise(1, 3, 16, 16)}


def _typed(rows: Tensor) -> dict[str, Tensor]:
    """Gemma 3 is told which tokens are of a picture: they see each other."""
    return _pixels(rows) | {"token_type_ids": (rows == IMAGE).long()}


def _sized(rows: Tensor) -> dict[str, Tensor]:
    return _pixels(rows) | {"image_sizes": torch.tensor([[16, 16]])}


def _pieces(rows: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _noise(1, 1, 3, 16, 16)}


def _grid(rows: Tensor) -> dict[str, Tensor]:
    """Qwen-VL has positions in time, height and width."""
    return {
        "pixel_values": _noise(4 * PATCHES, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (rows == IMAGE).int(),
    }


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """The language model inside, the settings around it, and what goes with a picture's tokens."""

    text: str
    vision: dict[str, Any]
    own: dict[str, Any] = field(default_factory=lambda: {"image_token_index": IMAGE})
    pictures: Pictures = _pixels


def _in_grid(text: str, **vision: Any) -> Wrapper:
    return Wrapper(text=text, vision={**_GRID, **vision}, own=_TOKENS, pictures=_grid)


_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_CLIP = {"model_type": "clip_vision_model", **VISION}
WRAPPERS = {
    "gemma3": Wrapper(
        text="gemma3_text",
        vision=_SIGLIP,
        own={"mm_tokens_per_image": PATCHES, "image_token_index": IMAGE},
        pictures=_typed,
    ),
    "mistral3": Wrapper(
        text="mistral",
        vision={"model_type": "pixtral", **VISION, "patch_size": 4, "head_dim": 8},
        own={"image_token_index": IMAGE, "spatial_merge_size": 2},
        pictures=_sized,
    ),
    "llava": Wrapper(text="llama", vision=_CLIP),
    "vipllava": Wrapper(
        text="llama",
        vision=_CLIP,
        own={"image_token_index": IMAGE, "vision_feature_layers": [-1, -1]},
    ),
    "aya_vision": Wrapper(
        text="cohere2",
        vision=_SIGLIP,
        own={"image_token_index": IMAGE, "downsample_factor": 1, "adapter_layer_norm_eps": 1e-6},
    ),
    "got_ocr2": Wrapper(
        text="qwen2",
        vision={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 128,
            "patch_size": 16,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
        },
        own={"image_token_index": IMAGE},
        pictures=lambda rows: {"pixel_values": _noise(1, 3, 128, 128)},
    ),
    "internvl": Wrapper(
        text="qwen2",
        vision={
            "model_type": "internvl_vision",
            **VISION,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        own={"image_token_id": IMAGE, "downsample_ratio": 0.5},
    ),
    "idefics3": Wrapper(
        text="llama",
        vision={"model_type": "idefics3_vision", **VISION, "patch_size": 4},
        own={"image_token_id": IMAGE, "scale_factor": 2},
        pictures=_pieces,
    ),
    "qwen2_vl": Wrapper(
        text="qwen2_vl_text",
        vision={**_GRID, "embed_dim": 16, "hidden_size": HIDDEN},
        own=_TOKENS,
        pictures=_grid,
    ),
    "qwen2_5_vl": _in_grid("qwen2_5_vl_text", fullatt_block_indexes=[0], window_size=16),
    "qwen3_vl": _in_grid("qwen3_vl_text", deepstack_visual_indexes=[0], num_position_embeddings=16),
    "qwen3_vl_moe": _in_grid(
        "qwen3_vl_moe_text", deepstack_visual_indexes=[0], num_position_embeddings=16
    ),
    "qwen3_5": _in_grid("qwen3_5_text", num_position_embeddings=16, deepstack_visual_indexes=[]),
    "glm4v": _in_grid("glm4v_text"),
    "glm4v_moe": _in_grid("glm4v_moe_text"),
    "glm_ocr": _in_grid("glm_ocr_text"),
}

# It lets all tokens of a prompt see each other.
PALIGEMMA = Wrapper(
    text="gemma", vision=_SIGLIP, own={"image_token_index": IMAGE, "projection_dim": 32}
)


def whole(model_type: str, tied: bool = False, **more: Any) -> PreTrainedModel:
    """A tiny random model that reads pictures; `more` are settings of its language model."""
    known = PALIGEMMA if model_type == "paligemma" else WRAPPERS[model_type]
    settings = {**COMMON, **SPECIAL.get(known.text, {}), "tie_word_embeddings": tied, **more}
    config = AutoConfig.for_model(
        model_type,
        text_config=AutoConfig.for_model(known.text, **settings).to_dict(),
        vision_config=known.vision,
        tie_word_embeddings=tied,
        **known.own,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model)
    return model


def saved(model_type: str, folder: Path, tied: bool = False, **more: Any) -> Path:
    """The same in a folder, with a tokenizer."""
    whole(model_type, tied, **more).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_picture(words: Tensor) -> Tensor:
    """Words (1, n) with the patches of a picture among them."""
    words = words.clamp_max(VIDEO - 1)
    picture = torch.tensor([[START, *[IMAGE] * PATCHES, END]])
    return torch.cat([words[:, :6], picture, words[:, 6:]], 1)


def saved_with_processor(folder: Path) -> Path:
    """A tiny Gemma 3 with all that reads pictures and chats."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = tiny_tokenizer()
    names = {"boi_token": "<start>", "eoi_token": "<end>", "image_token": "<patch>"}
    blank = [f"<blank{number}>" for number in range(len(tokenizer), START)]
    tokenizer.add_tokens([*blank, *names.values()], special_tokens=True)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=tokenizer.chat_template,
        extra_special_tokens=names,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        image_seq_length=PATCHES,
    )
    whole("gemma3").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
