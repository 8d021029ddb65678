"""Follows objects from frame to frame by their embeddings: a pure function of (state, detections).

This file needs NumPy alone, so that a runtime without PyTorch can use it, too (tools/onnx_runner.py loads it by its
path). An embedding is the object's kernel; :func:`step` normalises it.

Shapes: n detections of a frame, T tracks in the memory, C channels of an embedding.
"""

from typing import NamedTuple

import numpy as np

NO_TRACK = 0


class TrackerOptions(NamedTuple):
    """How detections join tracks. All comparisons with a threshold are strict.

    Attributes:
        min_score: detections with a score of at most this are left out.
        new_track_score: detections without a match start a track above this score.
        match_threshold: lowest similarity (mean of two softmaxes, 0 to 1) of a detection and the track that it joins.
        min_cosine: lowest cosine of the two. Two softmaxes can't refuse a lone pair, whose similarity is 1.
        temperature: what cosines are divided by before the softmaxes.
        momentum: weight of the new embedding in a track's embedding, 0 to 1.
        memory: number of successive frames that a track may miss; after one more it is forgotten.
        overlap_threshold: see :func:`one_owner`.
    """

    min_score: float
    new_track_score: float
    match_threshold: float
    min_cosine: float
    temperature: float
    momentum: float
    memory: int
    overlap_threshold: float


class Detections(NamedTuple):
    """The objects of a frame.

    Attributes:
        labels: int64 [n], classes.
        scores: [n], 0 to 1.
        embeddings: [n, C].
    """

    labels: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray


class TrackerState(NamedTuple):
    """The memory of a video.

    Attributes:
        frame: number of frames so far.
        next_id: id of the next new track.
        ids: int64 [T], ascending.
        labels: int64 [T], classes.
        embeddings: [T, C], running means of unit vectors.
        last_seen: int64 [T], the frame in which each track was seen last.
    """

    frame: int
    next_id: int
    ids: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray
    last_seen: np.ndarray


def new_state(first_id: int = 1) -> TrackerState:
    """The state before the first frame of a video; ``first_id`` is the id of the first track, at least 1."""
    none = np.zeros(0, np.int64)
    return TrackerState(0, first_id, none, none, np.zeros((0, 0)), none)


def step(state: TrackerState, detections: Detections, options: TrackerOptions) -> tuple[TrackerState, np.ndarray]:
    """Follow the objects into the next frame (Video K-Net, inference).

    Only detections and tracks of one class are compared, so that a look-alike of another class changes nothing. The
    pairs with the largest similarity are joined first. The result does not depend on the order of the detections.

    Returns:
        The next state, and the track id of each detection, int64 [n]; NO_TRACK for a detection that neither joins nor
        starts a track.
    """
    vectors = _unit(np.asarray(detections.embeddings, np.float64))
    labels, scores = np.asarray(detections.labels, np.int64), np.asarray(detections.scores, np.float64)
    order = _canonical_order(scores, vectors, labels)
    order = order[scores[order] > options.min_score]
    vectors, labels, scores = vectors[order], labels[order], scores[order]

    tracks = np.full(len(order), -1)  # row of the track that each detection joins
    for detection, track in _pairs(state, vectors, labels, options):
        tracks[detection] = track
    new = np.flatnonzero((tracks < 0) & (scores > options.new_track_score))
    tracks[new] = len(state.ids) + np.arange(len(new))

    known = np.flatnonzero((tracks >= 0) & (tracks < len(state.ids)))
    embeddings = state.embeddings.copy() if len(state.ids) else vectors[:0]
    embeddings[tracks[known]] *= 1 - options.momentum
    embeddings[tracks[known]] += options.momentum * vectors[known]
    ids = np.concatenate([state.ids, state.next_id + np.arange(len(new))])
    last_seen = np.concatenate([state.last_seen, np.full(len(new), state.frame)])
    last_seen[tracks[known]] = state.frame

    found = np.zeros(len(detections.scores), np.int64)
    found[order] = np.where(tracks < 0, NO_TRACK, np.append(ids, NO_TRACK)[tracks])
    kept = state.frame - last_seen <= options.memory
    memory = TrackerState(
        frame=state.frame + 1,
        next_id=state.next_id + len(new),
        ids=ids[kept],
        labels=np.concatenate([state.labels, labels[new]])[kept],
        embeddings=np.concatenate([embeddings, vectors[new]])[kept],
        last_seen=last_seen[kept],
    )
    return memory, found


def one_owner(masks: np.ndarray, scores: np.ndarray, overlap_threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Give each pixel to the mask with the highest score, so that an object that was found twice makes one track.

    Args:
        masks: bool [n, H, W].
        scores: [n].
        overlap_threshold: masks that keep less than this share of their pixels are left out. They take no pixels.

    Returns:
        Indices of the masks that are kept, int64 [m], by falling score; and these masks, disjoint, bool [m, H, W].
    """
    free = np.ones(masks.shape[1:], bool)
    kept, owned = [], []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        own = masks[i] & free
        count = np.count_nonzero(own)
        if count and count >= overlap_threshold * np.count_nonzero(masks[i]):
            free &= ~own
            kept.append(i)
            owned.append(own)
    return np.array(kept, np.int64), np.array(owned, bool).reshape(-1, *masks.shape[1:])


def _pairs(
    state: TrackerState, vectors: np.ndarray, labels: np.ndarray, options: TrackerOptions
) -> list[tuple[int, int]]:
    """(detection, track) pairs that belong together, rows of both; no row occurs twice."""
    if not len(labels) or not len(state.ids):
        return []
    cosines = vectors @ _unit(state.embeddings).T
    comparable = labels[:, None] == state.labels
    logits = np.where(comparable, cosines / options.temperature, -np.inf)
    similarity = (_softmax(logits, axis=0) + _softmax(logits, axis=1)) / 2
    candidates = comparable & (similarity > options.match_threshold) & (cosines > options.min_cosine)
    pairs: list[tuple[int, int]] = []
    rows, columns = np.nonzero(candidates)
    for k in np.argsort(-similarity[rows, columns], kind="stable"):
        row, column = int(rows[k]), int(columns[k])
        if all(row != i and column != j for i, j in pairs):
            pairs.append((row, column))
    return pairs


def _canonical_order(scores: np.ndarray, vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By falling score, then by embedding and label, so that ids and rounding do not depend on the order given."""
    return np.lexsort((labels, *vectors.T[::-1], -scores))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    """Softmax along an axis; 0 where all logits are -inf."""
    highest = logits.max(axis=axis, keepdims=True)
    exponentials = np.exp(logits - np.where(np.isfinite(highest), highest, 0))
    return exponentials / np.maximum(exponentials.sum(axis=axis, keepdims=True), 1e-300)
