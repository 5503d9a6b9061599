"""Checkpoints as hosts keep them: the weights of a diffusers pipeline under the names of the original code."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]

NETWORK = "model.diffusion_model."


def stable_diffusion(pipe: Any) -> Weights:
    """All of a Stable Diffusion 1.5 or XL pipeline in one table, as a WebUI's checkpoint has it."""
    found = _under(NETWORK, unet(pipe.unet)) | _under("first_stage_model.", vae(pipe.vae))
    if getattr(pipe, "text_encoder_2", None) is None:
        return found | _under("cond_stage_model.transformer.", clip(pipe.text_encoder))
    found |= _under("conditioner.embedders.0.transformer.", clip(pipe.text_encoder))
    return found | _under("conditioner.embedders.1.model.", open_clip(pipe.text_encoder_2))


def stable_diffusion_3(pipe: Any) -> Weights:
    """All of a Stable Diffusion 3 pipeline; the first encoder's projection, the identity there, is left out."""
    found = _under(NETWORK, mmdit(pipe.transformer)) | _under("first_stage_model.", vae(pipe.vae))
    first = {key: weight for key, weight in clip(pipe.text_encoder).items() if key != "text_projection.weight"}
    found |= _under("text_encoders.clip_l.transformer.", first)
    found |= _under("text_encoders.clip_g.transformer.", clip(pipe.text_encoder_2))
    return found | _under("text_encoders.t5xxl.transformer.", _t5(pipe.text_encoder_3))


def beside_flux(pipe: Any) -> Weights:
    """VAE and text encoders of a FLUX.1 pipeline, as files that hold them beside the network have them."""
    found = _under("vae.", vae(pipe.vae)) | _under("text_encoders.clip_l.transformer.", clip(pipe.text_encoder))
    return found | _under("text_encoders.t5xxl.transformer.", _t5(pipe.text_encoder_2))


def _t5(encoder: Any) -> Weights:
    """The table of words, which the encoder has under two names, is kept once."""
    return {key: weight for key, weight in _weights(encoder).items() if "embed_tokens" not in key}


def _under(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: weight.clone().contiguous() for key, weight in weights.items()}


def _weights(part: Any) -> Weights:
    return dict(part.state_dict())


def _renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = re.sub(ours, theirs, key)
    return key


# ------------------------------------------------------------------------------------------------------------- networks

_RESNET = {
    r"\.norm1\.": ".in_layers.0.",
    r"\.conv1\.": ".in_layers.2.",
    r"\.norm2\.": ".out_layers.0.",
    r"\.conv2\.": ".out_layers.3.",
    r"\.time_emb_proj\.": ".emb_layers.1.",
    r"\.conv_shortcut\.": ".skip_connection.",
}
_ENDS = {
    r"^time_embedding\.linear_1\.": "time_embed.0.",
    r"^time_embedding\.linear_2\.": "time_embed.2.",
    r"^add_embedding\.linear_1\.": "label_emb.0.0.",
    r"^add_embedding\.linear_2\.": "label_emb.0.2.",
    r"^conv_in\.": "input_blocks.0.0.",
    r"^conv_norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
}


def unet(network: Any) -> Weights:
    """A U-Net, whose blocks the original code numbers through, down and up."""
    layers = network.config.layers_per_block + 1
    with_attention = {number for number, block in enumerate(network.up_blocks) if hasattr(block, "attentions")}
    found: Weights = {}
    for key, weight in _weights(network).items():
        side, block, kind, layer, rest = (*key.split(".", 4), "", "", "")[:5]
        if side == "down_blocks":
            down = kind == "downsamplers"
            number = 1 + int(block) * layers + (layers - 1 if down else int(layer))
            name = f"input_blocks.{number}.{int(kind == 'attentions')}.{rest}"
            name = name.replace(".0.conv.", ".0.op.") if down else name
        elif side == "up_blocks":
            number = int(block) * layers + (layers - 1 if kind == "upsamplers" else int(layer))
            place = {"resnets": 0, "attentions": 1, "upsamplers": 1 + (int(block) in with_attention)}[kind]
            name = f"output_blocks.{number}.{place}.{rest}"
        elif side == "mid_block":
            kind, layer, rest = key.split(".", 3)[1:]
            name = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
        else:
            name = _renamed(key, _ENDS)
        found[_renamed(name, _RESNET) if kind == "resnets" else name] = weight
    return found


