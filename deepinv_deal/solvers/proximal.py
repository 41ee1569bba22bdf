"""
Proximal maps, and the two solvers built on them: proximal gradients and ADMM.

Both are batched, stop every sample on its own rule, and are differentiable if run with
gradients enabled (for unrolling; the models use implicit gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from deepinv_deal._batch import (
    expand,
    in_parts,
    inner,
    joint_norm,
    norm,
    read_counts,
    select,
)
from deepinv_deal.solvers.result import SolverResult, Status

#: Several unknowns of one batch, each ``(B, ...)``.
Blocks = tuple[Tensor, ...]

#: ``step(v, blocks)``: new value of a block from its extrapolation ``v`` and the
#: current value of all blocks.
BlockStep = Callable[[Tensor, Blocks], Tensor]

#: ``step(blocks, previous, w)``: new value of all blocks from ``blocks + w (blocks -
#: previous)``, w per sample, and whether they turned against that momentum:
#: :math:`\langle v - x^{new}, x^{new} - x \rangle`, ``(B,)``.
JointStep = Callable[[Blocks, Blocks, Tensor], tuple[Blocks, Tensor]]

#: ``callback(k, before, after)`` after iteration ``k = 0, 1, ...``
StateCallback = Callable[[int, Any, Any], None]

Inertia = Literal["none", "fista", "palm"]


# -- proximal maps -------------------------------------------------------------


def project_linf(x: Tensor, bound: float | Tensor) -> Tensor:
    r"""
    Projects on :math:`|x_i| \leq b_i`, the dual ball of the weighted l1 norm.

    :param torch.Tensor x: any shape.
    :param float, torch.Tensor bound: :math:`b \geq 0`, broadcastable to ``x``.
    """
    bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    return x.clamp(-bound, bound)


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    r"""
    Returns :math:`\mathrm{sign}(x) \max(|x| - t, 0)`, the proximal map of
    :math:`\sum_i t_i |x_i|`.

    :param torch.Tensor x: any shape.
    :param float, torch.Tensor threshold: :math:`t \geq 0`, broadcastable to ``x``.
    """
    return x - project_linf(x, threshold)  # Moreau's identity


@dataclass(frozen=True)
class LocalProx:
    """
    A proximal map that acts on every entry, or small group of entries, alone.

    Solvers can therefore evaluate it, together with what they do before and after, in
    parts that stay in the cache.

    :param Callable function: ``function(v, *tensors)``; does not modify ``v``. It sees
        what ``evaluate`` gives it: parts ``(B, n)`` by default.
    :param tuple tensors: what else belongs to the entries, shape of ``v``: thresholds,
        for example.
    :param Callable evaluate: ``evaluate(f, *tensors)`` returns ``f(*tensors)``, a
        tensor or a tuple of them, part by part without dividing a group.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...] = ()
    evaluate: Callable[..., Any] = in_parts

    def __call__(self, v: Tensor) -> Tensor:
        """Returns the proximal map of ``v``."""
        result: Tensor = self.evaluate(self.function, v, *self.tensors)
        return result


# -- the loop of both solvers --------------------------------------------------


class _Judged(NamedTuple):
    """
    What is known of every sample, ``(B,)``, since the last evaluation of the measure.
    """

    residual: Tensor
    active: Tensor
    status: Tensor
    n_iter: Tensor

    @classmethod
    def init(cls, like: Tensor) -> _Judged:
        """Returns what is known at the start."""
        active = torch.ones_like(like, dtype=torch.bool)
        status = torch.full_like(active, Status.MAX_ITER, dtype=torch.int8)
        n_iter = torch.zeros_like(status, dtype=torch.int64)
        return cls(torch.full_like(like, torch.inf), active, status, n_iter)

    def update(self, n: int, measured: Tensor, rtol: Tensor) -> tuple[_Judged, Tensor]:
        """Judges iterate ``n``; returns also whose measure is finite."""
        active = self.active
        residual = measured.where(active, self.residual)
        finite = residual.isfinite()
        status = self.status.where(~active | finite, Status.NON_FINITE)
        status = status.where(~active | ~(residual <= rtol), Status.CONVERGED)
        n_iter = torch.where(active, n, self.n_iter)
        active = active & finite & (residual > rtol)
        return _Judged(residual, active, status, n_iter), finite


