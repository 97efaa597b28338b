r"""Tangents: K weight draws, linearised along one run of a sampler.

One draw of the weights drives every step, so its deviation stays correlated along the trajectory. The sampler's own code is
run on dual numbers (:mod:`bayesdiff.tracing.dual`), whatever it does; the network in between takes δx and returns

    δf_n = J_n δx_n + δW φ_n,        δW^k ~ N(0, Σ),        Var[y] = (1/K) Σ_k (δy^k)².

The direct term δWφ is exact at every call. The response J δx is measured at some calls only, there along a few directions
(:mod:`bayesdiff.propagation.response`), as that of the denoiser D = a x + b f: so the stiff part of an ε-network's own response
stays exact, as in an exponential integrator.

The function is run several times; but for measurements, only the first run calls the network:

1. the user's run, recorded;
2. on duals, measuring at the planned calls, and extrapolating between them, since directions are those of the deviations so far;
3. on duals again, each response extended by what all measurements know, and interpolated; a decoder behind the last
   network call is measured along the principal directions of its input, and a few random mixtures of what they leave;
4. twice without duals, as a check (:mod:`bayesdiff.propagation.selfcheck`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesdiff.checks import BayesdiffWarning, UnsupportedPipelineError
from bayesdiff.diffusion.tweedie import clean_variance
from bayesdiff.propagation.coordinates import Coordinates, branch_order, scale_of
from bayesdiff.propagation.denoising import Denoising
from bayesdiff.propagation.entered import Entered, Match, floating
from bayesdiff.propagation.measured import Branches, Measured
from bayesdiff.propagation.module import Module, confirmed
from bayesdiff.propagation.plan import plan, ranks
from bayesdiff.propagation.responder import Responder, combine, finish
from bayesdiff.propagation.response import Directions, reduced
from bayesdiff.propagation.selfcheck import SelfCheck
from bayesdiff.propagation.settings import Tangents
from bayesdiff.propagation.steps import Direct
from bayesdiff.rng import item_generator
from bayesdiff.tracing.boxes import Box
from bayesdiff.tracing.memory import give_back
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import tensors

#: Directions are chosen from no more draws than these; of large samples, from as many as take no more bytes, or the fewest.
CHOOSING, CHOOSING_BYTES, FEWEST = 128, 2**24, 32
#: Draws are carried together as long as their tangents of one sample take no more bytes than this.
TOGETHER = 2**24
#: Of a residual that is warned of.
LARGE = 0.5


class TangentRun:
    """All passes of one run behind the first.

    Args:
        session: The recorded run.
        settings: What may be spent.
        direct: From the number of a network call to δWφ at its output tensors, ``(K, …)`` each.
        draws: K.
        scheduler: The schedule that the network was trained with, or None.
        stages: Network calls of one step of the solver.
        branches: By call, which rows are branches of which sample; where that is not known each row is one.
    """

    def __init__(
        self, session: Session, settings: Tangents, direct: Direct, draws: int, *,
        scheduler: Any = None, stages: int = 1, branches: dict[int, Branches] | None = None,
    ) -> None:  # fmt: skip
        self.session, self.settings, self.direct, self.draws = session, settings, direct, draws
        self.scheduler, self.stages, self.branches = scheduler, stages, branches or {}
        self.dtype = torch.promote_types(floating(session.network.calls[0].output)[0].dtype, torch.float32)
        self.selfcheck = SelfCheck(session)
        #: Whether responses are those of every draw at every call: then derivatives are taken to both sides.
        self.exact = settings.refresh == 1 and (settings.num_directions or 0) >= draws
        self._modules: dict[tuple[int, int], Module] = {}
        self._order: dict[int, list[tuple[int, int]]] = {}
        self._beside: list[str] = []  # modules whose output must enter the network beside the sample
        self._second = False
        self._draws = slice(None)
        #: Whether a decoder is called for every draw: where what it returns meets what did not pass through it.
        self.every = False
        #: How far decoders are from what their tangents say of one more draw, relative, of the worst row of each.
        self.bends: list[float] = []

    @property
    def responder(self) -> Responder:
        """The network's measurements."""
        return self._module(self.session.network, 0)[0].responder

    def measure(self, function: Callable[..., Any] | None = None) -> None:
        """The run that measures."""
        row = max(f[:1].numel() for f in floating(self.session.network.calls[0].output))  # the same in any batch
        few = max(FEWEST, CHOOSING_BYTES // (4 * row))
        self._draws = slice(0, self.draws if self.exact else min(CHOOSING, few))
        self.session.replay(self._network, self._component, function)
        self.session.trace.purge()  # what the function returned has tangents, too
        by_box: dict[int, list[Responder]] = {}
        for (box, _), module in self._modules.items():
            by_box.setdefault(box, []).append(module.responder)
        for responders in by_box.values():
            combine(responders)
            finish(responders)

    def chunks(self, *, decoded: bool) -> list[slice]:
        """The draws that are carried together; all of them where a decoder is to choose directions among them."""
        size = sum(f.numel() for f in floating(self.session.network.calls[0].output)) * 4
        number = self.draws if decoded else max(1, TOGETHER // size)
        return [slice(k, min(k + number, self.draws)) for k in range(0, self.draws, number)]

    def carry(self, draws: slice, function: Callable[..., Any] | None = None) -> Any:
        """The run that interpolates, for some of the draws: what the function returns; its tangents are in ``session.trace``."""
        self._second, self._draws = True, draws
        return self.session.replay(self._network, self._component, function)

    def residual(self) -> Tensor | None:
        """What the errors of the responses make of the map, relative, of the worst of a sample's branches, ``(B,)``."""
        network = id(self.session.network)
        found = [m.residual() for (box, _), m in self._modules.items() if box == network]
        known = [f for f in found if f is not None]
        return torch.stack(known).amax(0) if known else None

    def denoising(self) -> Denoising | None:
        """What the data leave open at each network call, as far as the measured responses tell; None where they cannot."""
        module = self._modules.get((id(self.session.network), 0))
        diagonals = {} if module is None else module.responder.diagonals()
        if module is None or module.sample is None or not diagonals:
            return None
        nodes, weights = list(diagonals), []
        for n in range(module.coordinates.number):
            noise = module.coordinates.noise(n)
            if noise is None:
                return None
            alpha, sigma = noise
            share = module.responder.weights(n)
            size = (
                clean_variance(alpha, sigma, 1 / scale_of(alpha)) if alpha > 0 else math.nan
            )  # of pure noise: nothing is known
            weights.append([share.get(m, 0.0) * size for m in nodes])
        stacked = torch.stack([diagonals[m].float() for m in nodes])
        return Denoising(stacked.unflatten(2, module.sample), torch.tensor(weights, dtype=torch.float64))

    def _module(self, box: Box, n: int) -> tuple[Module, int]:
        """The responses that call n belongs to, and its number among their calls; the first that is asked for has tangents."""
        if id(box) not in self._order:
            self._order[id(box)] = branch_order(box.calls)
        order = self._order[id(box)]
        branch, place = order[n]
        key = (id(box), branch)
        if key not in self._modules:
            calls = [c for c, (other, _) in zip(box.calls, order, strict=True) if other == branch]
            coordinates = Coordinates(self.scheduler, calls)
            s, places = self.settings, ranks(coordinates.levels, len(calls))
            chosen = plan(places, s.extra_calls, s.refresh, s.num_directions, self.stages, self.session.noisy, place)
            shared = self.stages == 1 and len(set(places)) == len(places)
            self._modules[key] = Module(coordinates, Responder(chosen, self.dtype, shared, s.batch_invariant))
        return self._modules[key], place

    def _network(self, box: Box, n: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.session.trace.purge()
        entered = Entered(self.session, box, args, kwargs, output)
        total: list[Tensor] | list[Tensor | None]
        if entered:
            total = self._respond(box, n, entered, self.branches.get(n))
            self.direct.onto(n, total, self._draws)
            if self._second and self._draws.start == 0:
                module, place = self._module(box, n)
                module.follow(place, entered, self.branches.get(n), total)
        else:
            direct = zip(self.direct(n, self._draws), tensors(output), strict=True)
            total = [t for t, f in direct if f.is_floating_point()]
        if self._beside:
            raise UnsupportedPipelineError(
                f"expected what {', '.join(self._beside)} makes of the sample to enter the network at once, got a network "
                'call without it; use propagation="ensemble"'
            )
        self._attach(box, n, args, kwargs, output, total)

    def _respond(self, box: Box, n: int, entered: Entered, known: Branches | None = None) -> list[Tensor]:
        """J δx at every output tensor."""
        module, place = self._module(box, n)
        if module.match is None:
            module.match = (entered.match(),)
            if module.match[0] is not None and module.match[0].inputs is None and not entered.given.listed:
                module.sample = tuple(entered.given.row_shape(0))
        (match,) = module.match
        rows = entered.rows if match is None else match.taken(entered.rows)
        branches = confirmed(known, rows)
        samples = branches.first(rows)
        module.same_shape(box.name, samples)
        if module.due(place) and not self._second:
            module.responder.add(place, self._measure(module, place, entered, match, branches, samples))
        if box is self.session.network and len(entered.values) > 1:
            self._beside.clear()
        found = module.responder.apart(place, samples, branches)
        if match is not None:
            a, b = module.coordinates.interpolated(place)
            denoised = module.responder.denoised(place, samples)
            if self._second and self._draws.start == 0:
                module.note(place, denoised, b)
            common = denoised.add_(samples, alpha=-a).div_(b)
            total = match.written(branches.spread(common), entered.size)
            found = total if found is None else found + total
        if found is None:  # nothing is known yet, and nothing in common
            found = entered.rows.new_zeros(entered.given.number, entered.rows.shape[1], entered.size)
        return entered.returned.unpack(found)

    def _measure(
        self, module: Module, n: int, entered: Entered, match: Match | None, branches: Branches, samples: Tensor
    ) -> Measured:  # fmt: skip
        """Directions, and the response along them."""
        chosen = self._choose(module.responder, n, samples)
        directions = chosen.directions
        if match is None or (len(entered.values) == 1 or entered.given.listed):
            spread = branches.spread(directions)
            shifts = spread if match is None else match.placed(spread, entered.rows.shape[-1])
        else:  # other arguments move with the sample, by the same combination of draws
            combination = directions @ torch.linalg.pinv(samples.double())
            shifts = branches.spread(combination) @ entered.rows.double()
        give_back(samples.numel() * samples.element_size(), held=0)  # for the network's own
        images = entered.derivatives(
            shifts, branches.spread(chosen.safe), self.settings.directions_per_call, central=self.exact
        )
        strengths = (samples @ directions.to(samples).mT).double().square().mean(1)
        if chosen.probe:
            strengths[:, -1] = (chosen.length[:, 0].square() - strengths[:, :-1].sum(1)).clamp(min=0)
        strengths = strengths.sqrt()
        kept = Directions(directions.to(self.dtype), chosen.length, chosen.probe)
        if match is None:
            return Measured(kept, None, images.to(self.dtype), strengths, branches, (0.0, 1.0))
        a, b = module.coordinates.interpolated(n)
        common = branches.combine(match.read(images))
        # As the fit takes them: the response to deviations of their typical length.
        denoised = (a * directions + b * common) * chosen.safe.unsqueeze(1)
        if branches.rows.shape[1] == 1 and match.outputs is None:
            return Measured(kept, denoised.to(self.dtype), None, strengths, branches, (a, b))
        apart = images - match.written(branches.spread(common), entered.size)
        return Measured(kept, denoised.to(self.dtype), apart.to(self.dtype), strengths, branches, (a, b))

    def _choose(self, responder: Responder, n: int, rows: Tensor) -> Directions:
        mixture = torch.randn(rows.shape[1], generator=item_generator(0, n), dtype=torch.float64)
        return responder.choose(rows, mixture)

    def _component(self, box: Box, n: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = Entered(self.session, box, args, kwargs, output)
        if not entered:
            return
        strange = [v for v in tree_leaves(output) if hasattr(v, "__dict__") and not isinstance(v, Tensor)]
        if strange or not entered.outputs:
            raise UnsupportedPipelineError(
                f"expected {box.name}, which is given the sample, to return tensors, got "
                f"{type((strange or [output])[0]).__name__}; "
                'use propagation="ensemble"'
            )
        network = self.session.network
        total: list[Tensor]
        if network.position >= len(network.calls):  # behind the last network call
            if not self._second:
                return
            total = self._decode(n, entered)
        elif entered.match() is not None:
            total = self._respond(box, n, entered)
        else:
            # An argument of the next network call beside the sample: measured with it, and moved as it is moved.
            module, place = self._module(network, network.position)
            if self._second or not module.due(place):
                return
            self._beside.append(box.name)
            chosen = self._choose(module.responder, place, entered.rows)
            images = entered.derivatives(chosen.directions, chosen.safe, central=self.exact).to(self.dtype)
            total = entered.returned.unpack((entered.rows @ chosen.directions.to(entered.rows).mT) @ images)
        self._attach(box, n, args, kwargs, output, list(total))

    def _decode(self, n: int, entered: Entered) -> list[Tensor]:
        """Tangents behind a decoder: of every draw, or of principal directions and mixtures of the rest."""
        rows, number = entered.rows.double(), self.settings.decoder_calls
        every = self.every or number >= rows.shape[1]
        if not every:
            rows = torch.cat([reduced(r, number, item_generator(1, n)) for r in rows.split(1)])
        norm = rows.square().sum(2, keepdim=True).sqrt()
        length = norm[..., 0].square().sum(1, keepdim=True).div(self.draws).sqrt()
        length = torch.where(length > 0, length, 1.0)
        unit, together = rows / torch.where(norm > 0, norm, 1.0), self.settings.directions_per_call
        images = norm * entered.derivatives(unit, length, together, central=every and self.exact)
        if self._draws.start == 0:
            self.bends.append(self._bend(entered, rows, images, length))
        return entered.returned.unpack(images.to(self.dtype))

    def _bend(self, entered: Entered, rows: Tensor, images: Tensor, length: Tensor) -> float:
        r"""One more evaluation, along a mixture of all directions as large as a draw, against what they say of it together.

        With rows :math:`r_j`, their images :math:`Jr_j` and signs :math:`\xi_j`: the relative size of
        :math:`J\sum_j\xi_jr_j - \sum_j\xi_jJr_j`, which is 0 where the decoder is linear within the deviations.
        """
        signs = torch.randint(2, rows.shape[1:2], generator=item_generator(2, 0)).to(rows) * 2 - 1
        mixture, told = signs @ rows, signs @ images
        if not bool(mixture.any()):
            return 0.0
        found = entered.derivatives(mixture.unsqueeze(1), length)[:, 0]
        apart = (found - told).square().sum(1) / torch.where(told.any(1), told.square().sum(1), 1.0)
        return float(apart.max().sqrt())

    def _attach(
        self, box: Box, n: int, args: Any, kwargs: Any, output: Any, total: list[Tensor | None] | list[Tensor]
    ) -> None:
        for f, tangents in zip(floating(output), total, strict=True):
            if tangents is not None:
                self.session.trace.attach(f, tangents)
                give_back(tangents.numel() * tangents.element_size())
        if self._second and self._draws.start == 0:
            self.selfcheck.remember(box, n, args, kwargs, output, list(total))


def warn(residual: Tensor | None, settings: Tangents, decoder: float = 0.0) -> None:
    """Say so where the response of the network, or of a decoder, was not known well enough."""
    if decoder > LARGE:
        warnings.warn(
            f"the decoder bends within the deviations: expected an answer to one more draw within {LARGE:g} of what its tangents "
            f'say, got a relative difference of {decoder:.2g}; the map may be far off, use propagation="ensemble"',
            BayesdiffWarning, stacklevel=5,
        )  # fmt: skip
    if residual is None or bool((residual <= LARGE).all()):
        return
    warnings.warn(
        f"the network's response is not well known: expected a residual of at most {LARGE:g}, got {float(residual.max()):.2g} "
        f"({int((~(residual <= LARGE)).sum())} of {len(residual)} samples); the map may be far off, use more extra_calls than "
        f"{settings.extra_calls:g}, or propagation=\"ensemble\"", BayesdiffWarning, stacklevel=5,
    )  # fmt: skip
