"""Self-correction as a diffusers pipeline."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from dpt.adapter import Scorer
from dpt.checkpoint import load_checkpoint
from dpt.sampling import CorrectionSettings, guided_steps, sample
from dpt.stable_diffusion import StableDiffusion


class SelfCorrectionPipeline(StableDiffusionPipeline):
    """A `StableDiffusionPipeline` whose steps follow the matching score of an adapter.

    pipe = SelfCorrectionPipeline.from_pretrained("ckpt/shapes", safety_checker=None)
    pipe.load_dpt("ckpt/shapes-dpt")
    sampling = {"guidance_scale": 5, "num_inference_steps": 20, "correction_norm": 0.012, "correction_target": "latent"}
    image = pipe("a red circle left of a blue square", **sampling).images[0]

    `from_pipe` takes another pipeline's components. Any scheduler may be set.
    """

    _scorer: Scorer | None = None

    def load_dpt(self, path: str | Path, **released_settings) -> "SelfCorrectionPipeline":
        """Attaches an adapter and a LoRA; see `dpt.checkpoint.load_checkpoint`."""
        checkpoint = load_checkpoint(path, **released_settings)
        self._scorer = checkpoint.attach(self._as_stable_diffusion())
        return self

    def _as_stable_diffusion(self) -> StableDiffusion:
        for module in (self.text_encoder, self.vae, self.unet):
            module.eval().requires_grad_(False)
        name = self.config.get("_name_or_path") or type(self).__name__
        return StableDiffusion(name, name, self.tokenizer, self.text_encoder, self.vae, self.unet, self.scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        correction_factor: float = 0.5,
        correction_norm: float | None = None,
        correction_target: str = "conditional",
        correction_start: float = 0.0,
        correction_stop: float = 1.0,
        on_nan: str = "raise",
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws prompts; the arguments are `StableDiffusionPipeline`'s and `CorrectionSettings`'.

        Args:
            prompt_embeds, negative_prompt_embeds: contexts (B, L, E) instead of prompts.
            pooled_prompt_embeds: the pooled text (B, P) that belongs to `prompt_embeds`; a correction needs it.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; the latents of the
                dict that it returns, if it does, take their place.
            callback_on_step_end_tensor_inputs: what its dict holds: latents, prompt_embeds, negative_prompt_embeds.

        Raises:
            ValueError: a size the model cannot draw, neither or both of prompt and embeddings, or a correction without
                `load_dpt` or pooled text.
        """
        settings = CorrectionSettings(
            correction_factor, correction_norm, correction_target, correction_start, correction_stop, on_nan
        )
        if settings.active and self._scorer is None:
            raise ValueError("correction_factor needs an adapter: call load_dpt first, or pass correction_factor=0")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds")
        if prompt_embeds is not None and settings.active and pooled_prompt_embeds is None:
            raise ValueError("correction_factor with prompt_embeds needs pooled_prompt_embeds too")
        unknown = {*callback_on_step_end_tensor_inputs} - {"latents", "prompt_embeds", "negative_prompt_embeds"}
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {', '.join(sorted(unknown))}, which is not there"
            )
        sd = self._as_stable_diffusion()
        context, pooled = prompt_embeds, pooled_prompt_embeds
        if context is None:
            context, pooled = sd.encode_prompts([prompt] if isinstance(prompt, str) else prompt)
        negative = negative_prompt_embeds
        if negative is None:
            given = negative_prompt or ""
            negative, _ = sd.encode_prompts([given] if isinstance(given, str) else given)
        count = len(context) * num_images_per_prompt
        context, negative = (x.repeat_interleave(count // len(x), 0) for x in (context, negative))
        if pooled is not None:
            pooled = pooled.repeat_interleave(num_images_per_prompt, 0)
        shape = (count, *sd.latent_shape(height, width))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if settings.active:
            self._scorer.adapter.to(self._execution_device)
        scorer = self._scorer if settings.active else None
        denoise, correct = guided_steps(
            self.unet, self.scheduler, context, negative, pooled, guidance_scale, scorer, settings
        )
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(step, latents):
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"latents": latents, "prompt_embeds": context, "negative_prompt_embeds": negative}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, step, self.scheduler.timesteps[step], tensors)
                return changed.get("latents") if isinstance(changed, dict) else None

            latents = sample(
                denoise,
                self.scheduler,
                latents.to(self._execution_device, torch.float32),
                num_inference_steps=num_inference_steps,
                correct=correct,
                correction_target=settings.target,
                generator=generator,
                on_step=on_step,
            )
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(sd.decode_latents(latents) * 2 - 1, output_type=output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, None) if return_dict else (images, None)
