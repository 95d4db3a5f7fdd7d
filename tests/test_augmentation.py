"""Crops, flips and mixtures against a plain loop over the samples and torchvision; who draws what; who refuses them."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from admm.augmentation import Augmentation, Chain, CropAndFlip, Mixup, OfInput
from admm.losses import CrossEntropy, SquaredError, one_hot
from admm.minibatches import stateless_rng
from admm.optimizers import BCD, SGD, Backprop, BlockADMM, Gotmare, OnlineBlockADMM

SEEDS = (3, 1, 7)


@pytest.mark.parametrize("padding, flip", [(0, False), (0, True), (1, True), (3, False), (3, True)])
def test_it_is_a_crop_of_the_padded_and_mirrored_image(padding, flip):
    x = torch.randn(400, 2, 5, 6)
    change = CropAndFlip(padding, flip)
    drawn = change.draw(400, torch.Generator().manual_seed(0))
    changed = change.apply(x, drawn)
    for image, (top, left, mirrored), result in zip(x, drawn.tolist(), changed, strict=True):
        padded = torch.zeros(2, 5 + 2 * padding, 6 + 2 * padding)
        padded[:, padding : padding + 5, padding : padding + 6] = image
        crop = padded[:, top : top + 5, left : left + 6]
        assert torch.equal(result, crop.flip(2) if mirrored else crop)
    assert torch.equal(change.apply(x[:, 1], drawn), changed[:, 1])  # grey images
    assert set(drawn[:, 0].tolist()) == set(drawn[:, 1].tolist()) == set(range(2 * padding + 1))
    assert set(drawn[:, 2].tolist()) == ({0, 1} if flip else {0})


def test_a_replica_s_draws_depend_on_its_seed_and_the_epoch_alone(resnet_problem):
    change = CropAndFlip(2)
    problem = replace(resnet_problem(), augmentation=change)
    whole = [torch.cat([visit.x for visit in problem.minibatches(4, SEEDS, epoch, None)[1]], 1) for epoch in (0, 1)]
    alone = torch.cat([visit.x for visit in problem.minibatches(4, SEEDS[1:2], 1, None)[1]], 1)
    assert torch.equal(whole[1][1], alone[0])
    assert not torch.equal(whole[0][1], whole[1][1]) and not torch.equal(whole[0][0], whole[0][1])
    parts = [visit.x for part in (2, 3) for visit in problem.minibatches(4, SEEDS, part, 2)[1]]
    assert torch.equal(torch.cat(parts, 1), whole[1])


@pytest.mark.parametrize("augmentation", [None, CropAndFlip(2)])
def test_replicas_of_one_seed_in_any_place_have_its_mini_batches(resnet_problem, augmentation):
    problem, seeds = replace(resnet_problem(), augmentation=augmentation), [SEEDS[1], SEEDS[0], SEEDS[1]]
    alone = {seed: list(problem.minibatches(4, [seed], 1, None)[1]) for seed in seeds}
    for number, visit in enumerate(problem.minibatches(4, seeds, 1, None)[1]):
        for replica, seed in enumerate(seeds):
            own = alone[seed][number]
            assert torch.equal(visit.x[replica], own.x[0]) and torch.equal(visit.y[replica], own.y[0])


def test_samples_keep_their_targets_and_are_changed_as_drawn(resnet_problem):
    change = CropAndFlip(2)
    problem = replace(resnet_problem(), augmentation=change)
    plain = list(resnet_problem().minibatches(4, SEEDS, 5, None)[1])
    for s, seed in enumerate(SEEDS):
        of_all = change.apply(problem.x, change.draw(len(problem.x), stateless_rng(seed, "augmentation", 5)))
        for visit, original in zip(problem.minibatches(4, SEEDS, 5, None)[1], plain, strict=True):
            number = [int((problem.x == image).flatten(1).all(1).nonzero()) for image in original.x[s]]
            assert torch.equal(visit.x[s], of_all[number]) and torch.equal(visit.y, original.y)


@pytest.mark.parametrize(
    "optimizer",
    [
        Backprop(2, SGD(), 0.05, batch_size=5),
        Gotmare(2, 0.01, 0.1, batch_size=5, theta_update=SGD()),
        OnlineBlockADMM(2, 0.01, 0.1, batch_size=5, theta_update=SGD()),
    ],
    ids=["backprop", "gotmare", "online"],
)
def test_an_optimizer_sees_the_changed_images(resnet_problem, optimizer):
    plain, changed = resnet_problem(), replace(resnet_problem(), augmentation=CropAndFlip(2))
    unchanged = replace(resnet_problem(), augmentation=CropAndFlip(0, flip=False))
    states = [optimizer.init(problem, SEEDS) for problem in (plain, changed, unchanged)]
    for problem, state in zip((plain, changed, unchanged), states, strict=True):
        optimizer.step(problem, state)
    assert torch.equal(states[0].theta.flat(), states[2].theta.flat())
    assert not torch.allclose(states[0].theta.flat(), states[1].theta.flat())


@pytest.mark.parametrize("optimizer", [BlockADMM(1, 0.1, batch_size=5), BCD()], ids=["block_admm", "bcd"])
def test_variables_of_each_sample_refuse_it_by_name(mlp_problem, optimizer):
    problem = replace(mlp_problem(CrossEntropy()), augmentation=CropAndFlip())
    with pytest.raises(ValueError, match=r"augmentation: .* keeps variables of each sample"):
        optimizer.init(problem, SEEDS)


@pytest.mark.parametrize("option", [{"padding": -1}, {"padding": 1.5}, {"padding": True}, {"flip": "no"}, {"flip": 0}])
def test_a_wrong_option_is_refused_by_name(option):
    with pytest.raises(ValueError, match=rf"^{next(iter(option))}: "):
        CropAndFlip(**option)


def torchvision_s(x, y, weights, classes):
    """Each sample as torchvision mixes it, when it draws the sample's λ for the whole mini-batch."""
    mixup = pytest.importorskip("torchvision.transforms.v2").MixUp(num_classes=classes)
    rows = []
    for i, weight in enumerate(weights.tolist()):
        mixup.make_params = lambda inputs, weight=weight: {"lam": weight}
        rows.append([values[i] for values in mixup(x, y)])
    return [torch.stack(values) for values in zip(*rows, strict=True)]