def _iterate(
    step: Callable[[Blocks], Blocks],
    measure: Callable[[Blocks, Blocks], Tensor],  # (new, old) -> (B,)
    state: Blocks,
    *,
    rtol: float | Tensor,
    max_iter: int,
    check_every: int,
    look_every: int | None,
    observe: Callable[[int, Blocks, Blocks], None] | None,
) -> tuple[Blocks, Tensor, Tensor, Tensor]:
    """Repeats a step until ``measure <= rtol``; freezes samples that are done."""
    like = norm(state[0].detach())
    rtol, look_every = _checked(rtol, max_iter, check_every, look_every, like)
    judged, good, looked = _Judged.init(like), state, 0
    go_on = everyone = True
    for n in range(1, max_iter + 1):
        old, state = state, step(state)
        # Samples that have stopped stay. Without a look it is unknown if there are any.
        if not everyone:
            state = _select(judged.active, state, old)
        if n % check_every == 0 or n == max_iter:
            with torch.no_grad():
                judged, finite = judged.update(n, measure(state, old), rtol)
            everyone = all_finite = False
            if n - looked >= look_every or n == max_iter:
                go_on, everyone, all_finite = _look(judged, finite, rtol)
                looked = n
            if not all_finite:
                state = _select(finite, state, good)
            good = state
        if observe is not None:
            observe(n - 1, old, state)
        if not go_on:
            break
    return state, judged.status, judged.n_iter, judged.residual


def _look(judged: _Judged, finite: Tensor, rtol: Tensor) -> tuple[bool, bool, bool]:
    """
    Returns whether any sample goes on, whether all do, and whether all are ``finite``.

    :raises ValueError: if a tolerance is negative. All is asked together, since every
        answer makes the host wait for the device.
    """
    size = len(finite)
    flags = [judged.active, finite, (rtol >= 0).expand_as(finite)]
    n_active, n_finite, n_valid = read_counts(flags)
    if n_valid < size:
        raise ValueError(f"rtol must not be negative, got {rtol.tolist()}.")
    return n_active > 0, n_active == size, n_finite == size


def _checked(
    rtol: float | Tensor,
    max_iter: int,
    check_every: int,
    look_every: int | None,
    like: Tensor,
) -> tuple[Tensor, int]:
    """
    Returns the tolerance as a tensor and when to look, or raises. The values of a
    tensor are looked at later, with the first look at the samples.
    """
    if look_every is None:
        look_every = 1 if like.device.type == "cpu" else 8
    if max_iter < 0 or check_every < 1 or look_every < 1:
        raise ValueError(
            "max_iter must not be negative, check_every and look_every must be "
            f"positive, got {max_iter}, {check_every}, {look_every}."
        )
    if isinstance(rtol, Tensor):
        return rtol.to(like), look_every
    if not rtol >= 0:
        raise ValueError(f"rtol must not be negative, got {rtol}.")
    return torch.full_like(like, rtol), look_every


def _select(condition: Tensor, a: Blocks, b: Blocks) -> Blocks:
    pairs = zip(a, b, strict=True)
    return tuple(select(condition, new, old) for new, old in pairs)


def relative_change(new: Blocks, old: Blocks) -> Tensor:
    r"""
    Returns :math:`\|x^{new} - x^{old}\| / \max(\|x^{new}\|, \|x^{old}\|)` per sample.

    The norm runs over all blocks; two zero samples have not changed.

    :param tuple new: blocks ``(B, ...)``.
    :param tuple old: the blocks before the step.
    """
    change = joint_norm(a - b for a, b in zip(new, old, strict=True))
    size = torch.maximum(joint_norm(new), joint_norm(old))
    return change / size.where(size != 0, 1)


# -- accelerated proximal (block) gradients ------------------------------------


