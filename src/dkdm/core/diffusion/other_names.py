"""What people call parameterizations and times elsewhere, for messages that say what was meant."""

OTHER_TIMES = {
    "index": "t timestep timesteps step level discrete",
    "fraction": "continuous noise_fraction flow",
    "data_fraction": "reversed 1_t",
    "log_snr": "logsnr lambda snr",
    "c_noise": "edm cnoise",
}
OTHER_PREDICTIONS = {
    "epsilon": "eps noise pred_noise",
    "sample": "x0 x_0 pred_x0 x_start clean data image",
    "v_prediction": "v pred_v",
    "flow_prediction": "velocity flow rectified_flow flow_matching",
    "edm": "f karras preconditioned",
}
OTHER_VARIANCES = {
    "fixed_small": "fixed small none",
    "fixed_large": "large",
    "learned_range": "range learned_sigma learn_sigma",
}
