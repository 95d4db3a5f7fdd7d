"""dlADMM (Wang et al. 2019): ADMM for deep learning with one dual variable and line searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from admm.blocks import Parameters
from admm.checks import at_least_one
from admm.losses import CrossEntropy, Loss, SquaredError, unweighted
from admm.minibatches import expand, slices
from admm.numbers import Options
from admm.optimizers.checks import same_samples
from admm.optimizers.fully_connected import (
    Start,
    check_initial_names,
    forward,
    linear_layers,
    pre_activation,
    relu_prox_,
    sample_initial_values,
    set_initial_values,
    squared_norm,
)
from admm.optimizers.least_squares import Scratch
from admm.optimizers.protocol import Optimizer, Problem, ShortRepr, whole_seeds
from admm.samples import take
from admm.schedules import Number, positive, replica_values

_BACKWARD, _FORWARD = 0, 1  # the two sweeps of an iteration
_SLICE = 1000  # samples that are visited at a time: their temporaries stay in the CPU's cache


@dataclass(repr=False)
class DLADMMState(ShortRepr):
    """dlADMM's variables for L layers, N samples, S replicas.

    Attributes:
        seeds, iteration: see `admm.optimizers.protocol.State`.
        theta: parameters [S, P], with W_l [S, d_l, d_{l−1}] and b_l [S, d_l].
        z: pre-activations Z_1..Z_L, [S, N, d_l].
        a: activations A_1..A_{L−1}, [S, N, d_l].
        u: one tensor, the dual of the last layer, [S, N, C], unscaled.
        error: E_l = A_{l−1} W_lᵀ + b_l − Z_l (− u/ρ for l = L), so that φ_l = ρ/2 ‖E_l‖². Each update corrects it by
            the product that its line search needs; those of layers 1 and L are evaluated again in every iteration.
        gram: [XᵀX], [1, d_0, d_0].
        rho, theta_start, tau_start: [S], the penalty and where the line searches start.
        cost: [S], the training cost.
        rises: [S], how many times in a row it has risen.
        accepted_theta, accepted_tau: of W_1..W_L and A_1..A_{L−1}, [S, 2] each: the backward and the forward sweep's.
    """

    of_samples = ("z", "a", "u", "error")

    seeds: tuple[int, ...]
    iteration: int
    theta: Parameters
    z: list[Tensor]
    a: list[Tensor]
    u: list[Tensor]
    error: list[Tensor]
    gram: list[Tensor]
    rho: Tensor
    theta_start: Tensor
    tau_start: Tensor
    cost: Tensor
    rises: Tensor
    accepted_theta: list[Tensor]
    accepted_tau: list[Tensor]


@dataclass(frozen=True)
class DLADMM(Options, Optimizer[DLADMMState]):
    """dlADMM: a backward sweep, in the order Z_l, b_l, W_l, A_{l−1}, a forward one, W_l, b_l, Z_l, A_l, and the dual.

    It is for fully connected ReLU networks with biases, and the problem

        min J(Z_L, Y) + Σ_l φ_l + ρ/2 Σ_{l<L} ‖A_l − relu(Z_l)‖², φ_l = ρ/2 ‖Z_l − A_{l−1} W_lᵀ − b_l + u_l/ρ‖²

    with u_l = 0 for l < L and J summed over the samples. Where the paper leaves something open, the authors' program
    decides.

    W_l and A_l take one gradient step of 1/θ and 1/τ, where θ and τ double from their start until the quadratic model
    bounds the objective from above. The objective is quadratic, so that a trial is a comparison of two numbers: with
    G = ∇φ(W), φ(W − G/θ) = φ(W) − ‖G‖²/θ + ρ‖A Gᵀ‖²/(2θ²) and the model φ(W) − ‖G‖²/θ + ‖G‖²/(2θ); it is accepted
    when ρ‖A Gᵀ‖²/‖G‖² ≤ θ. For A_l likewise when ρ(‖G Wᵀ‖²/‖G‖² + 1) ≤ τ, with W = W_{l+1}. A search that evaluates
    both sides rounds them by about ε φ. It can decide otherwise only in a tie, |q − θ| ‖G‖²/(2θ²) ≤ c ε φ, where q is
    the left side above; this one decides by q ≤ θ, to within the rounding of q.

    Z_L is FISTA's on J + φ_L: it stops before a step when the objective has changed by less than `fista_tolerance`, and
    returns the extrapolated point, as the authors' program does.

    In float64 the iterates are those of the authors' program, but not in float32. FISTA's objective is summed in
    float64 here and in float32 there, so that it stops at another step: in the first iteration on 55,000 digits after
    280 steps instead of 287, and Z_L differs by 1e-3. Their searches, rounded as above, double once or twice more at
    times, by which A_1 and W_1 differ by at most 1e-5.

    The training cost is the mean loss of a plain forward pass at the end of an iteration. When it has risen
    `rises` times in a row, ρ becomes min(rho_factor ρ, rho_max) and, where the widest hidden layer has at least `wide`
    units, the line searches start at start_factor times their start.

    Args:
        rho: ρ > 0 at the start, a number or one per replica, as all numbers below but those said to be whole.
        theta: where the line search for the curvature θ of W_l starts.
        tau: where the line search for the curvature τ of A_l starts.
        deviation: W, b ~ N(0, deviation²) at the start.
        rises: a whole number.
        rho_factor, rho_max, start_factor: see above.
        wide: a whole number.
        fista_steps: the most steps of FISTA, a whole number.
        fista_tolerance: see above.
        fista_curvature: the inverse of FISTA's step. None stands for 1/4 times the scale of the cross-entropy, as the
            authors have it, with weights of classes for its largest second derivative, and for the scale of the squared
            error, of which the first step is then exact.

    References:
        Wang, Yu, Chen & Zhao, "ADMM for efficient deep learning with global convergence", KDD 2019, Algorithm 1,
        https://arxiv.org/abs/1905.13611

    >>> from admm.blocks import split
    >>> from admm.losses import SquaredError
    >>> from admm.models import initialiser, mlp
    >>> from admm.training import evaluate
    >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    >>> blocks = split(mlp(1, hidden=[8], classes=1), per_layer=True)
    >>> problem = Problem(x, x.abs(), blocks, SquaredError(), initialiser("normal", std=0.5))
    >>> optimizer = DLADMM(rho=1e-2, theta=1e-3, tau=1e-3)
    >>> state = optimizer.init(problem, seeds=[0])
    >>> loss = evaluate(problem, state.theta, test=None)["train_loss"]
    >>> for _ in range(10):
    ...     state = optimizer.step(problem, state)
    >>> bool(evaluate(problem, state.theta, test=None)["train_loss"] < loss)
    True
    """

    parallel = ("samples",)

    rho: Number = 1e-6
    theta: Number = 1.0
    tau: Number = 1.0
    deviation: Number = 0.1
    rises: int = 3
    rho_factor: Number = 10.0
    rho_max: Number = 0.1
    start_factor: Number = 10.0
    wide: int = 100
    fista_steps: int = 500
    fista_tolerance: Number = 1e-3
    fista_curvature: Number | None = None

    def init(self, problem: Problem, seeds: Sequence[int], start: Start | None = None) -> DLADMMState:
        """Return W and b normal, Z and A by a forward pass, Z_L = +1 for the true class and −1 elsewhere, and u = 0.

        For targets that are no numbers [N, C] nor classes, such as a plain function may take, Z_L is by a forward pass.
        Every W_l and b_l is drawn independently. The authors' program seeds its generator anew before each draw, so
        that the weights of all layers begin with the same numbers, and the biases repeat them.

        Args:
            problem: what is trained on.
            seeds: one per replica.
            start: initial values in place of these: any of `weight`, `bias` (L tensors each), `z` (L), `a` (L − 1) and
                `u` (1), shaped as in the state.

        Raises:
            ValueError: for another network than Linear, ReLU, …, Linear with biases, for a loss whose FISTA step is not
                known or would diverge, and for hyperparameters that are not positive.
        """
        seeds = whole_seeds(seeds)
        check_initial_names(start, ("weight", "bias", "z", "a", "u"))
        self._check(problem.loss, len(seeds))
        theta = problem.initial(seeds)
        layers = linear_layers(problem, theta, "DLADMM")
        deviation = replica_values("deviation", self.deviation, len(seeds))
        for name in ("weight", "bias"):
            sample_initial_values(name, [layer[name] for layer in layers], seeds, deviation, "normal")
        set_initial_values("weight", [layer["weight"] for layer in layers], start)
        set_initial_values("bias", [layer["bias"] for layer in layers], start)

        inputs, targets = problem.whole("DLADMM")
        x = inputs.flatten(1)
        z = [x.new_empty(len(seeds), len(x), layer["weight"].shape[1]) for layer in layers]
        a = [torch.empty_like(z_l) for z_l in z[:-1]]
        forward(layers, x, z, a, _SLICE)
        loss, y, _ = unweighted(problem.loss, targets)
        if isinstance(loss, CrossEntropy) and not y.is_floating_point():
            y = y.unsqueeze(1) == torch.arange(z[-1].shape[2], device=y.device)
        if isinstance(y, Tensor) and y.shape == z[-1].shape[1:]:
            z[-1].copy_(torch.where(y == 0, -1.0, 1.0))
        u = [torch.zeros_like(z[-1])]
        for name, variables in (("z", z), ("a", a), ("u", u)):
            set_initial_values(name, variables, start)

        gram = (x.T @ x)[None]
        problem.parallel.add_up(gram)
        rho, theta_start, tau_start = (self._number(name, z[0]) for name in ("rho", "theta", "tau"))
        state = DLADMMState(
            seeds=seeds,
            iteration=0,
            theta=theta,
            z=z,
            a=a,
            u=u,
            error=[torch.empty_like(v) for v in z],
            gram=[gram],
            rho=rho,
            theta_start=theta_start,
            tau_start=tau_start,
            cost=torch.full_like(rho, math.inf),
            rises=torch.zeros_like(rho),
            accepted_theta=[theta_start[:, None].repeat(1, 2) for _ in z],
            accepted_tau=[tau_start[:, None].repeat(1, 2) for _ in a],
        )
        sweep = _Sweep(self, problem, state)
        for layer in range(1, len(z) + 1):
            sweep.evaluate_error(layer)
        sweep.add_dual_to_error()
        return state

    def step(self, problem: Problem, state: DLADMMState) -> DLADMMState:
        """Do one iteration of Algorithm 1, and change ρ, θ and τ by their schedule."""
        same_samples(problem, state.z[0])
        sweep, last = _Sweep(self, problem, state), len(state.z)
        for layer in range(last, 0, -1):
            sweep.update_z(layer)
            sweep.update_b(layer)
            sweep.update_w(layer, _BACKWARD)
            if layer > 1:
                sweep.update_a(layer - 1, _BACKWARD)
        for layer in range(1, last + 1):
            sweep.update_w(layer, _FORWARD)
            sweep.update_b(layer)
            sweep.update_z(layer)
            if layer < last:
                sweep.update_a(layer, _FORWARD)
        sweep.update_u()
        self._schedule(state, sweep.training_cost())
        sweep.add_dual_to_error()
        state.iteration += 1
        return state

    def diagnostics(self, problem: Problem, state: DLADMMState) -> dict[str, Tensor]:
        """Return `residual_l` = ‖Z_l − A_{l−1} W_lᵀ − b_l‖/‖Z_l‖, where the last constraint is the one with a dual;
        `theta_l` and `tau_l`, accepted in the last forward sweep; and `rho`."""
        same_samples(problem, state.z[0])
        values = {"rho": state.rho.clone()}
        layers = linear_layers(problem, state.theta, "DLADMM")
        for number, (z, error) in enumerate(zip(state.z, state.error, strict=True), start=1):
            if number == len(state.z):  # its error contains the dual
                layer_input = state.a[-1] if state.a else problem.whole("DLADMM")[0].flatten(1).expand(len(z), -1, -1)
                error = pre_activation(layers[-1], layer_input) - z
            squares = _square(error), _square(z)
            problem.parallel.add_up(*squares)
            values[f"residual_{number}"] = (squares[0] / squares[1]).sqrt()
        for name, accepted in (("theta", state.accepted_theta), ("tau", state.accepted_tau)):
            for number, curvature in enumerate(accepted, start=1):
                values[f"{name}_{number}"] = curvature[:, _FORWARD].clone()
        return values

    def curvature(self, loss: Loss) -> Number:
        """Return FISTA's L, the inverse of its step. Raises ValueError where it is not known."""
        if self.fista_curvature is not None:
            return self.fista_curvature
        if isinstance(loss, CrossEntropy):
            return 0.25 * loss.scale if loss.weight is None else 0.5 * loss.scale * loss.largest_mass
        if isinstance(loss, SquaredError):
            return loss.scale
        raise ValueError(
            f"fista_curvature: None is for CrossEntropy and SquaredError; give a number for "
            f"{type(loss).__name__}, the largest second derivative"
        )

    def _check(self, loss: Loss, replicas: int) -> None:
        for name in ("rises", "wide", "fista_steps"):
            at_least_one(name, getattr(self, name))
        replica_values("fista_tolerance", self.fista_tolerance, replicas)
        curvature = positive("fista_curvature", self.curvature(loss), replicas)
        if isinstance(loss, SquaredError) and not bool((curvature >= loss.scale).all()):
            raise ValueError(
                f"fista_curvature: {self.fista_curvature} is below {loss.scale}, the scale of SquaredError, "
                "where FISTA diverges; use None"
            )
        for name in ("rho", "theta", "tau", "rho_factor", "rho_max", "start_factor"):
            positive(name, getattr(self, name), replicas)

    def _number(self, name: str, like: Tensor) -> Tensor:
        """Return a hyperparameter [S]."""
        return replica_values(name, getattr(self, name), len(like)).to(like)

    def _schedule(self, state: DLADMMState, cost: Tensor) -> None:
        """Raise ρ and where the line searches start, in replicas whose cost has risen too often."""
        state.rises.copy_(torch.where(cost > state.cost, state.rises + 1.0, 0.0))
        state.cost.copy_(cost)
        rise = state.rises >= self.rises
        raised = torch.minimum(self._number("rho_factor", cost) * state.rho, self._number("rho_max", cost))
        state.rho.copy_(torch.where(rise, raised, state.rho))
        if max((a.shape[2] for a in state.a), default=0) >= self.wide:
            factor = torch.where(rise, self._number("start_factor", cost), 1.0)
            state.theta_start *= factor
            state.tau_start *= factor


