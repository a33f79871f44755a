"""CUDA graphs where there is no CUDA; `test_cuda.py` has the rest."""

from dataclasses import replace

import torch

from dkdm.core.graphs import Replayed, replayed, unreplayed
from dkdm.evaluation.fingerprint import fingerprint
from factories import denoiser, some_batch


def test_on_a_cpu_a_network_is_called_as_it_is():
    model = denoiser()
    assert replayed(model) is model
    wrapped, batch = replace(model, call=Replayed(model.call)), some_batch(model)
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(wrapped.predict(batch).output, model.predict(batch).output)
    assert not wrapped.call.graphs


def test_a_replayed_model_is_the_same_model():
    model = denoiser()
    wrapped = replace(model, call=Replayed(model.call))
    assert unreplayed(wrapped.call) is unreplayed(model.call) is model.call
    assert fingerprint(wrapped) == fingerprint(model)
