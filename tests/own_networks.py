"""A user's own networks, good and bad, named as module:factory; torch and nothing else."""

import warnings

import torch
from torch import nn


class Small(nn.Module):
    """Two convolutions, told time and class by a shift of every channel."""

    def __init__(self, channels, out_channels, num_labels=0, width=8):
        super().__init__()
        self.register_buffer("rates", torch.exp(-torch.linspace(0, 4, width // 2)))
        self.time = nn.Linear(width, width)
        self.label = nn.Embedding(num_labels, width) if num_labels else None
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def shift(self, t, class_labels):
        angles = t[:, None] * self.rates
        shift = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(self.time.weight))
        return shift if class_labels is None else shift + self.label(class_labels)

    def forward(self, x, t, class_labels=None):
        shift = self.shift(t, class_labels)[:, :, None, None]
        return self.last(nn.functional.silu(self.norm(self.first(x)) + shift))


def labels_of(conditioning):
    """Rows of a table of classes, the null class included."""
    classes, null = (
        getattr(conditioning, f"{name}", None) for name in ("num_classes", "null_class")
    )
    return 0 if classes is None else max(classes, (null or 0) + 1)


def make(sample_shape, out_channels, conditioning):
    """The factory that users write."""
    return Small(sample_shape[0], out_channels, labels_of(conditioning))


# --- what check-student is to find ---------------------------------------------------------------


class Flawed(Small):
    """A sound network, of which each of these below spoils one thing."""

    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape[0], out_channels, labels_of(conditioning))


class ReturnsList(Flawed):
    def forward(self, x, t, class_labels=None):
        return [super().forward(x, t, class_labels)]


class WrongChannels(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x, t, class_labels).repeat(1, 3, 1, 1)


class NotFinite(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x, t, class_labels) / 0


class NoLabels(Flawed):
    def forward(self, x, t):
        return super().forward(x, t)


class Raises(Flawed):
    def forward(self, x, t, class_labels=None):
        self.norm(x[:, :, :1])
        return super().forward(x, t, class_labels)


class IgnoresX(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(0 * x, t, class_labels)


class IgnoresTime(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x, 0 * t, class_labels)


class IgnoresClass(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x, t, 0 * class_labels)


class FirstTimeForAll(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x, t[0].expand(len(x)), class_labels)


class FirstClassForAll(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x, t, class_labels[:1].expand(len(x)))


class MixesSamples(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x - x.mean(dim=0), t, class_labels)


class NoNullClass(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.label = nn.Embedding(conditioning.num_classes, self.label.embedding_dim)


class Unused(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.spare = nn.Linear(3, 3)


class NoEffect(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.cut_off = nn.Parameter(torch.ones(()))

    def forward(self, x, t, class_labels=None):
        return super().forward(x, t, class_labels) + 0 * self.cut_off


class DropsOut(Flawed):
    """Nothing wrong with it: it asks for random numbers in training mode."""

    def forward(self, x, t, class_labels=None):
        return super().forward(nn.functional.dropout(x, 0.1, self.training), t, class_labels)


class BatchNormed(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.norm = nn.BatchNorm2d(8)


class Shared(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.time.weight

    def shift(self, t, class_labels):
        return self.again(super().shift(t, class_labels))


class HiddenState(Flawed):
    """Random features that are an attribute: a typical slip."""

    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        del self.rates
        self.rates = torch.rand(4)


class UnsavedBuffer(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.register_buffer("rates", torch.rand(4), persistent=False)


class OtherEachTime(Flawed):
    made = 0

    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        type(self).made += 1
        self.add_module(f"layer_{self.made}", nn.Linear(8, 8))

    def shift(self, t, class_labels):
        own = next(module for name, module in self.named_children() if name.startswith("layer_"))
        return own(super().shift(t, class_labels))


class RandomInEvaluation(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(x + torch.randn_like(x), t, class_labels)


class Float32Only(Flawed):
    def shift(self, t, class_labels):
        angles = t[:, None] * self.rates.float()
        return self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(class_labels)


class LogOfTime(Flawed):
    """Sound at every level but the first, whose t is 0."""

    def forward(self, x, t, class_labels=None):
        return super().forward(x, t.log(), class_labels)


class ChangesItsInput(Flawed):
    def forward(self, x, t, class_labels=None):
        x.mul_(2)
        return super().forward(x, t, class_labels)


class OnTheCpu(Flawed):
    def shift(self, t, class_labels):
        return super().shift(t, class_labels) + torch.arange(8)


class ThroughNumpy(Flawed):
    def shift(self, t, class_labels):
        return super().shift(torch.from_numpy(t.numpy()), class_labels)


class PlainList(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.more = [nn.Linear(8, 8)]

    def shift(self, t, class_labels):
        return self.more[0](super().shift(t, class_labels))


class WeightNormed(Flawed):
    """With the old function, whose weights cannot be copied once they were used."""

    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first = nn.utils.weight_norm(self.first)


class SpectrallyNormed(Flawed):
    """Nothing wrong with it: a power iteration goes on with each evaluation in training."""

    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.first = nn.utils.parametrizations.spectral_norm(self.first)


class Lazy(Flawed):
    def __init__(self, sample_shape, out_channels, conditioning):
        super().__init__(sample_shape, out_channels, conditioning)
        self.time = nn.LazyLinear(8)


class DropsOutAlways(Flawed):
    def forward(self, x, t, class_labels=None):
        return super().forward(nn.functional.dropout(x, 0.1), t, class_labels)


class Branches(Flawed):
    """Python control flow on the values of a tensor."""

    def forward(self, x, t, class_labels=None):
        if t.max() > 5:
            return super().forward(x, t, class_labels)
        return super().forward(2 * x, t, class_labels)


class Saturated(Flawed):
    """No gradient reaches it through the clamp, wherever it starts."""

    def forward(self, x, t, class_labels=None):
        return (super().forward(x, t, class_labels) - 1e4).clamp(min=-1.0)


def raising_inside(sample_shape, out_channels, conditioning):
    """Fails three calls deep, in torch."""
    del sample_shape, out_channels, conditioning
    return nn.Sequential(*[nn.Conv2d(3, 4, 1, groups=3)])


class OneChannel(Flawed):
    """Forgets the second argument."""

    def __init__(self, sample_shape, out_channels, conditioning):
        del out_channels
        super().__init__(sample_shape, 1, conditioning)


class Pointwise(nn.Module):
    """For samples of any rank: every value by itself, and time and class."""

    def __init__(self, channels, out_channels, num_labels):
        super().__init__()
        self.time = nn.Linear(1, out_channels)
        self.label = nn.Embedding(num_labels, out_channels)
        self.layer = nn.Linear(channels, out_channels)

    def forward(self, x, t, class_labels):
        shift = self.time(t[:, None].to(x.dtype) / 50) + self.label(class_labels)
        mixed = self.layer(x.movedim(1, -1)).movedim(-1, 1)
        return mixed + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))


def pointwise(sample_shape, out_channels, conditioning):
    """Its factory."""
    return Pointwise(sample_shape[0], out_channels, labels_of(conditioning))


class Reader(nn.Module):
    """Told by text: the mean of its tokens, which is what `shape_of` says the width of."""

    def __init__(self, channels, out_channels, text_width, mean=True):
        super().__init__()
        self.time = nn.Linear(1, out_channels)
        self.text = nn.Linear(text_width, out_channels)
        self.layer = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.mean = mean

    def forward(self, x, t, encoder_hidden_states):
        tokens = encoder_hidden_states if self.mean else 0 * encoder_hidden_states
        shift = self.time(t[:, None].to(x.dtype) / 1000) + self.text(tokens.mean(dim=1))
        return self.layer(x) + shift[:, :, None, None]


def reader(sample_shape, out_channels, conditioning):
    """A factory for teachers of text."""
    _, width = conditioning.shape_of("encoder_hidden_states")
    return Reader(sample_shape[0], out_channels, width)


def deaf(sample_shape, out_channels, conditioning):
    """The same, ignoring what it is told."""
    _, width = conditioning.shape_of("encoder_hidden_states")
    return Reader(sample_shape[0], out_channels, width, mean=False)
