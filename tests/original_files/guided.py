"""Tiny networks of guided-diffusion, improved-diffusion and DDPM-IP, and their flags."""

CONFIG = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}


SMALL = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 "
    "--attention_resolutions 4 "
)


GUIDED = CONFIG | {
    "attention_resolutions": (2,),
    "out_channels": 6,
    "num_head_channels": 16,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "num_class_embeds": 3,
}


GUIDED_FLAGS = SMALL + (
    "--num_head_channels 16 --resblock_updown True --use_new_attention_order True "
    "--learn_sigma True --class_cond True --diffusion_steps 20 --noise_schedule cosine "
    "--rescale_timesteps True"
)


IMPROVED = CONFIG | {
    "channel_mult": (1, 2, 2, 2),
    "attention_resolutions": (8,),
    "use_scale_shift_norm": False,
}


IMPROVED_FLAGS = (
    "--image_size 32 --num_channels 32 --num_res_blocks 1 --attention_resolutions 4 "
    "--diffusion_steps 40 --sigma_small True --use_scale_shift_norm False"
)


PERTURBED = CONFIG | {"attention_resolutions": (2,), "num_heads": 2}


PERTURBED_FLAGS = SMALL + "--num_heads 2 --predict_xstart True --diffusion_steps 40"