@pytest.mark.parametrize("given", ["indices", "distributions"])
def test_mixup_is_torchvision_s(given):
    x, y = torch.randn(2, 5, 3, 4, 4), torch.randint(4, (2, 5))
    change = Mixup(0.7, classes=4)
    drawn = change.draw(10, torch.Generator().manual_seed(0)).view(2, 5, 1)
    found = change.change(x, y if given == "indices" else one_hot(y, 4, x), drawn)
    for s in range(2):  # each mini-batch by itself
        expected = torchvision_s(x[s], y[s], drawn[s, :, 0], 4)
        torch.testing.assert_close([found[0][s], found[1][s]], expected)
    torch.testing.assert_close(found[1].sum(2), torch.ones(2, 5))
    torch.testing.assert_close(change.apply(x[0], drawn[0]), found[0][0])


def test_mixup_draws_a_beta_distribution():
    drawn = Mixup(0.3).draw(4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 1)
    assert stats.kstest(drawn.flatten().double().numpy(), stats.beta(0.3, 0.3).cdf).pvalue > 0.01
    assert torch.equal(drawn, Mixup(0.3).draw(4000, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, Mixup(0.3).draw(4000, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("shape", [(), (2,)], ids=["numbers", "vectors"])
def test_mixup_of_numbers_needs_no_classes(shape):
    x, y, drawn = torch.randn(1, 4, 3), torch.randn(1, 4, *shape), torch.rand(1, 4, 1)
    _, mixed = Mixup().change(x, y, drawn)
    for i in range(4):
        weight = drawn[0, i]
        torch.testing.assert_close(mixed[0, i], (weight * y[0, i] + (1 - weight) * y[0, i - 1]).view(shape))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(1, 2, 3), torch.tensor([[0, 1]]), "augmentation: Mixup needs the number of classes"),
        (torch.randn(1, 2, 3), (torch.randn(1, 2), torch.ones(1, 2)), "augmentation: Mixup takes .*, not a tuple"),
        (torch.ones(1, 2, 3).long(), torch.randn(1, 2), "augmentation: Mixup mixes inputs of floating point, not of"),
    ],
)
def test_what_mixup_cannot_mix_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        Mixup().change(x, y, torch.ones(1, 2, 1))


@pytest.mark.parametrize("label", [-100, 2])
def test_mixup_refuses_indices_of_no_class(label):
    with pytest.raises(ValueError, match=rf"Mixup has classes=2, and class indices go from {min(0, label)} to "):
        Mixup(classes=2).change(torch.randn(1, 2, 3), torch.tensor([[0, label]]), torch.ones(1, 2, 1))


@pytest.mark.parametrize("shape", [(4,), (3, 3, 3, 3), (8, 8, 3)], ids=["vector", "film", "colours last"])
def test_only_images_are_cropped(shape):
    with pytest.raises(ValueError, match=rf"CropAndFlip takes images .*padding 4, not samples \{list(shape)}"):
        CropAndFlip().apply(torch.zeros(2, *shape), torch.zeros(2, 3).long())


