"""The tracker: closed forms of its similarity, the life of a track, and properties on random scenes."""

import math

import numpy as np
import pytest

from knet_d2.video.tracker import NO_TRACK, Detections, TrackerOptions, TrackerState, new_state, one_owner, step

OPTIONS = TrackerOptions(
    min_score=0.3,
    new_track_score=0.35,
    match_threshold=0.5,
    min_cosine=0.5,
    temperature=0.1,
    momentum=0.8,
    memory=4,
    overlap_threshold=0.6,
)
NOTHING = Detections(np.zeros(0, int), np.zeros(0), np.zeros((0, 2)))


def objects(*angles: float, labels=0, scores=None) -> Detections:
    """Objects whose embeddings have given directions in the plane, in degrees, and lengths that must not matter.

    scores: falling, if none are given.
    """
    scores = 0.9 - 0.01 * np.arange(len(angles)) if scores is None else scores
    n, radians = len(angles), np.radians(angles)
    vectors = np.stack([np.cos(radians), np.sin(radians)], axis=1) * (1 + np.arange(n)[:, None])
    return Detections(np.broadcast_to(labels, n).copy(), np.broadcast_to(scores, n).astype(float), vectors)


def track(*frames: Detections, options=OPTIONS, state: TrackerState | None = None) -> list[list[int]]:
    state = state or new_state()
    found = []
    for frame in frames:
        state, ids = step(state, frame, options)
        found.append(ids.tolist())
    return found


def random_frames(rng, count=12, classes=3, size=6):
    """Noisy views of some objects that come and go, each with a score of its own, so that no two are equal."""
    centers, of_class = rng.normal(size=(size, 8)), rng.integers(classes, size=size)
    for _ in range(count):
        seen = np.flatnonzero(rng.random(size) < 0.7)
        vectors = centers[seen] + 0.3 * rng.normal(size=(len(seen), 8))
        yield Detections(of_class[seen], rng.uniform(0.25, 1, len(seen)), vectors)


def test_ids_follow_embeddings_and_not_places():
    assert track(objects(0, 90), objects(92, 3), objects(5, 88)) == [[1, 2], [2, 1], [1, 2]]
    assert track(objects(0, 90), state=new_state(first_id=7)) == [[7, 8]]


@pytest.mark.parametrize(("degrees", "same"), [(59, True), (61, False)])
def test_a_lone_pair_is_refused_by_the_cosine_alone(degrees, same):
    """Its two softmaxes are 1 whatever it looks like; cos 60 = 0.5 is the floor."""
    assert track(objects(0), objects(degrees)) == [[1], [1 if same else 2]]


def test_similarity_is_the_mean_of_two_softmaxes():
    """One detection between two equal tracks: (1 + 1/2) / 2 = 0.75 with each, and the older track gets it."""
    frames = objects(0, 0), objects(0)
    assert track(*frames)[1] == [1]
    assert track(*frames, options=OPTIONS._replace(match_threshold=0.75))[1] == [3]
    assert track(*frames, options=OPTIONS._replace(match_threshold=0.7499))[1] == [1]
    # Tracks at 0 and 30 degrees, detections at 10 and 20, in closed form
    logits = np.cos(np.radians([[10, 20], [20, 10]])) / OPTIONS.temperature
    expected = math.exp(logits[0, 0]) / (math.exp(logits[0, 0]) + math.exp(logits[0, 1]))
    frames = objects(0, 30), objects(10, 20)
    assert track(*frames, options=OPTIONS._replace(match_threshold=expected - 1e-9))[1] == [1, 2]
    assert track(*frames, options=OPTIONS._replace(match_threshold=expected + 1e-9))[1] == [3, 4]


def test_only_one_class_is_compared():
    """An equal object of another class is another track, and does not lower the similarity of the right one."""
    strict = OPTIONS._replace(match_threshold=0.99)
    frames = objects(0, 0, labels=[0, 1]), objects(0, 0, labels=[1, 0])
    assert track(*frames, options=strict)[1] == [2, 1]
    assert track(objects(0, labels=0), objects(0, labels=1)) == [[1], [2]]


def test_scores_start_and_prolong_tracks():
    """Strictly above 0.35 a track starts, strictly above 0.3 it goes on."""
    assert track(objects(0, scores=0.35), objects(0, scores=0.36)) == [[NO_TRACK], [1]]
    assert track(objects(0), objects(0, scores=0.31), objects(0, scores=0.3)) == [[1], [1], [NO_TRACK]]


