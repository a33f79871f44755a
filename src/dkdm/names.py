"""Words that options and mathematics have in common; importing them costs nothing."""

from typing import Literal

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v"]
Sampler = Literal["ddim", "ddpm", "euler", "heun", "dpm"]
