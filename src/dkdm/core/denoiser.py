"""Denoiser = network + process + parameterization + conditioning: what both models are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dkdm.core.bundle import Bundle
from dkdm.core.calls import Call, Network, call_of, takes
from dkdm.core.conditioning import (
    Condition,
    Conditioning,
    Interval,
    Unconditional,
    absent_rows,
    check_conditioning,
    guide,
    parse_interval,
)
from dkdm.core.inputs import try_conditioning
from dkdm.core.modes import evaluating
from dkdm.core.prediction import (
    Parameterization,
    Prediction,
    check_compatible,
    scale_input,
    to_x_0_eps,
)
from dkdm.core.process import Process, Spacing, per_sample
from dkdm.core.steps import sample
from dkdm.core.time import Time, network_time
from dkdm.errors import UsageError
from dkdm.reading.arguments import NamedArguments, is_array, number, refuse, shape, whole
from dkdm.reading.arrays import table, tensor
from dkdm.reading.sizes import in_a_line


class Batch(NamedTuple):
    """Noisy samples to be denoised.

    x: [B, ...] on the device; t: int64 [B] on the CPU; cond: rows per sample; rows: where in its
    source each sample came from, which only the source reads; s: int64 [B] on the CPU, the level
    that each sample moves to, None if it stays.
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
        with it, or an object with `.sample`; diffusers' own networks are called as they want it.
    sample_shape: (C, ...) of one sample, without the batch dimension.
    constants: what the network is fed the same for every sample (class 0 for a class-conditional
        network used without classes, the picture size for SDXL), tensors without batch dimension.
    time: what the network is fed for t, see `network_time`; None is what the process says.
    value_range: the smallest and largest value of the network's clean samples, which chains and
        training are left in; pictures are made from it. (The process's `Clipping` bounds chains.)
    call: how the network is called; None finds it by the network's class.
    bundle: what belongs to the model beside the network: autoencoder, text encoders, ...
    rescale: what states are multiplied with at each t before all else, [T]: they come from another
        process, see `matching`; None leaves them.
    decode: of an autoencoder of your own, latents [B, ...] -> pictures in [-1, 1]; None shows
        samples as they are. Students are shipped without it.
    guidance_interval: shares of noise, sigma / (alpha + sigma), between which guidance acts; None
        is everywhere (arXiv 2404.07724).
    evaluations: samples put through the network so far; guidance counts two a sample.
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
    evaluations: int = 0
    decode: Callable[[Tensor], Tensor] | None = None
    guidance_interval: Interval | None = None

    def __post_init__(self) -> None:
        self._check_arguments()
        check_compatible(self.parameterization, self.process)
        fed = self.process.network_time
        self.network_time = fed if self.time is None else network_time(self.process, self.time)
        self.call = self.call or call_of(self.network)
        self.embeds_guidance = embeds_guidance(self.network)

    def _check_arguments(self) -> None:
        """Take what is meant, and raise UsageError for the rest, with the remedy."""
        _check_network(self.network)
        if not isinstance(self.process, Process):
            refuse("Denoiser: process", self.process, _process_of(self.process))
        self.parameterization = _meaning(self.parameterization)
        self.sample_shape = shape("Denoiser: sample_shape", self.sample_shape)
        check_conditioning(self.conditioning)
        self.constants = _constants(self.constants)
        self.value_range = _ends("Denoiser: value_range", self.value_range)
        _check_functions(call=self.call, decode=self.decode)
        if self.guidance_interval is not None:
            ends = _ends("Denoiser: guidance_interval", self.guidance_interval)
            self.guidance_interval = parse_interval("{}:{}".format(*ends))
        if not isinstance(self.bundle, Bundle):
            refuse("Denoiser: bundle", self.bundle, "leave it out, or give decode=function")
        if self.rescale is not None:
            self.rescale = table("Denoiser: rescale", self.rescale)
        self.evaluations = whole("Denoiser: evaluations", self.evaluations, high=2**63)
        if not isinstance(self.name, str):
            refuse("Denoiser: name", self.name, "give a string")

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
        guidance_scale = self._scale_inside(guidance_scale, batch.t)
        if self.embeds_guidance:
            scale = torch.as_tensor(guidance_scale, dtype=torch.float32).expand(len(batch.t))
            batch = batch._replace(cond={"guidance": scale, **batch.cond})
        unguided = not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0
        if self.embeds_guidance or unguided:
            prediction = self._read(self._evaluate(batch.x, batch.t, batch.cond), batch)
            return prediction, prediction
        if self.guidance_interval is not None:
            return self._guided_inside(batch, torch.as_tensor(guidance_scale))
        null = self.conditioning.null(len(batch.t))
        both = {
            key: torch.cat([value, null[key].to(value) if key in null else value])
            for key, value in batch.cond.items()
        }
        doubled = self._evaluate(torch.cat([batch.x, batch.x]), batch.t.repeat(2), both)
        conditional, unconditional = doubled.chunk(2)
        guided = guide(conditional, unconditional, guidance_scale, self.sample_shape[0])
        return self._read(conditional, batch), self._read(guided, batch)

    def _scale_inside(self, scale: float | Tensor, t: Tensor) -> float | Tensor:
        """The guidance scale of each sample, 1 outside of the interval; 1.0 if it is 1 for all."""
        if self.guidance_interval is None:
            return scale
        inside = self.guided_levels()[t.cpu()]
        if not inside.any():
            return 1.0
        scales = torch.as_tensor(scale, dtype=torch.float32).expand(len(t))
        return torch.where(inside.to(scales.device), scales, torch.ones_like(scales))

    def guided_levels(self) -> Tensor:
        """Levels whose share of noise lies in the guidance interval, bool [T]."""
        low, high = self.guidance_interval or (0.0, 1.0)
        share = self.process.sigma / (self.process.alpha + self.process.sigma)
        return (share >= low) & (share <= high)

    def _guided_inside(self, batch: Batch, scale: Tensor) -> tuple[Prediction, Prediction]:
        """`predict_both`, with the second evaluation for the samples that are guided alone."""
        inside = self.guided_levels()[batch.t.cpu()]
        on = inside.nonzero().flatten()
        null = self.conditioning.null(len(on))
        both = {
            key: torch.cat([value, null[key].to(value) if key in null else value[on]])
            for key, value in batch.cond.items()
        }
        there = on.to(batch.x.device)
        x, t = torch.cat([batch.x, batch.x[there]]), torch.cat([batch.t, batch.t[on.to(batch.t)]])
        conditional, free = self._evaluate(x, t, both).tensor_split([len(batch.t)])
        unconditional = conditional.clone()
        unconditional[there] = free
        guided = guide(conditional, unconditional, scale, self.sample_shape[0])
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
        time = self.network_time[t.cpu()].to(x.device, torch.float32)
        output = self._called(self._cast(shown), time, cond)
        if not isinstance(output, Tensor):
            raise UsageError(
                f"{self.name}: the network returned {type(output).__name__}; return a tensor "
                f"{(len(x), *self.sample_shape)}, if need be by Denoiser(..., call=...)"
            )
        expected = self.sample_shape[0] * (2 if self.parameterization.learns_variance else 1)
        if output.shape[1] != expected or output.shape[2:] != x.shape[2:]:
            raise UsageError(
                f"{self.name}: the network returned {tuple(output.shape)} for an input of "
                f"{tuple(x.shape)}; expected {(len(x), expected, *x.shape[2:])}"
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _called(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The network's output; samples without any condition are evaluated by themselves."""
        assert self.call is not None
        absent = absent_rows(self.conditioning, cond)
        if absent is None:
            return self.call(self.network, x, time, self._fed(x, cond))
        output: Tensor | None = None
        for part in (absent, ~absent):
            rows = part.nonzero().flatten().to(x.device)
            if not len(rows):
                continue
            kept = ("guidance",) if part is absent else tuple(cond)
            fed = {key: cond[key][part] for key in kept if key in cond}
            found = self.call(self.network, x[rows], time[rows], self._fed(x[rows], fed))
            output = found.new_empty(len(x), *found.shape[1:]) if output is None else output
            output = output.index_copy(0, rows, found)
        assert output is not None
        return output

    def _fed(self, x: Tensor, cond: Condition) -> Condition:
        """Constants and embedded conditions, on the device and in the network's precision."""
        fixed = {key: value.expand(len(x), *value.shape) for key, value in self.constants.items()}
        own = cond.keys() - {"guidance"}
        fed = {**fixed, **(self.conditioning.embed(cond) if own else cond)}
        if not self.embeds_guidance:
            fed.pop("guidance", None)
        placed = {key: value.to(x.device) for key, value in fed.items()}
        return {k: v if k in _IN_FLOAT32 else self._cast(v) for k, v in placed.items()}

    def _cast(self, value: Tensor) -> Tensor:
        floating = value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if floating else value

    def to_pixels(self, x: Tensor) -> Tensor:
        """Pictures in about [-1, 1] of clean samples [B, ...]: decoded, where they are latents.

        Raises UsageError where `decode` does not return a tensor of as many pictures.
        """
        if self.decode is not None:
            return _decoded(self.decode, x)
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
            try_conditioning(self.conditioning)
            cond = self.conditioning.draw(2, random)
        if not isinstance(cond, Mapping):
            refuse("check: cond", cond, "give a dict of tensors with two rows, or leave it out")
        x = torch.randn(2, *self.sample_shape, generator=random).to(self.device)
        t = torch.tensor([0, self.process.num_levels - 1])
        try:
            with evaluating(self.network, self.call):
                output = self.predict(Batch(x, t, cond, t)).output
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(self._misfit(cond, error)) from error
        self.evaluations = before
        if self.decode not in (None, no_decoder):
            self.to_pixels(x.detach())
        if output.device.type != "meta" and not output.isfinite().all():
            row = int(output[0].isfinite().all())
            raise UsageError(
                f"{self.name}: its output for noise at the {('first', 'last')[row]} level is not "
                f"finite (it is fed t = {self.network_time[t[row]]:g}): check its weights, and "
                "that its layers and its precision can take this time"
            )

    def _misfit(self, cond: Condition, error: Exception) -> str:
        """Why a network could not be evaluated, and what to do."""
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is not None and refused[1] in self.conditioning.embed(cond):
            name = refused[1]
            return (
                f"{self.name} takes no argument '{name}': say how it is called, such as "
                f"Denoiser(..., call=lambda network, x, time, cond: network(x, time, "
                f"YOUR_ARGUMENT=cond['{name}'])), or leave conditioning out"
            )
        return (
            f"{self.name} does not fit samples of shape {self.sample_shape} with conditions "
            f"{_shown(cond)}: {in_a_line(error)}{self._hint(str(error))}"
        )

    def _hint(self, error: str) -> str:
        """What to do about a usual mistake; nothing for any other."""
        rest = self.sample_shape[1:]
        if len(rest) > 1 and "batched" in error:
            return f"; sample_shape is that of one sample: without the batch it would be {rest}"
        if "'indices'" in error:
            return "; times are fed as floats: call=lambda network, x, time, cond: ... time.long()"
        if "index out of range" in error:
            times = f"times are {self.network_time.min():g} to {self.network_time.max():g}"
            return f"; {times}: check the number of levels, of classes, and null_class"
        if "positional arguments but 4 were given" in error:
            return f"; give a function {_FUNCTIONS['call']}"
        if "missing 1 required positional argument" in error:
            return (
                "; give what else it is fed: conditioning=dkdm.ClassLabels(...) and, if it is not "
                "named class_labels, call=..."
            )
        return ""

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


_FUNCTIONS = {
    "call": "call(network, x, time, cond) -> output",
    "decode": "decode(latents) -> pictures in [-1, 1]",
}


def _check_functions(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and (isinstance(value, type) or not callable(value)):
            refuse(f"Denoiser: {name}", value, f"give a function: {_FUNCTIONS[name]}")


def _meaning(value: Any) -> Parameterization:
    """A parameterization, or the one that a word names."""
    if isinstance(value, str):
        return Parameterization(value)  # type: ignore[arg-type]
    if not isinstance(value, Parameterization):
        remedy = "give a word or dkdm.Parameterization(...), such as 'epsilon'"
        refuse("Denoiser: parameterization", value, remedy)
    return value


def _check_network(network: Any) -> None:
    if isinstance(network, Denoiser):
        refuse("Denoiser: network", network, "give its .network, or use it as it is")
    if isinstance(network, type):
        refuse("Denoiser: network", network, f"make one first: {network.__name__}(...)")
    if not callable(network):
        accepted = "give a torch.nn.Module or a function (x, time, **cond) -> output"
        refuse("Denoiser: network", network, accepted)


def _process_of(value: Any) -> str:
    """What to give in place of something that is no process."""
    if is_array(value) or isinstance(value, (list, tuple)):
        return "give dkdm.from_betas(betas)"
    if isinstance(value, Mapping):
        return "give dkdm.from_scheduler_config(config)"
    if hasattr(value, "config") and hasattr(value, "timesteps"):
        return "give dkdm.from_scheduler_config({**scheduler.config, '_class_name': ...})"
    return "give dkdm.from_betas(...), dkdm.rectified_flow(...), dkdm.karras(...) or a dkdm.Process"


def _constants(value: Any) -> Condition:
    """What is fed to every sample, as tensors by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        refuse(
            "Denoiser: constants", value, "give a dict of tensors, such as {'y': torch.tensor(0)}"
        )
    return {name: tensor(f"Denoiser: constants['{name}']", each) for name, each in value.items()}


def _ends(name: str, value: Any) -> tuple[float, float]:
    """Two numbers, the smaller one first."""
    value = value.tolist() if is_array(value) and value.ndim else value
    accepted = "give (smallest, largest), such as (0.0, 1.0)"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        refuse(name, value, accepted)
    low, high = (number(name, end) for end in value)
    if low >= high:
        refuse(name, value, f"{accepted}: the smaller one comes first")
    return low, high


def no_decoder(latents: Tensor) -> Tensor:
    """The `decode` of a model whose autoencoder is not in its folder: raises UsageError."""
    raise UsageError(
        f"the samples are latents {tuple(latents.shape[1:])} of an autoencoder that is not in the "
        "model's folder: give --output x.safetensors, or in Python dataclasses.replace(denoiser, "
        "decode=function)"
    )


_DECODES = "give a function of latents [B, ...] that returns pictures [B, 1 or 3, height, width]"


def _decoded(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    try:
        with evaluating(decode):
            found = decode(latents)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"decode raised {type(error).__name__} for latents {tuple(latents.shape)}: "
            f"{in_a_line(error)}; {_DECODES}"
        ) from error
    if not isinstance(found, Tensor) or found.ndim < 3 or len(found) != len(latents):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"decode returned {what} for latents {tuple(latents.shape)}; {_DECODES}")
    if found.ndim == 4 and found.shape[1] not in (1, 3) and found.shape[3] in (1, 3):
        raise UsageError(
            f"decode returned {tuple(found.shape)}, channels last: add .permute(0, 3, 1, 2)"
        )
    return found.detach().float()


_IN_FLOAT32 = ("time_ids", "resolution", "aspect_ratio", "guidance")  # embedded as times are


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