class _Sweep:
    """One iteration of `DLADMM` on a state; layers are numbered l = 1..L, lists start at 0."""

    def __init__(self, options: DLADMM, problem: Problem, state: DLADMMState) -> None:
        self.options, self.problem, self.state = options, problem, state
        self.layers = linear_layers(problem, state.theta, "DLADMM")
        x, self.y = problem.whole("DLADMM")
        self.x = x.flatten(1).expand(len(state.seeds), -1, -1)  # not copied
        self.rho = _column(state.rho)
        self.slices = list(slices(self.x.shape[1], _SLICE))
        self.scratch = Scratch(self.x)
        self._error_w: dict[int, Tensor] = {}  # E_{l+1} W_{l+1}, from the backward to the forward update of A_l
        self._first_gradient = torch.empty(0)  # of φ_1, from one update of W_1 to the next

    def update_w(self, layer: int, sweep: int) -> None:
        """Take one step of 1/θ for W_l; G here is ∇φ/ρ = Eᵀ A."""
        weight, error = self.layers[layer - 1]["weight"], self.state.error[layer - 1]
        layer_input = self._layer_input(layer)
        if layer == 1:
            # G and ‖X Gᵀ‖² = ⟨G XᵀX, G⟩ of both sweeps by one pass over the data: nothing else moves in between.
            gradient = self._gradient(error, layer_input) if sweep == _BACKWARD else self._first_gradient
            image = torch.bmm(gradient, self.state.gram[0].expand(len(gradient), -1, -1))
            square = (image.flatten(1) * gradient.flatten(1)).sum(1)
        else:
            gradient = self._gradient(error, layer_input)
            image = self.scratch.take("image", error.shape)
            square = self._product_square(layer_input, gradient, image)
        theta = _doubled(self.state.theta_start, self.state.rho * square / _square(gradient))
        self.state.accepted_theta[layer - 1][:, sweep] = theta
        step = _column(self.state.rho / theta).neg_()
        weight.addcmul_(gradient, step)
        if layer > 1:
            error.addcmul_(image, step)  # by linearity
        elif sweep == _BACKWARD:
            self._first_gradient = gradient.addcmul_(image, step)
        else:
            self.evaluate_error(1)
            if len(self.state.z) == 1:
                self.add_dual_to_error()

    def _gradient(self, error: Tensor, layer_input: Tensor) -> Tensor:
        """Return Eᵀ A, summed over all samples."""
        gradient = torch.bmm(error.mT, layer_input)
        self.problem.parallel.add_up(gradient)
        return gradient

    def update_a(self, layer: int, sweep: int) -> None:
        """Take one step of 1/τ for A_l on φ_{l+1} + ρ/2 ‖A_l − relu(Z_l)‖²; G here is the gradient over ρ."""
        a, z, error = self.state.a[layer - 1], self.state.z[layer - 1], self.state.error[layer]
        weight, is_backward = self.layers[layer]["weight"], sweep == _BACKWARD
        narrows = weight.shape[1] < weight.shape[2]
        gradient = self.scratch.take("gradient", a.shape)
        image = self.scratch.take("image", (error if narrows else a).shape)
        known = self._error_w.pop(layer, None)  # E_{l+1} W
        if is_backward and not narrows:
            gram = torch.bmm(weight.mT, weight)
            self._error_w[layer] = torch.empty_like(a)
        gradient_square, square = torch.zeros_like(self.state.rho), torch.zeros_like(self.state.rho)
        for part in self.slices:
            error_w = torch.bmm(error[:, part], weight) if known is None else known[:, part]
            g = torch.add(error_w, a[:, part], out=gradient[:, part]).sub_(z[:, part].relu())
            gradient_square += _square(g)
            if narrows:
                square += _square(torch.bmm(g, weight.mT, out=image[:, part]))
            elif is_backward:
                # G WᵀW gives ‖G Wᵀ‖² too, and corrects E_{l+1} W, in which nothing else moves before the forward sweep.
                square += torch.linalg.vecdot(g.flatten(1), torch.bmm(g, gram, out=image[:, part]).flatten(1))
                self._error_w[layer][:, part] = error_w
        self.problem.parallel.add_up(gradient_square, square)
        if not (narrows or is_backward):
            square = self._square_of_image(gradient, gradient_square, weight)
        tau = _doubled(self.state.tau_start, self.state.rho * (square / gradient_square + 1.0))
        self.state.accepted_tau[layer - 1][:, sweep] = tau
        step = _column(self.state.rho / tau).neg_()
        a.addcmul_(gradient, step)
        if narrows:
            error.addcmul_(image, step)  # by linearity
        elif is_backward:
            self._error_w[layer].addcmul_(image, step)
        else:
            self.evaluate_error(layer + 1)
            if layer + 1 == len(self.state.z):
                self.add_dual_to_error()

    def _square_of_image(self, gradient: Tensor, gradient_square: Tensor, weight: Tensor) -> Tensor:
        """Return ‖G Wᵀ‖², or its bound ‖G‖² ‖W‖², which needs no pass over the data, where that accepts the first τ."""
        bound = _square(weight)
        accepts = self.state.rho * (bound + 1.0) <= self.state.tau_start
        bound *= gradient_square
        return bound if accepts.all() else torch.where(accepts, bound, self._product_square(gradient, weight))

    def _product_square(self, samples: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ‖A Wᵀ‖², [S], for the samples A [S, N, d]; `out` gets the product."""
        square = torch.zeros_like(self.state.rho)
        for part in self.slices:
            square += _square(torch.bmm(samples[:, part], weight.mT, out=None if out is None else out[:, part]))
        self.problem.parallel.add_up(square)
        return square

    def update_b(self, layer: int) -> None:
        """Set b_l to b_l − (mean over the samples of ∇φ)/ρ."""
        error = self.state.error[layer - 1]
        mean = error.mean(1).mul_(self.problem.n_held / self.problem.n_samples)
        self.problem.parallel.add_up(mean)
        self.layers[layer - 1]["bias"].sub_(mean)
        error.sub_(mean.unsqueeze(1))

    def update_z(self, layer: int) -> None:
        """Set Z_l to the minimiser of φ_l + ρ/2 ‖A_l − relu(Z_l)‖², or for the last layer to FISTA's point."""
        if layer == len(self.state.z):
            z, target = self.state.z[-1], self.state.error[-1].add_(self.state.z[-1])  # A_{L−1} W_Lᵀ + b_L − u/ρ
            z.copy_(self._fista(z, target))
            target.sub_(z)
            return
        for part in self.slices:
            z, target, a = (variable[layer - 1][:, part] for variable in (self.state.z, self.state.error, self.state.a))
            target.add_(z)  # A_{l−1} W_lᵀ + b_l
            z.copy_(target)
            relu_prox_(z, a, 1.0, *(self.scratch.take(name, a.shape) for name in ("positive", "is positive")))
            target.sub_(z)

    def update_u(self) -> None:
        """Set u to u + ρ (Z_L − A_{L−1} W_Lᵀ − b_L); leave the last error without its dual."""
        self.evaluate_error(len(self.state.z))
        self.state.u[0].sub_(self.rho * self.state.error[-1])

    def evaluate_error(self, layer: int) -> None:
        """Evaluate E_l = A_{l−1} W_lᵀ + b_l − Z_l again."""
        views, layer_input = self.layers[layer - 1], self._layer_input(layer)
        for part in self.slices:
            error = torch.bmm(layer_input[:, part], views["weight"].mT, out=self.state.error[layer - 1][:, part])
            error.add_(views["bias"].unsqueeze(1)).sub_(self.state.z[layer - 1][:, part])

    def add_dual_to_error(self) -> None:
        """Subtract u/ρ from E_L."""
        self.state.error[-1].sub_(self.state.u[0] / self.rho)

    def training_cost(self) -> Tensor:
        """Return the mean loss [S] of a plain forward pass, whose first layer is known: Z_1 + E_1 (without dual)."""
        total = torch.zeros_like(self.state.rho)
        for part in self.slices:
            z = self.state.z[0][:, part] + self.state.error[0][:, part]
            for views in self.layers[1:]:
                z = pre_activation(views, z.relu_())
            total += self.problem.loss.value(z, expand(take(self.y, part), len(z))).sum(1)
        self.problem.parallel.add_up(total)
        return total.div_(self.problem.n_samples)

    def _fista(self, z: Tensor, target: Tensor) -> Tensor:
        """Minimise J(z) + ρ/2 ‖z − target‖², from z. Samples are columns here, for fast sums over the classes."""
        options, loss = self.options, self.problem.loss
        curvature = _column(replica_values("fista_curvature", options.curvature(loss), len(z)).to(z))
        tolerance = replica_values("fista_tolerance", options.fista_tolerance, len(z)).to(z.device)
        y, mass = self.y, None
        if isinstance(loss, CrossEntropy):
            y = loss.distribution(z[0], y)
            mass = None if (y.sum(1) == 1).all() else y.sum(1)
        if isinstance(y, Tensor) and y.ndim == 2:
            y = y.mT.contiguous().mT
        z, target = z.mT.contiguous(), target.mT.contiguous()
        result, proximal, momentum = torch.empty_like(z), z, 1.0
        last_value = torch.full_like(self.state.rho, math.inf, dtype=torch.float64)  # float32 is too coarse
        running = torch.ones_like(last_value, dtype=torch.bool)
        rho_target, total = self.rho * target, self.rho + curvature
        for _ in range(options.fista_steps):
            value, gradient = _value_and_gradient(loss, z, y, mass)
            value += 0.5 * self.state.rho * squared_norm(z - target)
            self.problem.parallel.add_up(value)
            # A replica stops by itself and goes on without effect; one that has diverged stops too.
            stops = running & ~((value - last_value).abs() >= tolerance)
            if stops.any():
                result[stops] = z[stops]
                running &= ~stops
                if not running.any():
                    return result.mT
            last_value, last_proximal, last_momentum = value, proximal, momentum
            momentum = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum**2))
            proximal = (z * curvature).sub_(gradient).add_(rho_target).div_(total)
            z = torch.lerp(proximal, last_proximal, (1.0 - last_momentum) / momentum)
        result[running] = z[running]
        return result.mT

    def _layer_input(self, layer: int) -> Tensor:
        """Return A_{l−1}, where A_0 = X."""
        return self.x if layer == 1 else self.state.a[layer - 2]


