"""What samples are measured against: during a run, at its end, and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from dkdm.config.models import TeacherChoice
from dkdm.config.sampling import DrawOptions
from dkdm.config.values import Count, CountOrNone, Resize, Scale
from dkdm.errors import UsageError
from dkdm.reading.fields import shown
from dkdm.reading.options import Options
from dkdm.reading.values import Range


class FeatureOptions(Options):
    """The network whose features are compared, and how it sees the images of a reference."""

    feature_network: str | None = None
    """Network whose features are compared: the file of the Inception network
    (inception-2015-12-05), download, which fetches it once, or fashion, the packaged one. Default:
    fashion for Fashion-MNIST, otherwise the file that was given before."""
    resize: Resize = "bilinear"
    """How images are brought to the Inception network's 299x299; published tables and statistics of
    ADM and EDM used tensorflow."""
    skip_bad: bool = False
    """Leave out images of the reference that cannot be read, instead of ending."""


class RunEvaluation(Options, title="Evaluation"):
    """Sample grids and a metric during the run, and the comparison at its end."""

    validation_steps: CountOrNone = 1000
    """Optimizer steps between sample grids; 0 draws no grids."""
    validation_sampling_steps: Count = 25
    """Sampler steps of the grids, of --validation-metric and of the final evaluation."""
    validation_metric: str | None = None
    """Metric measured with each grid, on the weights that would be shipped; the best weights are
    kept in best/. gap and teacher_distance need no images; fd, fid, kid, precision, class_accuracy
    ... need a reference. Default: none."""
    validation_samples: Annotated[int, Range(2, 10**6)] = 256
    """Samples drawn for --validation-metric, from the same noise every time."""
    ship_best: bool = False
    """Ship the best weights by --validation-metric instead of the last."""
    evaluation_samples: Annotated[int, Range(0, 10**6)] = 1000
    """Samples drawn from each model for the final distances; 0 skips them."""
    sampling_guidance_scale: Scale = 1.0
    """Guidance scale of the grids and of the final evaluation; 1 turns guidance off and costs
    half."""
    evaluation_reference: str = "auto"
    """Real images for the final distances: fashion-test, fashion-train, a folder of images, an .npz
    of images or statistics; none; or auto, which recognizes Fashion-MNIST by its class names."""


class EvaluationOptions(FeatureOptions, RunEvaluation):
    """Sample grids and a metric during the run, and the comparison at its end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_metric is not None and self.validation_steps == 0:
            raise UsageError(
                f"--validation-metric {self.validation_metric} with --validation-steps 0 is never "
                "measured: give the steps between measurements"
            )
        if self.ship_best and self.validation_metric is None:
            raise UsageError("--ship-best: give the metric that chooses, --validation-metric gap")


class JudgedTeacher(TeacherChoice, renamed={"factory": "teacher_factory"}):
    """The model that samples are compared with, and how it is read."""

    model: str = ""
    """As MODEL. Default: the teacher that a run names in its config.json."""
    guidance_scale: Scale | None = None
    """Scale that the teacher is guided by when it samples. Default: as in the run; without one, as
    --guidance-scale."""


class MeasuredSamples(DrawOptions):
    """What is drawn from the model, and how."""

    num_samples: Annotated[int, Range(2, 10**7)] = 5000
    """Number of samples. FID needs at least 2,048; published values use 50,000."""
    guidance_scale: Scale | None = None
    """Scale of classifier-free guidance; 1 turns it off. Default: as in a run's own
    evaluation; 1 for other models."""
    batch_size: Count = 256
    """Samples drawn at once. It does not change them."""


class MeasuredAgainst(Options, title="Measurement"):
    """What the samples are measured against."""

    reference: str | None = None
    """fashion-test, fashion-train, a folder of images, an .npz of images or statistics, another
    model, or teacher: samples of either are drawn. Default: recognized by the model's class names;
    if none is, only what needs no image is measured."""
    metrics: str | None = None
    """Names separated by commas, or all. Default: the usual ones of the reference, and the distance
    to the teacher if there is one."""


class MeasurementOptions(FeatureOptions, MeasuredAgainst):
    """What the samples are measured against, and by what."""

    feature_device: str | None = None
    """Device of the feature network, such as cpu or cuda:1. Default: the model's."""
    lpips_weights: str | None = None
    """For the metrics lpips and lpips_diversity: download, which fetches the published weights
    once, or the folder that holds them. Default: those that were given before."""
    lpips_backbone: Literal["alex", "vgg"] = "alex"
    """Network of LPIPS."""
    clip_model: str | None = None
    """For the metric clip, of text models: folder or hub id of a CLIP model as transformers saves
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics is not None and not self.metrics.strip(", "):
            raise UsageError(f"--metrics {shown(self.metrics)}: give all, or names such as fd,kid")


class EvaluationFiles(Options, title="Output"):
    """Where results are written."""

    output: Path | None = None
    """Folder for the samples, in shards of 1,000; other processes and a later start continue there.
    Default: a folder in the cache, $DKDM_CACHE or ~/.cache/dkdm."""
    json: Path | None = None
    """JSON file to write, with everything that a number depends on."""
