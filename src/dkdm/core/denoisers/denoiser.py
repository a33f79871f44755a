"""Denoiser = network + process + parameterization + conditioning: what both models are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.calls import IN_FLOAT32, Call, call_of, embeds_guidance, offloaded_to
from dkdm.core.denoisers.conditioning import (
    Condition,
    Conditioning,
    Interval,
    Unconditional,
    absent_rows,
    guide,
)
from dkdm.core.denoisers.decoding import decoded, no_decoder
from dkdm.core.denoisers.inputs import try_conditioning
from dkdm.core.denoisers.kinds import check_conditioning
from dkdm.core.denoisers.modes import evaluating
from dkdm.core.denoisers.refusals import (
    check_finite,
    check_functions,
    check_kinds,
    check_network,
    check_output,
    constants_given,
    ends_given,
    interval_given,
    misfit,
    parameterization_given,
)
from dkdm.core.devices import looked_up, to_device
from dkdm.core.diffusion.prediction import (
    Parameterization,
    Prediction,
    check_compatible,
    scale_input,
    to_x_0_eps,
)
from dkdm.core.diffusion.process import Process, Spacing, per_sample
from dkdm.core.diffusion.solvers import Solver
from dkdm.core.diffusion.steps import sample
from dkdm.core.diffusion.time import Time, levels_inside, network_time
from dkdm.errors import raised_as
from dkdm.reading.arguments import NamedArguments, refuse, shape
from dkdm.reading.arrays import table


class Batch(NamedTuple):
    """Noisy samples to be denoised.

    x: [B, ...] on the device; t: int64 [B] on the CPU; cond: rows per sample; rows: where in its
    source each sample came from, which only the source reads; s: int64 [B] on the CPU, the level
    that each sample moves to (-1 is the end of its chain), None if it stays.
    """

    x: Tensor
    t: Tensor
    cond: Condition
    rows: Any = None
    s: Tensor | None = None


@dataclass(eq=False)
class Denoiser(NamedArguments):
    """Any diffusion model as one call.

    network: any module or callable `(x, time, **cond)` giving a tensor [B, C or 2C, ...], a tuple
        with it, or an object with `.sample`; diffusers' networks are called as they ask to be.
    sample_shape: (C, ...) of one sample, without the batch dimension.
    constants: what the network is fed the same for every sample (class 0 for a class-conditional
        network used without classes, the image size for SDXL), tensors without batch dimension.
    time: what the network is fed for t, see `network_time`; None is the process's network_time.
    value_range: the smallest and largest value of the network's clean samples, as chains and
        training keep them; images are made from it. (The process's `Clipping` bounds chains.)
    call: how the network is called; None finds it by the network's class.
    bundle: what belongs to the model beside the network: autoencoder, text encoders, ...
    rescale: what states of another process are multiplied with at each t, [T], see `matching`;
        None leaves states as they are.
    decode: a function of latents [B, ...] that returns images in [-1, 1]; None shows samples as
        they are. Students are shipped without it.
    guidance_interval: shares of noise, sigma / (alpha + sigma), between which guidance acts; None
        is everywhere (arXiv 2404.07724).
    """

    meant: ClassVar[Mapping[str, str]] = {
        "model": "network",
        "prediction": "parameterization",
        "prediction_type": "parameterization",
        "scheduler": "process",
        "shape": "sample_shape",
        "image_size": "sample_shape",
        "num_classes": "conditioning",
        "vae": "decode",
    }

    network: nn.Module | Callable[..., Any]
    process: Process
    parameterization: Parameterization
    sample_shape: tuple[int, ...]
    conditioning: Conditioning = field(default_factory=Unconditional)
    constants: Condition = field(default_factory=dict)
    name: str = "model"
    time: Time | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    call: Call | None = None
    bundle: Bundle = field(default_factory=Bundle)
    rescale: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    guidance_interval: Interval | None = None

    def __post_init__(self) -> None:
        check_network(self.network)
        check_kinds(self.process, self.bundle, self.name)
        check_conditioning(self.conditioning)
        check_functions(call=self.call, decode=self.decode)
        self.parameterization = parameterization_given(self.parameterization)
        check_compatible(self.parameterization, self.process)
        self.sample_shape = shape("Denoiser: sample_shape", self.sample_shape)
        self.constants = constants_given(self.constants)
        self.value_range = ends_given("Denoiser: value_range", self.value_range)
        self.guidance_interval = interval_given(self.guidance_interval)
        if self.rescale is not None:
            self.rescale = table("Denoiser: rescale", self.rescale)
        fed = self.process.network_time
        self.network_time = fed if self.time is None else network_time(self.process, self.time)
        self.guided_levels = levels_inside(self.process, self.guidance_interval)
        self.call = self.call or call_of(self.network)
        self.embeds_guidance = embeds_guidance(self.network)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters() if isinstance(self.network, nn.Module) else iter(())

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters, or the one that they are brought to in turns."""
        first = next(self._parameters(), None)
        found = torch.device("cpu") if first is None else first.device
        return offloaded_to(self.network) or found if found.type == "meta" else found  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype | None:
        """Precision of the network's parameters; None if it has no parameters."""
        first = next(self._parameters(), None)
        return None if first is None else first.dtype

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: C, or 2C with a learned variance."""
        return self.sample_shape[0] * (2 if self.parameterization.learns_variance else 1)

    @property
    def num_parameters(self) -> int:
        """How many parameters the network has."""
        return sum(parameter.numel() for parameter in self._parameters())

    def predict(self, batch: Batch, guidance_scale: float | Tensor = 1.0) -> Prediction:
        """Evaluate the network once (twice with guidance) and read its output.

        guidance_scale: one number, or one a sample [B]; a network that embeds it (Flux) is fed it
        instead, and evaluated once. Returns x_0 and eps [B, ...] in float32, unclipped.
        """
        return self.predict_both(batch, guidance_scale)[1]

    def predict_both(
        self, batch: Batch, guidance_scale: float | Tensor = 1.0
    ) -> tuple[Prediction, Prediction]:
        """(unguided, guided) predictions; they cost no more than the guided one alone."""
        if self.rescale is not None:
            factor = per_sample(looked_up(self.rescale, batch.t), batch.x)
            batch = batch._replace(x=factor * batch.x)
        if self.embeds_guidance:
            batch = self._fed_guidance(batch, guidance_scale)
        elif isinstance(guidance_scale, Tensor) or guidance_scale != 1:
            inside = self._inside(batch.t)
            if len(inside):
                return self._guided(batch, guidance_scale, inside)
        prediction = self.read(self._evaluate(batch.x, batch.t, batch.cond), batch)
        return prediction, prediction

    def evaluations_at(self, t: Tensor, guided: bool) -> Tensor:
        """How often the network is evaluated to predict each sample at t, int64 [B]."""
        twice = guided and not self.embeds_guidance
        return 1 + (looked_up(self.guided_levels, t) & twice).long()

    def _fed_guidance(self, batch: Batch, scale: float | Tensor) -> Batch:
        """The batch with the guidance scale among its conditions, 1 outside of the interval."""
        inside = looked_up(self.guided_levels, batch.t)
        inside = inside.to(scale.device) if isinstance(scale, Tensor) else inside
        one = torch.ones_like(inside, dtype=torch.float32)
        fed = torch.where(inside, (one * scale).float(), one)
        return batch._replace(cond={"guidance": fed, **batch.cond})

    def _inside(self, t: Tensor) -> Tensor:
        """Which rows of a batch are guided, int64 [n]."""
        return looked_up(self.guided_levels, t).nonzero().flatten()

    def _guided(
        self, batch: Batch, scale: float | Tensor, inside: Tensor
    ) -> tuple[Prediction, Prediction]:
        """`predict_both`, evaluated under the null condition for the rows inside the interval."""
        rows = to_device(inside, batch.x.device)
        null = self.conditioning.null(len(inside))
        both = {
            key: torch.cat([value, null[key].to(value) if key in null else value[inside]])
            for key, value in batch.cond.items()
        }
        x, t = torch.cat([batch.x, batch.x[rows]]), torch.cat([batch.t, batch.t[inside]])
        conditional, free = self._evaluate(x, t, both).tensor_split([len(batch.t)])
        scale = scale.expand(len(batch.t))[inside] if isinstance(scale, Tensor) else scale
        guided = conditional.clone()
        guided[rows] = guide(conditional[rows], free, scale, self.sample_shape[0])
        return self.read(conditional, batch), self.read(guided, batch)

    def read(self, raw: Tensor, batch: Batch) -> Prediction:
        """What a raw output [B, C or 2C, ...] for a batch means."""
        channels = self.sample_shape[0]
        output, variance_output = raw[:, :channels], raw[:, channels:]
        alpha, sigma = self.process.at(batch.t)
        kind, sigma_data = self.parameterization.prediction, self.parameterization.sigma_data
        x_0, eps = to_x_0_eps(kind, output, batch.x, alpha, sigma, sigma_data)
        learned = self.parameterization.learns_variance
        return Prediction(output, x_0, eps, variance_output if learned else None)

    def _evaluate(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        meaning = self.parameterization
        shown = scale_input(meaning.prediction, x, self.process.at(t)[1], meaning.sigma_data)
        time = to_device(looked_up(self.network_time, t), x.device, torch.float32)
        output = self._called(self._cast(shown), time, cond)
        check_output(self.name, output, x, self.out_channels)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _called(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The network's output; samples without any condition are evaluated by themselves."""
        assert self.call is not None
        absent = absent_rows(self.conditioning, cond)
        if absent is None:
            return self.call(self.network, x, time, self._fed(x, cond))
        outputs, order = [], []
        for part, names in ((absent, cond.keys() & {"guidance"}), (~absent, cond.keys())):
            rows = to_device(part.nonzero().flatten(), x.device)
            if len(rows):
                fed = self._fed(x[rows], {name: cond[name][part] for name in names})
                outputs.append(self.call(self.network, x[rows], time[rows], fed))
                order.append(rows)
        return torch.cat(outputs)[torch.cat(order).argsort()]

    def _fed(self, x: Tensor, cond: Condition) -> Condition:
        """Constants and embedded conditions, on the device and in the network's precision."""
        fixed = {key: value.expand(len(x), *value.shape) for key, value in self.constants.items()}
        drawn = cond.keys() - {"guidance"}
        fed = {**fixed, **(self.conditioning.embed(cond) if drawn else cond)}
        if not self.embeds_guidance:
            fed.pop("guidance", None)
        placed = {key: to_device(value, x.device) for key, value in fed.items()}
        return {k: v if k in IN_FLOAT32 else self._cast(v) for k, v in placed.items()}

    def _cast(self, value: Tensor) -> Tensor:
        floating = value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if floating else value

    def to_pixels(self, x: Tensor) -> Tensor:
        """Images in about [-1, 1] of clean samples [B, ...], decoded if they are latents.

        Raises UsageError if `decode` does not return a tensor of as many images.
        """
        if self.decode is not None:
            return decoded(self.decode, x)
        if self.bundle.autoencoder is not None:
            return self.bundle.autoencoder.decode(x)
        low, high = self.value_range
        return x if (low, high) == (-1.0, 1.0) else 2 * (x - low) / (high - low) - 1

    @torch.no_grad()
    def check(self, cond: Condition | None = None) -> None:
        """Evaluate two samples of noise, at the first and the last level, in evaluation mode.

        cond: two rows; None draws them. Raises UsageError if the network does not fit the shapes,
        or if its output is not finite.
        """
        random = torch.Generator().manual_seed(0)
        if cond is None:
            try_conditioning(self.conditioning)
            cond = self.conditioning.draw(2, random)
        if not isinstance(cond, Mapping):
            refuse("check: cond", cond, "give a dict of tensors with two rows, or leave it out")
        x = torch.randn(2, *self.sample_shape, generator=random).to(self.device)
        t = torch.tensor([0, self.process.num_levels - 1])
        with raised_as(partial(misfit, self, cond)), evaluating(self.network, self.call):
            output = self.predict(Batch(x, t, cond)).output
        if self.decode not in (None, no_decoder):
            self.to_pixels(x)
        check_finite(self, output, t)

    @torch.no_grad()
    def sample(
        self,
        noise: Callable[[int], Tensor],
        cond: Condition,
        num_steps: int,
        eta: float = 0.0,
        guidance_scale: float | Tensor = 1.0,
        spacing: Spacing | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw samples in `num_steps` steps.

        noise: step -> [B, ...] standard normal; step -1 asks for the starting noise. cond: one row
        a sample; spacing: of the steps, None is the process's. solver: of second order, instead of
        DDPM and DDIM by `eta`. Returns x_0 [B, ...], drawn in evaluation mode.
        """

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return self.predict(Batch(x, t, cond), guidance_scale)

        x = self.process.start_std * noise(-1).to(self.device)
        steps = self.process.timesteps(num_steps, spacing)
        with evaluating(self.network, self.call):
            if solver is not None:
                return solver(predict, self.process, x, steps)
            return sample(predict, self.process, self.parameterization, x, steps, noise, eta)
