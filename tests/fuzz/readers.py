"""Which files each command reads, and which fields of them: what of them is spoilt."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import damage
from tests.fuzz.commands import COMMANDS, Target

MANIFEST = ("file:str", "prompt:str", "seed:int", "category:any", "noise_seed:any", "seconds:any", ":any")
CAPTIONS = ("images.*.id:id", "images.*.file_name:str", "annotations.*.image_id:id", "annotations.*.caption:str")
SIZES = ("images.*.width:any", "images.*.height:any")
REFERRED = (
    *("images.*.id:id", "images.*.file_name:str", "images.*.caption:str", *SIZES, "images.*.original_id:any"),
    *("annotations.*.image_id:id", "annotations.*.bbox.*:float", "annotations.*.bbox:list"),
    *("annotations.*.tokens_positive.*.*:int", "annotations.*.tokens_positive:any", "annotations:list", ":any"),
)
ITEM = ("title:str", "filepath:str", "neg_caption:str", "neg_image:str")
LATENTS = ("vae:list", "vae.*:float", "scaling_factor:float", "size:int", "model:any", ":any")
OWN_SETTINGS = ("steps:any", "timesteps:any", "noises:any", "model:any", "sampling:any", ":any")
SCORES = ("file:str", "sha256:any", "label:any", "objects:any", "scorer:any", ":any")
PACKED = ("@0.pictures:list", "@0.categories:any", "@1.arm:str", "@1.settings:any", "@1.costs:any", "@1.figures:any")
MODEL_CONFIGS = {
    "unet/config.json": (
        "block_out_channels.*",
        "sample_size",
        "in_channels",
        "cross_attention_dim",
        "norm_num_groups",
    ),
    "vae/config.json": ("block_out_channels.*", "scaling_factor", "latent_channels", "layers_per_block"),
    "text_encoder/config.json": ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"),
    "scheduler/scheduler_config.json": ("beta_start", "num_train_timesteps", "beta_schedule", "prediction_type"),
    "tokenizer/tokenizer_config.json": ("model_max_length", "unk_token"),
    "model_index.json": ("unet.1", "vae", "_class_name"),
}
TREE = "coco/annotations"
ALL_LINES = ("drawn/base/metadata.jsonl", MANIFEST), ("drawn/base/oracle.jsonl", SCORES)
GOING_ON = (*ALL_LINES, ("drawn/base/quality.json", ("frechet:any", "diversity:any", "pictures:any", ":any")))
JSON_FILES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "txt2img, going on": (("pictures/metadata.jsonl", (*MANIFEST, "settings:any")),),
    "txt2img, model": tuple((f"model/{name}", tuple(f"{k}:any" for k in keys)) for name, keys in MODEL_CONFIGS.items()),
    "dpt.data check": (
        (f"{TREE}/captions_train2014.json", CAPTIONS),
        (f"{TREE}/finetune_refall_train.json", REFERRED),
        ("coco/itm/train/00003.json", ITEM),
        ("coco/itm/train/imgname2txtid.json", ("*:list", "*.*:int", ":any")),
        ("coco/latents/latents.json", LATENTS),
        ("coco/latents/checksums_0_of_1.jsonl", ("file:str", "sha256:str")),
    ),
    "dpt.data check, leak_free": ((f"{TREE}/finetune_refall_train.json", REFERRED),),
    "dpt.data cache-latents": (("coco/latents/latents.json", LATENTS),),
    "dpt.data mine-negatives": ((f"{TREE}/captions_train2014.json", CAPTIONS), ("clip/tiny.json", ("embed_dim:any",))),
    "dpt.data trajectories, going on": (
        ("own/drawn/trajectories.json", OWN_SETTINGS),
        ("own/drawn/shards.jsonl", ("file:any", "sha256:any", "prompts:any", ":any")),
        ("own/drawn/labels_shapes-clip.jsonl", ("prompt:any", "seed:any", "value:any", "judge:any", ":any")),
    ),
    "train_probe, trajectories": (
        ("own/drawn/trajectories.json", OWN_SETTINGS),
        ("own/drawn/shards.jsonl", ("file:str", "sha256:str", "prompts:list", "prompts.*.text:str", ":any")),
        ("own/drawn/labels_shapes-clip.jsonl", ("prompt:str", "seed:int", "value:float", ":any")),
    ),
    "dpt.verify": (
        (f"{TREE}/captions_val2014.json", ("images.*.file_name:str", "annotations.*.caption:str")),
        (f"{TREE}/finetune_refcoco_val.json", ("annotations.*.bbox.*:float", "annotations.*.tokens_positive.*.*:any")),
    ),
    "train_probe": (
        (f"{TREE}/finetune_refall_train.json", REFERRED),
        (f"{TREE}/finetune_refcoco_val.json", REFERRED),
        ("coco/itm/train/imgname2txtid.json", ("*:list", "*.*:int", ":any")),
    ),
    "train_probe, latents": (("coco/latents/latents.json", LATENTS),),
    "train_probe, going on": (
        ("run/run/metrics.jsonl", ("step:any", "loss_ce:any", ":any")),
        ("run/run/checkpoints/step_0000002/training_state/state.json", ("step:any", ":any")),
    ),
    "evaluate generate, nss1k": (("prompts/part.json", ("*.captions:str", ":any")),),
    "evaluate generate, going on": (ALL_LINES[0], ("drawn/base/arm.json", ("model:any", "weights:any", ":any"))),
    "evaluate align": ALL_LINES,
    "evaluate choose, going on": (
        ("choices/candidates.jsonl", ("prompt:any", "category:any", "seed:any", "value:any", "scores:any", ":any")),
    ),
    "evaluate quality": (GOING_ON[0], GOING_ON[2]),
    "evaluate pack": (*GOING_ON, ("drawn/base/arm.json", (":any",))),
    "evaluate pack, going on": (("figures/packed.json", PACKED),),
    "evaluate table": GOING_ON,
    "evaluate table, packed": (("figures/packed.json", PACKED),),
    "evaluate report": (
        *ALL_LINES,
        ("figures/tables/table.json", ("arms:any", "arms.*:any", "by_category:any", ":any")),
        ("figures/probes/itm.json", ("*:any", "*.*:any", ":any")),
    ),
    "evaluate pareto": (("figures/packed.json", PACKED),),
    "evaluate worth": (("figures/choices/candidates.jsonl", ("prompt:any", "value:any", "scores:any", ":any")),),
    "evaluate overoptimization": (
        ("figures/arms/far/metadata.jsonl", ("scores:any", ":any")),
        ("figures/arms/far/arm.json", ("correction_norm:any", "dpt:any", ":any")),
    ),
    "evaluate experiment, packed": (("figures/packed.json", PACKED),),
    "evaluate itm": (("figures/probes/records/itm_run_all_val.json", ("identity:any", "records:any", ":any")),),
    "dpt.shapes.label collect": (
        ("labelled/samples/step_0000001/verdicts.jsonl", ("prompt:any", "category:any", "seed:any", ":any")),
    ),
    "dpt.shapes.label sheets": (("labelled/set/labels.jsonl", ("prompt:any", "label:any", ":any")),),
    "dpt.shapes.quality": (("pretrained/unet.metrics.jsonl", ("step:any", "val_loss:any", "correct:any", ":any")),),
}
OTHER_FILES: dict[str, tuple[tuple[Callable, tuple[str, ...]], ...]] = {
    "txt2img, prompts": ((damage.text_lines, ("prompts/prompts.txt",)),),
    "txt2img, dpt": ((damage.of_tensors, ("dpt/adapter.safetensors", "dpt/lora/pytorch_lora_weights.safetensors")),),
    "txt2img, lora": ((damage.of_tensors, ("lora/pytorch_lora_weights.safetensors",)),),
    "txt2img, model": (
        (
            damage.of_tensors,
            tuple(f"model/{p}/diffusion_pytorch_model.safetensors" for p in ("unet", "vae"))
            + ("model/text_encoder/model.safetensors",),
        ),
    ),
    "txt2img, going on": ((damage.foreign("samples"), ("pictures",)),),
    "dpt.checkpoint inspect": ((damage.of_tensors, ("dpt/adapter.safetensors",)),),
    "dpt.checkpoint inspect, released": ((damage.of_tensors, ("released/pytorch_model.bin",)),),
    "dpt.checkpoint convert": ((damage.of_tensors, ("released/pytorch_model.bin",)),),
    "dpt.data check": (
        (damage.literal, ("coco/itm/train/00002.json", "coco/itm/val.tsv")),
        (damage.of_array, ("coco/latents/COCO_train2014_000000000000.npy",)),
        (damage.of_image, ("coco/train2014/COCO_train2014_000000000000.jpg",)),
    ),
    "dpt.data cache-latents": ((damage.foreign("."), ("coco/latents",)),),
    "dpt.data mine-negatives": (
        (damage.of_tensors, ("clip/weights.pt",)),
        (damage.of_image, ("coco/train2014/COCO_train2014_000000000000.jpg",)),
    ),
    "dpt.data trajectories": ((damage.text_lines, ("own/prompts.txt", "own/settings.yaml")),),
    "train_probe, trajectories": ((damage.of_tensors, ("own/drawn/00000.safetensors",)),),
    "dpt.verify": ((damage.of_tensors, ("dpt/adapter.safetensors",)),),
    "train_probe": (
        (damage.literal, ("coco/itm/val.tsv",)),
        (damage.of_image, ("coco/train2014/COCO_train2014_000000000000.jpg",)),
    ),
    "train_probe, latents": ((damage.of_array, ("coco/latents/COCO_train2014_000000000000.npy",)),),
    "train_probe, going on": (
        (damage.of_tensors, ("run/run/checkpoints/step_0000002/training_state/optimizer.safetensors",)),
        (damage.of_tensors, ("run/run/checkpoints/step_0000002/adapter.safetensors",)),
        (damage.foreign("checkpoints/damaged_step_0000002"), ("run/run",)),
        (damage.text_lines, ("run/run/log.txt",)),
    ),
    "evaluate generate": ((damage.text_lines, ("prompts/prompts.txt", "arms/base.yaml")),),
    "evaluate generate, compbench": ((damage.text_lines, ("prompts/compbench/color_val.txt",)),),
    "evaluate generate, going on": ((damage.foreign("samples"), ("drawn/base",)),),
    "evaluate align": ((damage.of_image, ("drawn/base/samples/00000_000000_0.png",)),),
    "evaluate align, clip": ((damage.of_tensors, ("clip/weights.pt",)),),
    "evaluate report": ((damage.of_image, ("figures/figure.png", "drawn/base/samples/00000_000000_0.png")),),
    "evaluate itm": ((damage.of_tensors, ("run/run/checkpoints/step_0000002/adapter.safetensors",)),),
    "evaluate rec": ((damage.of_tensors, ("run/run/checkpoints/step_0000002/adapter.safetensors",)),),
    "dpt.shapes.label collect": ((damage.of_image, ("labelled/samples/step_0000001/0000.png",)),),
    "dpt.shapes.label sheets": ((damage.of_image, ("labelled/set/pictures.png",)),),
}
# Files that are read, of which any damage to the whole is tried; in those of True, any text is one.
WHOLE: dict[str, dict[str, bool]] = {
    "evaluate probe-map": {"map/runs/none_mid/config.yaml": False},
    "dpt.shapes.pretrain, going on": {"pretrained/clip.pt": False, "pretrained/clip.yaml": False},
    "dpt.checkpoint inspect": {"dpt/config.yaml": False},
    "evaluate experiment": {"arms/experiment.yaml": False},
    "train_tune, dry run": {"run/run/checkpoints/step_0000002/config.yaml": False},
    "train_probe, going on": {"run/run/config.yaml": False},
}


def of_files() -> Iterator[Target]:
    """Damages of files."""
    for command, entries in JSON_FILES.items():
        for path, keys in entries:
            yield _file(command, path, _whole(path))
            for key in keys:
                yield _file(command, path, damage.of_json(key), key.partition(":")[0])
    for command, entries in OTHER_FILES.items():
        for spoil, paths in entries:
            for path in paths:
                yield _file(command, path, spoil, spoil.__name__)
                if Path(path).suffix and spoil is not damage.text_lines:
                    yield _file(command, path, _whole(path))
    for command, files in WHOLE.items():
        for path, any_text in files.items():
            yield _file(command, path, _whole(path, any_text))


def _whole(path: str, any_text: bool = False) -> Callable:
    lines = any_text or Path(path).suffix in (".jsonl", ".txt", ".tsv", ".yaml")

    def spoil(file: Path, rng: random.Random, *, folder: Path):
        return damage.whole(file, rng, lines=lines, folder=folder)

    return spoil


def _file(command: str, path: str, spoil: Callable, what: str = "as a whole") -> Target:
    def apply(folder: Path, rng: random.Random):
        what, refused = spoil(folder / path, rng, folder=folder)
        return what, None if COMMANDS[command].passes_over else refused, []

    return Target(f"{path} {what}", command, apply)
