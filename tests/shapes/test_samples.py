import pickle

import numpy as np
import pytest
import torch

from dpt.array_files import read_array
from dpt.backbones.loading import load_stable_diffusion
from dpt.shapes.clip import embed_texts, load_clip
from dpt.shapes.grammar import parse
from dpt.shapes.samples import ShapesSamples


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


def test_edited_samples(sd, folder):
    samples = ShapesSamples(sd, folder, num_samples=24)
    assert len(samples) == 24
    for index in range(24):
        sample = samples.get(index, epoch=0)
        objects = samples.world.scene(index)[1].objects
        assert sample.images.shape == (3, 4, 16, 16)
        assert [parse(text).holds(objects) for text in sample.captions] == [True, False, False]
        (((begin, end),),) = sample.tokens_positive
        assert sample.expression[begin:end].startswith("the ")
        assert sample.boxes.shape == (1, 4)
    again = ShapesSamples(sd, folder, num_samples=24)
    first, same, other = samples.get(3, 1), again.get(3, 1), again.get(3, 2)
    assert torch.equal(first.images, same.images)
    assert first.captions == same.captions
    assert not torch.equal(first.images[2], other.images[2])
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2


def test_mined_samples_are_like_and_false_of_each_other(sd, folder):
    samples = ShapesSamples(sd, folder, num_samples=60, negatives="mined")
    random = ShapesSamples(sd, folder, num_samples=60)
    clip, tokenizer = load_clip("ckpt/shapes/clip")
    likeness = []
    for index in range(20):
        sample = samples.get(index, 0)
        objects = samples.world.scene(index)[1].objects
        assert [parse(text).holds(objects) for text in sample.captions] == [True, False, False]
        with torch.no_grad():
            own, mined, other = embed_texts(clip, tokenizer, list(sample.captions))
        likeness.append([(own @ mined).item(), (own @ other).item()])
    mined, other = np.mean(likeness, axis=0)
    assert mined > other + 0.1
    again = ShapesSamples(sd, folder, num_samples=60, negatives="mined")
    assert all((a == b).all() for a, b in zip(samples.mined, again.mined, strict=True))
    assert len(list(folder.glob("mined_*.npy"))) == 1
    assert not torch.equal(samples.get(3, 0).images[1], random.get(3, 0).images[1])


def test_samples_can_be_sent_to_worker_processes(sd, folder):
    samples = ShapesSamples(sd, folder, num_samples=24)
    assert torch.equal(pickle.loads(pickle.dumps(samples)).get(3, 1).images, samples.get(3, 1).images)


def test_leaving_out_every_kind_is_named(sd, folder):
    kinds = ("attribute", "count", "relation", "size")
    with pytest.raises(ValueError, match=r"data\.leave_out leaves out all of the 24 samples"):
        ShapesSamples(sd, folder, num_samples=24, leave_out=kinds).get(0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"negatives": "best"}, "data.negatives is 'best'"), ({"num_samples": 1}, "data.num_samples is 1")],
)
def test_impossible_settings(sd, folder, options, message):
    with pytest.raises(ValueError, match=message):
        ShapesSamples(sd, folder, **{"num_samples": 24} | options)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x93NUMPY\x01\x00", b"PK\x03\x04", "other shape", "text", "huge"]
)
def test_bad_caches_are_named(tmp_path, content):
    path = tmp_path / "0000000_2.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.zeros((2, 8, 2)) if content == "other shape" else np.full((2, 8, 2, 2), "a"))
    if content == "huge":
        with path.open("wb") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": (2, 8, 200_000, 200_000)}
            np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"0000000_2\.npy .*remove it, and it is made again"):
        read_array(path, (2, 8, None, None))


def test_a_whole_cache_is_read(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 8, 3, 3), np.float16))
    assert read_array(tmp_path / "a.npy", (2, 8, None, None)).shape == (2, 8, 3, 3)
