"""Small random vision and audio models, each with a batch; deterministic."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 61
PLACE = 60  # placeholder token of image or audio features
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
MROPE = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}


def text_rows(places, *, start=1):
    """Return two rows of 14 tokens, the second padded on the right; each has `places` placeholder tokens."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 50, (2, 14), generator=generator)
    ids[:, start : start + places] = PLACE
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : start + places + 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def seen(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=PLACE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return config, {**text_rows(4), "pixel_values": seen(2, 3, 16, 16)}


def qwen2_vl():
    """The outer model computes positions with three axes."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    tokens = {"video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, **MROPE}, vision_config=vision, image_token_id=PLACE, **tokens
    )
    batch = text_rows(4, start=2)
    batch["input_ids"][:, 1], batch["input_ids"][:, 6] = 58, 57
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return config, {**batch, "pixel_values": seen(32, 96), "image_grid_thw": grid, **image_tokens(batch, "mm")}


def image_tokens(batch, prefix=None):
    """Return the argument that marks image tokens; Qwen2-VL has none in transformers 4.57."""
    if prefix and int(transformers.__version__.partition(".")[0]) < 5:
        return {}
    return {f"{prefix}_token_type_ids" if prefix else "token_type_ids": (batch["input_ids"] == PLACE).long()}


def gemma3():
    """The outer model builds a mask with bidirectional attention within an image."""
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 8},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=PLACE,
        boi_token_index=58,
        eoi_token_index=57,
    )
    batch = text_rows(4, start=2)
    return config, {**batch, "pixel_values": seen(2, 3, 16, 16), **image_tokens(batch)}


def idefics3():
    """The outer model creates the cache of the decoder."""
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama"}, vision_config=TOWER, image_token_id=PLACE, scale_factor=2
    )
    return config, {**text_rows(1), "pixel_values": seen(2, 1, 3, 16, 16)}


def mllama():
    """Images enter in the decoder's layers, by cross-attention."""
    vision = {**TOWER, "attention_heads": 4, "num_global_layers": 1, "max_num_tiles": 1, "vision_output_dim": 64}
    config = transformers.MllamaConfig(
        text_config={
            **TEXT,
            "cross_attention_layers": [1],
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        vision_config={**vision, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        image_token_index=PLACE,
    )
    of_image = {
        "pixel_values": seen(2, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 14, 1, 1),
    }
    return config, {**text_rows(1), **of_image}


def qwen2_audio():
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    config = transformers.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={**audio, "num_mel_bins": 8, "max_source_positions": 8},
        audio_token_index=PLACE,
    )
    mask = torch.ones(2, 16, dtype=torch.long)
    return config, {**text_rows(4), "input_features": seen(2, 8, 16), "feature_attention_mask": mask}


def blip2():
    """The decoder belongs to an inner language model with a separate head."""
    text = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    query = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "encoder_hidden_size": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.Blip2Config(
        vision_config=TOWER,
        qformer_config={**query, **layers, **undropped},
        text_config={**TEXT, **text, "model_type": "opt"},
        num_query_tokens=4,
        image_token_index=PLACE,
    )
    return config, {**text_rows(4, start=0), "pixel_values": seen(2, 3, 16, 16)}


def granite_speech():
    """Training changes running statistics in the tower, although its weights are frozen."""
    encoder = {"input_dim": 8, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "dim_head": 8, "feedforward_mult": 2}
    convolution = {"output_dim": 12, "context_size": 8, "conv_kernel_size": 3, "max_pos_emb": 8, "dropout": 0.0}
    query = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.GraniteSpeechConfig(
        text_config={**TEXT, "model_type": "granite"},
        encoder_config={**encoder, **convolution},
        projector_config={"model_type": "blip_2_qformer", **query, **undropped, "encoder_hidden_size": 32},
        audio_token_index=PLACE,
        has_lora_adapter=False,
        window_size=8,
        downsample_rate=4,
    )
    heard = {"input_features": seen(2, 16, 8), "input_features_mask": torch.ones(2, 4, dtype=torch.bool)}
    return config, {**text_rows(4), **heard}


MAKERS = {
    maker.__name__: maker for maker in (llava, qwen2_vl, gemma3, idefics3, mllama, qwen2_audio, blip2, granite_speech)
}


def make(name):
    """Return (model, batch). Weights are large enough for every part to affect the logits, and no gate is closed."""
    config, batch = MAKERS[name]()
    torch.manual_seed(0)
    kinds = [
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForSpeechSeq2Seq,
    ]
    model = next(kind for kind in kinds if type(config) in kind._model_mapping).from_config(config)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
        elif "gate" in parameter_name:
            parameter.data.fill_(0.7)
    return model, batch
