"""The drawn faces: repeatable image by image, varied within an identity, and not to be told apart by colour alone."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from data import synthetic_faces as module
from data.synthetic_faces import VARIATION, VARIATION_COLOURS, synthetic_faces


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other by spinning make these small problems 20 times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def closest(images, others):
    return (images.int() - others.int()).abs().max().item()


@pytest.fixture(scope="module")
def small():
    return synthetic_faces(identities=5, train_per_identity=4, test_per_identity=2, image_size=32, seed=3)


def test_the_number_of_threads_changes_no_pixel():
    drawn = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        drawn.append(synthetic_faces(identities=20, train_per_identity=20, test_per_identity=1, image_size=56)[0].images)
        assert torch.get_num_threads() == threads
    assert torch.equal(*drawn)


def test_shapes_types_and_labels(small):
    train, test = small
    assert train.name == test.name == "synthetic_faces"
    assert train.classes == test.classes == ("id000", "id001", "id002", "id003", "id004")
    assert train.images.dtype == torch.uint8 and train.images.shape == (20, 3, 32, 32)
    assert test.images.shape == (10, 3, 32, 32) and test.image_size == 32
    assert train.labels.dtype == torch.int64 and train.labels.tolist() == [i for i in range(5) for _ in range(4)]
    assert test.labels.tolist() == [i for i in range(5) for _ in range(2)]


def test_same_seed_same_faces_other_seed_other_faces(small):
    train, test = small
    again_train, again_test = synthetic_faces(5, 4, 2, 32, seed=3)
    assert torch.equal(train.images, again_train.images) and torch.equal(test.images, again_test.images)
    other, _ = synthetic_faces(5, 4, 2, 32, seed=4)
    assert (train.images.float() - other.images.float()).abs().mean(dim=(1, 2, 3)).min() > 5


def test_an_image_depends_on_its_own_number_alone(small):
    train, test = small
    more_train, more_test = synthetic_faces(7, 6, 3, 32, seed=3)
    for few, many, count in ((train, more_train, 4), (test, more_test, 2)):
        for label in range(5):
            first = many.images[many.labels == label][:count]
            assert closest(few.images[few.labels == label], first) <= 1


@pytest.mark.parametrize("images_a_chunk", [1, 3, 1000])
def test_chunks_change_nothing(small, monkeypatch, images_a_chunk):
    monkeypatch.setitem(module.CHUNK_PIXELS, "cpu", images_a_chunk * 64**2)
    train, _ = synthetic_faces(5, 4, 2, 32, seed=3)
    assert closest(train.images, small[0].images) <= 1


def test_global_generators_are_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    synthetic_faces(2, 1, 1, 16)
    assert (torch.rand(1), np.random.rand()) == expected


def test_no_image_is_in_both_sets_or_twice_in_one():
    train, test = synthetic_faces(10, 6, 6, 32)
    images = torch.cat([train.images, test.images]).flatten(1)
    assert len(images.unique(dim=0)) == 120


@pytest.mark.parametrize("name", [*VARIATION, *VARIATION_COLOURS, "background"])
def test_every_nuisance_changes_the_image(monkeypatch, name):
    """Everything else of two images held at one value, this nuisance at two: the pictures must differ."""
    columns = [*VARIATION, *(colour for colour in [*VARIATION_COLOURS, "background"] for _ in range(3))]
    place = [number for number, column in enumerate(columns) if column == name]
    how = np.full((2, module.WIDTH), 0.7, np.float32)
    shown = {
        "glasses": 0.0,
        "occluder": 0.0,
        "occluder_x": 0.9,
        "occluder_y": 0.1,
        "lens_tint": 1.0,
        "backdrop_colour": 0.2,
    }
    for number, column in enumerate(columns):
        how[:, number] = shown.get(column, 0.7)
    how[1, place] = 0.95 if name in ("glasses", "occluder") else 0.05
    who = np.full((2, len(module.IDENTITY)), 0.5, np.float32)
    images = module._draw(who, how, 56, 0, torch.device("cpu")).int()
    assert (images[0] - images[1]).abs().max() >= 8


@pytest.mark.parametrize("name", module.IDENTITY)
def test_every_feature_of_an_identity_shows(name):
    who = np.full((2, len(module.IDENTITY)), 0.5, np.float32)
    for visible, value in {
        "beard": 0.95,
        "moustache": 0.9,
        "skin_tone": 0.2,
        "hair_tone": 0.1,
        "hair_length": 0.1,
    }.items():
        who[:, [*module.IDENTITY].index(visible)] = value
    who[:, [*module.IDENTITY].index(name)] = 0.05, 0.95
    how = np.full((2, module.WIDTH), 0.65, np.float32)
    how[:, [*VARIATION].index("light_x")] = 0.95
    how[:, [*VARIATION].index("noise")] = 0
    images = module._draw(who, how, 112, 0, torch.device("cpu")).int()
    assert (images[0] - images[1]).abs().max() >= 8


def test_identities_are_left_right_symmetric():
    """Flips are an augmentation, so a frontal face in frontal light must be its own mirror image."""
    middle = np.full((3, module.WIDTH), 0.5, np.float32)
    middle[:, [*VARIATION].index("occluder")] = 1
    middle[:, [*VARIATION].index("strand_phase")] = 0.25  # a crest on the axis
    who = np.random.default_rng(0).random((3, len(module.IDENTITY)), dtype=np.float32)
    images = module._draw(who, middle, 56, 0, torch.device("cpu")).float()
    noise = 255 * sum(VARIATION["noise"]) / 2
    assert (images - images.flip(-1)).abs().mean() < 2 * noise


def test_pixel_statistics():
    train, _ = synthetic_faces(20, 8, 1, 56)
    assert train.images.min() == 0 and train.images.max() == 255
    per_image = train.images.float().flatten(1)
    assert per_image.std(dim=1).min() > 10
    assert 60 < per_image.mean() < 180
    saturated = ((train.images == 0) | (train.images == 255)).float().mean()
    assert saturated < 0.1


def test_mean_colour_does_not_tell_identities_apart():
    """The bar is 10% for 100 identities; smaller images have the same mean colour to within a grey level."""
    train, test = synthetic_faces(100, 24, 6, 16)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train.images.float().mean(dim=(2, 3)).numpy(), train.labels.numpy())
    accuracy = classifier.score(test.images.float().mean(dim=(2, 3)).numpy(), test.labels.numpy())
    assert accuracy < 0.10


def test_identities_are_recognisable_at_all():
    """A bound from below, so that the mean-colour test is not passed by noise: pixels tell 10 identities apart."""
    train, test = synthetic_faces(10, 24, 6, 28)
    classifier = LogisticRegression(max_iter=1000).fit(train.images.flatten(1).numpy() / 255, train.labels.numpy())
    assert classifier.score(test.images.flatten(1).numpy() / 255, test.labels.numpy()) > 0.6


def test_any_size_and_a_large_seed():
    train, _ = synthetic_faces(2, 1, 1, image_size=45, seed=2**63)
    assert train.images.shape == (2, 3, 45, 45)


def test_digests_are_of_what_determines_an_image(small):
    train, test = small
    assert train.files[:5] == ("train/id000/0", "train/id000/1", "train/id000/2", "train/id000/3", "train/id001/0")
    assert test.files[-1] == "test/id004/1"
    assert len({*train.digests, *test.digests}) == 30
    more_train, more_test = synthetic_faces(3, 6, 3, 16, seed=3, first=2)  # another size, other counts
    for few, many in ((train, more_train), (test, more_test)):
        known = dict(zip(many.files, many.digests, strict=True))
        shared = [(file, digest) for file, digest in zip(few.files, few.digests, strict=True) if "/id002/" in file]
        assert shared and all(known[file] == digest for file, digest in shared)
    other, _ = synthetic_faces(5, 4, 2, 16, seed=4)
    assert not {*other.digests} & {*train.digests}


def test_another_version_has_other_digests(small, monkeypatch):
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert not {*synthetic_faces(5, 4, 2, 8, seed=3)[0].digests} & {*small[0].digests}
