import json
import pickle
import threading
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from dpt.data.__main__ import main
from dpt.data.coco import CaptionedImage, load_captions
from dpt.data.hard_negative_files import ItmNegatives
from dpt.data.hard_negatives import embed_to_file, mine, most_similar
from dpt.data.open_clip_embedder import load_embedders


def test_most_similar_equals_brute_force():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(300, 8)), rng.normal(size=(170, 8))
    query_groups, key_groups = rng.integers(0, 40, (300, 2)), rng.integers(0, 40, (170, 2))
    found = most_similar(queries, query_groups, keys, key_groups, 7, block=64)
    scores = queries.astype(np.float32) @ keys.astype(np.float32).T
    scores[(query_groups[:, None] == key_groups[None]).any(-1)] = -np.inf
    assert found.tolist() == np.argsort(-scores, axis=1)[:, :7].tolist()


def test_too_few_keys_leave_gaps():
    vectors, groups = np.array([[3.0, 0], [2.0, 0], [1.0, 0]]), np.array([[0], [0], [1]])
    assert most_similar(vectors, groups, vectors, groups, 4).tolist() == [
        [2, -1, -1, -1],
        [2, -1, -1, -1],
        [0, 1, -1, -1],
    ]


def test_an_image_of_the_caption_itself_is_no_negative(tmp_path):
    texts = {"a": "a man", "b": "a man", "c": "a cat", "d": "a dog"}
    captions = [CaptionedImage(Path(f"{name}.jpg"), text) for name, text in texts.items()]
    vectors = {"a": [1.0, 0.0], "b": [1.0, 0.1], "c": [0.5, 1.0], "d": [0.0, 1.0]}
    vectors |= {"a man": [1.0, 0.05], "a cat": [0.4, 1.0], "a dog": [0.1, 1.0]}
    embed = lambda items: torch.tensor([vectors[getattr(item, "stem", item)] for item in items])  # noqa: E731
    items = mine(captions, embed, embed, tmp_path, key="k", num_texts=2, num_images=2)
    assert [item.neg_images for item in items.values()] == [
        ("c.jpg", "d.jpg"),
        ("c.jpg", "d.jpg"),
        ("d.jpg", "b.jpg"),
        ("c.jpg", "b.jpg"),
    ]
    assert items[0].neg_captions == ("a cat", "a dog")


def test_embeddings_go_on_after_a_kill(tmp_path):
    seen = []

    def embed(items):
        seen.extend(items)
        if 25 in items and seen.count(25) == 1:
            raise KeyboardInterrupt
        return torch.tensor([[float(i + 1), 1.0] for i in items])

    arguments = {"key": "a", "batch_size": 4, "chunk": 10}
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(range(40), embed, tmp_path / "rows", **arguments)
    rows = embed_to_file(range(40), embed, tmp_path / "rows", **arguments)
    assert seen.count(3) == 1
    np.testing.assert_allclose(np.linalg.norm(rows.astype(float), axis=1), 1, atol=1e-3)
    expected = np.array([[i + 1, 1.0] for i in range(40)])
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-3)
    count = len(seen)
    embed_to_file(range(40), embed, tmp_path / "rows", **arguments)
    assert len(seen) == count
    embed_to_file(range(40), embed, tmp_path / "rows", **arguments | {"key": "b"})
    assert len(seen) == count + 40


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A small random open_clip model: the file of its config, and that of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), folder / "weights.pt")
    return str(folder / "tiny-clip.json"), str(folder / "weights.pt")


def test_negatives_of_a_tree_are_those_of_brute_force(coco_tree, tiny_clip, tmp_path, capsys):
    captions = load_captions(coco_tree / "annotations/captions_train2014.json", coco_tree / "train2014")
    where = [
        "--captions",
        str(coco_tree / "annotations/captions_train2014.json"),
        "--images",
        str(coco_tree / "train2014"),
    ]
    settings = ["--clip", tiny_clip[0], "--pretrained", tiny_clip[1], "--num_texts", "5", "--num_images", "2"]
    assert main(["mine-negatives", *where, *settings, "--output", str(tmp_path / "itm"), "--block", "6"]) == 0
    found = ItmNegatives(tmp_path / "itm")
    embed_texts, embed_images = load_embedders(*tiny_clip, device="cpu")
    files = sorted({c.path for c in captions})
    texts = torch.nn.functional.normalize(embed_texts([c.caption for c in captions]), dim=1).half().float()
    images = torch.nn.functional.normalize(embed_images(files), dim=1).half().float()
    assert len(found) == len(captions)
    for k, caption in enumerate(captions):
        item = found.item(k)
        assert (item.title, item.image) == (caption.caption, caption.path.name)
        similar = (texts @ texts[k]).argsort(descending=True).tolist()
        similar = [i for i in similar if captions[i].path != caption.path and captions[i].caption != caption.caption]
        assert sorted(item.neg_captions) == sorted(captions[i].caption for i in similar[:5])
        ranked = (images @ texts[k]).argsort(descending=True).tolist()
        assert item.neg_images == tuple(files[i].name for i in ranked if files[i] != caption.path)[:2]
    assert main(["mine-negatives", *where, *settings, "--output", str(tmp_path / "itm.tsv")]) == 0
    assert ItmNegatives(tmp_path / "itm.tsv").item(3) == found.item(3)