def _value_and_gradient(loss: Loss, z: Tensor, y: Any, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return J summed over samples [S], in float64, and its gradient [S, C, N], for z [S, C, N].

    y are the targets of N samples. For the cross-entropy they are its distributions [N, C], with the sums `mass` [N],
    None for ones.
    """
    if isinstance(loss, CrossEntropy):  # both need the same exponentials
        log_p, t = torch.log_softmax(z, 1), y.mT
        value = (log_p * t).sum((1, 2), dtype=torch.float64).mul_(-loss.scale)
        p = log_p.exp_()
        return value, (p if mass is None else p.mul_(mass)).sub_(t).mul_(loss.scale)
    outputs, targets = z.mT, expand(y, len(z))
    return loss.value(outputs, targets).sum(1, dtype=torch.float64), loss.gradient(outputs, targets).mT


def _doubled(start: Tensor, least: Tensor) -> Tensor:
    """Return the first of start, 2 start, 4 start, … that is at least `least`; start for NaN. All are [S]."""
    value = start.clone()
    while (less := least > value).any():
        value = torch.where(less, 2.0 * value, value)
    return value


def _square(value: Tensor) -> Tensor:
    """Return ‖·‖² of each replica, [S], without a copy, in the data's precision, which is enough for a line search."""
    norm: Tensor = torch.linalg.vector_norm(value, dim=(1, 2))
    return norm.square_()


def _column(value: Tensor) -> Tensor:
    """Return a tensor [S] as [S, 1, 1]."""
    return value.view(-1, 1, 1)