_MMDIT = {
    r"^pos_embed\.pos_embed$": "pos_embed",
    r"^pos_embed\.proj\.": "x_embedder.proj.",
    r"^time_text_embed\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"^time_text_embed\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"^time_text_embed\.text_embedder\.linear_1\.": "y_embedder.mlp.0.",
    r"^time_text_embed\.text_embedder\.linear_2\.": "y_embedder.mlp.2.",
    r"^transformer_blocks\.": "joint_blocks.",
    r"\.attn\.to_q\.": ".x_block.attn.qkv.",
    r"\.attn\.add_q_proj\.": ".context_block.attn.qkv.",
    r"\.attn\.to_out\.0\.": ".x_block.attn.proj.",
    r"\.attn\.to_add_out\.": ".context_block.attn.proj.",
    r"\.norm1\.linear\.": ".x_block.adaLN_modulation.1.",
    r"\.norm1_context\.linear\.": ".context_block.adaLN_modulation.1.",
    r"\.ff\.net\.0\.proj\.": ".x_block.mlp.fc1.",
    r"\.ff\.net\.2\.": ".x_block.mlp.fc2.",
    r"\.ff_context\.net\.0\.proj\.": ".context_block.mlp.fc1.",
    r"\.ff_context\.net\.2\.": ".context_block.mlp.fc2.",
    r"^proj_out\.": "final_layer.linear.",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
}


def mmdit(network: Any) -> Weights:
    """The transformer of Stable Diffusion 3, with queries, keys and values in one matrix."""
    last = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context."
    found: Weights = {}
    for key, weight in _weights(network).items():
        if re.search(r"to_[kv]\.|add_[kv]_proj\.", key):
            continue
        joined = _joined(network, key, weight) if re.search(r"to_q\.|add_q_proj\.", key) else weight
        found[_renamed(key, _MMDIT)] = _swapped(joined) if key.startswith(("norm_out.", last)) else joined
    return found


_FLUX = {
    r"^time_text_embed\.timestep_embedder\.linear_1\.": "time_in.in_layer.",
    r"^time_text_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"^time_text_embed\.text_embedder\.linear_1\.": "vector_in.in_layer.",
    r"^time_text_embed\.text_embedder\.linear_2\.": "vector_in.out_layer.",
    r"^time_text_embed\.guidance_embedder\.linear_1\.": "guidance_in.in_layer.",
    r"^time_text_embed\.guidance_embedder\.linear_2\.": "guidance_in.out_layer.",
    r"^context_embedder\.": "txt_in.",
    r"^x_embedder\.": "img_in.",
    r"^transformer_blocks\.": "double_blocks.",
    r"\.norm1\.linear\.": ".img_mod.lin.",
    r"\.norm1_context\.linear\.": ".txt_mod.lin.",
    r"(double_blocks\.\d+)\.attn\.to_q\.": r"\1.img_attn.qkv.",
    r"\.attn\.add_q_proj\.": ".txt_attn.qkv.",
    r"(double_blocks\.\d+)\.attn\.norm_q\.weight": r"\1.img_attn.norm.query_norm.scale",
    r"(double_blocks\.\d+)\.attn\.norm_k\.weight": r"\1.img_attn.norm.key_norm.scale",
    r"\.attn\.norm_added_q\.weight": ".txt_attn.norm.query_norm.scale",
    r"\.attn\.norm_added_k\.weight": ".txt_attn.norm.key_norm.scale",
    r"\.ff\.net\.0\.proj\.": ".img_mlp.0.",
    r"\.ff\.net\.2\.": ".img_mlp.2.",
    r"\.ff_context\.net\.0\.proj\.": ".txt_mlp.0.",
    r"\.ff_context\.net\.2\.": ".txt_mlp.2.",
    r"\.attn\.to_out\.0\.": ".img_attn.proj.",
    r"\.attn\.to_add_out\.": ".txt_attn.proj.",
    r"^single_transformer_blocks\.": "single_blocks.",
    r"(single_blocks\.\d+)\.norm\.linear\.": r"\1.modulation.lin.",
    r"(single_blocks\.\d+)\.attn\.to_q\.": r"\1.linear1.",
    r"(single_blocks\.\d+)\.attn\.norm_q\.weight": r"\1.norm.query_norm.scale",
    r"(single_blocks\.\d+)\.attn\.norm_k\.weight": r"\1.norm.key_norm.scale",
    r"(single_blocks\.\d+)\.proj_out\.": r"\1.linear2.",
    r"^proj_out\.": "final_layer.linear.",
    r"^norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
}