def test_mined_captions_are_distinct_and_none_of_the_image_s_own(tmp_path):
    """Generic captions stand under many images."""
    texts = ["a man", "a man", "a dog", "a man", "two men", "a dog", "a cat", "a man", "two men", "a hat"]
    captions = [CaptionedImage(tmp_path / f"{k // 2}.jpg", text) for k, text in enumerate(texts)]
    vectors = {text: torch.tensor([np.cos(k**1.3), np.sin(k**1.3)]) for k, text in enumerate(dict.fromkeys(texts))}

    def embed_texts(items):
        return torch.stack([vectors[text] for text in items])

    def embed_images(items):
        return torch.stack([torch.tensor([np.cos(int(path.stem)), 0.5]) for path in items])

    items = mine(captions, embed_texts, embed_images, tmp_path / "work", key="", num_texts=3, num_images=2, block=3)
    for k, caption in enumerate(captions):
        own = {other.caption for other in captions if other.path == caption.path}
        rest = [text for text in vectors if text not in own]
        ranked = sorted(rest, key=lambda text: -float(vectors[text] @ vectors[caption.caption]))
        assert items[k].neg_captions == tuple(ranked[:3])
        assert caption.path.name not in items[k].neg_images
        assert len(set(items[k].neg_images)) == 2


def test_weights_that_are_none_are_one_line(coco_tree, tiny_clip, tmp_path, capsys):
    """No code of a pickle is run."""

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_run",)

    weights = Path(tiny_clip[1]).read_bytes()
    faults = {"garbage": b"e" * 4000, "empty": b"", "cut": weights[:2000], "cut.safetensors": b"\x00" * 5}
    torch.save({"a": Code()}, tmp_path / "code.pt")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Code()))
    for name, content in faults.items():
        (tmp_path / name).write_bytes(content)
    where = ["--captions", str(coco_tree / "annotations/captions_train2014.json")]
    where += ["--images", str(coco_tree / "train2014"), "--output", str(tmp_path / "x"), "--clip", tiny_clip[0]]
    for name in (*faults, "code.pt", "code.pkl", "nowhere.pt"):
        assert main(["mine-negatives", *where, "--pretrained", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: CLIP ")
        assert str(tmp_path / name) in error
    assert not (tmp_path / "was_run").exists()
    (tmp_path / "bad.json").write_text("[")
    assert main(["mine-negatives", *where, "--clip", str(tmp_path / "bad.json"), "--pretrained", tiny_clip[1]]) == 2


def test_a_model_that_is_not_there_is_named(coco_tree, tmp_path, capsys):
    where = [
        "--captions",
        str(coco_tree / "annotations/captions_train2014.json"),
        "--images",
        str(coco_tree / "train2014"),
    ]
    assert main(["mine-negatives", *where, "--output", str(tmp_path / "x"), "--clip", "ViT-none"]) == 2
    assert "CLIP 'ViT-none'" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_coco_s_400_000_captions(tmp_path):
    """A block of queries against as many keys as COCO has captions; what lies in files is not counted."""
    count, width = 400_000, 256
    keys = np.lib.format.open_memmap(tmp_path / "keys.npy", "w+", np.float16, (count, width))
    rng = np.random.default_rng(0)
    for start in range(0, count, 50_000):
        keys[start : start + 50_000] = rng.normal(size=(50_000, width))
    keys.flush()
    keys = np.load(tmp_path / "keys.npy", mmap_mode="r")
    groups = np.arange(count)[:, None]

    def anonymous_mb():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    before, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = most_similar(keys[:2048], groups[:2048], keys, groups, 20)
    done.set()
    watcher.join()
    assert found.shape == (2048, 20)
    assert (found != groups[:2048]).all()
    assert peak[0] - before < 1000
    print(f"{peak[0] - before:.0f} MB")
