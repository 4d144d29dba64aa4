"""A naive NumPy float64 twin of calib_jax: loops over image, class and voxel, slow and plain.

Written from the semantics, not from the code, so that both can only be wrong in different ways. Bins are
assigned by comparing float32 probabilities with float32 edges; every sum is float64.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Stats:
    """Sums `[batch, classes, bins]` and the bin of each voxel `[batch, voxels, classes]`, -1 if not counted."""

    count: np.ndarray
    prob_sum: np.ndarray
    label_sum: np.ndarray
    bins: np.ndarray

    def means(self):
        """Mean probability and mean label, NaN in empty bins."""
        with np.errstate(invalid="ignore"):
            return self.prob_sum / self.count, self.label_sum / self.count


def edges(num_bins):
    """Float32 edges as `torch.linspace` steps: up from 0 in the first half, down from the end in the second."""
    end = 1.0 + 2.0**-23
    step = float(np.float32(end) / np.float32(num_bins))
    values = []
    for i in range(num_bins + 1):
        from_start, from_end = i * step, end - (num_bins - i) * step
        values.append(np.float32(from_start if 2 * i < num_bins else from_end))
    return np.array(values, np.float32)


def bin_of(prob, num_bins, closed="right"):
    """The bin of one probability: the first whose upper edge is not passed; NaN and above all: the last."""
    prob = np.float32(prob)
    for m, upper in enumerate(edges(num_bins)[1:]):
        if prob < upper or (closed == "right" and prob == upper):
            return m
    return num_bins - 1


def bin_statistics(probs, labels, num_bins=20, closed="right", where=None):
    """Sums per image, class and bin."""
    probs = np.asarray(probs)
    batch, classes = probs.shape[0], probs.shape[-1]
    flat_probs = probs.astype(np.float32).reshape(batch, -1, classes)
    flat_labels = _per_class(np.asarray(labels), probs.shape).reshape(batch, -1, classes)
    flat_where = _mask(where, probs.shape).reshape(batch, -1, classes)
    count, prob_sum, label_sum = np.zeros((3, batch, classes, num_bins))
    bins = np.full(flat_probs.shape, -1)
    for b, v, c in np.ndindex(flat_probs.shape):
        if flat_where[b, v, c]:
            m = bin_of(flat_probs[b, v, c], num_bins, closed)
            bins[b, v, c] = m
            count[b, c, m] += 1
            prob_sum[b, c, m] += float(flat_probs[b, v, c])
            label_sum[b, c, m] += float(flat_labels[b, v, c])
    return Stats(count, prob_sum, label_sum, bins)


def soft_errors(probs, labels, kind="ace", num_bins=20, where=None):
    """The follow-up's soft-binned error `[batch, classes]` in float64, from one triangle per bin.

    w_m(p) = 1 - |p - centre_m| / width, not below 0, and 1 beyond the first and last centre.
    """
    probs = np.asarray(probs, np.float64)
    shape = probs.shape
    labels, keep = _per_class(np.asarray(labels), shape), _mask(where, shape)
    result = np.full((shape[0], shape[-1]), np.nan)
    for b, c in np.ndindex(result.shape):
        chosen = keep[b, ..., c]
        p, y = probs[b, ..., c][chosen], labels[b, ..., c][chosen]
        stats = soft_sums(p, y, num_bins)
        filled = stats[0] >= 0.01
        if filled.any():
            gap = np.abs(stats[1] - stats[2])[filled] / stats[0][filled]
            share = stats[0][filled] / stats[0].sum()
            result[b, c] = {"ace": gap.mean(), "ece": share @ gap, "mce": gap.max()}[kind]
    return result


def soft_sums(p, y, num_bins):
    """Weights, weighted probabilities and weighted labels `[3, bins]` of one image and class."""
    centres = (np.arange(num_bins) + 0.5) / num_bins
    weights = np.maximum(0, 1 - np.abs(p[:, None] - centres) * num_bins)
    weights[p <= centres[0], 0] = 1
    weights[p >= centres[-1], -1] = 1
    return np.stack([weights.sum(0), weights.T @ p, weights.T @ y])


def errors(stats, kind):
    """ACE, ECE or MCE `[batch, classes]`; NaN where nothing was counted."""
    result = np.full(stats.count.shape[:2], np.nan)
    for b, c in np.ndindex(result.shape):
        gaps, counts = [], []
        for count, prob, label in zip(
            stats.count[b, c], stats.prob_sum[b, c], stats.label_sum[b, c], strict=True
        ):
            if count > 0:
                gaps.append(abs(prob / count - label / count))
                counts.append(count)
        if gaps:
            weights = {"ace": [1 / len(gaps)] * len(gaps), "ece": np.array(counts) / sum(counts)}
            result[b, c] = max(gaps) if kind == "mce" else np.dot(weights[kind], gaps)
    return result


def loss(
    probs,
    labels,
    kind="ace",
    num_bins=20,
    closed="right",
    where=None,
    include_background=True,
    class_weights=None,
    ignore_empty_classes=False,
    reduction="mean",
):
    """The loss and its gradient with respect to `probs` (of the sum of all entries for reduction "none")."""
    probs = np.asarray(probs)
    first = 0 if include_background else 1
    stats = bin_statistics(probs, labels, num_bins, closed, where)
    kept = Stats(
        stats.count[:, first:], stats.prob_sum[:, first:], stats.label_sum[:, first:], stats.bins[..., first:]
    )
    per_class = errors(kept, kind)
    weights = np.ones(per_class.shape)
    if class_weights is not None:
        weights = weights * np.asarray(class_weights, np.float64)
    counted = kept.count.sum(-1) > 0
    contributes = counted & (kept.label_sum.sum(-1) > 0) if ignore_empty_classes else counted
    values = np.where(contributes, weights * per_class, 0.0)
    denominator = (weights * counted).sum() if reduction == "mean" else 1.0
    denominator = 1.0 if denominator == 0 else denominator
    scale = np.where(contributes, weights, 0.0) / denominator

    gradient = np.zeros((probs.shape[0], stats.bins.shape[1], probs.shape[-1]))
    for b, v, c in np.ndindex(kept.bins.shape):
        if kept.bins[b, v, c] >= 0:
            slope = _slope(
                kept.count[b, c], kept.prob_sum[b, c], kept.label_sum[b, c], kept.bins[b, v, c], kind
            )
            gradient[b, v, c + first] = scale[b, c] * slope
    value = values if reduction == "none" else values.sum() / denominator
    return value, gradient.reshape(probs.shape)


def _slope(count, prob_sum, label_sum, m, kind):
    """Derivative of one image's and class's error with respect to one probability in bin m."""
    sign = np.sign(prob_sum[m] / count[m] - label_sum[m] / count[m])
    if kind == "ace":
        return sign / (count[m] * np.count_nonzero(count))
    if kind == "ece":
        return sign / count.sum()
    gaps = np.where(count > 0, np.abs(prob_sum - label_sum) / np.maximum(count, 1), -1.0)
    return sign / count[m] if m == np.argmax(gaps) else 0.0


def _per_class(labels, shape):
    """Labels of the shape of the probabilities, from class ids or as they are."""
    if labels.shape == shape:
        return labels.astype(np.float64)
    return np.stack([labels == c for c in range(shape[-1])], axis=-1).astype(np.float64)


def _mask(where, shape):
    if where is None:
        return np.ones(shape, bool)
    where = np.asarray(where)
    return where if where.shape == shape else np.repeat(where[..., None], shape[-1], axis=-1)


def sample_probs(seed=0, shape=(2, 4, 5, 3)):
    """Softmax-like float32 probabilities, many near 0 and 1."""
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.5), shape[:-1]).astype(np.float32)


def sample_labels(form, shape=(2, 4, 5, 3), seed=1):
    """Labels for probabilities of `shape`: "ids", "one_hot", "regions" (overlapping) or "soft"."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)
    if form == "ids":
        return ids
    if form == "one_hot":
        return np.eye(shape[-1], dtype=np.float32)[ids]
    if form == "regions":
        return (rng.random(shape) < 0.4).astype(np.float32)
    return rng.random(shape).astype(np.float32)


LABEL_FORMS = ("ids", "one_hot", "regions", "soft")
