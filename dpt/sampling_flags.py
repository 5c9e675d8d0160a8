"""The flags of `Sampling`'s fields, for every script that draws, and the places of the reference's flags."""

import argparse
from dataclasses import fields

from dpt.command_line import ArgumentParser, number
from dpt.sampling_settings import Sampling

FLAGS = {
    "guidance_scale": (("--scale",), "guidance scale (default: 7.5, of shapes 5; the model's own of others)"),
    "guidance_rescale": (("--guidance_rescale",), "share of guidance that is rescaled, 0 to 1 (default: 0)"),
    "distilled_guidance": (("--distilled_guidance",), "guidance of FLUX.1-dev, as an input (default: 3.5)"),
    "num_inference_steps": (
        ("--ddim_steps", "--num_timesteps"),
        "sampling steps (default: 50, of shapes 20; the model's own of others)",
    ),
    "scheduler": (("--scheduler",), "default: ddim; flow matching has its own"),
    "height": (("--H",), "height in pixels (default: the model's)"),
    "width": (("--W",), "width in pixels (default: the model's)"),
    "negative_prompt": (("--negative_prompt",), "what to keep away from"),
    "correction_factor": (
        ("--correction_factor",),
        "self-correction's factor (default: what the --dpt weights recommend, else the paper's 0.5; without weights 0)",
    ),
    "correction_norm": (
        ("--correction_norm",),
        "instead: the correction's length as a share of the latent's norm (default: what the weights recommend)",
    ),
    "correction_target": (
        ("--correction_target",),
        "what the correction moves (default: what the weights recommend, else conditional)",
    ),
    "correction_start": (("--correction_start",), "first corrected step, as a fraction of the steps (default: 0)"),
    "correction_stop": (("--correction_stop",), "end of the corrected steps, as a fraction of the steps (default: 1)"),
    "on_nan": (("--on_nan",), "a non-finite score: stop, or go on without it (default: raise)"),
    "candidates": (
        ("--candidates",),
        "noises that a picture is chosen from by the matching score (default: 1, of shapes' verifier 2)",
    ),
    "choose_at": (
        ("--choose_at",),
        "when to choose, as fractions of the steps; several narrow the candidates down (default: 0.25)",
    ),
    "correct_candidates": (("--correct_candidates",), "correct candidates too, not only what has been chosen"),
    "attend_and_excite": (("--attend_and_excite",), "Attend-and-Excite in place of self-correction"),
    "attention_resolution": (("--attention_resolution",), "side of the maps that it reads (default: latent / 4)"),
    "attention_step": (("--attention_step",), "how far it moves the latent (default: 20)"),
    "parity": (("--parity",), "end the sampling as the reference does"),
}
"""field -> its flags, and a few words"""


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `Sampling`; what is not given stays None."""
    for entry in fields(Sampling):
        (names, words), limits = FLAGS[entry.name], entry.metadata.get("bounds")
        options = {"dest": entry.name, "help": words}
        if entry.type is bool:
            parser.add_argument(*names, action="store_const", const=True, **options)
        elif choices := entry.metadata.get("choices"):
            parser.add_argument(*names, choices=choices, **options)
        elif entry.name == "choose_at":
            parser.add_argument(*names, type=number(float, above=0, at_most=1), nargs="+", metavar="F", **options)
        elif limits:
            kind = int if entry.type in (int, int | None) else float
            given = {name: value for name, value in vars(limits).items() if value is not None}
            parser.add_argument(*names, type=number(kind, **given), metavar="N" if kind is int else "X", **options)
        else:
            parser.add_argument(*names, **options)


def sampling_of(args: argparse.Namespace, recommended: Sampling) -> Sampling:
    """The settings that the flags ask for, and the recommended ones for the rest.

    Raises:
        ValueError: flags that exclude each other, or have no effect without another one.
    """
    if args.correction_norm is not None and args.correction_factor is not None:
        raise ValueError("--correction_factor and --correction_norm exclude each other: pass one of them")
    given = {entry.name: getattr(args, entry.name) for entry in fields(Sampling)}
    sampling = recommended.changed(**given)
    for name in ("correction_target", "correction_start", "correction_stop"):
        asked = args.correction_norm is not None or args.correction_factor is not None
        if given[name] is not None and not asked and not sampling.corrects:
            raise ValueError(f"--{name} is of self-correction, which is off: add --correction_norm, or leave it out")
    return sampling


IN_THE_CONFIG = {
    "--unet_feature": "feature",
    "--num_queries_matching": "adapter.num_queries_itm",
    "--num_queries_rec": "adapter.num_queries_rec",
    "--contrastive_loss_hdim": "adapter.contrastive_dim",
    "--lora_rank": "lora_rank",
    **{f"--{name}": f"adapter.{name}" for name in ("enc_layers", "dec_layers", "hidden_dim", "dim_feedforward")},
    **{f"--{name}": f"adapter.{name}" for name in ("nheads", "dropout", "pre_norm", "position_embedding")},
}
"""Flags of the reference's model, and which key of the weights' config.yaml says the same."""
ELSEWHERE = {
    "--resolution": "--H and --W, by default the model's own size",
    "--text_encoder_type": "nothing: drawing reads no expressions; for training it is model.rec_text_encoder",
    "--transformer_decoder_only": "nothing: the adapter has an encoder and a decoder",
    "--masks": "nothing: the adapter finds boxes",
    "--no_contrastive_align_loss": "nothing: drawing computes no loss",
    "--mixed_precision": "--dtype",
    "--output_dir": "--outdir",
}
"""Other flags of the reference, and what stands for them."""


def refuse_reference_flags(parser: ArgumentParser, argv: list[str]) -> None:
    """Ends the program at the first flag of the reference whose setting is elsewhere now, saying where."""
    for word in argv:
        flag = word.split("=")[0]
        if key := IN_THE_CONFIG.get(flag):
            where = f"config.yaml of the weights says it ({key}); a released file gets one by dpt.checkpoint convert"
            parser.error(f"{flag} is a flag of the reference; here {where}")
        if flag in ELSEWHERE:
            parser.error(f"{flag} is a flag of the reference; here it is {ELSEWHERE[flag]}")
