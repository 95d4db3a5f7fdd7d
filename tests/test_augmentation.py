"""Crops and flips against a plain loop over the samples; who draws what; who refuses them."""

from dataclasses import replace

import pytest
import torch

from admm.augmentation import CropAndFlip
from admm.losses import CrossEntropy
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
    whole = [torch.cat([visit.x for _, visit in problem.minibatches(4, SEEDS, epoch, None)], 1) for epoch in (0, 1)]
    alone = torch.cat([visit.x for _, visit in problem.minibatches(4, SEEDS[1:2], 1, None)], 1)
    assert torch.equal(whole[1][1], alone[0])
    assert not torch.equal(whole[0][1], whole[1][1]) and not torch.equal(whole[0][0], whole[0][1])
    parts = [visit.x for part in (2, 3) for _, visit in problem.minibatches(4, SEEDS, part, 2)]
    assert torch.equal(torch.cat(parts, 1), whole[1])


@pytest.mark.parametrize("augmentation", [None, CropAndFlip(2)])
def test_replicas_of_one_seed_in_any_place_have_its_mini_batches(resnet_problem, augmentation):
    problem, seeds = replace(resnet_problem(), augmentation=augmentation), [SEEDS[1], SEEDS[0], SEEDS[1]]
    alone = {seed: list(problem.minibatches(4, [seed], 1, None)) for seed in seeds}
    for number, (part, visit) in enumerate(problem.minibatches(4, seeds, 1, None)):
        for replica, seed in enumerate(seeds):
            at, own = alone[seed][number]
            assert part == at and torch.equal(visit.x[replica], own.x[0]) and torch.equal(visit.y[replica], own.y[0])


def test_samples_keep_their_targets_and_are_changed_as_drawn(resnet_problem):
    change = CropAndFlip(2)
    problem = replace(resnet_problem(), augmentation=change)
    plain = list(resnet_problem().minibatches(4, SEEDS, 5, None))
    for s, seed in enumerate(SEEDS):
        of_all = change.apply(problem.x, change.draw(len(problem.x), stateless_rng(seed, "augmentation", 5)))
        for (_, visit), (_, original) in zip(problem.minibatches(4, SEEDS, 5, None), plain, strict=True):
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
    assert torch.equal(states[0].theta.flat, states[2].theta.flat)
    assert not torch.allclose(states[0].theta.flat, states[1].theta.flat)


@pytest.mark.parametrize("optimizer", [BlockADMM(1, 0.1, batch_size=5), BCD()], ids=["block_admm", "bcd"])
def test_variables_of_each_sample_refuse_it_by_name(mlp_problem, optimizer):
    problem = replace(mlp_problem(CrossEntropy()), augmentation=CropAndFlip())
    with pytest.raises(ValueError, match=r"augmentation: .* keeps variables of each sample"):
        optimizer.init(problem, SEEDS)


@pytest.mark.parametrize("option", [{"padding": -1}, {"padding": 1.5}, {"padding": True}, {"flip": "no"}, {"flip": 0}])
def test_a_wrong_option_is_refused_by_name(option):
    with pytest.raises(ValueError, match=rf"^{next(iter(option))}: "):
        CropAndFlip(**option)
