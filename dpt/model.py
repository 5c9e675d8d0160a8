"""DPT: the module that DDP wraps. One forward is one training step's losses.

Shapes: B samples, C latent channels, (h, w) latent size, L text tokens, E context width, P pooled text width,
T expression tokens, R width of the REC text encoder, D adapter width, Q queries.
"""

import contextlib

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features
from dpt.config import LossSettings
from dpt.tasks import tasks_of
from dpt.tasks.denoising import denoising_of_step
from dpt.tasks.itm import itm_score
from dpt.tasks.ranking import ranking_loss
from dpt.tasks.reward import reward_loss
from dpt.tasks.task import TRUE_PAIR, Pass, Task, passes_of


class DPT(nn.Module):
    """A denoiser (frozen, or with LoRA) and the adapter that reads it.

    Args:
        blocks: the probed blocks; see `dpt.backbones.blocks`.
        scheduler: the noise schedule of the denoising loss.
        train_denoiser: whether gradients reach the denoiser (tune) or stop at its features (probe).
        loss: settings of the losses; by default the paper's.
        itm_layer: the decoder layer that ITM reads.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        adapter: DiscriminativeAdapter,
        blocks: tuple[str, ...],
        scheduler: SchedulerMixin,
        *,
        train_denoiser: bool,
        loss: LossSettings | None = None,
        itm_layer: int = -1,
    ):
        super().__init__()
        self.denoiser, self.adapter, self.blocks, self.scheduler = denoiser, adapter, blocks, scheduler
        loss = loss or LossSettings()
        self.train_denoiser, self.weights, self.snr_gamma = train_denoiser, loss.weights, loss.snr_gamma
        self.tasks, self.itm_layer = tasks_of(adapter.config, loss, itm_layer=itm_layer), itm_layer

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """The losses of one step.

        Args:
            batch: `noisy_latents` (B, 3, C, h, w) of image, hard-negative and random image, all noised alike;
                `timesteps` (B,); `caption_context` (B, 3, L, E) and `caption_pooled` (B, 3, P) of the caption, its hard
                negative and a random one; for REC `expression_context` (B, L, E), `targets` and `num_boxes` as
                `rec_losses` takes them, and `token_states` (B, T, R) where there is contrastive alignment, and
                `token_valid` (B, T) where padding is left out of it; for denoising `noise_target` (B, C, h, w); to
                denoise the other images too, `negative_context` (B, 2, L, E), of captions of their own, and
                `negative_noise_target` (B, 2, C, h, w); for a control `itm_labels`, see `itm_loss`. `left_out` names
                tasks that this step leaves out. `ranked` holds half-drawn pictures of G prompts, N of each:
                `noisy_latents` (G * N, C, h, w), `timesteps` (G * N,), their prompts' `context` (G * N, L, E) and
                `pooled` (G * N, P), and `values` (G, N), as `ranking_loss` takes them.
                It may stand alone. `reward` holds the arguments of `reward_loss`.

        Returns:
            Named losses, unweighted, without those whose weight is 0.
        """
        ranked = self._ranking(batch["ranked"]) if "ranked" in batch else {}
        if "noisy_latents" not in batch:
            return ranked
        rewarded = self._reward(batch["reward"]) if "reward" in batch else {}
        passes = passes_of(self.active(batch))
        denoises = self.train_denoiser and bool(self.weights.denoise)
        if denoises and TRUE_PAIR in passes:
            passes.remove(TRUE_PAIR)  # the full pass has it
        features, noise_pred = self.features(batch, passes, with_full=denoises)
        return self.losses(features, noise_pred, passes + [TRUE_PAIR] * denoises, batch) | ranked | rewarded

    def active(self, batch: dict) -> list[Task]:
        """The tasks with a loss of weight above 0 that the step does not leave out."""
        left_out = batch.get("left_out", ())
        return [task for task in self.tasks if task.is_weighted(self.weights) and task.name not in left_out]

    def task(self, name: str) -> Task:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)

    def losses(
        self, features: list[torch.Tensor], noise_pred: torch.Tensor | None, passes: list[Pass], batch: dict
    ) -> dict[str, torch.Tensor]:
        """The losses that `forward` returns, from features of `passes` put together and the noise prediction."""
        losses, tasks = {}, self.active(batch)
        if tasks:
            hs = self.read(features, passes, batch["timesteps"])
        for task in tasks:
            losses |= task.loss(self.adapter, hs, batch)
        if noise_pred is not None:
            losses |= denoising_of_step(self.denoiser, noise_pred, batch, self.scheduler, snr_gamma=self.snr_gamma)
        return {name: value for name, value in losses.items() if getattr(self.weights, name.removeprefix("loss_"))}

    def read(
        self, features: list[torch.Tensor], passes: list[Pass], timesteps: torch.Tensor
    ) -> dict[Pass, torch.Tensor]:
        """The adapter's queries (layers, B, Q, D) by pass, from features of `passes` put together."""
        hs = self.adapter(features, timesteps.repeat(len(passes)))
        return dict(zip(passes, hs.chunk(len(passes), dim=1), strict=True))

    @torch.no_grad()
    def queries(self, batch: dict, passes: tuple[Pass, ...]) -> dict[Pass, torch.Tensor]:
        """The adapter's queries by pass, of a batch as `forward` takes it, without gradients."""
        features, _ = self.features(batch, list(passes), with_full=False)
        return self.read(features, list(passes), batch["timesteps"])

    def features(self, batch, passes, *, with_full):
        """Feature maps of the early passes as one batch, followed by those of the full pass, if there is one."""
        gradients = contextlib.nullcontext() if self.train_denoiser else torch.no_grad()
        timesteps, images = batch["timesteps"], batch["noisy_latents"]
        parts, noise_pred = [], None
        with gradients:
            if passes:
                latents = torch.cat([images[:, image] for image, _ in passes])
                conditioning = Conditioning.join(
                    conditioning_of(batch, "expression") if text is None else conditioning_of(batch, "caption", text)
                    for _, text in passes
                )
                repeated = timesteps.repeat(len(passes))
                parts.append(denoiser_features(self.denoiser, self.blocks, latents, repeated, conditioning)[0])
            if with_full:
                conditioning = conditioning_of(batch, "caption", 0)
                features, noise_pred = denoiser_features(
                    self.denoiser, self.blocks, images[:, 0], timesteps, conditioning, with_noise_pred=True
                )
                parts.append(features)
        return [torch.cat(maps) for maps in zip(*parts, strict=True)], noise_pred

    def _ranking(self, ranked):
        """The ranking loss of half-drawn pictures."""
        scores = self.rank_scores(ranked).unflatten(0, ranked["values"].shape)
        return {"loss_rank": ranking_loss(scores, ranked["values"], self.adapter.itm_head.logit_scale.exp())}

    def _reward(self, own):
        """The loss of the model's own half-drawn pictures."""
        scorer = Scorer(self.adapter, self.blocks, self.itm_layer)
        return reward_loss(self.denoiser, scorer, self.scheduler, **own)

    def rank_scores(self, ranked: dict) -> torch.Tensor:
        """Matching scores (G * N,) of what `forward` takes as `ranked`."""
        hs = self.adapter(self.ranked_features(ranked), ranked["timesteps"])
        return itm_score(self.adapter.itm_embeddings(hs, self.itm_layer), ranked["pooled"])

    def ranked_features(self, ranked: dict) -> list[torch.Tensor]:
        """Feature maps of what `forward` takes as `ranked`, G * N each."""
        latents, context = ranked["noisy_latents"], Conditioning(ranked["context"], further=ranked.get("further", {}))
        with contextlib.nullcontext() if self.train_denoiser else torch.no_grad():
            return denoiser_features(self.denoiser, self.blocks, latents, ranked["timesteps"], context)[0]


def conditioning_of(batch: dict, name: str, index: int | None = None) -> Conditioning:
    """The conditioning of a batch that `conditioning_inputs` gave, or that of one of a sample's several texts."""
    conditioning = Conditioning(batch[f"{name}_context"], further=batch.get(f"{name}_further", {}))
    return conditioning if index is None else conditioning[:, index]
