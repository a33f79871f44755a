"""Denoiser = network + process + parameterization + conditioning: what both models are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dkdm.bundle import Bundle
from dkdm.calls import Call, Network, call_of, takes
from dkdm.conditioning import Condition, Conditioning, Unconditional, guide
from dkdm.errors import UsageError
from dkdm.modes import evaluating
from dkdm.prediction import (
    Parameterization,
    Prediction,
    check_compatible,
    scale_input,
    to_x_0_eps,
)
from dkdm.process import Process, Spacing, TimeKind, network_times, per_sample
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

    network: any module or callable `(x, time, **cond)` giving a tensor [B, C or 2C, ...], a tuple
        with it, or an object with `.sample`; diffusers' own networks are called as they want it.
    sample_shape: (C, ...) of one sample, without the batch dimension.
    constants: what the network is fed the same for every sample (class 0 for a class-conditional
        network used without classes, the picture size for SDXL), tensors without batch dimension.
    time: what the network is fed for t, see `network_times`; None is what the process says.
    value_range: the smallest and largest value of the network's clean samples, which chains and
        training are left in; pictures are made from it. (The process's `Clipping` bounds chains.)
    call: how the network is called; None finds it by the network's class.
    bundle: what belongs to the model beside the network: autoencoder, text encoders, ...
    rescale: what states are multiplied with at each t before all else, [T]: they come from another
        process, see `matching`; None leaves them.
    evaluations: samples put through the network so far; guidance counts two a sample.
    """

    network: nn.Module | Callable[..., Any]
    process: Process
    parameterization: Parameterization
    sample_shape: tuple[int, ...]
    conditioning: Conditioning = field(default_factory=Unconditional)
    constants: Condition = field(default_factory=dict)
    name: str = "model"
    time: TimeKind | Callable[[Process], Tensor] | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    call: Call | None = None
    bundle: Bundle = field(default_factory=Bundle)
    rescale: Tensor | None = None
    evaluations: int = 0

    def __post_init__(self) -> None:
        check_compatible(self.parameterization, self.process)
        times = self.process.network_time
        self.times = times if self.time is None else network_times(self.process, self.time)
        self.call = self.call or call_of(self.network)
        self.embeds_guidance = embeds_guidance(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network computes: where its parameters are, or are brought layer by layer."""
        if not isinstance(self.network, nn.Module):
            return torch.device("cpu")
        first = next(self.network.parameters(), None)
        own = torch.device("cpu") if first is None else first.device
        return offloaded_to(self.network) or own if own.type == "meta" else own

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

    def predict(self, batch: Batch, guidance_scale: float | Tensor = 1.0) -> Prediction:
        """Evaluate the network once (twice with guidance) and read its output.

        guidance_scale: one number, or one a sample [B]; a network that embeds it (Flux) is fed it
        instead, and evaluated once. Returns x_0 and eps [B, ...] in float32, unclipped.
        """
        return self.predict_both(batch, guidance_scale)[1]

    def predict_both(
        self, batch: Batch, guidance_scale: float | Tensor = 1.0
    ) -> tuple[Prediction, Prediction]:
        """The prediction without and with guidance, at the cost of the second alone."""
        if self.rescale is not None:
            factor = per_sample(self.rescale[batch.t.cpu()], batch.x)
            batch = batch._replace(x=factor * batch.x)
        if self.embeds_guidance:
            scale = torch.as_tensor(guidance_scale, dtype=torch.float32).expand(len(batch.t))
            batch = batch._replace(cond={"guidance": scale, **batch.cond})
        unguided = not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0
        if self.embeds_guidance or unguided:
            prediction = self._read(self._evaluate(batch.x, batch.t, batch.cond), batch)
            return prediction, prediction
        null = self.conditioning.null(len(batch.t))
        both = {
            key: torch.cat([value, null[key].to(value) if key in null else value])
            for key, value in batch.cond.items()
        }
        doubled = self._evaluate(torch.cat([batch.x, batch.x]), batch.t.repeat(2), both)
        conditional, unconditional = doubled.chunk(2)
        guided = guide(conditional, unconditional, guidance_scale, self.sample_shape[0])
        return self._read(conditional, batch), self._read(guided, batch)

    def _read(self, raw: Tensor, batch: Batch) -> Prediction:
        channels = self.sample_shape[0]
        output, variance_output = raw[:, :channels], raw[:, channels:]
        alpha, sigma = self.process.at(batch.t)
        kind, sigma_data = self.parameterization.prediction, self.parameterization.sigma_data
        x_0, eps = to_x_0_eps(kind, output, batch.x, alpha, sigma, sigma_data)
        learned = self.parameterization.learns_variance
        return Prediction(output, x_0, eps, variance_output if learned else None)

    def _evaluate(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.evaluations += len(t)
        _, sigma = self.process.at(t)
        shown = scale_input(
            self.parameterization.prediction, x, sigma, self.parameterization.sigma_data
        )
        time = self.times[t.cpu()].to(x.device, torch.float32)
        assert self.call is not None
        output = self.call(self.network, self._cast(shown), time, self._fed(x, cond))
        expected = self.sample_shape[0] * (2 if self.parameterization.learns_variance else 1)
        if output.shape[1] != expected or output.shape[2:] != x.shape[2:]:
            raise UsageError(
                f"{self.name}: the network returned {tuple(output.shape)} for an input of "
                f"{tuple(x.shape)}; expected {(len(x), expected, *x.shape[2:])}"
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _fed(self, x: Tensor, cond: Condition) -> Condition:
        """Constants and embedded conditions, on the device and in the network's precision."""
        fixed = {key: value.expand(len(x), *value.shape) for key, value in self.constants.items()}
        fed = {**fixed, **self.conditioning.embed(cond)}
        if not self.embeds_guidance:
            fed.pop("guidance", None)
        return {key: self._cast(value.to(x.device)) for key, value in fed.items()}

    def _cast(self, value: Tensor) -> Tensor:
        floating = value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if floating else value

    def to_pixels(self, x: Tensor) -> Tensor:
        """Pictures in about [-1, 1] of clean samples [B, ...]: decoded, where they are latents."""
        if self.bundle.autoencoder is not None:
            return self.bundle.autoencoder.decode(x)
        low, high = self.value_range
        return x if (low, high) == (-1.0, 1.0) else 2 * (x - low) / (high - low) - 1

    @torch.no_grad()
    def check(self, cond: Condition | None = None) -> None:
        """Evaluate two samples of noise, at the first level and the last, in evaluation mode.

        cond: two rows; None draws them. Raises UsageError where network and shapes do not fit, and
        where what it answers is not finite.
        """
        before = self.evaluations
        random = torch.Generator().manual_seed(0)
        if cond is None:
            cond = self.conditioning.draw(2, random)
        x = torch.randn(2, *self.sample_shape, generator=random).to(self.device)
        t = torch.tensor([0, self.process.num_levels - 1])
        try:
            with evaluating(self.network, self.call):
                output = self.predict(Batch(x, t, cond, t)).output
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{self.name} does not fit samples of shape {self.sample_shape} with conditions "
                f"{_shown(cond)}: {type(error).__name__}: {error}"
            ) from error
        self.evaluations = before
        if output.device.type != "meta" and not output.isfinite().all():
            row = int(output[0].isfinite().all())
            raise UsageError(
                f"{self.name}: its output for noise at the {('first', 'last')[row]} level "
                f"is not finite (it is fed t = {self.times[t[row]]:g}); expected sound weights, "
                "and a network and precision that can take this time"
            )

    @torch.no_grad()
    def sample(
        self,
        noise: Callable[[int], Tensor],
        cond: Condition,
        num_steps: int,
        eta: float = 0.0,
        guidance_scale: float | Tensor = 1.0,
        spacing: Spacing | None = None,
    ) -> Tensor:
        """Draw samples with `num_steps` evaluations each.

        noise: step -> [B, ...] standard normal; step -1 asks for the starting noise. cond: one row
        a sample; spacing: of the steps, None is the process's own. Returns x_0 [B, ...], drawn in
        evaluation mode.
        """

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return self.predict(Batch(x, t, cond, t), guidance_scale)

        x = self.process.start_std * noise(-1).to(self.device)
        steps = self.process.timesteps(num_steps, spacing)
        with evaluating(self.network, self.call):
            return sample(predict, self.process, self.parameterization, x, steps, noise, eta)


def offloaded_to(network: nn.Module) -> torch.device | None:
    """Where accelerate brings offloaded layers in their turn; None for any other network."""
    for module in network.modules():
        executes = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if executes is not None:
            return torch.device(executes)
    return None


def embeds_guidance(network: Network) -> bool:
    """Whether a network is fed the guidance scale itself: Flux-dev, or a module that asks for it.

    diffusers' networks say so in their config, others by an argument named `guidance`.
    """
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        network = network.module
    config = getattr(network, "config", None)
    if isinstance(config, Mapping) and "guidance_embeds" in config:
        return bool(config["guidance_embeds"])
    return not type(network).__module__.startswith("diffusers.") and takes(network, "guidance")


def _shown(cond: Condition) -> str:
    """Conditions by name, ids with their values."""
    shown = [f"{k} {v.tolist()}" if v.ndim == 1 else k for k, v in sorted(cond.items())]
    return ", ".join(shown) or "none"
