"""Samples this model with diffusers alone.

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipeline(class_labels=[0, 1, 2], num_inference_steps=25).images
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class DenoiserPipeline(DiffusionPipeline):
    """A pixel-space denoiser with class labels or without.

    null_class: the label that means "no class" (for guidance); None where there is none.
    num_classes: classes 0..num_classes-1; None for an unconditional model.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, num_classes=None, null_class=None, class_names=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_classes=num_classes, null_class=null_class, class_names=class_names
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size=1,
        num_inference_steps=50,
        guidance_scale=1.0,
        generator=None,
        output_type="pil",
        return_dict=True,
    ):
        """Sample images. class_labels: a list of class ids, or None for random ones."""
        network, device = self.unet, self._execution_device
        labels = self._labels(class_labels, batch_size).to(device)
        size = network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), network.config.in_channels, height, width)
        x = randn_tensor(shape, generator=generator, device=device, dtype=network.dtype)
        x = x * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self._predict(x, t, labels, guidance_scale)
            x = self.scheduler.step(output, t, x, generator=generator).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels, batch_size):
        if class_labels is not None:
            return torch.as_tensor(class_labels, dtype=torch.int64)
        return torch.randint(self.config.num_classes or 1, (batch_size,))

    def _predict(self, x, t, labels, guidance_scale):
        network, time = self.unet, t.expand(len(x))
        kwargs = {"class_labels": labels} if True else {}
        output = network(x, time, **kwargs).sample
        if guidance_scale == 1.0:
            return output
        if self.config.null_class is None:
            raise ValueError("this model has no null class: guidance_scale must be 1")
        null = torch.full_like(labels, self.config.null_class)
        free = network(x, time, class_labels=null).sample
        channels = x.shape[1]
        guided = free[:, :channels] + guidance_scale * (output - free)[:, :channels]
        return torch.cat([guided, output[:, channels:]], dim=1)
