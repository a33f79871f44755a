"""Denoiser = network + process + parameterization + conditioning: what both models are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dkdm.conditioning import Condition, Conditioning, Unconditional, guide
from dkdm.errors import UsageError
from dkdm.prediction import (
    Parameterization,
    Prediction,
    check_compatible,
    scale_input,
    to_x_0_eps,
)
from dkdm.process import Process, Spacing
from dkdm.steps import sample


class Batch(NamedTuple):
    """Noisy samples to be denoised.

    x: [B, ...] on the device; t: int64 [B] on the CPU; cond: rows per sample; rows: where in its
    source each sample came from (opaque to everyone else).
    """

    x: Tensor
    t: Tensor
    cond: Condition
    rows: Tensor


@dataclass(eq=False)
class Denoiser:
    """Any diffusion model as one call.

    network: any module or callable `(x, time, **cond)` giving a tensor [B, C or 2C, ...] or an
        object with `.sample`.
    sample_shape: (C, ...) of one sample, without the batch dimension.
    constants: what the network is fed the same for every sample (class 0 for a class-conditional
        network used without classes).
    evaluations: samples put through the network so far; guidance counts two a sample.
    """

    network: nn.Module | Callable[..., Tensor]
    process: Process
    parameterization: Parameterization
    sample_shape: tuple[int, ...]
    conditioning: Conditioning = field(default_factory=Unconditional)
    constants: dict[str, int] = field(default_factory=dict)
    name: str = "model"
    evaluations: int = 0

    def __post_init__(self) -> None:
        check_compatible(self.parameterization, self.process)
        if isinstance(self.network, nn.Module):
            silence_label_dropout(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        if isinstance(self.network, nn.Module):
            for tensor in self.network.parameters():
                return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype | None:
        """Precision of the network's parameters; None where it has none."""
        if isinstance(self.network, nn.Module):
            for tensor in self.network.parameters():
                return tensor.dtype
        return None

    @property
    def num_parameters(self) -> int:
        """How many parameters the network has."""
        if not isinstance(self.network, nn.Module):
            return 0
        return sum(p.numel() for p in self.network.parameters())

    def predict(self, batch: Batch, guidance_scale: float = 1.0) -> Prediction:
        """Evaluate the network once (twice with guidance) and read its output.

        Returns x_0 and eps [B, ...] in float32, unclipped.
        """
        raw = self._guided(batch, guidance_scale)
        channels = self.sample_shape[0]
        output, variance_output = raw[:, :channels], raw[:, channels:]
        alpha, sigma = self.process.at(batch.t)
        kind, sigma_data = self.parameterization.prediction, self.parameterization.sigma_data
        x_0, eps = to_x_0_eps(kind, output, batch.x, alpha, sigma, sigma_data)
        learned = self.parameterization.learns_variance
        return Prediction(output, x_0, eps, variance_output if learned else None)

    def _guided(self, batch: Batch, guidance_scale: float) -> Tensor:
        if guidance_scale == 1.0:
            return self._evaluate(batch.x, batch.t, batch.cond)
        null = self.conditioning.null(len(batch.t))
        both = {key: torch.cat([batch.cond[key], null[key].to(batch.cond[key])]) for key in null}
        doubled = self._evaluate(torch.cat([batch.x, batch.x]), batch.t.repeat(2), both)
        conditional, unconditional = doubled.chunk(2)
        return guide(conditional, unconditional, guidance_scale, self.sample_shape[0])

    def _evaluate(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.evaluations += len(t)
        _, sigma = self.process.at(t)
        shown = scale_input(
            self.parameterization.prediction, x, sigma, self.parameterization.sigma_data
        )
        shown = shown if self.dtype is None else shown.to(self.dtype)
        time = self.process.network_time[t.cpu()].to(x.device, torch.float32)
        fixed = {key: torch.full((len(t),), value) for key, value in self.constants.items()}
        cond = {key: value.to(x.device) for key, value in {**fixed, **cond}.items()}
        result = self.network(shown, time, **cond)
        output: Tensor = result if isinstance(result, Tensor) else result.sample
        expected = self.sample_shape[0] * (2 if self.parameterization.learns_variance else 1)
        if output.shape[1] != expected or output.shape[2:] != x.shape[2:]:
            raise UsageError(
                f"{self.name}: the network returned {tuple(output.shape)} for an input of "
                f"{tuple(x.shape)}; expected {(len(x), expected, *x.shape[2:])}"
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    @torch.no_grad()
    def check(self) -> None:
        """Evaluate two blank samples. Raises UsageError where network and shapes do not fit."""
        before = self.evaluations
        cond = self.conditioning.draw(2, torch.Generator().manual_seed(0))
        x = torch.zeros(2, *self.sample_shape, device=self.device)
        t = torch.tensor([0, self.process.num_levels - 1])
        try:
            self.predict(Batch(x, t, cond, t))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{self.name} does not fit samples of shape {self.sample_shape} with conditions "
                f"{sorted(cond) or 'none'}: {type(error).__name__}: {error}"
            ) from error
        self.evaluations = before

    @torch.no_grad()
    def sample(
        self,
        noise: Callable[[int], Tensor],
        cond: Condition,
        num_steps: int,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        spacing: Spacing | None = None,
    ) -> Tensor:
        """Draw samples with `num_steps` evaluations each.

        noise: step -> [B, ...] standard normal; step -1 asks for the starting noise. cond: one row
        a sample; spacing: of the steps, None is the process's own. Returns x_0 [B, ...].
        """

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return self.predict(Batch(x, t, cond, t), guidance_scale)

        x = self.process.start_std * noise(-1).to(self.device)
        steps = self.process.timesteps(num_steps, spacing)
        return sample(predict, self.process, self.parameterization, x, steps, noise, eta)


def silence_label_dropout(network: nn.Module) -> None:
    """Switch off the dropout of labels that diffusers' DiT does by itself in training mode.

    It drops them in every block on its own, so that the target's class is not the one that the
    student was told. Conditions are dropped where they are drawn instead.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
