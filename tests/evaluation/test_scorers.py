import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
)

import evaluate
from dpt.evaluation.align import score_lines
from dpt.evaluation.judges import ORACLE
from dpt.shapes import oracle
from dpt.shapes.labelled_pictures import LABELLED, load_labelled

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def pictures(tmp_path):
    """A folder in T2I-CompBench's layout."""
    folder = tmp_path / "pictures"
    (folder / "samples").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prompt in ("a red dog", "a blue cat on a bed"):
        for k in range(2):
            image = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(image).save(folder / f"samples/{prompt}_{k:06d}.png")
    return folder


def test_clip_score_by_a_small_open_clip(pictures, tmp_path, capsys):
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip").eval()
    weights = tmp_path / "tiny.pt"
    command = ["align", str(pictures), "--metrics", "clip", "--clip_model", "tiny-clip", "--clip_weights", str(weights)]
    assert evaluate.main(command) == 2
    assert "needs weights of tiny-clip: put a file of OpenCLIP's tiny-clip" in capsys.readouterr().err
    torch.save(model.state_dict(), weights)
    assert evaluate.main(command) == 0
    records = score_lines(pictures / "clip.tiny-clip.tiny.jsonl")
    assert records[0]["file"] == "samples/a blue cat on a bed_000000.png"
    preprocess = open_clip.image_transform(32, is_train=False)
    pixels = preprocess(Image.open(pictures / records[0]["file"]))[None]
    with torch.no_grad():
        cosine = model.encode_image(pixels, True) @ model.encode_text(open_clip.tokenize("a blue cat on a bed"), True).T
    assert records[0]["CLIP score (tiny-clip, tiny)"] == pytest.approx(100 * max(0, cosine.item()), abs=0.01)
    assert evaluate.main(["table", str(pictures), "--output", str(tmp_path)]) == 0  # pictures of another program too
    assert "CLIP score (tiny-clip, tiny)" in (tmp_path / "table.md").read_text()
    weights.write_bytes(b"no weights")
    assert evaluate.main(command) == 2
    assert "does not hold weights of tiny-clip" in capsys.readouterr().err
    assert evaluate.main([*command[:5], "ViT-nothing"]) == 2
    assert "--clip_model is 'ViT-nothing'" in capsys.readouterr().err


def save_tiny_blip(folder):
    """A small random BLIP-ITM and its processor, saved to a folder."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "a", "red", "dog", "blue", "cat", "on", "bed"]
    (folder.parent / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config=sizes | {"vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 32},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        image_text_hidden_size=16,
    )
    model = BlipForImageTextRetrieval(config).eval()
    model.save_pretrained(folder)
    processor = BlipProcessor(
        BlipImageProcessor(size={"height": 32, "width": 32}),
        BertTokenizerFast(str(folder.parent / "vocab.txt"), model_max_length=32),
    )
    processor.save_pretrained(folder)
    return model, processor


def test_blip_scores_by_a_small_blip(pictures, tmp_path, capsys):
    folder = tmp_path / "tiny-blip"
    command = ["align", str(pictures), "--metrics", "blip", "--blip", str(folder)]
    assert evaluate.main(command) == 2
    assert "put huggingface.co/Salesforce/blip-itm-base-coco" in capsys.readouterr().err
    model, processor = save_tiny_blip(folder)
    assert evaluate.main([*command, "--batch_size", "3"]) == 0
    for record in score_lines(pictures / "blip.tiny-blip.jsonl"):
        prompt = record["file"].removeprefix("samples/")[: -len("_000000.png")]
        inputs = processor(images=Image.open(pictures / record["file"]), text=prompt, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        with torch.no_grad():
            match = model(**inputs).itm_score.softmax(-1)[0, 1].item()
            cosine = model(**inputs, use_itm_head=False).itm_score.item()
        assert record["BLIP-ITM (tiny-blip)"] == pytest.approx(match, abs=1e-4)
        assert record["BLIP-ITC (tiny-blip)"] == pytest.approx(cosine, abs=1e-4)


def test_other_verdicts_of_the_oracle_need_another_name():
    digest = hashlib.sha256()
    for picture in load_labelled(LABELLED["with CLIP trained along"]):
        verdict = oracle.judge(picture["image"], picture["prompt"])
        digest.update(f"{verdict.label}: {verdict.reason}\n".encode())
    assert (ORACLE, digest.hexdigest()[:12]) == ("fb307538d353", "ad99e9c6439e")  # changed together
