"""Why DeepFacto's loss rises as the backbone moves: python -m scripts.benchmarks.deepfacto_terms [--faces 4]

The backbone Θ_1 is in one term of Eq. 9. After the update of Z_1 to its minimiser, and without duals, the gradient of
that term by the features f = block_1(x) is, with c = β_1 γ/(β_1 + γ),

    c (f − M S) = c (f − M S_0) + c M (S_0 − S),

where S_0 is the projection of f on M, from which a visit begins, and S is what the visit makes of it. The first part is
the gradient of c/2 ‖f − M S_0‖², the error of the reconstruction, and knows nothing of the loss. The second part is all
that the backbone hears of the loss. "Through" is the gradient of the loss itself, which passes through the projection
by implicit differentiation. A step against a gradient at more than 90° to it raises the loss.

Without --faces the data are generated, and the optimum is known: of two features the network is to tell the smaller
one by one factor. J and all of Eq. 9 are 0 if the backbone passes that feature alone. With --faces it is
`experiment=lfw_proxy` with so many factors, trained on the training people without those held out.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from admm.blocks import flattened, split
from admm.losses import SquaredError
from admm.minibatches import minibatches
from admm.nmf import NMF, feature_maps, matrix
from admm.optimizers import DeepFacto, Problem
from admm.optimizers.coupling import Hyperparameters, ZState, gather, penalties, scatter
from admm.optimizers.deepfacto import (
    DeepFactoState,
    FactorisedLagrangian,
    FactorisedZUpdate,
    Factors,
    factorisations,
    update_blocks,
)
from admm.visits import Visit
from experiments.device import find_device
from experiments.jobs import options_of
from experiments.rows import CONF
from experiments.tasks.deepfacto import Features, build_problem, load

PARTS = ("both", "reconstruction", "loss", "through")  # "both" is DeepFacto's own
BATCHES = 4  # mini-batches that gradients and losses are measured on


def toy(samples: int = 256) -> tuple[DeepFacto, Problem]:
    """Return DeepFacto, and a problem of rank 1 whose optimum is 0: of two features, y is the smaller."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 2, generator=random, dtype=torch.float64) + torch.tensor([1.0, 0.0])
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), NMF(2, 1), nn.Linear(1, 1))

    def initialise(network: nn.Module) -> None:
        nn.init.eye_(network.get_parameter("0.0.weight"))
        for layer in (network.get_submodule("1"), network.get_submodule("2")):
            layer.reset_parameters()  # type: ignore[operator]

    problem = Problem(x, x[:, 1:], split(network, after=["0", "1"]), SquaredError(), initialise)
    return DeepFacto(300, {"blocks": [3e-3, 0.0, 1e-2]}, batch_size=64, group_size=1, frozen=100), problem