def _fista(t: Tensor) -> tuple[Tensor, Tensor]:
    t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
    return (t - 1) / t_next, t_next


def _palm(k: Tensor) -> tuple[Tensor, Tensor]:
    return (k - 1) / (k + 2), k + 1


#: From the counter of a sample, 1 at the start, its inertia and the next counter.
_INERTIA = {
    "fista": _fista,
    "palm": _palm,
    "none": lambda k: (torch.zeros_like(k), k),
}


def proximal_gradient(
    steps: Sequence[BlockStep] | JointStep,
    init: Sequence[Tensor],  # (B, ...) each
    *,
    inertia: Inertia = "fista",
    restart: bool = False,
    settle: int = 0,
    rtol: float | Tensor = 1e-4,
    max_iter: int = 1000,
    measure: Callable[[Blocks, Blocks], Tensor] | None = None,
    check_every: int = 1,
    look_every: int | None = None,
    callback: StateCallback | None = None,
) -> SolverResult:
    r"""
    Runs accelerated proximal gradients over one or several blocks of unknowns.

    To minimise :math:`f(x_1, \dots, x_m) + \sum_b g_b(x_b)`, iteration :math:`k` goes
    through the blocks and puts, with the newest values of the others,

    .. math::
        v_b = x_b^k + w_k (x_b^k - x_b^{k-1}), \qquad
        x_b^{k+1} = \mathrm{prox}_{\tau_b g_b}\big( v_b - \tau_b \nabla_b f(v_b) \big).

    The caller's ``steps[b]`` is the second formula. Settings of it are

    * ISTA: one block, ``inertia="none"``;
    * FISTA (:footcite:t:`beck2009fast`): one block, ``inertia="fista"``, that is
      :math:`w_k = (t_k - 1) / t_{k+1}`, :math:`t_{k+1} = (1 + \sqrt{1 + 4 t_k^2}) / 2`;
    * PALM and iPALM (:footcite:t:`pock2016inertial`): several blocks, ``"none"`` or
      ``"palm"``, :math:`w_k = (k - 1) / (k + 2)`.

    Sample :math:`i` stops as soon as ``measure(new, old)[i] <= rtol[i]`` and is left
    unchanged from then on, so a batch gives what its samples give alone.

    One function instead of a list makes the blocks one unknown: a ``JointStep``
    extrapolates them itself, with ``extrapolated``, in parts that stay in the cache
    where that pays. Blocks that are linear images of others, such as :math:`W^{\top} u`
    beside :math:`u`, need not be computed again: extrapolation keeps linear relations.

    .. note::
        Step sizes are in the caller's hands and not checked.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.solvers.proximal import proximal_gradient, soft_threshold
    >>> b = torch.tensor([[3.0, 0.5]])
    >>> step = lambda v, blocks: soft_threshold(v - 0.5 * (v - b), 0.5)
    >>> proximal_gradient([step], [torch.zeros(1, 2)]).x.round(decimals=2)
    tensor([[2., 0.]])

    :param list, Callable steps: one function per block, see ``BlockStep``: it gets the
        extrapolated block and the tuple of all current blocks, and returns the new
        block. Or one function for all, see ``JointStep``.
    :param list init: initial blocks, shapes ``(B, ...)``. Not modified.
    :param str inertia: ``"fista"``, ``"palm"`` or ``"none"``.
    :param bool restart: forget the inertia of a sample whose step turns against its
        momentum, :math:`\sum_b \langle v_b - x_b^{k+1}, x_b^{k+1} - x_b^k \rangle > 0`
        (the gradient scheme of :footcite:t:`odonoghue2015adaptive`).
    :param int settle: number of iterations after a restart in which a sample does not
        stop: without inertia changes are small, and say little about the distance. In
        between its residual is given as at least twice the tolerance.
    :param float, torch.Tensor rtol: tolerance on the measure, one or ``(B,)``. With
        ``0``, ``max_iter`` iterations are run unless the measure vanishes.
    :param int max_iter: largest number of iterations.
    :param Callable measure: maps the blocks after and before a step to one number per
        sample, ``(B,)``, for example a relative duality gap; :func:`relative_change` if
        ``None``.
    :param int check_every: number of iterations between evaluations of the measure.
        Samples stop at these only.
    :param int look_every: least number of iterations between two looks at whether all
        samples have stopped. Each waits for the device; results do not depend on it.
        ``None``: 1 on the CPU, 8 elsewhere.
    :param Callable callback: called as ``callback(k, before, after)`` after every
        iteration, with the blocks as ``measure`` gets them.
    :return: (:class:`SolverResult`) all blocks in ``state``, the first one in ``x``,
        the measure in ``residual``. A sample whose measure became NaN or infinite gets
        back its iterate of the last evaluation before that.
    :raises ValueError: for an unknown ``inertia``, different numbers of steps and
        blocks, or a negative tolerance or limit.
    :raises TypeError: if ``restart`` is not a bool.
    """
    if not isinstance(restart, bool):
        raise TypeError(
            f"restart must be True or False, for all blocks together, got {restart!r}."
        )
    if inertia not in _INERTIA:
        raise ValueError(f"inertia must be one of {list(_INERTIA)}, got {inertia!r}.")
    m = len(init)
    # torch's list of modules is callable, too, but not to be called.
    joint = callable(steps) and not hasattr(steps, "__len__")
    blockwise = [] if joint else list(cast(Sequence[BlockStep], steps))
    if m == 0 or not joint and len(blockwise) != m:
        number = 1 if joint else len(blockwise)
        raise ValueError(
            f"There must be as many steps as blocks, got {number} and {m}."
        )
    if joint:
        advance = cast(JointStep, steps)
    else:
        advance = _one_by_one(blockwise, restart, momentum=inertia != "none")
    weights, stop = _INERTIA[inertia], measure or relative_change
    counter = torch.ones_like(norm(init[0].detach()))
    tolerance = rtol.to(counter) if isinstance(rtol, Tensor) else rtol

    def iteration(state: Blocks) -> Blocks:
        blocks, previous, (k, waits) = state[:m], state[m:-2], state[-2:]
        w, k_next = weights(k)
        new, against = advance(blocks, previous, w)
        restarted = (against.detach() > 0) & restart
        # As many iterations are judged in between, however often it restarts.
        waits = torch.where(restarted & (waits <= -settle), settle, waits - 1)
        return *new, *blocks, k_next.where(~restarted, 1), waits

    def judge(new: Blocks, old: Blocks) -> Tensor:
        measured = stop(new[:m], old[:m])
        return torch.where(new[-1] > 0, measured.clamp_min(2 * tolerance), measured)

    def observe(k: int, old: Blocks, new: Blocks) -> None:
        assert callback is not None
        callback(k, old[:m], new[:m])

    state, status, n_iter, residual = _iterate(
        iteration,
        judge,
        (*init, *init, counter, torch.full_like(counter, -settle)),
        rtol=rtol,
        max_iter=max_iter,
        check_every=check_every,
        look_every=look_every,
        observe=observe if callback is not None else None,
    )
    return SolverResult(state[0], status, n_iter, residual, state=state[:m])


