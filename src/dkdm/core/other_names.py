"""What people call parameterizations and times elsewhere, for messages that say what was meant."""

OTHER_TIMES = {
    "t": "index",
    "timestep": "index",
    "timesteps": "index",
    "step": "index",
    "level": "index",
    "discrete": "index",
    "continuous": "fraction",
    "noise_fraction": "fraction",
    "flow": "fraction",
    "reversed": "data_fraction",
    "1_t": "data_fraction",
    "logsnr": "log_snr",
    "lambda": "log_snr",
    "snr": "log_snr",
    "edm": "c_noise",
    "cnoise": "c_noise",
}
