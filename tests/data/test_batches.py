import pytest
import torch

from data.batches import Pass, batches, gathered_ahead, random_flip

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_pass_shows_every_image_of_the_longest_stream_and_cycles_the_shorter(make_images):
    images = make_images(num_classes=6, per_class=10)
    plan = Pass({"forget": torch.arange(0, 10), "remain": torch.arange(10, 60)}, batch_size=8)
    assert plan.steps == 7
    seen = {"forget": [], "remain": []}
    for batch in batches(images, plan, generator(), CPU):
        assert batch.sizes == {"forget": 8, "remain": 8}
        parts = batch.split(batch.indices)
        for name, indices in parts.items():
            assert len(indices.unique()) == len(indices) or name == "forget"
            seen[name] += indices.tolist()
        assert torch.equal(batch.images, images.images[batch.indices])
        assert torch.equal(batch.labels, images.labels[batch.indices])
    assert set(seen["remain"]) == set(range(10, 60))
    assert set(seen["forget"]) == set(range(10))
    assert len(seen["forget"]) == len(seen["remain"]) == 56
    # Shorter streams start over only when every image had its turn.
    assert sorted(seen["forget"][:10]) == list(range(10))


@pytest.mark.parametrize(("over", "steps"), [("longest", 7), ("remain", 7), ("forget", 2)])
def test_a_pass_may_last_as_long_as_one_stream(over, steps):
    plan = Pass({"forget": torch.arange(0, 10), "remain": torch.arange(10, 60)}, batch_size=8, over=over)
    assert plan.steps == steps
    columns = plan.schedule(generator()).split([8, 8], dim=1)
    assert {*columns[0].flatten().tolist()} == set(range(10))
    assert len(columns[1].flatten().unique()) == min(50, 8 * steps)


def test_streams_smaller_than_a_batch_are_taken_whole():
    plan = Pass({"forget": torch.arange(5), "remain": torch.arange(5, 25)}, batch_size=8)
    assert plan.sizes == {"forget": 5, "remain": 8}
    assert plan.steps == 3
    schedule = plan.schedule(generator())
    assert schedule.shape == (3, 13)
    assert all(sorted(row[:5].tolist()) == list(range(5)) for row in schedule)


def test_a_short_last_batch_ends_each_round_of_a_stream(make_images):
    """As loaders that drop nothing give them, the shorter one started anew whenever it is through."""
    images = make_images(num_classes=6, per_class=10)
    plan = Pass({"forget": torch.arange(0, 10), "remain": torch.arange(10, 55)}, batch_size=8, last_batch="short")
    sizes, rounds = [], {"forget": [], "remain": []}
    for batch in batches(images, plan, generator(), CPU):
        parts = batch.split(batch.indices)
        sizes.append((len(parts["forget"]), len(parts["remain"])))
        assert len(batch) == sum(sizes[-1])
        for name, part in parts.items():
            rounds[name] += part.tolist()
    assert sizes == [(8, 8), (2, 8), (8, 8), (2, 8), (8, 8), (2, 5)]
    assert sorted(rounds["remain"]) == list(range(10, 55))
    assert all(sorted(rounds["forget"][start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    whole = [batch.indices for batch in batches(images, plan, generator(5), CPU)]
    resumed = [batch.indices for batch in batches(images, plan, generator(5), CPU, start=4)]
    assert len(resumed) == 2 and all(map(torch.equal, whole[4:], resumed))


def test_three_streams_run_side_by_side():
    plan = Pass({"forget": torch.arange(4), "remain": torch.arange(4, 12), "again": torch.arange(4, 12)}, batch_size=4)
    schedule = plan.schedule(generator())
    assert schedule.shape == (2, 12)
    assert not torch.equal(schedule[:, 4:8], schedule[:, 8:])


def test_the_order_depends_on_the_generator_alone():
    plan = Pass({"train": torch.arange(50)}, batch_size=16)
    assert torch.equal(plan.schedule(generator(3)), plan.schedule(generator(3)))
    assert not torch.equal(plan.schedule(generator(3)), plan.schedule(generator(4)))


def test_images_in_host_memory_are_gathered_one_batch_ahead(make_images):
    images, drawn = make_images(), []
    plan = Pass({"train": torch.arange(48)}, batch_size=16)
    rows = plan.schedule(generator())
    gathered = gathered_ahead(images, (drawn.append(row) or row for row in rows), pin=False)
    seen = []
    for found, batch in zip(gathered, batches(images, plan, generator(), CPU), strict=True):
        seen.append(len(drawn))
        for part, expected in zip(found, (batch.images, batch.labels, batch.indices), strict=True):
            assert torch.equal(part, expected)
    assert seen == [2, 3, 3]


def test_flips_mirror_about_half_of_the_images():
    images = torch.randint(0, 255, (400, 3, 4, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    flipped = random_flip(images)
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    assert bool((same | mirrored).all())
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)
