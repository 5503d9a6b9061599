"""Pipelines with conventions of their own: Ideogram 4, Bria, Kandinsky 5, PRX Pixel, DreamLite, Z-Image-Omni."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.tiny.parts import (
    FLUX_SHIFT,
    SMALL_LANGUAGE,
    clip,
    diffusers,
    flow_euler,
    flux2_vae,
    kl_vae,
    language,
    qwen25_vl,
    t5,
    tokenizer,
    transformers,
)

_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}


def _qwen3_vl(kind: str, layers: int) -> Any:
    library = transformers()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = library.Qwen3VLConfig(
        text_config={**SMALL_LANGUAGE, "num_hidden_layers": layers, "rope_scaling": rope},
        vision_config={**_VISION, "deepstack_visual_indexes": [0]},
        vision_start_token_id=3,
        vision_end_token_id=3,
        image_token_id=3,
    )
    return getattr(library, kind)(config.text_config if kind == "Qwen3VLTextModel" else config)


def _processor(kind: str) -> Any:
    """A tokenizer with the image processor of a vision-language model, which nothing here uses."""
    library = transformers()
    text = tokenizer(4096, eos=False)
    videos = getattr(library, "Qwen3VLVideoProcessor" if kind == "Qwen3VLProcessor" else "Qwen2VLVideoProcessor")
    return getattr(library, kind)(
        image_processor=library.Qwen2VLImageProcessor(), tokenizer=text, video_processor=videos()
    )


# ------------------------------------------------------------------------------------------------- Ideogram, Kandinsky


def _ideogram4() -> Any:
    library = diffusers()

    def network() -> Any:
        return library.Ideogram4Transformer2DModel(
            in_channels=128,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * 16,
            mrope_section=(2, 2, 2),
        )

    return library.Ideogram4Pipeline(
        scheduler=flow_euler(),
        vae=flux2_vae(),
        text_encoder=_qwen3_vl("Qwen3VLModel", 36),
        tokenizer=tokenizer(4096, eos=False),
        transformer=network(),
        unconditional_transformer=network(),
    )


def _kandinsky5() -> Any:
    library = diffusers()
    return library.Kandinsky5T2IPipeline(
        transformer=library.Kandinsky5Transformer3DModel(
            in_visual_dim=16,
            out_visual_dim=16,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            patch_size=(1, 2, 2),
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
        ),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=qwen25_vl(),
        tokenizer=_processor("Qwen2VLProcessor"),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77, bos=True),
        scheduler=flow_euler(shift=3.0),
    )


# ---------------------------------------------------------------------------------------------------------------- Bria


def _bria() -> Any:
    library = diffusers()
    return library.BriaPipeline(
        transformer=library.BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=[4, 6, 6],
        ),
        scheduler=flow_euler(),
        vae=kl_vae(4, 0.13025, None, quant=True),
        text_encoder=t5(),
        tokenizer=tokenizer(512),
    )


def _bria_fibo() -> Any:
    import torch

    library = diffusers()
    channels = 48
    vae = library.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=torch.linspace(-0.5, 0.5, channels).tolist(),
        latents_std=torch.linspace(0.5, 1.5, channels).tolist(),
    )
    return library.BriaFiboPipeline(
        transformer=library.BriaFiboTransformer2DModel(
            in_channels=channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 6, 6],
            text_encoder_dim=16,
        ),
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=vae,
        # The token of an empty prompt has the number that it has in the released vocabulary.
        text_encoder=language("SmolLM3ForCausalLM", 2, vocab_size=128256),
        tokenizer=tokenizer(4096, eos=False),
    )


def _bria_fibo2() -> Any:
    library = diffusers()
    return library.BriaFibo2Pipeline(
        transformer=library.BriaFibo2Transformer2DModel(
            in_channels=32,
            dim=32,
            n_layers=5,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=48,
            injection_layer_ids=(0, 1, 2, 3, 4),
            perceiver_num_layers=1,
            min_num_gist_tokens=8,
            max_num_gist_tokens=16,
            gist_step=2,
            gist_min_text_len=32,
            gist_max_text_len=128,
            axes_dims=(4, 6, 6),
            axes_lens=(4096, 64, 64),
        ),
        scheduler=flow_euler(**FLUX_SHIFT),
        vae=flux2_vae(),
        text_encoder=_qwen3_vl("Qwen3VLForConditionalGeneration", 36),
        processor=_processor("Qwen3VLProcessor"),
    )


# ------------------------------------------------------------------------------------------------ PRX Pixel, DreamLite


def _prx_pixel() -> Any:
    library = diffusers()
    pipe = library.PRXPixelPipeline(
        transformer=library.PRXTransformer2DModel(
            patch_size=16,
            in_channels=3,
            context_in_dim=16,
            hidden_size=32,
            num_heads=2,
            depth=1,
            axes_dim=[8, 8],
            bottleneck_size=8,
            resolution_embeds=True,
        ),
        scheduler=flow_euler(shift=3.0),
        text_encoder=_qwen3_vl("Qwen3VLTextModel", 2),
        tokenizer=tokenizer(4096, eos=False),
    )
    read = pipe.tokenizer

    def without_cleaning(prompts: list[str], device: Any, *_: Any, **__: Any) -> Any:
        # Cleaning prompts needs a package that nothing here is about.
        tokens = read(prompts, padding="max_length", max_length=256, truncation=True, return_tensors="pt")
        return tokens["input_ids"].to(device), tokens["attention_mask"].bool().to(device)

    pipe._tokenize_prompts = without_cleaning
    return pipe


def _dreamlite(kind: str) -> Any:
    import torch

    library = diffusers()
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    vae = library.AutoencoderTiny(latent_channels=4, **blocks, **counts)
    torch.nn.init.normal_(vae.decoder.layers[-1].weight, std=0.5)  # left at random, it draws next to nothing
    return getattr(library, kind)(
        text_encoder=_qwen3_vl("Qwen3VLForConditionalGeneration", 2),
        tokenizer=tokenizer(4096, eos=False),
        processor=_processor("Qwen3VLProcessor"),
        vae=vae,
        unet=library.DreamLiteUNetModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            use_linear_projection=True,
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj_rms",
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
        ),
        scheduler=flow_euler(**{**FLUX_SHIFT, "max_shift": 1.16}),
    )


# ------------------------------------------------------------------------------------------------------------- Z-Image


def _z_image_omni() -> Any:
    library, models = transformers(), diffusers()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return models.ZImageOmniPipeline(
        scheduler=flow_euler(shift=6.0),
        vae=kl_vae(16, 0.3611, 0.1159),
        text_encoder=language("Qwen3", 2),
        tokenizer=tokenizer(2048, eos=False),
        transformer=models.ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            siglip_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ),
        siglip=library.Siglip2VisionModel(library.Siglip2VisionConfig(**small, num_patches=64)),
        siglip_processor=library.Siglip2ImageProcessor(max_num_patches=64),
    )


PIPELINES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "ideogram4": ("Ideogram4Pipeline", _ideogram4),
    "kandinsky5": ("Kandinsky5T2IPipeline", _kandinsky5),
    "bria": ("BriaPipeline", _bria),
    "bria-fibo": ("BriaFiboPipeline", _bria_fibo),
    "bria-fibo2": ("BriaFibo2Pipeline", _bria_fibo2),
    "prx-pixel": ("PRXPixelPipeline", _prx_pixel),
    "dreamlite": ("DreamLitePipeline", lambda: _dreamlite("DreamLitePipeline")),
    "dreamlite-mobile": ("DreamLiteMobilePipeline", lambda: _dreamlite("DreamLiteMobilePipeline")),
    "z-image-omni": ("ZImageOmniPipeline", _z_image_omni),
}