def faces(rank: int) -> tuple[DeepFacto, Problem]:
    """Return DeepFacto and the problem of `experiment=lfw_proxy`, with 3,000 faces of training people held out."""
    choices = ["experiment=lfw_proxy", f"row=lfw_proxy/deepfacto-rank{rank}", "dataset.holdout=3000"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", choices)
    dataset = load(config.backbone, **options_of(config.dataset), device=find_device("cpu"), dtype=torch.float32)
    options = replace(instantiate(config.optimizer, _convert_="all"), error_weight=None)  # Eq. 9 as it is
    return options, build_problem(config, Features(config, dataset))


def theta_steps(options: DeepFacto) -> list[float]:
    """Return η_1, η_2 and η_3."""
    assert isinstance(options.theta_step, Mapping)
    return list(options.theta_step["blocks"])


# --- gradients


def lagrangian_of(options: DeepFacto, problem: Problem, state: DeepFactoState, batch: Tensor) -> FactorisedLagrangian:
    """Return Eq. 9 without duals for samples with indices `batch` [R, n], at the values of a forward pass."""
    beta = penalties(options.beta, len(state.z), len(state.seeds), like=problem.like)
    factors, visit = factorisations(problem.blocks, state.theta), problem.visit(state.seeds, batch)
    return at_forward(problem, state, factors, beta, visit, batch)


def at_forward(
    problem: Problem, state: DeepFactoState, factors: Factors, beta: Tensor, visit: Visit, batch: Tensor
) -> FactorisedLagrangian:
    """Return Eq. 9 without duals for a visit of the samples `batch`, at the values of a forward pass."""
    (z,) = gather(problem, batch, [state.z])
    lagrangian = FactorisedLagrangian(problem, state.theta, factors, beta, visit, z, [])
    lagrangian.mix_with_forward(1.0)
    return lagrangian


def by_features(options: DeepFacto, lagrangian: FactorisedLagrangian, z_steps: Sequence[Any]) -> dict[str, Tensor]:
    """Update Z and S from their values in a forward pass, and return the gradients by f, [R, n, C, ...] each.

    "both" trains the backbone, and is the sum of its parts "reconstruction" and "loss"; "through" is that of J itself.
    """
    features, projected = lagrangian.output(1), lagrangian.product(2)
    through = through_projection(lagrangian)
    FactorisedZUpdate("gradient", score_sweeps=options.score_sweeps).step(lagrangian, ZState(), z_steps)
    beta, gamma = lagrangian.beta[:2]
    weight = (beta * gamma / (beta + gamma)).view(-1, *[1] * (features.ndim - 1))
    return {
        "both": -lagrangian.coupling_gradient(1),
        "reconstruction": weight * (features - projected),
        "loss": weight * (projected - lagrangian.product(2)),
        "through": through,
    }


def through_projection(lagrangian: FactorisedLagrangian) -> Tensor:
    """Return the gradient by f of J after a forward pass, where S is the projection of f on M.

    Scores A of a column that are not 0 have dS_A = (M_Aᵀ M_A)⁻¹ M_Aᵀ df; the others stay 0.
    """
    basis, z = lagrangian.factors[2], lagrangian.z
    by_scores = lagrangian.vjp(3, lagrangian.loss.gradient(z[2], lagrangian.visit.y))
    assert by_scores is not None
    active = (matrix(z[1]) > 0).to(basis).mT.unsqueeze(3)  # [R, m, r, 1]
    gram = active * (basis.mT @ basis).unsqueeze(1) * active.mT + torch.diag_embed(1.0 - active.squeeze(3))
    solved = torch.linalg.solve(gram, active * matrix(by_scores).mT.unsqueeze(3)).squeeze(3).mT
    return feature_maps(basis @ solved, like=z[0])


def by_backbone(lagrangian: FactorisedLagrangian, gradient: Tensor) -> Tensor:
    """Return the gradient by Θ_1 of the first replica, [P], for that by f."""
    place = lagrangian.blocks.gradient()
    lagrangian.vjp(1, gradient, grad_params=place)
    return flattened(lagrangian.blocks.total(place, [0]))[0].double()


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two vectors in degrees."""
    return float(torch.rad2deg(torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1.0, 1.0))))


# --- measurements


def batches(options: DeepFacto, problem: Problem) -> list[Tensor]:
    """Return the mini-batches to measure on, the same at each call."""
    groups, size = (None, 1) if options.group_size == 1 else (problem.y, options.group_size)
    drawn = minibatches(problem.n_samples, options.batch_size, [999], 0, problem.device, groups=groups, group_size=size)
    return drawn[:BATCHES]


def forward_loss(options: DeepFacto, problem: Problem, state: DeepFactoState) -> float:
    """Return J per sample after a forward pass."""
    lagrangians = (lagrangian_of(options, problem, state, batch) for batch in batches(options, problem))
    return float(torch.cat([problem.loss.value(found.z[2], found.visit.y).flatten() for found in lagrangians]).mean())


def measured(options: DeepFacto, problem: Problem, state: DeepFactoState) -> dict[str, float]:
    """Return terms per sample after a forward pass, and norms and angles of the gradients by the backbone."""
    total = dict.fromkeys(PARTS, torch.zeros(1, dtype=torch.float64))
    error = size = 0.0
    drawn = batches(options, problem)
    for batch in drawn:
        lagrangian = lagrangian_of(options, problem, state, batch)
        error += float(lagrangian.coupling_value(2))
        size += float(lagrangian.beta[1] / 2 * lagrangian.z[0].square().sum())
        for name, gradient in by_features(options, lagrangian, [options.z_step] * 3).items():
            total[name] = total[name] + by_backbone(lagrangian, gradient)
    samples = sum(batch.shape[1] for batch in drawn)
    return {
        "loss J": forward_loss(options, problem, state),
        "γ/2 ‖f − M S_0‖²": error / samples,
        "‖f − M S_0‖/‖f‖": (error / size) ** 0.5,
        **{f"gradient: {name}": float(total[name].norm()) / samples for name in PARTS},
        **{f"angle to through: {name}": angle(total[name], total["through"]) for name in PARTS[:3]},
    }


def effects(options: DeepFacto, problem: Problem, state: DeepFactoState) -> dict[str, tuple[float, float]]:
    """Return by how much each update changes Eq. 9 and J after a forward pass, per sample of a mini-batch.

    M is updated for all samples, and so are the values of Eq. 9 before and after.
    """
    state, batch = copy.deepcopy(state), batches(options, problem)[0]
    lagrangian = lagrangian_of(options, problem, state, batch)
    z_update, steps = FactorisedZUpdate("gradient", score_sweeps=options.score_sweeps), theta_steps(options)

    def z(t: int) -> None:
        z_update.update_z(lagrangian, ZState(), t, float(options.z_step))  # type: ignore[arg-type]

    def theta(t: int) -> None:
        update_blocks(lagrangian, options.theta_update, state.moments, [t], steps)

    updates = {"Z_3": partial(z, 3), "S": partial(z, 2), "Z_1": partial(z, 1)}
    updates |= {"Θ_3": partial(theta, 3), "Θ_1": partial(theta, 1)}
    changes = {}
    value, loss = float(lagrangian.value()) / batch.shape[1], forward_loss(options, problem, state)
    for name, update in updates.items():
        update()
        before, value, loss_before = value, float(lagrangian.value()) / batch.shape[1], loss
        loss = forward_loss(options, problem, state)
        changes[name] = value - before, loss - loss_before
    before = float(options.diagnostics(problem, state)["lagrangian"])
    options._update_basis(problem, state, 2, lagrangian.factors[2])
    value = float(options.diagnostics(problem, state)["lagrangian"])
    return changes | {"M": (value - before, forward_loss(options, problem, state) - loss)}


@dataclass(frozen=True)
class Following(DeepFacto):
    """DeepFacto without duals, whose backbone follows `part` of its gradient, one of `PARTS`."""

    part: str = "both"

    def visit(
        self,
        problem: Problem,
        state: DeepFactoState,
        factors: Factors,
        beta: Tensor,
        visit: Visit,
        rounds: list[Hyperparameters],
        batch: Tensor,
        trained: Sequence[int],
    ) -> None:
        """Update Z and S, and Θ of the blocks in `trained`, of a mini-batch, in place."""
        lagrangian = at_forward(problem, state, factors, beta, visit, batch)
        gradient = by_features(self, lagrangian, rounds[0].z_steps)[self.part]
        weight = lagrangian.beta[0].view(-1, *[1] * (gradient.ndim - 1))
        lagrangian.set_z(1, lagrangian.output(1) - gradient / weight)  # whose coupling term has this gradient by f
        update_blocks(lagrangian, self.theta_update, state.moments, trained, rounds[0].theta_steps)
        scatter(batch, state.z, lagrangian.z)


def trained(options: DeepFacto, problem: Problem, state: DeepFactoState) -> DeepFactoState:
    """Return a copy of a state after the iterations that are left."""
    state = copy.deepcopy(state)
    while state.iteration < options.iterations:
        options.step(problem, state)
    return state


def as_printed(options: DeepFacto, problem: Problem) -> dict[str, list[float]]:
    """Return what becomes of Eq. 9 as printed, with duals, and Z and S that persist: one column per iteration."""
    options = replace(options, dual_step=1.0, forward_mixing=0.0)
    state, rows = options.init(problem, [0]), list[list[float]]()
    while state.iteration < options.iterations:
        options.step(problem, state)
        sizes = [float(u.norm() / state.z[0].norm()) for u in state.u[:2]]
        value = float(options.diagnostics(problem, state)["lagrangian"])
        rows.append([state.iteration, forward_loss(options, problem, state), value, *sizes])
    every = max(1, len(rows) // 8)
    names = ("iteration", "loss J", "Eq. 9", "‖U_1‖/‖Z_1‖", "‖V‖/‖Z_1‖")
    return {name: list(row) for name, row in zip(names, zip(*rows[every - 1 :: every], strict=True), strict=True)}


def show(title: str, names: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Print a table with a name for each row."""
    width = max(map(len, rows)) + 1
    print(f"{title}\n{'':{width}s}" + "".join(f"{name:>16s}" for name in names))
    for name, values in rows.items():
        print(f"{name:{width}s}" + "".join(f"{value:16.4g}" for value in values))
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, metavar="RANK", help="LFW's faces with so many factors: 4, 32 or 256")
    given = parser.parse_args()
    options, problem = faces(given.faces) if given.faces else toy()
    start = options.init(problem, [0])
    while start.iteration < options.frozen:
        options.step(problem, start)
    show("What each update changes", ["Eq. 9", "loss J"], effects(options, problem, start))
    steps = theta_steps(options)
    fixed = replace(options, theta_step={"blocks": [0.0, *steps[1:]]})
    ends = {"at the start": start, "fixed": trained(fixed, problem, start)}
    ends |= {part: trained(Following(**vars(options), part=part), problem, start) for part in PARTS}
    columns = [measured(options, problem, state) for state in ends.values()]
    show("By what the backbone follows", list(ends), {name: [c[name] for c in columns] for name in columns[0]})
    printed = as_printed(options, problem)
    show("As printed", [""] * len(printed["iteration"]), printed)


if __name__ == "__main__":
    main()
