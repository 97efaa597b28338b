r"""Sums over a head's features: their Gram matrix, and the gradient of the layer's weights.

What a Laplace posterior needs of the data (:mod:`bayesdiff.laplace.statistics`). The features of a convolution are patches that
overlap: they are not written out, but for the Gram matrix with weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdiff.head.geometry import HeadGeometry, as_given, patches

#: Numbers of features that are written out at once.
WRITTEN = 2**23


def gram_matrix(geometry: HeadGeometry, inputs: Tensor) -> Tensor:
    r""":math:`\sum_{b,p}\varphi_{bp}\varphi_{bp}^\top`, ``(D, D)`` float64.

    The products are summed in the dtype of ``inputs`` (float32 at least) after the mean of each channel is
    taken away, and the mean is put back in float64: features after an activation are far from
    centred, and their common part would cost float32 the digits that small eigenvalues need.

    For a convolution the patches overlap: along the first spatial dimension ("rows") the product of two entries
    depends on where the patch is only through its border rows. So the sum over all patches whose rows are inside is
    done once for each offset between two entries, and only the border rows apart: k_1 times less work than
    multiplying out the im2col matrix.
    """
    d = geometry.in_features
    total = torch.zeros(d, d, dtype=torch.float64, device=inputs.device)
    add_gram(geometry, inputs, total)
    return total


@as_given
def add_gram(geometry: HeadGeometry, inputs: Tensor, total: Tensor) -> None:
    """Add :func:`gram_matrix` to ``total`` in place: a D × D matrix of a large head is too large to make anew for each image."""
    geometry.check(inputs)
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    n = geometry.num_weights
    block = total[:n, :n]
    if geometry.kind == "linear":
        flat = x.reshape(-1, geometry.in_channels)
        mean = flat.mean(0)
        flat = flat - mean
        if flat.dtype == block.dtype:
            block.addmm_(flat.T, flat)
        else:
            block += flat.T @ flat
        first, count = flat.sum(0, dtype=torch.float64), len(flat)
        shift = mean.double()
    else:
        positions = (0, *range(2, x.ndim))
        mean = x.mean(positions)
        padded = geometry.pad(x) - mean.view(-1, *(1,) * (x.ndim - 2))
        windows = geometry.shifts(padded.sum(0, keepdim=True, dtype=torch.float64))
        shape = (geometry.in_channels, geometry.kernel_size[0], geometry.taps // geometry.kernel_size[0])
        block.unflatten(1, shape).unflatten(0, shape).add_(_patch_products(geometry, padded))
        first = torch.stack([w.sum(positions) for w in windows], dim=1).flatten()
        count = len(x) * windows[0][0, 0].numel()
        shift = mean.double().repeat_interleave(len(windows))
    everything = first + count * shift  # Σ φ
    block.addr_(shift, first).addr_(everything, shift)
    if geometry.bias:
        total[:n, n] += everything
        total[n, :n] += everything
        total[n, n] += count


@as_given
def add_weighted_gram(geometry: HeadGeometry, inputs: Tensor, weights: Tensor, total: Tensor) -> None:
    r"""Add :math:`\sum_{b,p} k_{bp}\varphi_{bp}\varphi_{bp}^\top` to ``total`` in place, in float64.

    The features are written out, a chunk of rows at a time, where the weight is not 0.

    Args:
        geometry: The layer's.
        inputs: What enters the layer.
        weights: k ≥ 0, ``(B, P)``, P the positions of an output.
        total: ``(D, D)`` float64.
    """
    rows = max(1, WRITTEN // (weights.shape[1] * geometry.in_features))
    for x, k in zip(inputs.split(rows), weights.split(rows), strict=True):
        phi, flat = geometry.design(x).flatten(0, 1), k.flatten().double()
        used = flat != 0
        phi = phi[used].double()
        total += phi.T @ (phi * flat[used, None])


@as_given
def outer_products(geometry: HeadGeometry, inputs: Tensor, outputs: Tensor) -> Tensor:
    r""":math:`\sum_p r_{bp}\varphi_{bp}^\top`: one gradient of the layer's weights per sample.

    Args:
        geometry: The layer's.
        inputs: What enters the layer.
        outputs: r, shaped as the layer's output.

    Returns:
        ``(B, C, D)``.
    """
    geometry.check(inputs)
    if geometry.kind == "linear":
        phi = geometry.design(inputs)
        return outputs.reshape(*phi.shape[:2], geometry.out_channels).transpose(1, 2) @ phi
    r = outputs.flatten(2)  # (B, C, P)
    grads = [r @ x.flatten(2).transpose(1, 2) for x in geometry.shifts(geometry.pad(inputs))]
    out = torch.stack(grads, dim=-1).flatten(2)  # (B, C, D − 1)
    return torch.cat([out, r.sum(-1, keepdim=True)], dim=-1) if geometry.bias else out


def _patch_products(geometry: HeadGeometry, padded: Tensor) -> Tensor:
    """Σ over patches of patch ⊗ patch for a padded convolution input: ``(C_in, k_1, R, C_in, k_1, R)``, R entries a row."""
    k1, taps = geometry.kernel_size[0], geometry.taps // geometry.kernel_size[0]
    height = padded.shape[2] - k1 + 1
    # rows[r]: all patches of the padded row r in the other dimensions, (Hp, B·P', C_in·R).
    rows = patches(padded, 3, geometry.kernel_size[1:]).movedim(2, 0)
    n = len(geometry.kernel_size)
    rows = rows.movedim(2, n + 1).flatten(n + 1).flatten(1, n)
    q = geometry.in_channels * taps

    def product(first: int, last: int, offset: int) -> Tensor:  # Σ over rows first … last−1
        if first >= last:
            return rows.new_zeros(q, q)
        a = rows[first:last].flatten(0, 1)
        return a.T @ (a if offset == 0 else rows[first + offset : last + offset].flatten(0, 1))

    blocks = padded.new_zeros(k1, q, k1, q)
    for offset in range(k1):
        # Rows that every position of the patch shares; none in an input lower than the kernel.
        inner = (k1 - 1 - offset, height) if height > k1 - 1 - offset else None
        common = product(*inner, offset) if inner else None
        for i in range(k1 - offset):
            if common is None or inner is None:
                block = product(i, i + height, offset)
            else:
                block = common + product(i, inner[0], offset) + product(inner[1], i + height, offset)
            blocks[i, :, i + offset, :] = block
            if offset:
                blocks[i + offset, :, i, :] = block.T
    # (k_1, C_in, R, k_1, C_in, R) to the order of the layer's weights, (C_in, k_1, R).
    return blocks.view(k1, geometry.in_channels, taps, k1, geometry.in_channels, taps).permute(1, 0, 2, 4, 3, 5)
