"""Tiny instances of diffusers' own pipelines: random weights, and tokenizers made on the spot."""

import inspect
import json

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DanceDiffusionPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IPNDMScheduler,
    LDMPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["<pad>", "<start>", "<end>", "<unknown>", "a", "red", "blue", "cat", "dog", "blurry"]
LENGTH = 8
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}


def seeded(network):
    """The network with weights that matter: none of those that are trained from zero are zero."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def unet(channels=3, **config):
    return seeded(
        UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            **config,
        )
    )


def text_unet(**config):
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    }
    return seeded(UNet2DConditionModel(**{**sizes, **config}))


def kl(channels=4, **config):
    return seeded(
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            **config,
        )
    )


def vq():
    return seeded(
        VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=16,
            norm_num_groups=4,
            scaling_factor=0.4,
        )
    )


def tokenizer():
    """One token a word, between a beginning and an end."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=LENGTH,
    )


def clip(projected=False):
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=32,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width=32, kind=T5EncoderModel, config=T5Config):
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return kind(config(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2, **sizes)).eval()


def gemma():
    config = Gemma2Config(
        vocab_size=len(WORDS),
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sliding_window=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma2Model(config).eval()


def ddpm(**scheduler):
    return DDPMPipeline(unet(), DDPMScheduler(**scheduler))


def ddim(**scheduler):
    return DDIMPipeline(unet(), DDIMScheduler(**scheduler))


def class_conditional():
    return DDPMPipeline(unet(num_class_embeds=5), DDPMScheduler(prediction_type="v_prediction"))


def edm():
    return DDPMPipeline(unet(), EDMEulerScheduler(sigma_data=0.4))


def solved_by(scheduler, **config):
    """A pixel-space UNet with any scheduler beside it, as people save them."""
    return DDPMPipeline(unet(), scheduler(**config))


def ldm_vq():
    return LDMPipeline(vq(), unet(), DDIMScheduler(**BETAS, clip_sample=False))


def ldm_kl():
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    return LDMPipeline(kl(3, scaling_factor=0.2), unet(), scheduler)


def dit(classes=5, scheduler=DDIMScheduler, **config):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    return DiTPipeline(seeded(transformer), kl(), scheduler(clip_sample=False, **config))


def stable_diffusion(scheduler=None, network=None):
    scheduler = scheduler or PNDMScheduler(**STABLE, skip_prk_steps=True)
    return StableDiffusionPipeline(
        kl(), clip(), tokenizer(), network or text_unet(), scheduler, None, None, None, False
    )


def stable_diffusion_v():
    config = {**STABLE, "clip_sample": False, "prediction_type": "v_prediction"}
    return stable_diffusion(DDIMScheduler(**config))


def sdxl():
    network = text_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    words, again = tokenizer(), tokenizer()
    return StableDiffusionXLPipeline(
        kl(), clip(), clip(True), words, again, network, scheduler, add_watermarker=False
    )


def pixart(kind=PixArtAlphaPipeline, sample_size=8, heads=2, patch_size=2):
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=patch_size,
        attention_head_dim=8,
        num_attention_heads=heads,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=8 * heads,
        out_channels=8,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
    return kind(tokenizer(), t5(), kl(), seeded(transformer), scheduler)


def pixart_sigma():
    return pixart(PixArtSigmaPipeline)


def pixart_1024():
    """The size at which PixArt-alpha is told resolution and aspect ratio."""
    return pixart(sample_size=128, heads=3, patch_size=4)


def sd3(with_t5=False, layers=2):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        seeded(transformer),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        kl(shift_factor=0.06, scaling_factor=1.5),
        clip(True),
        tokenizer(),
        clip(True),
        tokenizer(),
        t5(96) if with_t5 else None,
        tokenizer() if with_t5 else None,
    )


def sd3_of_one_layer():
    return sd3(layers=1)


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4),
        kl(4, shift_factor=0.06, scaling_factor=1.5),
        clip(),
        tokenizer(),
        t5(),
        tokenizer(),
        seeded(transformer),
    )


def sana():
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    )
    stage = {
        "layers_per_block": (1, 1),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
    }
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        **{
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in stage.items()
        },
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    return SanaPipeline(tokenizer(), gemma(), seeded(vae), seeded(transformer), scheduler)


def lumina():
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    vae = kl(shift_factor=0.1, scaling_factor=0.4)
    return Lumina2Pipeline(seeded(transformer), scheduler, vae, gemma(), tokenizer())


def wan():
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.7, 1.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    encoder = t5(32, UMT5EncoderModel, UMT5Config)
    return WanPipeline(tokenizer(), encoder, seeded(vae), scheduler, seeded(transformer))


def dance():
    network = UNet1DModel(
        sample_size=32,
        sample_rate=16,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        time_embedding_type="fourier",
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        mid_block_type="UNetMidBlock1D",
    )
    return DanceDiffusionPipeline(seeded(network), IPNDMScheduler())


PARTS = ("unet", "transformer", "vae", "vqvae", "scheduler")
KEPT = ("latents_mean", "latents_std")  # of Wan: the defaults are for 16 channels


def edit(path, drop=(), **changes):
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in old.items() if k not in drop} | changes))


def strip(folder):
    """Take out of all configs what their classes have a default for, if it is that default."""
    index = json.loads((folder / "model_index.json").read_text())
    for name in PARTS:
        for file in folder.glob(f"{name}/*config.json"):
            kind = getattr(diffusers, index[name][1])
            edit(file, defaulted(json.loads(file.read_text()), kind))
    edit(folder / "model_index.json", ["requires_safety_checker", "force_zeros_for_empty_prompt"])
    edit(folder / "model_index.json", ["boundary_ratio", "expand_timesteps"])


def defaulted(config, kind):
    """The keys of a config whose values are the defaults of a class."""
    known = inspect.signature(kind).parameters
    same = [k for k, v in config.items() if k in known and plain(known[k].default) == v]
    return [key for key in same if key not in KEPT]


def plain(values):
    return json.loads(json.dumps(values, default=str))