def extrapolated(block: Tensor, previous: Tensor, w: Tensor) -> Tensor:
    r"""
    Returns :math:`x + w (x - x^{old})`.

    :param torch.Tensor block: x, ``(B, ...)``.
    :param torch.Tensor previous: :math:`x^{old}`, shape of x.
    :param torch.Tensor w: one weight per sample, ``(B,)``.
    """
    return torch.lerp(previous, block, expand(1 + w, block))


def _one_by_one(steps: Sequence[BlockStep], restart: bool, momentum: bool) -> JointStep:
    """Returns the step that goes through the blocks, each with the newest others."""

    def advance(blocks: Blocks, previous: Blocks, w: Tensor) -> tuple[Blocks, Tensor]:
        new, against = list(blocks), torch.zeros_like(w)
        for b, (step, old) in enumerate(zip(steps, blocks, strict=True)):
            v = extrapolated(old, previous[b], w) if momentum else old
            new[b] = step(v, tuple(new))
            if restart:
                against = against + inner(v - new[b], new[b] - old)
        return tuple(new), against

    return advance


# -- ADMM ----------------------------------------------------------------------


class ADMMState(NamedTuple):
    r"""
    What ADMM has to remember to be continued.

    :param torch.Tensor x: the unknown, ``(B, ...)``.
    :param tuple z: the split variables, :math:`z_i = K_i x` at the solution.
    :param tuple target: what the next :math:`K_i x` aim at, :math:`z_i - u_i` with the
        multipliers divided by :math:`\rho_i`.
    :param tuple Kx: the :math:`K_i x`.
    """

    x: Tensor
    z: Blocks
    target: Blocks
    Kx: Blocks

    @property
    def u(self) -> Blocks:
        r"""The multipliers divided by :math:`\rho_i`."""
        pairs = zip(self.z, self.target, strict=True)
        return tuple(in_parts(torch.sub, z, target) for z, target in pairs)


