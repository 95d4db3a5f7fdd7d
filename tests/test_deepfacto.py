"""DeepFacto (Eq. 9): every update decreases it, stacked replicas are their own, and the network can be exported."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import nn
from torch.testing import assert_close

from admm.blocks import split
from admm.checkpoints import restore, save
from admm.losses import FunctionLoss, SquaredError, TripletLoss
from admm.models import initialiser
from admm.nmf import NMF, matrix, nonnegative_least_squares
from admm.optimizers import SGD, Adam, Averaged
from admm.optimizers.coupling import ZState, penalties
from admm.optimizers.deepfacto import (
    DeepFacto,
    FactorisedLagrangian,
    FactorisedZUpdate,
    by_block,
    factorisations,
    update_blocks,
)
from admm.optimizers.protocol import Problem

SEEDS = (3, 1)
BASE = DeepFacto(
    5,
    1e-2,
    0.1,
    {"blocks": [1.5, 0.7, 2.0]},
    batch_size=8,
    warm_rounds=5,
    dual_step=0.5,
    forward_mixing=0.3,
    slice_size=7,
)


def network(rank=3):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 2), nn.ReLU()),
        NMF(5, rank),
        nn.Sequential(nn.Flatten(), nn.Linear(rank * 9, 4)),
    )


def problem(net=None, after=("0", "1"), loss=None, samples=20, y=None):
    random = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 2, 4, 4, generator=random, dtype=torch.float64)
    y = torch.arange(samples) // 3 if y is None else y
    blocks = split(net or network(), after=after)
    return Problem(x, y, blocks, loss or TripletLoss(margin=0.5), initialiser("kaiming_uniform"))


def lagrangian_of(options, task, state):
    """Eq. 9 of copies of all variables."""
    z, u = ([v.clone() for v in variables] for variables in (state.z, state.u))
    beta = penalties(options.beta, len(z), len(state.seeds), task.x)
    visit = task.visit(state.seeds, slice(None))
    return FactorisedLagrangian(task, state.theta, factorisations(task.blocks, state.theta), beta, visit, z, u)


def update_z(options, lagrangian, t, step=0.0):
    update = FactorisedZUpdate("gradient", score_sweeps=options.score_sweeps)
    update.update_z(lagrangian, ZState(), t, step)


def trained(options, task, seeds=SEEDS, epochs=2):
    state = options.init(task, seeds)
    for _ in range(epochs):
        options.step(task, state)
    return state


def two_factorisations():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 2), nn.ReLU()),
        NMF(5, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(27, 8)),
        nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        NMF(8, 4),
        nn.Sequential(nn.ReLU(), nn.Linear(4, 6)),
        nn.Sequential(nn.ReLU(), nn.Linear(6, 4)),
    )


def test_the_lagrangian_is_equation_9():
    task = problem()
    state = trained(BASE, task)
    lagrangian = lagrangian_of(BASE, task, state)
    for r in range(2):
        net = task.blocks.export(state.theta, r).double()
        (z1, s, z2), (u1, v, u2) = ([t[r] for t in tensors] for tensors in (state.z, state.u))
        residuals = [z1 - net[0](task.x) + u1, torch.einsum("cr,nrhw->nchw", net[1].basis, s) * -1 + z1 + v]
        residuals.append(z2 - net[2](s) + u2)
        expected = task.loss.value(z2, task.y).sum()
        expected = expected + sum(b / 2 * res.square().sum() for b, res in zip((1.5, 0.7, 2.0), residuals, strict=True))
        assert_close(lagrangian.value()[r], expected.detach())


@pytest.mark.parametrize("net", [network, two_factorisations])
def test_every_primal_update_decreases_equation_9(net):
    whole = net()
    after = [str(k) for k in range(len(whole) - 1)]
    task = problem(whole, after, SquaredError(), y=torch.rand(20, 4, dtype=torch.float64))
    # Small steps where an update is a gradient step; the others have none.
    options = replace(BASE, theta_step=1e-3, z_step=1e-2, beta=1.3, theta_update=SGD(), group_size=1)
    state = trained(options, task)
    lagrangian = lagrangian_of(options, task, state)
    assert len(lagrangian.factors) == (1 if net is network else 2)
    value = lagrangian.value()
    for t in range(len(state.z), 0, -1):
        update_z(options, lagrangian, t, 1e-2)
        moved = lagrangian.value()
        assert (moved < value).all(), t
        value = moved
    blocks = [t for t in range(1, len(state.z) + 1) if t not in lagrangian.factors]
    update_blocks(lagrangian, options.theta_update, state.moments, blocks, [1e-3] * len(state.z))
    assert (lagrangian.value() < value).all()


def test_an_error_weight_keeps_a_part_of_the_error():
    task = problem()
    state = trained(BASE, task)
    lagrangian = lagrangian_of(BASE, task, state)
    lagrangian.error_weight = 0.25
    lagrangian.mix_with_forward(1.0)
    basis, projected = lagrangian.factors[2], lagrangian.z[1].clone()
    error = lagrangian.z[0] - torch.einsum("Rcr,Rnrhw->Rnchw", basis, projected)
    for t in (3, 2, 1):
        update_z(BASE, lagrangian, t, 0.1)
    z = lagrangian.z[0].clone().requires_grad_()
    product = torch.einsum("Rcr,Rnrhw->Rnchw", basis, lagrangian.z[1])
    coupling = 1.5 / 2 * (z - lagrangian.output(1) + state.u[0]).square().sum()
    (coupling + 0.7 / 2 * (z - 0.75 * error - product + state.u[1]).square().sum()).backward()
    assert_close(z.grad, torch.zeros_like(z), atol=1e-10, rtol=0)


def test_with_an_error_weight_of_zero_the_loss_alone_trains_the_features():
    """Without a step along the loss, nothing moves them; Eq. 9 does."""
    task = problem()
    options = replace(BASE, forward_mixing=1.0, dual_step=0.0, z_step=0.0, theta_update=SGD())
    moved = {}
    for weight in (None, 0.0):
        start, end = (trained(replace(options, error_weight=weight), task, epochs=k) for k in (0, 1))
        first, last = (by_block(task.blocks, state.theta)[0][0] for state in (start, end))
        moved[weight] = float((last - first).abs().max())
    assert moved[0.0] < 1e-4 * moved[None]


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_scores_of_zero_before_a_relu_decrease_equation_9(shift):
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 2), nn.ReLU(), nn.Flatten()),
        NMF(45, 4),
        nn.Sequential(nn.ReLU(), nn.Linear(4, 4)),
    )
    task = problem(net, loss=SquaredError(), y=torch.rand(20, 4, dtype=torch.float64))
    options = replace(BASE, beta=1.0, group_size=1)
    state = options.init(task, SEEDS)
    state.z[1] = torch.zeros_like(state.z[1])
    weight = task.blocks[2].linear_weight(state.theta.blocks[2])
    state.z[2] += shift * weight.sum(2).unsqueeze(1)  # towards scores that cannot be, or can
    lagrangian = lagrangian_of(options, task, state)
    value = lagrangian.value()
    update_z(options, lagrangian, 2)
    assert (lagrangian.value() < value).all()


def test_the_mixing_of_scores_is_the_projection(monkeypatch):
    exact = partial(nonnegative_least_squares, tolerance=1e-9)
    monkeypatch.setattr("admm.optimizers.deepfacto.nonnegative_least_squares", exact)
    task = problem()
    state = trained(BASE, task)
    lagrangian = lagrangian_of(BASE, task, state)
    whole, part = (lagrangian_of(BASE, task, state) for _ in range(2))
    whole.mix_with_forward(1.0)
    part.mix_with_forward(0.25)
    assert_close(part.z[0], torch.lerp(lagrangian.z[0], lagrangian.output(1), 0.25))
    for r, basis in enumerate(lagrangian.factors[2].numpy()):
        target = matrix(whole.block_input(2) + whole.u[1])[r].numpy()
        expected = np.stack([nnls(basis, column)[0] for column in target.T], axis=1)
        assert_close(matrix(whole.z[1])[r], torch.from_numpy(expected), rtol=1e-5, atol=1e-7)


def test_what_is_common_to_all_scores_is_not_for_the_embedding_to_undo():
    """Features that have shrunk since the last visit leave the embedding's coupling term as it was: without a step
    along the loss, 0."""
    task, options = problem(), replace(BASE, forward_mixing=1.0, dual_step=0.0)
    state = trained(options, task)
    for p in by_block(task.blocks, state.theta)[0]:
        p.mul_(0.8)
    lagrangian = lagrangian_of(options, task, state)
    lagrangian.mix_with_forward(1.0)
    for t in (3, 2):
        update_z(options, lagrangian, t)
    assert (lagrangian.residual(3).norm(dim=(1, 2)) < 1e-4 * lagrangian.z[2].norm(dim=(1, 2))).all()


def test_the_mixing_of_scores_of_rank_one_goes_a_part_of_the_way():
    task = problem(network(rank=1))
    state = trained(BASE, task)
    whole, part = (lagrangian_of(BASE, task, state) for _ in range(2))
    before = part.z[1].clone()
    whole.mix_with_forward(1.0)
    part.mix_with_forward(0.0)
    assert_close(part.z[1], before)
    assert not torch.allclose(whole.z[1], before)


def test_the_basis_decreases_equation_9_and_all_factors_stay_positive():
    task = problem()
    state = trained(BASE, task)
    lagrangian = lagrangian_of(BASE, task, state)
    value = lagrangian.value()
    BASE._update_basis(task, state, 2, lagrangian.factors[2])
    assert (lagrangian.value() < value).all()
    assert state.z[1].min() >= 0.0 and lagrangian.factors[2].min() >= 0.0


def test_the_update_before_a_factorisation_is_the_exact_minimiser():
    task = problem()
    state = trained(BASE, task)
    lagrangian = lagrangian_of(BASE, task, state)
    update_z(BASE, lagrangian, 1)
    z = lagrangian.z[0].clone().requires_grad_()
    basis, scores = factorisations(task.blocks, state.theta)[2], state.z[1]
    product = torch.einsum("Rcr,Rnrhw->Rnchw", basis, scores)
    coupling = 1.5 / 2 * (z - lagrangian.output(1) + state.u[0]).square().sum()
    (coupling + 0.7 / 2 * (z - product + state.u[1]).square().sum()).backward()
    assert_close(z.grad, torch.zeros_like(z), atol=1e-10, rtol=0)


def test_many_sweeps_of_the_scores_reach_the_optimum_of_equation_9():
    task = problem()
    options = replace(BASE, score_sweeps=5)
    state = trained(options, task)
    lagrangian = lagrangian_of(options, task, state)
    for _ in range(1500):
        update_z(options, lagrangian, 2)
    net = task.blocks.export(state.theta, 0)
    weight, bias = net[2][1].weight.detach(), net[2][1].bias.detach()
    for n in range(5):
        # ½‖[√γ (I ⊗ M); √β W] s − [√γ (z + v); √β (z' + u − b)]‖², s by row and place.
        m = torch.kron(net[1].basis.contiguous(), torch.eye(9).double())
        matrix_of = torch.cat([0.7**0.5 * m, 2.0**0.5 * weight])
        above = (state.z[0][0, n] + state.u[1][0, n]).flatten()
        target = torch.cat([0.7**0.5 * above, 2.0**0.5 * (state.z[2][0, n] + state.u[2][0, n] - bias)])
        best, _ = nnls(matrix_of.numpy(), target.numpy())
        assert_close(lagrangian.z[1][0, n].flatten(), torch.tensor(best), atol=1e-5, rtol=1e-5)


def test_the_duals_grow_by_the_constraints():
    task = problem()
    state = trained(BASE, task)
    lagrangian = lagrangian_of(BASE, task, state)
    before, residuals = [u.clone() for u in lagrangian.u], [lagrangian.residual(t).clone() for t in (1, 2, 3)]
    lagrangian.update_duals(0.25)
    for old, new, residual in zip(before, lagrangian.u, residuals, strict=True):
        assert_close(new, old + 0.25 * residual)


def test_stacked_replicas_are_their_own():
    task = problem()
    together = trained(BASE, task)
    for r, seed in enumerate(SEEDS):
        alone = trained(BASE, task, (seed,))
        assert_close(alone.theta.flat()[0], together.theta.flat()[r])
        assert_close(alone.theta.buffers[0], together.theta.buffers[r])
        for one, many in zip([*alone.z, *alone.u], [*together.z, *together.u], strict=True):
            assert_close(one[0], many[r])


def test_a_resumed_run_is_the_uninterrupted_one():
    task = problem()
    state = trained(BASE, task, epochs=1)
    saved, other = copy.deepcopy(save(state)), BASE.init(task, SEEDS)
    restore(other, saved)
    for one in (state, other):
        BASE.step(task, one)
    assert torch.equal(state.theta.flat(), other.theta.flat()) and torch.equal(state.theta.buffers, other.theta.buffers)
    assert all(map(torch.equal, state.z, other.z)) and all(map(torch.equal, state.u, other.u))


@pytest.mark.parametrize("update", [SGD(weight_decay=0.1), Adam(weight_decay=0.1)])
def test_frozen_blocks_do_not_move_before_their_time(update):
    task = problem()
    options = replace(BASE, frozen=2, theta_update=update)
    state = options.init(task, SEEDS)
    start = state.theta.flat().clone()
    size = sum(p.numel() for p in task.blocks.network[0].parameters())
    for _ in range(2):
        options.step(task, state)
    assert torch.equal(state.theta.flat()[:, :size], start[:, :size])
    assert not torch.equal(state.theta.flat()[:, size:], start[:, size:])
    options.step(task, state)
    assert not torch.equal(state.theta.flat()[:, :size], start[:, :size])


def test_the_export_encodes_projects_and_goes_on():
    task = problem()
    state = trained(BASE, task)
    net = task.blocks.export(state.theta, 1)
    with torch.no_grad():
        encoded = net[0](task.x)
        output = net(task.x)
    scores = []
    for row in encoded.permute(0, 2, 3, 1).reshape(-1, 5).numpy():
        scores.append(nnls(net[1].basis.numpy(), row)[0])
    scores = torch.tensor(np.stack(scores)).view(20, 3, 3, 3).permute(0, 3, 1, 2)
    assert_close(output, net[2](scores).detach(), atol=1e-4, rtol=1e-3)
    assert_close(task.blocks.forward(state.theta, task.x.expand(2, *task.x.shape))[1], output)


@pytest.mark.parametrize("frozen", [pytest.param(0, marks=pytest.mark.long), 15])
def test_training_reduces_the_loss_of_the_exported_network(frozen):
    task, steps = problem(samples=30), {"blocks": [1e-3, 0.0, 1e-2]}
    options = replace(
        BASE,
        theta_step=steps,
        iterations=120,
        dual_step=0.0,
        forward_mixing=1.0,
        batch_size=15,
        z_step=0.5,
        frozen=frozen,
    )
    start, end = options.init(task, SEEDS), trained(options, task, epochs=120)
    x = task.x.expand(2, *task.x.shape)
    losses = [
        task.loss.value(task.blocks.forward(state.theta, x), task.y.expand(2, -1)).mean(1) for state in (start, end)
    ]
    assert (losses[1] < 0.7 * losses[0]).all()


def test_diagnostics():
    task = problem()
    state = trained(replace(BASE, batch_size=20), task)
    found = replace(BASE, slice_size=20).diagnostics(task, state)
    lagrangian = lagrangian_of(BASE, task, state)
    assert_close(found["lagrangian"], lagrangian.value() / 20)
    product = factorisations(task.blocks, state.theta)[2] @ matrix(state.z[1])
    whole = matrix(state.z[0])
    assert_close(found["residual_2"], ((whole - product).norm(dim=(1, 2)) / whole.norm(dim=(1, 2))))
    assert set(found) == {"lagrangian", "residual_1", "residual_2", "residual_3"}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (["0"], r"an NMF layer must be a block alone, but block 2 is \['1', '2.0', '2.1'\]; cut before and after it"),
        (["1"], r"an NMF layer must be a block alone"),
    ],
)
def test_an_nmf_inside_a_block_is_refused(after, message):
    with pytest.raises(ValueError, match=message):
        BASE.init(problem(after=after), SEEDS)


@pytest.mark.parametrize("after", [(), (nn.Conv2d(3, 3, 1),), (nn.Flatten(), nn.Linear(27, 4), nn.ReLU())])
def test_an_nmf_without_a_linear_layer_after_it_is_refused(after):
    net = nn.Sequential(nn.Conv2d(2, 5, 2), NMF(5, 3), *([nn.Sequential(*after)] if after else []))
    loss, y = FunctionLoss(lambda z, y: z.square()), torch.arange(20)
    with pytest.raises(
        ValueError, match="the NMF layer '1' must be followed by a block that ends with its one linear layer"
    ):
        replace(BASE, beta=1.0).init(problem(net, ["0", "1"] if after else ["0"], loss, y=y), SEEDS)


@pytest.mark.parametrize("key", ["group_size", "warm_rounds", "score_sweeps", "basis_sweeps", "primal_rounds"])
def test_counts_below_one_are_refused(key):
    with pytest.raises(ValueError, match=rf"^{key}: 0 is not a whole number from 1 up"):
        replace(BASE, **{key: 0}).init(problem(), SEEDS)


@pytest.mark.parametrize("weight", [1.0, False])
def test_an_error_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=rf"^error_weight: {weight} is not a number from 0 up and below 1"):
        replace(BASE, error_weight=weight).init(problem(), SEEDS)


def test_freezing_for_all_iterations_is_refused():
    with pytest.raises(ValueError, match=r"^frozen: 5 is not a number from 0 up and below 5"):
        replace(BASE, frozen=5).init(problem(), SEEDS)


def test_another_loss_serves_as_well():
    task = problem(loss=SquaredError(), y=torch.rand(20, 4, dtype=torch.float64))
    state = trained(replace(BASE, group_size=1), task)
    assert torch.isfinite(state.theta.flat()).all()


def test_labels_of_another_form_are_refused_where_samples_come_together():
    task = problem(loss=SquaredError(), y=torch.rand(20, 4))
    with pytest.raises(ValueError, match=r"^group_size: 4 needs class indices as y, not 2 axes"):
        BASE.init(task, SEEDS)


def test_more_than_the_whole_way_is_refused():
    with pytest.raises(ValueError, match=r"^forward_mixing: 3.0 is more than the whole way"):
        replace(BASE, forward_mixing=3.0).init(problem(), SEEDS)


def test_without_a_dual_step_there_are_no_duals():
    task = problem()
    with_zeros, without = replace(BASE, dual_step={"start": 1e-30, "end": 0.0}), replace(BASE, dual_step=0.0)
    states = [trained(options, task) for options in (with_zeros, without)]
    assert len(states[0].u) == 3 and states[1].u == []
    assert_close(states[0].theta.flat(), states[1].theta.flat())
    assert_close(states[0].z[1], states[1].z[1])


def test_each_block_has_its_own_step():
    task = problem()
    options = replace(BASE, theta_step={"blocks": [0.0, 0.0, 1e-2]})
    state = options.init(task, SEEDS)
    start = state.theta.flat().clone()
    options.step(task, state)
    size = sum(p.numel() for p in task.blocks.network[0].parameters())
    assert torch.equal(state.theta.flat()[:, :size], start[:, :size])
    assert not torch.equal(state.theta.flat()[:, size:], start[:, size:])


def test_the_first_step_of_a_block_that_was_frozen_is_adam_s_first():
    task = problem()
    options = replace(BASE, frozen=3, batch_size=20, theta_step=1e-3)
    state = options.init(task, SEEDS)
    size = sum(p.numel() for p in task.blocks.network[0].parameters())
    for _ in range(3):
        options.step(task, state)
    before = state.theta.flat()[:, :size].clone()
    options.step(task, state)
    assert (state.theta.flat()[:, :size] - before).abs().max() <= 1e-3 * (1 + 1e-6)


def test_averaged_parameters_are_the_average_of_those_after_each_step():
    task, rule = problem(two_factorisations(), [str(k) for k in range(6)]), Averaged(Adam(), 0.5)
    options = replace(BASE, beta=1.0, batch_size=20, theta_update=rule)
    state = options.init(task, SEEDS)
    first, second, third = (options.step(task, state).theta.flat().clone() for _ in range(3))
    average = rule.average(task, state)
    assert_close(average.flat(), (first + second) / 4 + third / 2, rtol=1e-13, atol=1e-15)
    assert torch.equal(average.buffers, state.theta.buffers)  # the bases
    assert torch.equal(state.theta.flat(), third)


def test_a_seed_that_diverges_leaves_the_others_alone():
    task = problem()
    options = replace(BASE, theta_step=[0.01, 1e300])
    both, alone = trained(options, task, epochs=3), trained(replace(BASE, theta_step=0.01), task, SEEDS[:1], epochs=3)
    assert_close(both.theta.flat()[0], alone.theta.flat()[0])
    outputs = task.blocks.forward(both.theta, task.x.expand(2, *task.x.shape))
    assert torch.isfinite(outputs[0]).all() and not torch.isfinite(outputs[1]).all()
