r"""What the data leave open at x_t, by Tweedie's identity of second order.

With :math:`x_t = \alpha x_0 + \sigma\varepsilon` and the denoiser :math:`D(x) = E[x_0\,|\,x_t = x]`,

.. math:: \mathrm{Cov}[x_0\,|\,x_t] = \frac{\sigma^2}{\alpha}\,\frac{\partial D}{\partial x}

(Efron 2011; for flows :math:`D = (x - \sigma u)/(\alpha + \sigma)`, so that the trace is the divergence of the velocity u:
"Divergence is the Uncertainty", arXiv 2605.00941). Whatever a network returns, :math:`D = a x + b f`
(:mod:`bayesdiff.diffusion.parametrization`), and given x_t the clean image is :math:`x_0 = a x_t + b g` of the target g. So

.. math:: \mathrm{Cov}[g\,|\,x_t] = \frac{\sigma^2}{\alpha b^2}\Big(a + b\,\frac{\partial f}{\partial x}\Big),

for ε :math:`1 - \sigma\,\partial f/\partial x`. It is as true as the network is the conditional expectation: a distilled one is
not, and guidance changes what is predicted. Where a variance comes out negative, the network is no such expectation.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from bayesdiff.diffusion.parametrization import clean_coefficients


def target_variance(prediction: str, alpha: Tensor, sigma: Tensor, slope: Tensor) -> Tensor:
    """Var[g | x_t] of single numbers from the network's own response there.

    Args:
        prediction: What the network returns, one of :data:`bayesdiff.diffusion.parametrization.PREDICTIONS`.
        alpha: α > 0, broadcastable.
        sigma: σ > 0.
        slope: ∂f_i/∂x_i; of a flow whose time runs from noise to data, of its negative.

    Returns:
        Shaped as ``slope``, in the squared units of the target; negative where the network is no conditional expectation.
    """
    if prediction == "epsilon":  # as below; without a division by α
        return 1 - sigma * slope
    a, b = clean_coefficients(prediction, alpha, sigma)  # type: ignore[arg-type]
    return sigma.square() / (alpha * b**2) * (a + b * slope)


Number = TypeVar("Number", float, Tensor)


def clean_variance(alpha: Number, sigma: Number, jacobian: Number) -> Number:
    """Var[x_0 | x_t] from the diagonal of the denoiser's response, in the network's space squared.

    Args:
        alpha: α > 0, broadcastable.
        sigma: σ.
        jacobian: ∂D_i/∂x_i.
    """
    return sigma**2 / alpha * jacobian
