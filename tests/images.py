"""The image encoders' table: tiny random checkpoints, written by transformers, in every odd shape a family
has.

Adding a family adds entries here; every property in `test_images.py` is then tested for it.
"""

from __future__ import annotations

from tests.families import VOCAB, Case

SIZE = 24
VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "image_size": SIZE,
    "patch_size": 6,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
TEXT = {
    **{key: VIT[key] for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "hidden_size": 36,
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
}
BOTH = {"text_config": TEXT, "vision_config": VIT}


def _named(suffix: str) -> dict[str, list[str]]:
    """Transformers has several classifiers for DeiT, and asks the config which."""
    return {"architectures": [f"DeiT{suffix}"]}


CASES = [
    Case("vit", "ViT", base=VIT),
    Case(
        "vit-no-qkv-bias",
        "ViT",
        {
            "qkv_bias": False,
            "num_channels": 2,
            "hidden_act": "relu",
            "pooler_output_size": 20,
            "pooler_act": "gelu",
            "layer_norm_eps": 1e-5,
        },
        VIT,
    ),
    Case("deit", "DeiT", _named("ForImageClassification"), VIT),
    Case("deit-taught", "DeiT", _named("ForImageClassificationWithTeacher"), VIT),
    Case("beit", "Beit", {"use_relative_position_bias": True}, VIT),
    Case(
        "beit-shared-first-token",
        "Beit",
        {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "use_mask_token": True},
        VIT,
    ),
    Case(
        "beit-positions",
        "Beit",
        {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
        VIT,
    ),
    Case("dinov2", "Dinov2", {"mlp_ratio": 2}, DINO),
    Case("dinov2-gated", "Dinov2", {"use_swiglu_ffn": True, "use_mask_token": False}, DINO),
    Case("clip", "CLIP", {"projection_dim": 40}, BOTH),
    # As the first configs are, which don't know where a text ends.
    Case("clip-highest", "CLIP", {"text_config": TEXT | {"eos_token_id": 2, "projection_dim": 30}}, BOTH),
    Case("siglip", "Siglip", {"text_config": TEXT | {"projection_size": VIT["hidden_size"]}}, BOTH),
]