@pytest.mark.parametrize(("missed", "found"), [(0, 1), (4, 1), (5, 2)])
def test_leave_and_return(missed, found):
    """After at most 4 missed frames an object has its id again; later it is a new one, and no id is used twice."""
    assert track(objects(0), *[NOTHING] * missed, objects(1))[-1] == [found]


def test_memory_of_frames_without_objects():
    """No object in the first, a middle and ten following frames: ids are unique, and the memory becomes empty."""
    state, empty = step(new_state(), NOTHING, OPTIONS)
    assert not len(empty)
    state, _ = step(state, objects(0, 90), OPTIONS)
    state, _ = step(state, NOTHING, OPTIONS)
    state, ids = step(state, objects(0), OPTIONS)
    assert ids.tolist() == [1] and state.ids.tolist() == [1, 2]
    for _ in range(10):
        state, _ = step(state, NOTHING, OPTIONS)
    assert not len(state.ids) and state.frame == 14
    assert step(state, objects(0), OPTIONS)[1].tolist() == [3]


def test_embedding_is_a_running_mean():
    """0.8 of the new direction and 0.2 of the old one."""
    state, _ = step(new_state(), objects(0), OPTIONS)
    state, _ = step(state, objects(30), OPTIONS)
    expected = 0.8 * np.array([math.cos(math.pi / 6), 0.5]) + 0.2 * np.array([1, 0])
    np.testing.assert_allclose(state.embeddings[0], expected, atol=1e-15)


def test_state_is_not_changed():
    state, _ = step(new_state(), objects(0, 90), OPTIONS)
    before = [np.copy(x) for x in state]
    assert step(state, objects(3, 80), OPTIONS)[1].tolist() == step(state, objects(3, 80), OPTIONS)[1].tolist()
    for x, y in zip(state, before):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("seed", range(20))
def test_permuted_detections_give_permuted_ids(seed):
    rng = np.random.default_rng(seed)
    state = permuted_state = new_state()
    for frame in random_frames(rng):
        order = rng.permutation(len(frame.scores))
        state, ids = step(state, frame, OPTIONS)
        permuted_state, permuted = step(permuted_state, Detections(*(x[order] for x in frame)), OPTIONS)
        np.testing.assert_array_equal(permuted, ids[order])
        for a, b in zip(state, permuted_state):
            np.testing.assert_array_equal(a, b)  # to the last bit


@pytest.mark.parametrize("seed", range(20))
def test_names_do_not_matter(seed):
    """Other numbers of the classes give the same ids; another first id, and other lengths of embeddings, too."""
    rng = np.random.default_rng(seed)
    frames = list(random_frames(rng))
    names = rng.permutation(100)
    renamed = [frame._replace(labels=names[frame.labels]) for frame in frames]
    expected = track(*frames)
    assert track(*renamed) == expected
    longer = [frame._replace(embeddings=frame.embeddings * 8.0) for frame in frames]
    shifted = [[i and i + 10 for i in ids] for ids in expected]
    assert track(*longer, state=new_state(first_id=11)) == shifted


@pytest.mark.parametrize("seed", range(20))
def test_ids_are_unique_and_keep_their_class(seed):
    rng, of_id, last = np.random.default_rng(seed), {}, 0
    frames = list(random_frames(rng))
    for frame, ids in zip(frames, track(*frames)):
        real = [i for i in ids if i != NO_TRACK]
        assert len(set(real)) == len(real)
        for i, label, score in zip(ids, frame.labels, frame.scores):
            assert i != NO_TRACK or score <= OPTIONS.new_track_score
            assert i == NO_TRACK or of_id.setdefault(i, label) == label
        assert sorted(set(real) - set(range(1, last + 1))) == list(range(last + 1, max([last, *real]) + 1))
        last = max([last, *real])


def test_one_owner_of_a_pixel():
    masks = np.zeros((4, 1, 10), bool)
    masks[0, 0, :5] = True  # twin of the next one with a lower score: keeps nothing
    masks[1, 0, :5] = True
    masks[2, 0, 3:8] = True  # keeps 3 of 5 pixels, exactly the threshold
    masks[3, 0, 4:10] = True  # keeps 2 of 6 pixels: left out, and takes none
    kept, owned = one_owner(masks, np.array([0.5, 0.9, 0.8, 0.7]), 0.6)
    assert kept.tolist() == [1, 2]
    assert owned[:, 0].astype(int).tolist() == [[1] * 5 + [0] * 5, [0] * 5 + [1] * 3 + [0] * 2]
    kept, owned = one_owner(masks[:0], np.zeros(0), 0.6)
    assert kept.shape == (0,) and owned.shape == (0, 1, 10)
    assert not len(one_owner(np.zeros((1, 2, 2), bool), np.ones(1), 0.0)[0])  # an empty mask is no object