def test_augmentations_of_a_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"augmentations: CropAndFlip\(.*\) is no list of admm"):
        Chain(CropAndFlip())
    for x, entries in (({"a": torch.zeros(1, 1, 2)}, r"\['a'\]"), (torch.zeros(1, 1, 2), "one tensor")):
        with pytest.raises(ValueError, match=f"key: 'image' is no entry of the inputs, which are {entries}"):
            OfInput("image", Mixup()).change(x, torch.zeros(1, 1), torch.ones(1, 1, 1))


@pytest.mark.parametrize("option", [{"alpha": 0.0}, {"alpha": "much"}, {"classes": 0}, {"classes": 2.5}])
def test_a_wrong_option_of_mixup_is_refused_by_name(option):
    with pytest.raises(ValueError, match=rf"^{next(iter(option))}: "):
        Mixup(**option)


def test_mini_batches_are_cropped_and_then_mixed(resnet_problem):
    crop, mix = CropAndFlip(2), Mixup(0.5, classes=3)
    problem = replace(resnet_problem(), augmentation=Chain([crop, mix]))
    plain = list(resnet_problem().minibatches(5, SEEDS, 3, None)[1])
    for s, seed in enumerate(SEEDS):
        rng = stateless_rng(seed, "augmentation", 3)
        drawn = [change.draw(12, rng) for change in (crop, mix)]
        for visit, original in zip(problem.minibatches(5, SEEDS, 3, None)[1], plain, strict=True):
            number = [int((problem.x == image).flatten(1).all(1).nonzero()) for image in original.x[s]]
            images = crop.apply(original.x[s], drawn[0][number])
            expected = torchvision_s(images, original.y[s].argmax(1), drawn[1][number, 0], 3)
            torch.testing.assert_close([visit.x[s], visit.y[s]], expected, rtol=1e-6, atol=1e-7, check_dtype=False)
    alone = list(problem.minibatches(5, SEEDS[1:2], 3, None)[1])
    for visit, own in zip(problem.minibatches(5, SEEDS, 3, None)[1], alone, strict=True):
        assert torch.equal(visit.x[1], own.x[0]) and torch.equal(visit.y[1], own.y[0])


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["classes", "numbers"])
def test_networks_learn_from_mixed_samples(mlp_problem, loss):
    problem = replace(mlp_problem(loss), augmentation=Mixup(0.2, classes=3))
    for optimizer in (Backprop(30, SGD(), 0.3, 6), OnlineBlockADMM(30, 0.01, 0.5, batch_size=6)):
        state = optimizer.init(problem, SEEDS)
        before = loss_of(problem, state)
        for _ in range(30):
            optimizer.step(problem, state)
        assert bool((loss_of(problem, state) < 0.97 * before).all())


def loss_of(problem, state):
    z = problem.blocks.forward(state.theta, problem.x.expand(len(SEEDS), *problem.x.shape))
    return problem.loss.value(z, problem.y.expand(len(SEEDS), *problem.y.shape)).mean(1)


class Brighter(Augmentation):
    """One's own, for inputs by name."""

    def draw(self, samples, generator):
        return torch.rand(samples, 1, generator=generator)

    def apply(self, x, changes):
        return x | {"image": x["image"] + changes.unsqueeze(2)}


def test_an_augmentation_sees_the_inputs_as_the_network_takes_them():
    x = {"image": torch.randn(2, 4, 5, 5), "mask": torch.ones(2, 4, 3)}
    y, drawn = torch.zeros(2, 4), torch.rand(2, 4, 1)
    found, same = Brighter().change(x, y, drawn)
    assert torch.equal(found["image"], x["image"] + drawn.unsqueeze(3))
    assert torch.equal(found["mask"], x["mask"]) and same is y


def test_one_entry_of_nested_inputs_is_changed():
    crop, image, mask = CropAndFlip(1), torch.randn(2, 4, 5, 5), torch.ones(2, 4, 3)
    drawn = crop.draw(8, torch.Generator().manual_seed(0)).view(2, 4, 3)
    expected = crop.apply(image.flatten(0, 1), drawn.flatten(0, 1)).view_as(image)
    for x, key in (({"image": image, "mask": mask}, "image"), ((mask, image), 1), ([image, mask], 0)):
        found, _ = OfInput(key, crop).change(x, torch.zeros(2, 4), drawn)
        assert type(found) is type(x) and torch.equal(found[key], expected) and found is not x
        others = [found[k] for k in (found if isinstance(found, dict) else range(2)) if k != key]
        assert torch.equal(others[0], mask)
    mixed, y = OfInput("image", Mixup(classes=2)).change({"image": image}, torch.zeros(2, 4).long(), drawn[..., :1] / 2)
    assert torch.equal(y[..., 0], torch.ones(2, 4)) and not torch.equal(mixed["image"], image)
