"""Tiny configurations for the models of transformers: a shrinker that goes by field names, and what it cannot know."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

LAYERS = 3
EXPERTS = 8
CHOSEN = 2
VOCABULARY = 128

ROUTING: dict[str, Any] = {
    r"(moe_)?num_(local_)?experts|n_routed_experts": EXPERTS,
    r"num_experts_per_tok|(num_)?top_k_experts|moe_(topk|top_k|k)": CHOSEN,
    r"n_group": 4,
    r"topk_group": 2,
    r"(moe|expert)_(intermediate_size|ffn_hidden_size)|shared_(expert_)?intermediate_size": 16,
    r"n_shared_experts|(moe_)?num_shared_experts": 1,
    r"(moe_)?route[rd]_scaling_factor|route_scale": 1.5,
}
"""Set always, also where the default is None or one: there would be no experts, no groups, or a scale nobody misses."""

SIZES: dict[str, Any] = {
    r"vocab_size\w*": VOCABULARY,
    r"(num_hidden|num|n|(num_)?encoder|(num_)?decoder)_layers|depth": LAYERS,
    r"(\w+_)?hidden_size|d_model|\w+_hidden_dim|output_(dim|channels)": 32,
    r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|mlp_dim|share_expert_dim": 32,
    r"head_dim|(linear|swa|global|mamba)\w*_head_dim|mamba_d_head": 8,
    r"(\w+_)?num_key_value_heads|kv_n_heads|index_n_heads": 2,
    r"mamba_n(um)?_heads|mamba_d_state|ssm_state_size": 8,
    r"\w*heads": 4,
    r"q_lora_rank": 24,
    r"kv_lora_rank": 16,
    r"o_lora_rank": 32,
    r"qk_nope_head_dim|v_head_dim|d_kv|kv_channels": 8,
    r"qk_rope_head_dim": 4,
    r"index_head_dim": 16,
    r"index_topk": 4,
    r"max_position_embeddings|max_seq_len": 64,
    r"(attention|sliding)_(window|chunk)(_size)?|(mamba_)?chunk_size": 8,
    r"first_k_dense_replace|num_dense_layers|(en|de)coder_sparse_step": 1,
    r"(mamba_)?n_groups": 1,
    r"\w*(dropout|layerdrop)\w*|\w+_pdrop": 0.0,
    r"image_size": 32,
    r"patch_size": 8,
    r"downsample_channels": (32, 32),
    r"deepstack_visual_indexes": (0,),
}
"""Set unless the default is zero or None: then the class derives the value or does without. The first match counts."""

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
"""Every other id of a special token is counted down from the end of the vocabulary."""

SPECIAL_TOKEN = re.compile(r"\w+_token_(id|index)|codec_\w+_id")

MULTI_HEAD_LATENT = {"num_key_value_heads": 4}
"""Latent attention has as many heads for keys and values as for queries."""


class Override(NamedTuple):
    """What the shrinker cannot know about one architecture or one router class."""

    reason: str
    config: Mapping[str, Any] = {}
    model: str | None = None


GROUPS = {"topk_method": "group_limited_greedy"}
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]
ATTENTION_BETWEEN = ["linear_attention", "full_attention", "linear_attention"]
ROTARY = {"rope_type": "default", "rope_theta": 1e4}

OVERRIDES: dict[str, Override] = {
    "dbrx": Override(
        "attention reads a theta that its config lacks, and needs a bound",
        {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    ),
    "deepseek_ocr2": Override(
        "layer types have no default, channels are derived, groups are off by default",
        {
            "text_config": {"mlp_layer_types": DENSE_THEN_SPARSE, **GROUPS},
            "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
        },
    ),
    "deepseek_v2": Override("groups are off by default", GROUPS),
    "dots3_note": Override(
        "sliding layers have sizes of their own, which are no fields",
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 24,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 12,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
    ),
    "Dots3NoteVisionTopKRouter": Override(
        "lives in the vision tower, whose layers count their experts in a list that is no field",
        {
            "pyramid_num_routed": [-1, EXPERTS, EXPERTS],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        model="Dots3NoteVisionModel",
    ),
    "ernie4_5_vl_moe": Override(
        "text and vision experts have a width each; three parts of the rotary embedding make half a head",
        {"text_config": {"moe_intermediate_size": [16, 24], "rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]}}},
    ),
    "flint": Override("two dense layers by default", {"mlp_only_layers": [0]}),
    "gemma4": Override("experts are off by default", {"enable_moe_block": True, "hidden_size_per_layer_input": 8}),
    "glm4v_moe": Override(
        "three parts of the rotary embedding make a quarter of a head",
        {"text_config": {"rope_parameters": {**ROTARY, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}},
    ),
    "glm5_next": Override("has to divide index_topk", {"text_config": {"index_kpool": 2}}),
    "granitemoehybrid": Override("no attention layer by default", {"layer_types": ATTENTION_BETWEEN}),
    "hunyuan_v1_moe": Override("no default", {"head_dim": 8}),
    "jamba": Override(
        "layers by period and offset",
        {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    ),
    "laguna": Override("off by default", {"moe_router_logit_softcapping": 2.0}),
    "lfm2_moe": Override("no default", {"layer_types": ["conv", "full_attention", "conv"]}),
    "longcat_flash": Override("the rotary part is named twice", {"head_dim": 4, "zero_expert_num": 4}),
    "mimo_v2_flash": Override("a third of the head is rotated", {"head_dim": 12}),
    "muse_spark": Override(
        "audio layers are named one by one",
        {
            "audio_config": {
                "num_hidden_layers": 1,
                "patch_sizes": (4,),
                "hidden_sizes": (8,),
                "depths": (1,),
            }
        },
    ),
    "nemotron_h": Override(
        "one mixer a layer, and one of the four has experts",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    ),
    "openai_privacy_filter": Override("classes of tokens, here as many as tokens", {"num_labels": VOCABULARY}),
    "phimoe": Override(
        "at the default of 0.01 nearly every weight is one, of no gradient", {"router_jitter_noise": 0.3}
    ),
    "Qwen3OmniMoeTalkerTextTopKRouter": Override(
        "one model of several; it reads three sizes that its configs lack",
        {
            "text_config": {"shared_expert_intermediate_size": 16},
            "spatial_merge_size": 2,
            "vocab_size": VOCABULARY,
        },
        model="Qwen3OmniMoeTalkerForConditionalGeneration",
    ),
    "Qwen3OmniMoeThinkerTextTopKRouter": Override(
        "one model of several; positions read a token that its config lacks",
        {"vision_start_token_id": 100},
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "qwen4_exp": Override(
        "no defaults for the indexer",
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
    ),
    "step3p7": Override("sliding layers without a width", {"text_config": {"sliding_window": 8}}),
    "unlimited_ocr": Override("groups are off by default", {"text_config": GROUPS}),
    "zaya": Override("takes no other number", {"num_experts_per_tok": 1}),
}
"""By router class name, or by architecture."""


def shrunk(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A config of this class with small sizes; a mapping given for a sub-config goes to that sub-config."""
    overrides = dict(overrides or {})
    own = vars(config_class())  # not getattr, which refuses fields that differ between layers
    values: dict[str, Any] = {}
    special_token = VOCABULARY
    for field in dataclasses.fields(config_class):
        name, value = field.name, own.get(field.name)
        if isinstance(value, PreTrainedConfig):
            values[name] = shrunk(type(value), overrides.pop(name, None))
        elif name in TOKENS:
            values[name] = TOKENS[name]
        elif SPECIAL_TOKEN.fullmatch(name) and isinstance(value, int):
            special_token -= 1
            values[name] = special_token
        elif isinstance(value, list) and value and all(isinstance(kind, str) for kind in value):
            kinds = list(dict.fromkeys(value))
            values[name] = kinds + kinds[-1:] * (LAYERS - len(kinds))
        else:
            table = ROUTING | SIZES if field.default and value is not True else ROUTING
            matches = [small for pattern, small in table.items() if re.fullmatch(pattern, name)]
            values |= {name: matches[0]} if matches else {}
    if "kv_lora_rank" in values:
        values |= MULTI_HEAD_LATENT
    return config_class(**{**values, **overrides})