def admm(
    solve_x: Callable[[Blocks, Tensor, Blocks], tuple[Tensor, Blocks]],
    prox: Sequence[LocalProx],
    init: ADMMState,
    *,
    rho: Sequence[float | Tensor] = (1.0,),
    relaxation: float = 1.0,
    rtol: float | Tensor = 1e-4,
    max_iter: int = 1000,
    measure: Callable[[ADMMState, ADMMState], Tensor] | None = None,
    check_every: int = 1,
    look_every: int | None = None,
    callback: StateCallback | None = None,
) -> SolverResult:
    r"""
    Minimises :math:`f(x) + \sum_i g_i(K_i x)` by the alternating direction method of
    multipliers.

    In scaled form (:footcite:t:`boyd2011distributed`, Section 3.1.1 and Eq. (3.19)),
    with splits :math:`z_i = K_i x`, scaled multipliers :math:`u_i` and relaxation
    :math:`\alpha`:

    .. math::
        x &\leftarrow \underset{x}{\arg\min} \; f(x)
        + \sum_i \tfrac{\rho_i}{2} \|K_i x - (z_i - u_i)\|_2^2, \\
        h_i &= \alpha K_i x + (1 - \alpha) z_i, \qquad
        z_i \leftarrow \mathrm{prox}_{g_i / \rho_i}(h_i + u_i), \qquad
        u_i \leftarrow u_i + h_i - z_i.

    Sample :math:`i` stops, and is left unchanged, as soon as both relative residuals,
    in the norm :math:`\|v\|_\rho^2 = \sum_i \rho_i \|v_i\|_2^2`, are at most ``rtol``:

    .. math::
        \frac{\|K x - z\|_\rho}{\max(\|K x\|_\rho, \|z\|_\rho)}, \qquad
        \frac{\|z - z^{old}\|_\rho}{\|u\|_\rho}.

    Since only ``prox`` depends on the :math:`g_i`, the state of a run is a warm start
    for other weights in :math:`g_i`, and no linear system changes.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deal.solvers import ADMMState, LocalProx, admm
    >>> from deepinv_deal.solvers.proximal import soft_threshold
    >>> b, x = torch.tensor([[3.0, 0.5]]), torch.zeros(1, 2)
    >>> def solve_x(target, x, Kx):
    ...     x = (b + target[0]) / 2
    ...     return x, (x,)
    >>> result = admm(
    ...     solve_x,
    ...     [LocalProx(lambda v: soft_threshold(v, 1.0))],
    ...     ADMMState(x, z=(x,), target=(x,), Kx=(x,)),
    ... )
    >>> result.x.round(decimals=2)
    tensor([[2., 0.]])

    :param Callable solve_x: ``solve_x(targets, x, Kx)`` returns the minimiser of the
        first line for the targets :math:`z_i - u_i` and the tuple of its :math:`K_i x`.
        It must not modify what it is given. An iterative solver may start at the last
        ``x``, where ``Kx`` is known, and often has the new one at hand.
    :param list prox: the :math:`\mathrm{prox}_{g_i / \rho_i}`, a :class:`LocalProx`
        for every split.
    :param ADMMState init: where to start; the ``state`` of an earlier result continues
        it. Not modified.
    :param list rho: penalty of every split, numbers or ``(B,)``. They must agree with
        ``solve_x`` and ``prox``; here they only weight the residuals.
    :param float relaxation: :math:`\alpha` in (0, 2).
    :param float, torch.Tensor rtol: tolerance, one or ``(B,)``.
    :param int max_iter: largest number of iterations.
    :param Callable measure: another stopping rule: maps the states after and before an
        iteration to one number per sample, ``(B,)``, compared with ``rtol``.
    :param int check_every: number of iterations between evaluations of the rule.
        Samples stop at these only.
    :param int look_every: least number of iterations between two looks at whether all
        samples have stopped. Each waits for the device; results do not depend on it.
        ``None``: 1 on the CPU, 8 elsewhere.
    :param Callable callback: called as ``callback(k, before, after)`` after every
        iteration, with the states as ``measure`` gets them.
    :return: (:class:`SolverResult`) with the :class:`ADMMState` in ``state``.
    :raises ValueError: if ``relaxation`` is not in (0, 2), the numbers of splits
        differ, or a tolerance or limit is negative.
    """
    m = len(rho)
    lengths = [len(prox), len(init.z), len(init.target), len(init.Kx)]
    if lengths != [m] * 4 or m == 0:
        raise ValueError(
            "rho, prox, init.z, init.target and init.Kx must have one entry per split, "
            f"got {m} and {lengths}."
        )
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation must lie in (0, 2), got {relaxation}.")

    def unpack(state: Blocks) -> ADMMState:
        z, target, Kx = (state[i * m + 1 : (i + 1) * m + 1] for i in range(3))
        return ADMMState(state[0], z, target, Kx)

    def split(
        prox: LocalProx, z: Tensor, target: Tensor, Kx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the new split variable and target."""

        def advance(z: Tensor, target: Tensor, Kx: Tensor, *tensors: Tensor) -> Blocks:
            # h + u = alpha (K x - z) + 2 z - target
            d = torch.sub(Kx, z).mul_(relaxation).add_(z, alpha=2).sub_(target)
            new = prox.function(d, *tensors)
            return new, torch.sub(new, d).add_(new)

        blocks: tuple[Tensor, Tensor] = prox.evaluate(
            advance, z, target, Kx, *prox.tensors
        )
        return blocks

    def iteration(blocks: Blocks) -> Blocks:
        state = unpack(blocks)
        x, Kx = solve_x(state.target, state.x, state.Kx)
        splits = [
            split(*parts) for parts in zip(prox, state.z, state.target, Kx, strict=True)
        ]
        z, target = zip(*splits, strict=True)
        return x, *z, *target, *Kx

    def residuals(new: ADMMState, old: ADMMState) -> Tensor:
        size = torch.maximum(joint_norm(new.Kx, rho), joint_norm(new.z, rho))
        size = size.where(size != 0, 1)
        gap = [a - b for a, b in zip(new.Kx, new.z, strict=True)]
        change = [a - b for a, b in zip(new.z, old.z, strict=True)]
        # If no term is active the multipliers vanish: changes by rounding are none.
        moved, force = joint_norm(change, rho), joint_norm(new.u, rho)
        moved = moved.where(moved > torch.finfo(size.dtype).eps * size, 0)
        return torch.maximum(
            joint_norm(gap, rho) / size, moved / force.where(force != 0, 1)
        )

    def observe(k: int, old: Blocks, new: Blocks) -> None:
        assert callback is not None
        callback(k, unpack(old), unpack(new))

    stop = measure or residuals
    state, status, n_iter, residual = _iterate(
        iteration,
        lambda new, old: stop(unpack(new), unpack(old)),
        (init.x, *init.z, *init.target, *init.Kx),
        rtol=rtol,
        max_iter=max_iter,
        check_every=check_every,
        look_every=look_every,
        observe=observe if callback is not None else None,
    )
    final = unpack(state)
    return SolverResult(final.x, status, n_iter, residual, state=final)