def flux(network: Any) -> Weights:
    """The transformer of FLUX.1; single blocks keep queries, keys, values and the first half of their MLP together."""
    found: Weights = {}
    for key, weight in _weights(network).items():
        if re.search(r"to_[kv]\.|add_[kv]_proj\.|\.proj_mlp\.", key):
            continue
        joined = _joined(network, key, weight) if re.search(r"to_q\.|add_q_proj\.", key) else weight
        found[_renamed(key, _FLUX)] = _swapped(joined) if key.startswith("norm_out.") else joined
    return {key: weight.clone().contiguous() for key, weight in found.items()}


def _joined(network: Any, key: str, query: Tensor) -> Tensor:
    """Queries, keys, values, and the MLP of a single block of FLUX, one below the other."""
    table = network.state_dict()
    names = [re.sub(r"(to_|add_)q", rf"\g<1>{each}", key) for each in "kv"]
    if key.startswith("single_"):
        names.append(key.replace("attn.to_q", "proj_mlp"))
    return torch.cat([query, *(table[name] for name in names)])


def _swapped(weight: Tensor) -> Tensor:
    """Scale before shift, which the original code has the other way round."""
    return torch.cat(weight.chunk(2)[::-1])


# -------------------------------------------------------------------------------------------- VAE and text encoders

_VAE = {
    r"\.down_blocks\.(\d+)\.resnets\.": r".down.\1.block.",
    r"\.down_blocks\.(\d+)\.downsamplers\.0\.": r".down.\1.downsample.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.group_norm\.": ".norm.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".proj_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.conv_norm_out\.": ".norm_out.",
}


def vae(network: Any) -> Weights:
    """An autoencoder; the original counts the decoder's blocks from the image and keeps attention as convolutions."""
    last = len(network.config.up_block_types) - 1
    found: Weights = {}
    for key, weight in _weights(network).items():
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda hit: f".up_blocks.{last - int(hit[1])}.", key)
        name = re.sub(r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block.", name)
        name = _renamed(re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample.", name), _VAE)
        matrix = ".mid.attn_1." in name and weight.ndim == 2
        found[name] = weight[:, :, None, None] if matrix else weight
    return found


def clip(encoder: Any) -> Weights:
    """A text encoder of CLIP with the names of older versions of transformers."""
    return {
        key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": weight
        for key, weight in _weights(encoder).items()
    }


_OPEN_CLIP = {
    r"^text_model\.embeddings\.position_embedding\.weight$": "positional_embedding",
    r"^text_model\.embeddings\.token_embedding\.": "token_embedding.",
    r"^text_model\.final_layer_norm\.": "ln_final.",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"\.self_attn\.q_proj\.": ".attn.in_proj_",
    r"\.self_attn\.out_proj\.": ".attn.out_proj.",
}


def open_clip(encoder: Any) -> Weights:
    """The second text encoder of SDXL, with the names of OpenCLIP."""
    table = clip(encoder)
    found: Weights = {"text_projection": table.pop("text_projection.weight").T}
    for key, weight in table.items():
        if re.search(r"\.[kv]_proj\.", key):
            continue
        rows = [table[key.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"] if ".q_proj." in key else [weight]
        found[_renamed(key, _OPEN_CLIP)] = torch.cat(rows)
    return found
