import numpy as np
import pytest
import torch

from dpt.shapes.captions import parse
from dpt.shapes.samples import ShapesSamples, mine_negatives
from dpt.stable_diffusion import load_stable_diffusion


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
    assert len(list(folder.iterdir())) == 2


def test_mined_negatives_are_the_most_similar_others():
    rng = np.random.default_rng(0)
    vectors = [torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(1500, 8))), dim=1) for _ in range(2)]
    texts, images = mine_negatives(*vectors, num_texts=5, num_images=2)
    for i in (0, 1023, 1024, 1499):
        for embeddings, found in ((vectors[1], texts), (vectors[0], images)):
            scores = embeddings @ vectors[1][i]
            scores[i] = -np.inf
            assert found[i].tolist() == scores.argsort(descending=True)[: found.shape[1]].tolist()


def test_mined_samples_are_false_of_each_other(sd, folder):
    rng = np.random.default_rng(0)
    mined = tuple(np.stack([rng.permutation(24) for _ in range(24)]) for _ in range(2))
    samples = ShapesSamples(sd, folder, num_samples=24, negatives="mined", mined=mined)
    for index in range(24):
        objects = samples.world.scene(index)[1].objects
        assert [parse(text).holds(objects) for text in samples.get(index, 0).captions] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"negatives": "best"}, "data.negatives is 'best'"), ({"num_samples": 1}, "data.num_samples is 1")],
)
def test_impossible_settings(sd, folder, options, message):
    with pytest.raises(ValueError, match=message):
        ShapesSamples(sd, folder, **{"num_samples": 24} | options)
