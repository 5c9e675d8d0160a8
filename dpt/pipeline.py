"""Self-correction as a diffusers pipeline.

Shapes: B images, C latent channels, (h, w) latent size, L text tokens, E context width, P pooled text width.
"""

import contextlib
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor

from dpt.adapter.adapter import Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import SD_XL, TRANSFORMERS, check_size, pipeline_of, recommended
from dpt.bounds import Bounds
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.choosing import Candidates, draw_and_choose
from dpt.guidance import guided
from dpt.matching_score import ScoreReader
from dpt.sampling import ClassifierFreeGuidance, Guidance, sample
from dpt.sampling_settings import PAPER, Sampling


class SelfCorrectionPipeline(StableDiffusionPipeline):
    """A `StableDiffusionPipeline` whose steps follow the matching score of an adapter.

    pipe = SelfCorrectionPipeline.from_pretrained("ckpt/shapes", safety_checker=None)
    pipe.load_dpt("ckpt/shapes-dpt")
    sampling = {"guidance_scale": 5, "num_inference_steps": 20, "correction_norm": 0.012, "correction_target": "latent"}
    image = pipe("a red circle left of a blue square", **sampling).images[0]

    `from_pipe` takes another pipeline's components. Any scheduler may be set.
    """

    _callback_tensor_inputs = (*StableDiffusionPipeline._callback_tensor_inputs, "pooled_prompt_embeds")
    _scorer: Scorer | None = None
    _recommended: Sampling = PAPER
    kept: list[int] | None = None
    """of the last call with candidates, the number of the one that was kept for each picture"""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> "SelfCorrectionPipeline":
        """As `StableDiffusionPipeline.from_pretrained`. Raises ValueError for a model of another family."""
        kind = pipeline_of(str(pretrained_model_name_or_path))
        if kind in (SD_XL, *TRANSFORMERS):
            raise ValueError(
                f"{pretrained_model_name_or_path} is of {kind}; SelfCorrectionPipeline is of Stable Diffusion 1 and 2 "
                "alone: draw with dpt.Artist.load"
            )
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    def load_dpt(self, path: str | Path, **released_settings) -> "SelfCorrectionPipeline":
        """Attaches an adapter and a LoRA; see `dpt.checkpoint.checkpoint.load_checkpoint`."""
        checkpoint = load_checkpoint(path, **released_settings)
        self._scorer = checkpoint.attach(self._as_stable_diffusion())
        self._recommended = recommended(checkpoint.config.base_model, checkpoint.config)
        return self

    def _as_stable_diffusion(self) -> StableDiffusion:
        for module in (self.text_encoder, self.vae, self.unet):
            if module is not None:
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
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image=None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        *,
        pooled_prompt_embeds: torch.Tensor | None = None,
        correction_factor: float | None = None,
        correction_norm: float | None = None,
        correction_target: str | None = None,
        correction_start: float | None = None,
        correction_stop: float | None = None,
        on_nan: str | None = None,
        candidates: int | None = None,
        choose_at: tuple[float, ...] | None = None,
        correct_candidates: bool | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws prompts; the arguments are `StableDiffusionPipeline`'s, and fields of `Sampling`.

        Arguments of the correction that are None are as the weights recommend: see `dpt.base_models.recommended`.
        Without a correction the pictures are `StableDiffusionPipeline`'s, whose documentation describes its arguments.
        Three things are taken that it refuses or ignores: height or width alone, one negative prompt for several
        prompts, and a callback that returns None.

        Args:
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step. Sampling and the
                matching score go on from the tensors of the dict that it returns. As in `StableDiffusionPipeline`,
                `prompt_embeds` are those of the negative prompts and then of the prompts, (2B, L, E), where pictures
                are guided, and `negative_prompt_embeds` are not read again. The score compares with the call's text
                until `pooled_prompt_embeds` are returned too.
            callback_on_step_end_tensor_inputs: names of the tensors: latents, prompt_embeds, negative_prompt_embeds,
                pooled_prompt_embeds.
            candidates, choose_at, correct_candidates: noises that each picture is chosen from by the matching score, by
                default none; see `Sampling`. They exclude latents, callbacks and eta.
            pooled_prompt_embeds: the pooled text (B, P) that the matching score compares with; by default the prompt's.
                A correction of `prompt_embeds` needs it.

        Raises:
            ValueError: arguments that do not fit each other or the model; a correction without `load_dpt`, without
                pooled text, or of a U-Net that is conditioned on more than text (IP-Adapter, distilled guidance).
        """
        correction = {
            "correction_factor": correction_factor,
            "correction_norm": correction_norm,
            "correction_target": correction_target,
            "correction_start": correction_start,
            "correction_stop": correction_stop,
            "on_nan": on_nan,
            "correct_candidates": correct_candidates,
        }
        of_weights = {name: getattr(self._recommended, name) for name in correction if name != "correct_candidates"}
        choice = {"candidates": 1 if candidates is None else candidates, "choose_at": choose_at}
        steps = next((len(x) for x in (timesteps, sigmas) if x is not None and len(x)), num_inference_steps)
        if choice["candidates"] > 1:
            choice["num_inference_steps"] = int(steps)  # by which it is known where they are chosen from
        sampling = Sampling(**of_weights).changed(**choice, **correction)
        self._guidance_scale, self._guidance_rescale, self._clip_skip = guidance_scale, guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        pictures = (ip_adapter_image, ip_adapter_image_embeds)
        self._check_texts(*texts, num_images_per_prompt, callback_on_step_end_tensor_inputs)
        if sampling.candidates > 1:
            self._check_choosing(latents, callback_on_step_end, eta)
        if sampling.needs_adapter:
            self._check_correction(prompt, pooled_prompt_embeds, pictures)
            self._scorer.adapter.to(self._execution_device)
        height, width = self._size(height, width)
        self.check_inputs(prompt, height, width, None, *texts[1:], *pictures)
        sd = self._as_stable_diffusion()
        tensors = self._encode(sd, *texts, pooled_prompt_embeds, num_images_per_prompt * sampling.candidates)
        count = len(tensors["prompt_embeds"]) // (2 if self.do_classifier_free_guidance else 1)
        self._set_timesteps(num_inference_steps, timesteps, sigmas)
        noise = self._noise(count, height, width, generator, latents, sampling.candidates)
        if sampling.candidates > 1:
            latents = self._choose(sampling, tensors, noise * self.scheduler.init_noise_sigma)
            return self._finish(sd, latents, output_type, return_dict, tensors["prompt_embeds"].dtype)
        denoise = self._guidance(sampling, tensors, count, self._image_embeds(*pictures, count))
        with self.progress_bar(total=self.num_timesteps) as bar:

            def on_step(step, latents):
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors["latents"] = latents
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, step, self.scheduler.timesteps[step], given)
                tensors.update(self._changed_tensors(changed, tensors, count))
                return tensors["latents"]

            latents = sample(
                denoise,
                self.scheduler,
                noise * self.scheduler.init_noise_sigma,
                step_options=self.prepare_extra_step_kwargs(generator, eta),
                on_step=on_step,
                stop=lambda: self.interrupt,
            )
        return self._finish(sd, latents, output_type, return_dict, tensors["prompt_embeds"].dtype)

    def _finish(self, sd: StableDiffusion, latents, output_type: str, return_dict: bool, dtype: torch.dtype):
        """The result of a call, from finished latents."""
        images, flagged = latents, None
        if output_type != "latent":
            images, flagged = self._decode(sd, latents, output_type, dtype)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, flagged) if return_dict else (images, flagged)

    def _check_choosing(self, latents, callback_on_step_end, eta: float) -> None:
        """Raises ValueError for arguments that belong to one picture, not to candidates of it."""
        given = {"latents": latents is not None, "callback_on_step_end": callback_on_step_end is not None}
        for name, there in (given | {"eta": eta != 0}).items():
            if there:
                raise ValueError(f"{name} cannot be used with candidates: leave one of them out")

    def _choose(self, sampling: Sampling, tensors: dict, latents: torch.Tensor) -> torch.Tensor:
        """The finished latents of the candidates that were kept; `kept` says which, for each picture."""
        negative, positive = tensors["prompt_embeds"][: len(latents)], tensors["prompt_embeds"][-len(latents) :]
        texts = Conditioning(positive, tensors["pooled_prompt_embeds"]), Conditioning(negative)
        options = {"guidance_scale": self.guidance_scale, "guidance_rescale": self.guidance_rescale}
        options["unet_inputs"] = {"cross_attention_kwargs": self.cross_attention_kwargs}

        def guidance_of(some, settings, trace, read):
            conditioning = some.conditioning, some.negative
            guidance = ClassifierFreeGuidance(self.unet, some.scheduler, *conditioning, **options)
            denoise = guided(guidance, settings, scorer=self._scorer, trace=trace)
            return ScoreReader(denoise, guidance, self._scorer, trace, read) if read else denoise

        chosen = draw_and_choose(Candidates(latents, self.scheduler, *texts), sampling, guidance_of)
        self.kept = [int(number) % sampling.candidates for number in chosen.left.numbers]
        return chosen.left.latents

    def _check_correction(self, prompt, pooled_prompt_embeds, pictures) -> None:
        """Raises ValueError where this model or these arguments cannot be corrected."""
        if self._scorer is None:
            raise ValueError("correction_factor needs an adapter: call load_dpt first, or pass correction_factor=0")
        if prompt is None and pooled_prompt_embeds is None:
            raise ValueError("correction_factor with prompt_embeds needs pooled_prompt_embeds too")
        if any(picture is not None for picture in pictures):
            raise ValueError("correction_factor cannot be used with ip_adapter_image: the matching score is of text")
        if self.unet.config.time_cond_proj_dim is not None:
            raise ValueError("correction_factor cannot be used with a U-Net of distilled guidance (time_cond_proj_dim)")

    def _check_texts(
        self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt, names
    ) -> None:
        """Raises ValueError for texts that exclude each other, and for unknown names of a callback's tensors."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("pass either negative_prompt or negative_prompt_embeds")
        if prompt == []:
            raise ValueError("prompt is an empty list")
        Bounds(at_least=1).check("num_images_per_prompt", num_images_per_prompt)
        if unknown := {*names} - {*self._callback_tensor_inputs}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {', '.join(sorted(unknown))}, which is not there"
            )

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; by default the U-Net's."""
        sample_size, factor = self.unet.config.sample_size, self.vae_scale_factor
        rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return (
            check_size("height", rows * factor if height is None else height, factor),
            check_size("width", columns * factor if width is None else width, factor),
        )

    def _encode(
        self,
        sd: StableDiffusion,
        prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        pooled_prompt_embeds,
        num_images_per_prompt: int,
    ) -> dict[str, torch.Tensor | None]:
        """The embeddings of a picture each, by name; where guided, `prompt_embeds` are (2B, L, E), negatives first."""
        guided = self.do_classifier_free_guidance
        with _lora_scale(self.text_encoder, self.cross_attention_kwargs):
            if prompt is not None:
                prompts = [prompt] if isinstance(prompt, str) else prompt
                _warn_of_cuts(sd, prompts)
                prompt_embeds, pooled = sd.encode_prompts(prompts, clip_skip=self.clip_skip)
                pooled_prompt_embeds = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
            if guided and negative_prompt_embeds is None:
                negatives = "" if negative_prompt is None else negative_prompt
                negatives = [negatives] * len(prompt_embeds) if isinstance(negatives, str) else negatives
                _check_count("negative_prompt", negatives, len(prompt_embeds), "prompts")
                _warn_of_cuts(sd, negatives)
                negative_prompt_embeds, _ = sd.encode_prompts(negatives)
        if pooled_prompt_embeds is not None:
            _check_count("pooled_prompt_embeds", pooled_prompt_embeds, len(prompt_embeds), "prompts")
        if guided and negative_prompt_embeds.shape != prompt_embeds.shape:
            raise ValueError(
                f"the negative prompts' embeddings are {tuple(negative_prompt_embeds.shape)} and the prompts' "
                f"{tuple(prompt_embeds.shape)}; they must be as many and as long"
            )
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        device, copies = self._execution_device, num_images_per_prompt
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(copies, 0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype).repeat_interleave(copies, 0)
        if pooled_prompt_embeds is not None:
            pooled_prompt_embeds = pooled_prompt_embeds.to(device).repeat_interleave(copies, 0)
        return {
            "prompt_embeds": torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
        }

    def _set_timesteps(self, num_inference_steps, timesteps, sigmas) -> None:
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None and len(values) == 0:
                raise ValueError(f"{name} is empty")
        if timesteps is None and sigmas is None:
            Bounds(at_least=1).check("num_inference_steps", num_inference_steps)
        retrieve_timesteps(self.scheduler, num_inference_steps, self._execution_device, timesteps, sigmas)
        self._num_timesteps = len(self.scheduler.timesteps)

    def _noise(self, count: int, height: int, width: int, generator, latents, candidates: int = 1) -> torch.Tensor:
        """Standard normal noise (B, C, h, w): the given latents, or drawn; a picture's candidates by its generator."""
        channels, factor = self.unet.config.in_channels, self.vae_scale_factor
        if isinstance(generator, list):
            _check_count("generator", generator, count // candidates, "pictures")
            generator = [one for one in generator for _ in range(candidates)]
        if latents is None:
            shape = (count, channels, height // factor, width // factor)
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.ndim != 4 or latents.shape[:2] != (count, channels):
            raise ValueError(f"latents are {tuple(latents.shape)}; they must be ({count}, {channels}, h, w)")
        return latents.to(self._execution_device, torch.float32)

    def _image_embeds(self, ip_adapter_image, ip_adapter_image_embeds, count: int) -> list[torch.Tensor] | None:
        """The pictures' embeddings for each IP-Adapter, (2B, N, E) where guided; None where none is loaded."""
        given = ip_adapter_image is not None or ip_adapter_image_embeds is not None
        if given != (self.unet.config.encoder_hid_dim_type == "ip_image_proj"):
            reason = "needs load_ip_adapter first" if given else "is missing: the U-Net has an IP-Adapter"
            raise ValueError(f"ip_adapter_image {reason}")
        if not given:
            return None
        return self.prepare_ip_adapter_image_embeds(
            ip_adapter_image, ip_adapter_image_embeds, self._execution_device, count, self.do_classifier_free_guidance
        )

    def _guidance(
        self, sampling: Sampling, tensors: dict, count: int, image_embeds: list[torch.Tensor] | None
    ) -> Guidance:
        """Guidance and self-correction by this pipeline's attributes and the tensors, as they are at each step."""
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            scales = torch.full((count,), self.guidance_scale - 1.0)
            timestep_cond = self.get_guidance_scale_embedding(scales, self.unet.config.time_cond_proj_dim)
            timestep_cond = timestep_cond.to(self._execution_device, self.unet.dtype)

        def denoise(latents, timestep, step):
            with_negative, embeds = self.do_classifier_free_guidance, tensors["prompt_embeds"]
            rows = slice(None if with_negative else -count, None)  # without guidance, the prompts' half alone
            guidance = ClassifierFreeGuidance(
                self.unet,
                self.scheduler,
                Conditioning(embeds[-count:], tensors["pooled_prompt_embeds"]),
                Conditioning(embeds[:count]),
                guidance_scale=self.guidance_scale if with_negative else 1.0,
                guidance_rescale=self.guidance_rescale,
                unet_inputs={
                    "timestep_cond": timestep_cond,
                    "cross_attention_kwargs": self.cross_attention_kwargs,
                    "added_cond_kwargs": image_embeds and {"image_embeds": [x[rows] for x in image_embeds]},
                },
            )
            return guided(guidance, sampling, scorer=self._scorer)(latents, timestep, step)

        return denoise

    def _changed_tensors(self, changed: dict | None, tensors: dict, count: int) -> dict[str, torch.Tensor]:
        """The tensors that a callback returned, checked."""
        if changed is None:
            return {}
        if not isinstance(changed, dict):
            raise ValueError(f"callback_on_step_end returned a {type(changed).__name__}; it must be a dict or None")
        changed = {name: changed[name] for name in self._callback_tensor_inputs if name in changed}
        negative = tensors["negative_prompt_embeds"]
        if changed.get("negative_prompt_embeds", negative) is not negative:
            warnings.warn(
                "negative_prompt_embeds of callback_on_step_end are not read, as in StableDiffusionPipeline: change "
                "the first half of prompt_embeds",
                stacklevel=2,
            )
        rows = len(changed.get("prompt_embeds", tensors["prompt_embeds"]))
        guided = self.do_classifier_free_guidance
        if rows != 2 * count and (guided or rows != count):
            raise ValueError(
                f"prompt_embeds after callback_on_step_end are {rows}; {count} pictures "
                f"{'with' if guided else 'without'} guidance need {2 * count if guided else count}"
            )
        if changed.get("pooled_prompt_embeds") is not None:
            _check_count("pooled_prompt_embeds", changed["pooled_prompt_embeds"], count, "pictures")
        return changed

    def _decode(self, sd: StableDiffusion, latents, output_type: str, dtype: torch.dtype) -> tuple:
        """Pictures, and which of them the safety checker blacked out, or None without one."""
        pixels, flagged = self.run_safety_checker(sd.decode_latents(latents) * 2 - 1, latents.device, dtype)
        denormalize = None if flagged is None else [not flag for flag in flagged]
        return self.image_processor.postprocess(pixels, output_type, denormalize), flagged


def _check_count(name: str, values, count: int, what: str) -> None:
    if len(values) != count:
        raise ValueError(f"{name} holds {len(values)}; {count} {what} need as many")


def _warn_of_cuts(sd: StableDiffusion, prompts: list[str]) -> None:
    for prompt in dict.fromkeys(prompts):
        if cut := sd.truncated_part(prompt):
            limit = sd.tokenizer.model_max_length
            warnings.warn(f"the text encoder reads {limit} tokens a prompt; not read: {cut!r}", stacklevel=5)


@contextlib.contextmanager
def _lora_scale(text_encoder, cross_attention_kwargs: dict | None):
    """The text encoder's LoRA weighted as `cross_attention_kwargs` say, while the context lasts."""
    scale = (cross_attention_kwargs or {}).get("scale", 1.0)
    if text_encoder is None:
        yield
        return
    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)
