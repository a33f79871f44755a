"""Words that options and mathematics have in common; importing them costs nothing."""

from typing import Literal

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v"]
Resize = Literal["bilinear", "tensorflow", "bicubic"]
Sampler = Literal["ddim", "ddpm", "euler", "heun", "dpm"]
